"""The quickstart from the Prefect UI: a recommendation, and manifests that are shown, applied and taken away again."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from flows.create_manifests import create_manifests
from flows.publish_weights import publish_model_weights
from flows.recommend_model import recommend_model
from flows.teardown_model import teardown_model
from rollout.clients.gke import Gke
from rollout.clients.iam import OBJECT_VIEWER, BucketPolicy, has_binding
from rollout.errors import BadInput
from rollout.profiles import Targets
from rollout.quickstart import ManifestsRequest, RecommendRequest
from rollout.sources import Generator, SourceName
from tests.flows.conftest import TINY_REPO, Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

NAME = "vllm-tiny-model"


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"serving_stack": "llm-d", "from_bucket": True},
        {"model_server_version": "v0.10.2", "from_bucket": True},
        {"accelerator_type": "tpu-v6e-slice", "model_server_version": "v0.14.0", "from_bucket": True},
    ],
    ids=["from the hub", "llm-d", "by Cloud Storage FUSE", "on a TPU"],
)
def test_one_of_each_kind_becomes_available(stage: Stage, changes: dict[str, Any]) -> None:
    Gke(stage.target).ensure()
    settings = dict(changes)
    if settings.pop("from_bucket", False):
        settings["model_bucket_uri"] = publish_model_weights(stage.request()).uri
    create_manifests(request(stage, apply=True, **settings))
    ready = [each for each in stage.live("Deployment") if each["metadata"]["name"] == NAME]
    assert [each["status"]["readyReplicas"] for each in ready] == [1]
    ended = teardown_model(target=str(stage.target_file), instance=NAME)
    assert ended.teardown is not None
    assert ended.teardown.left == ()


def test_a_model_that_does_not_fit_is_one_error(stage: Stage) -> None:
    with pytest.raises(BadInput):
        create_manifests(
            request(stage, model="google/gemma-4-31B-it", accelerator_type="nvidia-l4", accelerator_count=1)
        )
