"""A slow decline is found, and noise is not taken for one."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from rollout.benchmark import BenchmarkSpec, Environment, benchmark_report
from rollout.history import CurveRecord
from rollout.trend import FEWEST, Direction, Trend, theil_sen, trends
from tests.rollout.curves import QueueServer

START = datetime(2026, 11, 1, 3, tzinfo=UTC)


def nightly(capacities: list[float], *, seed: int = 0) -> list[CurveRecord]:
    """A curve a night; every figure of a night's sweep varies by 2 %."""
    spec = BenchmarkSpec(rates_per_s=(1, 4, 7, 9, 10, 12, 20), stage_duration_s=30)
    records = []
    for night, capacity in enumerate(capacities):
        stages = QueueServer(capacity, noise=0.02).sweep(spec, seed=seed + night)
        at = START + timedelta(days=night)
        report = benchmark_report(spec, Environment(model="m"), stages, started_at=at, duration_s=60)
        records.append(CurveRecord(report=report, good=True))
    return records


def by_figure(records: list[CurveRecord]) -> dict[str, Trend]:
    return {trend.figure: trend for trend in trends(records)}


def test_the_slope_is_the_median_of_all_pairs_and_one_odd_value_does_not_move_it() -> None:
    x = [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    exact = theil_sen(x, [2 * each + 1 for each in x])
    assert exact == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    spoilt = [2 * each + 1 for each in x]
    spoilt[4] = 500
    slope, low, high = theil_sen(x, spoilt)
    assert slope == pytest.approx(2)
    assert low <= 2 <= high


def test_the_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    source = random.Random(7)
    x = [float(night) for night in range(12)]
    hits = 0
    for _ in range(400):
        _, low, high = theil_sen(x, [0.5 * each + source.gauss(0, 1) for each in x])
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / 400 <= 0.99


def test_a_server_that_loses_two_percent_a_night_is_found() -> None:
    found = by_figure(nightly([10 * 0.98**night for night in range(10)]))
    throughput = found["output tokens/s at saturation"]
    assert throughput.direction is Direction.WORSE
    assert throughput.change == pytest.approx(-0.18, abs=0.06)
    assert throughput.lowest <= throughput.change <= throughput.highest < 0


def test_a_steady_server_is_called_so() -> None:
    worse = 0
    for seed in range(0, 2000, 100):
        found = by_figure(nightly([10.0] * 10, seed=seed))
        worse += found["output tokens/s at saturation"].direction is not Direction.STEADY
    assert worse <= 3  # one in twenty is what 95 % means


def test_a_faster_server_is_better_also_where_less_is_better() -> None:
    records = nightly([10.0] * FEWEST)
    quicker = []
    for number, record in enumerate(records):
        stages = [
            stage.model_copy(update={"itl_s": stage.itl_s.model_copy(update={"p50": stage.itl_s.p50 * 0.9**number})})
            for stage in record.report.stages
            if stage.itl_s is not None
        ]
        quicker.append(record.model_copy(update={"report": record.report.model_copy(update={"stages": tuple(stages)})}))
    figure = next(trend for trend in trends(quicker) if trend.figure.startswith("ITL"))
    assert figure.direction is Direction.BETTER
    assert figure.change < 0


def test_a_knee_that_was_never_reached_has_no_trend() -> None:
    records = []
    for night, highest in enumerate((8.0, 6.0, 5.0, 4.0, 3.0, 2.0)):
        spec = BenchmarkSpec(rates_per_s=(1, highest), stage_duration_s=30)
        stages = QueueServer(1000).sweep(spec, seed=night)
        at = START + timedelta(days=night)
        report = benchmark_report(spec, Environment(model="m"), stages, started_at=at, duration_s=60)
        records.append(CurveRecord(report=report, good=True))
    assert not {"knee", "output tokens/s at saturation"} & set(by_figure(records))


def test_too_few_measurements_say_nothing() -> None:
    found = by_figure(nightly([10.0 - night for night in range(FEWEST - 1)]))
    assert {trend.direction for trend in found.values()} == {Direction.UNKNOWN}
    assert trends([]) == ()
