"""A link of limited speed on loopback: token buckets for asyncio, per connection and in total.

Shapes the bodies of one direction of one server; headers are free. It does not simulate loss, congestion control or
slow start: a shaped connection runs at its rate from the first byte.
"""

from __future__ import annotations

import asyncio
import re
import time
import weakref
from collections.abc import Callable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

_MAX_CHUNK_BYTES = 4 * 2**20
"""Unshaped: large enough that a chunk's overhead (≈0.1 ms) vanishes beside its copying (≈1 ms)."""
_MIN_CHUNK_BYTES = 16 * 2**10
_CHUNK_S = 0.02
"""Shaped: about 50 chunks a second, so that the rate is even at the scale on which people look at it."""


class Shape(BaseModel):
    """The limits of a link. A limit that is None does not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_s_per_connection: float | None = Field(default=None, gt=0)
    bytes_per_s_total: float | None = Field(default=None, gt=0)
    latency_s: float = Field(default=0.0, ge=0)
    """Waited once per request, before it is handled: the round trip."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `per-connection=50MB/s,total=200MB/s,latency=20ms`; every part may be left out.

        Raises:
            ValueError: a part that is none of these.
        """
        values: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            match name.strip():
                case "per-connection":
                    values["bytes_per_s_per_connection"] = _rate(value)
                case "total":
                    values["bytes_per_s_total"] = _rate(value)
                case "latency":
                    values["latency_s"] = _seconds(value)
                case unknown:
                    raise ValueError(f"unknown limit {unknown!r} in {text!r}: use per-connection, total, latency")
        return cls(**values)

    @property
    def chunk_bytes(self) -> int:
        """How much to send between two looks at the buckets."""
        rates = [rate for rate in (self.bytes_per_s_per_connection, self.bytes_per_s_total) if rate is not None]
        if not rates:
            return _MAX_CHUNK_BYTES
        return int(min(max(min(rates) * _CHUNK_S, _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES))


def _rate(text: str) -> float:
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*?)(/s)?\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a rate such as 50MB/s or 64MiB/s")
    return float(match[1]) * _UNITS[match[2].lower()]


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*([\d.]+)\s*(ms|s)\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 20ms or 0.5s")
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


class TokenBucket:
    """Reservations in order of arrival. Late wake-ups are made up for, so that the rate does not fall with the load of
    the machine; idle time is not saved up."""

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._booked_until = float("-inf")

    def reserve(self, count: int, *, late_s: float = 0.0) -> float:
        """Book `count` bytes; the seconds to wait until the last of them may be on its way.

        `late_s` is how much later than it was told the caller woke up: the link would have gone on meanwhile.
        """
        now = self._clock()
        self._booked_until = max(self._booked_until, now - late_s) + count / self._bytes_per_s
        return max(0.0, self._booked_until - now)


class Link:
    """One direction of one server's connections. Use it from one event loop only."""

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        total = self.shape.bytes_per_s_total
        self._total = None if total is None else TokenBucket(total)
        self._late_s: weakref.WeakKeyDictionary[asyncio.BaseTransport, float] = weakref.WeakKeyDictionary()
        self._connections: weakref.WeakKeyDictionary[asyncio.BaseTransport, TokenBucket] = weakref.WeakKeyDictionary()

    @property
    def chunk_bytes(self) -> int:
        return self.shape.chunk_bytes

    async def round_trip(self) -> None:
        """Wait as long as the link's latency."""
        if self.shape.latency_s > 0:
            await asyncio.sleep(self.shape.latency_s)

    async def passage(self, connection: asyncio.BaseTransport | None, count: int) -> None:
        """Wait until `count` bytes may pass over this connection."""
        late_s = 0.0 if connection is None else self._late_s.pop(connection, 0.0)
        delay_s = 0.0 if self._total is None else self._total.reserve(count, late_s=late_s)
        rate = self.shape.bytes_per_s_per_connection
        if rate is not None and connection is not None:
            bucket = self._connections.get(connection)
            if bucket is None:
                bucket = self._connections[connection] = TokenBucket(rate)
            delay_s = max(delay_s, bucket.reserve(count, late_s=late_s))
        if delay_s > 0:
            due = time.monotonic() + delay_s
            await asyncio.sleep(delay_s)
            if connection is not None:
                self._late_s[connection] = max(0.0, time.monotonic() - due)
