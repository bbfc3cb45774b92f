"""One stage of a load sweep: from what happened to each request to the figures that a curve is made of.

Definitions, as inference-perf and vLLM use them, all measured by the client from the moment it sends the request:
TTFT, time to the first token; ITL, the gaps between tokens, all requests together; TPOT, one request's mean gap after
the first token; NTPOT, one request's end-to-end time divided by its output tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import numpy as np
from pydantic import Field

from rollout.values import Value

SETTLED_FROM = 1 / 3
"""Share of a stage that is left out of its throughput: the server first fills up."""

LATE_FROM = 0.8
"""The requests that arrive after this share of a stage tell whether a queue has grown."""


class LatencyMetric(StrEnum):
    TTFT = "ttft"
    ITL = "itl"
    TPOT = "tpot"
    NTPOT = "ntpot"
    E2E = "e2e"


class Percentile(StrEnum):
    MEAN = "mean"
    P50 = "p50"
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"


class LatencyLimit(Value):
    """An upper limit on one percentile of one latency."""

    metric: LatencyMetric
    percentile: Percentile = Percentile.P50
    limit_s: Annotated[float, Field(gt=0)]

    @property
    def name(self) -> str:
        """E.g. `TTFT p90`."""
        return f"{self.metric.value.upper()} {self.percentile.value}"


class FailureKind(StrEnum):
    REFUSED = "connection-refused"
    """Nothing listens: no port-forward, no ready pod."""
    CONNECTION = "connection-lost"
    """Reset or closed before the answer was complete."""
    TIMEOUT = "timeout"
    """No complete answer within the request timeout."""
    REJECTED = "rejected"
    """A 4xx answer other than 429: the request itself is wrong, e.g. too long."""
    OVERLOADED = "overloaded"
    """429 or 503: the server sheds load."""
    SERVER_ERROR = "server-error"
    """Another 5xx answer."""
    BROKEN_STREAM = "broken-stream"
    """Not HTTP, or a stream that ends without `[DONE]` or reports an error."""
    UNFINISHED = "unfinished"
    """Still running when the stage's drain time was over: overload, or a server that hangs."""


@dataclass(slots=True)
class RequestRecord:
    """What happened to one request; times in seconds after the start of the stage."""

    scheduled_s: float
    sent_s: float
    input_tokens: int = 0
    """As the server counts them (`usage.prompt_tokens`), or as planned if it does not say."""
    planned_input_tokens: int = 0
    """0 where nobody planned them: a dataset's prompts are as long as they are."""
    planned_output_tokens: int = 1
    output_tokens: int = 0
    token_times_s: Sequence[float] = field(default_factory=list)
    """When each streamed piece arrived; normally one piece is one token."""
    ended_s: float = math.nan
    """When the last piece, or the failure, arrived."""
    failure: FailureKind | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token; of a request that never got one, the time that it waited: a lower bound."""
        return (self.token_times_s[0] if len(self.token_times_s) else self.ended_s) - self.sent_s


class Percentiles(Value):
    """A distribution; the unit is that of the field that holds it."""

    count: Annotated[int, Field(ge=1)]
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles | None:
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=float)
        if not len(array):
            return None
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99))
        return cls(
            count=len(array),
            mean=float(array.mean()),
            p50=float(p50),
            p90=float(p90),
            p95=float(p95),
            p99=float(p99),
            maximum=float(array.max()),
        )

    def at(self, percentile: Percentile) -> float:
        value: float = getattr(self, percentile.value)
        return value


class ServerSide(Value):
    """The server's own metrics over the stage, from `/metrics`."""

    samples: int
    running_mean: float
    running_max: float
    waiting_mean: float
    waiting_max: float
    kv_cache_usage_max: float | None = None
    """Share of the KV cache, 0 to 1."""
    preemptions: float | None = None
    prefix_cache_hit_ratio: float | None = None
    """Tokens found in the prefix cache / tokens looked up; None if none was looked up."""
    prompt_tokens: float | None = None
    generation_tokens: float | None = None


class ClientSide(Value):
    """The load generator about itself."""

    schedule_delay_s: Percentiles
    """How late requests were sent."""
    busy_share: Annotated[float, Field(ge=0)]
    """Share of the time, while requests were sent, in which the client had work to do; near 1 it cannot keep up."""
    cpu_s_per_million_tokens: float | None = None
    limited_by: str | None = None
    """Why the client, not the server, set the pace of this stage; None if it did not."""


class Stage(Value):
    """The measured figures of one offered rate."""

    rate_per_s: Annotated[float, Field(gt=0)]
    """Offered requests/s: planned requests / planned duration."""
    duration_s: Annotated[float, Field(gt=0)]
    """How long requests were sent; answers may have come later."""
    requests: int
    completed: int
    failures: dict[str, int] = {}
    """Number by `FailureKind`."""
    first_failure: str = ""
    """The first failure in words; an error goes before an unfinished request."""
    unfinished_late: Annotated[int, Field(ge=0)] = 0
    """Unfinished requests that arrived after `LATE_FROM` of the stage: they had the least time."""
    input_tokens_per_s: float
    output_tokens_per_s: float
    """Output tokens received per second between `SETTLED_FROM` of the stage and its end."""
    offered_output_tokens_per_s: float
    """What the server must produce to follow the offered rate: planned tokens, of a completed answer its own."""
    answer_share: float | None = None
    """Output tokens of the completed answers / those asked for; below 1, the server ends answers early."""
    prompt_share: float | None = None
    """Prompt tokens of the completed requests as the server counts them / those planned; None where none were."""
    requests_per_s: float
    """Completed requests / time until the last one ended."""
    goodput_per_s: float | None = None
    """Requests/s that met every objective of the run; None without per-request objectives."""
    goodput_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Requests that met every objective / all requests of the stage, failed and unfinished ones included."""
    concurrency_mean: float
    """Requests in flight, averaged over the settled part of the stage."""
    concurrency_max: int
    ttft_s: Percentiles | None = None
    itl_s: Percentiles | None = None
    tpot_s: Percentiles | None = None
    ntpot_s: Percentiles | None = None
    e2e_s: Percentiles | None = None
    late_ttft_s: float | None = None
    """Median TTFT of the requests that arrived in the last fifth: far above the others when a queue grows."""
    server: ServerSide | None = None
    client: ClientSide | None = None

    @property
    def total_tokens_per_s(self) -> float:
        return self.input_tokens_per_s + self.output_tokens_per_s

    @property
    def follows(self) -> float:
        """Share of the offered output tokens that the server produced while the load was on."""
        return self.output_tokens_per_s / self.offered_output_tokens_per_s

    def latency_s(self, metric: LatencyMetric, percentile: Percentile) -> float | None:
        """None if no request got far enough to have it."""
        distribution: Percentiles | None = getattr(self, f"{metric.value}_s")
        return None if distribution is None else distribution.at(percentile)

    @property
    def failed_share(self) -> float:
        """Requests without a complete answer / all: to a user, an answer that hangs is none."""
        return sum(self.failures.values()) / max(1, self.requests)

    @property
    def error_share(self) -> float:
        """Failed requests / all, without unfinished ones: a saturated server still works on those."""
        return self.failed_share - self.failures.get(FailureKind.UNFINISHED, 0) / max(1, self.requests)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request must meet to count as good."""

    ttft_s: float = math.inf
    itl_s: float = math.inf
    """Of the request's mean gap (TPOT)."""
    ntpot_s: float = math.inf
    e2e_s: float = math.inf


def summarize(
    records: Sequence[RequestRecord],
    *,
    duration_s: float,
    limits: RequestLimits | None = None,
    server: ServerSide | None = None,
    client: ClientSide | None = None,
) -> Stage:
    """The figures of a stage whose requests were planned over `duration_s` seconds. `records` must not be empty.

    Latencies are those of completed requests, except that TTFT and end-to-end times also count unfinished requests
    with the time they had waited: leaving them out would make an overloaded server look fast.
    """
    completed = [record for record in records if record.failure is None and len(record.token_times_s)]
    unfinished = [record for record in records if record.failure is FailureKind.UNFINISHED]
    failures = Counter(record.failure for record in records if record.failure is not None)
    settled_s = duration_s * SETTLED_FROM
    window_s = duration_s - settled_s
    good = sum(_is_good(record, limits) for record in completed) if limits else None
    planned_of_completed = sum(record.planned_output_tokens for record in completed)
    answered = sum(record.output_tokens for record in completed)
    planned = sum(record.planned_output_tokens for record in records)
    planned_prompts = sum(record.planned_input_tokens for record in completed)
    in_window = sum(_tokens_between(record, settled_s, duration_s) for record in records)
    last_end_s = max((record.ended_s for record in completed), default=duration_s)
    ttft = np.array([record.ttft_s for record in (*completed, *unfinished)])
    late = [r.ttft_s for r in (*completed, *unfinished) if r.scheduled_s >= duration_s * LATE_FROM]
    tpot = np.array([_tpot_s(record) for record in completed if record.output_tokens > 1])
    e2e = np.array([record.ended_s - record.sent_s for record in completed])
    ntpot = np.array([(record.ended_s - record.sent_s) / max(1, record.output_tokens) for record in completed])
    gaps = [np.diff(np.asarray(record.token_times_s)) for record in completed if len(record.token_times_s) > 1]
    return Stage(
        rate_per_s=len(records) / duration_s,
        duration_s=duration_s,
        requests=len(records),
        completed=len(completed),
        failures={kind.value: count for kind, count in sorted(failures.items())},
        first_failure=_first_failure(records),
        unfinished_late=sum(record.scheduled_s >= duration_s * LATE_FROM for record in unfinished),
        input_tokens_per_s=sum(r.input_tokens for r in completed) / max(last_end_s, duration_s),
        output_tokens_per_s=in_window / window_s,
        offered_output_tokens_per_s=(planned - planned_of_completed + answered) / duration_s,
        answer_share=answered / planned_of_completed if planned_of_completed else None,
        prompt_share=sum(record.input_tokens for record in completed) / planned_prompts if planned_prompts else None,
        requests_per_s=len(completed) / max(last_end_s, duration_s),
        goodput_per_s=None if good is None else good / max(last_end_s, duration_s),
        goodput_share=None if good is None else good / len(records),
        concurrency_mean=sum(_overlap_s(record, settled_s, duration_s) for record in records) / window_s,
        concurrency_max=_most_in_flight(records),
        ttft_s=Percentiles.of(ttft),
        itl_s=Percentiles.of(np.concatenate(gaps)) if gaps else None,
        tpot_s=Percentiles.of(tpot),
        ntpot_s=Percentiles.of(ntpot),
        e2e_s=Percentiles.of(np.concatenate([e2e, [record.ended_s - record.sent_s for record in unfinished]])),
        late_ttft_s=float(np.median(late)) if late else None,
        server=server,
        client=client,
    )


def _tpot_s(record: RequestRecord) -> float:
    return (record.token_times_s[-1] - record.token_times_s[0]) / (record.output_tokens - 1)


def _tokens_between(record: RequestRecord, start_s: float, end_s: float) -> float:
    times = np.asarray(record.token_times_s)
    if not len(times):
        return 0.0
    pieces = np.searchsorted(times, end_s) - np.searchsorted(times, start_s)
    # A piece may hold several tokens (speculative decoding, a busy server); the server's own count decides.
    return float(pieces) * max(1.0, record.output_tokens / len(times))


def _overlap_s(record: RequestRecord, start_s: float, end_s: float) -> float:
    ended_s = end_s if math.isnan(record.ended_s) else record.ended_s
    return max(0.0, min(ended_s, end_s) - max(record.sent_s, start_s))


def _most_in_flight(records: Sequence[RequestRecord]) -> int:
    changes = [(record.sent_s, 1) for record in records]
    changes += [(record.ended_s, -1) for record in records if not math.isnan(record.ended_s)]
    in_flight = most = 0
    for _, change in sorted(changes):
        in_flight += change
        most = max(most, in_flight)
    return most


def _is_good(record: RequestRecord, limits: RequestLimits) -> bool:
    e2e_s = record.ended_s - record.sent_s
    return (
        record.ttft_s <= limits.ttft_s
        and (record.output_tokens < 2 or _tpot_s(record) <= limits.itl_s)
        and e2e_s / max(1, record.output_tokens) <= limits.ntpot_s
        and e2e_s <= limits.e2e_s
    )


def _first_failure(records: Sequence[RequestRecord]) -> str:
    """An error tells more than a request that was cut off."""
    failed = [record for record in records if record.failure is not None]
    failed.sort(key=lambda record: record.failure is FailureKind.UNFINISHED)
    return failed[0].detail if failed else ""


_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(?:\{[^}]*\})? ([-+.0-9eE]+|NaN)$", re.MULTILINE)


def parse_vllm_metrics(text: str) -> dict[str, float]:
    """vLLM's plain gauges and counters in the Prometheus text format; no histograms.

    Over several engines of one server they are summed; of shares (`…_perc`) the highest counts.
    """
    values: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        if not name.endswith(("_bucket", "_created", "_sum")):
            known = values.get(name, 0.0)
            values[name] = max(known, float(value)) if name.endswith("_perc") else known + float(value)
    return values


def server_side(samples: Sequence[Mapping[str, float]]) -> ServerSide | None:
    """Gauges averaged, counters subtracted, over samples of `parse_vllm_metrics`; None if they hold no vLLM metrics.

    The first and the last sample frame the stage: they count for the counters, and the last not for the gauges.
    """
    useful = [sample for sample in samples if "vllm:num_requests_running" in sample]
    if len(useful) < 2:
        return None
    during = useful[:-1]

    def gauge(name: str) -> list[float]:
        return [sample[name] for sample in during if name in sample]

    def increase(name: str) -> float | None:
        first, last = useful[0].get(name), useful[-1].get(name)
        return None if first is None or last is None else last - first

    running, waiting = gauge("vllm:num_requests_running"), gauge("vllm:num_requests_waiting") or [0.0]
    # Older versions of vLLM called it gpu_cache_usage_perc.
    cache = gauge("vllm:kv_cache_usage_perc") or gauge("vllm:gpu_cache_usage_perc")
    queries, hits = increase("vllm:prefix_cache_queries_total"), increase("vllm:prefix_cache_hits_total")
    return ServerSide(
        samples=len(useful),
        running_mean=float(np.mean(running)),
        running_max=max(running),
        waiting_mean=float(np.mean(waiting)),
        waiting_max=max(waiting),
        kv_cache_usage_max=max(cache) if cache else None,
        preemptions=increase("vllm:num_preemptions_total"),
        prefix_cache_hit_ratio=hits / queries if queries and hits is not None else None,
        prompt_tokens=increase("vllm:prompt_tokens_total"),
        generation_tokens=increase("vllm:generation_tokens_total"),
    )
