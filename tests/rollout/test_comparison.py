"""Statistics that are right about equals, that find what is worse, and that match values from the literature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.comparison import (
    TESTS,
    Comparison,
    Finding,
    Margins,
    Sample,
    binomial_at_least,
    clustering,
    compare,
    difference_upper_bound,
    fisher_greater,
    missed_limits,
    pairs_to_prove,
    precedence_greater,
    requests_to_prove_errors,
    signed_rank_greater,
    wilson,
)
from rollout.delivery import LOOK_SHARES, PROOF_LOOKS
from rollout.stage import FailureKind, LatencyLimit, LatencyMetric, Percentile, RequestRecord

MARGINS = Margins()
ALPHA = 0.05


def sample(
    source: np.random.Generator, requests: int, *, factor: float = 1.0, failed_share: float = 0.0, tail: float = 1.0
) -> Sample:
    """Requests with the skewed latencies of a server under load. `tail` stretches the slow tenth alone."""
    failures = int(source.binomial(requests, failed_share))
    done = requests - failures
    ttft = 0.1 * factor * source.lognormal(0.0, 0.3, done)
    tpot = 0.02 * factor * source.lognormal(0.0, 0.15, done)
    slow = source.random(done) < 0.2
    ttft[slow] *= tail
    return Sample(ttft_s=list(ttft), tpot_s=list(tpot), e2e_s=list(ttft + 31 * tpot), failures=failures)


def looked(baseline: Sample, canary: Sample, *, looks: int = len(LOOK_SHARES)) -> Comparison:
    return compare(baseline, canary, MARGINS, alpha_worse=ALPHA / (looks * TESTS), alpha_proof=ALPHA / PROOF_LOOKS)


def shares(trials: int, requests: int, **of_the_canary: float) -> dict[Finding, float]:
    """How often each finding comes out of `trials` comparisons."""
    source = np.random.default_rng(20261122)
    findings = [
        looked(sample(source, requests), sample(source, requests, **of_the_canary)).finding for _ in range(trials)
    ]
    return {finding: findings.count(finding) / trials for finding in Finding}


def test_equal_versions_are_almost_never_called_worse() -> None:
    # At the edge of every margin would be 5 % in all looks together; equals are far inside of it.
    assert shares(300, 100)[Finding.WORSE] <= 0.01


def test_a_version_at_the_margin_is_called_worse_no_more_often_than_allowed() -> None:
    assert shares(400, 200, factor=1 + MARGINS.latency_share)[Finding.WORSE] <= ALPHA


def test_many_looks_at_growing_samples_of_equals_stay_within_alpha() -> None:
    source = np.random.default_rng(7)
    false_alarms = 0
    for _ in range(150):
        sizes = [math.ceil(100 * share) for share in LOOK_SHARES]
        baseline = sample(source, sizes[-1])
        canary = sample(source, sizes[-1], factor=1 + MARGINS.latency_share)
        heads = [(head(baseline, size), head(canary, size)) for size in sizes]
        false_alarms += any(looked(*pair).finding is Finding.WORSE for pair in heads)
    assert false_alarms / 150 <= ALPHA


def head(whole: Sample, size: int) -> Sample:
    return Sample(ttft_s=whole.ttft_s[:size], tpot_s=whole.tpot_s[:size], e2e_s=whole.e2e_s[:size])


def test_equal_versions_are_proven_so_within_the_largest_sample() -> None:
    assert shares(100, 400)[Finding.NO_WORSE] >= 0.9


@pytest.mark.parametrize(
    ("requests", "worse"),
    [(100, {"factor": 1.5}), (400, {"factor": 1.3}), (100, {"failed_share": 0.25}), (400, {"tail": 3.0})],
    ids=["latency half as long again", "latency 30 % up", "a quarter fails", "only the slow tenth"],
)
def test_what_is_clearly_worse_is_found(requests: int, worse: dict[str, float]) -> None:
    assert shares(60, requests, **worse)[Finding.WORSE] >= 0.9


def test_a_worse_version_is_not_proven_good() -> None:
    assert shares(200, 400, factor=1.2)[Finding.NO_WORSE] <= ALPHA


def test_a_small_sample_decides_nothing() -> None:
    source = np.random.default_rng(1)
    assert looked(sample(source, 8), sample(source, 8)).finding is Finding.UNDECIDED


def test_a_total_failure_is_found_after_ten_requests() -> None:
    source = np.random.default_rng(1)
    broken = Sample(failures=10, first_failure="server-error: HTTP 500")
    found = looked(sample(source, 10), broken)
    assert found.finding is Finding.WORSE
    assert "10 of 10" in found.reasons[0]
    assert "HTTP 500" in found.reasons[0]


def test_failures_of_both_alike_are_not_the_canarys() -> None:
    source = np.random.default_rng(3)
    both = {"failed_share": 0.3}
    found = looked(sample(source, 200, **both), sample(source, 200, **both))
    assert found.rows[0].finding is not Finding.WORSE


def test_without_latencies_only_errors_count() -> None:
    source = np.random.default_rng(3)
    baseline, slower = sample(source, 200), sample(source, 200, factor=3.0)
    found = compare(baseline, slower, MARGINS, alpha_worse=0.01, alpha_proof=0.01, latencies=())
    assert found.finding is Finding.NO_WORSE
    assert len(found.rows) == 1


def test_a_rise_that_nobody_notices_is_no_rise() -> None:
    source = np.random.default_rng(5)
    baseline = Sample(ttft_s=list(source.normal(0.001, 0.0001, 200)), tpot_s=[0.01] * 200, e2e_s=[1.0] * 200)
    canary = Sample(ttft_s=[2 * value for value in baseline.ttft_s], tpot_s=[0.01] * 200, e2e_s=[1.0] * 200)
    found = compare(baseline, canary, Margins(latency_floor_s=0.002), alpha_worse=0.01, alpha_proof=0.02)
    assert found.finding is Finding.NO_WORSE


# --- Against known values ---------------------------------------------------------------------------------------------


def test_fishers_lady_tasting_tea() -> None:
    # Fisher, The Design of Experiments (1935): three of four cups right, p = 17/70.
    assert fisher_greater(3, 4, 1, 4) == pytest.approx(17 / 70)


def test_wilson_and_newcombe_give_the_published_bounds() -> None:
    # Newcombe (1998), Statistics in Medicine 17: example (a), 56/70 against 48/80: 95 % interval 0.0524 to 0.3339.
    assert difference_upper_bound(56, 70, 48, 80, alpha=0.025) == pytest.approx(0.3339, abs=5e-4)
    # Newcombe (1998), Statistics in Medicine 17:857–872: 81/263 gives 0.2553 to 0.3662.
    assert wilson(81, 263, alpha=0.025) == pytest.approx((0.2553, 0.3662), abs=5e-4)


def test_the_precedence_test_counts_arrangements() -> None:
    # All 3 above all 2: one arrangement of 5!/(3!2!) = 10.
    assert precedence_greater(np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0]), 0.9) == pytest.approx(1 / 10)
    assert precedence_greater(np.array([0.0, 0.1]), np.array([1.0, 2.0]), 0.9) == pytest.approx(1.0)


def test_signed_ranks_agree_with_their_exact_distribution_on_darwins_maize() -> None:
    # Fisher, The Design of Experiments (1935), section 17: crossed less self-fertilised plants, in eighths of an inch.
    heights = np.array([49.0, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    # The negative ones have the ranks 10 and 14: of all sets of ranks 1 to 15, so many sum to 24 or less.
    ways = [1] + [0] * 24
    for rank in range(1, 16):
        ways = [ways[total] + (ways[total - rank] if total >= rank else 0) for total in range(25)]
    assert signed_rank_greater(heights) == pytest.approx(sum(ways) / 2**15, rel=0.1)
    assert signed_rank_greater(-heights) > 0.95
    assert signed_rank_greater(np.zeros(5)) == signed_rank_greater(np.array([])) == 1.0


def test_the_binomial_tail_is_the_sum_of_its_terms() -> None:
    expected = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(5, 21))
    assert binomial_at_least(5, 20, 0.1) == pytest.approx(expected)


counts = st.integers(0, 60)


@given(counts, counts, counts, counts)
def test_p_values_are_probabilities_and_fall_with_the_canarys_failures(a: int, b: int, c: int, d: int) -> None:
    canary, baseline = a + b + 1, c + d + 1
    p = fisher_greater(a, canary, c, baseline)
    assert 0.0 <= p <= 1.0 + 1e-12
    assert fisher_greater(a + 1, canary, c, baseline) <= p + 1e-12
    bound = difference_upper_bound(a, canary, c, baseline, alpha=0.05)
    assert a / canary - c / baseline <= bound + 1e-12


# Thousandths: floats that differ in their last bit alone become equal under exp2.
milliseconds = st.lists(st.integers(1, 10_000).map(lambda count: count / 1000), min_size=2, max_size=40)


@given(milliseconds, milliseconds)
def test_ranks_are_all_that_counts(values: list[float], others: list[float]) -> None:
    new, old = np.array(values), np.array(others)
    p = precedence_greater(new, old, 0.9)
    assert 0.0 <= p <= 1.0 + 1e-12
    assert precedence_greater(np.exp2(new), np.exp2(old), 0.9) == pytest.approx(p)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40))
def test_of_differences_signs_and_ranks_are_all_that_counts(whole: list[int]) -> None:
    differences = np.array(whole, dtype=float)
    p = signed_rank_greater(differences)
    assert 0.0 <= p <= 1.0
    assert signed_rank_greater(differences**3) == pytest.approx(p)
    assert p + signed_rank_greater(-differences) >= 1.0 - 1e-9, "both directions cannot be found at once"


# --- Pairs ------------------------------------------------------------------------------------------------------------


def test_what_both_of_a_pair_suffer_does_not_hide_the_difference() -> None:
    source = np.random.default_rng(11)
    suffered = source.lognormal(0.0, 1.5, 200)

    def version(factor: float) -> Sample:
        ttft = list(0.2 * factor * suffered * source.lognormal(0.0, 0.1, 200))
        return Sample(ttft_s=ttft, tpot_s=[0.01] * 200, e2e_s=[1.0] * 200)

    assert looked(version(1.0), version(1.0)).finding is Finding.NO_WORSE
    assert looked(version(1.0), version(1.2)).finding is Finding.WORSE


def test_a_failed_request_takes_its_pair_with_it_and_no_other() -> None:
    baseline, canary = Sample(), Sample()
    failed = RequestRecord(0.0, 0.0, ended_s=0.1, failure=FailureKind.SERVER_ERROR)
    baseline.add(answer(ttft_s) for ttft_s in (0.1, 0.2, 0.3))
    canary.add([answer(0.11), failed, answer(0.31)])
    old, new = baseline.pairs_s(canary, LatencyMetric.TTFT)
    assert old == pytest.approx([0.1, 0.3])
    assert new == pytest.approx([0.11, 0.31])
    assert (baseline.requests, canary.requests) == (3, 3)


def answer(ttft_s: float) -> RequestRecord:
    return RequestRecord(0.0, 0.0, output_tokens=2, token_times_s=[ttft_s, ttft_s + 0.01], ended_s=ttft_s + 0.01)


def test_a_series_that_repeats_itself_is_worth_less() -> None:
    source = np.random.default_rng(13)
    independent = source.normal(size=2000)
    assert clustering(independent) == pytest.approx(1.0, abs=0.2)
    # Ten of the same kind in a row: 200 independent values, not 2,000. The window sees most of it.
    assert 6 <= clustering(np.repeat(independent[:200], 10)) <= 10
    assert clustering(np.ones(10)) == 1.0


def test_bursts_do_not_make_equals_worse() -> None:
    source = np.random.default_rng(17)
    requests = 400

    def version() -> Sample:
        bursts = np.repeat(source.lognormal(0.0, 0.7, requests // 4), 4)
        return Sample(ttft_s=list(0.2 * bursts), tpot_s=[0.01] * requests, e2e_s=[1.0] * requests)

    findings = [looked(version(), version()).finding for _ in range(200)]
    assert findings.count(Finding.WORSE) / 200 <= ALPHA


# --- What a proof takes -----------------------------------------------------------------------------------------------


@given(st.floats(0.005, 0.5), st.floats(0.001, 0.1))
def test_the_fewest_requests_that_prove_the_margin_of_errors_are_just_enough(share: float, alpha: float) -> None:
    fewest = requests_to_prove_errors(share, alpha=alpha)
    assert difference_upper_bound(0, fewest, 0, fewest, alpha=alpha) <= share + 1e-12
    assert difference_upper_bound(0, fewest - 1, 0, fewest - 1, alpha=alpha) > share - 1e-12


def test_as_many_pairs_as_are_said_to_prove_equals_do_prove_them() -> None:
    source = np.random.default_rng(19)
    margins = np.full(1, math.log(1.1))
    pairs = pairs_to_prove(source.normal(0.0, 0.5, 4000), margins, alpha=0.02)
    proven = sum(signed_rank_greater(margins[0] - source.normal(0.0, 0.5, pairs)) < 0.02 for _ in range(200))
    assert 0.9 <= proven / 200 <= 1.0


def test_what_is_not_proven_says_how_many_requests_would() -> None:
    source = np.random.default_rng(23)
    noisy = [Sample(ttft_s=list(source.lognormal(0, 1, 100)), tpot_s=[0.01] * 100, e2e_s=[1.0] * 100) for _ in "ab"]
    found = looked(*noisy)
    assert found.finding is Finding.UNDECIDED
    assert "between equals about" in "".join(found.reasons)


# --- Limits and records -----------------------------------------------------------------------------------------------


def test_a_limit_is_missed_only_beyond_chance() -> None:
    limit = LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=0.1)
    within = Sample(ttft_s=[0.05] * 88 + [0.2] * 12, e2e_s=[1.0] * 100)
    beyond = Sample(ttft_s=[0.05] * 70 + [0.2] * 30, e2e_s=[1.0] * 100)
    assert missed_limits(within, [limit], None, alpha=0.01) == ()
    assert "TTFT p90 is 200 ms" in missed_limits(beyond, [limit], None, alpha=0.01)[0]


def test_the_mean_has_its_own_test() -> None:
    limit = LatencyLimit(metric=LatencyMetric.E2E, percentile=Percentile.MEAN, limit_s=1.0)
    source = np.random.default_rng(2)
    assert missed_limits(Sample(e2e_s=list(source.normal(0.99, 0.3, 100))), [limit], None, alpha=0.01) == ()
    assert missed_limits(Sample(e2e_s=list(source.normal(1.3, 0.3, 100))), [limit], None, alpha=0.01) != ()


def test_too_many_failures_miss_their_limit() -> None:
    assert missed_limits(Sample(e2e_s=[1.0] * 90, failures=10), [], 0.01, alpha=0.001) != ()
    assert missed_limits(Sample(e2e_s=[1.0] * 99, failures=1), [], 0.01, alpha=0.001) == ()


def test_a_sample_takes_its_figures_from_records() -> None:
    answered = RequestRecord(0.0, 1.0, output_tokens=3, token_times_s=[1.5, 1.7, 1.9], ended_s=2.0)
    failed = RequestRecord(0.0, 1.0, ended_s=1.1, failure=FailureKind.SERVER_ERROR, detail="HTTP 500: no")
    taken = Sample()
    taken.add([answered, failed])
    assert taken.requests == 2
    assert taken.first_failure == "server-error: HTTP 500: no"
    assert taken.latencies_s(LatencyMetric.TTFT) == pytest.approx([0.5])
    assert taken.latencies_s(LatencyMetric.TPOT) == pytest.approx([0.2])
    assert taken.latencies_s(LatencyMetric.NTPOT) == pytest.approx([1 / 3])
