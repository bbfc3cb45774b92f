"""Load from inside the cluster: a Job of inference-perf's image against real pods, and everything that can go wrong."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rollout.benchmark import BenchmarkSpec, Engine, PlannedStage
from rollout.clients.cluster import ClusterClient
from rollout.clients.load_job import LoadJobs
from rollout.clients.loadgen import run_benchmark
from rollout.errors import BadInput, LoadFailed
from rollout.model import ModelFile, PinnedModel
from rollout.objects import INSTANCE_LABEL, serving_objects
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy
from rollout.serving import Resources, ServingSpec
from rollout.stage import RequestLimits, Stage
from rollout.target import Cluster, ClusterMode, Target
from rollout.workload import fixed_workload
from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.hub import HubServer
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model

REPO = "tests/model"
SPEC = BenchmarkSpec(
    workload=fixed_workload(20, 8), engine=Engine.INFERENCE_PERF, rates_per_s=(4.0, 8.0), stage_duration_s=2.0
)
PLANNED = PlannedStage(rate_per_s=4.0, duration_s=2.0)
MODEL = PinnedModel(
    repo_id=REPO,
    revision="main",
    commit_sha="0" * 40,
    files=(ModelFile(path="config.json", size_bytes=2, git_blob_sha1="1" * 40),),
)
DEADLINE_S = 120.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    root = tmp_path_factory.mktemp("cluster")
    model = tiny_model(root / "model")
    HubStore(root / "hub").publish(REPO, model)
    # Whatever the container's arguments say, it serves the folder.
    serve = shlex.join([sys.executable, "-m", "sandbox.engine", "serve", "vllm", "serve", str(model)])
    engine = ("sh", "-c", f"exec {serve} --served-model-name={REPO}", "sh")
    with (
        HubServer(root=root / "hub") as hub,
        KubernetesServer(
            root / "state",
            runners={"engine/": engine},
            nodes=NodeSettings(creation_s=0.0),
            image_pull_s=0.0,
            longest_probe_period_s=0.1,
            environment={"HF_ENDPOINT": hub.url},
        ) as started,
    ):
        yield started


@pytest.fixture(scope="module")
def cluster(server: KubernetesServer, tmp_path_factory: pytest.TempPathFactory) -> ClusterClient:
    kubeconfig = server.kubeconfig(tmp_path_factory.mktemp("access") / "kubeconfig")
    return ClusterClient.connect(
        Target(
            name="test",
            project="my-project",
            region="u-france-east1",
            bucket="weights",
            namespace="load",
            cluster=Cluster(mode=ClusterMode.KUBECONFIG, kubeconfig=str(kubeconfig)),
        )
    )


@pytest.fixture(scope="module")
def plan(cluster: ClusterClient) -> RolloutPlan:
    """A model that serves; no test changes it."""
    serving = ServingSpec(
        name="server",
        service_name="llm",
        app="server",
        served_model_name=REPO,
        image="engine/vllm:1",
        resources=Resources(cpu="1", memory="1Gi", ephemeral_storage="1Gi"),
        termination_grace_period_s=1,
    )
    objects = serving_objects(MODEL, serving, cluster.target, rollout_id="r1")
    made = make_plan(MODEL, serving, cluster.target, RolloutPolicy(), Observation(), objects)
    cluster.apply(made.objects)
    cluster.wait_available("server", deadline_s=DEADLINE_S)
    return made


def left_behind(cluster: ClusterClient, plan: RolloutPlan) -> set[str]:
    """What is ours in the namespace beside the plan's own objects, by kind."""
    planned = {(each["kind"], each["metadata"]["name"]) for each in plan.objects}
    found = cluster.inventory({INSTANCE_LABEL: plan.serving.name})
    return {
        each["kind"]
        for each in found
        if (each["kind"], each["metadata"]["name"]) not in planned and not each["metadata"].get("ownerReferences")
    }


def jobs(cluster: ClusterClient, plan: RolloutPlan, url: str = "http://127.0.0.1:9", **changes: Any) -> LoadJobs:
    spec = SPEC.model_copy(update={"load_image": changes.pop("image", None)})
    return LoadJobs(cluster, plan, spec, pods=("a",), metrics_url=url, **changes)


def test_a_sweep_runs_in_the_cluster_and_leaves_nothing_behind(cluster: ClusterClient, plan: RolloutPlan) -> None:
    progress: list[str] = []
    with cluster.endpoint("llm") as url:

        def in_cluster(spec: BenchmarkSpec) -> LoadJobs:
            limits = RequestLimits(ttft_s=60.0)
            return LoadJobs(
                cluster, plan, spec, pods=("a",), metrics_url=url, limits=limits, on_progress=progress.append
            )

        report = run_benchmark(url, SPEC, model=REPO, in_cluster=in_cluster)
    assert [(stage.rate_per_s, stage.completed) for stage in report.stages] == [(4.0, 8), (8.0, 16)]
    stage = report.stages[-1]
    assert stage.itl_s is not None
    assert stage.itl_s.count == 16 * 7
    assert stage.goodput_per_s is not None
    assert stage.client is not None
    assert stage.server is not None
    assert stage.server.running_max >= 1
    assert any("inference-perf runs" in line for line in progress), progress
    assert left_behind(cluster, plan) == set()


def test_a_killed_runs_job_is_taken_up_and_not_started_again(cluster: ClusterClient, plan: RolloutPlan) -> None:
    objects = jobs(cluster, plan).manifests(PLANNED, 0, 600.0)
    cluster.apply(objects)  # and then its run was killed
    killed = cluster.find(objects[-1])
    assert killed is not None
    measured: list[Stage] = []
    thread = threading.Thread(target=lambda: measured.append(jobs(cluster, plan).measure(PLANNED)))
    thread.start()
    pods: set[str] = set()
    while thread.is_alive():
        listed = cluster.api.get(cluster.api.resource("v1", "Pod").path(cluster.target.namespace))["items"]
        pods |= {pod["metadata"]["name"] for pod in listed if "-load-" in pod["metadata"]["name"]}
        thread.join(0.1)
    assert [stage.completed for stage in measured] == [8]
    assert len(pods) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"image": "quay.io/nobody/nothing:1"}, r"does not start.*image"),
        # The hub's answer to a wrong token: it has come as far as the load.
        ({"hub_token": "hf_wrong"}, r"exit code 1 .*401"),
    ],
    ids=["no-such-image", "wrong-token"],
)
def test_the_pods_reason_is_the_failures_reason(
    cluster: ClusterClient, plan: RolloutPlan, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(LoadFailed, match=f"(?s){why}"):
        jobs(cluster, plan, **changes).measure(PLANNED)
    assert left_behind(cluster, plan) == set()


def test_a_failed_job_that_was_left_behind_is_started_anew(cluster: ClusterClient, plan: RolloutPlan) -> None:
    config_map, service, job = jobs(cluster, plan).manifests(PLANNED, 0, 600.0)
    unreadable = {**config_map, "data": {"config.yml": "api: {type: completion, streaming: true, colour: red}"}}
    cluster.apply([unreadable, service, job])
    wait_until(lambda: bool(((cluster.find(job) or {}).get("status") or {}).get("conditions")))
    assert jobs(cluster, plan).measure(PLANNED).completed == 8
    assert left_behind(cluster, plan) == set()


def wait_until(condition: Callable[[], bool]) -> None:
    stop = threading.Event()
    for _ in range(int(DEADLINE_S / 0.2)):
        if condition():
            return
        stop.wait(0.2)
    raise AssertionError("it did not happen")


def test_without_a_cluster_the_engine_is_refused() -> None:
    with pytest.raises(BadInput, match="only a URL"):
        run_benchmark("http://127.0.0.1:9", SPEC, model=REPO)
