from __future__ import annotations

import random

import pytest

from rollout.cost import Price, token_cost
from rollout.objectives import NoWorse, Objectives, Outcome, judge
from rollout.show import verdict_markdown
from rollout.stage import (
    ClientSide,
    FailureKind,
    LatencyLimit,
    LatencyMetric,
    Percentile,
    RequestLimits,
    RequestRecord,
    Stage,
    summarize,
)
from tests.rollout.curves import QueueServer, spread

RATES = (1, 2, 4, 8, 9.6, 10.8, 16)


def sweep(server: QueueServer, seed: int = 0) -> list[Stage]:
    source = random.Random(seed)
    return [server.stage(rate, source=source) for rate in RATES]


STAGES = sweep(QueueServer(10))


def ttft(limit_s: float, percentile: Percentile = Percentile.P90) -> LatencyLimit:
    return LatencyLimit(metric=LatencyMetric.TTFT, percentile=percentile, limit_s=limit_s)


def answered(at_s: float, failure: FailureKind | None = None) -> RequestRecord:
    """Two tokens within 20 ms, or nothing."""
    times = [] if failure else [at_s + 0.01, at_s + 0.02]
    return RequestRecord(
        scheduled_s=at_s,
        sent_s=at_s,
        planned_output_tokens=2,
        output_tokens=len(times),
        token_times_s=times,
        ended_s=times[-1] if times else at_s + 60,
        failure=failure,
    )


def good(rate: float, goodput: float = 1.0) -> Stage:
    stage = QueueServer(10).stage(rate)
    return stage.model_copy(update={"goodput_share": goodput})


def test_a_met_objective_states_limit_measured_and_margin() -> None:
    verdict = judge(Objectives(latencies=(ttft(0.5),), max_failed_share=None), STAGES)
    (row,) = verdict.rows
    assert verdict.met
    assert verdict.at_rate_per_s == pytest.approx(8)
    assert (row.objective, row.limit) == ("TTFT p90", "≤ 500 ms")
    assert row.measured.endswith(" ms")
    assert row.margin.startswith("+")
    assert verdict.summary() == "all 1 objectives are met at 8 requests/s"


def test_a_miss_says_by_how_much() -> None:
    verdict = judge(Objectives(latencies=(ttft(0.001),)), STAGES)
    assert not verdict.met
    assert [row.outcome for row in verdict.rows] == [Outcome.MISSED, Outcome.MET]
    assert "TTFT p90 is" in verdict.summary()
    assert "worse than 1 ms" in verdict.summary()


def test_what_was_not_measured_is_not_met() -> None:
    unmeasured_rate = judge(Objectives(at_rate_per_s=100, latencies=(ttft(10),)), STAGES)
    assert unmeasured_rate.rows[0].outcome is Outcome.UNKNOWN
    assert not unmeasured_rate.met
    without_stages = judge(Objectives(latencies=(ttft(10),)), [])
    assert {row.outcome for row in without_stages.rows} == {Outcome.UNKNOWN}


def test_no_figure_is_taken_from_a_rate_that_was_not_offered() -> None:
    verdict = judge(Objectives(at_rate_per_s=100, min_goodput_share=0.9), [good(1), good(2)])
    assert [row.outcome for row in verdict.rows] == [Outcome.UNKNOWN, Outcome.UNKNOWN]
    assert "failed requests: nothing was measured at 100 requests/s" in verdict.summary()


def test_a_rate_between_good_answers_and_none_at_all_is_a_miss() -> None:
    refused = summarize([answered(i / 16, FailureKind.OVERLOADED) for i in range(160)], duration_s=10)
    verdict = judge(Objectives(at_rate_per_s=15, latencies=(ttft(10),)), [*STAGES[:4], refused])
    assert [row.outcome for row in verdict.rows] == [Outcome.UNKNOWN, Outcome.MISSED]


def test_goodput_is_the_median_of_the_nearest_rates_stages() -> None:
    stages = [good(4, 0.5), good(4, 0.95), good(4, 0.96), good(1, 0.1)]
    (row,) = judge(Objectives(at_rate_per_s=3.9, max_failed_share=None, min_goodput_share=0.9), stages).rows
    assert (row.outcome, row.measured) == (Outcome.MET, "95 %")


def test_a_server_that_answers_nothing_meets_no_knee_and_is_worse_than_any() -> None:
    refused = summarize([answered(i / 32, FailureKind.REFUSED) for i in range(320)], duration_s=10)
    wanted = Objectives(min_knee_rate_per_s=10, max_failed_share=None, no_worse=NoWorse())
    verdict = judge(wanted, [refused], baseline=STAGES)
    assert not any(row.outcome is Outcome.MET for row in verdict.rows)
    assert any(row.objective.startswith("TTFT") for row in verdict.rows), "a latency that is missing is not left out"


def test_failed_requests_are_judged_up_to_the_rate_in_question() -> None:
    failing = STAGES[2].model_copy(update={"failures": {"timeout": 12}, "first_failure": "no answer"})
    past = STAGES[-1].model_copy(update={"failures": {"timeout": 400}})
    assert judge(Objectives(), [*STAGES[:-1], past]).met
    verdict = judge(Objectives(at_rate_per_s=8), [*STAGES[:2], failing, *STAGES[3:]])
    assert not verdict.met
    assert "no answer" in verdict.summary()


def test_knee_throughput_cost_and_smoke_checks_are_limits_too() -> None:
    price = Price(usd_per_gpu_hour=3.6, source="test")
    cost = token_cost(price, gpus=1, input_tokens_per_s=0, output_tokens_per_s=1000)
    objectives = Objectives(
        min_knee_rate_per_s=9,
        min_output_tokens_per_s=900,
        max_usd_per_million_output_tokens=1.5,
        smoke_checks=("chat", "tools"),
    )
    verdict = judge(objectives, STAGES, cost=cost, passed_checks=frozenset({"chat"}))
    outcomes = {row.objective: row.outcome for row in verdict.rows}
    page = verdict_markdown(verdict)
    assert "a million output tokens costs 1 USD and a million input tokens 0.25 USD, at 4 to 1" in page
    assert "1 × 3.60 USD per GPU and hour (test)" in page
    assert outcomes == {
        "failed requests": Outcome.MET,
        "knee": Outcome.MET,
        "output tokens/s": Outcome.MET,
        "cost": Outcome.MET,
        "smoke: chat": Outcome.MET,
        "smoke: tools": Outcome.MISSED,
    }
    assert not judge(Objectives(max_usd_per_million_output_tokens=0.5), STAGES, cost=cost).met
    assert not judge(Objectives(max_usd_per_million_output_tokens=0.5), STAGES).met


def test_goodput_is_the_share_of_good_requests_at_the_rate() -> None:
    stages = [s.model_copy(update={"goodput_share": 0.9}) for s in STAGES]
    assert judge(Objectives(min_goodput_share=0.89), stages).met
    assert not judge(Objectives(min_goodput_share=0.95), stages).met
    assert not judge(Objectives(min_goodput_share=0.5), STAGES).met


@pytest.mark.parametrize("every", [1, 2])
def test_a_failed_request_is_no_good_one(every: int) -> None:
    records = [answered(n * 0.1, FailureKind.SERVER_ERROR if n % every == 0 else None) for n in range(100)]
    stage = summarize(records, duration_s=10, limits=RequestLimits(ttft_s=1))
    verdict = judge(Objectives(at_rate_per_s=10, min_goodput_share=0.6, max_failed_share=None), [stage])
    (row,) = verdict.rows
    assert (row.outcome, row.measured) == (Outcome.MISSED, f"{100 - 100 // every:g} %")


def test_requests_that_hang_have_failed_and_are_not_good() -> None:
    records = [answered(n * 0.1, FailureKind.UNFINISHED if n % 10 == 0 else None) for n in range(100)]
    stage = summarize(records, duration_s=10, limits=RequestLimits(ttft_s=1))
    verdict = judge(Objectives(at_rate_per_s=10, min_goodput_share=0.95), [stage])
    assert [(row.objective, row.measured) for row in verdict.misses] == [
        ("failed requests", "10 %"),
        ("goodput", "90 %"),
    ]


def test_a_limit_of_nothing_has_a_margin_in_its_own_unit() -> None:
    failing = STAGES[0].model_copy(update={"failures": {"timeout": 3}})
    (row,) = judge(Objectives(at_rate_per_s=1, max_failed_share=0), [failing]).rows
    assert (row.margin, row.reason) == ("-10 %", "failed requests is 10 %, and the limit is 0 %")


def test_request_limits_take_the_tightest_of_each_metric() -> None:
    limits = Objectives(latencies=(ttft(0.5), ttft(0.2, Percentile.P50))).request_limits
    assert limits.ttft_s == 0.2
    assert limits.itl_s == float("inf")


def test_the_same_server_measured_twice_is_not_worse() -> None:
    for seed in range(20):
        noisy = QueueServer(10, noise=0.02)
        verdict = judge(Objectives(no_worse=NoWorse()), sweep(noisy, seed), baseline=sweep(noisy, seed + 100))
        assert verdict.met, verdict.summary()


@pytest.mark.parametrize(
    ("worse", "word"),
    [(QueueServer(5), "knee"), (QueueServer(10, base_ttft_s=0.2), "TTFT"), (QueueServer(10, base_itl_s=0.02), "ITL")],
)
def test_a_worse_server_is_found_and_named(worse: QueueServer, word: str) -> None:
    verdict = judge(Objectives(no_worse=NoWorse()), sweep(worse), baseline=STAGES)
    assert not verdict.met
    assert any(row.objective.startswith(word) for row in verdict.misses)


def test_the_first_rollout_has_nothing_to_be_compared_with() -> None:
    verdict = judge(Objectives(no_worse=NoWorse()), STAGES)
    assert verdict.met
    assert verdict.rows[-1].measured == "no earlier curve of this workload"


CLIENT = ClientSide(schedule_delay_s=spread(0.5, 1), busy_share=0.99, limited_by="its loop was 99% busy")
WIDE = QueueServer(1000)


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ([WIDE.stage(rate) for rate in (1, 10, 50)], "the highest rate that was offered"),
        (
            [WIDE.stage(10), WIDE.stage(50), QueueServer(60).stage(100).model_copy(update={"client": CLIENT})],
            "the load generator itself was the limit",
        ),
    ],
    ids=["max-rate", "client"],
)
def test_a_knee_that_was_not_reached_has_not_fallen(stages: list[Stage], why: str) -> None:
    """The knee of the baseline is 100 requests/s, and the sweep ended at 50."""
    baseline = [QueueServer(100).stage(rate) for rate in (1, 10, 50, 95, 110, 200)]
    objectives = Objectives(
        no_worse=NoWorse(), min_knee_rate_per_s=80, min_output_tokens_per_s=20_000, max_failed_share=None
    )
    rows = judge(objectives, stages, baseline=baseline).rows[:3]
    assert [row.objective for row in rows] == ["knee", "output tokens/s", "knee, against the last good rollout"]
    for row in rows:
        assert (row.outcome, row.margin) == (Outcome.UNKNOWN, ""), row
        assert row.measured.startswith("≥ ")
        assert why in row.reason
    assert judge(Objectives(min_knee_rate_per_s=50, max_failed_share=None), stages).met, (
        "a lower bound can meet a limit"
    )


def test_latencies_at_the_baselines_rate_are_unknown_where_nothing_was_measured() -> None:
    baseline = [QueueServer(100).stage(rate) for rate in (1, 10, 50, 95, 110, 200)]
    rows = judge(Objectives(no_worse=NoWorse()), [QueueServer(100).stage(1)], baseline=baseline).rows
    ttft = next(row for row in rows if row.objective.startswith("TTFT"))
    assert ttft.outcome is Outcome.UNKNOWN
    assert "nothing was measured at" in ttft.reason
