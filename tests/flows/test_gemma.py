"""The tutorial's models as their presets serve them, on every kind of cluster and identity that a target can have.

The weights are synthetic, with the real names, tensors and architecture; the engine is the simulated one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from rollout.clients.compute import Compute
from rollout.clients.gke import Gke
from rollout.clients.iam import ServiceAccounts
from rollout.policy import Weights
from rollout.record import RolloutReport, Verdict
from rollout.rendering import KubernetesObject
from rollout.report import Action
from rollout.smoke import Outcome
from sandbox.cloud import EmbeddedCloud
from sandbox.hub_store import HubStore
from sandbox.models import synthetic_gemma4
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]

GEMMA = {
    "gemma-4-26b-a4b-it": ("google/gemma-4-26B-A4B-it", "26b-a4b"),
    "gemma-4-31b-it": ("google/gemma-4-31B-it", "31b"),
}


@pytest.fixture(scope="module")
def _gemma_on_the_hub(cloud: EmbeddedCloud, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache: Path = tmp_path_factory.mktemp("gemma")
    for repo_id, size in GEMMA.values():
        folder = synthetic_gemma4(cache, size=size, total_bytes=4 * 2**20)  # type: ignore[arg-type]
        HubStore(cloud.hub_root).publish(repo_id, folder)


def roll_out(stage: Stage, preset: str) -> RolloutReport:
    return rollout_model(stage.request().model_copy(update={"model": preset}))


def container(deployment: KubernetesObject) -> dict[str, Any]:
    first: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return first


def tear_down(stage: Stage, preset: str) -> dict[str, str]:
    """What it kept, by kind."""
    ended = teardown_model(target=str(stage.target_file), model=preset, weights=Weights.DELETE)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    return {change.kind: change.detail for change in ended.teardown.kept}


@pytest.mark.usefixtures("_gemma_on_the_hub")
def test_both_gemma_sizes_live_side_by_side_and_leave_nothing_behind(stage: Stage) -> None:
    for preset, (repo_id, _) in GEMMA.items():
        report = roll_out(stage, preset)
        assert report.verdict is Verdict.DONE
        assert report.smoke is not None
        outcomes = {result.name: result.outcome for result in report.smoke.results}
        assert {outcomes[name] for name in ("chat", "reasoning", "tools", "image", "long-context")} == {Outcome.PASSED}
        assert report.plan is not None
        assert report.plan.weights_uri.startswith(f"gs://{stage.target.bucket}/{repo_id}/")

    deployments = {item["metadata"]["name"]: container(item) for item in stage.live("Deployment")}
    assert deployments.keys() == {"vllm-gemma-4-26b-a4b-it", "vllm-gemma-4-31b-it"}
    for server in deployments.values():
        assert {"name": "GOOGLE_CLOUD_UNIVERSE_DOMAIN", "value": "s3nsapis.fr"} in server["env"]
    assert len({item["spec"]["selector"]["app"] for item in stage.live("Service")}) == 2
    assert [item["metadata"]["name"] for item in stage.live("ComputeClass")] == ["a3-edgegpu-8g-nolssd"]
    cluster = Gke(stage.target).get()
    assert cluster is not None
    # Both models share one machine of eight GPUs, and the quota knows.
    assert [pool.machine_type for pool in cluster.node_pools if pool.accelerator] == ["a3-edgegpu-8g-nolssd"]

    first, second = GEMMA
    assert "vllm-gemma-4-31b-it" in tear_down(stage, first)["Cluster"]
    assert [item["metadata"]["name"] for item in stage.live("Deployment")] == ["vllm-gemma-4-31b-it"]
    tear_down(stage, second)
    assert Gke(stage.target).get() is None
    assert ServiceAccounts(stage.target).get(stage.target.gsa_email) is None


def test_a_standard_cluster_serves_from_its_gpu_node_pool(stage: Stage) -> None:
    pool = {"name": "gpu-pool", "machine_type": "a3-highgpu-1g", "accelerator_count": 1, "spot": True, "max_nodes": 2}
    stage.write_target(
        cluster={"name": f"{stage.target.namespace}-std", "mode": "standard", "node_pool": pool, "observability": False}
    )
    report = rollout_model(stage.request())
    assert report.verdict is Verdict.DONE
    assert report.plan is not None
    target = report.plan.target
    cluster = Gke(target).get()
    assert cluster is not None
    assert [pool.name for pool in cluster.node_pools if pool.accelerator] == ["gpu-pool"]
    (boot_disk,) = Compute(target).disks({"goog-k8s-cluster-name": cluster.name})
    assert boot_disk.name.startswith("gk3-nap-a3-highgpu-1g")
    (deployment,) = replace(stage, target=target).live("Deployment")
    selector = deployment["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    tear_down(stage, str(stage.model_file))
    assert Gke(target).get() is None
    assert Compute(target).disks({"goog-k8s-cluster-name": cluster.name}) == ()


def test_pods_may_read_the_bucket_as_themselves(stage: Stage) -> None:
    stage.write_target(identity="direct")
    report = rollout_model(stage.request())
    assert report.verdict is Verdict.DONE
    bindings = [name for kind, name in report.created if kind == "IamBinding"]
    assert len(bindings) == 1
    assert "principal://iam.googleapis.com/projects/123456789012/" in bindings[0]
    assert ServiceAccounts(stage.target).get(stage.target.gsa_email) is None
    tear_down(stage, str(stage.model_file))


def test_a_node_pool_of_ours_goes_from_a_cluster_that_was_there_before(stage: Stage) -> None:
    named = {"name": f"{stage.target.namespace}-there", "mode": "standard", "observability": False}
    Gke(stage.write_target(cluster=named)).ensure()
    # Somebody else's from now on: it does not carry our label.
    key = f"{stage.target.region}/{named['name']}"
    with stage.cloud.google.cloud.store.transaction() as data:
        data["clusters"][key]["resourceLabels"] = {}
    pool = {"name": "gpu-pool", "machine_type": "a3-highgpu-1g", "accelerator_count": 1, "spot": True}
    target = stage.write_target(cluster={**named, "node_pool": pool, "observability": True})
    report = rollout_model(stage.request())
    assert report.verdict is Verdict.DONE
    assert ("NodePool", f"{named['name']}/gpu-pool") in report.created
    assert report.plan is not None
    assert any(c.kind == "NodePool" and c.action is Action.CREATED for c in report.plan.changes), "before it is made"
    adopted = Gke(target).get()
    assert adopted is not None
    assert not adopted.is_observable, "somebody else's cluster is told of, not changed"

    assert tear_down(stage, str(stage.model_file))["Cluster"] == "made by somebody else"
    cluster = Gke(target).get()
    assert cluster is not None
    assert [pool.name for pool in cluster.node_pools] == ["default-pool"]
    Gke(target).delete()
