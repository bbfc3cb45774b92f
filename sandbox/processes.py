"""Child processes that never outlive their parent, whatever kills it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

_PR_SET_PDEATHSIG = 1
STOP_TIMEOUT_S = 20.0
"""Between SIGTERM and SIGKILL: a Prefect server needs a few seconds to close its database."""


class ChildFailed(RuntimeError):
    """A child process ended, or stayed silent, before it was ready; the message ends with the tail of its log."""


class Child:
    """A process with its own group and log file that ends with its parent: `stop()`, a closed stdin, the kernel."""

    def __init__(
        self, command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self._name = Path(command[0]).name if len(command) < 3 else " ".join(command[1:3])
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_handle = log.open("ab")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_handle,
            env=None if env is None else dict(env),
            cwd=cwd,
            preexec_fn=_new_group_dying_with_parent,
        )

    def ready_line(self, timeout_s: float) -> dict[str, Any]:
        """The first JSON line on the child's stdout, which says that it is ready. Later output goes to its log."""
        lines: queue.Queue[bytes] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(target=self._pump, args=(self.process.stdout, lines), daemon=True).start()
        try:
            line = lines.get(timeout=timeout_s)
        except queue.Empty:
            raise ChildFailed(f"{self._name} was not ready within {timeout_s:.0f} s: {self.log_tail()}") from None
        if not line:
            raise ChildFailed(f"{self._name} ended with code {self.process.wait()}: {self.log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def log_tail(self, characters: int = 2000) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-characters:]

    def stop(self) -> None:
        """End the child and its group: politely, then for good."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()
        self._signal(signal.SIGKILL)  # what the child itself left behind in its group
        self._log_handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _pump(self, stream: IO[bytes], lines: queue.Queue[bytes]) -> None:
        lines.put(stream.readline())
        for line in stream:
            if not self._log_handle.closed:
                self._log_handle.write(line)


def _new_group_dying_with_parent() -> None:
    os.setsid()
    die_with_parent(signal.SIGTERM)


def die_with_parent(number: signal.Signals) -> None:
    """For `preexec_fn`: let the kernel signal the new process when this one ends, however it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def wait_for_stop() -> None:
    """Block until SIGTERM, Ctrl-C or the end of stdin: how a stand-in's own process learns that it should end."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())

    def watch_stdin() -> None:
        with contextlib.suppress(OSError, ValueError):
            while sys.stdin.buffer.read(4096):
                pass
        stopping.set()

    threading.Thread(target=watch_stdin, daemon=True).start()
    stopping.wait()
