"""How much load one load generator can make, and that it says so itself where a sweep reaches that limit.

    python -m tests.benchmarks.loadgen_limit

The sweep that looks for a server's knee, against a server that has none in reach (`tests.endless_server`). Prints a
markdown table and the curve's verdict.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rollout.benchmark import BenchmarkSpec
from rollout.clients.loadgen import run_benchmark
from rollout.stage import Stage
from rollout.workload import fixed_workload
from tests.endless_server import MODEL, endless_server

OUTPUT_TOKENS = 200


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of a stage")
    options = parser.parse_args(arguments)
    print(f"load average before: {os.getloadavg()[0]:.1f}\n")
    print(
        "| requests/s | output tokens/s | busy | schedule delay p99, ms | CPU-s per million tokens | client the limit |"
    )
    print("|---|---|---|---|---|---|")
    spec = BenchmarkSpec(
        workload=fixed_workload(8, OUTPUT_TOKENS),
        start_rate_per_s=100,
        max_rate_per_s=100_000,
        stage_duration_s=options.seconds,
    )
    with tempfile.TemporaryDirectory() as folder, endless_server(Path(folder)) as url:
        report = run_benchmark(url, spec, model=MODEL, on_stage=lambda stage: print(row(stage), flush=True))
    print(f"\nKnee: {report.curve.knee.rate_per_s if report.curve.knee else 'none'}. {report.curve.not_reached}")
    print(*report.notes, sep="\n")


def row(stage: Stage) -> str:
    client = stage.client
    assert client is not None
    return (
        f"| {stage.rate_per_s:.4g} | {stage.output_tokens_per_s:,.0f} | {client.busy_share:.0%}"
        f" | {client.schedule_delay_s.p99 * 1e3:.1f} | {client.cpu_s_per_million_tokens or 0:.1f}"
        f" | {client.limited_by or 'no'} |"
    )


if __name__ == "__main__":
    main()
