"""The built-in load generator: a sweep over an OpenAI-compatible endpoint, measured stage by stage.

Synchronous and single-threaded but for a thread that reads the server's `/metrics`. A sweep that was interrupted goes
on after its last finished stage: pass the stages that `on_stage` saw as `completed`.
"""

from __future__ import annotations

import json
import logging
import math
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import requests

from rollout.benchmark import (
    BenchmarkReport,
    BenchmarkSpec,
    Engine,
    Environment,
    PlannedStage,
    benchmark_report,
    next_stage,
)
from rollout.benchmark import (
    Endpoint as ApiEndpoint,
)
from rollout.clients.openai_api import OpenAiApi
from rollout.clients.streams import Endpoint, OutgoingRequest, StreamLoop, StreamsResult
from rollout.errors import BadInput, RolloutError
from rollout.objectives import Objectives
from rollout.prompts import Vocabulary, calibrate
from rollout.report import utc_now
from rollout.stage import (
    ClientSide,
    Percentiles,
    RequestLimits,
    Stage,
    parse_vllm_metrics,
    server_side,
    summarize,
)
from rollout.workload import PlannedRequest, Workload, planned_duration_s

log = logging.getLogger(__name__)

BUSY_SHARE_LIMIT = 0.85
"""From this share of the time on, the client's own queueing shows in every figure."""

SCHEDULE_DELAY_LIMIT_S = 0.05
"""90 % of the requests must leave this soon after they were due: a good server answers in about that time.

Not 99 %: a client that cannot keep up is late with most requests, a busy machine delays a few.
"""

METRICS_SAMPLES = 30
"""Samples of `/metrics` per stage; one costs the server about 2 ms."""

WARM_UP_REQUESTS = 3
"""Sent one after another before the first stage: lazy initialisation of the server is not its latency."""

WARM_UP_TOKENS = 16

_PATHS = {ApiEndpoint.COMPLETIONS: "/v1/completions", ApiEndpoint.CHAT: "/v1/chat/completions"}


class StageMeter(Protocol):
    """Whatever can measure a stage."""

    def measure(self, planned: PlannedStage, *, repeat: int = 0) -> Stage:
        """Offer `planned.rate_per_s` for `planned.duration_s` seconds; `repeat` draws the same load anew."""


def run_benchmark(
    base_url: str,
    spec: BenchmarkSpec,
    *,
    model: str,
    on_stage: Callable[[Stage], None] | None = None,
    objectives: Objectives | None = None,
    completed: Sequence[Stage] = (),
    environment: Environment | None = None,
    in_cluster: Callable[[BenchmarkSpec], StageMeter] | None = None,
) -> BenchmarkReport:
    """Sweep `base_url` (without `/v1`) as `spec` says, and judge the curve.

    `on_stage` is called after every stage; `completed` are the stages of an earlier run of the same spec, which are
    not measured again. `objectives` define goodput. `in_cluster` makes what measures when `spec.engine` says so, from
    the spec as the model's context window cuts it. Raises SmokeFailed if the endpoint does not answer, and BadInput if
    it does not serve `model`, or if only a cluster could run that engine.
    """
    if spec.engine is Engine.INFERENCE_PERF and in_cluster is None:
        raise BadInput(
            "inference-perf runs as a Job beside the model, and there is only a URL.",
            where="benchmark.engine",
            resolution="Use the built-in engine here, or llm-rollout verify with a target.",
        )
    started_at, started = utc_now(), time.monotonic()
    api = OpenAiApi(base_url)
    context_window = api.max_model_len(model)
    if context_window is not None:
        spec = spec.model_copy(update={"workload": spec.workload.with_limit(context_window)})
    # Asked before the load, which a server may not survive.
    environment = environment or Environment(model=model, server_version=api.version())
    stages = list(completed)
    planned, salt = next_stage(spec, stages), ""
    if planned is not None:
        generator = LoadGenerator(api, model, spec, limits=objectives.request_limits if objectives else None)
        generator.warm_up()
        salt = generator.salt if spec.engine is Engine.BUILTIN else ""
        meter = in_cluster(spec) if spec.engine is Engine.INFERENCE_PERF and in_cluster else generator
        while planned is not None:
            stage = meter.measure(planned, repeat=len(stages))
            stages.append(stage)
            log.info("%s", describe(stage))
            if on_stage is not None:
                on_stage(stage)
            planned = next_stage(spec, stages)
    return benchmark_report(
        spec,
        environment,
        stages,
        started_at=started_at,
        duration_s=time.monotonic() - started,
        prompt_salt=salt,
    )


class LoadGenerator:
    """Measures single stages; knows how to write prompts that the model counts as planned."""

    def __init__(self, api: OpenAiApi, model: str, spec: BenchmarkSpec, *, limits: RequestLimits | None = None) -> None:
        self._api = api
        self._model = model
        self._spec = spec
        self._limits = limits
        self._endpoint = Endpoint(api.base_url + _PATHS[spec.endpoint])
        self._vocabulary: Vocabulary | None = None
        # A second run must not find the first one's prompts in the prefix cache.
        self.salt = spec.prompt_salt or secrets.token_hex(8)

    @property
    def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            chat = self._spec.endpoint is ApiEndpoint.CHAT
            self._vocabulary = calibrate(lambda text: self._api.count_tokens(self._model, text, chat=chat))
        return self._vocabulary

    def warm_up(self) -> None:
        """A few requests that nobody measures. Raises RolloutError if none of them is answered."""
        sample = self._spec.workload.schedule(1.0, float(WARM_UP_REQUESTS))
        short = [replace(request, output_tokens=min(request.output_tokens, WARM_UP_TOKENS)) for request in sample]
        outgoing = self._outgoing(short, f"{self.salt}-warm-up")
        loop = StreamLoop(self._endpoint, self._spec.request_timeout_s, self._spec.request_timeout_s)
        for request in outgoing:
            record = loop.run([replace(request, at_s=0.0)], duration_s=0.0).records[0]
            if record.failure is not None:
                raise RolloutError(
                    f"the endpoint does not answer a benchmark request: {record.detail}",
                    where=self._api.base_url,
                    resolution="Run the smoke suite: it tells what works and what does not.",
                )

    def measure(self, planned: PlannedStage, *, repeat: int = 0) -> Stage:
        """Offer `planned.rate_per_s` for `planned.duration_s` seconds and wait for the answers."""
        duration_s = planned_duration_s(planned.rate_per_s, planned.duration_s)
        with MetricsScraper(self._api.base_url, interval_s=max(0.25, duration_s / METRICS_SAMPLES)) as scraper:
            result = self.offer(planned, repeat=repeat)
        return summarize(
            result.records,
            duration_s=duration_s,
            limits=self._limits,
            server=server_side([parse_vllm_metrics(text) for text in scraper.samples]),
            client=client_side(result),
        )

    def offer(self, planned: PlannedStage, *, repeat: int = 0) -> StreamsResult:
        """A stage's requests and what happened to each."""
        schedule = self._spec.workload.schedule(planned.rate_per_s, planned.duration_s, repeat=repeat)
        outgoing = self._outgoing(schedule, f"{self.salt}-{repeat}")
        loop = StreamLoop(self._endpoint, self._spec.request_timeout_s, self._spec.drain_timeout_s)
        return loop.run(outgoing, duration_s=planned_duration_s(planned.rate_per_s, planned.duration_s))

    def _outgoing(self, schedule: Sequence[PlannedRequest], salt: str) -> list[OutgoingRequest]:
        prefixes = self._prefixes(self._spec.workload)
        source = random.Random(salt)
        return [
            OutgoingRequest(
                at_s=request.at_s,
                body=json.dumps(self._body(self._text(request, source, prefixes), request.output_tokens)).encode(),
                input_tokens=request.input_tokens,
                output_tokens=request.output_tokens,
            )
            for request in schedule
        ]

    def _prefixes(self, workload: Workload) -> list[list[str]]:
        shared = workload.shared_prefix
        if shared is None:
            return []
        return [
            self.vocabulary.prefix(shared.tokens, random.Random(f"{self.salt}-prefix-{group}"))
            for group in range(shared.groups)
        ]

    def _text(self, request: PlannedRequest, source: random.Random, prefixes: Sequence[Sequence[str]]) -> str:
        if request.prompt is not None:
            return request.prompt
        prefix = prefixes[request.prefix_group] if request.prefix_group is not None else ()
        return self.vocabulary.prompt(request.input_tokens, source, prefix_words=prefix)

    def _body(self, text: str, output_tokens: int) -> dict[str, Any]:
        prompt: dict[str, Any] = (
            {"messages": [{"role": "user", "content": text}]}
            if self._spec.endpoint is ApiEndpoint.CHAT
            else {"prompt": text}
        )
        return {
            "model": self._model,
            **prompt,
            "max_tokens": output_tokens,
            # vLLM's way to an exact answer length.
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def client_side(result: StreamsResult) -> ClientSide:
    """What the load generator has to say about itself, and whether it was the limit."""
    delays = Percentiles.of(record.sent_s - record.scheduled_s for record in result.records)
    assert delays is not None  # a stage has at least one request
    tokens = sum(record.output_tokens for record in result.records)
    reasons = []
    if result.out_of_files:
        reasons.append("it ran out of file descriptors (raise `ulimit -n`)")
    if result.busy_share >= BUSY_SHARE_LIMIT:
        reasons.append(f"its loop was {result.busy_share:.0%} busy")
    if delays.p90 > SCHEDULE_DELAY_LIMIT_S:
        reasons.append(f"it sent requests {delays.p90 * 1e3:.0f} ms late (p90)")
    return ClientSide(
        schedule_delay_s=delays,
        busy_share=result.busy_share,
        cpu_s_per_million_tokens=result.cpu_s / tokens * 1e6 if tokens else None,
        limited_by=" and ".join(reasons) or None,
    )


class MetricsScraper:
    """Reads `/metrics` in a thread of its own while a stage runs; parsing waits until afterwards.

    A server without metrics, or one too busy to answer, gives no samples; that is not an error of the stage.
    """

    def __init__(self, base_url: str, *, interval_s: float) -> None:
        self.samples: list[str] = []
        self._url = f"{base_url}/metrics"
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._scrape, name="metrics", daemon=True)

    def __enter__(self) -> MetricsScraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _scrape(self) -> None:
        with requests.Session() as session:
            stopping, wait_s = False, 0.0
            while not stopping:
                stopping = self._stopping.wait(wait_s)
                wait_s = self._interval_s
                try:
                    answer = session.get(self._url, timeout=10)
                except requests.RequestException as error:
                    log.debug("no metrics from %s: %s", self._url, error)
                    continue
                if answer.status_code in (401, 403, 404, 405, 501):
                    return
                if answer.ok:
                    self.samples.append(answer.text)


def describe(stage: Stage) -> str:
    """One line for logs."""

    def ms(value: float | None) -> str:
        return "–" if value is None or math.isnan(value) else f"{value * 1e3:.0f} ms"

    return (
        f"{stage.rate_per_s:.3g} requests/s: {stage.output_tokens_per_s:.0f} of"
        f" {stage.offered_output_tokens_per_s:.0f} output tokens/s,"
        f" TTFT p50 {ms(stage.ttft_s.p50 if stage.ttft_s else None)},"
        f" ITL p50 {ms(stage.itl_s.p50 if stage.itl_s else None)},"
        f" {stage.completed}/{stage.requests} completed"
    )
