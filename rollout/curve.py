"""From the stages of a load sweep to the three zones of the quickstart's latency profile, and what follows from them.

The knee is the highest offered rate at which the server still keeps up: it produces tokens as fast as they are asked
for, and waiting times do not grow while the load lasts. Both signs are needed. Throughput alone is noisy in a short
stage; waiting time alone cannot tell a burst from overload. At `1 + x` times its capacity a server falls behind by `x`
seconds per second, so requests that arrive at the end of a stage of `T` seconds wait about `x·T` seconds longer: at 5 %
overload and 30 s that is 1.5 s, many times an unloaded TTFT. Once a stage saturates, throughput / tokens per request is
a second, independent estimate of the knee, which decides within the measured bracket.

Everything here is pure; rates are requests/s, times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from rollout.stage import LatencyLimit, LatencyMetric, Percentile, Stage
from rollout.values import Value

FOLLOWS_AT_LEAST = 0.75
"""Share of the offered tokens that a server which keeps up produces, less noise.

Coarse on purpose, because long answers are still running at the end of a stage: it catches servers that take every
request at once and slow down. Finer overload shows in the waiting times.
"""

FALLS_BEHIND_BY = 0.02
"""Growth of the waiting time, in seconds per second of load, from which a server counts as overloaded; plus noise."""

FAILED_SHARE_AT_MOST = 0.01

TARGET_UTILISATION = 0.8
"""Share of the knee at which to run; 0.8 leaves room for 25 % growth while a new replica starts."""


class Zone(StrEnum):
    RISING = "rising"
    """Throughput follows the load."""
    KNEE = "knee"
    """Between the highest rate that was sustained and the lowest that was not."""
    PAST = "past"
    """Throughput has stopped rising, and latency has left its plateau."""


class Confidence(StrEnum):
    HIGH = "high"
    """Bracketed within the sweep's resolution, both sides measured at least twice, and nothing contradicts."""
    MEDIUM = "medium"
    """Bracketed, but more widely, or each side measured once."""
    LOW = "low"
    """Stages contradict one another, or the bracket is wider than a factor of 1.5."""


class CurvePoint(Value):
    """All stages of one rate taken together (their median)."""

    rate_per_s: Annotated[float, Field(gt=0)]
    output_tokens_per_s: float
    offered_output_tokens_per_s: float
    sustained: bool
    zone: Zone
    stages: Annotated[int, Field(ge=1)]
    agree: bool = True
    """Whether all stages of this rate gave the same verdict."""
    client_limited: bool = False


class Knee(Value):
    """The saturation point."""

    rate_per_s: float
    """Best estimate, between the other two."""
    lower_rate_per_s: float
    """Highest rate that was sustained, or the estimate where the throughput says less; 0 if none was."""
    upper_rate_per_s: float
    """Lowest rate that was not sustained."""
    output_tokens_per_s: float
    confidence: Confidence
    reason: str


class Curve(Value):
    """A load sweep, judged."""

    points: tuple[CurvePoint, ...]
    """By rising rate."""
    knee: Knee | None
    """None if it was not reached; then `not_reached` says what is known."""
    not_reached: str = ""

    @property
    def highest_sustained_per_s(self) -> float:
        """0 if no stage was sustained."""
        return max((point.rate_per_s for point in self.points if point.sustained), default=0.0)

    @property
    def max_output_tokens_per_s(self) -> float:
        """At the knee, or the most that was measured where there is none."""
        if self.knee is not None:
            return self.knee.output_tokens_per_s
        return max((point.output_tokens_per_s for point in self.points), default=0.0)


def is_sustained(stage: Stage, plateau_ttft_s: float | None) -> bool:
    """Whether the server kept up with the stage; `plateau_ttft_s` is the median TTFT without load."""
    if _lost_share(stage) > FAILED_SHARE_AT_MOST or stage.follows < least_follows(stage):
        return False
    # With n random arrivals the backlog near the end varies by about 0.25/√n of the stage; 0.4 is 1.6 times that.
    tolerance = FALLS_BEHIND_BY + 0.4 / math.sqrt(max(1, stage.requests))
    return _falls_behind_by(stage, plateau_ttft_s) < tolerance


def _lost_share(stage: Stage) -> float:
    """Requests without a complete answer / all, less those that arrived late in the stage and were merely cut off."""
    return stage.failed_share - stage.unfinished_late / max(1, stage.requests)


def least_follows(stage: Stage) -> float:
    """`FOLLOWS_AT_LEAST`, less the noise of few answers: one more or less is no overload."""
    return FOLLOWS_AT_LEAST - 2 / math.sqrt(max(1, stage.requests))


def _falls_behind_by(stage: Stage, plateau_ttft_s: float | None) -> float:
    """Growth of the waiting time in seconds per second of load."""
    if stage.late_ttft_s is None or plateau_ttft_s is None:
        return 0.0
    # The late requests arrived, on average, after nine tenths of the stage.
    return (stage.late_ttft_s - plateau_ttft_s) / (0.9 * stage.duration_s)


def plateau_ttft_s(stages: Sequence[Stage]) -> float | None:
    """Median TTFT at the lowest rate."""
    lowest = min(stages, key=lambda stage: stage.rate_per_s, default=None)
    return lowest.ttft_s.p50 if lowest is not None and lowest.ttft_s is not None else None


def bracket(stages: Sequence[Stage]) -> tuple[float, float | None]:
    """Between which rates the knee lies by the verdicts on the stages alone: what a search narrows down.

    The highest sustained rate (0 if there is none) and the lowest lasting overload above it (None if there is none).
    """
    return _bracket(_judged(stages))


def build_curve(stages: Sequence[Stage], *, resolution: float = 0.1) -> Curve:
    """Judge a sweep. `resolution` is the relative width of the bracket that the sweep aimed at."""
    judged = _judged(stages)
    lower, upper = _bracket(judged)
    points = tuple(point.model_copy(update={"zone": _zone(point.rate_per_s, lower, upper)}) for point in judged)
    if not points:
        return Curve(points=(), knee=None, not_reached="no stage was measured")
    if upper is None:
        return Curve(points=points, knee=None, not_reached=_why_not_reached(points, lower))
    if lower <= 0 and saturation_rate(stages, lower) is None:
        why = f"even at {points[0].rate_per_s:.3g} requests/s, the lowest rate, requests failed"
        return Curve(points=points, knee=None, not_reached=why)
    return Curve(points=points, knee=_knee(points, lower, upper, stages, resolution))


def _judged(stages: Sequence[Stage]) -> list[CurvePoint]:
    """By rising rate; their zones are not known yet."""
    plateau = plateau_ttft_s(stages)
    by_rate: dict[float, list[Stage]] = {}
    for stage in stages:
        by_rate.setdefault(round(stage.rate_per_s, 6), []).append(stage)
    return [_judge(rate, by_rate[rate], plateau) for rate in sorted(by_rate)]


def _judge(rate: float, stages: Sequence[Stage], plateau: float | None) -> CurvePoint:
    verdicts = [is_sustained(stage, plateau) for stage in stages]
    tokens = [stage.output_tokens_per_s for stage in stages]
    return CurvePoint(
        rate_per_s=rate,
        output_tokens_per_s=_median(tokens),
        offered_output_tokens_per_s=stages[0].offered_output_tokens_per_s,
        # A tie counts as sustained: it takes a majority to call a server overloaded.
        sustained=2 * sum(verdicts) >= len(verdicts),
        zone=Zone.RISING,
        stages=len(stages),
        agree=len(set(verdicts)) == 1,
        client_limited=any(stage.client and stage.client.limited_by for stage in stages),
    )


def _bracket(points: Sequence[CurvePoint]) -> tuple[float, float | None]:
    """The highest sustained rate below the first lasting overload, and that overload (None: there is none).

    A single overloaded rate below more sustained rates than overloaded ones is noise. Stages that the client limited
    prove nothing about the server's limit.
    """
    usable = [point for point in points if point.sustained or not point.client_limited]
    best_split, fewest_contradictions = len(usable), math.inf
    for split in range(len(usable), -1, -1):  # from the right: on a tie, the higher knee
        contradictions = sum(not p.sustained for p in usable[:split]) + sum(p.sustained for p in usable[split:])
        if contradictions < fewest_contradictions:
            best_split, fewest_contradictions = split, contradictions
    lower = max((point.rate_per_s for point in usable[:best_split] if point.sustained), default=0.0)
    upper = min((point.rate_per_s for point in usable[best_split:] if not point.sustained), default=None)
    return lower, upper


def _zone(rate: float, lower: float, upper: float | None) -> Zone:
    if upper is None or rate < lower:
        return Zone.RISING
    return Zone.KNEE if rate <= lower or rate < upper else Zone.PAST


def _why_not_reached(points: Sequence[CurvePoint], lower: float) -> str:
    limited = [point.rate_per_s for point in points if point.client_limited]
    if limited:
        return (
            f"the knee is above {lower:.3g} requests/s: from {min(limited):.3g} requests/s the load generator itself"
            " was the limit. Use the in-cluster engine (inference-perf), or a machine with more free CPU."
        )
    doubtful = [f"{point.rate_per_s:.3g}" for point in points if not point.agree]
    if doubtful:
        return (
            f"the stages at {', '.join(doubtful)} requests/s contradict one another, so the knee is near and not found."
            " Raise max_stages or stage_duration_s."
        )
    return f"the knee is above {lower:.3g} requests/s, the highest rate that was offered and sustained."


def saturation_rate(stages: Sequence[Stage], lower: float) -> float | None:
    """Requests/s that the server's highest throughput stands for; None without a saturated stage.

    While all its slots are taken, a server emits tokens at a rate that hardly depends on luck, so this is the better
    estimate of the knee. The stages at `lower`, the highest sustained rate, count too: an engine that collapses
    produces less under overload than there.
    """
    plateau = plateau_ttft_s(stages)
    # Refusals, errors and a slow client are not the throughput of a saturated engine.
    working = [s for s in stages if s.error_share <= FAILED_SHARE_AT_MOST and not (s.client and s.client.limited_by)]
    saturated = [s.rate_per_s * s.follows for s in working if s.rate_per_s > lower and not is_sustained(s, plateau)]
    if not saturated:
        return None
    beside = [s.rate_per_s * min(1.0, s.follows) for s in working if math.isclose(s.rate_per_s, lower, rel_tol=1e-5)]
    return max(*saturated, _median(beside) if beside else 0.0)


def _median(values: Sequence[float]) -> float:
    """The upper one of two."""
    return sorted(values)[len(values) // 2]


def _knee(points: Sequence[CurvePoint], lower: float, upper: float, stages: Sequence[Stage], resolution: float) -> Knee:
    estimate = saturation_rate(stages, lower)
    rate = min(estimate, upper) if estimate is not None else math.sqrt(lower * upper)
    confidence, reason = _confidence(points, lower, upper, rate, resolution)
    tokens_per_request = stages[0].offered_output_tokens_per_s / stages[0].rate_per_s
    return Knee(
        rate_per_s=rate,
        # A slight overload hides in a short stage's noise, and not in the throughput, which is within 2 % of the truth
        # where the verdict is 5 to 11 % above it (docs/benchmarks/verification.md): where they differ, it decides.
        lower_rate_per_s=min(lower, rate),
        upper_rate_per_s=upper,
        output_tokens_per_s=rate * tokens_per_request,
        confidence=confidence,
        reason=reason,
    )


def _confidence(
    points: Sequence[CurvePoint], lower: float, upper: float, rate: float, resolution: float
) -> tuple[Confidence, str]:
    if not lower:
        return Confidence.LOW, f"even the lowest rate, {upper:.3g} requests/s, overloads the server"
    width = upper / lower
    repeated = all(point.stages >= 2 for point in points if point.rate_per_s in (lower, upper))
    contradicted = any(p.sustained != (p.rate_per_s <= lower) or not p.agree for p in points if not p.client_limited)
    if width > 1.5:
        return Confidence.LOW, f"the bracket is a factor of {width:.2g} wide"
    if contradicted and not repeated:
        return Confidence.LOW, "stages contradict one another"
    if rate < lower / (1 + resolution):
        return Confidence.MEDIUM, f"{lower:.3g} requests/s seemed to be sustained, but the throughput says less"
    if not repeated:
        return Confidence.MEDIUM, "each side was measured once"
    if width > 1 + 1.5 * resolution:
        return Confidence.MEDIUM, f"the bracket is {width - 1:.0%} wide"
    return Confidence.HIGH, f"both sides were repeated, {width - 1:.0%} apart"


def interpolate(stages: Sequence[Stage], rate_per_s: float, metric: LatencyMetric, percentile: Percentile) -> float:
    """A latency in seconds at a rate between measured ones (linear), flat beyond the ends; NaN without stages."""
    pairs = _pairs(stages, metric, percentile)
    if not pairs:
        return math.nan
    if rate_per_s <= pairs[0][0]:
        return pairs[0][1]
    for (low, at_low), (high, at_high) in pairwise(pairs):
        if rate_per_s <= high:
            return at_low + (at_high - at_low) * (rate_per_s - low) / (high - low)
    return pairs[-1][1]


def highest_rate_within(stages: Sequence[Stage], limits: Sequence[LatencyLimit], *, resolution: float = 0.1) -> float:
    """The highest rate that is sustained and meets every limit; 0 if not even the lowest measured rate does.

    Linear between stages; from the first stage that misses a limit on, all higher rates are ruled out.
    """
    curve = build_curve(stages, resolution=resolution)
    highest = curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s
    for limit in limits:
        highest = min(highest, _crossing(_pairs(stages, limit.metric, limit.percentile), limit.limit_s))
    return highest


def _pairs(stages: Sequence[Stage], metric: LatencyMetric, percentile: Percentile) -> list[tuple[float, float]]:
    """(rate, latency) by rising rate, the median of the stages of each rate."""
    values: dict[float, list[float]] = {}
    for stage in stages:
        value = stage.latency_s(metric, percentile)
        if value is not None:
            values.setdefault(round(stage.rate_per_s, 6), []).append(value)
    return [(rate, _median(values[rate])) for rate in sorted(values)]


def _crossing(pairs: Sequence[tuple[float, float]], limit: float) -> float:
    """Where the line through `pairs` first exceeds `limit`; 0 if it begins above, inf if it never does."""
    if not pairs or pairs[0][1] > limit:
        return 0.0
    for (low, at_low), (high, at_high) in pairwise(pairs):
        if at_high > limit:
            return low + (high - low) * (limit - at_low) / (at_high - at_low)
    return math.inf


def operating_rate(
    stages: Sequence[Stage], limits: Sequence[LatencyLimit] = (), *, utilisation: float = TARGET_UTILISATION
) -> float:
    """The rate at which one replica should run: `utilisation` of the knee, and within the limits."""
    curve = build_curve(stages)
    limit = utilisation * (curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s)
    return min(limit, highest_rate_within(stages, limits)) if limits else limit


def headroom(stages: Sequence[Stage], rate_per_s: float) -> float:
    """Share of the knee that is free at a rate; negative past the knee. A knee not reached counts as the last rate."""
    curve = build_curve(stages)
    limit = curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s
    return 1 - rate_per_s / limit if limit else -math.inf


def replicas_for(
    demand_per_s: float,
    stages: Sequence[Stage],
    limits: Sequence[LatencyLimit] = (),
    *,
    utilisation: float = TARGET_UTILISATION,
) -> int | None:
    """Replicas for a demand in requests/s, each at its operating rate; None if one replica cannot meet the limits."""
    each = operating_rate(stages, limits, utilisation=utilisation)
    return max(1, math.ceil(demand_per_s / each - 1e-9)) if each > 0 else None


def _linear(pairs: Sequence[tuple[float, float]], x: float) -> float:
    for (low, at_low), (high, at_high) in pairwise(pairs):
        if low <= x <= high and high > low:
            return at_low + (at_high - at_low) * (x - low) / (high - low)
    return pairs[-1][1]
