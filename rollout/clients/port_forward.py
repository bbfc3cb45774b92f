"""A Service's endpoint: its DNS name inside the cluster, otherwise ports forwarded through the API server.

The official client gives address, TLS and credentials. Its own `stream.portforward` starts a thread for every
connection, waits with `select` (at most 1024 file descriptors, four for each connection) and copies its buffers for
each frame; a load test needs hundreds of streams. So the relay here is one event loop in one thread, which speaks the
same websocket protocol (`v4.channel.k8s.io`) with one websocket for each local connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp

from rollout.clients.cluster_api import ClusterApi
from rollout.errors import ClusterUnreachable, NotFound, RolloutError
from rollout.rendering import KubernetesObject

log = logging.getLogger(__name__)

PROTOCOL = "v4.channel.k8s.io"
CHUNK_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 30.0
"""How long a new local connection waits for a ready pod: long enough for a pod to be replaced."""
PODS_FRESH_S = 5.0
"""How long the list of ready pods is believed."""
_RETRY_S = 0.3


@contextmanager
def service_endpoint(api: ClusterApi, namespace: str, service_name: str, *, pod: str | None = None) -> Iterator[str]:
    """The Service's base URL, without a trailing slash, or that of one `pod` behind it.

    Raises NotFound if there is no such Service or pod.
    """
    service = api.get(api.resource("v1", "Service").path(namespace, service_name))
    behind = None if pod is None else api.get(api.resource("v1", "Pod").path(namespace, pod))
    host = f"{service_name}.{namespace}.svc.cluster.local"
    if not _is_inside(host, service):
        with PortForward(api, service, behind) as forward:
            yield forward.url
    elif behind is None:
        yield f"http://{host}:{service['spec']['ports'][0]['port']}"
    else:
        yield f"http://{behind['status']['podIP']}:{_port_number(behind, _target_port(service))}"


def _is_inside(host: str, service: KubernetesObject) -> bool:
    """Whether this process runs in that very cluster: its DNS gives the Service's own address."""
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return False
    try:
        return socket.gethostbyname(host) == service["spec"].get("clusterIP")
    except OSError:
        return False


class PortForward:
    """A loopback port whose connections end at the ready pods of a Service, in turn.

    A connection that breaks ends alone: the next one goes to a pod that is ready then. With `only`, all go to that pod.
    """

    def __init__(self, api: ClusterApi, service: KubernetesObject, only: KubernetesObject | None = None) -> None:
        self._api = api
        self._service = service
        self._only = only
        self._pods: list[tuple[str, int]] = []
        self._pods_known_at = float("-inf")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="port-forward", daemon=True)
        self._started = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> PortForward:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stopping is not None
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        connector = aiohttp.TCPConnector(limit=0, ssl=_ssl_context(self._api.configuration))
        async with aiohttp.ClientSession(connector=connector) as session:
            connections: set[asyncio.Task[None]] = set()

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                task = asyncio.current_task()
                assert task is not None
                connections.add(task)
                # Cancelled only by the end of the block below: nobody is left to be told.
                with contextlib.suppress(asyncio.CancelledError):
                    await self._relay(session, reader, writer)
                connections.discard(task)

            server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1024)
            self._port = server.sockets[0].getsockname()[1]
            self._started.set()
            await self._stopping.wait()
            server.close()
            for task in connections:
                task.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _relay(
        self, session: aiohttp.ClientSession, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            upstream = await self._open(session)
        except RolloutError as error:
            log.warning("no connection to %s: %s", self._service["metadata"]["name"], error)
            writer.transport.abort()
            return
        up = asyncio.ensure_future(_pump_up(reader, upstream))
        down = asyncio.ensure_future(_pump_down(upstream, writer))
        try:
            # Either side's end is the connection's end: the protocol knows no half-closed connection.
            done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            clean = all(task.exception() is None and task.result() for task in done)
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await upstream.close()
        if clean:
            writer.close()
        else:
            # A reset, not an orderly end: a cut answer must not look like a whole one.
            writer.transport.abort()

    async def _open(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        """A websocket to a ready pod's port; tries other pods, and newer lists of them, for CONNECT_TIMEOUT_S."""
        gives_up = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            try:
                pod, port = random.choice(await self._ready_pods())
                return await self._connect(session, pod, port)
            except (aiohttp.ClientError, OSError, TimeoutError, NotFound, IndexError) as error:
                self._pods_known_at = float("-inf")
                if time.monotonic() > gives_up:
                    raise ClusterUnreachable(
                        f"no ready pod accepts connections: {error}",
                        where=f"Service {self._service['metadata']['name']}",
                        resolution="See the pods' state and log.",
                    ) from error
                await asyncio.sleep(_RETRY_S)

    async def _connect(self, session: aiohttp.ClientSession, pod: str, port: int) -> aiohttp.ClientWebSocketResponse:
        namespace = self._service["metadata"]["namespace"]
        base = self._api.host.replace("http", "ws", 1)
        upstream = await session.ws_connect(
            f"{base}/api/v1/namespaces/{namespace}/pods/{pod}/portforward?ports={port}",
            headers=self._api.headers(),
            protocols=(PROTOCOL,),
            max_msg_size=0,
            compress=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=5.0),
        )
        # The first frame of the data and of the error channel only repeats the port.
        for _ in range(2):
            message = await upstream.receive(timeout=CONNECT_TIMEOUT_S)
            if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) != 3:
                await upstream.close()
                raise ConnectionResetError(f"unexpected first frame from {pod}: {message.type!r}")
        return upstream

    async def _ready_pods(self) -> list[tuple[str, int]]:
        if time.monotonic() - self._pods_known_at > PODS_FRESH_S:
            self._pods = await asyncio.to_thread(self._list_ready_pods)
            self._pods_known_at = time.monotonic()
        return self._pods

    def _list_ready_pods(self) -> list[tuple[str, int]]:
        """Names of the pods behind the Service, with the port that it leads to."""
        wanted = _target_port(self._service)
        if self._only is not None:
            return [(self._only["metadata"]["name"], _port_number(self._only, wanted))]
        spec, namespace = self._service["spec"], self._service["metadata"]["namespace"]
        selector = ",".join(f"{key}={value}" for key, value in spec["selector"].items())
        listing = self._api.get(self._api.resource("v1", "Pod").path(namespace), {"labelSelector": selector})
        return [(pod["metadata"]["name"], _port_number(pod, wanted)) for pod in listing["items"] if _is_ready(pod)]


def _is_ready(pod: KubernetesObject) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def _target_port(service: KubernetesObject) -> int | str:
    port = service["spec"]["ports"][0]
    wanted: int | str = port.get("targetPort", port["port"])
    return wanted


def _port_number(pod: KubernetesObject, wanted: int | str) -> int:
    if isinstance(wanted, int):
        return wanted
    ports = [port for container in pod["spec"]["containers"] for port in container.get("ports") or []]
    return next(int(port["containerPort"]) for port in ports if port.get("name") == wanted)


async def _pump_up(reader: asyncio.StreamReader, upstream: aiohttp.ClientWebSocketResponse) -> bool:
    """Local bytes to channel 0. True at the orderly end."""
    while data := await reader.read(CHUNK_BYTES):
        await upstream.send_bytes(b"\0" + data)
    return True


async def _pump_down(upstream: aiohttp.ClientWebSocketResponse, writer: asyncio.StreamWriter) -> bool:
    """Channel 0 to the local side; what comes on channel 1 is an error. True at the orderly end."""
    async for message in upstream:
        if message.type is not aiohttp.WSMsgType.BINARY:
            return False
        if message.data[0] == 1:
            log.warning("port-forward: %s", message.data[1:].decode("utf-8", "replace"))
            return False
        if writer.is_closing():
            return True  # the local side has enough
        writer.write(memoryview(message.data)[1:])
        # Only waits when the local reader is behind: one token's frame must not cost a round of the loop.
        await writer.drain()
    return upstream.close_code in (aiohttp.WSCloseCode.OK, None)


def _ssl_context(configuration: Any) -> ssl.SSLContext | bool:
    """The official client's TLS settings, as an SSL context."""
    if not configuration.host.startswith("https"):
        return True
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
