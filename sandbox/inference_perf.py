"""Plays the image of inference-perf 0.7 in the embedded cluster: the load generator, and Python's file server.

    python -m sandbox.inference_perf inference-perf --config_file /etc/inference-perf/config.yml
    python -m sandbox.inference_perf python -m http.server --directory /reports 8081

Simulated: the configuration file is read as strictly as the tool's own pydantic models do (an unknown key, a missing
one or a wrong type ends it with exit code 1 and the message), the tokenizer is looked up on the hub at `HF_ENDPOINT`
with `HF_TOKEN`, the requests of the trace are really sent, streamed, to the server's address when they are due, and
the two reports that we read are written in the shape of 0.7. Times in them are of a monotonic clock, as the tool's are.
Like the tool, it waits for every answer; one that takes longer than `request_timeout` is an entry with the error
`TimeoutError`. (Of requests that the tool cancels, when a worker dies, it writes no entry.)

Not simulated: what we never configure is refused like an unknown key, though the tool knows it (chat, sweeps, lengths
and arrivals of its own, other servers, Prometheus, storage in buckets, several stages). No worker processes; input
lengths are words, not tokens.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import http.server
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import numpy as np
import requests
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

LEAD_S = 0.2
"""The tool begins a second after it has started its timer; nobody waits for that here."""
_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Api(_Strict):
    type: Literal["completion"]
    streaming: Literal[True]


class Server(_Strict):
    type: Literal["vllm"]
    model_name: str
    base_url: str
    ignore_eos: bool


class Tokenizer(_Strict):
    pretrained_model_name_or_path: str


class TraceFile(_Strict):
    file: str
    format: Literal["AzurePublicDataset"]


class Data(_Strict):
    """Random prompts: the tool writes them for `completion` alone."""

    type: Literal["random"]
    trace: TraceFile


class LoadStage(_Strict):
    rate: Annotated[float, Field(gt=0)]
    duration: Annotated[int, Field(gt=0)]


class Load(_Strict):
    type: Literal["trace_replay"]
    trace: TraceFile
    stages: Annotated[list[LoadStage], Field(min_length=1, max_length=1)]
    worker_max_concurrency: int
    request_timeout: float
    base_seed: int


class PerRequestFields(_Strict):
    request: Literal[False]
    response: Literal[False]
    response_chunks: Literal[False]


class RequestLifecycle(_Strict):
    summary: Literal[False]
    per_stage: Literal[True]
    per_request: Literal[True]
    per_request_fields: PerRequestFields
    use_server_output_tokens: Literal[True]


class Report(_Strict):
    request_lifecycle: RequestLifecycle
    prometheus: None


class LocalStorage(_Strict):
    path: str


class Storage(_Strict):
    local_storage: LocalStorage


class Config(_Strict):
    api: Api
    server: Server
    tokenizer: Tokenizer
    data: Data
    load: Load
    report: Report
    storage: Storage


def main(*words: str) -> int:
    match words:
        case ("inference-perf", "--config_file", path):
            return make_load(path)
        case ("python", "-m", "http.server", "--directory", folder, _):
            serve(folder)
            return 0
    print(f'exec: "{" ".join(words)}": not in this image', file=sys.stderr)
    return 127


def make_load(path: str) -> int:
    try:
        config = Config.model_validate(yaml.safe_load(on_this_machine(path).read_text(encoding="utf-8")))
        find_tokenizer(config.tokenizer.pretrained_model_name_or_path)
    except (OSError, ValidationError, requests.RequestException) as error:
        print(f"Traceback (most recent call last):\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"Using configuration from: {path}", flush=True)
    requests_report, delays = asyncio.run(Stage(config).run())
    folder = on_this_machine(config.storage.local_storage.path)
    for name, content in (
        ("stage_0_lifecycle_metrics", {"load_summary": {"schedule_delay": summary(delays)}}),
        ("per_request_lifecycle_metrics", requests_report),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        print(f"Report saved to: {config.storage.local_storage.path}/{name}.json", flush=True)
    return 0


def serve(folder: str) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(on_this_machine(folder)))
    port = int(os.environ["SANDBOX_HOST_PORT"])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


def on_this_machine(path: str) -> Path:
    """Where the container's path lies here; the longest mount decides."""
    mounts: dict[str, str] = json.loads(os.environ["SANDBOX_MOUNTS"])
    for mounted in sorted(mounts, key=len, reverse=True):
        if path == mounted or path.startswith(f"{mounted}/"):
            return Path(mounts[mounted]) / path[len(mounted) :].lstrip("/")
    return Path(path)


def service_address(url: str) -> str:
    """The URL with a Service's cluster name replaced by the address that stands for it here."""
    addresses: dict[str, str] = json.loads(os.environ["SANDBOX_SERVICES"])
    for name, address in addresses.items():
        url = url.replace(f"//{name}", f"//{address}")
    return url


def find_tokenizer(repository: str) -> None:
    """As transformers would: the hub must hold one that the token may read. Raises requests.RequestException."""
    token = os.environ.get("HF_TOKEN")
    url = f"{os.environ['HF_ENDPOINT']}/{repository}/resolve/main/tokenizer_config.json"
    requests.get(url, headers={"Authorization": f"Bearer {token}"} if token else {}, timeout=30).raise_for_status()


@dataclass(frozen=True)
class TracedRequest:
    at_s: float
    """After the first one."""
    prompt_words: int
    output_tokens: int


def read_trace(path: Path) -> list[TracedRequest]:
    """TIMESTAMP,ContextTokens,GeneratedTokens; times count from the first row's. ValueError if a row is none."""
    rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))[1:]
    begin = datetime.fromisoformat(rows[0][0])
    return [
        TracedRequest((datetime.fromisoformat(at) - begin).total_seconds(), int(prompt), int(output))
        for at, prompt, output in rows
    ]


class Stage:
    """Sends one stage, open loop, and notes what happened to each request."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._trace = read_trace(on_this_machine(config.load.trace.file))
        self._words = random.Random(config.load.base_seed)
        self._url = service_address(config.server.base_url) + "/v1/completions"

    async def run(self) -> tuple[list[dict[str, Any]], list[float]]:
        """The entries of the report, and how late each request was sent, in seconds."""
        timeout = aiohttp.ClientTimeout(total=self._config.load.request_timeout)
        connector = aiohttp.TCPConnector(limit=self._config.load.worker_max_concurrency)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            start = time.perf_counter() + LEAD_S
            sending: list[asyncio.Task[dict[str, Any]]] = []
            for request in self._trace:
                await asyncio.sleep(max(0.0, start + request.at_s - time.perf_counter()))
                sending.append(asyncio.create_task(self._send(session, request)))
            entries = await asyncio.gather(*sending)
        delays = [entry["start_time"] - start - each.at_s for entry, each in zip(entries, self._trace, strict=True)]
        return entries, delays

    async def _send(self, session: aiohttp.ClientSession, request: TracedRequest) -> dict[str, Any]:
        began = time.perf_counter()
        times: list[float] = []
        usage: dict[str, Any] = {}
        error: dict[str, str] | None = None
        try:
            async with session.post(self._url, json=self._body(request)) as response:
                if response.status != 200:
                    error = {"error_type": f"HTTP Error {response.status}", "error_msg": await response.text()}
                async for line in response.content:
                    if error is None and line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if event.get("choices"):
                            times.append(time.perf_counter())
                        usage = event.get("usage") or usage
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = {"error_type": type(failure).__name__, "error_msg": str(failure)}
        return {
            "start_time": began,
            "end_time": time.perf_counter(),
            "info": {
                "request_metrics": {"text": {"input_tokens": request.prompt_words}},
                "response_metrics": {
                    "output_tokens": len(times),
                    "server_usage": usage,
                    # The last piece may carry only the finish reason.
                    "output_token_times": times[: usage.get("completion_tokens", len(times))],
                },
            },
            "error": error,
        }

    def _body(self, request: TracedRequest) -> dict[str, Any]:
        return {
            "model": self._config.server.model_name,
            "prompt": " ".join(self._words.choices(_WORDS, k=max(1, request.prompt_words))),
            "max_tokens": request.output_tokens,
            "ignore_eos": self._config.server.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def summary(values: list[float]) -> dict[str, float]:
    """Statistics under the tool's own names."""
    p90, p95, p99 = (float(each) for each in np.percentile(values, (90, 95, 99)))
    mean, median = float(np.mean(values)), float(np.median(values))
    return {"mean": mean, "median": median, "p90": p90, "p95": p95, "p99": p99, "max": max(values)}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
