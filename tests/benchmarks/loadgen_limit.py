"""How much load one load generator can make, and that it says so itself where a sweep reaches that limit.

    python -m tests.benchmarks.loadgen_limit

The sweep that looks for a server's knee, against a server that has none in reach (`tests.endless_server`). Prints a
markdown table and the curve's verdict. Beside the schedule delay stands that of a process which only waits for the same
times meanwhile: what no client can be better than on that machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollout.benchmark import BenchmarkSpec, next_stage
from rollout.clients.loadgen import LoadGenerator
from rollout.clients.openai_api import OpenAiApi
from rollout.curve import build_curve
from rollout.stage import Stage
from rollout.workload import fixed_workload
from tests.benchmarks.loadgen_accuracy import ruler
from tests.endless_server import MODEL, endless_server

OUTPUT_TOKENS = 200


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a stage")
    options = parser.parse_args(arguments)
    print(f"load average before: {os.getloadavg()[0]:.1f}\n")
    print(
        "| requests/s | output tokens/s | busy | schedule delay p90, p99, ms | of a process that only waits"
        " | CPU-s per million tokens | client the limit |"
    )
    print("|---|---|---|---|---|---|---|")
    spec = BenchmarkSpec(
        workload=fixed_workload(8, OUTPUT_TOKENS),
        start_rate_per_s=100,
        max_rate_per_s=100_000,
        stage_duration_s=options.seconds,
    )
    with tempfile.TemporaryDirectory() as folder, endless_server(Path(folder)) as url:
        generator = LoadGenerator(OpenAiApi(url), MODEL, spec)
        generator.warm_up()
        stages: list[Stage] = []
        while planned := next_stage(spec, stages):
            times = [each.at_s for each in spec.workload.schedule(planned.rate_per_s, planned.duration_s)]
            with ruler(times) as late_s:
                stages.append(generator.measure(planned))
            print(row(stages[-1], late_s), flush=True)
    curve = build_curve(stages)
    print(f"\nKnee: {curve.knee.rate_per_s if curve.knee else 'none'}. {curve.not_reached}")


def row(stage: Stage, late_s: Sequence[float]) -> str:
    client = stage.client
    assert client is not None
    return (
        f"| {stage.rate_per_s:.4g} | {stage.output_tokens_per_s:,.0f} | {client.busy_share:.0%}"
        f" | {client.schedule_delay_s.p90 * 1e3:.1f}, {client.schedule_delay_s.p99 * 1e3:.1f}"
        f" | {np.percentile(late_s, 90) * 1e3:.1f}, {np.percentile(late_s, 99) * 1e3:.1f}"
        f" | {client.cpu_s_per_million_tokens or 0:.1f} | {client.limited_by or 'no'} |"
    )


if __name__ == "__main__":
    main()
