"""The start-up waterfall: where the time between "pod created" and "first token" went.

Read from the pod's conditions, its events and vLLM's own log lines, so that the next start can be made faster where it
is slow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from rollout.bars import bar
from rollout.values import Value


class Stage(StrEnum):
    """In the order in which they happen."""

    NODE = "node creation"
    SCHEDULING = "scheduling"
    IMAGE = "image pull"
    PROCESS = "process start"
    WEIGHTS = "weights"
    COMPILATION = "compilation"
    GRAPH_CAPTURE = "graph capture"
    ENGINE = "engine"
    FIRST_TOKEN = "first token"


class StageTime(Value):
    """One bar of the waterfall."""

    stage: Stage
    start_s: Annotated[float, Field(ge=0)]
    """Seconds after the pod's creation."""
    duration_s: Annotated[float, Field(ge=0)]
    detail: str = ""


class Waterfall(Value):
    """All bars of one pod's start."""

    pod: str
    created_at: datetime
    stages: tuple[StageTime, ...]
    weights_bytes_per_s: float | None = None
    """Measured loading rate; None if the log does not tell."""

    @property
    def total_s(self) -> float:
        return max((stage.start_s + stage.duration_s for stage in self.stages), default=0.0)

    @property
    def slowest(self) -> StageTime | None:
        return max(self.stages, key=lambda stage: stage.duration_s, default=None)

    def with_first_token(self, took_s: float) -> Waterfall:
        """The waterfall with its last bar: what the first real request took to its first token.

        It stands at the end of the others, not at its own time: a server that was up already may be asked much later.
        """
        bar = StageTime(stage=Stage.FIRST_TOKEN, start_s=self.total_s, duration_s=took_s)
        return self.model_copy(update={"stages": (*self.stages, bar)})

    @property
    def markdown(self) -> str:
        """A table with bars of text, and what to do about the slowest stage."""
        if not self.stages:
            return "Nothing was observed of the start.\n"
        lines = ["| Stage | from s | took s | | |", "|---|---:|---:|---|---|"]
        for stage in self.stages:
            shown = bar(stage.start_s, stage.duration_s, self.total_s)
            lines.append(
                f"| {stage.stage} | {stage.start_s:.1f} | {stage.duration_s:.1f} | `{shown}` | {stage.detail} |"
            )
        slowest = self.slowest
        assert slowest is not None
        lines += ["", f"Slowest: **{slowest.stage}**. {_FASTER[slowest.stage]}"]
        return "\n".join(lines) + "\n"


_FASTER = {
    Stage.NODE: "Keep a spare node warm, or start it while the weights still travel.",
    Stage.SCHEDULING: "The pod waited for room: see the preflight's check of surge capacity.",
    Stage.IMAGE: "Stream the image (GKE image streaming), or preload it on the boot disk.",
    Stage.PROCESS: "Python's imports: a faster boot disk, or more CPU.",
    Stage.WEIGHTS: "Load with serving.load_format: runai_streamer, from a bucket in the node's region.",
    Stage.COMPILATION: "Keep vLLM's compilation cache on a volume (VLLM_CACHE_ROOT).",
    Stage.GRAPH_CAPTURE: "Capture fewer batch sizes, or accept slower decoding with --enforce-eager.",
    Stage.ENGINE: "Profiling and KV cache: set --num-gpu-blocks-override, or more CPU.",
    Stage.FIRST_TOKEN: "The first request compiles what warm-up left out.",
}


class TimedLine(Value):
    """A line of a container's log with the node's time stamp."""

    at: datetime
    text: str


def read_waterfall(
    pod: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    log: Sequence[TimedLine],
    *,
    weights_bytes: int = 0,
) -> Waterfall:
    """The waterfall of one pod. Stages that left no trace are left out, never guessed."""
    created = _time(pod["metadata"]["creationTimestamp"])
    name = pod["metadata"]["name"]
    about = [event for event in events if (event.get("involvedObject") or {}).get("name") == name]
    spans = [*_placement(created, pod, about), *_image(about), *_engine(pod, log, weights_bytes)]
    rate = next((span.rate for span in spans if span.rate), None)
    spans.sort(key=lambda span: (span.start, list(Stage).index(span.stage)))
    stages = tuple(
        StageTime(
            stage=span.stage,
            start_s=max(0.0, (span.start - created).total_seconds()),
            duration_s=max(0.0, (span.end - span.start).total_seconds()),
            detail=span.detail,
        )
        for span in spans
    )
    return Waterfall(pod=name, created_at=created, stages=stages, weights_bytes_per_s=rate)


@dataclass(frozen=True)
class _Span:
    stage: Stage
    start: datetime
    end: datetime
    detail: str = ""
    rate: float | None = None


def _placement(created: datetime, pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Iterator[_Span]:
    scheduled = _condition_time(pod, "PodScheduled")
    if scheduled is None:
        return
    triggered = next((_event_time(event) for event in events if event.get("reason") == "TriggeredScaleUp"), None)
    if triggered and created <= triggered <= scheduled:
        yield _Span(Stage.SCHEDULING, created, triggered, "until the autoscaler decided")
        yield _Span(Stage.NODE, triggered, scheduled)
    else:
        yield _Span(Stage.SCHEDULING, created, scheduled)


_PULLED = re.compile(
    r"[Ss]uccessfully pulled image .*? in (?P<time>[\d.hmsµu]+)(?:.*?Image size: (?P<bytes>\d+) bytes)?"
)


def _image(events: Sequence[Mapping[str, Any]]) -> Iterator[_Span]:
    for event in events:
        match = _PULLED.search(event.get("message") or "") if event.get("reason") == "Pulled" else None
        if match:
            end, took = _event_time(event), _go_duration_s(match["time"])
            detail = f"{int(match['bytes']) / 1e9:.2f} GB" if match["bytes"] else ""
            yield _Span(Stage.IMAGE, end - timedelta(seconds=took), end, detail)
            return


_LOADING = re.compile(r"Starting to load model|Loading (?:safetensors|model weights)|Start(?:ing)? loading weights")
_WEIGHTS_TOOK = re.compile(r"Loading weights took (?P<s>[\d.]+) seconds")
_MODEL_TOOK = re.compile(r"Model loading took (?P<gib>[\d.]+) GiB(?: memory)? and (?P<s>[\d.]+) seconds")
_STREAMED = re.compile(r"Overall time to stream (?P<size>[\d.]+ \w+).*?: (?P<s>[\d.]+)s")
_COMPILED = re.compile(r"torch\.compile (?:takes|took) (?P<s>[\d.]+) s in total")
_CAPTURED = re.compile(r"Graph capturing finished in (?P<s>[\d.]+) secs")
_ENGINE = re.compile(r"init engine \(profile, create kv cache, warmup model\) took (?P<s>[\d.]+) s")
_STARTED = re.compile(r"Application startup complete")


def _engine(pod: Mapping[str, Any], log: Sequence[TimedLine], weights_bytes: int) -> Iterator[_Span]:
    started = _container_start(pod)
    loading = _first(log, _LOADING)
    if started and loading and loading[0] > started:
        yield _Span(Stage.PROCESS, started, loading[0])
    weights = _first(log, _WEIGHTS_TOOK) or _first(log, _STREAMED) or _first(log, _MODEL_TOOK)
    if weights:
        seconds = float(weights[1]["s"])
        rate = weights_bytes / seconds if weights_bytes and seconds else None
        detail = f"{weights_bytes / 1e9:.2f} GB at {rate / 1e9:.2f} GB/s" if rate else ""
        yield _Span(Stage.WEIGHTS, weights[0] - timedelta(seconds=seconds), weights[0], detail, rate)
    compiled, captured, engine = (_first(log, pattern) for pattern in (_COMPILED, _CAPTURED, _ENGINE))
    inside_s = 0.0
    for stage, found in ((Stage.COMPILATION, compiled), (Stage.GRAPH_CAPTURE, captured)):
        if found:
            seconds = float(found[1]["s"])
            inside_s += seconds
            yield _Span(stage, found[0] - timedelta(seconds=seconds), found[0])
    if engine:
        # vLLM's figure contains compilation and capture: what is left is profiling and the KV cache.
        seconds = float(engine[1]["s"])
        start = engine[0] - timedelta(seconds=seconds)
        detail = f"profiling and KV cache {max(0.0, seconds - inside_s):.1f} s of {seconds:.1f} s"
        yield _Span(Stage.ENGINE, start, _ready_time(pod, log) or engine[0], detail)


_LOADED_SHARE = re.compile(r"\d+% Completed|Downloading model|Model downloaded|KV cache size")
_MILESTONES = (_LOADING, _WEIGHTS_TOOK, _MODEL_TOOK, _STREAMED, _COMPILED, _CAPTURED, _ENGINE, _STARTED, _LOADED_SHARE)


def is_milestone(line: str) -> bool:
    """Whether a line of a log tells that the start has come a step further."""
    return any(pattern.search(line) for pattern in _MILESTONES)


def _ready_time(pod: Mapping[str, Any], log: Sequence[TimedLine]) -> datetime | None:
    ready = _first(log, _STARTED)
    return ready[0] if ready else _condition_time(pod, "Ready")


def _first(log: Sequence[TimedLine], pattern: re.Pattern[str]) -> tuple[datetime, re.Match[str]] | None:
    for line in log:
        match = pattern.search(line.text)
        if match:
            return line.at, match
    return None


def _container_start(pod: Mapping[str, Any]) -> datetime | None:
    for container in (pod.get("status") or {}).get("containerStatuses") or []:
        running = (container.get("state") or {}).get("running")
        if running and running.get("startedAt"):
            return _time(running["startedAt"])
    return None


def _condition_time(pod: Mapping[str, Any], kind: str) -> datetime | None:
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == kind and condition.get("status") == "True" and condition.get("lastTransitionTime"):
            return _time(condition["lastTransitionTime"])
    return None


def _event_time(event: Mapping[str, Any]) -> datetime:
    stamp = event.get("eventTime") or event.get("lastTimestamp") or event["metadata"]["creationTimestamp"]
    return _time(stamp)


def _time(stamp: str) -> datetime:
    """Kubernetes' RFC 3339; nanoseconds of logs are cut to microseconds."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", stamp))


_GO_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def _go_duration_s(text: str) -> float:
    """Seconds of a Go duration: `1m2.5s`, `350ms`."""
    return sum(float(number) * _GO_UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ms|us|µs|h|m|s)", text))


def timed_line(raw: str) -> TimedLine | None:
    """Read a log line as Kubernetes sends it with `timestamps=true`; None if it carries no time."""
    stamp, _, text = raw.partition(" ")
    try:
        return TimedLine(at=_time(stamp), text=text)
    except ValueError:
        return None
