"""Many streamed answers at once, with little CPU and honest clocks: the inner loop of the load generator.

An HTTP/1.1 client for server-sent events on one selector and non-blocking sockets, instead of an asyncio stack: what a
load generator spends per token is what limits and distorts it. A read costs one `recv` and a few byte searches; JSON is
parsed once per answer, after its end. On Linux every piece is stamped with the time at which the kernel received it
(SO_TIMESTAMPNS), so that neither 500 simultaneous pieces nor a busy machine make the server look slower than it is;
elsewhere, and over TLS, with the time at which the selector reported it.

Understands what OpenAI-compatible servers send: chunked, length-delimited or close-delimited bodies, `data:` events,
the closing `usage` event. No redirects, no compression, no HTTP/2.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import platform
import resource
import selectors
import socket
import ssl
import struct
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rollout.errors import BadInput
from rollout.stage import FailureKind, RequestRecord

_READ_BYTES = 256 * 1024
_SWEEP_S = 0.25
"""How often timeouts are looked for."""
_CONNECT_TIMEOUT_S = 30.0
_SELECTOR_STEP_S = 0.001
"""`selectors` rounds a timeout up to whole milliseconds (epoll's unit): the last one before a request is slept."""
_SWITCH_S = 0.0005
"""Python's own 5 ms is what the whole schedule may be late."""

_SO_TIMESTAMPNS = 35
"""asm-generic/socket.h; Python names it from 3.15 on."""
_KERNEL_STAMPS = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
_TIMESPEC = struct.Struct("qq")
_STAMP_SPACE = socket.CMSG_SPACE(_TIMESPEC.size) if _KERNEL_STAMPS else 0
_READ_TOGETHER_S = 50e-6
"""Two clocks count as read at one moment if a third reading is no later: else the process was stopped in between."""


@dataclass(slots=True)
class OutgoingRequest:
    """A request, ready to send."""

    at_s: float
    """When to send it, in seconds after the start."""
    body: bytes
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class StreamsResult:
    records: list[RequestRecord]
    started_s: float
    """`time.perf_counter()` at the records' time 0."""
    cpu_s: float
    """CPU time of this thread."""
    busy_share: float
    """Share of the time in which requests were sent that the loop did not spend waiting, or was kept from working."""
    out_of_files: bool = False
    """Whether the process ran out of file descriptors: then the client was the limit."""


class _State(Enum):
    CONNECTING = auto()
    HANDSHAKE = auto()
    SENDING = auto()
    HEAD = auto()
    BODY = auto()
    IDLE = auto()


class Endpoint:
    """Where requests go, resolved once: name resolution would be measured as latency."""

    def __init__(self, url: str) -> None:
        parts: SplitResult = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"{url!r} is not an http(s) address.", where="benchmark")
        self.host = parts.hostname
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if self.tls else 80)
        self._head = "".join(
            [
                f"POST {parts.path or '/'} HTTP/1.1\r\n",
                f"Host: {parts.netloc.rpartition('@')[2]}\r\n",
                "Content-Type: application/json\r\nAccept: text/event-stream\r\nAccept-Encoding: identity\r\n",
            ]
        )
        addresses = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)
        self.family, _, _, _, self.address = _first_that_connects(addresses)

    def request_bytes(self, body: bytes) -> bytes:
        return f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _first_that_connects(addresses: Sequence[Any]) -> Any:
    """`localhost` may be ::1 and 127.0.0.1 while the server listens on one of them; the first one if none answers."""
    for address in addresses:
        with socket.socket(address[0], socket.SOCK_STREAM) as probe:
            probe.settimeout(5.0)
            if probe.connect_ex(address[4]) == 0:
                return address
    return addresses[0]


class KernelClock:
    """Turns the kernel's wall-clock stamps into seconds after the start of a run.

    The wall clock may be slewed or set meanwhile, so it is compared with the monotonic one again and again; and a stamp
    counts only within the bounds of what the monotonic clock says.
    """

    def __init__(
        self,
        start: float,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._start = start
        self._wall_start = wall() - (monotonic() - start)

    def compare(self) -> None:
        before = self._monotonic()
        wall = self._wall()
        after = self._monotonic()
        if after - before < _READ_TOGETHER_S:
            self._wall_start = wall - ((before + after) / 2 - self._start)

    def arrival(self, stamp: bytes, earliest: float, latest: float) -> float:
        """When the kernel received the last bytes of a read; `latest` if the stamp lies outside of the bounds."""
        seconds, nanoseconds = _TIMESPEC.unpack(stamp)
        arrived: float = seconds - self._wall_start + nanoseconds * 1e-9
        return arrived if earliest <= arrived < latest else latest


class _Connection:
    """One socket and the answer that it is receiving."""

    __slots__ = (
        "buffer",
        "chunk_left",
        "chunked",
        "close_after",
        "closing_event",
        "done",
        "error_text",
        "events",
        "is_fresh",
        "length_left",
        "outgoing",
        "record",
        "request",
        "sent",
        "sock",
        "state",
        "status",
        "times",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.state = _State.CONNECTING
        self.is_fresh = True

    def begin(self, record: RequestRecord, request: OutgoingRequest, outgoing: bytes) -> None:
        self.record = record
        self.request = request
        self.outgoing = outgoing
        self.sent = 0
        self.status = 0
        self.buffer = b""
        self.events = b""
        self.times = array("d")
        self.chunked = False
        self.chunk_left = 0
        self.length_left = -1
        self.close_after = False
        self.closing_event = b""
        self.error_text = b""
        self.done = False


@dataclass(slots=True)
class StreamLoop:
    """Sends requests when they are due, whatever the answers do (open loop), and records every answer."""

    endpoint: Endpoint
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 60.0
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _active: set[_Connection] = field(default_factory=set)
    _idle: list[_Connection] = field(default_factory=list)
    _start: float = 0.0
    _kernel: KernelClock = field(init=False)
    _before: float = 0.0
    """When the selector last returned before this time: all that had arrived by then has been read."""
    _waited_s: float = 0.0
    """In the selector, until the last request was due."""
    _out_of_files: bool = False

    def run(self, requests: Sequence[OutgoingRequest], *, duration_s: float) -> StreamsResult:
        """Send `requests`, sorted by `at_s`, and wait for the answers until `drain_timeout_s` after `duration_s`."""
        _allow_many_files()
        prepared = [self.endpoint.request_bytes(request.body) for request in requests]
        records = [
            RequestRecord(
                scheduled_s=r.at_s,
                sent_s=r.at_s,
                input_tokens=r.input_tokens,
                planned_input_tokens=r.input_tokens,
                planned_output_tokens=r.output_tokens,
            )
            for r in requests
        ]
        collects, switch_s = gc.isenabled(), sys.getswitchinterval()
        # A collection of a large heap stops the loop for tens of milliseconds; nothing in here makes cycles.
        gc.disable()
        # Threads beside this one (metrics, a port-forward) may keep the interpreter for so long.
        sys.setswitchinterval(_SWITCH_S)
        cpu_start = time.thread_time()
        self._start = time.perf_counter()
        self._kernel = KernelClock(self._start)
        self._before = 0.0
        self._waited_s = 0.0
        try:
            self._loop(requests, records, prepared, duration_s)
        finally:
            sys.setswitchinterval(switch_s)
            if collects:
                gc.enable()
            self._close_all()
        busy_share = 1 - self._waited_s / duration_s if duration_s else 0.0
        return StreamsResult(
            records, self._start, time.thread_time() - cpu_start, max(0.0, busy_share), self._out_of_files
        )

    def _loop(
        self,
        requests: Sequence[OutgoingRequest],
        records: Sequence[RequestRecord],
        prepared: Sequence[bytes],
        duration_s: float,
    ) -> None:
        following, total = 0, len(requests)
        due_s = requests[0].at_s if requests else math.inf
        deadline_s = duration_s + self.drain_timeout_s
        next_sweep_s = _SWEEP_S
        clock, start, select = time.perf_counter, self._start, self._selector.select
        # Only where the kernel stamps what arrives meanwhile.
        sleep_s = _SELECTOR_STEP_S if _KERNEL_STAMPS and self.endpoint.tls is None else 0.0

        def send_what_is_due() -> None:
            nonlocal following, due_s
            while due_s <= clock() - start:
                self._send(records[following], requests[following], prepared[following])
                following += 1
                due_s = requests[following].at_s if following < total else math.inf

        while following < total or self._active:
            send_what_is_due()
            now = clock() - start
            wait_s = min(next_sweep_s, due_s, deadline_s) - now
            if 0 < wait_s <= sleep_s:
                time.sleep(wait_s)
            ready = select(max(0.0, wait_s - sleep_s))
            woken = clock() - start
            if now < duration_s:
                self._waited_s += min(woken, duration_s) - now
            now = woken
            if ready:
                self._kernel.compare()
            for key, _ in ready:
                # One step of the server may wake hundreds of streams at once: arrivals do not wait for all of them.
                if due_s <= clock() - start:
                    send_what_is_due()
                # A connection may have been used again, and lost, since the selector named it.
                if key.data.sock.fileno() >= 0:
                    self._advance(key.data, now)
            self._before = now
            if now >= next_sweep_s:
                next_sweep_s = now + _SWEEP_S
                self._sweep(now)
                if now >= deadline_s:
                    self._cut_off(now)

    def _send(self, record: RequestRecord, request: OutgoingRequest, outgoing: bytes) -> None:
        record.sent_s = time.perf_counter() - self._start
        connection = self._idle.pop() if self._idle else self._connect(record)
        if connection is None:
            return
        connection.begin(record, request, outgoing)
        self._active.add(connection)
        if connection.state is _State.IDLE:
            connection.state = _State.SENDING
            self._write(connection)

    def _connect(self, record: RequestRecord) -> _Connection | None:
        try:
            sock = socket.socket(self.endpoint.family, socket.SOCK_STREAM)
        except OSError as error:
            self._out_of_files |= error.errno in (errno.EMFILE, errno.ENFILE)
            record.ended_s = record.sent_s
            record.failure, record.detail = FailureKind.CONNECTION, f"the client has no socket left: {error.strerror}"
            return None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if _KERNEL_STAMPS:
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.connect_ex(self.endpoint.address)  # its result arrives as writability
        connection = _Connection(sock)
        self._selector.register(sock, selectors.EVENT_WRITE, connection)
        return connection

    def _advance(self, connection: _Connection, now: float) -> None:
        state = connection.state
        if state is _State.BODY or state is _State.HEAD:
            self._read(connection, now)
        elif state is _State.SENDING:
            self._write(connection)
        elif state is _State.CONNECTING:
            self._connected(connection, now)
        elif state is _State.HANDSHAKE:
            self._handshake(connection, now)
        else:  # an idle connection speaks only to say that it closes
            self._drop(connection)

    def _connected(self, connection: _Connection, now: float) -> None:
        error = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            kind = FailureKind.REFUSED if error == errno.ECONNREFUSED else FailureKind.CONNECTION
            self._fail(connection, now, kind, f"connecting: {errno.errorcode.get(error, error)}")
            return
        if self.endpoint.tls is None:
            connection.state = _State.SENDING
            self._write(connection)
            return
        self._selector.unregister(connection.sock)
        connection.sock = self.endpoint.tls.wrap_socket(
            connection.sock, server_hostname=self.endpoint.host, do_handshake_on_connect=False
        )
        self._selector.register(connection.sock, selectors.EVENT_WRITE, connection)
        connection.state = _State.HANDSHAKE
        self._handshake(connection, now)

    def _handshake(self, connection: _Connection, now: float) -> None:
        assert isinstance(connection.sock, ssl.SSLSocket)
        try:
            connection.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
        except ssl.SSLWantWriteError:
            self._selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
        except OSError as error:
            self._fail(connection, now, FailureKind.CONNECTION, f"TLS handshake: {error}")
        else:
            connection.state = _State.SENDING
            self._write(connection)

    def _write(self, connection: _Connection) -> None:
        try:
            connection.sent += connection.sock.send(memoryview(connection.outgoing)[connection.sent :])
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except OSError as error:
            self._lost(connection, time.perf_counter() - self._start, f"sending: {error}")
            return
        if connection.sent == len(connection.outgoing):
            connection.state = _State.HEAD
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
        else:
            self._selector.modify(connection.sock, selectors.EVENT_WRITE, connection)

    def _read(self, connection: _Connection, now: float) -> None:
        try:
            if connection.sock.__class__ is not socket.socket:
                data = connection.sock.recv(_READ_BYTES)
                data += _rest(connection.sock)  # decrypted bytes that no selector reports
            elif _KERNEL_STAMPS:
                data, ancillary, _, _ = connection.sock.recvmsg(_READ_BYTES, _STAMP_SPACE)
                if ancillary:
                    now = self._kernel.arrival(ancillary[0][2], self._before, now)
            else:
                data = connection.sock.recv(_READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._lost(connection, now, f"receiving: {error}")
            return
        if not data:
            self._ended_by_peer(connection, now)
            return
        try:
            if connection.state is _State.HEAD:
                data = _read_head(connection, data)
            if connection.state is _State.BODY:
                _read_body(connection, data, now)
        except ValueError as error:
            self._fail(connection, now, FailureKind.BROKEN_STREAM, f"not HTTP: {error}")
            return
        if connection.done:
            self._finish(connection, now)

    def _ended_by_peer(self, connection: _Connection, now: float) -> None:
        close_delimited = connection.state is _State.BODY and not connection.chunked and connection.length_left < 0
        if close_delimited:
            connection.close_after = True
            self._finish(connection, now)
        else:
            self._lost(connection, now, "the server closed the connection")

    def _lost(self, connection: _Connection, now: float, detail: str) -> None:
        """A kept connection may close just as it is used again: such a request is sent once more, on a new one."""
        never_answered = connection.status == 0 and not connection.buffer
        if connection.is_fresh or not never_answered:
            self._fail(connection, now, FailureKind.CONNECTION, detail)
            return
        self._drop(connection)
        self._active.discard(connection)
        fresh = self._connect(connection.record)
        if fresh is not None:
            fresh.begin(connection.record, connection.request, connection.outgoing)
            self._active.add(fresh)

    def _finish(self, connection: _Connection, now: float) -> None:
        record = connection.record
        record.ended_s = now
        if connection.status != 200:
            record.failure, record.detail = _rejection(connection.status, connection.error_text)
        else:
            _complete(record, connection)
        self._active.discard(connection)
        if connection.close_after:
            self._drop(connection)
        else:
            connection.state = _State.IDLE
            connection.is_fresh = False
            self._idle.append(connection)

    def _fail(self, connection: _Connection, now: float, kind: FailureKind, detail: str) -> None:
        record = connection.record
        record.ended_s, record.failure, record.detail = now, kind, detail
        record.token_times_s = connection.times
        self._active.discard(connection)
        self._drop(connection)

    def _sweep(self, now: float) -> None:
        for connection in list(self._active):
            waited = now - connection.record.sent_s
            if connection.state in (_State.CONNECTING, _State.HANDSHAKE) and waited > _CONNECT_TIMEOUT_S:
                self._fail(connection, now, FailureKind.TIMEOUT, f"no connection after {_CONNECT_TIMEOUT_S:.0f} s")
            elif waited > self.request_timeout_s:
                detail = f"no complete answer after {self.request_timeout_s:.0f} s"
                self._fail(connection, now, FailureKind.TIMEOUT, detail)

    def _cut_off(self, now: float) -> None:
        for connection in list(self._active):
            # Closing aborts the generation, so the next stage finds an idle server.
            self._fail(connection, now, FailureKind.UNFINISHED, "still running when the stage's drain time was over")

    def _drop(self, connection: _Connection) -> None:
        if connection.state is _State.IDLE:
            self._idle.remove(connection)
        self._selector.unregister(connection.sock)
        connection.sock.close()

    def _close_all(self) -> None:
        for connection in (*self._active, *self._idle):
            self._selector.unregister(connection.sock)
            connection.sock.close()
        self._active.clear()
        self._idle.clear()


def _allow_many_files() -> None:
    """Raise the soft limit of open files: an overloaded server keeps thousands of answers open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _rest(sock: socket.socket) -> bytes:
    assert isinstance(sock, ssl.SSLSocket)
    parts = []
    while pending := sock.pending():
        parts.append(sock.recv(pending))
    return b"".join(parts)


def _read_head(connection: _Connection, data: bytes) -> bytes:
    """Take the head off `data`; what follows it is returned. ValueError if it is not an HTTP answer."""
    connection.buffer += data
    head, separator, rest = connection.buffer.partition(b"\r\n\r\n")
    if not separator:
        if len(connection.buffer) > 65536:
            raise ValueError("the head of the answer exceeds 64 KiB")
        return b""
    status_line, *lines = head.split(b"\r\n")
    if not status_line.startswith(b"HTTP/1."):
        raise ValueError(repr(status_line[:40]))
    connection.status = int(status_line[9:12])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    connection.chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
    connection.length_left = int(headers.get(b"content-length", b"-1"))
    connection.close_after = headers.get(b"connection", b"").lower() == b"close" or status_line.startswith(b"HTTP/1.0")
    connection.buffer = b""
    connection.state = _State.BODY
    if connection.length_left == 0 and not connection.chunked:
        connection.done = True
    return rest


def _read_body(connection: _Connection, data: bytes, now: float) -> None:
    if not data:
        return
    if not connection.chunked:
        if connection.length_left >= 0:
            connection.length_left -= len(data)
            connection.done = connection.length_left <= 0
        _read_payload(connection, data, now)
        return
    if connection.buffer:
        data = connection.buffer + data
    position, size = 0, len(data)
    while position < size:
        if connection.chunk_left == 0:
            end = data.find(b"\r\n", position)
            if end < 0:
                break
            length = int(data[position:end].partition(b";")[0], 16)
            if length == 0:
                # Trailers are not used by any such server; the blank line ends the answer.
                if size - end < 4:
                    break
                connection.done = True
                position = size
                break
            position = end + 2
            connection.chunk_left = length + 2
        taken = data[position : position + connection.chunk_left]
        position += len(taken)
        left = connection.chunk_left - len(taken)
        # The chunk's own line end may arrive apart from it.
        payload = taken[: len(taken) - (2 - left)] if left < 2 else taken
        connection.chunk_left = left
        if payload:
            _read_payload(connection, payload, now)
    connection.buffer = data[position:]


def _read_payload(connection: _Connection, payload: bytes, now: float) -> None:
    if connection.status != 200:
        connection.error_text += payload
        return
    if connection.events:
        payload = connection.events + payload
        connection.events = b""
    if not payload.endswith(b"\n\n"):
        if b"\r\n\r\n" in payload:
            payload = payload.replace(b"\r\n", b"\n")
        complete, separator, connection.events = payload.rpartition(b"\n\n")
        if not separator:
            return
        payload = complete
    for event in payload.split(b"\n\n"):
        if b'"choices":[{' in event:
            if b'"delta":{"role"' not in event or b'"content":""' not in event:
                connection.times.append(now)
        elif event:
            _read_rare_event(connection, event, now)


def _read_rare_event(connection: _Connection, event: bytes, now: float) -> None:
    """Everything but a token as vLLM writes it: usage, errors, the end, comments, and JSON with blanks."""
    if b'"choices": [{' in event:
        compact = event.replace(b'": ', b'":')
        if b'"delta":{"role"' not in compact or b'"content":""' not in compact:
            connection.times.append(now)
    elif event.startswith(b"data:") and b"[DONE]" not in event[:20]:
        connection.closing_event = event[5:].strip()
    elif b"[DONE]" in event[:20]:
        connection.error_text = b"[DONE]"


def _complete(record: RequestRecord, connection: _Connection) -> None:
    """Close the record of an answer with status 200."""
    record.token_times_s = connection.times
    record.output_tokens = len(connection.times)
    closing = _object(connection.closing_event)
    if closing.get("error"):
        record.failure, record.detail = FailureKind.BROKEN_STREAM, str(closing["error"])[:300]
        return
    if connection.error_text != b"[DONE]":
        record.failure, record.detail = FailureKind.BROKEN_STREAM, "the stream ended without `data: [DONE]`"
        return
    usage = closing.get("usage")
    if isinstance(usage, dict):
        record.input_tokens = _count(usage.get("prompt_tokens"), record.input_tokens)
        record.output_tokens = _count(usage.get("completion_tokens"), record.output_tokens)
        # The last piece may carry only the finish reason.
        del connection.times[record.output_tokens :]
    if not connection.times:
        record.failure, record.detail = FailureKind.BROKEN_STREAM, "an answer without a token"


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object that a server sent; empty for anything else."""
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _count(stated: object, counted: int) -> int:
    """Tokens as the server states them, if it states a number."""
    return stated if isinstance(stated, int) and stated >= 0 else counted


def _rejection(status: int, body: bytes) -> tuple[FailureKind, str]:
    text = body.decode("utf-8", "replace")
    error = _object(body).get("error")
    text = str((error.get("message") if isinstance(error, dict) else error) or text)
    detail = f"HTTP {status}: {text[:300]}"
    if status in (429, 503):
        return FailureKind.OVERLOADED, detail
    return (FailureKind.SERVER_ERROR if status >= 500 else FailureKind.REJECTED), detail
