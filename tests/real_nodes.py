"""The sandbox's node agents as the kubelet of a node in a real control plane.

What the cluster client is tested on runs then against the API server, controllers and scheduler of Kubernetes itself,
and only what a pod does is ours: its process, its probes, its log. The kubelet keeps a mirror of what it has to know,
writes pod statuses and events through the API, and answers the API server's own requests for logs and forwarded ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from sandbox.cluster.agent import AgentSettings, NodeAgents
from sandbox.cluster.errors import ApiError
from sandbox.cluster.events import Recorder
from sandbox.cluster.nodes import node_conditions
from sandbox.cluster.registry import Deletion, Registry
from sandbox.cluster.resources import CONFIG_MAP, EVENT, NODE, POD, SECRET, SERVICE, SERVICE_ACCOUNT, Resource
from sandbox.cluster.store import Store, timestamp
from sandbox.cluster.streams import follow_log, forward_ports
from sandbox.cluster.tls import make_authority

NODE_NAME = "node-1"
MIRRORED = (NODE, SECRET, CONFIG_MAP, SERVICE, SERVICE_ACCOUNT, POD)
"""Pods last: they need the others."""
MERGE = "application/merge-patch+json"
START_TIMEOUT_S = 60.0


@contextlib.contextmanager
def node(kubeconfig: Path, root: Path, runners: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """A Ready node with eight cores and no GPU, which plays images by `runners` (see `AgentSettings`)."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    failures: list[BaseException] = []
    kubelet = Kubelet(kubeconfig, root, runners)

    async def life() -> None:
        async with kubelet.running():
            ready.set()
            await kubelet.over.wait()

    def run() -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(life())
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="kubelet")
    thread.start()
    try:
        assert ready.wait(START_TIMEOUT_S), "the kubelet did not start"
        assert not failures, failures
        yield
    finally:
        loop.call_soon_threadsafe(kubelet.over.set)
        thread.join()
    assert not failures, failures


class Kubelet:
    def __init__(self, kubeconfig: Path, root: Path, runners: Mapping[str, Sequence[str]]) -> None:
        document = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        self._url: str = document["clusters"][0]["cluster"]["server"]
        self._ca: str = document["clusters"][0]["cluster"]["certificate-authority"]
        self._token: str = document["users"][0]["user"]["token"]
        self._root = root
        self._settings = AgentSettings(
            root=root,
            runners=runners,
            identity_of=lambda namespace, account, _: f"{namespace}/{account}",
            image_pull_s=0.0,
            backoff_s=0.1,
            longest_probe_period_s=0.1,
        )
        self.over = asyncio.Event()
        self._writes: asyncio.Queue[_Write] = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "User-Agent": "kubelet-of-the-tests/1"}
        trusted = aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=self._ca), limit=0)
        async with aiohttp.ClientSession(headers=headers, connector=trusted, timeout=aiohttp.ClientTimeout()) as api:
            self._api = api
            store = Store()
            self._agents = NodeAgents(
                _RemoteRegistry(store, self._writes), _RemoteRecorder(store, self._writes), self._settings
            )
            port = await self._serve()
            await self._register(port)
            tasks = [asyncio.create_task(self._write_in_order())]
            for resource in MIRRORED:
                version = await self._list(store, resource)
                tasks.append(asyncio.create_task(self._watch(store, resource, version)))
            try:
                yield
            finally:
                await self._agents.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._runner.cleanup()

    # What the API server asks a kubelet

    async def _serve(self) -> int:
        application = web.Application()
        application.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._log)
        application.router.add_route("*", "/portForward/{namespace}/{pod}", self._forward)
        self._runner = web.AppRunner(application)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=make_authority(self._root).context)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    def _pod(self, request: web.Request) -> dict[str, Any]:
        pod = self._agents.store.get(POD, request.match_info["namespace"], request.match_info["pod"])
        if pod is None:
            raise web.HTTPNotFound(text="pod does not exist")
        return pod

    async def _log(self, request: web.Request) -> web.StreamResponse:
        try:
            return await follow_log(request, self._agents, self._pod(request), request.match_info["container"])
        except ApiError as error:
            return web.Response(status=error.code, text=error.message)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        try:
            return await forward_ports(request, self._agents, self._pod(request), request.query.getall("port", []))
        except ApiError as error:
            return web.Response(status=error.code, text=error.message)

    # What a kubelet asks the API server

    async def _register(self, port: int) -> None:
        room = {"cpu": "8", "memory": "32Gi", "pods": "110", "ephemeral-storage": "100Gi"}
        status = {
            "capacity": room,
            "allocatable": room,
            "conditions": node_conditions(ready=True),
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
        }
        metadata = {"name": NODE_NAME, "labels": {"kubernetes.io/hostname": NODE_NAME}}
        async with self._api.post(f"{self._url}/api/v1/nodes", json={"metadata": metadata}) as answer:
            assert answer.status in (201, 409), await answer.text()
        await self._patch(f"/api/v1/nodes/{NODE_NAME}/status", {"status": status})
        while True:  # the node controller lifts the taint of a node that was not ready yet
            async with self._api.get(f"{self._url}/api/v1/nodes/{NODE_NAME}") as answer:
                if not (await answer.json())["spec"].get("taints"):
                    return
            await asyncio.sleep(0.1)

    async def _list(self, store: Store, resource: Resource) -> str:
        async with self._api.get(f"{self._url}/api/v1/{resource.plural}") as answer:
            found = await answer.json()
        for obj in found["items"]:
            store.commit(resource, {"apiVersion": "v1", "kind": resource.kind} | obj)
        version: str = found["metadata"]["resourceVersion"]
        return version

    async def _watch(self, store: Store, resource: Resource, version: str) -> None:
        while True:
            query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
            async with self._api.get(f"{self._url}/api/v1/{resource.plural}", params=query) as answer:
                async for line in answer.content:
                    change = json.loads(line)
                    obj = change["object"]
                    version = obj["metadata"]["resourceVersion"]
                    if change["type"] == "DELETED":
                        store.remove(resource, obj)
                    elif change["type"] != "BOOKMARK":
                        store.commit(resource, obj)

    async def _write_in_order(self) -> None:
        while True:
            write = await self._writes.get()
            await write.send(self)

    async def _patch(self, path: str, body: dict[str, Any]) -> None:
        headers = {"Content-Type": MERGE}
        async with self._api.patch(f"{self._url}{path}", data=json.dumps(body), headers=headers) as answer:
            assert answer.status in (200, 404, 409), await answer.text()

    async def write_status(self, resource: Resource, obj: dict[str, Any]) -> None:
        metadata = {"uid": obj["metadata"]["uid"]}
        await self._patch(f"{_path(resource, obj)}/status", {"metadata": metadata, "status": obj["status"]})

    async def delete(self, resource: Resource, obj: dict[str, Any]) -> None:
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": obj["metadata"]["uid"]}}
        async with self._api.delete(f"{self._url}{_path(resource, obj)}", json=options) as answer:
            assert answer.status in (200, 404, 409), await answer.text()

    async def record(self, event: dict[str, Any]) -> None:
        count = {"count": event["count"], "lastTimestamp": event["lastTimestamp"]}
        if event["count"] > 1:
            await self._patch(_path(EVENT, event), count)
            return
        url = f"{self._url}{_path(EVENT, event).rpartition('/')[0]}"
        async with self._api.post(url, json=event) as answer:
            assert answer.status in (201, 403, 404), await answer.text()  # 403: the namespace goes away


class _Write:
    """One request that has to follow those before it."""

    def __init__(self, verb: str, resource: Resource, obj: dict[str, Any]) -> None:
        self._verb, self._resource, self._obj = verb, resource, obj

    async def send(self, kubelet: Kubelet) -> None:
        if self._verb == "status":
            await kubelet.write_status(self._resource, self._obj)
        elif self._verb == "delete":
            await kubelet.delete(self._resource, self._obj)
        else:
            await kubelet.record(self._obj)


def _path(resource: Resource, obj: dict[str, Any]) -> str:
    metadata = obj["metadata"]
    inside = f"/namespaces/{metadata['namespace']}" if resource.namespaced else ""
    return f"/api/v1{inside}/{resource.plural}/{metadata['name']}"


class _RemoteRegistry(Registry):
    """Reads from the mirror, writes to the API server."""

    def __init__(self, store: Store, writes: asyncio.Queue[_Write]) -> None:
        super().__init__(store)
        self._writes = writes

    def write_status(
        self, resource: Resource, live: dict[str, Any], new: dict[str, Any], manager: str
    ) -> dict[str, Any]:
        self._writes.put_nowait(_Write("status", resource, new))
        return new

    def delete(self, resource: Resource, obj: dict[str, Any], how: Deletion) -> dict[str, Any]:
        self._writes.put_nowait(_Write("delete", resource, obj))
        return obj


class _RemoteRecorder(Recorder):
    """Keeps its events for the counts, and writes them to the API server."""

    def __init__(self, store: Store, writes: asyncio.Queue[_Write]) -> None:
        super().__init__(store)
        self._writes = writes
        self._events: dict[tuple[str, ...], dict[str, Any]] = {}

    def _count_up(self, key: tuple[str, ...]) -> bool:
        event = self._events.get(key)
        if event is None:
            return False
        event |= {"count": event["count"] + 1, "lastTimestamp": timestamp()}
        self._writes.put_nowait(_Write("event", EVENT, copy.deepcopy(event)))
        return True

    def _write(self, event: dict[str, Any], key: tuple[str, ...] | None) -> None:
        for ours in ("uid", "creationTimestamp"):
            event["metadata"].pop(ours)
        event["involvedObject"].pop("resourceVersion", None)
        if key is not None:
            self._events[key] = event
        self._writes.put_nowait(_Write("event", EVENT, copy.deepcopy(event)))
