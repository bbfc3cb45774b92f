"""The quickstart from the Prefect UI: a recommendation, and manifests that are shown, applied and taken away again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prefect.blocks.system import Secret

from flows.create_manifests import create_manifests
from flows.publish_weights import publish_model_weights
from flows.recommend_model import recommend_model
from flows.teardown_model import teardown_model
from rollout.clients.gke import Gke
from rollout.clients.iam import OBJECT_VIEWER, BucketPolicy, has_binding
from rollout.clients.records import RecordStore, read_local
from rollout.errors import BadInput
from rollout.ledger import APPLY_STEP
from rollout.model_facts import known_model
from rollout.profiles import Targets
from rollout.quickstart import ManifestsRequest, RecommendRequest
from rollout.sources import Generator, SourceName
from sandbox.cloud import EmbeddedCloud
from sandbox.cluster import NodeSettings
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from tests.flows.conftest import TINY_REPO, Stage
from tests.rollout.test_optimize import CASES

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

NAME = "vllm-tiny-model"
OTHER, OTHER_NAME = "tests/other-model", "vllm-other-model"
TOKEN, TOKEN_BLOCK = "hf_quickstart", "quickstart-hub-token"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCloud]:
    """A cloud with room for every kind at once, and tiny weights under the names of the goldens' models."""
    root = tmp_path_factory.mktemp("quickstart")
    tokens = root / "tokens.json"
    tokens.write_text(json.dumps({TOKEN: {"user": "tests"}}), encoding="utf-8")
    embedded = EmbeddedCloud(
        root, hub_options=("--tokens", str(tokens)), nodes=NodeSettings(creation_s=0.1, gpu_quota=64)
    )
    hub = HubStore(embedded.hub_root)
    for name in (TINY_REPO, OTHER):
        hub.publish(name, tiny_model(root / name))
    for name in {case["model"] for case in CASES.values()}:
        hub.publish(name, tiny_model(root / name, config=known_model(name).config))
    with embedded:
        yield embedded


@pytest.fixture(scope="module", autouse=True)
def _token(prefect_server: None) -> None:
    """The token that gated models need."""
    Secret(value=TOKEN).save(TOKEN_BLOCK, overwrite=True)


def request(stage: Stage, **changes: Any) -> ManifestsRequest:
    settings = {"model": TINY_REPO, "target": str(stage.target_file), "accelerator_type": "nvidia-h100-80gb"}
    return ManifestsRequest.model_validate(settings | changes)


def test_a_recommendation_ranks_what_google_knows_and_says_why_others_lost(stage: Stage) -> None:
    wanted = RecommendRequest(
        model="openai/gpt-oss-20b", target=str(stage.target_file), requests_per_s=20, sources=(SourceName.GOOGLE,)
    )
    found = recommend_model(wanted)
    assert found.best is not None
    assert found.best.replicas >= 1
    prices = [option.usd_per_hour for option in found.options if option.usd_per_hour is not None]
    assert prices == sorted(prices)
    fast = recommend_model(wanted.model_copy(update={"targets": Targets(ttft_ms=0.001)}))
    assert fast.options == ()
    assert all(loser.reason for loser in fast.losers)


def test_manifests_are_shown_and_nothing_is_made(stage: Stage) -> None:
    text = create_manifests(request(stage))
    kinds = [each["kind"] for each in yaml.safe_load_all(text)]
    assert {"Deployment", "Service", "PodMonitoring"} <= set(kinds)
    assert Gke(stage.target).get() is None
    googles = request(stage, model="openai/gpt-oss-20b", generator=Generator.GOOGLE)
    with pytest.raises(BadInput, match=r"does not exist in s3nsapis\.fr"):
        create_manifests(googles)
    stage.write_target(universe={"domain": "googleapis.com"})
    assert "kind: Deployment" in create_manifests(googles)


def test_applied_manifests_serve_from_the_bucket_and_go_with_a_teardown(stage: Stage) -> None:
    Gke(stage.target).ensure()
    weights = publish_model_weights(stage.request())
    wanted = request(stage, model_bucket_uri=weights.uri, apply=True)
    create_manifests(wanted)
    (deployment,) = stage.live("Deployment")
    assert deployment["metadata"]["name"] == NAME
    assert deployment["status"]["readyReplicas"] == 1
    principal = stage.target.universe.workload_identity_principal(
        stage.target.project, "123456789012", stage.target.namespace, stage.target.ksa
    )
    assert has_binding(BucketPolicy(stage.target, stage.target.bucket), OBJECT_VIEWER, principal)
    generation = deployment["metadata"]["generation"]
    create_manifests(wanted)
    (again,) = stage.live("Deployment")
    assert again["metadata"]["generation"] == generation, "a second time changes nothing"

    ended = teardown_model(target=str(stage.target_file), instance=NAME)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert stage.live("Deployment") == []


def test_what_was_granted_on_another_bucket_goes_with_the_teardown_and_another_model_keeps_what_both_use(
    stage: Stage,
) -> None:
    Gke(stage.target).ensure()
    weights = publish_model_weights(stage.request())
    stage.write_target(bucket=f"{stage.target.bucket}-records")
    wanted = request(stage, model_bucket_uri=weights.uri, apply=True)
    create_manifests(wanted, report_file=str(stage.report_file))
    create_manifests(request(stage, model=OTHER, apply=True))
    shared = {("ServiceAccount", stage.target.ksa), ("Namespace", stage.target.namespace)}
    teardown_model(target=str(stage.target_file), report_file=str(stage.report_file))

    (other,) = stage.live("Deployment")
    assert other["metadata"]["name"] == OTHER_NAME
    assert shared <= {(each["kind"], each["metadata"]["name"]) for kind, _ in shared for each in stage.live(kind)}
    principal = stage.target.universe.workload_identity_principal(
        stage.target.project, "123456789012", stage.target.namespace, stage.target.ksa
    )
    store = BucketPolicy(stage.target, stage.target.bucket)
    assert has_binding(store, OBJECT_VIEWER, principal), "the other model has the same identity"
    ended = teardown_model(target=str(stage.target_file), instance=OTHER_NAME)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert not has_binding(store, OBJECT_VIEWER, principal)


def test_a_grant_of_a_run_that_died_before_it_could_say_so_is_taken_back(stage: Stage) -> None:
    Gke(stage.target).ensure()
    weights = publish_model_weights(stage.request())
    target = stage.write_target(bucket=f"{stage.target.bucket}-records")
    create_manifests(request(stage, model_bucket_uri=weights.uri, apply=True))
    store = RecordStore(target)
    (record,) = store.read_all()
    # As the bucket has it when the process is killed right after the grant.
    store.write(record.model_copy(update={"steps": tuple(s for s in record.steps if s.name in BEFORE_THE_GRANT)}))
    principal = target.universe.workload_identity_principal(
        target.project, "123456789012", target.namespace, target.ksa
    )
    elsewhere = BucketPolicy(target, stage.target.bucket)
    assert has_binding(elsewhere, OBJECT_VIEWER, principal)
    ended = teardown_model(target=str(stage.target_file), instance=NAME)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert not has_binding(elsewhere, OBJECT_VIEWER, principal)


BEFORE_THE_GRANT = ("model facts", "optimised manifests", "check layout", "provision bucket", "plan grants")


def form_of(case: str, stage: Stage) -> ManifestsRequest:
    """The form of a case of the goldens; weights in the stage's own bucket where the case has a bucket."""
    named = {name: value for name, value in CASES[case].items() if name in ManifestsRequest.model_fields}
    if "model_bucket_uri" in named:
        stage.write_model(repo_id=named["model"])
        named["model_bucket_uri"] = publish_model_weights(stage.request()).uri
    if case == "llm-d":
        del named["targets"]  # Google states no ITL, and nobody has measured this model here
    return request(stage, apply=True, **named)


@pytest.mark.parametrize("case", CASES)
def test_one_of_each_kind_becomes_available_and_goes_again(case: str, stage: Stage) -> None:
    stage.write_target(hub_token_secret=TOKEN_BLOCK)
    Gke(stage.target).ensure()
    wanted = form_of(case, stage).model_copy(update={"replicas": 2 if case == "tpu" else 1})
    create_manifests(wanted, report_file=str(stage.report_file))
    record = read_local(stage.report_file)
    assert record.generated is not None
    assert not any("not validated" in line for line in record.generated.header), "the cluster's versions are known"
    assert record.ran_on.cluster_version
    live = {each["metadata"]["name"]: each for each in stage.live("Deployment")}
    planned = {each["metadata"]["name"] for each in record.generated.objects if each["kind"] == "Deployment"}
    assert live.keys() == planned
    server = live[record.generated.serving.name]
    assert server["status"]["readyReplicas"] == wanted.replicas
    applied = [step.summary for step in record.steps if step.name == APPLY_STEP]
    assert len(applied) == (2 if case == "tpu" else 1), "on TPUs one pod writes the cache, and then the others come"

    ended = teardown_model(target=str(stage.target_file), report_file=str(stage.report_file))
    assert ended.teardown is not None
    assert ended.teardown.left == ()


def test_a_model_that_does_not_fit_is_one_error(stage: Stage) -> None:
    with pytest.raises(BadInput):
        create_manifests(
            request(stage, model="google/gemma-4-31B-it", accelerator_type="nvidia-l4", accelerator_count=1)
        )
