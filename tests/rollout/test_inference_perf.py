from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from rollout.benchmark import BenchmarkSpec, Endpoint, Engine, PlannedStage, next_stage
from rollout.errors import BadInput
from rollout.inference_perf import (
    CONFIG_FOLDER,
    IMAGE,
    REPORTS_FOLDER,
    REPORTS_PORT,
    TRACE_FILE,
    config,
    objects,
    read_stage,
    request_timeout_s,
    trace,
    under_load,
)
from rollout.stage import Stage
from rollout.workload import (
    QUICKSTART,
    Arrivals,
    PlannedRequest,
    PrefixSharing,
    Workload,
    dataset_workload,
    fixed_workload,
)

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


@pytest.mark.parametrize("workload", [QUICKSTART, fixed_workload(128, 64, arrivals=Arrivals.CONSTANT)])
def test_the_tool_sends_what_the_built_in_client_sends(workload: Workload) -> None:
    schedule = workload.schedule(STAGE.rate_per_s, STAGE.duration_s)
    header, *lines = trace(schedule).splitlines()
    assert header == "TIMESTAMP,ContextTokens,GeneratedTokens"
    assert len(lines) == 120
    for line, request in zip(lines, schedule, strict=True):
        stamp, prompt, answer = line.split(",")
        assert (int(prompt), int(answer)) == (request.input_tokens, request.output_tokens)
        at_s = datetime.fromisoformat(stamp) - datetime(2000, 1, 1)
        assert at_s.total_seconds() == pytest.approx(request.at_s, abs=1e-6)


def test_the_config_replays_the_trace() -> None:
    configuration = configured(BenchmarkSpec(workload=QUICKSTART))
    assert configuration["data"]["trace"] == configuration["load"]["trace"]
    assert configuration["data"]["trace"]["file"] == f"{CONFIG_FOLDER}/{TRACE_FILE}"
    assert configuration["load"]["type"] == "trace_replay"
    assert configuration["load"]["stages"] == [{"rate": 4.0, "duration": 30}]
    assert configuration["load"]["base_seed"] == 7


@pytest.mark.parametrize(("drain_timeout_s", "limit_s"), [(60.0, 90.0), (900.0, 600.0)])
def test_the_drain_time_ends_requests_because_the_tool_waits_for_all(drain_timeout_s: float, limit_s: float) -> None:
    """A stage of 30 s, and 600 s for a request."""
    spec = BenchmarkSpec(drain_timeout_s=drain_timeout_s)
    assert request_timeout_s(spec, STAGE) == limit_s
    assert configured(spec)["load"]["request_timeout"] == limit_s


def test_chat_is_refused_because_the_tool_writes_prompts_for_completions_alone() -> None:
    with pytest.raises(ValidationError, match="/v1/completions alone"):
        BenchmarkSpec(endpoint=Endpoint.CHAT, engine=Engine.INFERENCE_PERF)


def test_a_stage_fits_into_a_config_map() -> None:
    spec = BenchmarkSpec(engine=Engine.INFERENCE_PERF, rates_per_s=(5000.0,), stage_duration_s=60)
    planned = next_stage(spec, [])
    assert planned is not None
    text = trace(spec.workload.schedule(planned.rate_per_s, planned.duration_s))
    assert len(text) < 2**20


@pytest.mark.parametrize(
    "workload",
    [dataset_workload("own", ['{"prompt": "a"}']), fixed_workload(64, 8, shared_prefix=PrefixSharing(tokens=32))],
)
def test_what_the_tool_cannot_send_is_refused(workload: Any) -> None:
    with pytest.raises(ValidationError, match="built-in engine"):
        BenchmarkSpec(workload=workload, engine=Engine.INFERENCE_PERF)


def test_the_job_makes_the_load_and_then_serves_the_reports() -> None:
    configuration = configured(BenchmarkSpec())
    config_map, service, job = objects(
        configuration,
        QUICKSTART.schedule(STAGE.rate_per_s, STAGE.duration_s),
        name="load-1",
        namespace="ns",
        labels={"app.kubernetes.io/managed-by": "llm-rollout"},
        env=[{"name": "HF_ENDPOINT", "value": "https://hub"}],
        deadline_s=99.5,
    )
    assert yaml.safe_load(config_map["data"]["config.yml"]) == configuration
    assert len(config_map["data"][TRACE_FILE].splitlines()) == 121
    assert job["spec"]["activeDeadlineSeconds"] == 100
    template = job["spec"]["template"]
    (load,), (reports,) = template["spec"]["initContainers"], template["spec"]["containers"]
    assert (load["name"], load["image"], load["env"][0]["name"]) == ("inference-perf", IMAGE, "HF_ENDPOINT")
    config, folder = template["spec"]["volumes"]
    assert config["configMap"]["name"] == config_map["metadata"]["name"]
    assert load["volumeMounts"][0]["mountPath"] == CONFIG_FOLDER
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


def read(
    entries: list[dict[str, Any]], report: dict[str, Any] = STAGE_REPORT, spec: BenchmarkSpec | None = None
) -> Stage:
    """A stage of as many requests as there are entries, 0.25 s apart."""
    schedule = [PlannedRequest(n * 0.25, 20, 11) for n in range(len(entries))]
    planned = PlannedStage(rate_per_s=4.0, duration_s=len(entries) / 4)
    return read_stage(entries, report, planned, schedule, spec or BenchmarkSpec())


def test_reports_are_read_into_the_same_figures_as_our_own() -> None:
    stage = read([entry(i * 0.25) for i in range(40)])
    assert (stage.rate_per_s, stage.completed) == (4.0, 40)
    assert stage.ttft_s is not None
    assert stage.itl_s is not None
    assert stage.client is not None
    assert stage.ttft_s.p99 == pytest.approx(0.1)
    assert stage.itl_s.p50 == pytest.approx(0.01)
    assert stage.follows == pytest.approx(1, rel=0.1)
    assert stage.answer_share == 1
    assert stage.late_ttft_s == pytest.approx(0.1)
    assert stage.client.schedule_delay_s.p99 == 0.004
    assert stage.client.limited_by is None


@pytest.mark.parametrize(
    ("error_type", "kind"),
    [
        ("HTTP Error 400", "rejected"),
        ("HTTP Error 429", "overloaded"),
        ("503 Service Unavailable", "overloaded"),
        ("HTTP Error 500", "server-error"),
        ("ClientConnectorError", "connection-refused"),
        ("ServerDisconnectedError", "connection-lost"),
    ],
)
def test_errors_are_told_apart(error_type: str, kind: str) -> None:
    failed = entry(0.5, error={"error_type": error_type, "error_msg": "why"})
    assert read([entry(0.0), failed]).failures == {kind: 1}


@pytest.mark.parametrize(("request_timeout_s", "kind"), [(600.0, "unfinished"), (10.0, "timeout")])
def test_an_answer_that_the_drain_time_ended_is_unfinished(request_timeout_s: float, kind: str) -> None:
    failed = entry(0.5, error={"error_type": "TimeoutError", "error_msg": "Request timed out"})
    stage = read([entry(0.0), failed], spec=BenchmarkSpec(request_timeout_s=request_timeout_s))
    assert stage.failures == {kind: 1}


def test_a_late_load_generator_is_said_to_be_the_limit() -> None:
    delay = STAGE_REPORT["load_summary"]["schedule_delay"] | {"p90": 56.8}
    stage = read([entry(0.0)], {"load_summary": {"schedule_delay": delay}})
    assert stage.client is not None
    assert "56800 ms late" in (stage.client.limited_by or "")


@pytest.mark.parametrize("reported", [0, 1])
def test_requests_that_the_tool_does_not_report_are_an_error(reported: int) -> None:
    schedule = [PlannedRequest(0.0, 20, 11), PlannedRequest(0.25, 20, 11)]
    with pytest.raises(BadInput, match=f"{reported or 'no'} of 2 requests"):
        read_stage([entry(0.0)] * reported, STAGE_REPORT, STAGE, schedule, BenchmarkSpec())
