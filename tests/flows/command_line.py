"""`llm-rollout` (or `prefect`) as a process of its own, as users and CI run it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

DEADLINE_S = 240.0
"""For anything to happen: several times what a loaded machine takes."""

_POLL_S = 0.05


HERE = str(Path(sys.executable).parent)


def command(*arguments: str, program: str = "llm-rollout") -> list[str]:
    """A program beside this Python, else one of the system (`bash`)."""
    found = shutil.which(program, path=f"{HERE}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, f"there is no {program}"
    return [found, *arguments]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without its Prefect settings, and with the running test server, if there is one."""
    from prefect.settings import PREFECT_API_URL

    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTEST_"))}
    api_url = PREFECT_API_URL.value()
    return {**inherited, **({"PREFECT_API_URL": api_url} if api_url else {}), **changes}


def run(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, program: str = "llm-rollout"
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments, program=program),
        cwd=cwd,
        env=environment() if env is None else dict(env),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; fail if that takes too long even for a loaded machine."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {DEADLINE_S:.0f} s"
        time.sleep(_POLL_S)


class Session:
    """A command that runs in a session of its own until it ends or is ended; never outlives the `with` block."""

    def __init__(
        self, *arguments: str, log: Path, env: Mapping[str, str] | None = None, program: str = "llm-rollout"
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command(*arguments, program=program),
                env=environment() if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # As in a terminal, also where the tests run in the background of a shell, which ignores Ctrl-C.
                preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the command does; fail, with its output, if it ends without doing it."""

        def happened() -> bool:
            if condition():
                return True
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            return False

        wait_for(happened)

    def signal_group(self, number: signal.Signals) -> int:
        """Send a signal to the command and its process group, as a terminal does. Returns the exit code."""
        os.killpg(self.process.pid, number)
        return self.process.wait(DEADLINE_S)

    def signal_alone(self, number: signal.Signals) -> int:
        """Send a signal to the command and nobody else, as a CI runner does. Returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """`kill -9` of the command alone."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.signal_group(signal.SIGTERM)


def read_record(path: Path) -> dict[str, Any]:
    """The record as it is now; empty while there is none. It is replaced atomically, so it is never half of one."""
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
