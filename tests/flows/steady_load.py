"""Clients that never stop asking: what a delivery must not be noticed by."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Self

import requests

LONGEST_PAUSE_S = 0.05


class SteadyLoad:
    """Concurrent streams of short answers, one after another on every client, until the block ends."""

    def __init__(self, url: str, model: str, *, clients: int = 3, output_tokens: Sequence[int] = (8, 8, 60)) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number, tokens), daemon=True)
            for number, tokens in zip(range(clients), output_tokens, strict=True)
        ]
        self.completed = 0
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int, output_tokens: int) -> None:
        count = 0
        while not self._stopping.is_set():
            count += 1
            failure = self._one(f"client {number} asks for the {count}th time", output_tokens)
            with self._lock:
                if failure:
                    self.failures.append(failure)
                else:
                    self.completed += 1
            time.sleep(LONGEST_PAUSE_S)

    def _one(self, prompt: str, output_tokens: int) -> str:
        """What went wrong; empty for a whole answer with every token."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with requests.post(self._url, json=body, stream=True, timeout=60) as answer:
                if answer.status_code != 200:
                    return f"{answer.status_code}: {answer.text[:200]}"
                events = [line for line in answer.iter_lines() if line.startswith(b"data:")]
        except requests.RequestException as error:
            return f"{type(error).__name__}: {error}"
        if not events or events[-1] != b"data: [DONE]":
            return f"cut after {len(events)} events"
        return ""
