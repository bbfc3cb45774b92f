"""inference-perf as the in-cluster engine of a sweep: its configuration, its Job, and its reports in our schema.

One Job measures one stage, so that the same adaptive search chooses the rates. What it sends is the workload's own
schedule, request by request, as a trace that the tool replays: arrivals and lengths are those of the built-in client.
(Its own random lengths know no quantiles, and its Poisson load sends a fixed number of requests over a span that
varies: at 4/s over 30 s the real rate has a standard deviation of 9 %.)

The Job's pod first makes the load, then serves the reports over HTTP until they have been fetched: logs are cut and
rotated at 10 MiB, and the serving pods' identity may only read the bucket. A pod that is ready is a load that has
ended. The reports are read request by request (`per_request_lifecycle_metrics.json`), so every figure and every verdict
is defined as for the built-in client. Config keys and report fields: inference-perf 0.7
(https://github.com/kubernetes-sigs/inference-perf).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import yaml

from rollout.benchmark import BenchmarkSpec, PlannedStage
from rollout.errors import BadInput
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.stage import (
    ClientSide,
    FailureKind,
    Percentiles,
    RequestLimits,
    RequestRecord,
    ServerSide,
    Stage,
    summarize,
)
from rollout.workload import PlannedRequest, planned_duration_s

IMAGE = "quay.io/inference-perf/inference-perf:v0.7.0"
"""The release whose config and reports this module knows. Pin it by digest where you know it."""

PER_REQUEST_REPORT = "per_request_lifecycle_metrics.json"
STAGE_REPORT = "stage_0_lifecycle_metrics.json"
MANIFESTS = ("inference-perf-config-map.yaml", "service.yaml", "inference-perf-job.yaml")

CONFIG_FOLDER = "/etc/inference-perf"
TRACE_FILE = "trace.csv"
_TRACE_START = datetime(2000, 1, 1, tzinfo=UTC)
"""The format wants dates; the tool counts from the first one."""

REPORTS_FOLDER = "/reports"
REPORTS_PORT = 8081
"""Where the pod serves its reports once the load is over."""

WORKER_CONCURRENCY = 1000
"""Requests in flight per worker process: above what one replica runs and queues, so that the load stays open-loop."""

DELAY_LIMIT_S = 0.05
"""As for the built-in client: a request sent later than this has waited in the load generator."""


def config(
    spec: BenchmarkSpec, stage: PlannedStage, *, base_url: str, model: str, tokenizer: str, seed: int
) -> dict[str, Any]:
    """inference-perf's configuration for one stage, whose requests stand in `trace`.

    `tokenizer` is a Hugging Face repository or a path in the container. Equal seeds send equal prompts, which the
    prefix cache would answer.
    """
    trace_file = {"file": f"{CONFIG_FOLDER}/{TRACE_FILE}", "format": "AzurePublicDataset"}
    return {
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": model, "base_url": base_url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": tokenizer},
        "data": {"type": "random", "trace": trace_file},
        "load": {
            "type": "trace_replay",
            "trace": trace_file,
            # The trace decides; the tool asks for these figures and repeats them in its report.
            "stages": [{"rate": stage.rate_per_s, "duration": max(1, round(_duration_s(stage)))}],
            "worker_max_concurrency": WORKER_CONCURRENCY,
            "request_timeout": request_timeout_s(spec, stage),
            "base_seed": seed,
        },
        "report": {
            "request_lifecycle": {
                "summary": False,
                "per_stage": True,
                "per_request": True,
                "per_request_fields": {"request": False, "response": False, "response_chunks": False},
                "use_server_output_tokens": True,
            },
            "prometheus": None,
        },
        "storage": {"local_storage": {"path": REPORTS_FOLDER}},
    }


def trace(schedule: Sequence[PlannedRequest]) -> str:
    """The requests of a stage as the tool reads them: a CSV file of arrival, prompt tokens and answer tokens."""
    lines = [
        f"{_TRACE_START + timedelta(seconds=each.at_s):%Y-%m-%d %H:%M:%S.%f},{each.input_tokens},{each.output_tokens}"
        for each in schedule
    ]
    return "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, ""])


def request_timeout_s(spec: BenchmarkSpec, stage: PlannedStage) -> float:
    """How long the tool may wait for one answer.

    It has no end of a stage: it waits for every answer, and its grace for those that still run begins only then, when
    there are none. So the drain time goes into the timeout of each request. A stage then ends at the latest
    `drain_timeout_s` and twice its own duration after its start; with the built-in client, once its duration.
    """
    return min(spec.request_timeout_s, _duration_s(stage) + spec.drain_timeout_s)


def _duration_s(stage: PlannedStage) -> float:
    return planned_duration_s(stage.rate_per_s, stage.duration_s)


def objects(
    configuration: Mapping[str, Any],
    schedule: Sequence[PlannedRequest],
    *,
    name: str,
    namespace: str,
    labels: Mapping[str, str],
    deadline_s: float,
    env: Sequence[Mapping[str, Any]] = (),
    image: str = IMAGE,
) -> tuple[KubernetesObject, ...]:
    """ConfigMap, Service and Job of one stage, all called `name`; the Service leads to the reports.

    Args:
        labels: of all three and of the pod; `app` is added to them.
        deadline_s: after which Kubernetes stops the Job, whoever has forgotten it.
        env: the load's environment variables, e.g. the hub's token for a gated tokenizer.
    """
    return render(
        read_manifests(MANIFESTS),
        {
            "name": name,
            "service_name": name,
            "app": name,
            "namespace": namespace,
            "labels": {**labels, "app": name},
            "config": yaml.safe_dump(dict(configuration), sort_keys=False),
            "trace": trace(schedule),
            "image": image,
            "env": [dict(variable) for variable in env],
            "port": REPORTS_PORT,
            "deadline_s": math.ceil(deadline_s),
        },
    )


def under_load(samples: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """The samples of `/metrics` from just before the first request to just after the last one.

    The pod's start and end belong to the Job and not to the stage. Its reports do not help: their clock is the pod's
    own, and starts anywhere.
    """
    busy = [
        index
        for index, sample in enumerate(samples)
        if sample.get("vllm:num_requests_running", 0) + sample.get("vllm:num_requests_waiting", 0) > 0
    ]
    return samples[max(0, busy[0] - 1) : busy[-1] + 2] if busy else samples


def read_stage(
    requests: Sequence[Mapping[str, Any]],
    stage_report: Mapping[str, Any],
    planned: PlannedStage,
    schedule: Sequence[PlannedRequest],
    spec: BenchmarkSpec,
    *,
    limits: RequestLimits | None = None,
    server: ServerSide | None = None,
) -> Stage:
    """A stage from `PER_REQUEST_REPORT` and `STAGE_REPORT`.

    Raises BadInput if a request is missing: the tool notes every request that it sends, and none that it cancels.
    """
    if len(requests) != len(schedule):
        raise BadInput(
            f"inference-perf reports {len(requests) or 'no'} of {len(schedule)} requests: the others were never sent,"
            " or cancelled.",
            where=PER_REQUEST_REPORT,
            resolution="Run again: the finished stages are kept. The load's log says what stopped it.",
        )
    # The report has no schedule and no order; in order of time its entries are the schedule's.
    in_order = sorted(requests, key=lambda entry: float(entry["start_time"]))
    start = float(in_order[0]["start_time"]) - schedule[0].at_s
    # A request that its own limit did not end was cut off for the drain time: it is unfinished.
    cut_off = request_timeout_s(spec, planned) < spec.request_timeout_s
    records = [_record(entry, start, each, cut_off) for entry, each in zip(in_order, schedule, strict=True)]
    return summarize(
        records,
        duration_s=_duration_s(planned),
        limits=limits,
        server=server,
        client=_client_side(stage_report, len(records)),
    )


def _record(entry: Mapping[str, Any], start: float, planned: PlannedRequest, cut_off: bool) -> RequestRecord:
    info = entry.get("info") or {}
    response = info.get("response_metrics") or {}
    usage = response.get("server_usage") or {}
    error = entry.get("error")
    text = (info.get("request_metrics") or {}).get("text") or {}
    kind = _failure_kind(error) if error else None
    return RequestRecord(
        scheduled_s=planned.at_s,
        sent_s=float(entry["start_time"]) - start,
        input_tokens=int(usage.get("prompt_tokens") or text.get("input_tokens") or 0),
        planned_input_tokens=planned.input_tokens,
        planned_output_tokens=planned.output_tokens,
        output_tokens=int(usage.get("completion_tokens") or response.get("output_tokens") or 0),
        token_times_s=[float(time) - start for time in response.get("output_token_times") or ()],
        ended_s=float(entry["end_time"]) - start,
        failure=FailureKind.UNFINISHED if kind is FailureKind.TIMEOUT and cut_off else kind,
        detail=_error_text(error) if error else "",
    )


def _error_text(error: Any) -> str:
    if isinstance(error, Mapping):
        return f"{error.get('error_type')}: {error.get('error_msg')}"[:300]
    return str(error)[:300]


def _failure_kind(error: Any) -> FailureKind:
    """From the error's type: `HTTP Error <status>` (in some releases `<status> <reason>`), or an exception's name."""
    kind = str(error.get("error_type") if isinstance(error, Mapping) else error)
    answered = re.match(r"(?:HTTP Error )?(\d{3})\b", kind)
    if answered:
        status = int(answered[1])
        if status in (429, 503):
            return FailureKind.OVERLOADED
        return FailureKind.SERVER_ERROR if status >= 500 else FailureKind.REJECTED
    if "Timeout" in kind:
        return FailureKind.TIMEOUT
    return FailureKind.REFUSED if "ConnectorError" in kind else FailureKind.CONNECTION


def _client_side(stage_report: Mapping[str, Any], count: int) -> ClientSide | None:
    delay = (stage_report.get("load_summary") or {}).get("schedule_delay")
    if not delay:
        return None
    late_s = float(delay["p90"])
    limited = f"it sent requests {late_s * 1e3:.0f} ms late (p90)" if late_s > DELAY_LIMIT_S else None
    return ClientSide(
        schedule_delay_s=Percentiles(
            count=count,
            mean=delay["mean"],
            p50=delay["median"],
            p90=late_s,
            p95=delay["p95"],
            p99=delay["p99"],
            maximum=delay["max"],
        ),
        busy_share=0.0,
        limited_by=limited,
    )
