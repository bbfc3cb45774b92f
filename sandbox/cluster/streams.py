"""Connections to a pod: its log, forwarded ports (websocket `v4.channel.k8s.io`) and the HTTP proxy."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from aiohttp import WSMsgType, web

from sandbox.cluster.errors import ApiError, bad_request
from sandbox.cluster.logs import ContainerLog
from sandbox.cluster.store import seconds_since

PORT_FORWARD_PROTOCOL = "v4.channel.k8s.io"
CHUNK_BYTES = 128 * 1024
_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "host", "keep-alive", "upgrade"})


class PodConnections(Protocol):
    """What the node agents tell about running pods."""

    def log(self, pod: dict[str, Any], container: str, *, previous: bool) -> ContainerLog | None: ...

    def host_port(self, pod: dict[str, Any], port: int) -> int | None:
        """The loopback port that stands for a container's port; None when nothing listens there."""

    def ready(self, pod: dict[str, Any]) -> bool: ...

    def resolve_port(self, pod: dict[str, Any], port: int | str) -> int:
        """A port's number, also when it is given by name."""


@dataclass(frozen=True)
class _LogOptions:
    follow: bool
    timestamps: bool
    tail_lines: int | None
    since_s: int | None
    limit_bytes: int | None


async def follow_log(
    request: web.Request, pods: PodConnections, pod: dict[str, Any], wanted: str
) -> web.StreamResponse:
    """The log of the container `wanted`, with all options of GET pods/NAME/log in the query."""
    if not pod["spec"].get("nodeName"):
        return web.Response(status=204)
    query = request.query
    container = _container_of(pod, wanted)
    previous = query.get("previous") in ("1", "true")
    log = pods.log(pod, container, previous=previous)
    if log is None:
        raise _no_log(pod, container, previous=previous)
    options = _LogOptions(
        follow=query.get("follow") in ("1", "true"),
        timestamps=query.get("timestamps") in ("1", "true"),
        tail_lines=_number(query.get("tailLines")),
        since_s=_number(query.get("sinceSeconds")),
        limit_bytes=_number(query.get("limitBytes")),
    )
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        await _write_log(response, log, options)
        await response.write_eof()
    return response


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit():
        raise bad_request(f'strconv.ParseInt: parsing "{text}": invalid syntax')
    return int(text)


def _container_of(pod: dict[str, Any], wanted: str) -> str:
    name = pod["metadata"]["name"]
    containers = [each["name"] for each in pod["spec"]["containers"]]
    known = containers + [each["name"] for each in pod["spec"].get("initContainers", [])]
    if not wanted and len(containers) > 1:
        listed = " ".join(containers)
        raise bad_request(f"a container name must be specified for pod {name}, choose one of: [{listed}]")
    chosen = wanted or containers[0]
    if chosen not in known:
        raise bad_request(f"container {chosen} is not valid for pod {name}")
    return chosen


def _no_log(pod: dict[str, Any], container: str, *, previous: bool) -> ApiError:
    name = pod["metadata"]["name"]
    if previous:
        return bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
    status = pod["status"]
    statuses = (status.get("containerStatuses") or []) + (status.get("initContainerStatuses") or [])
    states = {each["name"]: each["state"] for each in statuses}
    reason = states.get(container, {}).get("waiting", {}).get("reason", "ContainerCreating")
    if reason in ("ErrImagePull", "ImagePullBackOff"):
        reason = "trying and failing to pull image"
    return bad_request(f'container "{container}" in pod "{name}" is waiting to start: {reason}')


async def _write_log(response: web.StreamResponse, log: ContainerLog, options: _LogOptions) -> None:
    lines = log.lines()
    if options.since_s is not None:
        lines = [line for line in lines if seconds_since(line.time) <= options.since_s]
    if options.tail_lines is not None:
        lines = lines[-options.tail_lines :] if options.tail_lines else []
    position, left = log.end(), options.limit_bytes
    while True:
        for line in lines:
            text = f"{line.time} ".encode() + line.text if options.timestamps else line.text
            await response.write(text if left is None else text[:left])
            if left is not None:
                left -= len(text)
                if left <= 0:
                    return
        if not options.follow or (log.closed and position == log.end()):
            return
        await log.wait_beyond(position)
        lines, position = log.lines_from(position), log.end()


async def forward_ports(
    request: web.Request, pods: PodConnections, pod: dict[str, Any], wanted: list[str]
) -> web.StreamResponse:
    """pods/NAME/portforward: each port has a data channel 2i and an error channel 2i+1."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        raise bad_request("unable to upgrade: missing upgrade headers in request")
    ports = [int(each) for part in wanted for each in part.split(",") if each.isdigit()]
    if not ports:
        raise bad_request('query parameter "ports" is required')
    if pod["status"].get("phase") != "Running":
        phase = pod["status"].get("phase")
        message = f"unable to forward port because pod is not running. Current status={phase}"
        raise ApiError(500, "InternalError", f"Internal error occurred: {message}", {"causes": [{"message": message}]})
    socket = web.WebSocketResponse(protocols=(PORT_FORWARD_PROTOCOL,), max_msg_size=0)
    await socket.prepare(request)
    forward = _PortForward(socket, pods, pod, ports)
    await forward.run()
    return socket


class _PortForward:
    """One websocket with its TCP connections; it ends when the client leaves or every connection has ended."""

    def __init__(
        self, socket: web.WebSocketResponse, pods: PodConnections, pod: dict[str, Any], ports: list[int]
    ) -> None:
        self._socket = socket
        self._pods = pods
        self._pod = pod
        self._ports = ports
        self._writers: dict[int, asyncio.StreamWriter] = {}

    async def run(self) -> None:
        for index, port in enumerate(self._ports):
            for channel in (2 * index, 2 * index + 1):
                await self._socket.send_bytes(bytes([channel]) + port.to_bytes(2, "little"))
        pumps = [asyncio.create_task(self._pump(index, port)) for index, port in enumerate(self._ports)]
        receiving = asyncio.create_task(self._receive())
        sending = asyncio.create_task(_all(pumps))
        try:
            await asyncio.wait([receiving, sending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (receiving, sending, *pumps):
                task.cancel()
            for writer in self._writers.values():
                writer.close()
            await asyncio.gather(receiving, sending, *pumps, return_exceptions=True)
            await self._socket.close()

    async def _pump(self, index: int, port: int) -> None:
        host_port = self._pods.host_port(self._pod, port)
        try:
            if host_port is None:
                raise ConnectionRefusedError
            reader, writer = await asyncio.open_connection("127.0.0.1", host_port)
        except OSError:
            await self._refuse(index, port)
            return
        self._writers[index] = writer
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                await self._socket.send_bytes(bytes([2 * index]) + data)

    async def _refuse(self, index: int, port: int) -> None:
        uid = self._pod["metadata"]["uid"]
        message = (
            f"an error occurred forwarding {port} -> {port}: error forwarding port {port} to pod {uid}, uid : "
            f'failed to execute portforward in network namespace "/var/run/netns/cni": failed to connect to '
            f"localhost:{port} inside namespace: dial tcp4 127.0.0.1:{port}: connect: connection refused"
        )
        await self._socket.send_bytes(bytes([2 * index + 1]) + message.encode())

    async def _receive(self) -> None:
        async for message in self._socket:
            if message.type != WSMsgType.BINARY or not message.data:
                return
            channel, data = message.data[0], message.data[1:]
            writer = await self._writer(channel // 2)
            if channel % 2 == 0 and data and writer is not None:
                writer.write(data)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()

    async def _writer(self, index: int) -> asyncio.StreamWriter | None:
        """The connection of a port; the client may send before it stands."""
        for _ in range(200):
            if index in self._writers or index >= len(self._ports):
                return self._writers.get(index)
            await asyncio.sleep(0.01)
        return None


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks)


async def proxy(
    request: web.Request, pods: PodConnections, pod: dict[str, Any], port: int, path: str
) -> web.StreamResponse:
    """services/NAME:PORT/proxy and pods/NAME:PORT/proxy: the request as it is, to the pod."""
    host_port = pods.host_port(pod, port)
    if host_port is None:
        address = f"{pod['status'].get('podIP', '')}:{port}"
        message = f"error trying to reach service: dial tcp {address}: connect: connection refused"
        raise ApiError(503, "ServiceUnavailable", message)
    url = f"http://127.0.0.1:{host_port}/{path}"
    headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
    body = await request.read()
    query = request.query
    try:
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(request.method, url, params=query, headers=headers, data=body) as answer,
        ):
            kept = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response
    except aiohttp.ClientConnectionError as error:
        message = f"error trying to reach service: {error}"
        raise ApiError(503, "ServiceUnavailable", message) from error
