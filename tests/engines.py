"""Simulated engines as processes of their own, for the tests and benchmarks of verification."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import requests

from sandbox.models import tiny_model
from sandbox.processes import Child

REPOSITORY = Path(__file__).parents[1]
MODEL = "tiny"
START_TIMEOUT_S = 120.0
GEMMA_ARGUMENTS = (
    "--enable-auto-tool-choice",
    "--tool-call-parser=gemma4",
    "--reasoning-parser=gemma4",
    "--limit_mm_per_prompt.image=1",
)


def vllm_python() -> Path:
    """The python of the venv of real vLLM, which need not be there."""
    return Path(os.environ.get("LLM_ROLLOUT_VLLM_PYTHON") or REPOSITORY / ".venv-vllm" / "bin" / "python")


def has_vllm() -> bool:
    """Whether that venv is complete."""
    return (vllm_python().parent.parent / ".complete").is_file()


def checkpoint(folder: Path, *, gemma: bool = False, context_window: int = 8192) -> Path:
    """A tiny checkpoint whose tokenizer counts words; `gemma` makes it multimodal and able to think."""
    model = tiny_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": context_window}
    if gemma:
        config = {
            "model_type": "gemma4",
            "architectures": ["Gemma4ForConditionalGeneration"],
            "text_config": config,
            "vision_config": {},
            "mm_tokens_per_image": 20,
        }
    (model / "config.json").write_text(json.dumps(config))
    thinking = "{{ enable_thinking }}" if gemma else ""
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + thinking)
    return model


def real_vllm_python() -> Path:
    """The python of real vLLM's venv; skips the test where there is none."""
    if not has_vllm():
        pytest.skip(f"no venv of real vLLM at {vllm_python()}: make it with sandbox.engine.real_vllm.ensure_venv")
    return vllm_python()


@contextmanager
def simulated_engine(
    folder: Path,
    *arguments: str,
    gemma: bool = False,
    model: Path | None = None,
    latency: Mapping[str, Any] | str | None = None,
    truth: Path | None = None,
) -> Iterator[str]:
    """Base address of a healthy engine that serves `tiny` or a given checkpoint under that name.

    `latency` as in `SANDBOX_ENGINE_LATENCY`.
    """
    model = model or checkpoint(folder / "model", gemma=gemma)
    port = free_port()
    settings = {"SANDBOX_HOST_PORT": str(port)}
    if latency is not None:
        settings["SANDBOX_ENGINE_LATENCY"] = latency if isinstance(latency, str) else json.dumps(latency)
    if truth is not None:
        settings["SANDBOX_ENGINE_TRUTH"] = str(truth)
    parsers = GEMMA_ARGUMENTS if gemma else ()
    command = [sys.executable, "-m", "sandbox.engine", "serve", "vllm", "serve", str(model)]
    command += [f"--served-model-name={MODEL}", *parsers, *arguments]
    with Child(command, log=folder / "engine.log", env=os.environ | settings, cwd=REPOSITORY) as child:
        assert child.process.stdout is not None
        threading.Thread(target=_drain, args=(child.process.stdout, folder / "engine.out"), daemon=True).start()
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(child, url)
        yield url


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_until_healthy(child: Child, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.process.poll() is not None:
            raise AssertionError(f"the engine ended with {child.process.returncode}: {child.log_tail()}")
        try:
            if requests.get(f"{url}/health", timeout=10).status_code == 200:
                return
        except requests.ConnectionError:
            time.sleep(0.05)
    raise AssertionError(f"the engine did not become healthy: {child.log_tail()}")


def _drain(stream: IO[bytes], target: Path) -> None:
    with target.open("wb") as file:
        for line in stream:
            file.write(line)
