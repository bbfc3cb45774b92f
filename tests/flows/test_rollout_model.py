"""The whole story against the embedded cloud, through the flows that production runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact as PublishedArtifact

from flows.publish_weights import publish_model_weights
from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from rollout.clients.cluster import ClusterClient
from rollout.clients.gke import Gke
from rollout.clients.iam import OBJECT_USER, BucketPolicy, ServiceAccounts
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.errors import (
    BadInput,
    BucketNotOurs,
    PreflightFailed,
    RepositoryNotFound,
    RevisionNotFound,
    StartupFailed,
)
from rollout.policy import Teardown, Weights
from rollout.record import RolloutReport, Verdict
from rollout.report import Action, StepStatus
from sandbox.cloud import FOREIGN_BUCKET
from sandbox.hub_store import HubStore
from sandbox.models import remove_shard, tiny_model
from tests.flows.conftest import TINY_REPO, Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]

STEPS = [
    "pin model",
    "observe",
    "plan",
    "approval",
    "provision bucket",
    "provision cluster",
    "service account",
    "publish weights",
    "check layout",
    "workload identity",
    "warm up node",
    "apply manifests",
    "wait until available",
    "smoke test",
    "benchmark",
    "prune",
]


def statuses(report: RolloutReport) -> dict[str, StepStatus]:
    return {step.name: step.status for step in report.steps}


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_rollout_rerun_and_teardown_tell_the_whole_story(stage: Stage) -> None:
    first = rollout_model(stage.request(), report_file=str(stage.report_file))
    assert first.verdict is Verdict.DONE
    # A node is only warmed up, and released, when the transfer takes longer than the cluster.
    assert sorted(statuses(first).keys() - {"release node"}) == sorted(STEPS)
    assert first.weights is not None
    assert all(file.sha256 for file in first.weights.files if file.path.endswith(".safetensors"))
    assert first.weights.bytes_sent >= first.weights.total_bytes
    assert first.startup is not None
    (waterfall,) = first.startup["waterfalls"]
    assert waterfall["stages"][-1]["stage"] == "first token"

    rerun = rollout_model(stage.request(), report_file=str(stage.folder / "rerun.json"))
    assert rerun.changed_nothing
    assert rerun.weights is not None
    assert rerun.weights.bytes_sent == 0
    assert statuses(rerun)["apply manifests"] is StepStatus.UNCHANGED
    assert rerun.plan is not None
    assert not rerun.plan.changes_anything

    ended = teardown_model(target=str(stage.target_file), report_file=str(stage.report_file), weights=Weights.DELETE)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert {change.kind for change in ended.teardown.removed} >= {"Deployment", "Cluster", "ServiceAccount", "Bucket"}
    assert read(stage.report_file)["teardown"]["left"] == []
    assert Gke(stage.target).get() is None
    assert ServiceAccounts(stage.target).get(stage.target.gsa_email) is None
    assert not StorageClient(stage.target).bucket_exists()


def test_the_bucket_keeps_the_record_from_before_the_first_change(stage: Stage) -> None:
    report = rollout_model(stage.request())
    (kept,) = RecordStore(stage.target).read_all()
    assert kept.run_id == report.run_id
    assert kept.verdict is Verdict.DONE
    assert ("Cluster", stage.target.cluster.name) in kept.created
    teardown_model(target=str(stage.target_file), model=str(stage.model_file))


def test_a_teardown_knows_a_rollout_by_the_id_of_its_run_alone(stage: Stage) -> None:
    report = rollout_model(stage.request())
    with pytest.raises(BadInput, match="no rollouts"):
        teardown_model(target=str(stage.target_file), run="ffffffff-none")
    ended = teardown_model(target=str(stage.target_file), run=report.run_id[:13])
    assert ended.run_id == report.run_id
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert Gke(stage.target).get() is None


def test_what_was_adopted_stays_after_teardown(stage: Stage) -> None:
    bucket = StorageClient(stage.target)._client.bucket(stage.target.bucket)
    StorageClient(stage.target)._client.create_bucket(bucket, location=stage.target.region)
    rollout_model(stage.request())
    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file), weights=Weights.DELETE)
    assert ended.teardown is not None
    kept = {change.kind: change for change in ended.teardown.kept}
    assert kept["Bucket"].action is Action.ADOPTED
    assert StorageClient(stage.target).bucket_exists()


def test_a_trial_is_torn_down_by_its_policy(stage: Stage) -> None:
    report = rollout_model(stage.request(teardown=Teardown.ALWAYS))
    assert report.teardown is not None
    assert report.teardown.left == ()
    assert Gke(stage.target).get() is None


def test_the_weights_may_travel_by_pods_of_the_cluster_and_their_right_to_write_ends_with_it(stage: Stage) -> None:
    transfer = {"pods": 2, "pod_image": "worker/llm-rollout:1"}
    request = stage.request(teardown=Teardown.ALWAYS, weights=Weights.DELETE, transfer=transfer)
    report = rollout_model(request)
    assert statuses(report)["writer identity"] is StepStatus.DONE
    assert report.weights is not None
    assert report.weights.bytes_sent >= report.weights.total_bytes
    assert taken_from_writers(report) == ["IamBinding", "ServiceAccount"]
    assert report.teardown is not None
    assert report.teardown.left == ()


def test_publishing_by_pods_leaves_nobody_who_may_write(stage: Stage) -> None:
    stays = rollout_model(stage.request())
    assert stays.verdict is Verdict.DONE
    transfer = {"pods": 2, "pod_image": "worker/llm-rollout:1"}
    request = stage.request(transfer=transfer)
    storage = StorageClient(stage.target)
    for stored in storage.list_objects(TINY_REPO):
        storage.delete(stored)
    published = publish_model_weights(request)
    assert published.bytes_sent == published.total_bytes
    policy = BucketPolicy(stage.target, stage.target.bucket).read()
    assert {binding["role"] for binding in policy["bindings"]}.isdisjoint({OBJECT_USER})
    assert "weights-writer" not in {item["metadata"]["name"] for item in stage.live("ServiceAccount")}
    assert publish_model_weights(request).bytes_sent == 0
    teardown_model(target=str(stage.target_file), model=str(stage.model_file))  # the cluster is other tests' too


def taken_from_writers(report: RolloutReport) -> list[str]:
    (step,) = [step for step in report.steps if step.name == "writer's right"]
    return sorted(change.kind for change in step.changes)


def test_a_failed_start_is_diagnosed_and_torn_down(stage: Stage) -> None:
    stage.write_model(image="example.com/no-such-image:1")
    with pytest.raises(StartupFailed, match="no-such-image"):
        rollout_model(stage.request(teardown=Teardown.ON_FAILURE), report_file=str(stage.report_file))
    record = read(stage.report_file)
    assert record["verdict"] == "failed"
    assert "no-such-image" in record["error"]
    assert Gke(stage.target).get() is None
    shown = PublishedArtifact.get("diagnosis")
    assert shown is not None
    assert str(shown.data).startswith("## image not found: The image does not exist.")
    assert "### How far" in str(shown.data)


def test_a_wrong_flag_ends_in_the_preflight_with_the_nearest_one(stage: Stage) -> None:
    stage.write_model(extra_args=["--enforce-eagre"])
    with pytest.raises(PreflightFailed, match="--enforce-eager"):
        rollout_model(stage.request())
    nothing_was_made(stage)
    assert not StorageClient(stage.target).bucket_exists()


def test_two_models_share_a_target_and_one_survives_the_others_teardown(stage: Stage) -> None:
    rollout_model(stage.request())
    second = stage.folder / "second.yaml"
    second.write_text(stage.model_file.read_text().replace(stage.target.namespace, "second-model"))
    request = stage.request().model_copy(update={"model": str(second)})
    rollout_model(request)

    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file))
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    kept = {change.kind: change.detail for change in ended.teardown.kept}
    assert "second-model" in kept["Cluster"]
    again = rollout_model(request)
    assert again.changed_nothing

    last = teardown_model(target=str(stage.target_file), model=str(second))
    assert last.teardown is not None
    assert {"Cluster", "ServiceAccount"} <= {change.kind for change in last.teardown.removed}


def test_a_cluster_stays_while_it_serves_another_namespace_or_runs_somebody_elses_pods(stage: Stage) -> None:
    rollout_model(stage.request())
    here = stage.target
    elsewhere = stage.write_target(namespace=f"{here.namespace}-b", ksa=here.ksa)
    stage.write_model(name="other", service_name="other-svc", app="other")
    rollout_model(stage.request())
    cluster = ClusterClient.connect(elsewhere)

    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file))
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    kept = {change.kind: change.detail for change in ended.teardown.kept}
    assert f"{here.namespace}/{here.namespace}" in kept["Cluster"]
    assert stage.live("Deployment"), "the first one, in its own namespace"
    assert cluster.instances() == {(here.namespace, here.namespace)}

    stage.write_target(namespace=here.namespace)
    stage.write_model()
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "somebody-elses", "namespace": "default"},
        "spec": {"containers": [{"name": "main", "image": "example.com/theirs:1"}]},
    }
    cluster.api.request("POST", "/api/v1/namespaces/default/pods", None, pod)
    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file))
    assert ended.teardown is not None
    assert "somebody-elses" in {change.kind: change.detail for change in ended.teardown.kept}["Cluster"]
    cluster.api.request("DELETE", "/api/v1/namespaces/default/pods/somebody-elses", {"gracePeriodSeconds": "0"})
    teardown_model(target=str(stage.target_file), model=str(stage.model_file))
    assert Gke(stage.target).get() is None


def nothing_was_made(stage: Stage) -> None:
    assert Gke(stage.target).get() is None
    assert ServiceAccounts(stage.target).get(stage.target.gsa_email) is None


def test_an_unknown_repository_ends_before_anything_is_made(stage: Stage) -> None:
    stage.model_file.write_text(stage.model_file.read_text().replace("tests/tiny-model", "tests/absent"))
    with pytest.raises(RepositoryNotFound, match="tests/absent"):
        rollout_model(stage.request())
    nothing_was_made(stage)
    assert not StorageClient(stage.target).bucket_exists()


def test_an_unknown_revision_ends_before_anything_is_made(stage: Stage) -> None:
    with pytest.raises(RevisionNotFound, match="no-such-branch"):
        rollout_model(stage.request().model_copy(update={"revision": "no-such-branch"}))
    nothing_was_made(stage)


def test_a_gated_repository_says_where_to_accept_the_licence(stage: Stage) -> None:
    store = HubStore(stage.cloud.hub_root)
    store.publish("tests/gated", tiny_model(stage.folder / "gated"))
    store.restrict("tests/gated", gate="auto")
    stage.model_file.write_text(stage.model_file.read_text().replace("tests/tiny-model", "tests/gated"))
    with pytest.raises(BadInput, match=r"gated.*licen[cs]e") as caught:
        rollout_model(stage.request())
    assert "tests/gated" in str(caught.value)
    nothing_was_made(stage)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: remove_shard(folder), r"checkpoint: .*model-.*safetensors"),
        (lambda folder: (folder / "config.json").write_text("{broken"), "config.json is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
    ],
    ids=["a shard is missing", "config.json is broken", "config.json is a list"],
)
def test_a_broken_checkpoint_is_refused_before_anything_is_made(
    stage: Stage, break_it: Callable[[Path], object], said: str
) -> None:
    folder = tiny_model(stage.folder / "broken")
    break_it(folder)
    repo = f"tests/broken-{stage.target.name}"
    HubStore(stage.cloud.hub_root).publish(repo, folder)
    stage.model_file.write_text(stage.model_file.read_text().replace("tests/tiny-model", repo))
    with pytest.raises(BadInput, match=said):
        rollout_model(stage.request())
    nothing_was_made(stage)
    assert not StorageClient(stage.target).bucket_exists()


def test_a_name_that_kubernetes_refuses_is_refused_before_it_is_asked(stage: Stage) -> None:
    stage.write_model(service_name="Bad_Name")
    with pytest.raises(BadInput, match="service_name"):
        rollout_model(stage.request())
    nothing_was_made(stage)


def test_a_bucket_of_somebody_else_fails_the_preflight(stage: Stage) -> None:
    stage.write_target(bucket=FOREIGN_BUCKET)
    with pytest.raises((PreflightFailed, BucketNotOurs), match=FOREIGN_BUCKET):
        rollout_model(stage.request())
    nothing_was_made(stage)


def test_an_unreachable_cluster_is_one_error_that_says_where(stage: Stage) -> None:
    kubeconfig = stage.folder / "kubeconfig"
    kubeconfig.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: away\n"
        "contexts: [{name: away, context: {cluster: away, user: nobody}}]\n"
        "clusters: [{name: away, cluster: {server: 'https://127.0.0.1:9'}}]\nusers: [{name: nobody, user: {}}]\n"
    )
    stage.write_target(cluster={"mode": "kubeconfig", "kubeconfig": str(kubeconfig), "context": "away"})
    with pytest.raises((PreflightFailed, BadInput), match=r"does not answer.*127\.0\.0\.1.*port=9"):
        rollout_model(stage.request())
    assert not StorageClient(stage.target).bucket_exists()
