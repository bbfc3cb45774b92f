from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rollout.benchmark import BenchmarkSpec, Endpoint, Engine, PlannedStage
from rollout.errors import BadInput
from rollout.inference_perf import (
    IMAGE,
    REPORTS_FOLDER,
    REPORTS_PORT,
    config,
    objects,
    read_stage,
    standard_deviation,
    under_load,
)
from rollout.workload import QUICKSTART, Arrivals, PrefixSharing, TokenLengths, dataset_workload, fixed_workload

STAGE = PlannedStage(rate_per_s=4.0, duration_s=30.0)


def configured(spec: BenchmarkSpec) -> dict[str, Any]:
    return config(
        spec,
        STAGE,
        base_url="http://llm-service:8080",
        model="m",
        tokenizer="google/gemma-4-31B-it",
        seed=7,
    )


def test_the_config_sends_the_same_workload() -> None:
    configuration = configured(BenchmarkSpec(workload=QUICKSTART))
    assert configuration["load"]["stages"] == [{"rate": 4.0, "duration": 30}]
    assert configuration["load"]["type"] == "poisson"
    assert configuration["data"]["input_distribution"] == {
        "type": "lognormal",
        "min": 4,
        "max": 1024,
        "mean": 226.0,
        "std_dev": pytest.approx(242.1, abs=0.1),
    }
    assert configuration["load"]["base_seed"] == 7


def test_fixed_lengths_and_constant_arrivals_stay_so() -> None:
    spec = BenchmarkSpec(workload=fixed_workload(128, 64, arrivals=Arrivals.CONSTANT), endpoint=Endpoint.CHAT)
    configuration = configured(spec)
    assert configuration["data"]["output_distribution"] == {
        "type": "fixed",
        "min": 64,
        "max": 64,
        "mean": 64,
        "std_dev": 0,
    }
    assert configuration["load"]["type"] == "constant"
    assert configuration["api"] == {"type": "chat", "streaming": True}


@pytest.mark.parametrize(
    "workload",
    [dataset_workload("own", ['{"prompt": "a"}']), fixed_workload(64, 8, shared_prefix=PrefixSharing(tokens=32))],
)
def test_what_the_tool_cannot_send_is_refused(workload: Any) -> None:
    with pytest.raises(ValidationError, match="built-in engine"):
        BenchmarkSpec(workload=workload, engine=Engine.INFERENCE_PERF)


def test_the_standard_deviation_is_that_of_the_quantile_function() -> None:
    assert standard_deviation(TokenLengths.fixed(100)) == 0
    uniform = TokenLengths.model_validate({"points": [{"share": 0, "tokens": 1}, {"share": 1, "tokens": 13}]})
    assert standard_deviation(uniform) == pytest.approx(12 / 12**0.5)


def test_the_job_makes_the_load_and_then_serves_the_reports() -> None:
    configuration = configured(BenchmarkSpec())
    config_map, service, job = objects(
        configuration,
        name="load-1",
        namespace="ns",
        labels={"app.kubernetes.io/managed-by": "llm-rollout"},
        env=[{"name": "HF_ENDPOINT", "value": "https://hub"}],
        deadline_s=99.5,
    )
    assert yaml.safe_load(config_map["data"]["config.yml"]) == configuration
    assert job["spec"]["activeDeadlineSeconds"] == 100
    template = job["spec"]["template"]
    (load,), (reports,) = template["spec"]["initContainers"], template["spec"]["containers"]
    assert (load["name"], load["image"], load["env"][0]["name"]) == ("inference-perf", IMAGE, "HF_ENDPOINT")
    config, folder = template["spec"]["volumes"]
    assert config["configMap"]["name"] == config_map["metadata"]["name"]
    # Both containers see the folder that the configuration names, and the Service leads to the second one.
    assert configuration["storage"]["local_storage"]["path"] == REPORTS_FOLDER
    for container in (load, reports):
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted[folder["name"]] == REPORTS_FOLDER
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == reports["ports"][0]["containerPort"] == REPORTS_PORT


@pytest.mark.parametrize(
    ("running", "kept"),
    [((0, 0, 2, 0, 3, 0, 0), (0, 2, 0, 3, 0)), ((1, 1), (1, 1)), ((0, 0), (0, 0)), ((), ())],
)
def test_only_the_servers_samples_under_load_count(running: tuple[int, ...], kept: tuple[int, ...]) -> None:
    samples = [{"vllm:num_requests_running": float(each)} for each in running]
    assert [each["vllm:num_requests_running"] for each in under_load(samples)] == list(kept)


def entry(at_s: float, **fields: Any) -> dict[str, Any]:
    """A request as inference-perf 0.7 reports it."""
    times = [1000 + at_s + 0.1 + 0.01 * n for n in range(11)]
    return {
        "start_time": 1000 + at_s,
        "end_time": times[-1],
        "info": {
            "request_metrics": {"text": {"input_tokens": 20}},
            "response_metrics": {
                "output_tokens": 11,
                "server_usage": {"prompt_tokens": 21, "completion_tokens": 11},
                "output_token_times": times,
            },
        },
        "error": None,
    } | fields


STAGE_REPORT = {
    "load_summary": {
        "schedule_delay": {"mean": 0.001, "median": 0.001, "p90": 0.002, "p95": 0.003, "p99": 0.004, "max": 0.01}
    }
}


def test_reports_are_read_into_the_same_figures_as_our_own() -> None:
    stage = read_stage([entry(i * 0.25) for i in range(40)], STAGE_REPORT, STAGE, BenchmarkSpec())
    assert (stage.rate_per_s, stage.completed) == (4.0, 40)
    assert stage.ttft_s is not None
    assert stage.itl_s is not None
    assert stage.client is not None
    assert stage.ttft_s.p99 == pytest.approx(0.1)
    assert stage.itl_s.p50 == pytest.approx(0.01)
    assert stage.follows == pytest.approx(1, rel=0.1)
    assert stage.late_ttft_s == pytest.approx(0.1)
    assert stage.client.schedule_delay_s.p99 == 0.004
    assert stage.client.limited_by is None


@pytest.mark.parametrize(
    ("error_type", "kind"),
    [
        ("HTTP Error 400", "rejected"),
        ("HTTP Error 429", "overloaded"),
        ("HTTP Error 500", "server-error"),
        ("TimeoutError", "timeout"),
        ("CancelledError", "unfinished"),
        ("ClientConnectorError", "connection-refused"),
        ("ServerDisconnectedError", "connection-lost"),
    ],
)
def test_errors_are_told_apart(error_type: str, kind: str) -> None:
    failed = entry(0.5, error={"error_type": error_type, "error_msg": "why"})
    stage = read_stage([entry(0.0), failed], STAGE_REPORT, STAGE, BenchmarkSpec())
    assert stage.failures == {kind: 1}


def test_a_late_load_generator_is_said_to_be_the_limit() -> None:
    delay = STAGE_REPORT["load_summary"]["schedule_delay"] | {"p90": 56.8}
    stage = read_stage([entry(0.0)], {"load_summary": {"schedule_delay": delay}}, STAGE, BenchmarkSpec())
    assert stage.client is not None
    assert "56800 ms late" in (stage.client.limited_by or "")


def test_an_empty_report_is_an_error() -> None:
    with pytest.raises(BadInput, match="no request"):
        read_stage([], STAGE_REPORT, STAGE, BenchmarkSpec())
