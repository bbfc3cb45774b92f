"""The running engine: one step clock for all sequences, their tokens handed out at the end of each step.

The clock is the planned one: a step begins when the one before it was due to end, so late wake-ups of the event loop
(up to 1 ms with epoll, many on a loaded machine) do not add up, as a GPU goes on while its API server is held up. Only
when the process is behind by more than `MAX_LAG_S` does the clock start again from the present. When each token was
really written is in the truth file.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from io import TextIOBase
from time import monotonic
from typing import Protocol

from sandbox.engine.latency import EngineParameters, Scheduler, Sequence, Step
from sandbox.engine.metrics import EngineMetrics

MAX_LAG_S = 0.25
"""Longest delay that the step clock makes up for; 250 ms: a few time slices of a machine with all cores busy."""


class Sink(Protocol):
    """Where a request's tokens go."""

    def token(self, index: int) -> None:
        """The token `index` (from 0) was generated now."""


@dataclass(slots=True, eq=False)
class EngineRequest:
    """A sequence with its sink and its times (`time.monotonic`, in seconds)."""

    request_id: str
    sequence: Sequence
    sink: Sink
    finish_reason: str
    max_tokens: int
    received_s: float
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    """When each token was handed to the sink; only with a truth file."""


class Engine:
    """Runs sequences on the event loop that it is used from."""

    def __init__(self, parameters: EngineParameters, metrics: EngineMetrics, truth: TextIOBase | None = None) -> None:
        self.scheduler = Scheduler(parameters)
        self.metrics = metrics
        self._truth = truth
        self._requests: dict[Sequence, EngineRequest] = {}
        self._step_due_s = 0.0
        self._stepping = False

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its tokens go to its sink. ValueError when it could never fit in the KV cache."""
        self.scheduler.add(request.sequence)
        self._requests[request.sequence] = request
        if not self._stepping:
            self._begin_step(monotonic())

    def abort(self, request: EngineRequest) -> None:
        """The client went away: free what the request holds."""
        if self._requests.pop(request.sequence, None) is None:
            return
        self.scheduler.abort(request.sequence)
        self.metrics.finished["abort"] += 1
        self._refresh_gauges()

    async def drain(self) -> None:
        """Return when no request is left."""
        while self._requests:
            await asyncio.sleep(0.01)

    def _begin_step(self, now_s: float) -> None:
        step = self.scheduler.begin_step()
        if step is None:
            self._stepping = False
            self._refresh_gauges()
            return
        self._stepping = True
        for sequence in step.admitted:
            self._requests[sequence].scheduled_s = now_s
        self.metrics.iteration_tokens.observe(step.tokens)
        self._refresh_gauges()
        self._step_due_s = now_s + step.duration_s
        # asyncio's clock is time.monotonic.
        asyncio.get_running_loop().call_at(self._step_due_s, self._end_step, step)

    def _end_step(self, step: Step) -> None:
        emitted = self.scheduler.end_step(step)
        due_s = self._step_due_s
        now_s = monotonic()
        # The next step runs while the answers of this one are written, as on a GPU.
        self._begin_step(due_s if now_s - due_s < MAX_LAG_S else now_s)
        requests = self._requests
        truth = self._truth is not None
        self.metrics.generation_tokens += len(emitted)
        interval_s = 0.0
        intervals = 0
        for sequence in emitted:
            request = requests[sequence]
            index = sequence.generated - 1
            if truth:
                request.token_times_s.append(monotonic())
            if index == 0:
                request.first_token_s = due_s
                self._first_token(request)
            elif due_s - request.last_token_s == interval_s:
                intervals += 1  # nearly all sequences share the step's interval: count them, observe once
            else:
                self.metrics.inter_token_latency.observe(interval_s, intervals)
                interval_s, intervals = due_s - request.last_token_s, 1
            request.last_token_s = due_s
            request.sink.token(index)
            if sequence.finished and requests.pop(sequence, None) is not None:
                self._finish(request)
        self.metrics.inter_token_latency.observe(interval_s, intervals)

    def _first_token(self, request: EngineRequest) -> None:
        metrics, sequence = self.metrics, request.sequence
        metrics.prompt_tokens += sequence.prompt_tokens
        metrics.cached_prompt_tokens += sequence.cached_tokens
        metrics.time_to_first_token.observe(request.first_token_s - request.received_s)

    def _finish(self, request: EngineRequest) -> None:
        metrics, sequence = self.metrics, request.sequence
        metrics.finished[request.finish_reason] += 1
        metrics.request_prompt_tokens.observe(sequence.prompt_tokens)
        metrics.request_generation_tokens.observe(sequence.generated)
        metrics.request_max_num_generation_tokens.observe(sequence.generated)
        metrics.request_params_n.observe(1)
        metrics.request_params_max_tokens.observe(request.max_tokens)
        decode_s = request.last_token_s - request.first_token_s
        metrics.e2e.observe(request.last_token_s - request.received_s)
        metrics.queue_time.observe(max(0.0, request.scheduled_s - request.received_s))
        metrics.inference_time.observe(request.last_token_s - request.scheduled_s)
        metrics.prefill_time.observe(request.first_token_s - request.scheduled_s)
        metrics.decode_time.observe(decode_s)
        metrics.time_per_output_token.observe(decode_s / max(1, sequence.generated - 1))
        metrics.request_preemptions.observe(sequence.preemptions)
        metrics.prefill_kv_computed_tokens.observe(sequence.prompt_tokens - sequence.cached_tokens)
        if self._truth is not None:
            record = {
                "id": request.request_id,
                "prompt_tokens": sequence.prompt_tokens,
                "cached_tokens": sequence.cached_tokens,
                "output_tokens": sequence.generated,
                "preemptions": sequence.preemptions,
                "received_s": request.received_s,
                "scheduled_s": request.scheduled_s,
                "token_s": request.token_times_s,
            }
            self._truth.write(json.dumps(record) + "\n")
            self._truth.flush()

    def _refresh_gauges(self) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        metrics.running = len(scheduler.running)
        metrics.waiting = len(scheduler.waiting)
        metrics.kv_cache_usage = scheduler.kv_cache_usage
        metrics.preemptions = scheduler.preemptions
        metrics.prefix_queries = scheduler.prefix_queried_tokens
        metrics.prefix_hits = scheduler.prefix_hit_tokens
