"""Moving the traffic of real pods: what the cluster says is all that is known."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from rollout.clients.cluster import ClusterClient
from rollout.clients.traffic import Traffic, TrafficClient
from rollout.delivery import (
    IN_PLACE,
    ORDER_ANNOTATION,
    DeliveryKind,
    DeliveryReport,
    DeliveryStrategy,
    GatewayRef,
    Order,
    suffixed,
)
from rollout.model import ModelFile, PinnedModel
from rollout.objects import serving_objects
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy
from rollout.report import Action
from rollout.revisions import planned_objects, revision_of_plan
from rollout.serving import Resources, ServingSpec
from rollout.target import Cluster, ClusterMode, Target
from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.gateway import GatewayServer, ServiceProxy

PROGRAM = (sys.executable, str(Path(__file__).with_name("pod_program.py")))
DEADLINE_S = 120.0
MODEL = PinnedModel(
    repo_id="tests/model",
    revision="main",
    commit_sha="0" * 40,
    files=(ModelFile(path="config.json", size_bytes=2, git_blob_sha1="1" * 40),),
)
SERVICE_ONLY = DeliveryStrategy(kind=DeliveryKind.CANARY)
BY_GATEWAY = DeliveryStrategy(kind=DeliveryKind.CANARY, gateway=GatewayRef(name="models"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    root = tmp_path_factory.mktemp("cluster")
    with KubernetesServer(
        root,
        runners={"test/": PROGRAM},
        nodes=NodeSettings(creation_s=0.0),
        image_pull_s=0.0,
        longest_probe_period_s=0.1,
    ) as started:
        yield started


NUMBERS = itertools.count(1)


@pytest.fixture
def cluster(server: KubernetesServer, tmp_path: Path) -> ClusterClient:
    """A namespace of its own for each test."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    return ClusterClient.connect(
        Target(
            name="test",
            project="my-project",
            region="u-france-east1",
            bucket="weights",
            namespace=f"traffic-{next(NUMBERS)}",
            cluster=Cluster(mode=ClusterMode.KUBECONFIG, kubeconfig=str(kubeconfig)),
        )
    )


Planner = Callable[..., RolloutPlan]


@pytest.fixture
def plan_for(cluster: ClusterClient) -> Planner:
    """The plan of one version; `version` is all that differs."""

    def make(version: str, strategy: DeliveryStrategy = SERVICE_ONLY, **changes: Any) -> RolloutPlan:
        serving = ServingSpec(
            name="server",
            service_name="llm",
            app="server",
            served_model_name="tests/model",
            image="test/server:1",
            command=("serve", "0"),
            resources=Resources(cpu="1", memory="1Gi", ephemeral_storage="1Gi"),
            env={"VERSION": version},
            termination_grace_period_s=1,
        ).model_copy(update=changes)
        objects = planned_objects(MODEL, serving, cluster.target, strategy, rollout_id=version)
        policy = RolloutPolicy(delivery=strategy)
        return make_plan(MODEL, serving, cluster.target, policy, Observation(), objects)

    return make


def deploy(cluster: ClusterClient, plan: RolloutPlan) -> str:
    revision = revision_of_plan(plan)
    cluster.apply(plan.objects)
    cluster.wait_available(suffixed(plan.serving.name, revision), deadline_s=DEADLINE_S)
    return revision


def deploy_in_place(cluster: ClusterClient, plan: RolloutPlan) -> None:
    cluster.apply(serving_objects(MODEL, plan.serving, cluster.target, rollout_id=plan.rollout_id))
    cluster.wait_available(plan.serving.name, deadline_s=DEADLINE_S)


def ready_pods(cluster: ClusterClient, service: str) -> set[str]:
    """The Deployments, without the pods' own suffixes, that a Service leads to."""
    path = cluster.api.resource("discovery.k8s.io/v1", "EndpointSlice").path(cluster.target.namespace)
    slices = cluster.api.get(path, {"labelSelector": f"kubernetes.io/service-name={service}"})["items"]
    endpoints = [endpoint for each in slices for endpoint in each.get("endpoints") or []]
    ready = [endpoint["targetRef"]["name"] for endpoint in endpoints if endpoint["conditions"]["ready"]]
    return {name.rsplit("-", 2)[0] for name in ready}


def test_the_service_goes_from_in_place_to_shared_to_the_revision_and_back(
    cluster: ClusterClient, plan_for: Planner
) -> None:
    old, new = plan_for("old"), plan_for("new")
    traffic = TrafficClient(cluster, new)
    assert traffic.read() == Traffic(live=None)
    deploy_in_place(cluster, old)
    revision = deploy(cluster, new)
    assert traffic.read() == Traffic(live=IN_PLACE, weights={IN_PLACE: 100}, revisions=(revision, IN_PLACE))
    # A new revision's pods never stand behind the Service before they are given traffic.
    assert ready_pods(cluster, "llm") == {"server"}

    traffic.shift(IN_PLACE, revision, 50)
    assert ready_pods(cluster, "llm") == {"server", f"server-{revision}"}
    assert traffic.read().live == IN_PLACE
    traffic.shift(IN_PLACE, revision, 100)
    assert ready_pods(cluster, "llm") == {f"server-{revision}"}
    assert traffic.read().live == revision
    assert all(change.action is Action.UNCHANGED for change in traffic.shift(IN_PLACE, revision, 100))

    traffic.restore(IN_PLACE)
    assert ready_pods(cluster, "llm") == {"server"}
    assert ready_pods(cluster, "llm-inplace") == {"server"}


def test_weights_move_by_the_gateway_and_the_service_follows_the_promotion(
    server: KubernetesServer, cluster: ClusterClient, plan_for: Planner
) -> None:
    first, second = plan_for("first", BY_GATEWAY), plan_for("second", BY_GATEWAY)
    with GatewayServer(server, namespace=cluster.target.namespace, gateway="models"):
        traffic = TrafficClient(cluster, second)
        one = deploy(cluster, first)
        TrafficClient(cluster, first).shift(None, one, 100)
        two = deploy(cluster, second)
        traffic.shift(one, two, 5)
        assert traffic.read() == Traffic(live=one, weights={one: 95, two: 5}, revisions=tuple(sorted((one, two))))
        assert ready_pods(cluster, "llm") == {f"server-{one}"}
        traffic.shift(one, two, 100)
        assert traffic.read().weights == {one: 0, two: 100}
        assert ready_pods(cluster, "llm") == {f"server-{two}"}

        traffic.restore(two)
        assert traffic.drain(one, timeout_s=DEADLINE_S) == 0
        kinds = {change.kind for change in traffic.retire(one)}
        assert {"Deployment", "Service"} <= kinds
        assert traffic.read() == Traffic(live=two, weights={two: 100}, revisions=(two,))


def test_a_dead_delivery_is_taken_back_and_a_finished_one_is_not(cluster: ClusterClient, plan_for: Planner) -> None:
    old, new = plan_for("old"), plan_for("new")
    traffic = TrafficClient(cluster, new)
    deploy_in_place(cluster, old)
    revision = deploy(cluster, new)
    traffic.shift(IN_PLACE, revision, 50)
    dead = DeliveryReport(kind=DeliveryKind.CANARY, live_before=IN_PLACE, revision=revision)
    assert traffic.undo(dead) != ()
    assert traffic.read() == Traffic(live=IN_PLACE, weights={IN_PLACE: 100}, revisions=(IN_PLACE,))
    assert traffic.undo(dead) == ()


def test_an_answer_in_flight_outlives_the_revision_that_gives_it(
    server: KubernetesServer, cluster: ClusterClient, plan_for: Planner, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    patient = {"env": {"RELEASE": str(release)}, "termination_grace_period_s": 120}
    old, new = plan_for("old", **patient), plan_for("new")
    traffic = TrafficClient(cluster, new)
    one = deploy(cluster, old)
    TrafficClient(cluster, old).shift(None, one, 100)
    two = deploy(cluster, new)
    with (
        ServiceProxy(server, namespace=cluster.target.namespace, service="llm") as proxy,
        requests.get(f"{proxy.url}/slow", stream=True, timeout=DEADLINE_S) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines) == b"data: piece"
        traffic.shift(one, two, 100)
        assert traffic.in_flight(one) == 1
        assert traffic.drain(one, timeout_s=0.0) == 1
        # Nobody waits for it any more: its pod is deleted in the middle of the answer.
        retiring = threading.Thread(target=traffic.retire, args=(one,))
        retiring.start()
        seen = [line for _, line in zip(range(20), lines, strict=False) if line]
        assert set(seen) == {b"data: piece"}
        release.touch()
        rest = [line for line in lines if line]
        retiring.join()
    assert rest[-1] == b"data: [DONE]"
    assert traffic.read().revisions == (two,)


def test_the_operators_word_is_heard_and_gibberish_holds(cluster: ClusterClient, plan_for: Planner) -> None:
    plan = plan_for("only")
    traffic = TrafficClient(cluster, plan)
    revision = deploy(cluster, plan)
    assert traffic.order(revision) is None
    for word, heard in (("roll-back", Order.ROLL_BACK), ("promote", Order.PROMOTE), ("wait!", Order.HOLD)):
        say(cluster, suffixed("server", revision), word)
        assert traffic.order(revision) is heard
    assert traffic.order("nobody") is None


def say(cluster: ClusterClient, deployment: str, word: str) -> None:
    path = cluster.api.resource("apps/v1", "Deployment").path(cluster.target.namespace, deployment)
    body = {"metadata": {"annotations": {ORDER_ANNOTATION: word}}}
    cluster.api.request("PATCH", path, {"fieldManager": "kubectl-annotate"}, body, "application/merge-patch+json")
