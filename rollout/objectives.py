"""What a rollout must reach, and the verdict: objective, limit, measured, margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from statistics import median
from typing import Annotated

from pydantic import ConfigDict, Field

from rollout.cost import TokenCost
from rollout.curve import Curve, build_curve, interpolate, operating_rate
from rollout.stage import LatencyLimit, LatencyMetric, Percentile, RequestLimits, Stage
from rollout.values import Value


class NoWorse(Value):
    """The last good rollout is the yardstick."""

    by_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Tolerated loss; 0.1 = 10 %."""


class Objectives(Value):
    """Limits on what was measured; None and empty mean no limit."""

    model_config = ConfigDict(allow_inf_nan=False)

    at_rate_per_s: Annotated[float, Field(gt=0)] | None = None
    """The rate at which latencies, goodput and errors are judged; None: 80 % of the measured knee."""
    demand_rate_per_s: Annotated[float, Field(gt=0)] | None = None
    """Requests/s that all replicas together are to serve. It gates nothing: the curve's answers say how many replicas
    it takes, and how much of the knee it leaves free."""
    latencies: tuple[LatencyLimit, ...] = ()
    min_goodput_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all requests that meet every latency limit, each taken as a limit on single requests."""
    max_failed_share: Annotated[float, Field(ge=0, lt=1)] | None = 0.01
    """0.01: 99 % of all requests answered."""
    min_knee_rate_per_s: Annotated[float, Field(gt=0)] | None = None
    min_output_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """At saturation."""
    max_usd_per_million_output_tokens: Annotated[float, Field(gt=0)] | None = None
    smoke_checks: tuple[str, ...] = ()
    """Smoke checks that must have passed; one that was not applicable did not."""
    no_worse: NoWorse | None = None
    """Compare with the last good rollout of the same workload."""

    @property
    def request_limits(self) -> RequestLimits:
        """The limits as they apply to single requests, for goodput."""
        tightest = dict.fromkeys(LatencyMetric, math.inf)
        for limit in self.latencies:
            tightest[limit.metric] = min(tightest[limit.metric], limit.limit_s)
        return RequestLimits(
            ttft_s=tightest[LatencyMetric.TTFT],
            itl_s=min(tightest[LatencyMetric.ITL], tightest[LatencyMetric.TPOT]),
            ntpot_s=tightest[LatencyMetric.NTPOT],
            e2e_s=tightest[LatencyMetric.E2E],
        )


class Outcome(StrEnum):
    MET = "met"
    MISSED = "missed"
    UNKNOWN = "unknown"
    """Not measured, so not proven: counts as missed."""


class ObjectiveResult(Value):
    """One row of the verdict."""

    objective: str
    limit: str
    measured: str
    margin: str
    """How much better (+) or worse (-) than the limit, as a share of it; in the limit's unit where that is 0."""
    outcome: Outcome
    reason: str = ""


class Verdict(Value):
    rows: tuple[ObjectiveResult, ...]
    at_rate_per_s: float
    """Where latencies were judged."""
    cost: TokenCost | None = None
    """At the knee, and what it was computed from."""

    @property
    def met(self) -> bool:
        return all(row.outcome is Outcome.MET for row in self.rows)

    @property
    def misses(self) -> tuple[ObjectiveResult, ...]:
        return tuple(row for row in self.rows if row.outcome is not Outcome.MET)

    def summary(self) -> str:
        """One line for people and for the error of a failed verification."""
        if self.met:
            return f"all {len(self.rows)} objectives are met at {self.at_rate_per_s:.3g} requests/s"
        return "; ".join(row.reason or f"{row.objective} is {row.measured}, limit {row.limit}" for row in self.misses)


def judge(
    objectives: Objectives,
    stages: Sequence[Stage],
    *,
    cost: TokenCost | None = None,
    passed_checks: frozenset[str] = frozenset(),
    baseline: Sequence[Stage] = (),
) -> Verdict:
    """Hold the measured stages against the objectives.

    `passed_checks` are the names of the smoke checks that passed; `baseline` the stages of the last good rollout with
    the same workload (none: nothing to compare with, and `no_worse` says so without failing).
    """
    rate = objectives.at_rate_per_s or operating_rate(stages)
    rows = [_latency_row(limit, stages, rate) for limit in objectives.latencies]
    curve = build_curve(stages)
    if objectives.max_failed_share is not None:
        rows.append(_failed_row(objectives.max_failed_share, stages, rate, curve))
    if objectives.min_goodput_share is not None:
        rows.append(_goodput_row(objectives.min_goodput_share, stages, rate))
    if objectives.min_knee_rate_per_s is not None:
        row = _at_least("knee", objectives.min_knee_rate_per_s, _knee_rate(curve), "requests/s")
        rows.append(_unless_unreached(row, curve))
    if objectives.min_output_tokens_per_s is not None:
        tokens = curve.max_output_tokens_per_s
        row = _at_least("output tokens/s", objectives.min_output_tokens_per_s, tokens, "tokens/s")
        rows.append(_unless_unreached(row, curve))
    if objectives.max_usd_per_million_output_tokens is not None:
        measured = cost.usd_per_million_output_tokens if cost else None
        rows.append(_at_most("cost", objectives.max_usd_per_million_output_tokens, measured, "USD/M output tokens"))
    rows += [_smoke_row(name, passed_checks) for name in objectives.smoke_checks]
    if objectives.no_worse is not None:
        rows += compare_with_baseline(stages, baseline, objectives.no_worse)
    return Verdict(rows=tuple(rows), at_rate_per_s=rate, cost=cost)


def _latency_row(limit: LatencyLimit, stages: Sequence[Stage], rate: float) -> ObjectiveResult:
    measured = interpolate(stages, rate, limit.metric, limit.percentile)
    value = None if math.isnan(measured) else measured * 1e3
    having = [stage for stage in stages if stage.latency_s(limit.metric, limit.percentile) is not None]
    return _unless_unmeasured(_at_most(limit.name, limit.limit_s * 1e3, value, "ms"), having, rate)


def _unless_unmeasured(row: ObjectiveResult, stages: Sequence[Stage], rate: float) -> ObjectiveResult:
    """Beyond the highest rate at which a figure was measured it is anybody's guess."""
    if rate <= max((stage.rate_per_s for stage in stages), default=0.0) * 1.001:
        return row
    reason = f"{row.objective}: nothing was measured at {rate:.3g} requests/s"
    return row.model_copy(update={"outcome": Outcome.UNKNOWN, "reason": reason})


def _failed_row(limit: float, stages: Sequence[Stage], rate: float, curve: Curve) -> ObjectiveResult:
    """The worst stage up to the rate; past the knee, where failures begin at once, also the next one above it."""
    upto = rate
    if curve.knee is not None and rate > curve.knee.rate_per_s:
        upto = min((stage.rate_per_s for stage in stages if stage.rate_per_s >= rate), default=rate)
    below = [stage for stage in stages if stage.rate_per_s <= upto * 1.001] or list(stages)
    worst = max((stage.failed_share for stage in below), default=None)
    row = _at_most("failed requests", limit * 100, None if worst is None else worst * 100, "%")
    if row.outcome is Outcome.MET:
        return _unless_unmeasured(row, stages, rate)
    detail = next((stage.first_failure for stage in below if stage.first_failure), "")
    return row.model_copy(update={"reason": f"{row.reason}: {detail}"}) if row.reason and detail else row


def _goodput_row(limit: float, stages: Sequence[Stage], rate: float) -> ObjectiveResult:
    """The median of the stages at the measured rate that is nearest."""
    shares: dict[float, list[float]] = {}
    for stage in stages:
        if stage.goodput_share is not None:
            shares.setdefault(stage.rate_per_s, []).append(stage.goodput_share)
    nearest = min(shares, key=lambda measured: abs(measured - rate), default=None)
    share = None if nearest is None else median(shares[nearest])
    row = _at_least("goodput", limit * 100, None if share is None else share * 100, "%")
    return row if share is None else _unless_unmeasured(row, stages, rate)


def _smoke_row(name: str, passed: frozenset[str]) -> ObjectiveResult:
    ok = name in passed
    return ObjectiveResult(
        objective=f"smoke: {name}",
        limit="passed",
        measured="passed" if ok else "not passed",
        margin="",
        outcome=Outcome.MET if ok else Outcome.MISSED,
        reason="" if ok else f"the smoke check {name!r} did not pass",
    )


def _at_most(objective: str, limit: float, measured: float | None, unit: str) -> ObjectiveResult:
    return _row(objective, limit, measured, unit, sign=-1)


def _at_least(objective: str, limit: float, measured: float | None, unit: str) -> ObjectiveResult:
    return _row(objective, limit, measured, unit, sign=+1)


def _row(objective: str, limit: float, measured: float | None, unit: str, *, sign: int) -> ObjectiveResult:
    bound = f"{'≥' if sign > 0 else '≤'} {limit:.4g} {unit}"
    if measured is None:
        reason = f"{objective} was not measured"
        return ObjectiveResult(
            objective=objective, limit=bound, measured="–", margin="", outcome=Outcome.UNKNOWN, reason=reason
        )
    better_by = sign * (measured - limit)
    met = better_by >= 0
    # A limit of 0 has no shares: there the margin is in the figure's own unit.
    margin = f"{better_by / limit:+.0%}" if limit else f"{better_by:+.4g} {unit}"
    miss = f"{abs(better_by) / limit:.0%} worse than {limit:.4g} {unit}" if limit else f"and the limit is 0 {unit}"
    return ObjectiveResult(
        objective=objective,
        limit=bound,
        measured=f"{measured:.4g} {unit}",
        margin=margin,
        outcome=Outcome.MET if met else Outcome.MISSED,
        reason="" if met else f"{objective} is {measured:.4g} {unit}, {miss}",
    )


def _knee_rate(curve: Curve) -> float:
    # A knee above the highest rate is at least that rate.
    return curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s


def _unless_unreached(row: ObjectiveResult, curve: Curve) -> ObjectiveResult:
    """Without a knee the figure is a lower bound: it can meet a limit, and cannot miss one."""
    if curve.knee is not None or row.outcome is Outcome.MET:
        return row
    reason = f"{row.objective}: nothing is proven about {row.limit}, {curve.not_reached}"
    return row.model_copy(
        update={"measured": f"≥ {row.measured}", "margin": "", "outcome": Outcome.UNKNOWN, "reason": reason}
    )


def compare_with_baseline(
    stages: Sequence[Stage], baseline: Sequence[Stage], no_worse: NoWorse
) -> list[ObjectiveResult]:
    """Knee, and median TTFT and ITL at 80 % of the baseline's knee, against the baseline's own.

    A loss counts only beyond `by_share` plus what two measurements of the same server differ by: for the knee, half
    the width of both brackets; for a latency, twice the standard error of the difference of two medians.
    """
    if not baseline:
        row = ObjectiveResult(
            objective="no worse than the last good rollout",
            limit=f"-{no_worse.by_share:.0%}",
            measured="no earlier curve of this workload",
            margin="",
            outcome=Outcome.MET,
        )
        return [row]
    curve = build_curve(stages)
    before, now = _knee_rate(build_curve(baseline)), _knee_rate(curve)
    noise = (_bracket_share(baseline) + _bracket_share(stages)) / 2
    row = _no_worse_row("knee", before, now, "requests/s", no_worse.by_share + noise, sign=+1)
    rows = [_unless_unreached(row, curve)]
    rate = operating_rate(baseline)
    for metric in (LatencyMetric.TTFT, LatencyMetric.ITL):
        old = interpolate(baseline, rate, metric, Percentile.P50)
        new = interpolate(stages, rate, metric, Percentile.P50)
        name = f"{metric.value.upper()} p50 at {rate:.3g}/s"
        if math.isnan(old):
            continue
        if math.isnan(new):
            rows.append(_at_most(f"{name}, against the last good rollout", old * 1e3, None, "ms"))
            continue
        noise = 2 * math.hypot(_median_noise(baseline, rate, metric), _median_noise(stages, rate, metric))
        row = _no_worse_row(name, old * 1e3, new * 1e3, "ms", no_worse.by_share + noise, sign=-1)
        rows.append(_unless_unmeasured(row, stages, rate))
    return rows


def _no_worse_row(
    objective: str, before: float, now: float, unit: str, tolerance: float, *, sign: int
) -> ObjectiveResult:
    change = sign * (now - before) / before if before else 0.0
    met = change >= -tolerance
    return ObjectiveResult(
        objective=f"{objective}, against the last good rollout",
        limit=f"{before:.4g} {unit} -{tolerance:.0%} (noise included)",
        measured=f"{now:.4g} {unit}",
        margin=f"{change + tolerance:+.0%}",
        outcome=Outcome.MET if met else Outcome.MISSED,
        reason=""
        if met
        else f"{objective} fell from {before:.4g} to {now:.4g} {unit}"
        if sign > 0
        else f"{objective} rose from {before:.4g} to {now:.4g} {unit}",
    )


def _bracket_share(stages: Sequence[Stage]) -> float:
    knee = build_curve(stages).knee
    if knee is None or knee.lower_rate_per_s <= 0:
        return 0.0
    return (knee.upper_rate_per_s - knee.lower_rate_per_s) / knee.rate_per_s / 2


def _median_noise(stages: Sequence[Stage], rate: float, metric: LatencyMetric) -> float:
    """Relative standard error of the median in the stage nearest to `rate`.

    1.25·σ/√n for a normal distribution, with σ from the distance of the median to the 90th percentile (1.28·σ);
    requests, not tokens, count as independent.
    """
    stage = min(stages, key=lambda each: abs(each.rate_per_s - rate))
    p50, p90 = stage.latency_s(metric, Percentile.P50), stage.latency_s(metric, Percentile.P90)
    if not p50 or p90 is None or not stage.completed:
        return 0.0
    return 1.25 * (p90 - p50) / 1.28 / p50 / math.sqrt(stage.completed)
