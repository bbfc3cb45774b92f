"""How often a delivery promotes what is as good, and takes back what is worse, by how noisy the latencies are.

    python -m tests.benchmarks.delivery_power [--deliveries 400] [--kind blue_green]

Simulates whole deliveries: the product's steps, looks, tests and decisions, with latencies drawn from a distribution of
which the truth is known. Prints a markdown table. Nothing is measured on a server; time plays no part.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rollout.comparison import COMPARED, Finding, Sample, compare
from rollout.delivery import (
    Decision,
    DeliveryKind,
    DeliveryStep,
    DeliveryStrategy,
    alpha_of_one_proof,
    alpha_of_one_test,
    decide,
    delivery_steps,
    next_step,
)

TTFT_S, TPOT_S = 0.2, 0.02
FAILED_SHARE = 0.005
"""Of the requests to either version."""
FACTORS = (1.0, 1.05, 1.1, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Noise:
    """Log-normal latencies."""

    sigma_ttft: float
    sigma_tpot: float
    shared: float = 0.0
    """Part of the variance that the two requests of a pair have in common: the prompt, the hour, the client."""
    memory: float = 0.0
    """Correlation of the rest with that of the version's request before: a burst outlasts a probe."""

    def __str__(self) -> str:
        extra = [f"{self.shared:.0%} shared"] * (self.shared > 0) + [f"memory {self.memory:g}"] * (self.memory > 0)
        return ", ".join([f"{self.sigma_ttft} / {self.sigma_tpot}", *extra])


NOISES = (
    Noise(0.1, 0.05),
    Noise(0.3, 0.1),
    Noise(0.5, 0.2),
    Noise(0.7, 0.3),
    Noise(0.8, 0.35),
    Noise(0.7, 0.3, shared=0.5),
    Noise(0.7, 0.3, memory=0.3),
    Noise(0.7, 0.3, memory=0.6),
)


@dataclass(frozen=True)
class Ended:
    promoted: bool
    called_worse: bool
    requests: int
    """To each version, over all steps before the switch."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deliveries", type=int, default=400, help="of each cell")
    parser.add_argument("--kind", choices=["canary", "blue_green"], default="canary")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    strategy = DeliveryStrategy(kind=DeliveryKind(options.kind))
    print("| log-sigma TTFT / TPOT | latency | promoted | called worse | not proven | mean requests |")
    print("|---|---|---|---|---|---|")
    for noise in NOISES:
        for factor in FACTORS:
            source = np.random.default_rng([options.seed, round(factor * 100)])
            ended = [deliver(strategy, noise, factor, source) for _ in range(options.deliveries)]
            print(row(noise, factor, ended), flush=True)


def row(noise: Noise, factor: float, ended: Sequence[Ended]) -> str:
    promoted = 100 * float(np.mean([each.promoted for each in ended]))
    worse = 100 * float(np.mean([each.called_worse for each in ended]))
    requests = np.mean([each.requests for each in ended])
    latency = "equal" if factor == 1 else f"{factor:g}×"
    unproven = 100 - promoted - worse
    return f"| {noise} | {latency} | {promoted:.1f} % | {worse:.1f} % | {unproven:.1f} % | {requests:,.0f} |"


def deliver(strategy: DeliveryStrategy, noise: Noise, factor: float, source: np.random.Generator) -> Ended:
    """A whole delivery of a version whose latencies are `factor` times the live one's."""
    steps = delivery_steps(strategy, has_live=True)
    index, requests = 0, 0
    while True:
        decision, finding, seen = take_step(strategy, steps, index, noise, factor, source)
        requests += 0 if steps[index].is_last else seen
        following = next_step(index, steps, decision)
        if following is None:
            return Ended(decision is Decision.FINISH, finding is Finding.WORSE, requests)
        index = following


def take_step(
    strategy: DeliveryStrategy,
    steps: Sequence[DeliveryStep],
    index: int,
    noise: Noise,
    factor: float,
    source: np.random.Generator,
) -> tuple[Decision, Finding, int]:
    """One step to its end: the decision, the last look's finding, and the requests to each version."""
    step = steps[index]
    live, new = samples(step.looks[-1], noise, factor, source)
    for size in step.looks:
        looked = compare(
            head(live, size),
            head(new, size),
            strategy.margins,
            alpha_worse=alpha_of_one_test(strategy, steps),
            alpha_proof=alpha_of_one_proof(strategy),
            latencies=COMPARED if step.compares_latencies else (),
        )
        decision = decide(step, looked, (), elapsed_s=math.inf).decision
        if decision is not Decision.HOLD:
            return decision, looked.finding, size
    raise AssertionError("the last look always decides")


def samples(requests: int, noise: Noise, factor: float, source: np.random.Generator) -> tuple[Sample, Sample]:
    """What the live and the new version answer to the same `requests`."""
    common = source.standard_normal((2, requests))
    both = []
    for times in (1.0, factor):
        own = with_memory(source.standard_normal((2, requests)), noise.memory)
        disturbed = math.sqrt(noise.shared) * common + math.sqrt(1 - noise.shared) * own
        ttft = times * TTFT_S * np.exp(noise.sigma_ttft * disturbed[0])
        tpot = times * TPOT_S * np.exp(noise.sigma_tpot * disturbed[1])
        ttft[source.random(requests) < FAILED_SHARE] = math.nan
        tpot[np.isnan(ttft)] = math.nan
        both.append(Sample(ttft_s=list(ttft), tpot_s=list(tpot), e2e_s=list(ttft + 31 * tpot)))
    return both[0], both[1]


def with_memory(independent: npt.NDArray[np.float64], memory: float) -> npt.NDArray[np.float64]:
    """A first-order autoregressive series of variance 1 along the last axis."""
    if not memory:
        return independent
    series = independent.copy()
    for at in range(1, series.shape[1]):
        series[:, at] = memory * series[:, at - 1] + math.sqrt(1 - memory * memory) * independent[:, at]
    return series


def head(whole: Sample, size: int) -> Sample:
    """The first `size` requests."""
    failures = int(np.isnan(whole.e2e_s[:size]).sum())
    return Sample(ttft_s=whole.ttft_s[:size], tpot_s=whole.tpot_s[:size], e2e_s=whole.e2e_s[:size], failures=failures)


if __name__ == "__main__":
    main()
