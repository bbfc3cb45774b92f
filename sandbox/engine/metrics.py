"""`/metrics` as vLLM 0.32 shows it: the same names, labels, help texts and buckets.

Families that describe features which the simulated engine lacks (multi-modal cache, KV transfer, FLOP estimates) are
there and stay at zero, as they do in a vLLM that does not use them. The HTTP middleware's families are left out.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Mapping

_FAST_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
TTFT_BUCKETS = (*_FAST_SECONDS, 40.0, 80.0, 160.0, 640.0, 2560.0)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
ITERATION_BUCKETS = tuple(float(2**power) for power in (0, *range(3, 15)))
PREEMPTION_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
PARAMS_N_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0)


def token_count_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to the context window, as vLLM builds them."""
    buckets = [factor * 10**power for power in range(len(str(max_model_len))) for factor in (1, 2, 5)]
    return tuple(float(each) for each in buckets if each <= max_model_len)


class Histogram:
    """A Prometheus histogram; `count` lets many equal observations cost one."""

    def __init__(self, buckets: Iterable[float]) -> None:
        self.bounds = tuple(buckets)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count


class EngineMetrics:
    """All figures of one engine since it started."""

    def __init__(self, model_name: str, max_model_len: int, cache_config: Mapping[str, str]) -> None:
        self._labels = {"engine": "0", "model_name": model_name}
        self._cache_config = dict(cache_config)
        self._created = time.time()
        tokens = token_count_buckets(max_model_len)
        self.running = 0
        self.waiting = 0
        self.kv_cache_usage = 0.0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self.request_prompt_tokens = Histogram(tokens)
        self.request_generation_tokens = Histogram(tokens)
        self.iteration_tokens = Histogram(ITERATION_BUCKETS)
        self.request_max_num_generation_tokens = Histogram(tokens)
        self.request_params_n = Histogram(PARAMS_N_BUCKETS)
        self.request_params_max_tokens = Histogram(tokens)
        self.time_to_first_token = Histogram(TTFT_BUCKETS)
        self.inter_token_latency = Histogram(TOKEN_BUCKETS)
        self.time_per_output_token = Histogram(TOKEN_BUCKETS)
        self.e2e = Histogram(REQUEST_BUCKETS)
        self.queue_time = Histogram(REQUEST_BUCKETS)
        self.inference_time = Histogram(REQUEST_BUCKETS)
        self.prefill_time = Histogram(REQUEST_BUCKETS)
        self.decode_time = Histogram(REQUEST_BUCKETS)
        self.request_preemptions = Histogram(PREEMPTION_BUCKETS)
        self.prefill_kv_computed_tokens = Histogram(tokens)

    def render(self) -> str:
        """The text format that Prometheus scrapes."""
        lines: list[str] = []
        for name, help_text in _UNUSED_COUNTERS:
            self._counter(lines, name, help_text, {(): 0})
        self._gauge(lines, "num_requests_running", "Number of requests in model execution batches.", {(): self.running})
        self._gauge(lines, "num_requests_waiting", "Number of requests waiting to be processed.", {(): self.waiting})
        self._gauge(
            lines,
            "num_requests_waiting_by_reason",
            "Number of waiting requests by reason.",
            {(("reason", "capacity"),): self.waiting, (("reason", "deferred"),): 0},
        )
        states = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
        self._gauge(
            lines,
            "engine_sleep_state",
            "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake.",
            {(("sleep_state", state),): value for state, value in states.items()},
        )
        usage = "KV-cache usage. 1 means 100 percent usage."
        self._gauge(lines, "kv_cache_usage_perc", usage, {(): self.kv_cache_usage})
        for name, help_text, value in (
            (
                "prefix_cache_queries",
                "Prefix cache queries, in terms of number of queried tokens.",
                self.prefix_queries,
            ),
            ("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", self.prefix_hits),
            ("num_preemptions", "Cumulative number of preemption from the engine.", self.preemptions),
            ("prompt_tokens", "Number of prefill tokens processed.", self.prompt_tokens),
        ):
            self._counter(lines, name, help_text, {(): value})
        computed = self.prompt_tokens - self.cached_prompt_tokens
        by_source = {"local_compute": computed, "local_cache_hit": self.cached_prompt_tokens, "external_kv_transfer": 0}
        self._counter(
            lines,
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            {(("source", source),): value for source, value in by_source.items()},
        )
        cached = "Number of cached prompt tokens (local + external)."
        self._counter(lines, "prompt_tokens_cached", cached, {(): self.cached_prompt_tokens})
        self._counter(
            lines, "generation_tokens", "Number of generation tokens processed.", {(): self.generation_tokens}
        )
        self._counter(
            lines,
            "request_success",
            "Count of successfully processed requests.",
            {(("finished_reason", reason),): count for reason, count in self.finished.items()},
        )
        for name, help_text, histogram in self._histograms():
            self._histogram(lines, name, help_text, histogram)
        self._gauge(
            lines,
            "cache_config_info",
            "Information of the LLMEngine CacheConfig",
            {tuple(self._cache_config.items()): 1},
        )
        return "\n".join(lines) + "\n"

    def _histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        return (
            ("request_prompt_tokens", "Number of prefill tokens processed.", self.request_prompt_tokens),
            ("request_generation_tokens", "Number of generation tokens processed.", self.request_generation_tokens),
            ("iteration_tokens_total", "Histogram of number of tokens per engine_step.", self.iteration_tokens),
            (
                "request_max_num_generation_tokens",
                "Histogram of maximum number of requested generation tokens.",
                self.request_max_num_generation_tokens,
            ),
            ("request_params_n", "Histogram of the n request parameter.", self.request_params_n),
            (
                "request_params_max_tokens",
                "Histogram of the max_tokens request parameter.",
                self.request_params_max_tokens,
            ),
            (
                "time_to_first_token_seconds",
                "Histogram of time to first token in seconds.",
                self.time_to_first_token,
            ),
            ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", self.inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "Histogram of time_per_output_token_seconds per request.",
                self.time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.e2e),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", self.queue_time),
            (
                "request_inference_time_seconds",
                "Histogram of time spent in RUNNING phase for request.",
                self.inference_time,
            ),
            (
                "request_prefill_time_seconds",
                "Histogram of time spent in PREFILL phase for request.",
                self.prefill_time,
            ),
            (
                "request_decode_time_seconds",
                "Histogram of time spent in DECODE phase for request.",
                self.decode_time,
            ),
            (
                "request_num_preemptions",
                "Histogram of the number of times a request was preempted.",
                self.request_preemptions,
            ),
            (
                "request_prefill_kv_computed_tokens",
                "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
                self.prefill_kv_computed_tokens,
            ),
        )

    def _label_text(self, extra: tuple[tuple[str, str], ...]) -> str:
        labels = sorted((self._labels | dict(extra)).items())
        return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels) + "}"

    def _head(self, lines: list[str], name: str, help_text: str, kind: str) -> None:
        lines += [f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} {kind}"]

    def _gauge(self, lines: list[str], name: str, help_text: str, samples: _Samples) -> None:
        self._head(lines, name, help_text, "gauge")
        lines += [f"vllm:{name}{self._label_text(labels)} {float(value)}" for labels, value in samples.items()]

    def _counter(self, lines: list[str], name: str, help_text: str, samples: _Samples) -> None:
        self._head(lines, f"{name}_total", help_text, "counter")
        lines += [f"vllm:{name}_total{self._label_text(labels)} {float(value)}" for labels, value in samples.items()]
        self._head(lines, f"{name}_created", help_text, "gauge")
        lines += [f"vllm:{name}_created{self._label_text(labels)} {self._created!r}" for labels in samples]

    def _histogram(self, lines: list[str], name: str, help_text: str, histogram: Histogram) -> None:
        self._head(lines, name, help_text, "histogram")
        cumulative = 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            cumulative += count
            lines.append(f"vllm:{name}_bucket{self._label_text((('le', bound),))} {float(cumulative)}")
        labels = self._label_text(())
        lines.append(f"vllm:{name}_count{labels} {float(cumulative)}")
        lines.append(f"vllm:{name}_sum{labels} {float(histogram.sum)}")
        self._head(lines, f"{name}_created", help_text, "gauge")
        lines.append(f"vllm:{name}_created{labels} {self._created!r}")


_Samples = Mapping[tuple[tuple[str, str], ...], float]

_FLOPS_NOTE = "(for Model Flops Utilization calculations)."
_UNUSED_COUNTERS = (
    ("estimated_flops_per_gpu", f"Estimated number of floating point operations per GPU {_FLOPS_NOTE}"),
    ("estimated_read_bytes_per_gpu", f"Estimated number of bytes read from memory per GPU {_FLOPS_NOTE}"),
    ("estimated_write_bytes_per_gpu", f"Estimated number of bytes written to memory per GPU {_FLOPS_NOTE}"),
    ("external_prefix_cache_queries", "External prefix cache queries from KV connector cross-instance cache sharing."),
    ("external_prefix_cache_hits", "External prefix cache hits from KV connector cross-instance cache sharing."),
    ("mm_cache_queries", "Multi-modal cache queries, in terms of number of queried items."),
    ("mm_cache_hits", "Multi-modal cache hits, in terms of number of cached items."),
)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
