"""The pure model of continuous batching: nothing is lost, more work takes longer, and its knee is where it says."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.engine.latency import (
    PRESETS,
    Arrival,
    EngineParameters,
    LatencyModel,
    Scheduler,
    Sequence,
    Step,
    latency_settings,
    saturation_by_simulation,
    simulate,
    true_knee,
)

MODEL = LatencyModel(base_s=0.01, per_sequence_s=0.0005, per_kv_token_s=1e-7, per_prefill_token_s=5e-5)
ENGINE = EngineParameters(MODEL, max_num_seqs=16, max_num_batched_tokens=512, kv_cache_tokens=16_000)

arrivals = st.lists(
    st.builds(
        Arrival,
        at_s=st.floats(0, 5),
        prompt_tokens=st.integers(1, 900),
        output_tokens=st.integers(1, 60),
    ),
    min_size=1,
    max_size=40,
)
engines = st.builds(
    EngineParameters,
    latency=st.just(MODEL),
    max_num_seqs=st.integers(1, 32),
    max_num_batched_tokens=st.integers(32, 1024),
    kv_cache_tokens=st.integers(1000, 6000),
)


@settings(deadline=None, max_examples=60)
@given(parameters=engines, requests=arrivals)
def test_every_request_finishes_and_no_token_is_lost_or_invented(
    parameters: EngineParameters, requests: list[Arrival]
) -> None:
    emitted = 0
    steps: list[tuple[float, Step]] = []

    def watch(now_s: float, step: Step, scheduler: Scheduler) -> None:
        nonlocal emitted
        steps.append((now_s, step))
        assert len(scheduler.running) <= parameters.max_num_seqs
        assert step.tokens <= parameters.max_num_batched_tokens
        assert 0 <= scheduler.kv_cache_usage <= 1
        emitted += sum(
            sequence.computed == sequence.known_tokens - 1 or sequence.finished for sequence in step.sequences
        )

    timings = simulate(parameters, requests, on_step=watch)
    assert [timing.arrival.at_s for timing in timings] == sorted(request.at_s for request in requests)
    for timing in timings:
        assert timing.arrival.at_s <= timing.scheduled_s < timing.first_token_s <= timing.finished_s
    assert emitted >= sum(request.output_tokens for request in requests)
    assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(steps))


@settings(deadline=None, max_examples=40)
@given(parameters=engines, requests=arrivals)
def test_the_cache_is_empty_when_all_is_done(parameters: EngineParameters, requests: list[Arrival]) -> None:
    usage: list[float] = []
    simulate(parameters, requests, on_step=lambda _now, _step, scheduler: usage.append(scheduler.kv_cache_usage))
    assert usage[-1] == 0


def test_a_lone_request_takes_its_prefill_and_one_step_per_further_token() -> None:
    (timing,) = simulate(ENGINE, [Arrival(at_s=2.0, prompt_tokens=100, output_tokens=3)])
    prefill_s = 0.01 + 100 * 5e-5
    decode_s = [0.01 + 0.0005 + context * 1e-7 for context in (100, 101)]
    assert timing.time_to_first_token_s == pytest.approx(prefill_s)
    assert timing.end_to_end_s == pytest.approx(prefill_s + sum(decode_s))
    assert timing.queue_s == 0


def test_a_long_prompt_is_computed_in_chunks_beside_the_decoding_of_others() -> None:
    chunks: list[tuple[int, int]] = []
    simulate(
        ENGINE,
        [Arrival(0, 10, 20), Arrival(0.001, 1200, 1)],
        on_step=lambda _now, step, _scheduler: chunks.append((step.decodes, step.prefill_tokens)),
    )
    assert chunks[:4] == [(0, 10), (1, 511), (1, 511), (1, 178)]


def test_a_request_that_comes_during_a_step_waits_for_its_end() -> None:
    first, second = simulate(ENGINE, [Arrival(0, 100, 5), Arrival(0.001, 100, 5)])
    assert second.scheduled_s == pytest.approx(first.first_token_s)


def test_a_full_cache_preempts_the_youngest_and_still_finishes_it() -> None:
    small = EngineParameters(MODEL, max_num_seqs=4, kv_cache_tokens=320, prefix_caching=False)
    timings = simulate(small, [Arrival(0, 90, 100), Arrival(0, 90, 100), Arrival(0, 90, 100)])
    assert [timing.preemptions > 0 for timing in timings] == [False, True, True]
    assert all(math.isfinite(timing.finished_s) for timing in timings)


def test_a_request_larger_than_the_whole_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Scheduler(EngineParameters(MODEL, kv_cache_tokens=64)).add(Sequence(60, 10))


def test_a_shared_prefix_is_computed_once_while_it_stays_in_the_cache() -> None:
    prefix = tuple(range(6))  # six full blocks
    first, second, other = simulate(
        ENGINE, [Arrival(0, 100, 2, prefix), Arrival(1, 100, 2, prefix), Arrival(2, 100, 2, (9, *prefix[1:]))]
    )
    assert second.time_to_first_token_s == pytest.approx(0.01 + 4 * 5e-5)
    assert other.time_to_first_token_s == pytest.approx(first.time_to_first_token_s)


def test_an_aborted_sequence_frees_its_blocks_wherever_it_is() -> None:
    scheduler = Scheduler(EngineParameters(MODEL, max_num_seqs=1))
    running, waiting = Sequence(100, 5), Sequence(100, 5)
    scheduler.add(running)
    scheduler.add(waiting)
    step = scheduler.begin_step()
    assert step is not None
    scheduler.abort(running)
    scheduler.abort(waiting)
    assert scheduler.end_step(step) == []
    assert scheduler.begin_step() is None
    assert scheduler.kv_cache_usage == 0


def test_latency_rises_with_load() -> None:
    means = [_mean_e2e(rate) for rate in (5, 20, 40, 80)]
    assert means == sorted(means)


def _mean_e2e(rate: float) -> float:
    rng = random.Random(7)
    at_s, requests = 0.0, []
    for _ in range(300):
        at_s += rng.expovariate(rate)
        requests.append(Arrival(at_s, 100, 20))
    timings = simulate(ENGINE, requests)
    return sum(timing.end_to_end_s for timing in timings) / len(timings)


@pytest.mark.parametrize(
    ("parameters", "workload", "limited_by", "tolerance"),
    [
        (ENGINE, [(100, 32)], "max_num_seqs", 0.05),
        (ENGINE, [(20, 8), (300, 60), (80, 1)], "max_num_seqs", 0.08),
        (
            EngineParameters(MODEL, max_num_seqs=256, max_num_batched_tokens=512),
            [(1000, 8)],
            "max_num_batched_tokens",
            0.08,
        ),
        (EngineParameters(MODEL, max_num_seqs=64, kv_cache_tokens=3000), [(100, 32)], "kv_cache_tokens", 0.08),
    ],
)
def test_the_analytic_knee_is_where_the_simulation_saturates(
    parameters: EngineParameters, workload: list[tuple[int, int]], limited_by: str, tolerance: float
) -> None:
    knee = true_knee(parameters, workload)
    assert knee.limited_by == limited_by
    assert saturation_by_simulation(parameters, workload, requests=1200) == pytest.approx(
        knee.requests_per_s, rel=tolerance
    )


def test_throughput_follows_the_offered_rate_up_to_the_knee_and_not_beyond() -> None:
    knee = true_knee(ENGINE, [(100, 32)]).requests_per_s
    for share, followed in ((0.5, True), (0.9, True), (1.3, False)):
        rate = share * knee
        timings = simulate(ENGINE, [Arrival(index / rate, 100, 32) for index in range(600)])
        achieved = len(timings) / max(timing.finished_s for timing in timings)
        assert (achieved > 0.93 * rate) == followed


def test_the_rehearsals_engine_saturates_at_some_tens_of_requests_per_second() -> None:
    preset = PRESETS["rehearsal"]
    assert preset.max_num_seqs is not None
    knee = true_knee(EngineParameters(preset.latency, max_num_seqs=preset.max_num_seqs), [(100, 32)])
    assert 20 < knee.requests_per_s < 60


@pytest.mark.parametrize(
    ("text", "base_s", "max_num_seqs"),
    [
        (None, 0.005, 32),
        ("h100-gemma4-31b", 0.0187, None),
        ('{"base_s": 0.02}', 0.02, 32),
        ('{"preset": "cpu-smollm2", "max_num_seqs": 4}', 0.09, 4),
    ],
)
def test_settings_are_a_preset_with_what_is_replaced(text: str | None, base_s: float, max_num_seqs: int | None) -> None:
    read = latency_settings(text)
    assert (read.latency.base_s, read.max_num_seqs) == (base_s, max_num_seqs)


@pytest.mark.parametrize("text", ["h200", '{"bas_s": 1}', '{"base_s": 0}', '{"base_s": -1}', "{"])
def test_wrong_settings_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each says something else
        latency_settings(text)
