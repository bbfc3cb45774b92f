"""What a stand-in puts on the wire: bodies over a shaped link, the faults of a plan, and a log of what went out.

Handlers return a `SlicedBody` instead of `web.FileResponse`; `wire_middlewares` does the rest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO, TypeAlias

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler, LooseHeaders, Middleware
from aiohttp.web_request import BaseRequest

from sandbox.faults import (
    Corrupt,
    Drop,
    Fault,
    FaultPlan,
    IgnoreRange,
    MisstateLength,
    Redirect,
    Reply,
    Stall,
    Truncate,
)
from sandbox.shaping import Link

_PADDING_BYTES = 2**16

Source: TypeAlias = Path | tuple[Path, ...] | bytes

ErrorResponse: TypeAlias = Callable[[int], web.Response]
"""The stand-in's own answer for an HTTP status, in the format of the server that it stands for."""


@dataclasses.dataclass
class RequestRecord:
    """One request and what went out in answer. It never holds a token, only whether there was one."""

    method: str
    path: str
    """Percent-encoded as sent, without the query: signed URLs keep their secret there."""
    query_keys: tuple[str, ...]
    range: str | None
    host: str
    """The Host header: which of a server's origins was asked."""
    has_token: bool
    """Whether there was an Authorization header."""
    status: int | None = None
    """None while the request is being answered, and if the connection died before the status line."""
    bytes_sent: int = 0
    """Bytes of the body that were handed to the socket."""
    bytes_received: int = 0
    """The Content-Length of the request."""
    fault: str | None = None


_RECORD = web.RequestKey("sandbox.wire.record", RequestRecord)


class RequestLog:
    """The requests of a server, in order of arrival. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[RequestRecord] = []

    def open(self, request: web.Request) -> RequestRecord:
        record = RequestRecord(
            method=request.method,
            path=request.rel_url.raw_path,
            query_keys=tuple(request.query.keys()),
            range=request.headers.get(hdrs.RANGE),
            host=request.headers.get(hdrs.HOST, ""),
            has_token=hdrs.AUTHORIZATION in request.headers,
            bytes_received=request.content_length or 0,
        )
        with self._lock:
            self._records.append(record)
        return record

    def snapshot(self) -> tuple[RequestRecord, ...]:
        """Copies of all records up to now."""
        with self._lock:
            return tuple(dataclasses.replace(record) for record in self._records)

    def clear(self) -> None:
        with self._lock:
            self._records.clear()


class SlicedBody(web.StreamResponse):
    """A response whose body is `count` bytes from `offset` on: of a file, of files in a row, or of a bytes object.

    Files go out by sendfile, so that several connections together run at memory speed from one process.
    """

    def __init__(
        self,
        source: Source,
        *,
        offset: int = 0,
        count: int | None = None,
        status: int = 200,
        headers: LooseHeaders | None = None,
        link: Link | None = None,
    ) -> None:
        super().__init__(status=status, headers=headers)
        self._source = source
        self._offset = offset
        self._count = _size(source) - offset if count is None else count
        self._link = link or Link()
        self._fault: Fault | None = None
        self._plan: FaultPlan | None = None

    @classmethod
    def of(cls, response: web.Response, link: Link) -> SlicedBody:
        """The same answer as `response`, as a body that faults can be applied to."""
        body = response.body if isinstance(response.body, bytes) else b""
        headers = response.headers.copy()
        headers.popall(hdrs.CONTENT_LENGTH, None)
        return cls(body, status=response.status, headers=headers, link=link)

    def spoil(self, fault: Fault, plan: FaultPlan) -> None:
        """Apply a fault while sending, and count it in `plan` once it is carried out."""
        self._fault, self._plan = fault, plan

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return await super().prepare(request)
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        record: RequestRecord | None = request.get(_RECORD)
        fault, count = self._fault, self._count
        if isinstance(fault, Stall | Drop) and fault.at == 0:
            self._carried_out(record)
            if isinstance(fault, Drop):
                reset(transport)
                raise ConnectionResetError("dropped on purpose before the status line")
            await asyncio.sleep(fault.seconds)
        announced = int(count * fault.factor) if isinstance(fault, MisstateLength) else count
        self.content_length = announced
        writer = await super().prepare(request)
        if record is not None:
            record.status = self.status
        if writer is None or request.method == hdrs.METH_HEAD or self.status == HTTPStatus.NOT_MODIFIED:
            return writer
        with _Sender(self._source, self._offset, writer, transport, self._link, record) as sender:
            await self._send(sender, announced, record)
        return writer

    async def _send(self, sender: _Sender, announced: int, record: RequestRecord | None) -> None:
        fault, count = self._fault, self._count
        match fault:
            case Stall() if fault.at > 0:
                mark = int(count * fault.at)
                await sender.send(0, mark)
                self._carried_out(record)
                await asyncio.sleep(fault.seconds)
                await sender.send(mark, count)
            case Drop() | Truncate():
                await sender.send(0, int(count * fault.at))
                self._carried_out(record)
                if isinstance(fault, Drop):
                    reset(sender.transport)
                else:
                    sender.transport.close()
                raise ConnectionResetError("cut short on purpose")
            case Corrupt() if count > 0:
                mark = int(count * fault.at)
                await sender.send(0, mark)
                await sender.send_flipped(mark)
                self._carried_out(record)
                await sender.send(mark + 1, count)
            case MisstateLength():
                self._carried_out(record)
                await sender.send(0, min(announced, count))
                await sender.send_zeros(announced - count)
            case _:
                await sender.send(0, count)

    def _carried_out(self, record: RequestRecord | None) -> None:
        assert self._fault is not None
        assert self._plan is not None
        self._plan.record(self._fault)
        if record is not None:
            record.fault = self._fault.kind


class _Sender:
    """Moves pieces of one source to one connection, at the link's pace."""

    def __init__(
        self,
        source: Source,
        offset: int,
        writer: AbstractStreamWriter,
        transport: asyncio.Transport,
        link: Link,
        record: RequestRecord | None,
    ) -> None:
        self.transport = transport
        self._source = source
        self._offset = offset
        self._writer = writer
        self._link = link
        self._record = record
        self._file: BinaryIO | None = None
        self._file_start = 0
        self._file_stop = 0
        paths = () if isinstance(source, bytes) else (source,) if isinstance(source, Path) else source
        self._files_ahead = iter(paths)

    def __enter__(self) -> _Sender:
        if not isinstance(self._source, bytes):
            self._open_file_at(self._offset)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    async def send(self, start: int, stop: int) -> None:
        """Send the bytes [start, stop) of the slice."""
        loop = asyncio.get_running_loop()
        while start < stop:
            step = min(self._link.chunk_bytes, stop - start)
            if self._file is not None:
                self._open_file_at(self._offset + start)
                step = min(step, self._file_stop - self._offset - start)
                if step <= 0:
                    raise EOFError(f"{self._source!r} ended before byte {self._offset + stop}")
            await self._link.passage(self.transport, step)
            # TLS cannot use sendfile: the kernel does not hold the keys.
            if self._file is None or self.transport.get_extra_info("sslcontext") is not None:
                await self._writer.write(self._read(start, step))
            elif self.transport.is_closing():
                raise ConnectionResetError("the client is gone")
            else:
                await loop.sendfile(self.transport, self._file, self._offset + start - self._file_start, step)
            start += step
            self._sent(step)

    async def send_flipped(self, position: int) -> None:
        """Send the byte at `position` with every bit flipped."""
        await self._link.passage(self.transport, 1)
        await self._writer.write(bytes([self._read(position, 1)[0] ^ 0xFF]))
        self._sent(1)

    async def send_zeros(self, count: int) -> None:
        while count > 0:
            step = min(_PADDING_BYTES, count)
            await self._link.passage(self.transport, step)
            await self._writer.write(bytes(step))
            self._sent(step)
            count -= step

    def _read(self, start: int, count: int) -> bytes:
        begin = self._offset + start
        if self._file is None:
            assert isinstance(self._source, bytes)
            return self._source[begin : begin + count]
        self._open_file_at(begin)
        self._file.seek(begin - self._file_start)
        return self._file.read(count)

    def _open_file_at(self, position: int) -> None:
        """Have that file open which holds the byte at `position` of the files in a row; positions only ever grow."""
        while position >= self._file_stop and (path := next(self._files_ahead, None)) is not None:
            if self._file is not None:
                self._file.close()
            self._file = path.open("rb")
            self._file_start, self._file_stop = self._file_stop, self._file_stop + path.stat().st_size

    def _sent(self, count: int) -> None:
        if self._record is not None:
            self._record.bytes_sent += count


def _size(source: Source) -> int:
    if isinstance(source, bytes):
        return len(source)
    paths = (source,) if isinstance(source, Path) else source
    return sum(path.stat().st_size for path in paths)


def reset(transport: asyncio.Transport) -> None:
    """Close a connection with TCP RST, as a crashed peer or a middlebox does; unsent bytes are lost."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def wire_middlewares(
    *, log: RequestLog, plan: FaultPlan, link: Link, error_response: ErrorResponse
) -> tuple[Middleware, ...]:
    """The middlewares of a stand-in, outermost first: log, latency of the link, faults."""

    @web.middleware
    async def log_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
        record = log.open(request)
        request[_RECORD] = record
        try:
            response = await handler(request)
        except web.HTTPException as refusal:
            _log_answer(record, refusal)
            raise
        _log_answer(record, response)
        return response

    @web.middleware
    async def inject_faults(request: web.Request, handler: Handler) -> web.StreamResponse:
        await link.round_trip()
        fault = plan.draw(request.method, request.path_qs, request.headers)
        match fault:
            case None:
                return await handler(request)
            case Reply() | Redirect() | IgnoreRange() | Drop(during="request"):
                plan.record(fault)
                request[_RECORD].fault = fault.kind
                return await _replace(request, handler, fault, error_response)
            case _:
                return await _spoiled(request, handler, fault, plan, link)

    return (log_requests, inject_faults)


def _log_answer(record: RequestRecord, response: web.StreamResponse) -> None:
    # A SlicedBody is sent after the middlewares, and completes the record itself.
    if isinstance(response, web.Response):
        record.status = response.status
        if record.method != hdrs.METH_HEAD and isinstance(response.body, bytes):
            record.bytes_sent = len(response.body)


async def _replace(
    request: web.Request,
    handler: Handler,
    fault: Reply | Redirect | IgnoreRange | Drop,
    error_response: ErrorResponse,
) -> web.StreamResponse:
    match fault:
        case Reply():
            response = error_response(fault.status)
            if fault.retry_after_s is not None:
                response.headers[hdrs.RETRY_AFTER] = str(fault.retry_after_s)
            return response
        case Redirect():
            return web.Response(status=307, headers={hdrs.LOCATION: fault.origin + request.path_qs})
        case IgnoreRange():
            headers = request.headers.copy()
            headers.popall(hdrs.RANGE)
            return await handler(request.clone(headers=headers))
        case Drop():
            await _read_share(request, fault.at)
            if request.transport is not None:
                reset(request.transport)
            return web.Response(status=503)


async def _read_share(request: web.Request, share: float) -> None:
    remaining = int((request.content_length or 0) * share)
    while remaining > 0 and (piece := await request.content.read(min(remaining, _PADDING_BYTES))):
        remaining -= len(piece)


async def _spoiled(
    request: web.Request, handler: Handler, fault: Fault, plan: FaultPlan, link: Link
) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as refusal:
        response = refusal
    if isinstance(response, web.Response):
        response = SlicedBody.of(response, link)
    if not isinstance(response, SlicedBody):
        raise TypeError(f"cannot apply {fault.kind} to a {type(response).__name__}: return a SlicedBody")
    response.spoil(fault, plan)
    return response
