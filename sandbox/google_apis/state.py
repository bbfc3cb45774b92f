"""What the embedded project holds: one JSON file, written atomically, shared by all APIs and threads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Store:
    """A JSON document behind a lock. A transaction that raises leaves no trace, in memory or on disk."""

    def __init__(self, path: Path, initial: dict[str, Any]) -> None:
        """Load `path` if it is there; sections that it lacks come from `initial`."""
        self._path = path
        self._lock = threading.RLock()
        self._depth = 0
        saved = json.loads(path.read_text()) if path.exists() else {}
        self.data: dict[str, Any] = json.loads(json.dumps(initial)) | saved

    @contextmanager
    def transaction(self) -> Iterator[dict[str, Any]]:
        """Exclusive access to the document; what changed is on disk when the block ends."""
        with self._lock:
            if self._depth:
                # An inner call (a handler that uses a helper) belongs to the outer transaction.
                yield self.data
                return
            before = json.dumps(self.data)
            self._depth += 1
            try:
                yield self.data
            except BaseException:
                self.data = json.loads(before)
                raise
            finally:
                self._depth -= 1
            if (after := json.dumps(self.data)) != before:
                self._write(after)

    def _write(self, text: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(text)
        os.replace(draft, self._path)  # noqa: PTH105 - atomic by contract, unlike what Path.rename promises on its name
