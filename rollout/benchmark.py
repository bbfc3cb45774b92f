"""A load sweep as data: what to measure, which rate comes next, and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from rollout.curve import Curve, bracket, build_curve, is_sustained, plateau_ttft_s, saturation_rate
from rollout.stage import Stage
from rollout.values import CommitSha, Value, content_digest
from rollout.workload import QUICKSTART, NamedWorkload

GROWTH = 2.0
"""From one stage to the next until the server saturates: 6 stages for a factor of 32."""

STEADY_STAGE = 4.0
"""A stage lasts at least this many typical answers, else it ends before the server is full."""

REFINED_STAGE = 8.0
"""A stage beside the knee lasts this many mean answers: slight overload shows only once all slots are taken."""

REFINED_REQUESTS = 100
"""…and has this many requests: at 100 the backlog's own noise is 2.5 % of the stage."""

LONGEST_STAGE = 10.0
"""…but at most this many times `stage_duration_s`."""


TRACE_REQUESTS = 20_000
"""In-cluster stages have at most so many: at 43 bytes each, 0.86 of the 1 MiB that a ConfigMap holds."""

SHORT_ANSWERS = 0.99
"""Below this share of the planned tokens the answers are another workload; vLLM with `ignore_eos` gives 1."""

OTHER_PROMPTS = 0.01
"""Prompts that differ by more than this share from the planned tokens are another workload."""


class Engine(StrEnum):
    BUILTIN = "builtin"
    """Our own client: a laptop, the rehearsal, small endpoints."""
    INFERENCE_PERF = "inference-perf"
    """An in-cluster Job: real load, without a port-forward in between."""


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    """`/v1/completions`: prompts have exactly the planned tokens."""
    CHAT = "chat"
    """`/v1/chat/completions`: the chat template's tokens count as part of the prompt."""


class BenchmarkSpec(Value):
    """A load sweep."""

    model_config = ConfigDict(allow_inf_nan=False)

    workload: NamedWorkload = QUICKSTART
    """Spelled out, or the name of one of the quickstart's use cases, e.g. `chatbot`."""
    engine: Engine = Engine.BUILTIN
    endpoint: Endpoint = Endpoint.COMPLETIONS
    rates_per_s: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Fixed rates; empty: chosen from what was measured so far."""
    start_rate_per_s: Annotated[float, Field(gt=0)] = 1.0
    max_rate_per_s: Annotated[float, Field(gt=0)] = 1000.0
    stage_duration_s: Annotated[float, Field(gt=0)] = 30.0
    """30 s: at 1 request/s the p90 rests on three requests; longer is better and dearer."""
    max_stages: Annotated[int, Field(ge=1, le=100)] = 14
    """14: six doublings, three refinements, and both sides of the knee repeated."""
    resolution: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Relative width of the bracket around the knee at which the search stops."""
    stages_per_side: Annotated[int, Field(ge=1, le=10)] = 2
    """How often each side of the knee is measured."""
    drain_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """How long answers may still run after a stage's last request before they are cut off."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    load_image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]\S*$")] | None = None
    """Image of inference-perf, best by digest (`…/inference-perf@sha256:…`) or from a mirror of your own; None: the
    release whose reports this version reads (`rollout.inference_perf.IMAGE`)."""
    prompt_salt: str | None = None
    """Decides, with the workload's seed, the words of the prompts. None: new words in every run, so that a second run
    does not find the first one's prompts in the prefix cache. Give the `prompt_salt` of a report to send its very
    prompts again, to a server that has been restarted."""

    @model_validator(mode="after")
    def _start_is_below_the_maximum(self) -> BenchmarkSpec:
        if self.start_rate_per_s > self.max_rate_per_s:
            raise ValueError(
                f"start_rate_per_s={self.start_rate_per_s:g} exceeds max_rate_per_s={self.max_rate_per_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _engine_can_send_the_workload(self) -> BenchmarkSpec:
        if self.engine is not Engine.INFERENCE_PERF:
            return self
        if not self.workload.is_lengths_alone:
            raise ValueError(
                f"inference-perf cannot send the workload {self.workload.name}: use the built-in engine for datasets"
                " and shared prefixes"
            )
        if self.endpoint is Endpoint.CHAT:
            raise ValueError(
                "inference-perf writes prompts of exact lengths for /v1/completions alone: use endpoint=completions, or"
                " the built-in engine for chat"
            )
        return self


class PlannedStage(Value):
    rate_per_s: float
    duration_s: float


class Environment(Value):
    """What was measured. Curves are comparable when everything but the date agrees."""

    model: str
    """Served model name."""
    commit_sha: CommitSha | None = None
    image: str = ""
    flags: tuple[str, ...] = ()
    """vLLM's arguments."""
    accelerator: str = ""
    accelerator_count: int = 1
    server_version: str = ""

    @property
    def key(self) -> str:
        return content_digest(self.model_dump(mode="json"))


class BenchmarkReport(Value):
    """A finished sweep."""

    spec: BenchmarkSpec
    environment: Environment
    started_at: datetime
    duration_s: float
    stages: tuple[Stage, ...]
    curve: Curve
    prompt_salt: str = ""
    """What decided the words of the prompts; empty where the engine writes its own (inference-perf)."""
    notes: tuple[str, ...] = ()
    """What a reader must know: a client limit, token counts that differ from the plan…"""


def next_stage(spec: BenchmarkSpec, stages: Sequence[Stage]) -> PlannedStage | None:
    """The stage to measure next, from those measured so far; None when the sweep is complete.

    Depends on its arguments alone, so a sweep that was interrupted continues where it stopped.
    """
    rate = next_rate(spec, stages)
    return None if rate is None else PlannedStage(rate_per_s=rate, duration_s=_duration_s(spec, stages, rate))


def next_rate(spec: BenchmarkSpec, stages: Sequence[Stage]) -> float | None:
    """Requests/s to offer next, in four digits unless given; None when the sweep is complete.

    Doubles until the server saturates, then asks just below and just above the rate that the saturated throughput
    stands for (and halves the bracket where that does not help), then repeats both sides.
    """
    if spec.rates_per_s:
        return spec.rates_per_s[len(stages)] if len(stages) < len(spec.rates_per_s) else None
    if not stages:
        return spec.start_rate_per_s
    if len(stages) >= spec.max_stages:
        return None
    lower, upper = bracket(stages)
    if upper is None:
        return _higher_rate(spec, stages, build_curve(stages, resolution=spec.resolution))
    if lower <= 0:
        return _lower_rate(spec, stages, upper)
    if upper / lower > 1 + spec.resolution * 1.01:
        return _refined_rate(spec, stages, lower, upper)
    return _repeated_rate(spec, stages, lower, upper)


def _higher_rate(spec: BenchmarkSpec, stages: Sequence[Stage], curve: Curve) -> float | None:
    if any(point.client_limited for point in curve.points):
        return None  # more load than the client can make proves nothing about the server
    highest = max(stage.rate_per_s for stage in stages)
    if highest >= spec.max_rate_per_s * 0.999:
        return None
    return min(_four_digits(highest * GROWTH), spec.max_rate_per_s)


def _lower_rate(spec: BenchmarkSpec, stages: Sequence[Stage], upper: float) -> float | None:
    """None where asking for less is in vain: two stages without one answer, or a single request in a long stage."""
    if sum(stage.completed == 0 for stage in stages) >= 2:
        return None
    rate = _four_digits(upper / GROWTH)
    return rate if rate * spec.stage_duration_s * LONGEST_STAGE >= 1 else None


def _refined_rate(spec: BenchmarkSpec, stages: Sequence[Stage], lower: float, upper: float) -> float:
    margin = 1 + spec.resolution / 2
    estimate = saturation_rate(stages, lower)
    if estimate is not None:
        for candidate in (estimate / margin, estimate * margin):
            if lower * math.sqrt(margin) < candidate < upper / math.sqrt(margin):
                return _four_digits(candidate)
    return _four_digits(math.sqrt(lower * upper))


def _four_digits(rate: float) -> float:
    return float(f"{rate:.4g}")


def _repeated_rate(spec: BenchmarkSpec, stages: Sequence[Stage], lower: float, upper: float) -> float | None:
    def times(rate: float) -> int:
        return sum(math.isclose(stage.rate_per_s, rate, rel_tol=1e-6) for stage in stages)

    rate = min((lower, upper), key=times)
    return rate if times(rate) < spec.stages_per_side else None


def _duration_s(spec: BenchmarkSpec, stages: Sequence[Stage], rate: float) -> float:
    """`stage_duration_s`, or longer where answers take long, or where few requests must decide about the knee."""
    plateau = plateau_ttft_s(stages)
    answers = [stage.e2e_s for stage in stages if stage.e2e_s is not None and is_sustained(stage, plateau)]
    most = math.inf if spec.engine is Engine.BUILTIN else TRACE_REQUESTS / rate
    longest = STEADY_STAGE * max((answer.p50 for answer in answers), default=0.0)
    if not spec.rates_per_s and stages and rate < max(stage.rate_per_s for stage in stages):
        mean_s = max((answer.mean for answer in answers), default=0.0)
        longest = max(longest, REFINED_STAGE * mean_s, REFINED_REQUESTS / rate)
    return min(max(spec.stage_duration_s, longest), LONGEST_STAGE * spec.stage_duration_s, most)


def benchmark_report(
    spec: BenchmarkSpec,
    environment: Environment,
    stages: Sequence[Stage],
    *,
    started_at: datetime,
    duration_s: float,
    prompt_salt: str = "",
) -> BenchmarkReport:
    return BenchmarkReport(
        spec=spec,
        environment=environment,
        started_at=started_at,
        duration_s=duration_s,
        stages=tuple(stages),
        curve=build_curve(stages, resolution=spec.resolution),
        prompt_salt=prompt_salt,
        notes=tuple(_notes(stages)),
    )


def _notes(stages: Sequence[Stage]) -> list[str]:
    notes = []
    limits = [(s.rate_per_s, s.client.limited_by) for s in stages if s.client and s.client.limited_by]
    if limits:
        rate, reason = min(limits)
        notes.append(f"From {rate:.3g} requests/s on the load generator was the limit: {reason}.")
    cached = [s.server.prefix_cache_hit_ratio for s in stages if s.server and s.server.prefix_cache_hit_ratio]
    if cached and max(cached) > 0.01:
        notes.append(f"Up to {max(cached):.0%} of the prompt tokens came from the prefix cache.")
    shares = [stage.answer_share for stage in stages if stage.answer_share is not None]
    if shares and min(shares) < SHORT_ANSWERS:
        notes.append(
            f"Answers ended early, at {min(shares):.0%} of the tokens that were asked for: the load was lighter."
        )
    prompts = [stage.prompt_share for stage in stages if stage.prompt_share is not None]
    furthest = max(prompts, key=lambda share: abs(share - 1), default=1.0)
    if abs(furthest - 1) > OTHER_PROMPTS:
        notes.append(f"The server counted {furthest:.0%} of the prompt tokens that were planned: another load.")
    failed = sum(sum(stage.failures.values()) for stage in stages)
    if failed:
        first = next((stage.first_failure for stage in stages if stage.first_failure), "")
        notes.append(f"{failed} requests did not complete. {first}".strip())
    return notes
