from __future__ import annotations

import random

import numpy as np
import pytest

from rollout.benchmark import BenchmarkSpec, next_stage
from rollout.curve import (
    Confidence,
    Zone,
    bracket,
    build_curve,
    headroom,
    highest_rate_within,
    interpolate,
    operating_rate,
    replicas_for,
)
from rollout.stage import ClientSide, LatencyLimit, LatencyMetric, Percentile, RequestRecord, Stage, summarize
from rollout.workload import fixed_workload, planned_duration_s
from sandbox.engine.latency import Arrival, EngineParameters, LatencyModel, simulate, true_knee
from tests.rollout.curves import QueueServer, spread

SPEC = BenchmarkSpec(start_rate_per_s=0.5, max_stages=20)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("collapse", [1.0, 0.4], ids=["plateau", "collapse"])
def test_knee_is_within_one_refined_step_on_random_servers(noise: float, collapse: float) -> None:
    source = random.Random(7)
    for seed in range(60):
        capacity = 10 ** source.uniform(-0.3, 2.5)
        server = QueueServer(capacity, base_ttft_s=10 ** source.uniform(-2, 0), noise=noise, collapse=collapse)
        curve = build_curve(server.sweep(SPEC, seed=seed))
        assert curve.knee is not None, capacity
        assert curve.knee.rate_per_s / capacity == pytest.approx(1, abs=SPEC.resolution * 1.05), (seed, capacity)


def test_a_server_that_never_saturates_has_no_knee() -> None:
    for seed in range(40):
        server = QueueServer(1e6, noise=0.05, base_ttft_s=0.2)
        curve = build_curve(server.sweep(BenchmarkSpec(max_rate_per_s=64), seed=seed))
        assert curve.knee is None
        assert "above 64 requests/s" in curve.not_reached
        assert {point.zone for point in curve.points} == {Zone.RISING}


def test_zones_follow_from_the_bracket() -> None:
    curve = build_curve([QueueServer(10).stage(rate) for rate in (1, 4, 9.8, 10.8, 20)])
    assert [point.zone for point in curve.points] == [Zone.RISING, Zone.RISING, Zone.KNEE, Zone.PAST, Zone.PAST]
    assert curve.knee is not None
    assert (curve.knee.lower_rate_per_s, curve.knee.upper_rate_per_s) == (9.8, 10.8)
    assert curve.knee.rate_per_s == pytest.approx(10)
    assert curve.knee.confidence is Confidence.MEDIUM


def test_the_estimate_lies_within_the_bracket_where_throughput_and_verdict_differ() -> None:
    # 2 % above its capacity, a queue grows by less than what chance alone does in a stage of 30 s.
    server = QueueServer(10)
    stages = [server.stage(rate) for rate in (1, 4, 10.2, 10.2, 11, 11)]
    knee = build_curve(stages).knee
    assert knee is not None
    assert knee.rate_per_s == pytest.approx(10)
    assert knee.lower_rate_per_s <= knee.rate_per_s <= knee.upper_rate_per_s == 11
    # The search goes on from what was measured.
    assert bracket(stages) == (10.2, 11)


def test_a_search_that_ends_in_contradictions_says_so_and_claims_nothing() -> None:
    fast, slow = QueueServer(10), QueueServer(8)
    curve = build_curve([fast.stage(1), fast.stage(9.5), slow.stage(9.5)])
    assert curve.knee is None
    assert "9.5 requests/s contradict one another" in curve.not_reached


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_no_knee_is_outside_its_bracket(noise: float) -> None:
    source = random.Random(3)
    for seed in range(60):
        server = QueueServer(10 ** source.uniform(-0.3, 2.5), base_ttft_s=10 ** source.uniform(-2, 0), noise=noise)
        knee = build_curve(server.sweep(SPEC, seed=seed)).knee
        assert knee is not None
        assert knee.lower_rate_per_s <= knee.rate_per_s <= knee.upper_rate_per_s, seed


def test_repeated_sides_give_high_confidence_and_a_wide_bracket_low() -> None:
    server = QueueServer(10)
    repeated = build_curve([server.stage(rate) for rate in (1, 9.6, 9.6, 10.8, 10.8)])
    wide = build_curve([server.stage(rate) for rate in (1, 20)])
    assert repeated.knee is not None
    assert wide.knee is not None
    assert repeated.knee.confidence is Confidence.HIGH
    assert wide.knee.confidence is Confidence.LOW


def test_one_overloaded_stage_below_many_sustained_ones_is_noise() -> None:
    server = QueueServer(100)
    unlucky = server.stage(4).model_copy(update={"output_tokens_per_s": 100.0})
    curve = build_curve([server.stage(1), server.stage(2), unlucky, server.stage(8), server.stage(16)])
    assert curve.knee is None


def test_even_the_lowest_rate_may_be_too_much() -> None:
    curve = build_curve([QueueServer(0.5).stage(2.0)])
    assert curve.knee is not None
    assert curve.knee.lower_rate_per_s == 0
    assert curve.knee.confidence is Confidence.LOW
    assert curve.knee.rate_per_s == pytest.approx(0.5)


def test_where_nothing_was_answered_there_is_no_knee_to_plan_with() -> None:
    failed = QueueServer(100).stage(32.0).model_copy(update={"failures": {"refused": 960}, "completed": 0})
    curve = build_curve([failed])
    assert curve.knee is None
    assert "even at 32 requests/s, the lowest rate, requests failed" in curve.not_reached
    assert operating_rate([failed]) == 0
    assert replicas_for(20, [failed]) is None


def test_a_stage_that_the_client_limited_is_not_the_servers_knee() -> None:
    client = ClientSide(schedule_delay_s=spread(0.5, 1), busy_share=0.99, limited_by="its loop was 99 % busy")
    server = QueueServer(10)
    limited = server.stage(20).model_copy(update={"client": client})
    curve = build_curve([server.stage(1), server.stage(8), limited])
    assert curve.knee is None
    assert "load generator itself" in curve.not_reached
    assert next_stage(SPEC, [server.stage(1), limited]) is None


def test_errors_count_as_overload_however_fast_they_come() -> None:
    server = QueueServer(1000)
    failing = server.stage(8).model_copy(update={"failures": {"server-error": 30}})
    curve = build_curve([server.stage(1), server.stage(4), failing])
    assert curve.knee is not None
    assert curve.knee.upper_rate_per_s == 8


def test_no_stages_give_no_curve() -> None:
    assert build_curve([]).not_reached == "no stage was measured"
    assert headroom([], 1) == -np.inf


def ttft_within(limit_s: float) -> list[LatencyLimit]:
    return [LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P50, limit_s=limit_s)]


def test_highest_rate_within_limits_is_interpolated() -> None:
    stages = [QueueServer(10).stage(rate) for rate in (1, 5, 9, 20)]
    at = {rate: interpolate(stages, rate, LatencyMetric.TTFT, Percentile.P50) for rate in (1, 5, 9)}
    assert highest_rate_within(stages, ttft_within((at[5] + at[9]) / 2)) == pytest.approx(7)
    assert highest_rate_within(stages, ttft_within(at[1] / 2)) == 0
    assert highest_rate_within(stages, ttft_within(1000)) == pytest.approx(10)


def test_replicas_cover_the_demand_at_their_operating_rate() -> None:
    stages = [QueueServer(10).stage(rate) for rate in (1, 5, 9.7, 10.8)]
    assert operating_rate(stages) == pytest.approx(8)
    assert replicas_for(100, stages) == 13
    assert replicas_for(8, stages) == 1
    assert replicas_for(1, stages, ttft_within(0.001)) is None
    assert headroom(stages, 8) == pytest.approx(0.2)
    assert headroom(stages, 12) == pytest.approx(-0.2)


def simulated_stage(parameters: EngineParameters, rate: float, duration: float, repeat: int) -> Stage:
    """A stage of the discrete-event simulation of continuous batching, as the client would have seen it."""
    workload = fixed_workload(100, 40)
    schedule = workload.schedule(rate, duration, repeat=repeat)
    timings = simulate(parameters, [Arrival(r.at_s, r.input_tokens, r.output_tokens) for r in schedule])
    records = [
        RequestRecord(
            scheduled_s=timing.arrival.at_s,
            sent_s=timing.arrival.at_s,
            input_tokens=100,
            planned_output_tokens=40,
            output_tokens=40,
            token_times_s=np.linspace(timing.first_token_s, timing.finished_s, 40),
            ended_s=timing.finished_s,
        )
        for timing in timings
    ]
    return summarize(records, duration_s=planned_duration_s(rate, duration))


def test_knee_of_simulated_continuous_batching_is_the_engines_true_one() -> None:
    source = random.Random(3)
    spec = BenchmarkSpec(stage_duration_s=20)
    for _ in range(4):
        latency = LatencyModel(
            base_s=source.uniform(0.02, 0.06),
            per_sequence_s=source.uniform(0, 2e-3),
            per_kv_token_s=source.uniform(0, 1e-6),
            per_prefill_token_s=source.uniform(1e-5, 2e-4),
        )
        parameters = EngineParameters(latency, max_num_seqs=source.randint(4, 24))
        stages: list[Stage] = []
        while planned := next_stage(spec, stages):
            stages.append(simulated_stage(parameters, planned.rate_per_s, planned.duration_s, len(stages)))
        knee = build_curve(stages).knee
        truth = true_knee(parameters, [(100, 40)])
        assert knee is not None
        assert knee.rate_per_s / truth.requests_per_s == pytest.approx(1, abs=spec.resolution), truth
