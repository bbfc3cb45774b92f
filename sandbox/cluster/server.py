"""`KubernetesServer`: the whole cluster as one loopback server, with the faults that tests switch on."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from aiohttp import web

from sandbox.cluster import errors
from sandbox.cluster.agent import AgentSettings, IdentityOf, NodeAgents
from sandbox.cluster.api import Api, served_resources, too_large_resource_version
from sandbox.cluster.autoscaling import CUSTOM_METRICS, AutoscalerSettings, HorizontalPodAutoscalers
from sandbox.cluster.controllers import (
    ControllerManager,
    DeploymentController,
    GarbageCollector,
    NamespaceController,
    ReplicaSetController,
)
from sandbox.cluster.endpoints import DisruptionBudgetController, EndpointSliceController
from sandbox.cluster.errors import ApiError
from sandbox.cluster.events import Recorder
from sandbox.cluster.jobs import JobController
from sandbox.cluster.nodes import Machine, NodePlan, NodePool, NodeSettings
from sandbox.cluster.rbac import Authorizer, Callers, User, service_account
from sandbox.cluster.registry import Registry, Writer
from sandbox.cluster.resources import CRD, CUSTOM, NAMESPACE, NODE, POD, definition
from sandbox.cluster.scheduler import NodeRemover, Scheduler
from sandbox.cluster.store import Change, Store
from sandbox.cluster.tls import make_authority
from sandbox.server import LoopbackServer

VLLM_IMAGES = (
    "us-docker.pkg.dev/vertex-ai/vertex-vision-model-garden-dockers/pytorch-vllm-serve",
    "docker.io/vllm/vllm-openai",
    "vllm/vllm-openai",
    "vllm/vllm-tpu",
)
"""Images that the simulated engine plays: the tutorial's, and vLLM's own."""

ENGINE_COMMAND = (sys.executable, "-m", "sandbox.engine", "serve")
LOAD_IMAGE = "quay.io/inference-perf/inference-perf"
LOAD_COMMAND = (sys.executable, "-m", "sandbox.inference_perf")
PICKER_IMAGE = "registry.k8s.io/gateway-api-inference-extension/epp"
PICKER_COMMAND = (sys.executable, "-m", "sandbox.endpoint_picker")
CHECKOUT = Path(__file__).resolve().parents[2]
SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
_T = TypeVar("_T")


class Faults:
    """Misbehaviour that tests ask for; a real API server shows all of it at times."""

    def __init__(self) -> None:
        self._gone = 0
        self._too_large = 0
        self._unavailable = 0
        self._lock = threading.Lock()

    def answer_gone(self, times: int = 1) -> None:
        """The next watches and lists that name a resourceVersion answer 410 Gone."""
        self._gone = times

    def answer_too_large_resource_version(self, times: int = 1) -> None:
        """The next requests that name a resourceVersion answer 504 `Timeout: Too large resource version`."""
        self._too_large = times

    def answer_unavailable(self, times: int = 1) -> None:
        """The next requests of any kind answer 503, as while an API server starts."""
        self._unavailable = times

    def refusal(self, query: dict[str, str]) -> ApiError | None:
        with self._lock:
            if self._unavailable > 0:
                self._unavailable -= 1
                message = "the server is currently unable to handle the request"
                return ApiError(503, "ServiceUnavailable", message, {"retryAfterSeconds": 1})
            wanted = query.get("resourceVersion", "")
            if not wanted.isdigit() or int(wanted) == 0:
                return None
            if self._gone > 0:
                self._gone -= 1
                return errors.gone(f"too old resource version: {wanted} ({int(wanted) + 1000})")
            if self._too_large > 0:
                self._too_large -= 1
                return too_large_resource_version(int(wanted), int(wanted) - 1)
        return None


class KubernetesServer(LoopbackServer):
    """A cluster whose API server listens on a loopback port; `url` is its endpoint.

    `root` holds logs and keys. `runners` maps image prefixes to commands beside (or instead of) the vLLM images, that
    the engine plays, inference-perf's and the endpoint picker's. `identity_of` tells which IAM member a pod is.
    `environment` goes into every container.
    `on_node` is told of every node that comes ("ADDED") or goes ("DELETED"), in the server's loop.
    `token` is the administrator's when it is given; without it whoever calls is one. Service accounts have tokens of
    their own (`service_account_token`) and the rights that Roles give them. `without_token` is who calls without one.
    `namespace_deletion_s` is how long a deleted namespace keeps what it holds (Kubernetes: 5 s).
    Settings of nodes and agents may be changed later through `nodes` and `agent_settings`.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        tls: bool = False,
        token: str | None = None,
        without_token: User | None = None,
        runners: Mapping[str, Sequence[str]] | None = None,
        identity_of: IdentityOf | None = None,
        environment: Mapping[str, str] | None = None,
        nodes: NodeSettings | None = None,
        on_node: Callable[[str, dict[str, Any]], None] | None = None,
        image_pull_s: float = 0.5,
        backoff_s: float = 1.0,
        longest_probe_period_s: float = 1.0,
        autoscaler: AutoscalerSettings | None = None,
        namespace_deletion_s: float = 0.5,
    ) -> None:
        authority = make_authority(root / "tls") if tls else None
        super().__init__(port=port, ssl_context=authority.context if authority is not None else None)
        self.ca_pem = authority.ca_pem if authority is not None else ""
        self.root = root
        self.token = token
        self._callers = Callers(token, without_token)
        self.authorizer: Authorizer
        self.faults = Faults()
        self.nodes = nodes if nodes is not None else NodeSettings()
        self._autoscaler_settings = autoscaler if autoscaler is not None else AutoscalerSettings()
        self._on_node = on_node
        self._namespace_deletion_s = namespace_deletion_s
        self.agent_settings = AgentSettings(
            root=root,
            runners={
                **dict.fromkeys(VLLM_IMAGES, ENGINE_COMMAND),
                LOAD_IMAGE: LOAD_COMMAND,
                PICKER_IMAGE: PICKER_COMMAND,
                **(runners or {}),
            },
            identity_of=identity_of if identity_of is not None else _default_identity,
            environment=dict(environment or {}),
            working_directory=CHECKOUT,
            image_pull_s=image_pull_s,
            backoff_s=backoff_s,
            longest_probe_period_s=longest_probe_period_s,
        )
        self._store: Store
        self._registry: Registry
        self._agents: NodeAgents
        self._pool: NodePool
        self._manager_task: asyncio.Task[None] | None = None
        self._autoscaler_task: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._returning: concurrent.futures.Future[None] | None = None

    def build_app(self) -> web.Application:
        self._store = Store()
        self.authorizer = Authorizer(self._store)
        self._registry = Registry(self._store)
        if self._on_node is not None:
            self._store.listen(self._tell_of_nodes)
        recorder = Recorder(self._store)
        self._pool = NodePool(self._store, self.nodes)
        self._agents = NodeAgents(self._registry, recorder, self.agent_settings)
        manager = ControllerManager(
            self._store,
            [
                EndpointSliceController(self._registry, recorder),
                DeploymentController(self._registry, recorder),
                ReplicaSetController(self._registry, recorder),
                JobController(self._registry, recorder),
                Scheduler(self._registry, recorder, self._pool),
                NodeRemover(self._registry, recorder, self._pool),
                DisruptionBudgetController(self._registry, recorder),
                NamespaceController(self._registry, recorder, self.ca_pem, self._namespace_deletion_s),
                GarbageCollector(self._registry, recorder),
            ],
        )
        autoscalers = HorizontalPodAutoscalers(self._registry, recorder, self._agents, self._autoscaler_settings)
        aggregated = (CUSTOM_METRICS,) if self._autoscaler_settings.metrics_adapter else ()
        api = Api(
            self._registry,
            self._agents,
            self.faults,
            self._callers,
            self.authorizer,
            served_resources(),
            aggregated=aggregated,
        )
        self._furnish()
        app = web.Application(client_max_size=16 * 1024 * 1024)
        app.router.add_route("*", "/{path:.*}", api.serve)

        async def start(_: web.Application) -> None:
            self._manager_task = asyncio.create_task(manager.run())
            self._autoscaler_task = asyncio.create_task(autoscalers.run())

        async def end_watches(_: web.Application) -> None:
            self._store.end_watches()

        async def stop(_: web.Application) -> None:
            await self._agents.stop()
            if self._manager_task is not None:
                self._manager_task.cancel()
            if self._autoscaler_task is not None:
                self._autoscaler_task.cancel()

        app.on_startup.append(start)
        app.on_shutdown.append(end_watches)
        app.on_cleanup.append(stop)
        return app

    def _furnish(self) -> None:
        """What every cluster has from the start: the system namespaces and the definitions of custom resources."""
        writer = Writer("kube-apiserver")
        for name in SYSTEM_NAMESPACES:
            self._registry.create(NAMESPACE, {"metadata": {"name": name}}, "", writer)
        for resource in CUSTOM:
            self._registry.create(CRD, definition(resource), "", writer)

    def service_account_token(self, namespace: str, name: str) -> str:
        """A token by which the API server knows a service account."""
        return self._callers.issue(service_account(namespace, name))

    def kubeconfig(self, path: Path, *, token: str | None = None) -> Path:
        """Write a kubeconfig for this cluster, with `token` or the administrator's, and return its path."""
        cluster: dict[str, Any] = {"server": self.url}
        if self.ca_pem:
            ca_file = self.root / "tls" / "ca.crt"
            ca_file.write_text(self.ca_pem, encoding="ascii")
            cluster["certificate-authority"] = str(ca_file)
        token = token or self.token
        user = {"token": token} if token else {}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "sandbox", "cluster": cluster}],
            "users": [{"name": "sandbox", "user": user}],
            "contexts": [{"name": "sandbox", "context": {"cluster": "sandbox", "user": "sandbox"}}],
            "current-context": "sandbox",
        }
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    # For tests and the rehearsal: all of these may be called from any thread

    def add_node(self, machine: Machine, compute_class: str = "") -> str:
        """A node of a node pool made by hand (GKE Standard); returns its name."""

        def add() -> str:
            plan = NodePlan(machine, compute_class)
            node = self._registry.create(NODE, self._pool.create(plan), "", Writer("gke"))
            name: str = node["metadata"]["name"]
            return name

        return self._in_loop(add)

    def host_port(self, namespace: str, pod: str, port: int) -> int | None:
        """The loopback port that stands for a container's port; None when nothing listens there."""
        return self._in_loop(lambda: self._agents.host_port(self._registry.get(POD, namespace, pod), port))

    def drop_watches(self) -> None:
        """End every running watch without a word, as a load balancer or a restarted API server does."""
        self._in_loop(self._store.end_watches)

    def expire_watches(self) -> None:
        """End every running watch with 410 Gone, and forget the history before now."""
        error = errors.gone("too old resource version: 1 (2)").status()

        def expire() -> None:
            self._store.compact()
            self._store.end_watches({"type": "ERROR", "object": error})

        self._in_loop(expire)

    def compact(self) -> None:
        """Forget the history: watches that start before now get 410 Gone."""
        self._in_loop(self._store.compact)

    def fail_pulls(self, image_prefix: str, error: str) -> None:
        """Pulls of such images fail with the registry's `error` until `allow_pulls`."""
        self.agent_settings.failing_pulls[image_prefix] = error

    def allow_pulls(self, image_prefix: str) -> None:
        self.agent_settings.failing_pulls.pop(image_prefix, None)

    def deny(self, plural: str, why: str) -> None:
        """Admission denies new objects of the resource, in the words of a webhook or of a ResourceQuota."""
        self._registry.denied[plural] = why

    def remove_nodes(self, names: Sequence[str]) -> None:
        """Machines are taken away, as when their cluster is deleted: nodes and pods go at once."""

        def remove() -> None:
            for name in names:
                self._agents.remove_node(name)

        self._in_loop(remove)

    def _tell_of_nodes(self, change: Change) -> None:
        assert self._on_node is not None
        if change.resource == NODE and change.type in ("ADDED", "DELETED"):
            self._on_node(change.type, change.obj)

    def lose_node(self, name: str) -> None:
        """The machine dies: its containers stop, and a little later the node and its pods are removed."""
        self._in_loop(lambda: self._agents.lose_node(name))

    def go_away(self, seconds: float) -> None:
        """Close the listening socket and every connection, and come back on the same port after `seconds`."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=60.0)
        self._returning = asyncio.run_coroutine_threadsafe(self._come_back(seconds), self._loop)

    async def _close(self) -> None:
        assert self._site is not None
        assert self._runner is not None
        assert self._runner.server is not None
        await self._site.stop()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def _come_back(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        assert self._runner is not None
        self._site = web.TCPSite(
            self._runner, "127.0.0.1", self.port, ssl_context=self._ssl_context, reuse_address=True
        )
        await self._site.start()

    def _in_loop(self, work: Callable[[], _T]) -> _T:
        """Run `work` in the server's loop, where all state lives, and return its result."""
        assert self._loop is not None

        async def run() -> _T:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=60.0)

    async def _serve_until_stopped(self, started: threading.Event) -> None:
        """As the base class does, but with the site at hand, so that the server can go away and come back."""
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        runner = web.AppRunner(self.build_app(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
        self._runner = runner
        await runner.setup()
        try:
            self._site = web.TCPSite(runner, "127.0.0.1", self._requested_port, ssl_context=self._ssl_context)
            await self._site.start()
            self._port = runner.addresses[0][1]
            started.set()
            await self._stopping.wait()
        finally:
            with contextlib.suppress(RuntimeError):
                await runner.cleanup()


def _default_identity(namespace: str, account: str, annotations: dict[str, str]) -> str:
    """Workload Identity without a cloud that decides: the annotated service account, else the direct principal."""
    linked = annotations.get("iam.gke.io/gcp-service-account")
    if linked:
        return f"serviceAccount:{linked}"
    pool = "projects/123/locations/global/workloadIdentityPools/sandbox-project.svc.id.goog"
    return f"principal://iam.googleapis.com/{pool}/subject/ns/{namespace}/sa/{account}"
