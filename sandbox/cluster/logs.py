"""A container's log: kept in memory for readers, and in a file for people."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from sandbox.cluster.store import micro_timestamp

KEPT_LINES = 50_000
"""vLLM writes some hundred lines at start and one per request; a container runtime rotates at 10 MiB."""


@dataclass(frozen=True)
class Line:
    time: str
    text: bytes
    """With its line end."""


class ContainerLog:
    """What one run of a container wrote to stdout and stderr, with the time of each line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.closed = False
        self._file = path.open("ab", buffering=0)
        self._lines: deque[Line] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._changed = asyncio.Event()

    def append(self, text: bytes) -> None:
        self._file.write(text)
        self._lines.append(Line(micro_timestamp(), text))
        self._count += 1
        self._wake()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._file.close()
            self._wake()

    def lines(self) -> list[Line]:
        return list(self._lines)

    def end(self) -> int:
        """The position after the last line."""
        return self._count

    def lines_from(self, position: int) -> list[Line]:
        newest_first = itertools.islice(reversed(self._lines), max(0, self._count - position))
        return list(newest_first)[::-1]

    def tail(self, max_bytes: int, max_lines: int) -> str:
        """The last lines, as `FallbackToLogsOnError` puts them into a container's termination message."""
        text = b"".join(line.text for line in list(self._lines)[-max_lines:])
        return text[-max_bytes:].decode(errors="replace").strip()

    async def wait_beyond(self, position: int) -> None:
        """Until there are lines after `position`, or the log is closed."""
        while self._count <= position and not self.closed:
            changed = self._changed
            await changed.wait()

    async def read(self, stream: asyncio.StreamReader) -> None:
        """Copy a process' output into the log until it ends; a line longer than the buffer is cut into several."""
        while True:
            try:
                text = await stream.readuntil(b"\n")
            except asyncio.IncompleteReadError as rest:
                if rest.partial:
                    self.append(rest.partial)
                return
            except asyncio.LimitOverrunError as overrun:
                text = await stream.readexactly(overrun.consumed)
            self.append(text)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
