"""From the arguments to a loaded model: the work, the time it takes, and the log that vLLM writes about it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rollout.vllm_flags import VLLM_VERSION
from sandbox.engine import memory
from sandbox.engine.args import ServeArguments
from sandbox.engine.latency import EngineParameters, latency_settings
from sandbox.engine.weights import Checkpoint, ConfigError, LoadError, check_shards, open_source, read_checkpoint

DEFAULT_LOAD_BYTES_PER_S = 270e6
"""The rehearsal's 269 MB load in one second. Real ones: 0.2 to 2 GB/s from Cloud Storage, more from local SSD."""

GRAPH_CAPTURE_SECONDS = 0.2
"""Profiling and capturing CUDA graphs; 20 to 60 s on a real GPU."""


class StartupFailed(Exception):
    """The engine cannot start; its log says why. The container's exit code is 1."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to serve."""

    checkpoint: Checkpoint
    parameters: EngineParameters
    memory: memory.MemoryPlan
    max_model_len: int


class Log:
    """Lines in vLLM's format, on standard output at once."""

    def __init__(self, write: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self.write = write
        self._pid = os.getpid()

    def api_server(self, where: str, message: str, level: str = "INFO") -> None:
        self._prefixed("APIServer", self._pid, where, message, level)

    def engine_core(self, where: str, message: str, level: str = "INFO") -> None:
        self._prefixed("EngineCore", self._pid + 1, where, message, level)

    def worker(self, where: str, message: str, level: str = "INFO") -> None:
        self._prefixed("Worker", self._pid + 2, where, message, level)

    def _prefixed(self, process: str, pid: int, where: str, message: str, level: str) -> None:
        stamp = time.strftime("%m-%d %H:%M:%S")
        for line in message.split("\n"):
            self.write(f"({process} pid={pid}) {level} {stamp} [{where}] {line}")


async def load(arguments: ServeArguments, environment: Mapping[str, str], log: Log) -> Loaded:
    """Read the checkpoint, take the time that loading takes, and log both. Raises StartupFailed, after its log."""
    _log_banner(arguments, log)
    try:
        source = open_source(arguments.model, environment)
        checkpoint = read_checkpoint(source)
        model_len = memory.max_model_len(checkpoint, arguments.max_model_len, environment)
    except ConfigError as error:
        log.write(_API_SERVER_TRACEBACK + str(error))
        raise StartupFailed(str(error)) from error
    except LoadError as error:
        _log_worker_failure(str(error), log)
        raise StartupFailed(str(error)) from error
    architectures = checkpoint.config.get("architectures") or [checkpoint.config["model_type"]]
    log.api_server("model.py:733", f"Resolved architecture: {architectures[0]}")
    log.api_server("model.py:2152", f"Using max model len {model_len}")
    if arguments.enforce_eager:
        log.api_server(
            "vllm.py:1703", "Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", "WARNING"
        )
    log.engine_core(
        "core.py:133", f"Initializing a V1 LLM engine (v{VLLM_VERSION}) with config: model='{checkpoint.path}'"
    )
    try:
        check_shards(source, checkpoint)
        plan = memory.plan_memory(
            checkpoint,
            accelerator=environment.get("SANDBOX_GPU") or memory.DEFAULT_ACCELERATOR,
            tensor_parallel_size=_gpus(arguments, environment),
            gpu_memory_utilization=arguments.gpu_memory_utilization,
            model_len=model_len,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            kv_cache_dtype=arguments.kv_cache_dtype,
        )
        await _load_shards(checkpoint, environment, log)
    except LoadError as error:
        _log_worker_failure(str(error), log)
        raise StartupFailed(str(error)) from error
    parameters = _engine_parameters(arguments, environment, plan)
    _log_capacity(plan, parameters, model_len, log)
    if not arguments.enforce_eager:
        await asyncio.sleep(GRAPH_CAPTURE_SECONDS)
        log.worker(
            "gpu_model_runner.py:6582", f"Graph capturing finished in {GRAPH_CAPTURE_SECONDS:.0f} secs, took 0.45 GiB"
        )
    log.engine_core(
        "core.py:402",
        f"init engine (profile, create kv cache, warmup model) took {GRAPH_CAPTURE_SECONDS:.2f} s",
    )
    return Loaded(checkpoint, parameters, plan, model_len)


def _gpus(arguments: ServeArguments, environment: Mapping[str, str]) -> int:
    wanted = arguments.tensor_parallel_size
    available = int(environment.get("SANDBOX_GPU_COUNT") or wanted)
    if wanted > available:
        raise LoadError(
            f"RuntimeError: World size ({wanted}) is larger than the number of available GPUs ({available}) in this"
            " node. If this is intentional and you are using a multi-node setup, use the Ray backend."
        )
    return wanted


async def _load_shards(checkpoint: Checkpoint, environment: Mapping[str, str], log: Log) -> None:
    log.worker("gpu_model_runner.py:5080", f"Starting to load model {checkpoint.path}...")
    rate = float(environment.get("SANDBOX_ENGINE_LOAD_BYTES_PER_S") or DEFAULT_LOAD_BYTES_PER_S)
    started = time.monotonic()
    count = len(checkpoint.shards)
    log.write(f"Loading safetensors checkpoint shards:   0% Completed | 0/{count} [00:00<?, ?it/s]")
    for done, size in enumerate(checkpoint.shards.values(), start=1):
        await asyncio.sleep(size / rate)
        elapsed = time.monotonic() - started
        log.write(
            f"Loading safetensors checkpoint shards: {done * 100 // count:3d}% Completed | {done}/{count}"
            f" [{_clock(elapsed)}<{_clock(elapsed / done * (count - done))}, {done / max(elapsed, 1e-3):5.2f}it/s]"
        )
    elapsed = time.monotonic() - started
    log.write("")
    log.worker("default_loader.py:501", f"Loading weights took {elapsed:.2f} seconds")
    gib = checkpoint.weight_bytes / memory.GIB
    log.worker("gpu_model_runner.py:5150", f"Model loading took {gib:.2f} GiB memory and {elapsed:.6f} seconds")


def _engine_parameters(
    arguments: ServeArguments, environment: Mapping[str, str], plan: memory.MemoryPlan
) -> EngineParameters:
    try:
        settings = latency_settings(environment.get("SANDBOX_ENGINE_LATENCY"))
    except (ValueError, TypeError) as error:
        raise StartupFailed(f"SANDBOX_ENGINE_LATENCY: {error}") from error
    tokens = settings.kv_cache_tokens or plan.kv_cache_tokens
    if arguments.num_gpu_blocks_override is not None:
        tokens = arguments.num_gpu_blocks_override * arguments.block_size
    return EngineParameters(
        latency=settings.latency,
        max_num_seqs=min(arguments.max_num_seqs, settings.max_num_seqs or arguments.max_num_seqs),
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        kv_cache_tokens=tokens,
        block_size=arguments.block_size,
        prefix_caching=arguments.enable_prefix_caching,
    )


def _log_banner(arguments: ServeArguments, log: Log) -> None:
    for line in (
        "",
        "       █     █     █▄   ▄█",
        f" ▄▄ ▄█ █     █     █ ▀▄▀ █  version {VLLM_VERSION}",
        f"  █▄█▀ █     █     █     █  model   {arguments.model}",
        "   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀",
        "",
    ):
        log.api_server("api_utils.py:347", line)
    log.api_server("api_utils.py:286", f"non-default args: {arguments.given}")


def _log_capacity(plan: memory.MemoryPlan, parameters: EngineParameters, model_len: int, log: Log) -> None:
    log.worker("gpu_worker.py:455", f"Available KV cache memory: {plan.kv_cache_bytes / memory.GIB:.2f} GiB")
    tokens = parameters.kv_cache_tokens
    concurrency = plan.max_concurrency if tokens == plan.kv_cache_tokens else tokens / model_len
    log.engine_core(
        "kv_cache_utils.py:2327",
        f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for {model_len:,} tokens per request:"
        f" {concurrency:.2f}x",
    )


def cache_config_labels(loaded: Loaded, arguments: ServeArguments) -> dict[str, str]:
    """The labels of `vllm:cache_config_info` that anybody reads."""
    parameters = loaded.parameters
    return {
        "block_size": str(parameters.block_size),
        "cache_dtype": arguments.kv_cache_dtype,
        "enable_prefix_caching": str(parameters.prefix_caching),
        "gpu_memory_utilization": f"{arguments.gpu_memory_utilization:g}",
        "kv_cache_max_concurrency": f"{parameters.kv_cache_tokens / loaded.max_model_len:.2f}",
        "kv_cache_memory_bytes": str(loaded.memory.kv_cache_bytes),
        "kv_cache_size_tokens": str(parameters.kv_cache_tokens),
        "num_gpu_blocks": str(parameters.kv_blocks),
        "num_gpu_blocks_override": json.dumps(arguments.num_gpu_blocks_override).replace("null", "None"),
        "prefix_caching_hash_algo": "sha256",
    }


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def _log_worker_failure(message: str, log: Log) -> None:
    """What vLLM logs when a worker process dies: the cause there, then two processes that report each other's end."""
    log.worker("multiproc_executor.py:953", "WorkerProc failed to start.", "ERROR")
    log.worker("multiproc_executor.py:953", _WORKER_TRACEBACK + message, "ERROR")
    log.engine_core("core.py:1510", "EngineCore failed to start.", "ERROR")
    log.engine_core(
        "core.py:1510",
        "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for"
        " root cause.",
        "ERROR",
    )
    log.write(
        _API_SERVER_TRACEBACK
        + "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s):"
        " {'EngineCore': 1}"
    )


_API_SERVER_TRACEBACK = """Traceback (most recent call last):
  File "vllm/entrypoints/openai/api_server.py", line 59, in <module>
    main()
  File "vllm/entrypoints/launchers/api_server/entry.py", line 232, in main
    uvloop.run(run_server(args))
  File "vllm/entrypoints/launchers/api_server/entry.py", line 195, in run_server_worker
    async with build_async_engine_client(
"""

_WORKER_TRACEBACK = """Traceback (most recent call last):
  File "vllm/v1/executor/multiproc_executor.py", line 920, in worker_main
    worker = WorkerProc(*args, **kwargs)
  File "vllm/v1/executor/multiproc_executor.py", line 687, in __init__
    self.worker.load_model()
"""
