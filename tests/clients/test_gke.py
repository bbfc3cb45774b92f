"""Clusters: created, adopted, joined, observed, deleted, and their failures told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout.clients.gke import Connection, Gke, Progress
from rollout.clients.google_auth import RestApi
from rollout.errors import BadInput, DeadlineExceeded, NotFound, PermissionMissing, QuotaExceeded, RolloutError
from rollout.report import Action
from rollout.target import Cluster, ClusterMode, NodePool, Target
from sandbox.faults import FaultRule, Reply
from sandbox.google_apis import Delays, GoogleApisServer

H100_POOL = NodePool(machine_type="a3-highgpu-1g", accelerator_count=1, spot=True, max_nodes=4, boot_disk_gib=200)
STANDARD = Cluster(mode=ClusterMode.STANDARD, node_pool=H100_POOL)
BARE: dict[str, object] = {"cluster": {"name": "llm-serving", "initialNodeCount": 1}}

ServerMaker = Callable[..., GoogleApisServer]


class SteppedClock:
    """The cloud's clock, which moves only when an operation's progress is shown: 30 s each time."""

    def __init__(self, server: GoogleApisServer) -> None:
        self.seen: list[Progress] = []
        self._now = server.cloud.now()
        server.cloud.clock = lambda: self._now

    def show(self, progress: Progress) -> None:
        self.seen.append(progress)
        self._now += 30.0


TargetMaker = Callable[..., Target]


def made_by_somebody_else(target: Target, body: dict[str, object] = BARE) -> None:
    RestApi(target, "container").post(f"/v1/projects/{target.project}/locations/{target.region}/clusters", body)


def test_an_autopilot_cluster_is_made_as_the_tutorial_says_and_observable(
    google_target: Target, google_apis: GoogleApisServer
) -> None:
    google_apis.connect_cluster("127.0.0.1:6443", "PEM")

    cluster, change = Gke(google_target).ensure({"rollout": "r1"})

    assert (change.action, change.kind, change.name) == (Action.CREATED, "Cluster", "llm-serving")
    assert (cluster.is_autopilot, cluster.status, cluster.release_channel) == (True, "RUNNING", "rapid")
    assert cluster.workload_pool == "rehearsal-project.s3ns.svc.id.goog"
    assert cluster.labels == {"managed-by": "llm-rollout", "rollout": "r1"}
    assert cluster.is_observable
    assert cluster.connection == Connection(url="https://127.0.0.1:6443", ca_pem="PEM")


def test_a_standard_cluster_has_workload_identity_and_the_gpu_node_pool(
    google_apis: GoogleApisServer, target_for: TargetMaker
) -> None:
    cluster, _ = Gke(target_for(google_apis, cluster=STANDARD)).ensure()

    pool = next(pool for pool in cluster.node_pools if pool.name == "gpu-pool")
    assert cluster.workload_pool == "rehearsal-project.s3ns.svc.id.goog"
    assert not cluster.is_autopilot
    assert (pool.machine_type, pool.accelerator, pool.accelerator_count) == ("a3-highgpu-1g", "nvidia-h100-80gb", 1)
    assert (pool.is_spot, pool.boot_disk_gib, pool.status) == (True, 200, "RUNNING")
    assert (pool.version, pool.gpu_driver) == (cluster.node_version, "default")


def test_a_second_run_finds_our_cluster_unchanged(google_target: Target, google_apis: GoogleApisServer) -> None:
    first, _ = Gke(google_target).ensure()
    google_apis.requests.clear()

    second, change = Gke(google_target).ensure()

    assert (second, change.action) == (first, Action.UNCHANGED)
    assert {record.method for record in google_apis.requests.snapshot()} == {"GET"}


def test_somebody_elses_cluster_is_adopted(google_target: Target) -> None:
    made_by_somebody_else(google_target)

    cluster, change = Gke(google_target).ensure()

    assert (change.action, cluster.is_ours) == (Action.ADOPTED, False)


def test_a_creation_that_is_under_way_is_joined(serve_google_apis: ServerMaker, target_for: TargetMaker) -> None:
    """As after `kill -9` of the run that started it."""
    server = serve_google_apis(delays=Delays(cluster_creation_s=60.0))
    target = target_for(server)
    clock = SteppedClock(server)
    made_by_somebody_else(target)

    cluster, change = Gke(target).ensure(on_progress=clock.show)

    assert (cluster.status, change.action) == ("RUNNING", Action.ADOPTED)
    assert clock.seen[0].operation == "CREATE_CLUSTER"


def test_progress_rises_to_one(serve_google_apis: ServerMaker, target_for: TargetMaker) -> None:
    server = serve_google_apis(delays=Delays(cluster_creation_s=60.0))
    clock = SteppedClock(server)

    Gke(target_for(server)).ensure(on_progress=clock.show)

    shares = [progress.share for progress in clock.seen]
    assert shares == [0.0, 0.5, 1.0]
    assert [progress.status for progress in clock.seen] == ["RUNNING", "RUNNING", "DONE"]


def test_lost_answers_while_waiting_do_not_fail_the_wait(
    serve_google_apis: ServerMaker, target_for: TargetMaker
) -> None:
    server = serve_google_apis(delays=Delays(cluster_creation_s=60.0))
    clock = SteppedClock(server)
    server.faults.add(FaultRule(fault=Reply(status=502), method="GET", path="/operations/", first=2))

    cluster, _ = Gke(target_for(server)).ensure(on_progress=clock.show)

    assert cluster.status == "RUNNING"
    assert server.faults.injected == {"reply": 2}


def test_the_deadline_ends_the_wait_and_leaves_gke_to_it(
    serve_google_apis: ServerMaker, target_for: TargetMaker
) -> None:
    gke = Gke(target_for(serve_google_apis(delays=Delays(cluster_creation_s=1e6))))

    with pytest.raises(DeadlineExceeded, match="CREATE_CLUSTER is RUNNING"):
        gke.ensure(timeout_s=0.0)

    found = gke.get()
    assert found is not None
    assert found.status == "PROVISIONING"


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        ("Insufficient quota to satisfy the request: NVIDIA_H100_GPUS", QuotaExceeded, "more quota"),
        ("GCE_STOCKOUT: Instance creation failed", RolloutError, "no such machines left"),
        ("Internal error", RolloutError, "Delete what is half-made"),
    ],
)
def test_a_failed_operation_says_why_and_what_to_do(
    google_target: Target, google_apis: GoogleApisServer, message: str, kind: type[RolloutError], said: str
) -> None:
    google_apis.fail_next_operation(message)

    with pytest.raises(kind, match=message) as caught:
        Gke(google_target).ensure()

    assert said in caught.value.resolution
    with pytest.raises(RolloutError, match="the cluster is ERROR"):
        Gke(google_target).ensure()


def test_an_absent_cluster_is_not_made_against_the_targets_wish(
    google_apis: GoogleApisServer, target_for: TargetMaker
) -> None:
    gke = Gke(target_for(google_apis, cluster=Cluster(create_if_absent=False)))

    with pytest.raises(NotFound, match="create_if_absent"):
        gke.ensure()

    assert gke.get() is None


def test_a_missing_permission_is_named(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.deny("container.clusters.create")

    with pytest.raises(PermissionMissing, match=r"container\.clusters\.create"):
        Gke(google_target).ensure()


def test_an_adopted_cluster_becomes_observable_without_losing_what_it_watches(google_target: Target) -> None:
    made_by_somebody_else(google_target)
    gke = Gke(google_target)

    first, second = gke.ensure_observability(), gke.ensure_observability()

    found = gke.get()
    assert first is not None
    assert found is not None
    assert (first.action, first.detail, second) == (Action.UPDATED, "observability", None)
    assert found.is_observable
    assert "CADVISOR" in found.monitoring


def test_labels_are_added_to_those_that_are_there(google_target: Target) -> None:
    gke = Gke(google_target)
    gke.ensure({"rollout": "r1"})

    change, again = gke.ensure_labels({"owner": "me"}), gke.ensure_labels({"owner": "me"})

    found = gke.get()
    assert found is not None
    assert found.labels == {"managed-by": "llm-rollout", "rollout": "r1", "owner": "me"}
    assert (change is not None, again) == (True, None)


def test_a_cluster_that_serves_is_not_held_up_by_other_operations(
    serve_google_apis: ServerMaker, target_for: TargetMaker
) -> None:
    """GKE upgrades nodes for hours; the cluster can be used meanwhile."""
    server = serve_google_apis(delays=Delays(cluster_creation_s=0.0, node_pool_s=1e6))
    made_by_somebody_else(target_for(server))
    gke = Gke(target_for(server, cluster=STANDARD))
    with pytest.raises(DeadlineExceeded, match="CREATE_NODE_POOL"):
        gke.ensure_node_pool(timeout_s=0.0)

    cluster, _ = gke.ensure(timeout_s=0.0)

    assert cluster.status == "RUNNING"


def test_a_node_pool_that_is_being_made_is_awaited(serve_google_apis: ServerMaker, target_for: TargetMaker) -> None:
    server = serve_google_apis(delays=Delays(cluster_creation_s=0.0, node_pool_s=60.0))
    clock = SteppedClock(server)
    made_by_somebody_else(target_for(server))
    gke = Gke(target_for(server, cluster=STANDARD))
    with pytest.raises(DeadlineExceeded):
        gke.ensure_node_pool(timeout_s=0.0)

    assert gke.ensure_node_pool(on_progress=clock.show) is None

    found = gke.get()
    assert found is not None
    assert [pool.status for pool in found.node_pools] == ["RUNNING", "RUNNING"]


def test_a_node_pool_is_made_once_and_deleted_once(google_apis: GoogleApisServer, target_for: TargetMaker) -> None:
    gke = Gke(target_for(google_apis, cluster=STANDARD))
    made_by_somebody_else(target_for(google_apis))

    made, again = gke.ensure_node_pool(), gke.ensure_node_pool()
    deleted, gone = gke.delete_node_pool("gpu-pool"), gke.delete_node_pool("gpu-pool")

    assert made is not None
    assert deleted is not None
    assert (made.action, made.name) == (Action.CREATED, "llm-serving/gpu-pool")
    assert (again, deleted.action, gone) == (None, Action.DELETED, None)


def test_auto_created_node_pools_are_seen(google_target: Target, google_apis: GoogleApisServer) -> None:
    gke = Gke(google_target)
    gke.ensure()
    google_apis.register_node_pool("llm-serving", {"name": "nap-a3", "config": {"machineType": "a3-highgpu-1g"}})
    during = gke.get()
    google_apis.unregister_node_pool("llm-serving", "nap-a3")
    after = gke.get()

    assert during is not None
    assert after is not None
    assert [pool.name for pool in during.node_pools] == ["default-pool", "nap-a3"]
    assert [pool.name for pool in after.node_pools] == ["default-pool"]


def test_a_cluster_is_deleted_after_what_is_under_way(serve_google_apis: ServerMaker, target_for: TargetMaker) -> None:
    server = serve_google_apis(delays=Delays(cluster_creation_s=30.0, cluster_change_s=30.0))
    target = target_for(server)
    clock = SteppedClock(server)
    made_by_somebody_else(target)
    gke = Gke(target)

    deleted, gone = gke.delete(on_progress=clock.show), gke.delete()

    assert deleted is not None
    assert (deleted.action, gone, gke.get()) == (Action.DELETED, None, None)


def test_versions_come_by_channel_the_default_first(google_target: Target) -> None:
    versions = Gke(google_target).server_versions()

    assert versions.by_channel["rapid"][0].startswith("1.36")
    assert versions.default == versions.by_channel["regular"][0]


def test_a_kubeconfig_target_has_no_gke(google_apis: GoogleApisServer, target_for: TargetMaker) -> None:
    with pytest.raises(BadInput, match="kubeconfig"):
        Gke(target_for(google_apis, cluster=Cluster(mode=ClusterMode.KUBECONFIG)))
