"""Google's recommender through the official client, over real HTTP, against the stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from rollout.clients.recommender import AutoscalerOmitted, Recommender
from rollout.cost import PricingModel
from rollout.errors import ApiDisabled, BadInput, NotFound, PermissionMissing
from rollout.profiles import Evidence, ProfileQuery, StaticSource, Targets, UnsupportedFilter, ask, select
from rollout.target import CredentialSource, Endpoints, Target
from rollout.universe import Universe
from sandbox.recommender import CATALOGUE, RecommenderServer

GPT_OSS = "openai/gpt-oss-20b"


@pytest.fixture
def serve() -> Iterator[Callable[..., RecommenderServer]]:
    started: list[RecommenderServer] = []

    def make(**options: Any) -> RecommenderServer:
        started.append(RecommenderServer(**options).start())
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def server(serve: Callable[..., RecommenderServer]) -> RecommenderServer:
    return serve()


@pytest.fixture
def recommender(server: RecommenderServer) -> Recommender:
    return Recommender(target_of(server))


def target_of(server: RecommenderServer, **fields: Any) -> Target:
    defaults: dict[str, Any] = {
        "name": "test",
        "project": "my-project",
        "region": "us-central1",
        "credentials": CredentialSource.ANONYMOUS,
        "bucket": "my-bucket",
        "endpoints": Endpoints(gkerecommender=server.url),
    }
    return Target(**(defaults | fields))


def test_every_page_of_models_is_read(recommender: Recommender, server: RecommenderServer) -> None:
    assert recommender.models() == sorted({each.model for each in CATALOGUE})
    assert sum(path == "/v1/models:fetch" for path, _ in server.received) > 2


def test_servers_and_versions_are_those_of_the_model(recommender: Recommender) -> None:
    assert recommender.model_servers("google/gemma-2-27b-it") == ["vllm"]
    assert recommender.model_server_versions("google/gemma-2-27b-it", "vllm") == ["v0.11.2", "v0.7.2"]


def test_every_page_of_profiles_is_read(recommender: Recommender) -> None:
    answer = recommender.profiles(ProfileQuery())

    assert len(answer.profiles) == len(CATALOGUE)
    assert {profile.source.name for profile in answer.profiles} == {"gkerecommender.googleapis.com"}
    assert {profile.source.evidence for profile in answer.profiles} == {Evidence.PREDICTION}
    assert [each.metric for each in answer.ranges] == ["TTFT", "NTPOT"]
    assert any("Synthetic" in note for note in answer.notes)


def test_the_pricing_model_is_always_sent(recommender: Recommender, server: RecommenderServer) -> None:
    recommender.profiles(ProfileQuery(model=GPT_OSS))
    recommender.benchmarks(ProfileQuery(model=GPT_OSS, model_server="vllm"))

    profiles, benchmarks = (dict(server.received)[f"/v1/{name}:fetch"] for name in ("profiles", "benchmarkingData"))
    assert profiles["performanceRequirements"]["targetCost"]["pricingModel"] == "on-demand"
    assert benchmarks["pricingModel"] == "on-demand"


@pytest.mark.parametrize(
    ("pricing", "share"),
    [(PricingModel.SPOT, 0.4), (PricingModel.COMMITMENT_1Y, 0.7), (PricingModel.COMMITMENT_3Y, 0.45)],
)
def test_costs_follow_the_pricing_model(recommender: Recommender, pricing: PricingModel, share: float) -> None:
    def cost(model: PricingModel) -> float:
        profile = recommender.profiles(ProfileQuery(model="openai/gpt-oss-120b", pricing_model=model)).profiles[0]
        assert profile.pricing_model is model
        usd = profile.saturation.usd_per_million_output_tokens
        assert usd is not None
        return usd

    assert cost(pricing) == pytest.approx(share * cost(PricingModel.ON_DEMAND), rel=1e-6)


def test_a_latency_target_gives_the_throughput_at_the_target(recommender: Recommender) -> None:
    free, bound = (
        recommender.profiles(ProfileQuery(model="openai/gpt-oss-120b", targets=targets)).profiles[0].saturation
        for targets in (Targets(), Targets(ttft_ms=200))
    )

    assert bound.ttft_ms is not None
    assert bound.ttft_ms <= 200
    assert bound.output_tokens_per_s < free.output_tokens_per_s


def test_a_cost_target_leaves_the_dear_profiles_out(recommender: Recommender) -> None:
    answer = recommender.profiles(ProfileQuery(max_usd_per_million_output_tokens=0.25))

    assert answer.profiles
    for profile in answer.profiles:
        assert (profile.saturation.usd_per_million_output_tokens or 1) <= 0.25


def test_benchmark_data_holds_every_load_point(recommender: Recommender) -> None:
    (profile,) = recommender.benchmarks(ProfileQuery(model="openai/gpt-oss-120b", model_server="vllm")).profiles

    assert len(profile.points) == 7
    assert len(profile.rising) < 7  # past saturation there is no more throughput to be had
    assert profile.instance_type == "a3-highgpu-2g"
    assert profile.accelerator_count == 2


def test_benchmark_data_of_another_cost_ratio_comes_without_costs_and_says_so(recommender: Recommender) -> None:
    asked = {"model": "openai/gpt-oss-120b", "model_server": "vllm"}

    usual, other = (recommender.benchmarks(ProfileQuery(**asked, output_to_input_ratio=ratio)) for ratio in (4, 8))

    assert (usual.profiles[0].has_costs, usual.notes) == (True, ())
    assert not other.profiles[0].has_costs
    assert "output-to-input ratio of about 4" in other.notes[0]


def test_benchmark_data_needs_a_model_and_a_server(recommender: Recommender) -> None:
    with pytest.raises(BadInput, match="--model-server"):
        recommender.benchmarks(ProfileQuery(model=GPT_OSS))


@pytest.mark.parametrize(
    ("query", "named"),
    [
        (ProfileQuery(use_case="Text Summarization"), "use case"),
        (ProfileQuery(serving_stack="llm-d"), "serving stack"),
        (ProfileQuery(input_length=100, output_length=100), "input length, output length"),
        (ProfileQuery(targets=Targets(itl_ms=20)), "ITL"),
    ],
)
def test_what_google_cannot_filter_is_refused_with_the_reason(
    recommender: Recommender, server: RecommenderServer, query: ProfileQuery, named: str
) -> None:
    with pytest.raises(UnsupportedFilter, match=named):
        recommender.profiles(query)
    assert server.received == []


def test_a_refusing_source_is_left_out_with_a_note_when_another_can_answer(recommender: Recommender) -> None:
    ours = recommender.profiles(ProfileQuery(model="openai/gpt-oss-120b")).profiles[0]
    measured = ours.model_copy(update={"use_case": "Text Summarization"})
    query = ProfileQuery(use_case="text summarization")

    found = select(ask([recommender, StaticSource("history", [measured])], query), query)

    assert [row.profile for row in found.rows] == [measured]
    assert any("left out" in note and "use case" in note for note in found.notes)


def test_an_unknown_model_says_where_the_known_ones_are(recommender: Recommender) -> None:
    with pytest.raises(NotFound, match="models list"):
        recommender.model_servers("nobody/nothing")


def test_a_missing_quota_project_is_explained_with_its_cure(serve: Callable[..., RecommenderServer]) -> None:
    server = serve(requires_quota_project=True)

    with pytest.raises(PermissionMissing, match="gcloud config set billing/quota_project my-project"):
        Recommender(target_of(server)).models()


def test_the_quota_project_is_sent_with_real_credentials(
    serve: Callable[..., RecommenderServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(service_account_key(tmp_path)))
    server = serve(requires_quota_project=True)

    recommender = Recommender(target_of(server, credentials=CredentialSource.APPLICATION_DEFAULT))

    assert GPT_OSS in recommender.models()


def test_a_disabled_api_says_how_to_enable_it(serve: Callable[..., RecommenderServer]) -> None:
    with pytest.raises(ApiDisabled, match=r"gcloud services enable gkerecommender\.googleapis\.com"):
        Recommender(target_of(serve(enabled=False))).models()


MANIFEST: dict[str, Any] = {
    "model": GPT_OSS,
    "model_server": "vllm",
    "model_server_version": "gptoss",
    "accelerator": "nvidia-h100-80gb",
    "namespace": "serving",
}


def test_manifests_come_as_google_wrote_them(recommender: Recommender) -> None:
    found = recommender.manifests(**MANIFEST, targets=Targets(), model_bucket_uri="gs://my-bucket/gpt")

    assert found.kinds == ("Deployment", "Service", "PodMonitoring")
    assert "--model=gs://my-bucket/gpt" in found.documents[0]
    assert found.documents_text().count("\n---\n") == 3
    assert "# Synthetic" in found.comments_text()


def test_a_target_that_can_be_reached_brings_the_autoscaler(recommender: Recommender) -> None:
    found = recommender.manifests(**MANIFEST, targets=Targets(ntpot_ms=60))

    assert found.kinds[-1] == "HorizontalPodAutoscaler"


def test_an_autoscaler_that_google_leaves_out_is_noticed(recommender: Recommender) -> None:
    with pytest.raises(AutoscalerOmitted, match=r"NTPOT 5 ms cannot be reached.*observed"):
        recommender.manifests(**MANIFEST, targets=Targets(ntpot_ms=5))


def test_universes_without_the_generator_are_sent_to_the_local_one(server: RecommenderServer) -> None:
    target = target_of(server, universe=Universe(domain="s3nsapis.fr"))

    with pytest.raises(BadInput, match="--generator=local"):
        Recommender(target).manifests(**MANIFEST, targets=Targets())
    assert Recommender(target).models()  # the lists exist there


def test_an_itl_target_is_not_dropped_silently(recommender: Recommender) -> None:
    with pytest.raises(UnsupportedFilter, match="ITL"):
        recommender.manifests(**MANIFEST, targets=Targets(itl_ms=20))


def service_account_key(folder: Path) -> Path:
    """A key file whose self-signed tokens need no token server."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    path = folder / "key.json"
    path.write_text(
        json.dumps(
            {
                "type": "service_account",
                "project_id": "my-project",
                "private_key_id": "1",
                "private_key": pem,
                "client_email": "tester@my-project.iam.gserviceaccount.com",
                "client_id": "1",
                "token_uri": "https://oauth2.googleapis.com/token",
            }
        )
    )
    return path
