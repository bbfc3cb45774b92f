"""Regression over time: does a server get slower from measurement to measurement, or is that the noise?

The slope is that of Theil and Sen, the median of the slopes between all pairs: one odd measurement does not move it.
Its 95 % interval is Sen's: the slopes at the ranks that Kendall's S leaves open (P. K. Sen, "Estimates of the
Regression Coefficient Based on Kendall's Tau", JASA 63, 1968). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from itertools import combinations

from rollout.benchmark import BenchmarkReport
from rollout.curve import interpolate, operating_rate
from rollout.history import CurveRecord
from rollout.stage import LatencyMetric, Percentile
from rollout.values import Value

FEWEST = 5
"""Four measurements that rise by chance do so in one of twelve cases: no interval at 95 % excludes anything."""

NORMAL_95 = 1.96


class Direction(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    STEADY = "steady"
    """No trend that the noise would not explain."""
    UNKNOWN = "unknown"
    """Fewer than `FEWEST` measurements."""


class Trend(Value):
    """One figure over all measurements; changes are over the whole time, as a share of the median value."""

    figure: str
    unit: str
    first: float
    last: float
    change: float
    """Theil-Sen slope times the time between the first and the last measurement."""
    lowest: float
    highest: float
    """Between these the change lies with 95 % confidence."""
    direction: Direction


def trends(records: Sequence[CurveRecord]) -> tuple[Trend, ...]:
    """Knee, throughput and latencies of comparable curves (equal workload, accelerator and model), by their dates.

    Latencies are read at one rate for all: the lowest operating rate among them, which every curve has reached.
    """
    reports = sorted((record.report for record in records), key=lambda report: report.started_at)
    if not reports:
        return ()
    rate = min(operating_rate(report.stages) for report in reports)
    figures: list[tuple[str, str, bool, Callable[[BenchmarkReport], float]]] = [
        ("knee", "requests/s", True, _knee),
        ("output tokens/s at saturation", "tokens/s", True, _saturated),
    ]
    for metric in (LatencyMetric.TTFT, LatencyMetric.ITL, LatencyMetric.NTPOT):
        figures.append((f"{metric.value.upper()} p50 at {rate:.3g} requests/s", "ms", False, _latency(metric, rate)))
    days = [report.started_at.timestamp() / 86400 for report in reports]
    found = []
    for figure, unit, higher_is_better, value_of in figures:
        values = [value_of(report) for report in reports]
        if not any(math.isnan(value) for value in values):
            found.append(_trend(figure, unit, days, values, higher_is_better=higher_is_better))
    return tuple(found)


def theil_sen(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """(slope, lower and upper end of its 95 % interval); the interval is infinite where nothing can be told."""
    slopes = sorted((y[j] - y[i]) / (x[j] - x[i]) for i, j in combinations(range(len(x)), 2) if x[j] != x[i])
    if not slopes:
        return 0.0, -math.inf, math.inf
    middle = len(slopes) // 2
    slope = slopes[middle] if len(slopes) % 2 else (slopes[middle - 1] + slopes[middle]) / 2
    n = len(x)
    reach = NORMAL_95 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    # Sen's rank, rounded outwards; of five measurements it is the first (0.9993).
    outermost = max(0, math.floor((len(slopes) - reach) / 2 + 0.001) - 1)
    return slope, slopes[outermost], slopes[-1 - outermost]


def _trend(figure: str, unit: str, days: Sequence[float], values: Sequence[float], *, higher_is_better: bool) -> Trend:
    scale = sorted(values)[len(values) // 2]
    span = days[-1] - days[0]
    slope, low, high = theil_sen(days, values)
    change, lowest, highest = (each * span / scale if scale else 0.0 for each in (slope, low, high))
    if len(values) < FEWEST:
        direction = Direction.UNKNOWN
    elif lowest > 0 or highest < 0:
        direction = Direction.BETTER if (change > 0) is higher_is_better else Direction.WORSE
    else:
        direction = Direction.STEADY
    return Trend(
        figure=figure,
        unit=unit,
        first=values[0],
        last=values[-1],
        change=change,
        lowest=lowest,
        highest=highest,
        direction=direction,
    )


def _knee(report: BenchmarkReport) -> float:
    """NaN where it was not reached: a lower bound that falls with the load that was offered is no trend."""
    return report.curve.knee.rate_per_s if report.curve.knee else math.nan


def _saturated(report: BenchmarkReport) -> float:
    return report.curve.knee.output_tokens_per_s if report.curve.knee else math.nan


def _latency(metric: LatencyMetric, rate: float) -> Callable[[BenchmarkReport], float]:
    return lambda report: interpolate(report.stages, rate, metric, Percentile.P50) * 1e3
