"""One port that answers for iam, cloudresourcemanager, serviceusage, cloudbilling, container and compute."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from aiohttp import web
from google.protobuf.message import Message

from sandbox.faults import FaultPlan
from sandbox.google_apis.catalogue import DEFAULT_QUOTAS
from sandbox.google_apis.cloud import ALL_SERVICES, Cloud, Delays
from sandbox.google_apis.compute import Compute
from sandbox.google_apis.container import Container
from sandbox.google_apis.policies import Policies, new_record
from sandbox.google_apis.projects import Projects
from sandbox.google_apis.rest import (
    JSON_CONTENT_TYPE,
    SERVER_HEADERS,
    SYSTEM_PARAMETERS,
    ApiError,
    Call,
    Json,
    Route,
    bad_request,
    encode,
    not_found_page,
    not_simulated,
    outage,
)
from sandbox.google_apis.service_accounts import ServiceAccounts
from sandbox.google_apis.services import Services
from sandbox.google_apis.state import Store
from sandbox.server import LoopbackServer
from sandbox.shaping import Link
from sandbox.wire import RequestLog, wire_middlewares

GSA_ANNOTATION = "iam.gke.io/gcp-service-account"
BOOT_DISK_GIB = 100
"""GKE's default."""

_ALWAYS_REACHABLE = frozenset({"serviceusage.googleapis.com"})
"""Service Usage answers in a project where nothing is enabled: somebody has to enable the first API."""


class GoogleApisServer(LoopbackServer):
    """The control plane of one Google Cloud project; its state survives a restart under `root`."""

    def __init__(
        self,
        *,
        root: Path,
        project: str = "rehearsal-project",
        project_number: str = "123456789012",
        universe_domain: str = "googleapis.com",
        region: str = "u-france-east1",
        enabled_services: Collection[str] = ALL_SERVICES,
        billing_enabled: bool = True,
        denied_permissions: Collection[str] = (),
        quotas: Mapping[str, float] | None = None,
        kubernetes_endpoint: str = "",
        kubernetes_ca_pem: str = "",
        delays: Delays | None = None,
        faults: FaultPlan | None = None,
        port: int = 0,
    ) -> None:
        """`enabled_services` counts for a new `root` only; `quotas` overrides regional limits by metric."""
        super().__init__(port=port)
        self.faults = faults or FaultPlan()
        self.requests = RequestLog()
        initial = {
            "services": dict.fromkeys(sorted(enabled_services), "ENABLED"),
            "service_operations": {},
            "service_accounts": {},
            "project_policy": new_record(),
            "workload_pool_exists": False,
            "clusters": {},
            "container_operations": {},
            "disks": {},
            "nodes": {},
        }
        store = Store(Path(root) / "google_apis.json", initial)
        self.cloud = Cloud(
            store=store,
            project=project,
            project_number=project_number,
            universe_domain=universe_domain,
            region=region,
            zones=tuple(f"{region}-{letter}" for letter in "abc"),
            quotas=dict(DEFAULT_QUOTAS) | dict(quotas or {}),
            delays=delays or Delays(),
            denied_permissions=frozenset(denied_permissions),
        )
        with store.transaction() as data:
            data.setdefault("created_at", self.cloud.now())
        policies = Policies(self.cloud)
        self._accounts = ServiceAccounts(self.cloud, policies)
        self._projects = Projects(self.cloud, policies, billing_enabled=billing_enabled)
        self._services = Services(self.cloud)
        self._container = Container(
            self.cloud, kubernetes_endpoint=kubernetes_endpoint, kubernetes_ca_pem=kubernetes_ca_pem
        )
        self._compute = Compute(self.cloud, self._container)
        parts = (self._accounts, self._projects, self._services, self._container, self._compute)
        self._routes = [(route, route.pattern()) for part in parts for route in part.routes()]

    # --- what other stand-ins and tests ask and set -----------------------------------------------------------------

    def connect_cluster(self, endpoint: str, ca_pem: str) -> None:
        """What clusters answer from now on as `endpoint` (`127.0.0.1:PORT`) and `masterAuth.clusterCaCertificate`."""
        self._container.kubernetes_endpoint = endpoint
        self._container.kubernetes_ca_pem = ca_pem

    def workload_identity(self, namespace: str, service_account_name: str, annotations: Mapping[str, str]) -> str:
        """The IAM member that a pod of this Kubernetes service account is, at this moment."""
        with self.cloud.store.transaction():
            email = annotations.get(GSA_ANNOTATION, "")
            pool = self.cloud.workload_pool
            if self._accounts.may_impersonate(email, f"serviceAccount:{pool}[{namespace}/{service_account_name}]"):
                return f"serviceAccount:{email}"
            # Principal identifiers keep this host in every universe.
            return (
                f"principal://iam.googleapis.com/projects/{self.cloud.project_number}/locations/global/"
                f"workloadIdentityPools/{pool}/subject/ns/{namespace}/sa/{service_account_name}"
            )

    def register_node_pool(self, cluster: str, pool: Json, *, location: str | None = None) -> None:
        """Node auto-creation made `pool` (a NodePool as JSON, at least `name`); one of that name is replaced."""
        with self.cloud.store.transaction():
            self._container.settle()
            self._container.register_node_pool(f"{location or self.cloud.region}/{cluster}", pool)

    def unregister_node_pool(self, cluster: str, name: str, *, location: str | None = None) -> None:
        """An auto-created pool is gone again."""
        with self.cloud.store.transaction():
            self._container.unregister_node_pool(f"{location or self.cloud.region}/{cluster}", name)

    def on_nodes_gone(self, listener: Callable[[list[str]], None]) -> None:
        """Tell `listener` which nodes ended with their cluster or node pool. It must not block."""
        self._container.on_nodes_gone = listener

    def boot_node(self, name: str, *, machine_type: str, accelerator: str = "", gpus: int = 0) -> None:
        """A node of the cluster made last boots, with its disk; its GPUs count in the quota from now on."""
        with self.cloud.store.transaction():
            self._container.settle()
            cluster = self._container.add_node(name, machine_type=machine_type, accelerator=accelerator, gpus=gpus)
            if cluster is not None:
                labels = {"goog-gke-node": "", "goog-k8s-cluster-name": cluster}
                self._compute.register_disk(name, self.cloud.zones[0], BOOT_DISK_GIB, labels)

    def remove_node(self, name: str) -> None:
        """A node is gone, and its boot disk; an auto-created pool goes with its last node."""
        with self.cloud.store.transaction() as data:
            self._container.remove_node(name)
            data["disks"].pop(name, None)

    def remove_nodes(self) -> None:
        """No node is left: the clusters' machines ended with the process that played them."""
        for name in tuple(self.cloud.store.data["nodes"]):
            self.remove_node(name)

    def register_disk(self, name: str, *, zone: str | None = None, size_gib: int = 100, **labels: str) -> None:
        """A disk appears in the project, e.g. behind a volume."""
        with self.cloud.store.transaction():
            self._compute.register_disk(name, zone or self.cloud.zones[0], size_gib, labels)

    def remove_disk(self, name: str) -> None:
        with self.cloud.store.transaction() as data:
            data["disks"].pop(name, None)

    def deny(self, *permissions: str) -> None:
        """From now on the caller lacks exactly these permissions."""
        self.cloud.denied_permissions = frozenset(permissions)

    def fail_next_operation(self, message: str) -> None:
        """The next GKE operation ends with this error (e.g. a stock-out), after its usual time."""
        self._container.next_failure = message

    # --- HTTP -------------------------------------------------------------------------------------------------------

    def build_app(self) -> web.Application:
        middlewares = wire_middlewares(log=self.requests, plan=self.faults, link=Link(), error_response=_outage)
        app = web.Application(middlewares=middlewares)
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        found = self._match(request.method, request.path)
        if found is None:
            page = not_found_page(request.path)
            return web.Response(status=404, text=page, content_type="text/html", headers=SERVER_HEADERS)
        route, params = found
        query = {name: ",".join(request.query.getall(name)) for name in request.query}
        enums_as_numbers = "enum-encoding=int" in query.get("$alt", query.get("alt", ""))
        try:
            call = Call(params, query, _json_body(raw))
            return _response(200, encode(self._handle(route, call), enums_as_numbers=enums_as_numbers))
        except ApiError as error:
            return _error(error)

    def _match(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        for route, pattern in self._routes:
            if route.method == method and (match := pattern.fullmatch(path)):
                return route, match.groupdict()
        return None

    def _handle(self, route: Route, call: Call) -> Json | Message:
        with self.cloud.store.transaction() as data:
            self._services.settle()
            self._container.settle()
            self._require_query(route, call)
            if route.service not in _ALWAYS_REACHABLE:
                self.cloud.require_enabled(route.service, data["services"])
            if route.permission is not None:
                resource = re.sub(r"\{(\w+)\}", lambda match: call.params[match[1]], route.resource)
                project = call.params.get("project", self.cloud.project)
                self.cloud.require_permission(route.service, route.permission, resource, project)
            return route.handler(call)

    def _require_query(self, route: Route, call: Call) -> None:
        for name, value in call.query.items():
            if name == "fields":
                raise not_simulated("partial answers (the `fields` parameter)")
            if name not in SYSTEM_PARAMETERS | route.query:
                raise bad_request(
                    "",
                    f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter. '
                    f"Field '{name}' could not be found in request message.",
                )
            if name == "pageToken" and value:
                raise bad_request("page_token", "Invalid page token.")
            if name in ("alt", "$alt") and value.partition(";")[0] != "json":
                raise not_simulated(f"answers as {value}")


def _response(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, headers=SERVER_HEADERS | {"Content-Type": JSON_CONTENT_TYPE})


def _error(error: ApiError) -> web.Response:
    return _response(error.code, encode(error.body(), enums_as_numbers=False))


def _outage(http_status: int) -> web.Response:
    return _error(outage(http_status))


def _json_body(raw: bytes) -> Json:
    if not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError:
        raise bad_request("", "Invalid JSON payload received. Unexpected token.") from None
    if not isinstance(body, dict):
        raise bad_request("", "Invalid JSON payload received. Root element must be a message.")
    return body
