"""What a curve answers, of servers whose truth is known; and the page that shows it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from rollout.answers import Answers, answers_of
from rollout.benchmark import BenchmarkReport, BenchmarkSpec, Environment, benchmark_report
from rollout.curve import Confidence
from rollout.objectives import Objectives
from rollout.show import benchmark_markdown
from rollout.stage import ClientSide, LatencyLimit, LatencyMetric, Percentile, Percentiles, ServerSide
from tests.rollout.curves import QueueServer

SERVER = QueueServer(10)


def sweep(*rates: float) -> BenchmarkReport:
    stages = [SERVER.stage(rate) for rate in rates]
    now = datetime(2026, 11, 27, tzinfo=UTC)
    spec = BenchmarkSpec(rates_per_s=rates)
    return benchmark_report(spec, Environment(model="m"), stages, started_at=now, duration_s=60.0)


def within(percentile: Percentile, limit_s: float) -> LatencyLimit:
    return LatencyLimit(metric=LatencyMetric.TTFT, percentile=percentile, limit_s=limit_s)


def rows(answers: Answers) -> dict[str, str]:
    return dict(answers.rows())


def test_a_saturated_sweep_answers_everything() -> None:
    # At 1/s one other request is waited for a ten-thousandth of the time, at 9.7/s for 89 ms.
    objectives = Objectives(latencies=(within(Percentile.P50, 0.1),), demand_rate_per_s=40)
    answers = answers_of(sweep(1, 5, 9.7, 10.8), objectives)
    assert answers.knee is not None
    assert answers.knee.rate_per_s == pytest.approx(10)
    assert answers.within_objectives_per_s == pytest.approx(7.5, rel=0.001)
    assert answers.operating_rate_per_s == answers.within_objectives_per_s  # below 80 % of the knee, which is 8
    assert answers.replicas_for_demand == 6
    assert answers.headroom == pytest.approx(-3)
    found = rows(answers)
    assert found["knee"].startswith("10 requests/s (9.7–10.8), 1000 output tokens/s; confidence medium")
    assert found["highest rate within the objectives"] == "7.5 requests/s"
    assert found["headroom at 40 requests/s"] == "none: 300% past the knee"
    assert found["replicas for 40 requests/s"] == "6"
    assert found["autoscaler threshold"].endswith("× `vllm:num_requests_running` per replica")


def test_without_objectives_the_knee_alone_decides() -> None:
    answers = answers_of(sweep(1, 5, 9.7, 10.8))
    assert answers.within_objectives_per_s is None
    assert answers.operating_rate_per_s == pytest.approx(8)
    assert rows(answers)["rate to run at"] == "8 requests/s: at most 80% of the knee"
    assert rows(answers)["headroom at 8 requests/s"] == "20% of the knee is free"
    assert not any(question.startswith("replicas") for question in rows(answers))


def test_a_curve_of_several_replicas_is_shared_among_them() -> None:
    one = answers_of(sweep(1, 5, 9.7, 10.8), Objectives(demand_rate_per_s=40))
    two = answers_of(sweep(1, 5, 9.7, 10.8), Objectives(demand_rate_per_s=40), replicas=2)
    assert (one.replicas_for_demand, two.replicas_for_demand) == (5, 10)
    assert one.threshold is not None
    assert two.threshold is not None
    assert two.threshold in (one.threshold // 2, one.threshold // 2 + 1)


def test_limits_that_nothing_meets_have_no_number_of_replicas() -> None:
    objectives = Objectives(latencies=(within(Percentile.P50, 0.001),), demand_rate_per_s=1)
    answers = answers_of(sweep(1, 5, 9.7, 10.8), objectives)
    assert answers.replicas_for_demand is None
    assert answers.threshold is None
    found = rows(answers)
    assert found["highest rate within the objectives"] == "none: even the lowest measured rate misses a limit"
    assert found["replicas for 1 requests/s"] == "no number meets the limits"
    assert found["autoscaler threshold"].startswith("none: TTFT 1 ms cannot be held")


def test_a_knee_that_was_not_reached_is_a_lower_bound() -> None:
    answers = answers_of(sweep(1, 5))
    assert answers.knee is None
    assert rows(answers)["knee"].startswith("the knee is above 5 requests/s")
    assert rows(answers)["rate to run at"] == "4 requests/s: at most 80% of the highest sustained rate"


def test_the_answers_survive_being_stored() -> None:
    answers = answers_of(sweep(1, 5, 9.7, 10.8), Objectives(demand_rate_per_s=3))
    assert Answers.model_validate(answers.model_dump(mode="json")) == answers
    assert answers.knee is not None
    assert answers.knee.confidence is Confidence.MEDIUM


def test_the_page_shows_latencies_failures_schedule_and_the_servers_side() -> None:
    report = sweep(1, 5)
    delays = Percentiles(count=9, mean=0.001, p50=0.001, p90=0.002, p95=0.002, p99=0.0035, maximum=0.004)
    server = ServerSide(
        samples=9,
        running_mean=3.25,
        running_max=7,
        waiting_mean=0.5,
        waiting_max=2,
        kv_cache_usage_max=0.42,
        preemptions=1,
        prefix_cache_hit_ratio=0.05,
    )
    last = report.stages[-1].model_copy(
        update={
            "failures": {"timeout": 2, "overloaded": 1},
            "goodput_share": 0.93,
            "server": server,
            "client": ClientSide(schedule_delay_s=delays, busy_share=0.1),
        }
    )
    report = report.model_copy(update={"stages": (report.stages[0], last)})
    page = benchmark_markdown(report, answers_of(report))
    assert "| 5 | 150/150 | 1 overloaded, 2 timeout | 93% |" in page
    assert "| 1.0 / 3.5 |" in page
    assert "| 5 | 3.2 / 7 | 0.5 / 2 | 42% | 1 | 5% |" in page
    assert "| requests/s | TTFT | ITL | TPOT | NTPOT | end to end |" in page
    assert "| knee |" in page
    widest = max(line.count("|") for line in page.splitlines())
    assert widest <= 9
