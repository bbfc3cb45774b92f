"""Just enough HTTP/1.1 for the engine, made by hand because a token must cost microseconds.

Keep-alive, Content-Length and chunked request bodies, `Expect: 100-continue`, chunked streaming answers. No TLS, no
pipelining of a second request before the first answer is complete (it waits), no trailers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from time import monotonic

MAX_HEAD_BYTES = 64 * 1024
MAX_BODY_BYTES = 64 * 2**20
"""64 MiB: a request with a large image as a data URI, with headroom."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    received_s: float
    """`time.monotonic` when the last byte of the request was read."""


Handler = Callable[[Request, "Connection"], None]
"""Answers a request through the connection, now or later."""


class Connection(asyncio.Protocol):
    """One client connection. The handler answers with `respond`, or with `start_stream` … `end_stream`."""

    def __init__(self, handler: Handler, connections: set[Connection]) -> None:
        self._handler = handler
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answering: Request | None = None
        self._continued = False
        self._close_after_answer = False
        self.on_disconnect: Callable[[], None] | None = None
        """Called when the client goes away before its answer is complete."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None
        if self.on_disconnect is not None:
            self.on_disconnect()
            self.on_disconnect = None

    @property
    def peer(self) -> str:
        name = self._transport.get_extra_info("peername") if self._transport else None
        return f"{name[0]}:{name[1]}" if name else "-"

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        self._next_request()

    def _next_request(self) -> None:
        while self._answering is None and self._buffer and self._transport is not None:
            try:
                request = self._parse()
            except ValueError as error:
                self._close_after_answer = True
                self.respond(HTTPStatus.BAD_REQUEST, str(error).encode(), content_type="text/plain; charset=utf-8")
                return
            if request is None:
                return
            self._answering = request
            self._close_after_answer = request.headers.get("connection", "").lower() == "close"
            self._handler(request, self)

    def _parse(self) -> Request | None:
        """Take one whole request off the buffer; None while some of it is missing."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise ValueError("Invalid HTTP request received.")
            return None
        lines = self._buffer[:end].decode("latin-1").split("\r\n")
        parts = lines[0].split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            raise ValueError("Invalid HTTP request received.")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
        }
        start = end + 4
        if headers.get("transfer-encoding", "").lower() == "chunked":
            chunked = _dechunk(self._buffer, start)
            if chunked is None:
                self._continue_if_expected(headers)
                return None
            body, consumed = chunked
        else:
            length = int(headers.get("content-length") or 0)
            if not 0 <= length <= MAX_BODY_BYTES:
                raise ValueError("Invalid HTTP request received.")
            consumed = start + length
            if len(self._buffer) < consumed:
                self._continue_if_expected(headers)
                return None
            body = self._buffer[start:consumed]
        self._buffer = self._buffer[consumed:]
        self._continued = False
        path, _, query = parts[1].partition("?")
        return Request(parts[0], path, query, headers, body, monotonic())

    def _continue_if_expected(self, headers: dict[str, str]) -> None:
        if headers.get("expect", "").lower() == "100-continue" and not self._continued and self._transport:
            self._continued = True
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def respond(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str | None = "application/json",
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """Send a whole answer."""
        kind = (("content-type", content_type),) if content_type else ()
        head = _head(status, (*headers, ("content-length", str(len(body))), *kind))
        if self._answering is not None and self._answering.method == "HEAD":
            body = b""
        self._write(head + body)
        self._answered()

    def start_stream(self) -> None:
        """Begin an answer of server-sent events."""
        content_type = ("content-type", "text/event-stream; charset=utf-8")
        self._write(_head(HTTPStatus.OK, (content_type, ("transfer-encoding", "chunked"))))

    def write_event(self, event: bytes) -> None:
        """Send one chunk of a stream."""
        if self._transport is not None:
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def end_stream(self) -> None:
        self._write(b"0\r\n\r\n")
        self._answered()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def _answered(self) -> None:
        self._answering = None
        self.on_disconnect = None
        if self._close_after_answer:
            self.close()
        elif self._buffer:
            # Not from here: a client that sends many requests at once must not nest our answers.
            asyncio.get_running_loop().call_soon(self._next_request)


def _head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    lines = [
        f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}",
        f"date: {formatdate(usegmt=True)}",
        "server: uvicorn",
        *(f"{name}: {value}" for name, value in headers),
        "vary: Origin",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _dechunk(buffer: bytes, start: int) -> tuple[bytes, int] | None:
    """The body of a chunked request and where it ends; None while some of it is missing."""
    parts: list[bytes] = []
    while True:
        line_end = buffer.find(b"\r\n", start)
        if line_end < 0:
            return None
        size = int(buffer[start:line_end].split(b";")[0], 16)
        if size > MAX_BODY_BYTES:
            raise ValueError("Invalid HTTP request received.")
        chunk_end = line_end + 2 + size + 2
        if len(buffer) < chunk_end:
            return None
        if size == 0:
            return b"".join(parts), chunk_end
        parts.append(buffer[line_end + 2 : line_end + 2 + size])
        start = chunk_end
