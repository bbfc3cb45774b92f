"""Stages of servers whose truth is known, for the tests of everything that judges stages."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rollout.benchmark import BenchmarkSpec, next_stage
from rollout.stage import Percentiles, Stage


@dataclass(frozen=True)
class QueueServer:
    """A server that keeps up to `capacity_per_s` and queues beyond, with noise on every figure."""

    capacity_per_s: float = 10.0
    output_tokens: float = 100.0
    base_ttft_s: float = 0.05
    base_itl_s: float = 0.01
    noise: float = 0.0
    """Relative standard deviation of every measured figure."""
    collapse: float = 1.0
    """Share of the capacity that is left at twice the capacity and beyond."""

    def stage(self, rate_per_s: float, duration_s: float = 30.0, *, source: random.Random | None = None) -> Stage:
        source = source or random.Random(0)

        def noisy(value: float) -> float:
            return max(value * (1 + source.gauss(0, self.noise)), 1e-6)

        load = rate_per_s / self.capacity_per_s
        served = min(rate_per_s, self.capacity_per_s)
        if load > 1:
            served *= 1 - (1 - self.collapse) * min(1.0, load - 1)
        # A queue grows by what is not served; below capacity the wait rises to that behind one other request.
        growth_s = duration_s * (rate_per_s / served - 1)
        wait_s = growth_s / 2 if load > 1 else load**4 / self.capacity_per_s
        late_s = 0.9 * growth_s if load > 1 else wait_s
        itl_s = self.base_itl_s * (1 + min(load, 1.0))
        ttft_s = self.base_ttft_s + wait_s
        return Stage(
            rate_per_s=rate_per_s,
            duration_s=duration_s,
            requests=round(rate_per_s * duration_s),
            completed=round(rate_per_s * duration_s),
            input_tokens_per_s=served * 50,
            output_tokens_per_s=noisy(served * self.output_tokens),
            offered_output_tokens_per_s=rate_per_s * self.output_tokens,
            requests_per_s=served,
            concurrency_mean=noisy(served * (ttft_s + itl_s * self.output_tokens)),
            concurrency_max=100,
            ttft_s=spread(noisy(ttft_s), 0.5),
            itl_s=spread(noisy(itl_s), 0.2),
            tpot_s=spread(noisy(itl_s), 0.1),
            ntpot_s=spread(noisy(itl_s + ttft_s / self.output_tokens), 0.1),
            e2e_s=spread(noisy(ttft_s + itl_s * self.output_tokens), 0.1),
            late_ttft_s=noisy(self.base_ttft_s + late_s),
        )

    def sweep(self, spec: BenchmarkSpec, *, seed: int = 0) -> list[Stage]:
        """What the adaptive sweep measures on this server."""
        source = random.Random(seed)
        stages: list[Stage] = []
        while planned := next_stage(spec, stages):
            stages.append(self.stage(planned.rate_per_s, planned.duration_s, source=source))
        return stages


def spread(p50: float, width: float) -> Percentiles:
    return Percentiles(
        count=100,
        mean=p50 * (1 + width / 4),
        p50=p50,
        p90=p50 * (1 + width),
        p95=p50 * (1 + 1.3 * width),
        p99=p50 * (1 + 2 * width),
        maximum=p50 * (1 + 3 * width),
    )
