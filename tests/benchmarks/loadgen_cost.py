"""CPU time per streamed token, and latencies beside the truth: our load generator and its peers on one engine.

    python -m tests.benchmarks.loadgen_cost [--runs 2]

The tools agree if their errors (measured less true) differ by no more than those of two runs of one tool: the second
table says so, figure by figure.

The engine is the simulated one (ITL 10 ms) serving SmolLM2's tokenizer; every client sends 20 requests/s for 20 s, 64
tokens in and 128 out. CPU time is user + system time of the client's process and its children, less that of the same
client sending one request. `vllm bench serve` comes from the venv of real vLLM (`.venv-vllm`, or
`LLM_ROLLOUT_VLLM_PYTHON`), inference-perf 0.7 from one of Python 3.12 or newer (`.venv-inference-perf`, or
`LLM_ROLLOUT_INFERENCE_PERF`, its command; it replays the very schedule of the built-in client, as in the cluster). Each
is left out, with a word, where it is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from rollout import inference_perf
from rollout.benchmark import BenchmarkSpec, Engine, PlannedStage
from rollout.clients.loadgen import LoadGenerator
from rollout.clients.openai_api import OpenAiApi
from rollout.stage import Stage
from rollout.values import Value
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


class Figures(Value):
    """What a tool reports, in milliseconds."""

    ttft_mean_ms: float
    ttft_p50_ms: float
    itl_mean_ms: float
    itl_p99_ms: float

    @classmethod
    def of(cls, stage: Stage) -> Figures:
        assert stage.ttft_s is not None
        assert stage.itl_s is not None
        return cls(
            ttft_mean_ms=stage.ttft_s.mean * 1e3,
            ttft_p50_ms=stage.ttft_s.p50 * 1e3,
            itl_mean_ms=stage.itl_s.mean * 1e3,
            itl_p99_ms=stage.itl_s.p99 * 1e3,
        )

    def less(self, other: Figures) -> Figures:
        return Figures(**{name: getattr(self, name) - getattr(other, name) for name in FIGURES})


FIGURES = {
    "ttft_mean_ms": "TTFT mean",
    "ttft_p50_ms": "TTFT p50",
    "itl_mean_ms": "ITL mean",
    "itl_p99_ms": "ITL p99",
}


@dataclass(frozen=True)
class Client:
    """`run(url, requests, result)` sends `requests` requests and returns the figures that the tool reports."""

    name: str
    run: Callable[[str, int, Path], Figures]


@dataclass(frozen=True)
class Measured:
    cpu_s: float
    figures: Figures
    truth: Figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2, help="of each tool")
    parser.add_argument("--ours", nargs=3, metavar=("URL", "REQUESTS", "RESULT"), help="(internal) be the client")
    options = parser.parse_args(arguments)
    if options.ours:
        be_the_client(options.ours[0], int(options.ours[1]), Path(options.ours[2]))
        return
    clients = [Client("llm-rollout", run_ours)]
    for tool, client in (
        (vllm_python(), Client("vllm bench serve", run_vllm_bench)),
        (inference_perf_command(), Client("inference-perf", run_inference_perf)),
    ):
        if tool.is_file():
            clients.append(client)
        else:
            print(f"({client.name} is left out: there is no {tool})")
    print(f"load average before: {os.getloadavg()[0]:.1f}\n")
    names = " | ".join(f"{name}, ms (truth)" for name in FIGURES.values())
    print(f"| client | CPU-s | CPU-s per million tokens | {names} |")
    print(f"|---|---|---|{'---|' * len(FIGURES)}")
    measured: dict[str, list[Measured]] = {client.name: [] for client in clients}
    for _ in range(options.runs):  # in turn, so that what else the machine does meets all of them
        for client in clients:
            measured[client.name].append(measure(client))
            print(row(client.name, measured[client.name][-1]), flush=True)
    print("\n| error, ms | " + " | ".join(measured) + " | two runs of one tool differ by | tools differ by |")
    print(f"|---|{'---|' * len(measured)}---|---|")
    for figure, name in FIGURES.items():
        print(agreement(figure, name, list(measured.values())))


def measure(client: Client) -> Measured:
    requests = round(RATE_PER_S * SECONDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = folder / "truth.jsonl"
        with simulated_engine(folder, "--max-num-seqs=1024", model=checkpoint(), latency=LATENCY, truth=truth) as url:
            idle_s, _ = cpu_of(lambda: client.run(url, 1, folder / "one.json"))
            before = len(truth.read_text().splitlines())
            busy_s, figures = cpu_of(lambda: client.run(url, requests, folder / "all.json"))
        noted = [json.loads(line) for line in truth.read_text().splitlines()[before:]]
    # A client's own warm-up request comes first.
    noted = noted[-requests:]
    ttft_ms = [(each["token_s"][0] - each["received_s"]) * 1e3 for each in noted]
    itl_ms = np.concatenate([np.diff(each["token_s"]) for each in noted]) * 1e3
    true = Figures(
        ttft_mean_ms=float(np.mean(ttft_ms)),
        ttft_p50_ms=float(np.median(ttft_ms)),
        itl_mean_ms=float(itl_ms.mean()),
        itl_p99_ms=float(np.percentile(itl_ms, 99)),
    )
    return Measured(busy_s - idle_s, figures, true)


def row(name: str, measured: Measured) -> str:
    tokens = round(RATE_PER_S * SECONDS) * OUTPUT_TOKENS
    cells = [f"{getattr(measured.figures, each):.2f} ({getattr(measured.truth, each):.2f})" for each in FIGURES]
    return f"| {name} | {measured.cpu_s:.2f} | {measured.cpu_s / tokens * 1e6:.0f} | {' | '.join(cells)} |"


def agreement(figure: str, name: str, tools: Sequence[Sequence[Measured]]) -> str:
    """Mean errors of the tools, the most that two runs of one tool differ by, and the most that two tools do."""
    errors = [[getattr(each.figures.less(each.truth), figure) for each in runs] for runs in tools]
    means = [sum(each) / len(each) for each in errors]
    noise = max(max(each) - min(each) for each in errors)
    cells = [f"{mean:+.2f}" for mean in means]
    return f"| {name} | {' | '.join(cells)} | {noise:.2f} | {max(means) - min(means):.2f} |"


def checkpoint() -> Path:
    return smollm2(Path.home() / ".cache" / "llm-rollout" / "models")


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
    result.write_text(Figures.of(stage).model_dump_json())


def run_inference_perf(url: str, requests: int, result: Path) -> Figures:
    """What the in-cluster engine does, on this machine: its configuration, its trace, its reports."""
    spec = BenchmarkSpec(workload=fixed_workload(INPUT_TOKENS, OUTPUT_TOKENS), engine=Engine.INFERENCE_PERF)
    planned = PlannedStage(rate_per_s=RATE_PER_S, duration_s=requests / RATE_PER_S)
    schedule = spec.workload.schedule(planned.rate_per_s, planned.duration_s)
    folder = result.with_suffix("")
    folder.mkdir()
    configuration = inference_perf.config(
        spec, planned, base_url=url, model=MODEL, tokenizer=str(checkpoint()), seed=requests
    )
    text = yaml.safe_dump(configuration).replace(inference_perf.CONFIG_FOLDER, str(folder))
    (folder / "config.yml").write_text(text.replace(inference_perf.REPORTS_FOLDER, str(folder)))
    (folder / inference_perf.TRACE_FILE).write_text(inference_perf.trace(schedule))
    subprocess.run(
        [str(inference_perf_command()), "--config_file", "config.yml"],
        check=True,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    each, summary = (
        json.loads((folder / name).read_text())
        for name in (inference_perf.PER_REQUEST_REPORT, inference_perf.STAGE_REPORT)
    )
    return Figures.of(inference_perf.read_stage(each, summary, planned, schedule, spec))


def run_vllm_bench(url: str, requests: int, result: Path) -> Figures:
    """The same load by vLLM's own tool; its `vllm` script does not start in the CPU build, its module does."""
    code = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main;"
        "parser = argparse.ArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    options = {
        "backend": "openai",
        "base-url": url,
        "model": MODEL,
        "tokenizer": checkpoint(),
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
    return Figures(
        ttft_mean_ms=report["mean_ttft_ms"],
        ttft_p50_ms=report["median_ttft_ms"],
        itl_mean_ms=report["mean_itl_ms"],
        itl_p99_ms=report["p99_itl_ms"],
    )


def vllm_python() -> Path:
    return Path(os.environ.get("LLM_ROLLOUT_VLLM_PYTHON") or REPOSITORY / ".venv-vllm" / "bin" / "python")


def inference_perf_command() -> Path:
    own = REPOSITORY / ".venv-inference-perf" / "bin" / "inference-perf"
    return Path(os.environ.get("LLM_ROLLOUT_INFERENCE_PERF") or own)


if __name__ == "__main__":
    main()
