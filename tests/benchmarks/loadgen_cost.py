"""CPU time per streamed token, and TTFT beside the truth: our load generator and its peers on one engine.

    python -m tests.benchmarks.loadgen_cost

The engine is the simulated one (ITL 10 ms) serving SmolLM2's tokenizer; every client sends 20 requests/s for 20 s, 64
tokens in and 128 out. CPU time is user + system time of the client's process and its children, less that of the same
client sending one request. `vllm bench serve` comes from the venv of real vLLM (`.venv-vllm`, or
`LLM_ROLLOUT_VLLM_PYTHON`); inference-perf needs Python 3.12 or newer, and is left out, with a word, without it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rollout.benchmark import BenchmarkSpec, PlannedStage
from rollout.clients.loadgen import LoadGenerator
from rollout.clients.openai_api import OpenAiApi
from rollout.workload import fixed_workload
from sandbox.models import smollm2
from tests.engines import MODEL, REPOSITORY, simulated_engine

RATE_PER_S, SECONDS, INPUT_TOKENS, OUTPUT_TOKENS = 20.0, 20.0, 64, 128
LATENCY = {
    "base_s": 0.01,
    "per_sequence_s": 0.0,
    "per_kv_token_s": 0.0,
    "per_prefill_token_s": 0.0003,
    "max_num_seqs": 1024,
}


@dataclass(frozen=True)
class Figures:
    ttft_mean_ms: float
    itl_p99_ms: float


@dataclass(frozen=True)
class Client:
    """`run(url, requests, result)` sends `requests` requests and returns the figures that the tool reports."""

    name: str
    run: Callable[[str, int, Path], Figures]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", nargs=3, metavar=("URL", "REQUESTS", "RESULT"), help="(internal) be the client")
    options = parser.parse_args(arguments)
    if options.ours:
        be_the_client(options.ours[0], int(options.ours[1]), Path(options.ours[2]))
        return
    clients = [Client("llm-rollout", run_ours)]
    if vllm_python().is_file():
        clients.append(Client("vllm bench serve", run_vllm_bench))
    else:
        print(f"(no real vLLM at {vllm_python()}: `vllm bench serve` is left out)")
    if not any(shutil.which(f"python3.{minor}") for minor in (12, 13, 14)):
        print("(no Python 3.12 or newer: inference-perf is left out)")
    print("| client | CPU-s | CPU-s per million tokens | TTFT mean, ms (truth) | ITL p99, ms (truth) |")
    print("|---|---|---|---|---|")
    model = smollm2(Path.home() / ".cache" / "llm-rollout" / "models")
    for client in clients:
        print(row(client, model), flush=True)


def row(client: Client, model: Path) -> str:
    requests = round(RATE_PER_S * SECONDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = folder / "truth.jsonl"
        with simulated_engine(folder, "--max-num-seqs=1024", model=model, latency=LATENCY, truth=truth) as url:
            idle_s, _ = cpu_of(lambda: client.run(url, 1, folder / "one.json"))
            before = len(truth.read_text().splitlines())
            busy_s, figures = cpu_of(lambda: client.run(url, requests, folder / "all.json"))
        noted = [json.loads(line) for line in truth.read_text().splitlines()[before:]]
    # A client's own warm-up request comes first.
    noted = noted[-requests:]
    ttft = np.mean([each["token_s"][0] - each["received_s"] for each in noted]) * 1e3
    itl = np.percentile(np.concatenate([np.diff(each["token_s"]) for each in noted]), 99) * 1e3
    tokens = requests * OUTPUT_TOKENS
    spent_s = busy_s - idle_s
    return (
        f"| {client.name} | {spent_s:.2f} | {spent_s / tokens * 1e6:.0f}"
        f" | {figures.ttft_mean_ms:.2f} ({ttft:.2f}) | {figures.itl_p99_ms:.2f} ({itl:.2f}) |"
    )


def cpu_of(work: Callable[[], Figures]) -> tuple[float, Figures]:
    def children_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = children_s()
    figures = work()
    return children_s() - before, figures


def run_ours(url: str, requests: int, result: Path) -> Figures:
    command = [sys.executable, "-m", "tests.benchmarks.loadgen_cost", "--ours", url, str(requests), str(result)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    return Figures(**json.loads(result.read_text()))


def be_the_client(url: str, requests: int, result: Path) -> None:
    spec = BenchmarkSpec(workload=fixed_workload(INPUT_TOKENS, OUTPUT_TOKENS))
    generator = LoadGenerator(OpenAiApi(url), MODEL, spec)
    stage = generator.measure(PlannedStage(rate_per_s=RATE_PER_S, duration_s=requests / RATE_PER_S))
    assert stage.ttft_s is not None
    assert stage.itl_s is not None
    result.write_text(json.dumps({"ttft_mean_ms": stage.ttft_s.mean * 1e3, "itl_p99_ms": stage.itl_s.p99 * 1e3}))


def run_vllm_bench(url: str, requests: int, result: Path) -> Figures:
    """The same load by vLLM's own tool; its `vllm` script does not start in the CPU build, its module does."""
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    model = smollm2(Path.home() / ".cache" / "llm-rollout" / "models")
    options = {
        "backend": "openai",
        "base-url": url,
        "model": MODEL,
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": INPUT_TOKENS,
        "random-output-len": OUTPUT_TOKENS,
        "request-rate": RATE_PER_S,
        "num-prompts": requests,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": 99,
        "result-dir": result.parent,
        "result-filename": result.name,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run(
        [str(vllm_python()), "-c", code, *words, "--ignore-eos", "--save-result", "--disable-tqdm"],
        check=True,
        cwd=result.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    report = json.loads(result.read_text())
    return Figures(ttft_mean_ms=report["mean_ttft_ms"], itl_p99_ms=report["p99_itl_ms"])


def vllm_python() -> Path:
    return Path(os.environ.get("LLM_ROLLOUT_VLLM_PYTHON") or REPOSITORY / ".venv-vllm" / "bin" / "python")


if __name__ == "__main__":
    main()
