"""The rehearsal: the whole rollout on this machine, against the embedded cloud, with a real Prefect server.

Three acts, all of them the flows that production runs: roll out; roll out again, which must change nothing; tear down,
which must leave nothing. Only the target differs: its endpoints are on loopback.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rollout.errors import BadInput, RolloutError
from sandbox.processes import Child, ChildFailed, die_with_parent

CLOUD_READY_TIMEOUT_S = 900.0
"""The first start downloads a 98 MB wheel and converts its model; with real vLLM it also installs 3.5 GB."""
PREFECT_READY_TIMEOUT_S = 180.0
"""26 s on a fresh home of an idle machine; several times that when the machine is busy."""


def rehearse(out: Path, engine: str, *, ui: bool) -> int:
    """Run the three acts under `out`; with `ui` the Prefect server stays until Ctrl-C.

    `engine` is `simulated` (a vLLM with a known latency model) or `vllm` (real vLLM on the CPU: real answers).
    Returns the acts' exit code, as of `rollout.errors.ExitCode`.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    # The user's own token has no business with stand-ins, nor with what they install.
    os.environ.pop("HF_TOKEN", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone_in(out))
        target_file = out / "target.yaml"
        api_url = stack.enter_context(stage(out, target_file, engine))
        _say(f"embedded cloud and Prefect server are up after {time.monotonic() - started:.1f} s")
        # In a process of their own, so that Prefect hands in its last logs and events while the server is still there.
        acts = subprocess.run(
            [sys.executable, "-m", "flows.rehearsal_acts", str(out), str(target_file), engine],
            # SIGKILL: Prefect answers SIGTERM by asking its server, which is gone by then, for minutes.
            preexec_fn=functools.partial(die_with_parent, signal.SIGKILL),
            check=False,
        )
        _say(f"{time.monotonic() - started:.1f} s in all")
        if ui:
            stack.enter_context(front_door(out, target_file, engine))
            _say(f"the Prefect UI is at {api_url.removesuffix('/api')} until Ctrl-C: Deployments has a form for you")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    return acts.returncode


@contextlib.contextmanager
def stage(out: Path, target_file: Path, engine: str) -> Iterator[str]:
    """Embedded cloud and Prefect server under `out`, and the cloud's target in `target_file`; the server's API."""
    command = [sys.executable, "-m", "sandbox", "--engine", engine]
    command += ["--root", str(out / "cloud"), "--target", str(target_file)]
    with Child(command, log=out / "logs" / "cloud.log") as cloud, _prefect_server(out) as api_url:
        _require_ready(cloud)
        yield api_url


def front_door(out: Path, target_file: Path, engine: str) -> Child:
    """Deployments for the embedded cloud, and a worker for them."""
    command = [sys.executable, "-m", "flows.rehearsal_door", str(target_file), engine]
    return Child(command, log=out / "logs" / "worker.log")


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(
                "another rehearsal is running in this folder.",
                where=str(out),
                resolution="Wait for it, or give this one a folder of its own: llm-rollout rehearse --out FOLDER",
            ) from None
        yield


def _require_ready(cloud: Child) -> None:
    try:
        cloud.ready_line(CLOUD_READY_TIMEOUT_S)
    except ChildFailed as error:
        raise RolloutError(
            f"the embedded cloud did not start: {error}",
            where="rehearsal",
            resolution=f"The whole log is in {cloud.log}.",
        ) from error


@contextlib.contextmanager
def _prefect_server(out: Path) -> Iterator[str]:
    """A Prefect server with its database under `out`; this process and its children talk to it."""
    port = _free_port()
    api_url = f"http://127.0.0.1:{port}/api"
    os.environ |= {
        "PREFECT_HOME": str(out / "prefect"),
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": api_url,
    }
    prefect = shutil.which("prefect", path=str(Path(sys.executable).parent)) or "prefect"
    with Child(
        [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)], log=out / "logs" / "prefect.log"
    ) as server:
        deadline = time.monotonic() + PREFECT_READY_TIMEOUT_S
        while not _answers(f"{api_url}/health"):
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RolloutError(
                    "the Prefect server did not start.", where=str(server.log), resolution=server.log_tail()
                )
            time.sleep(0.2)
        yield api_url


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer) is True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(line: str) -> None:
    print(line, flush=True)
