"""Is the new version worse than the one that serves? Pairs of requests, and tests that say how sure we are.

Both versions get the same request at the same moment, so that what disturbs one disturbs the other; latencies are
compared pair by pair, which takes out what a pair shares. Each question has two sides, and either may stay open:

- *worse* (one-sided tests): errors by Fisher's exact test, typical latencies by Wilcoxon's signed-rank test of the
  logarithm of each pair's ratio, the slow tenth by the exact precedence test. A rollback needs one of them.
- *proven no worse*: the upper bound of the error rates' difference (Newcombe's interval of two Wilson intervals) stays
  below its margin, and the latencies lie below the baseline's with the margin added (signed ranks the other way round).
  The slow tenth is only guarded, since its proof would need thousands of requests.

The ratio, since latencies are skewed and what disturbs them multiplies them. What is tested is a request, never a
token: the gaps inside one answer are not independent of each other. Nor are requests in a burst of work, so latencies
of one version that stay high or low for several requests in a row count for less (`clustering`).

Someone who looks often enough finds a difference between equals. So the chance of a false "worse", `alpha`, is for a
whole delivery and is divided evenly among everything that is ever looked at (`looks` times five tests); the chance of
going on with a worse version is divided by the looks of the step that proves.

Sources: Newcombe (1998), Statistics in Medicine 17:873–890, method 10; Wilcoxon (1945), Biometrics Bulletin 1:80–83;
Nelson (1963), Technometrics 5:353–360, for the precedence test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from rollout.stage import FailureKind, LatencyLimit, LatencyMetric, Percentile, RequestRecord
from rollout.values import Value

Floats = npt.NDArray[np.float64]

COMPARED = (LatencyMetric.TTFT, LatencyMetric.TPOT)
"""TPOT is one request's mean ITL: the unit that is independent."""
TAIL_QUANTILE = 0.9
"""The slow tenth: of 100 requests ten lie beyond it, enough to see that they became many."""
TESTS = 1 + 2 * len(COMPARED)
"""Errors, and for each latency the typical request and the slow tenth."""

_NORMAL = NormalDist()
_QUANTILES = {Percentile.P50: 0.5, Percentile.P90: 0.9, Percentile.P95: 0.95, Percentile.P99: 0.99}


class Margins(Value):
    """How much worse is still as good."""

    error_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Rise of the share of failed requests, absolute. 0.05: what 100 requests without a failure can prove at all."""
    latency_share: Annotated[float, Field(gt=0)] = 0.1
    """Rise of a latency, relative. 0.1: two nodes of one machine type differ by some percent."""
    latency_floor_s: Annotated[float, Field(ge=0)] = 0.002
    """A smaller rise in seconds never counts: nobody notices it, and on loopback everything is that fast."""

    def worst_accepted(self, baseline_s: Floats) -> Floats:
        """What the baseline's latencies could rise to and still count as equal."""
        return np.maximum(baseline_s * (1 + self.latency_share), baseline_s + self.latency_floor_s)


class Finding(StrEnum):
    WORSE = "worse"
    NO_WORSE = "no worse"
    UNDECIDED = "undecided"
    """More requests could decide."""


@dataclass
class Sample:
    """What one version answered, in seconds: a value per request in the order of sending, NaN where there is none.

    The order makes the pairs: the same place in two samples is the same request at the same moment.
    """

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    ntpot_s: list[float] = field(default_factory=list)
    failures: int = 0
    first_failure: str = ""

    @property
    def requests(self) -> int:
        return len(self.latencies_s(LatencyMetric.E2E)) + self.failures

    def add(self, records: Iterable[RequestRecord]) -> None:
        """Take in answered and failed requests, in the order of sending."""
        for record in records:
            failed, times = record.failure is not None, record.token_times_s
            if record.failure is not None:
                self.failures += 1
                self.first_failure = self.first_failure or _failure_text(record.failure, record.detail)
            e2e_s = math.nan if failed else record.ended_s - record.sent_s
            self.ttft_s.append(math.nan if failed else record.ttft_s)
            self.e2e_s.append(e2e_s)
            self.ntpot_s.append(e2e_s / max(1, record.output_tokens or len(times)))
            has_gaps = not failed and len(times) > 1
            self.tpot_s.append((times[-1] - times[0]) / (len(times) - 1) if has_gaps else math.nan)

    def latencies_s(self, metric: LatencyMetric) -> Floats:
        """One value per completed request; ITL is given by its mean per request."""
        values = self._in_order_s(metric)
        return values[np.isfinite(values)]

    def pairs_s(self, other: Sample, metric: LatencyMetric) -> tuple[Floats, Floats]:
        """The latencies of the requests that both completed, pair by pair."""
        own, others = self._in_order_s(metric), other._in_order_s(metric)
        asked_both = min(len(own), len(others))
        own, others = own[:asked_both], others[:asked_both]
        both = np.isfinite(own) & np.isfinite(others)
        return own[both], others[both]

    def _in_order_s(self, metric: LatencyMetric) -> Floats:
        values = {
            LatencyMetric.TTFT: self.ttft_s,
            LatencyMetric.ITL: self.tpot_s,
            LatencyMetric.TPOT: self.tpot_s,
            LatencyMetric.NTPOT: self.ntpot_s,
            LatencyMetric.E2E: self.e2e_s,
        }[metric]
        return np.asarray(values, dtype=float)


class Row(Value):
    """One question of the comparison, with its answer."""

    question: str
    metric: LatencyMetric | None = None
    """None for the errors."""
    baseline: str
    canary: str
    p_worse: float | None = None
    """Chance of such a difference, or a larger one, between equals. None where nothing could be compared."""
    finding: Finding
    reason: str = ""


class Comparison(Value):
    """Everything that was asked about two samples."""

    requests: int
    """Of the smaller sample."""
    rows: tuple[Row, ...]

    @property
    def finding(self) -> Finding:
        findings = {row.finding for row in self.rows}
        return next((each for each in (Finding.WORSE, Finding.UNDECIDED) if each in findings), Finding.NO_WORSE)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the finding is what it is; empty when everything is no worse."""
        return tuple(row.reason for row in self.rows if row.finding is self.finding and row.reason)


def compare(
    baseline: Sample,
    canary: Sample,
    margins: Margins,
    *,
    alpha_worse: float,
    alpha_proof: float,
    latencies: Sequence[LatencyMetric] = COMPARED,
) -> Comparison:
    """Hold `canary` against `baseline`. `alpha_worse` is for one test, `alpha_proof` for each proof of "no worse".

    `latencies` is empty where load makes them incomparable: then only errors count.
    """
    rows = [compare_errors(baseline, canary, margins, alpha_worse=alpha_worse, alpha_proof=alpha_proof)]
    for metric in latencies:
        pairs = baseline.pairs_s(canary, metric)
        rows.append(_typical_row(metric, *pairs, margins, alpha_worse, alpha_proof))
        alone = baseline.latencies_s(metric), canary.latencies_s(metric)
        rows.append(_tail_row(metric, *alone, margins, alpha_worse))
    return Comparison(requests=min(baseline.requests, canary.requests), rows=tuple(rows))


def compare_errors(
    baseline: Sample, canary: Sample, margins: Margins, *, alpha_worse: float, alpha_proof: float
) -> Row:
    """Failed requests: worse by Fisher's exact test, no worse by the upper bound of the difference."""
    p_worse = fisher_greater(canary.failures, canary.requests, baseline.failures, baseline.requests)
    bound = difference_upper_bound(
        canary.failures, canary.requests, baseline.failures, baseline.requests, alpha=alpha_proof
    )
    finding = _finding(p_worse < alpha_worse, bound <= margins.error_share)
    detail = f": {canary.first_failure}" if canary.first_failure else ""
    reasons = {
        Finding.WORSE: f"{canary.failures} of {canary.requests} requests failed, before"
        f" {baseline.failures} of {baseline.requests} (p = {p_worse:.2g}){detail}",
        Finding.UNDECIDED: f"errors: up to {bound:.1%} more could fail, {margins.error_share:.1%} is the margin",
    }
    return Row(
        question="failed requests",
        baseline=f"{baseline.failures}/{baseline.requests}",
        canary=f"{canary.failures}/{canary.requests}",
        p_worse=p_worse,
        finding=finding,
        reason=reasons.get(finding, ""),
    )


def missed_limits(
    sample: Sample, limits: Iterable[LatencyLimit], max_failed_share: float | None, *, alpha: float
) -> tuple[str, ...]:
    """The absolute limits that the sample misses beyond chance, as sentences. `alpha` is for each limit."""
    misses = []
    if max_failed_share is not None and sample.requests:
        chance = binomial_at_least(sample.failures, sample.requests, max_failed_share)
        if chance < alpha:
            misses.append(
                f"{sample.failures} of {sample.requests} requests failed, the limit is {max_failed_share:.1%}"
                f" (p = {chance:.2g}): {sample.first_failure}"
            )
    for limit in limits:
        values = sample.latencies_s(limit.metric)
        if len(values) and _chance_within(values, limit) < alpha:
            measured = values.mean() if limit.percentile is Percentile.MEAN else _quantile(values, limit.percentile)
            misses.append(f"{limit.name} is {measured * 1e3:.0f} ms, the limit is {limit.limit_s * 1e3:.0f} ms")
    return tuple(misses)


# --- Tests ------------------------------------------------------------------------------------------------------------


def fisher_greater(canary_failures: int, canary: int, baseline_failures: int, baseline: int) -> float:
    """One-sided p-value of Fisher's exact test: the chance that so many of all failures hit the canary."""
    failures, total = canary_failures + baseline_failures, canary + baseline
    if not failures:
        return 1.0
    ways = math.comb(total, failures)
    hit = range(canary_failures, min(failures, canary) + 1)
    return sum(math.comb(canary, k) * math.comb(baseline, failures - k) for k in hit) / ways


def wilson(failures: int, requests: int, *, alpha: float) -> tuple[float, float]:
    """Wilson's interval of a share; each bound is missed with the chance `alpha`."""
    if not requests:
        return 0.0, 1.0
    z = _NORMAL.inv_cdf(1 - alpha)
    share, scale = failures / requests, 1 + z * z / requests
    centre = (share + z * z / (2 * requests)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / requests + z * z / (4 * requests * requests))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_upper_bound(
    canary_failures: int, canary: int, baseline_failures: int, baseline: int, *, alpha: float
) -> float:
    """Upper bound of the canary's share of failures less the baseline's (Newcombe's method 10)."""
    if not canary or not baseline:
        return 1.0
    new, old = canary_failures / canary, baseline_failures / baseline
    _, new_upper = wilson(canary_failures, canary, alpha=alpha)
    old_lower, _ = wilson(baseline_failures, baseline, alpha=alpha)
    return new - old + math.hypot(new_upper - new, old - old_lower)


def requests_to_prove_errors(error_share: float, *, alpha: float) -> int:
    """The fewest requests to each version that prove the margin `error_share`: those of which none fails.

    Newcombe's bound without a failure is Wilson's, z²/(n + z²).
    """
    z = _NORMAL.inv_cdf(1 - alpha)
    return math.ceil(z * z * (1 - error_share) / error_share)


def signed_rank_greater(differences: Floats) -> float:
    """One-sided p-value of Wilcoxon's signed-rank test: the chance of so much above zero if zero is the centre.

    Normal approximation with correction for ties and continuity. Of few pairs it errs on the safe side: a dozen that
    all agree have 0.0013, exactly counted 0.0002.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    _, inverse, counts = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    # The sum of ranks with their signs has mean 0 and this variance; one flipped sign moves it by twice its rank.
    signed = np.sign(differences) * ranks
    variance = float((ranks**2).sum()) * clustering(signed)
    return 0.5 * math.erfc((float(signed.sum()) - 1) / math.sqrt(2 * variance))


def clustering(series: Floats) -> float:
    """By how much the variance of a sum over `series` exceeds that of independent values; at least 1.

    A burst of work slows several requests of one version in a row: of those, each says less than one. Bartlett's
    window over n^(1/3) neighbours (Newey and West, 1987, Econometrica 55:703–708).
    """
    if not len(series):
        return 1.0
    centred = series - series.mean()
    power = float(centred @ centred)
    if power <= 0:
        return 1.0
    window = math.ceil(len(series) ** (1 / 3))
    lags = range(1, min(window + 1, len(series)))
    return max(
        1.0, 1 + 2 * sum((1 - lag / (window + 1)) * float(centred[lag:] @ centred[:-lag]) for lag in lags) / power
    )


def thinned(values: Floats, threshold: float) -> Floats:
    """As many values of the same distribution as `values` are worth where they lie beyond `threshold` in clusters."""
    worth = max(1, round(len(values) / clustering((values > threshold).astype(float))))
    return values if worth >= len(values) else np.quantile(values, (np.arange(worth) + 0.5) / worth)


def pairs_to_prove(log_ratios: Floats, log_margins: Floats, *, alpha: float) -> int:
    """About how many pairs prove two equal versions equal, 95 times of 100, at the spread of `log_ratios`.

    ((z_alpha + z_0.05) · spread / margin)² · π/3, times what clusters cost: the sample size of a z-test over the
    efficiency of signed ranks (Hodges and Lehmann, 1956). 0 where there are no pairs to tell the spread.
    """
    if not len(log_ratios):
        return 0
    z = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(0.95)
    independent = (z * float(log_ratios.std() / np.median(log_margins))) ** 2 * math.pi / 3
    return math.ceil(independent * clustering(log_ratios))


def precedence_greater(values: Floats, others: Floats, quantile: float) -> float:
    """One-sided p-value: the chance that so many of `values` lie above the `quantile` of `others` between equals.

    Exact and free of any distribution: only the order of all values counts.
    """
    n, m = len(values), len(others)
    if not m or not n:
        return 1.0
    k = max(1, math.ceil(quantile * m))
    threshold = np.sort(others)[k - 1]
    below = n - int((values > threshold).sum())
    log_ways = _log_choose(m + n, n)
    arrangements = (_log_choose(k - 1 + r, r) + _log_choose(m - k + n - r, n - r) for r in range(below + 1))
    return min(1.0, math.fsum(math.exp(log_count - log_ways) for log_count in arrangements))


def binomial_at_least(hits: int, trials: int, share: float) -> float:
    """The chance of `hits` or more among `trials` of which each is one with the chance `share`."""
    if hits <= 0:
        return 1.0
    if share <= 0:
        return 0.0
    log_share, log_rest = math.log(share), math.log1p(-share)
    terms = (_log_choose(trials, k) + k * log_share + (trials - k) * log_rest for k in range(hits, trials + 1))
    return min(1.0, math.fsum(math.exp(term) for term in terms))


def _log_choose(n: int, k: int) -> float:
    """Logarithm of the binomial coefficient: thousands of requests overflow a float."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# --- Rows -------------------------------------------------------------------------------------------------------------


def _typical_row(
    metric: LatencyMetric, old: Floats, new: Floats, margins: Margins, alpha_worse: float, alpha_proof: float
) -> Row:
    ratios = _log_ratios(new, old)
    margin = _log_ratios(margins.worst_accepted(old), old)
    p_worse = signed_rank_greater(ratios - margin)
    finding = _finding(p_worse < alpha_worse, signed_rank_greater(margin - ratios) < alpha_proof)
    name, before, now = metric.value.upper(), _quantile(old, Percentile.P50), _quantile(new, Percentile.P50)
    needed = pairs_to_prove(ratios, margin, alpha=alpha_proof)
    reasons = {
        Finding.WORSE: f"{name} rose from {before * 1e3:.1f} to {now * 1e3:.1f} ms in the median (p = {p_worse:.2g})",
        Finding.UNDECIDED: f"{name}: {len(new)} requests do not show whether {now * 1e3:.1f} ms is within the margin"
        f" of {before * 1e3:.1f} ms (between equals about {needed:,} would)",
    }
    return Row(
        question=f"{name} typical",
        metric=metric,
        baseline=_ms(before),
        canary=_ms(now),
        p_worse=p_worse,
        finding=finding,
        reason=reasons.get(finding, ""),
    )


def _tail_row(metric: LatencyMetric, old: Floats, new: Floats, margins: Margins, alpha_worse: float) -> Row:
    accepted = margins.worst_accepted(old)
    threshold = _quantile(accepted, Percentile.P90)
    p_worse = precedence_greater(thinned(new, threshold), thinned(accepted, threshold), TAIL_QUANTILE)
    name, before, now = metric.value.upper(), _quantile(old, Percentile.P90), _quantile(new, Percentile.P90)
    worse = p_worse < alpha_worse
    rose = f"{name} p90 rose from {before * 1e3:.1f} to {now * 1e3:.1f} ms (p = {p_worse:.2g})"
    return Row(
        question=f"{name} slow tenth",
        metric=metric,
        baseline=_ms(before),
        canary=_ms(now),
        p_worse=p_worse,
        finding=Finding.WORSE if worse else Finding.NO_WORSE,
        reason=rose if worse else "",
    )


def _finding(worse: bool, proven: bool) -> Finding:
    if worse:
        return Finding.WORSE
    return Finding.NO_WORSE if proven else Finding.UNDECIDED


def _log_ratios(values: Floats, others: Floats) -> Floats:
    """Two tokens read at once have no time between them, and zero has no logarithm: a nanosecond is the least."""
    shares: Floats = np.log(np.maximum(values, 1e-9) / np.maximum(others, 1e-9))
    return shares


def _chance_within(values: Floats, limit: LatencyLimit) -> float:
    """The chance of such values if the limit holds."""
    if limit.percentile is Percentile.MEAN:
        spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        excess = float(values.mean()) - limit.limit_s
        return 0.5 * math.erfc(excess / spread / math.sqrt(2)) if spread > 0 else float(excess <= 0)
    beyond = int((values > limit.limit_s).sum())
    return binomial_at_least(beyond, len(values), 1 - _QUANTILES[limit.percentile])


def _quantile(values: Floats, percentile: Percentile) -> float:
    return float(np.quantile(values, _QUANTILES[percentile])) if len(values) else math.nan


def _ms(value_s: float) -> str:
    return "–" if math.isnan(value_s) else f"{value_s * 1e3:.1f} ms"


def _failure_text(kind: FailureKind, detail: str) -> str:
    return f"{kind.value}: {detail}" if detail else kind.value
