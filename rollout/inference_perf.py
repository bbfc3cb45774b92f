"""inference-perf as the in-cluster engine of a sweep: its configuration, its Job, and its reports in our schema.

One Job measures one stage, so that the same adaptive search chooses the rates. Its pod first makes the load, then
serves the reports over HTTP until they have been fetched: logs are cut and rotated at 10 MiB, and the serving pods'
identity may only read the bucket. A pod that is ready is a load that has ended. The reports are read request by request
(`per_request_lifecycle_metrics.json`), so every figure and every verdict is defined as for the built-in client.
Config keys and report fields: inference-perf 0.7 (https://github.com/kubernetes-sigs/inference-perf).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import yaml

from rollout.benchmark import BenchmarkSpec, Endpoint, PlannedStage
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
from rollout.workload import Arrivals, TokenLengths, planned_duration_s

IMAGE = "quay.io/inference-perf/inference-perf:v0.7.0"
"""The release whose config and reports this module knows. Pin it by digest where you know it."""

PER_REQUEST_REPORT = "per_request_lifecycle_metrics.json"
STAGE_REPORT = "stage_0_lifecycle_metrics.json"
MANIFESTS = ("inference-perf-config-map.yaml", "service.yaml", "inference-perf-job.yaml")

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
    """inference-perf's configuration for one stage.

    `tokenizer` is a Hugging Face repository or a path in the container. Equal seeds send equal prompts, which the
    prefix cache would answer. Lengths that are not fixed are drawn from a log-normal distribution with the workload's
    mean, standard deviation, minimum and maximum: the tool knows no quantiles.
    """
    workload = spec.workload
    assert workload.input_lengths is not None  # `BenchmarkSpec` refuses this engine for anything else
    assert workload.output_lengths is not None
    duration_s = max(1, round(planned_duration_s(stage.rate_per_s, stage.duration_s)))
    return {
        "api": {"type": "chat" if spec.endpoint is Endpoint.CHAT else "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": model, "base_url": base_url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": tokenizer},
        "data": {
            "type": "random",
            "input_distribution": _distribution(workload.input_lengths),
            "output_distribution": _distribution(workload.output_lengths),
        },
        "load": {
            "type": "poisson" if workload.arrivals is Arrivals.POISSON else "constant",
            "stages": [{"rate": stage.rate_per_s, "duration": duration_s}],
            "worker_max_concurrency": WORKER_CONCURRENCY,
            "request_timeout": spec.request_timeout_s,
            "stage_teardown_grace_seconds": spec.drain_timeout_s,
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


def _distribution(lengths: TokenLengths) -> dict[str, Any]:
    low, high = lengths.quantile(0), lengths.maximum
    if low == high:
        return {"type": "fixed", "min": high, "max": high, "mean": high, "std_dev": 0}
    return {
        "type": "lognormal",
        "min": round(low),
        "max": high,
        "mean": round(lengths.mean, 1),
        "std_dev": round(standard_deviation(lengths), 1),
    }


def standard_deviation(lengths: TokenLengths) -> float:
    """Of a piecewise-linear quantile function: each piece is uniform, ∫x² = (a² + ab + b²)/3."""
    square = sum(
        (b.share - a.share) * (a.tokens**2 + a.tokens * b.tokens + b.tokens**2) / 3 for a, b in pairwise(lengths.points)
    )
    return math.sqrt(max(0.0, square - lengths.mean**2))


def objects(
    configuration: Mapping[str, Any],
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
    spec: BenchmarkSpec,
    *,
    limits: RequestLimits | None = None,
    server: ServerSide | None = None,
) -> Stage:
    """A stage from `PER_REQUEST_REPORT` and `STAGE_REPORT`. Raises BadInput if they hold no request."""
    if not requests:
        raise BadInput("inference-perf reports no request.", where=PER_REQUEST_REPORT)
    start = min(float(entry["start_time"]) for entry in requests)
    mean_output = max(1, round(spec.workload.mean_output_tokens))
    records = [_record(entry, start, mean_output) for entry in requests]
    # The tool draws the number of arrivals; the stage is as long as that number takes at the planned rate.
    return summarize(
        records,
        duration_s=len(records) / planned.rate_per_s,
        limits=limits,
        server=server,
        client=_client_side(stage_report, len(records)),
    )


def _record(entry: Mapping[str, Any], start: float, mean_output: int) -> RequestRecord:
    info = entry.get("info") or {}
    response = info.get("response_metrics") or {}
    usage = response.get("server_usage") or {}
    error = entry.get("error")
    sent_s = float(entry["start_time"]) - start
    output_tokens = int(usage.get("completion_tokens") or response.get("output_tokens") or 0)
    text = (info.get("request_metrics") or {}).get("text") or {}
    return RequestRecord(
        scheduled_s=sent_s,
        sent_s=sent_s,
        input_tokens=int(usage.get("prompt_tokens") or text.get("input_tokens") or 0),
        planned_output_tokens=output_tokens or mean_output,
        output_tokens=output_tokens,
        token_times_s=[float(time) - start for time in response.get("output_token_times") or ()],
        ended_s=float(entry["end_time"]) - start,
        failure=_failure_kind(error) if error else None,
        detail=_error_text(error) if error else "",
    )


def _error_text(error: Any) -> str:
    if isinstance(error, Mapping):
        return f"{error.get('error_type')}: {error.get('error_msg')}"[:300]
    return str(error)[:300]


def _failure_kind(error: Any) -> FailureKind:
    """From the error's type: `HTTP Error <status>`, or the name of an exception of aiohttp or asyncio."""
    kind = str(error.get("error_type") if isinstance(error, Mapping) else error)
    if kind.startswith("HTTP Error "):
        status = int(kind.split()[-1])
        if status in (429, 503):
            return FailureKind.OVERLOADED
        return FailureKind.SERVER_ERROR if status >= 500 else FailureKind.REJECTED
    if "Cancelled" in kind:
        return FailureKind.UNFINISHED
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
