"""How near the load generator's figures are to the truth that the simulated engine wrote down.

    python -m tests.benchmarks.loadgen_accuracy

Prints a markdown table: TTFT and ITL as the engine handed the tokens over, and as the client saw them, at 10, 100 and
500 concurrent streams. TTFT has two truths: from the moment the client sent the request by its own clock, and from the
moment the engine had read it, which nothing of the client's goes into; between them lies what the machine takes to hand
the request over. Beside the schedule delay stands that of a process which does nothing but wait for the same
times on the same machine meanwhile: what no client can be better than.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollout.benchmark import BenchmarkSpec, PlannedStage
from rollout.clients.loadgen import LoadGenerator, client_side
from rollout.clients.openai_api import OpenAiApi
from rollout.clients.streams import StreamsResult
from rollout.stage import Stage, summarize
from rollout.workload import fixed_workload, planned_duration_s
from tests.engines import MODEL, simulated_engine

ITL_S = 0.05
OUTPUT_TOKENS = 100
INPUT_TOKENS = 64
LATENCY = {
    "base_s": ITL_S,
    "per_sequence_s": 0.0,
    "per_kv_token_s": 0.0,
    "per_prefill_token_s": 0.00001,
    "max_num_seqs": 1024,
}
RULER = """
import json, select, sys, time
poll, start, late = select.epoll(), time.perf_counter(), []
for at_s in json.load(sys.stdin):
    while (wait_s := at_s - (time.perf_counter() - start)) > 0:
        poll.poll(wait_s)
    late.append(time.perf_counter() - start - at_s)
print(json.dumps(late))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="*", default=[10, 100, 500])
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a stage")
    options = parser.parse_args(arguments)
    print(f"load average before: {os.getloadavg()[0]:.1f}\n")
    print("| streams | figure | truth, ms | measured, ms | error, ms | within 2 % or 1 ms |")
    print("|---|---|---|---|---|---|")
    for streams in options.streams:
        for row in rows(streams, measure(streams, options.seconds)):
            print(row, flush=True)


@dataclass(frozen=True)
class Measured:
    stage: Stage
    answers: StreamsResult
    truth: list[dict[str, Any]]
    ruler_s: list[float]
    """How late the process was that only waited."""


def measure(streams: int, seconds: float) -> Measured:
    """A stage at the rate that keeps `streams` answers in flight, and what the engine noted of its requests."""
    planned = PlannedStage(rate_per_s=streams / (OUTPUT_TOKENS * ITL_S), duration_s=seconds)
    workload = fixed_workload(INPUT_TOKENS, OUTPUT_TOKENS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = folder / "truth.jsonl"
        with simulated_engine(folder, "--max-num-seqs=1024", latency=LATENCY, truth=truth) as url:
            generator = LoadGenerator(OpenAiApi(url), MODEL, BenchmarkSpec(workload=workload))
            generator.warm_up()
            times = [request.at_s for request in workload.schedule(planned.rate_per_s, planned.duration_s)]
            with ruler(times) as late_s:
                answers = generator.offer(planned)
        noted = sorted(map(json.loads, truth.read_text().splitlines()), key=lambda each: float(each["received_s"]))
    stage = summarize(
        answers.records,
        duration_s=planned_duration_s(planned.rate_per_s, planned.duration_s),
        client=client_side(answers),
    )
    # The warm-up's requests came first.
    return Measured(stage, answers, noted[-len(answers.records) :], late_s)


@contextmanager
def ruler(times_s: Sequence[float]) -> Iterator[list[float]]:
    """A process beside the block that only waits for `times_s`; afterwards the list says how late it was each time."""
    late_s: list[float] = []
    with subprocess.Popen([sys.executable, "-c", RULER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(list(times_s)).encode())
        process.stdin.close()
        yield late_s
        assert process.stdout is not None
        late_s += json.loads(process.stdout.read())


def rows(streams: int, measured: Measured) -> Iterable[str]:
    stage, truth = measured.stage, measured.truth
    itl = np.concatenate([np.diff(each["token_s"]) for each in truth])
    # From the moment the client sent the request: what a user waits, the engine's own reading of it included.
    sent = np.sort([record.sent_s + measured.answers.started_s for record in measured.answers.records])
    received = np.sort([each["received_s"] for each in truth])
    first = np.array([each["token_s"][0] for each in truth])
    ttft = first - sent
    served = first - np.array([each["received_s"] for each in truth])
    assert stage.ttft_s is not None
    assert stage.itl_s is not None
    assert stage.client is not None
    figures = [
        ("TTFT mean", ttft.mean(), stage.ttft_s.mean),
        ("TTFT p50", np.percentile(ttft, 50), stage.ttft_s.p50),
        ("TTFT p99", np.percentile(ttft, 99), stage.ttft_s.p99),
        ("TTFT mean, by the engine's clock alone", served.mean(), stage.ttft_s.mean),
        ("TTFT p50, by the engine's clock alone", np.percentile(served, 50), stage.ttft_s.p50),
        ("TTFT p99, by the engine's clock alone", np.percentile(served, 99), stage.ttft_s.p99),
        ("ITL mean", itl.mean(), stage.itl_s.mean),
        ("ITL p50", np.percentile(itl, 50), stage.itl_s.p50),
        ("ITL p99", np.percentile(itl, 99), stage.itl_s.p99),
    ]
    for name, true_s, measured_s in figures:
        error_ms = (measured_s - true_s) * 1e3
        within = "yes" if abs(error_ms) <= max(1.0, 0.02 * true_s * 1e3) else "**no**"
        yield f"| {streams} | {name} | {true_s * 1e3:.2f} | {measured_s * 1e3:.2f} | {error_ms:+.2f} | {within} |"
    delay_ms = stage.client.schedule_delay_s.p99 * 1e3
    floor_ms = float(np.percentile(measured.ruler_s, 99)) * 1e3
    yield f"| {streams} | schedule delay p99 | 0 | {delay_ms:.2f} | {delay_ms:+.2f} | {_yes(delay_ms <= 5)} (5 ms) |"
    yield f"| {streams} | of a process that only waits | 0 | {floor_ms:.2f} | {floor_ms:+.2f} | |"
    pickup_ms = (received.mean() - sent.mean()) * 1e3
    yield (
        f"| {streams} | in flight {stage.concurrency_mean:.0f}, client {stage.client.busy_share:.0%} busy,"
        f" engine reads a request {pickup_ms:.2f} ms after it was sent | | | | |"
    )


def _yes(condition: bool) -> str:
    return "yes" if condition else "**no**"


if __name__ == "__main__":
    main()
