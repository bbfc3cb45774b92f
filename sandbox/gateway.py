"""What stands between clients and pods in a cluster: a Gateway that splits by weight, and a Service's own proxy.

    GatewayServer(kubernetes, namespace="serving", gateway="models")   # HTTPRoutes of that Gateway
    ServiceProxy(kubernetes, namespace="serving", service="llm-service")

Both watch the cluster through its API, as GKE's controllers and kube-proxy do: HTTPRoutes, Services and EndpointSlices.
Each request goes to a ready endpoint, chosen at random (for the Gateway: first a backend by weight). Streams pass
through piece by piece. Nothing is ever tried twice: a request that meets a dead pod fails, as its client must see.

Simulated: weights, hostnames, path prefixes, the route's `Accepted` and `ResolvedRefs` with `observedGeneration`, 404
without a route, 503 without a ready endpoint, 502 for a dead one. Not simulated: the minutes that a load balancer
takes, TLS, header and query matches (such a rule is refused by `Accepted: False`), filters, timeouts, and that
kube-proxy decides once per connection: here every request is decided anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from sandbox.cluster.endpoints import SERVICE_LABEL
from sandbox.cluster.errors import ApiError
from sandbox.cluster.server import KubernetesServer
from sandbox.cluster.store import timestamp
from sandbox.server import LoopbackServer

Object: TypeAlias = dict[str, Any]

ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/{namespace}/httproutes"
SERVICES = "/api/v1/namespaces/{namespace}/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
CONTROLLER = "networking.gke.io/gateway"
RETRY_S = 0.2
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"})
_UNSUPPORTED_MATCHES = frozenset({"headers", "queryParams", "method"})


class NoBackend(Exception):
    """Nobody can answer this request; `status` is what the client gets."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """A ready pod behind a Service."""

    pod: str
    port: int


@dataclass
class ClusterView:
    """The collections that are watched, by name of the object."""

    routes: dict[str, Object] = field(default_factory=dict)
    services: dict[str, Object] = field(default_factory=dict)
    slices: dict[str, Object] = field(default_factory=dict)

    def ready(self, service: str, port: int | None = None) -> list[Endpoint]:
        """The ready endpoints of a Service; `port` is one of the Service's own, None takes its first."""
        spec = (self.services.get(service) or {}).get("spec") or {}
        names = [each.get("name", "") for each in spec.get("ports") or [] if port in (None, each["port"])]
        if not names:
            return []
        return [
            Endpoint(endpoint["targetRef"]["name"], int(slice_port["port"]))
            for each in self.slices.values()
            if (each["metadata"].get("labels") or {}).get(SERVICE_LABEL) == service
            for slice_port in each.get("ports") or []
            if slice_port.get("name", "") == names[0]
            for endpoint in each.get("endpoints") or []
            if (endpoint.get("conditions") or {}).get("ready")
        ]


class _Proxy(LoopbackServer):
    """Forwards each request to the endpoint that `choose` gives."""

    def __init__(self, kubernetes: KubernetesServer, *, namespace: str, port: int = 0) -> None:
        super().__init__(port=port)
        self._kubernetes = kubernetes
        self._namespace = namespace
        self._view = ClusterView()
        self._session: aiohttp.ClientSession

    def choose(self, request: web.BaseRequest) -> Endpoint:
        """The pod that answers `request`. Raises NoBackend."""
        raise NotImplementedError

    def watched(self) -> Mapping[str, dict[str, Object]]:
        """Collections to watch, by path."""
        return {SERVICES: self._view.services, SLICES: self._view.slices}

    async def on_change(self) -> None:
        """Called after every change of what is watched."""

    def build_app(self) -> web.Application:
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", self._forward)
        app.cleanup_ctx.append(self._run)
        return app

    async def _run(self, _: web.Application) -> AsyncIterator[None]:
        # A connection of its own for every request: a pooled one could die unseen between two requests.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._tls())
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._session = session
            listed = [asyncio.Event() for _ in self.watched()]
            tasks = [
                asyncio.create_task(self._watch(path, into, event))
                for event, (path, into) in zip(listed, self.watched().items(), strict=True)
            ]
            # Whoever sees the port open may rely on what the cluster holds at that time.
            await asyncio.gather(*(event.wait() for event in listed))
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _tls(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cadata=self._kubernetes.ca_pem) if self._kubernetes.ca_pem else True

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._kubernetes.token}"} if self._kubernetes.token else {}

    async def _watch(self, path: str, into: dict[str, Object], listed: asyncio.Event) -> None:
        """List, watch, and list again whenever the watch ends: for ever, as controllers do."""
        url = self._kubernetes.url + path.format(namespace=self._namespace)
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, KeyError):
                async with self._session.get(url, headers=self._headers()) as answer:
                    listing = await answer.json()
                into.clear()
                into.update({item["metadata"]["name"]: item for item in listing["items"]})
                listed.set()
                await self.on_change()
                version = listing["metadata"]["resourceVersion"]
                query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": "240"}
                async with self._session.get(url, params=query, headers=self._headers()) as stream:
                    async for line in stream.content:
                        if not _take_in(json.loads(line), into):
                            break
                        await self.on_change()
            await asyncio.sleep(RETRY_S)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        try:
            endpoint = self.choose(request)
        except NoBackend as error:
            return web.Response(status=error.status, text=str(error))
        body = await request.read()
        # The pod's address is a loopback port; the cluster answers from its own thread.
        port = await asyncio.to_thread(self._host_port, endpoint)
        try:
            upstream = await self._session.request(
                request.method,
                f"http://127.0.0.1:{port}{request.raw_path}",
                data=body,
                headers=_end_to_end(request.headers),
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            return web.Response(status=502, text=f"{endpoint.pod}: {error}")
        async with upstream:
            return await _relay(request, upstream)

    def _host_port(self, endpoint: Endpoint) -> int:
        """Where the pod listens; port 9, where nobody does, stands for a pod that is gone."""
        try:
            return self._kubernetes.host_port(self._namespace, endpoint.pod, endpoint.port) or 9
        except ApiError:
            return 9


class ServiceProxy(_Proxy):
    """One Service, as its clients in the cluster reach it."""

    def __init__(self, kubernetes: KubernetesServer, *, namespace: str, service: str, port: int = 0) -> None:
        super().__init__(kubernetes, namespace=namespace, port=port)
        self._service = service

    def choose(self, request: web.BaseRequest) -> Endpoint:
        return _one_of(self._view.ready(self._service), self._service)


class GatewayServer(_Proxy):
    """One Gateway with its HTTPRoutes; also their controller, which says that it has taken them up."""

    def __init__(self, kubernetes: KubernetesServer, *, namespace: str, gateway: str, port: int = 0) -> None:
        super().__init__(kubernetes, namespace=namespace, port=port)
        self._gateway = gateway

    def watched(self) -> Mapping[str, dict[str, Object]]:
        return {ROUTES: self._view.routes, **super().watched()}

    def choose(self, request: web.BaseRequest) -> Endpoint:
        host = request.host.partition(":")[0]
        rules = [rule for route in self._own_routes() if _hosts(route, host) for rule in _rules(route)]
        fitting = [(len(prefix), rule) for prefix, rule in rules if request.path.startswith(prefix)]
        if not fitting:
            raise NoBackend(404, "no route matches")
        # The longest prefix wins, as the Gateway API says.
        _, rule = max(fitting, key=lambda pair: pair[0])
        backends = rule.get("backendRefs") or []
        weights = [int(backend.get("weight", 1)) for backend in backends]
        if not sum(weights):
            raise NoBackend(500, "the rule has no backend with a weight")
        (backend,) = random.choices(backends, weights)
        return _one_of(self._view.ready(backend["name"], backend.get("port")), backend["name"])

    async def on_change(self) -> None:
        for route in self._own_routes():
            await self._report(route)

    def _own_routes(self) -> list[Object]:
        return [
            route
            for route in self._view.routes.values()
            if any(parent["name"] == self._gateway for parent in route["spec"].get("parentRefs") or [])
        ]

    async def _report(self, route: Object) -> None:
        """Write the route's status, unless it says so already."""
        generation = route["metadata"]["generation"]
        refused = [
            name
            for rule in route["spec"].get("rules") or []
            for match in rule.get("matches") or []
            for name in sorted(_UNSUPPORTED_MATCHES & match.keys())
        ]
        missing = [name for name in _backends(route) if name not in self._view.services]
        conditions = [
            _condition("Accepted", generation, "UnsupportedValue", ", ".join(refused)),
            _condition("ResolvedRefs", generation, "BackendNotFound", ", ".join(missing)),
        ]
        known = [
            condition
            for parent in (route.get("status") or {}).get("parents") or []
            for condition in parent.get("conditions") or []
        ]
        if _timeless(known) == _timeless(conditions):
            return
        parent = {"parentRef": {"name": self._gateway}, "controllerName": CONTROLLER, "conditions": conditions}
        path = ROUTES.format(namespace=self._namespace) + f"/{route['metadata']['name']}/status"
        headers = self._headers() | {"Content-Type": "application/merge-patch+json"}
        body = json.dumps({"status": {"parents": [parent]}})
        # Its watch tells of the result, or of the route's end.
        async with self._session.patch(self._kubernetes.url + path, data=body, headers=headers) as answer:
            await answer.read()


def _condition(kind: str, generation: int, reason: str, problem: str) -> Object:
    return {
        "type": kind,
        "status": "False" if problem else "True",
        "reason": reason if problem else kind,
        "message": problem,
        "observedGeneration": generation,
        "lastTransitionTime": timestamp(),
    }


def _timeless(conditions: list[Object]) -> list[Object]:
    return [{key: each[key] for key in each if key != "lastTransitionTime"} for each in conditions]


def _take_in(event: Object, into: dict[str, Object]) -> bool:
    """Whether the watch goes on."""
    if event["type"] == "ERROR":
        return False
    name = event["object"]["metadata"]["name"]
    if event["type"] == "DELETED":
        into.pop(name, None)
    elif event["type"] != "BOOKMARK":
        into[name] = event["object"]
    return True


def _hosts(route: Object, host: str) -> bool:
    wanted = route["spec"].get("hostnames") or []
    return not wanted or any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in wanted)


def _rules(route: Object) -> Iterator[tuple[str, Object]]:
    """(path prefix, rule) of everything that the route matches."""
    for rule in route["spec"].get("rules") or []:
        for match in rule.get("matches") or [{}]:
            if not _UNSUPPORTED_MATCHES & match.keys():
                yield (match.get("path") or {}).get("value", "/"), rule


def _backends(route: Object) -> list[str]:
    return [backend["name"] for rule in route["spec"].get("rules") or [] for backend in rule.get("backendRefs") or []]


def _one_of(endpoints: list[Endpoint], service: str) -> Endpoint:
    if not endpoints:
        raise NoBackend(503, f"no ready endpoint behind {service}")
    return random.choice(endpoints)


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP)


async def _relay(request: web.Request, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    """Pass the answer on as it comes; a cut one is cut for the client too."""
    response = web.StreamResponse(status=upstream.status, headers=_end_to_end(upstream.headers))
    await response.prepare(request)
    try:
        async for piece in upstream.content.iter_any():
            await response.write(piece)
    except aiohttp.ClientError:
        # No orderly end: a cut answer must not look like a whole one.
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response
