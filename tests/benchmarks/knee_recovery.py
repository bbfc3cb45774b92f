"""How well the adaptive sweep finds the knee of engines whose truth is known.

    python -m tests.benchmarks.knee_recovery [--models 300]

Random latency models in the discrete-event simulation of continuous batching: every sweep is what the load generator
would have measured, with Poisson arrivals and noise on every request's times. The truth is the engine's own arithmetic
(`sandbox.engine.latency.true_knee`). Prints a markdown table.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.benchmark import BenchmarkSpec, next_stage
from rollout.curve import build_curve
from rollout.stage import RequestRecord, Stage, summarize
from rollout.workload import QUICKSTART, Workload, fixed_workload, planned_duration_s
from sandbox.engine.latency import Arrival, EngineParameters, LatencyModel, simulate, true_knee

WORKLOADS = (fixed_workload(100, 32), fixed_workload(512, 32), fixed_workload(128, 128), QUICKSTART)
NOISE = 0.02
"""Relative noise of every request's times, and 1 ms of jitter."""


@dataclass(frozen=True)
class Sweep:
    workload: str
    truth_per_s: float
    found_per_s: float | None
    stages: int
    limited_by: str

    @property
    def error(self) -> float:
        return abs(self.found_per_s / self.truth_per_s - 1) if self.found_per_s else float("inf")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=300, help="at least four: one per workload")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    # Each model has a seed of its own, so that one of them can be looked at alone.
    def source(name: str) -> random.Random:
        return random.Random(f"{options.seed}-{name}")

    sweeps = [sweep(source(f"{number}"), WORKLOADS[number % len(WORKLOADS)]) for number in range(options.models)]
    never = [never_saturates(source(f"never-{number}")) for number in range(max(1, options.models // 10))]
    step = BenchmarkSpec().resolution
    print("| workload | models | within one step | median error | worst error | mean stages |")
    print("|---|---|---|---|---|---|")
    for name in [*(workload.name for workload in WORKLOADS), "all"]:
        some = [each for each in sweeps if name in (each.workload, "all")]
        errors = np.array([each.error for each in some])
        within = int((errors <= step).sum())
        stages = np.mean([each.stages for each in some])
        print(
            f"| {name} | {len(some)} | {within} ({within / len(some):.1%}) | {np.median(errors):.1%}"
            f" | {errors.max():.1%} | {stages:.1f} |"
        )
    print(f"\nFalse knees on {len(never)} engines that never saturate: {sum(never)}.")
    for number, each in sorted(enumerate(sweeps), key=lambda pair: -pair[1].error)[:3]:
        print(f"Worst: number {number}, {each}")


def sweep(source: random.Random, workload: Workload) -> Sweep:
    parameters = random_engine(source, source.randint(4, 48))
    truth = true_knee(parameters, lengths_of(workload))
    # The sweep starts anywhere between a hundredth of the knee and the knee itself, as an operator's guess would.
    spec = BenchmarkSpec(workload=workload, start_rate_per_s=truth.requests_per_s * 10 ** source.uniform(-2, 0))
    stages = run(parameters, spec, source)
    knee = build_curve(stages).knee
    return Sweep(workload.name, truth.requests_per_s, knee.rate_per_s if knee else None, len(stages), truth.limited_by)


def never_saturates(source: random.Random) -> bool:
    """Whether a knee was found although the highest rate is 70 % of the true one."""
    workload = source.choice(WORKLOADS)
    parameters = random_engine(source, source.randint(4, 48))
    highest = 0.7 * true_knee(parameters, lengths_of(workload)).requests_per_s
    spec = BenchmarkSpec(workload=workload, start_rate_per_s=highest / 32, max_rate_per_s=highest)
    return build_curve(run(parameters, spec, source)).knee is not None


def random_engine(source: random.Random, max_num_seqs: int) -> EngineParameters:
    latency = LatencyModel(
        base_s=10 ** source.uniform(-2.3, -1),
        per_sequence_s=10 ** source.uniform(-5, -2.7),
        per_kv_token_s=10 ** source.uniform(-8, -6),
        per_prefill_token_s=10 ** source.uniform(-5, -3.7),
    )
    return EngineParameters(latency, max_num_seqs=max_num_seqs)


def lengths_of(workload: Workload) -> list[tuple[int, int]]:
    return [(r.input_tokens, r.output_tokens) for r in workload.schedule(1.0, 2000.0)]


def run(parameters: EngineParameters, spec: BenchmarkSpec, source: random.Random) -> list[Stage]:
    stages: list[Stage] = []
    while planned := next_stage(spec, stages):
        schedule = spec.workload.schedule(planned.rate_per_s, planned.duration_s, repeat=len(stages))
        duration_s = planned_duration_s(planned.rate_per_s, planned.duration_s)
        arrivals = [Arrival(r.at_s, r.input_tokens, r.output_tokens) for r in schedule]
        records = [
            noisy_record(timing.arrival, timing.first_token_s, timing.finished_s, source)
            for timing in simulate(parameters, arrivals)
        ]
        stages.append(summarize(records, duration_s=duration_s))
    return stages


def noisy_record(arrival: Arrival, first_token_s: float, finished_s: float, source: random.Random) -> RequestRecord:
    def noisy(span_s: float) -> float:
        return span_s * max(0.5, source.gauss(1, NOISE)) + source.expovariate(1000)

    first = arrival.at_s + noisy(first_token_s - arrival.at_s)
    last = first + noisy(finished_s - first_token_s)
    return RequestRecord(
        scheduled_s=arrival.at_s,
        sent_s=arrival.at_s,
        input_tokens=arrival.prompt_tokens,
        planned_output_tokens=arrival.output_tokens,
        output_tokens=arrival.output_tokens,
        token_times_s=np.linspace(first, last, arrival.output_tokens),
        ended_s=last,
    )


if __name__ == "__main__":
    main()
