"""Room for pods is counted in whole machines, on nodes that are there and on nodes that may come."""

from __future__ import annotations

import pytest

from rollout.capacity import GpuRoom, check_surge, gpus_at_once, gpus_per_node
from rollout.delivery import DeliveryKind, DeliveryStrategy
from rollout.model import PinnedModel
from rollout.plan import Observation, make_plan
from rollout.policy import RolloutPolicy
from rollout.preflight import CheckState
from rollout.report import Action, Change
from rollout.serving import Accelerator, ServingSpec, UpdateStrategy
from rollout.target import Cluster, ClusterMode, NodePool, Target

SERVING = ServingSpec(served_model_name="m")
THREE_PAIRS = ServingSpec(served_model_name="m", replicas=3, accelerator=Accelerator(count=2))
IN_PLACE = DeliveryStrategy()
CANARY = DeliveryStrategy(kind=DeliveryKind.CANARY)
TARGET = Target(name="t", project="my-project", region="r", bucket="my-bucket")


@pytest.mark.parametrize(
    ("room", "replicas", "gpus", "nodes"),
    [
        (GpuRoom(gpus_per_node=8, free_quota=None), 1, 1, 1),
        (GpuRoom(gpus_per_node=8, free_quota=None), 9, 1, 2),
        (GpuRoom(gpus_per_node=8, free_quota=None, idle_gpus=7), 7, 1, 0),
        (GpuRoom(gpus_per_node=8, free_quota=None, idle_gpus=6), 4, 4, 2),
        (GpuRoom(gpus_per_node=1, free_quota=None), 0, 1, 0),
    ],
)
def test_new_nodes_are_what_the_idle_gpus_do_not_hold(room: GpuRoom, replicas: int, gpus: int, nodes: int) -> None:
    assert room.new_nodes(replicas, gpus) == nodes


@pytest.mark.parametrize(
    ("room", "replaces_pods", "state"),
    [
        (GpuRoom(gpus_per_node=8, free_quota=8), False, CheckState.OK),
        (GpuRoom(gpus_per_node=1, free_quota=1), False, CheckState.WARNING),
        (GpuRoom(gpus_per_node=1, free_quota=0), True, CheckState.FAILED),
        (GpuRoom(gpus_per_node=8, free_quota=0, idle_gpus=7), True, CheckState.OK),
        (GpuRoom(gpus_per_node=1, free_quota=9, more_nodes=0), True, CheckState.FAILED),
        (GpuRoom(gpus_per_node=1, free_quota=9, more_nodes=1), True, CheckState.OK),
        (GpuRoom(gpus_per_node=1, free_quota=None), True, CheckState.UNKNOWN),
        (GpuRoom(gpus_per_node=1, free_quota=None, idle_gpus=1), True, CheckState.OK),
    ],
)
def test_a_rolling_update_needs_room_for_one_more_pod(room: GpuRoom, replaces_pods: bool, state: CheckState) -> None:
    check = check_surge(SERVING, IN_PLACE, room, running=int(replaces_pods), replaces_pods=replaces_pods)
    assert check.state is state
    assert ("strategy: recreate" in check.resolution) == (state is not CheckState.OK)


def test_recreate_needs_no_spare_gpu() -> None:
    serving = SERVING.model_copy(update={"strategy": UpdateStrategy.RECREATE})
    full = GpuRoom(gpus_per_node=1, free_quota=0)
    check = check_surge(serving, IN_PLACE, full, running=1, replaces_pods=True)
    assert check.state is CheckState.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("free", "running", "beside_live", "state"),
    [
        (6, 0, True, CheckState.OK),
        (5, 0, True, CheckState.FAILED),
        (0, 3, True, CheckState.OK),
        (12, 0, False, CheckState.OK),
        (11, 0, False, CheckState.WARNING),
        (6, 3, False, CheckState.OK),
    ],
)
def test_a_canary_needs_room_for_all_its_pods_beside_the_live_ones(
    free: float, running: int, beside_live: bool, state: CheckState
) -> None:
    room = GpuRoom(gpus_per_node=2, free_quota=free)
    check = check_surge(THREE_PAIRS, CANARY, room, running=running, replaces_pods=beside_live)
    assert check.state is state
    assert ("kind: rolling" in check.resolution) == (state is not CheckState.OK)


@pytest.mark.parametrize(
    ("strategy", "live", "gpus"),
    [
        (IN_PLACE, Action.CREATED, 6),
        (IN_PLACE, Action.UNCHANGED, 6),
        (IN_PLACE, Action.UPDATED, 8),
        (CANARY, Action.CREATED, 12),
    ],
)
def test_a_rollout_holds_the_gpus_of_all_pods_that_are_there_at_once(
    strategy: DeliveryStrategy, live: Action, gpus: int
) -> None:
    deployment = {"kind": "Deployment", "metadata": {"name": "m", "namespace": "default"}}
    observed = Observation(object_changes=(Change(action=live, kind="Deployment", name="default/m"),))
    model = PinnedModel(repo_id="google/gemma", revision="main", commit_sha="a" * 40, files=())
    policy = RolloutPolicy(delivery=strategy)
    assert gpus_at_once(make_plan(model, THREE_PAIRS, TARGET, policy, observed, [deployment])) == gpus


def test_the_machine_follows_from_pool_class_or_accelerator() -> None:
    pool = Cluster(mode=ClusterMode.STANDARD, node_pool=NodePool(accelerator_count=2))
    assert gpus_per_node(SERVING, TARGET) == 8
    assert gpus_per_node(SERVING, TARGET.model_copy(update={"cluster": pool})) == 2
    by_label = SERVING.model_copy(update={"accelerator": Accelerator(compute_class=None, count=3)})
    assert gpus_per_node(by_label, TARGET) == 4
