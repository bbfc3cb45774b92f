"""Which revision gets how much of the traffic: read it, move it, wait until it has moved, and drain what is left.

With a Gateway the weights of an HTTPRoute decide. Without one the Service decides, by its selector: the pods of one
revision, or those of all, in which case their numbers are the weights. Every change is a server-side apply.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

from rollout.clients.cluster import ClusterClient
from rollout.delivery import IN_PLACE, ORDER_ANNOTATION, DeliveryReport, GatewayRef, Order, suffixed
from rollout.errors import BadInput, ClusterUnreachable, DeadlineExceeded, NotFound
from rollout.objects import is_ours
from rollout.plan import RolloutPlan
from rollout.rendering import KubernetesObject
from rollout.report import Change
from rollout.revisions import (
    LIVE_ANNOTATION,
    backend_service,
    front_service,
    health_checks,
    http_route,
    revision_of,
    revision_selector,
    revisions_in,
    route_weights,
    shared_selector,
)
from rollout.stage import parse_vllm_metrics
from rollout.values import Value

log = logging.getLogger(__name__)

TAKEOVER_TIMEOUT_S = 600.0
"""A new load balancer of GKE takes five minutes to carry traffic; a changed weight, seconds."""
POLL_S = 0.5
SETTLE_S = 2.0
"""Between a written Service and the last kube-proxy that has read it; Kubernetes' own target is one second."""
_BUSY = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_ROUTE = ("gateway.networking.k8s.io/v1", "HTTPRoute")


class Traffic(Value):
    """What the cluster says about the traffic of one model."""

    live: str | None
    """The revision that serves, and that a rollback leads to; None if there is none."""
    weights: dict[str, int] = {}
    """Percent by revision. Without a Gateway: 100 for the live one, or nothing while all revisions share a Service."""
    revisions: tuple[str, ...] = ()
    """Every revision that has a Deployment."""


class TrafficClient:
    """Moves the traffic of the model that `plan` serves. `plan` is the model's own, not that of a revision."""

    def __init__(self, cluster: ClusterClient, plan: RolloutPlan) -> None:
        self._cluster = cluster
        self._api = cluster.api
        self._plan = plan
        self._serving = plan.serving
        self._namespace = plan.target.namespace
        self._gateway: GatewayRef | None = plan.policy.delivery.gateway

    # --- Reading ------------------------------------------------------------------------------------------------------

    def read(self) -> Traffic:
        """Ask the cluster: nothing about the traffic is remembered elsewhere, so a dead run loses nothing.

        Raises BadInput if the strategy names a Gateway that the cluster cannot have, or none where one leads the way.
        """
        revisions = revisions_in(self._ours(), self._serving)
        service = self._find("v1", "Service", self._serving.service_name)
        live = _live(service, revisions) if service else None
        if self._gateway is None:
            self._require_no_route()
            return Traffic(live=live, weights={live: 100} if live else {}, revisions=tuple(sorted(revisions)))
        self._require_gateway()
        route = self._find(*_ROUTE, self._serving.name)
        weights = route_weights(route, self._serving, revisions) if route else {}
        return Traffic(live=live, weights=weights, revisions=tuple(sorted(revisions)))

    def order(self, revision: str) -> Order | None:
        """The operator's word about `revision`. A word that is none holds: better to wait than to guess."""
        deployment = self._find("apps/v1", "Deployment", suffixed(self._serving.name, revision))
        word = ((deployment or {}).get("metadata", {}).get("annotations") or {}).get(ORDER_ANNOTATION)
        if not word:
            return None
        try:
            return Order(word)
        except ValueError:
            log.warning("%s=%s is no order (%s): holding", ORDER_ANNOTATION, word, ", ".join(Order))
            return Order.HOLD

    def objects_of(self, revision: str) -> tuple[KubernetesObject, ...]:
        """The live objects that belong to one revision alone."""
        return tuple(item for item in self._ours() if revision_of(item, self._serving) == revision)

    def in_flight(self, revision: str) -> int:
        """Requests that the revision's pods have not finished, by their own count. Pods that are gone count nothing."""
        pods = self._select(revision_selector(self._serving, revision))
        return sum(self._busy(pod) for pod in pods if _is_ready(pod))

    # --- Moving -------------------------------------------------------------------------------------------------------

    def shift(self, live: str | None, revision: str, weight_percent: int) -> tuple[Change, ...]:
        """Give `revision` its share, `live` the rest, and everything else nothing; returns when it is so.

        At 100 % the Service follows, and `revision` is the live one from then on.
        """
        if live is not None and weight_percent < 100:
            weights = {live: 100 - weight_percent, revision: weight_percent}
            selector = self._selector_of(live, weights)
        else:
            weights = {revision: 100} if live is None else {live: 0, revision: 100}
            selector, live = revision_selector(self._serving, revision), revision
        front: list[KubernetesObject] = []
        if IN_PLACE in weights:
            # An in-place Deployment has only the front Service, which is about to lead elsewhere.
            front.append(backend_service(self._plan, IN_PLACE))
        if self._gateway is not None:
            if IN_PLACE in weights:
                front += health_checks(self._serving, self._plan.target, IN_PLACE, rollout_id=self._plan.rollout_id)
            front.append(http_route(self._plan, self._gateway, weights))
        front.append(front_service(self._plan, live, selector))
        changes = self._cluster.apply(front)
        self._await_endpoints(selector)
        if self._gateway is not None:
            self._await_route()
        return changes

    def restore(self, live: str) -> tuple[Change, ...]:
        """All of the traffic to `live`, as before the delivery."""
        return self.shift(None, live, 100)

    def drain(self, revision: str, *, timeout_s: float) -> int:
        """Wait until the revision's pods have answered everything; returns how many requests are left after that.

        What is left has the pods' grace period (`preStop` waits for it as well).
        """
        deadline = time.monotonic() + timeout_s
        while (left := self.in_flight(revision)) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return left

    def retire(self, revision: str) -> tuple[Change, ...]:
        """Delete the revision's objects, and wait until its pods have gone. It must have no traffic any more."""
        return self._cluster.delete(self.objects_of(revision))

    def undo(self, report: DeliveryReport) -> tuple[Change, ...]:
        """Take back a delivery that its run cannot take back any more; nothing happens where there is nothing to undo.

        Asks the cluster first: a later rollout may have finished what this one began.
        """
        if report.live_before is None or not report.is_beside_live:
            return ()
        traffic = self.read()
        if not {report.live_before, report.revision} <= set(traffic.revisions):
            return ()
        return self.restore(report.live_before) + self.retire(report.revision)

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _selector_of(self, live: str, weights: Mapping[str, int]) -> dict[str, str]:
        shares = self._gateway is None and all(weights.values())
        return shared_selector(self._serving) if shares else revision_selector(self._serving, live)

    def _await_endpoints(self, selector: Mapping[str, str]) -> None:
        """Until the Service's endpoint slices hold exactly the ready pods that it selects."""
        path = self._api.resource("discovery.k8s.io/v1", "EndpointSlice").path(self._namespace)
        query = {"labelSelector": f"kubernetes.io/service-name={self._serving.service_name}"}
        for _ in self._until("the Service's endpoints have not followed"):
            slices = self._api.get(path, query)["items"]
            ready = {
                endpoint["targetRef"]["name"]
                for each in slices
                for endpoint in each.get("endpoints") or []
                if (endpoint.get("conditions") or {}).get("ready") and endpoint.get("targetRef")
            }
            if ready and ready == self._ready_pods(selector):
                break
        time.sleep(SETTLE_S)

    def _await_route(self) -> None:
        """Until the Gateway's controller says that it accepts the route as it is now."""
        for _ in self._until("the Gateway's controller has not taken up the HTTPRoute"):
            route = self._find(*_ROUTE, self._serving.name)
            if route is not None and _is_taken_up(route):
                return

    def _until(self, complaint: str) -> Iterator[None]:
        deadline = time.monotonic() + TAKEOVER_TIMEOUT_S
        while time.monotonic() < deadline:
            yield
            time.sleep(POLL_S)
        raise DeadlineExceeded(
            f"{complaint} after {TAKEOVER_TIMEOUT_S:.0f} s.",
            where=f"traffic of {self._namespace}/{self._serving.name}",
            resolution="Look at the status of the HTTPRoute and of the Gateway: kubectl describe httproute,gateway.",
        )

    def _require_gateway(self) -> None:
        try:
            self._api.resource(*_ROUTE)
        except NotFound as error:
            raise BadInput(
                "the strategy names a Gateway, and the cluster has no Gateway API.",
                where=f"target {self._plan.target.name}",
                resolution="Enable it (gcloud container clusters update … --gateway-api=standard), or leave"
                " policy.delivery.gateway out: then the Service moves.",
            ) from error

    def _require_no_route(self) -> None:
        """Clients of a Gateway would stay with a revision that is about to go."""
        try:
            route = self._find(*_ROUTE, self._serving.name)
        except NotFound:
            return  # no Gateway API, no route
        if route is not None and is_ours(route):
            raise BadInput(
                f"HTTPRoute {self._serving.name} leads clients to the revisions, and the strategy names no Gateway.",
                where=f"target {self._plan.target.name}, policy.delivery.gateway",
                resolution="Name the Gateway, or delete the route once no client comes in by it any more.",
            )

    def _ours(self) -> tuple[KubernetesObject, ...]:
        return self._cluster.inventory()

    def _find(self, api_version: str, kind: str, name: str) -> KubernetesObject | None:
        found = self._api.find(self._api.resource(api_version, kind).path(self._namespace, name))
        return None if found is None else {"apiVersion": api_version, "kind": kind, **found}

    def _select(self, selector: Mapping[str, str]) -> list[KubernetesObject]:
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        path = self._api.resource("v1", "Pod").path(self._namespace)
        items: list[KubernetesObject] = self._api.get(path, {"labelSelector": labels})["items"]
        return items

    def _ready_pods(self, selector: Mapping[str, str]) -> set[str]:
        return {pod["metadata"]["name"] for pod in self._select(selector) if _is_ready(pod)}

    def _busy(self, pod: KubernetesObject) -> int:
        pods = self._api.resource("v1", "Pod").path(self._namespace)
        path = f"{pods}/{pod['metadata']['name']}:{self._serving.port}/proxy/metrics"
        try:
            metrics = parse_vllm_metrics(self._api.text(path))
        except (NotFound, ClusterUnreachable):
            return 0  # it went away in between: whatever it had is not in flight any more
        return int(sum(metrics.get(gauge, 0.0) for gauge in _BUSY))


def _live(service: KubernetesObject, revisions: set[str]) -> str | None:
    annotations = service["metadata"].get("annotations") or {}
    live: str = annotations.get(LIVE_ANNOTATION, IN_PLACE)
    return live if live in revisions else None


def _is_ready(pod: KubernetesObject) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    ready = any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")


def _is_taken_up(route: KubernetesObject) -> bool:
    """`Accepted` and `ResolvedRefs` are the API's own; GKE adds `Reconciled` once its load balancer has followed."""
    generation = int(route["metadata"].get("generation") or 0)
    parents = (route.get("status") or {}).get("parents") or []
    conditions = [condition for parent in parents for condition in parent.get("conditions") or []]
    return bool(conditions) and all(
        each["status"] == "True" and int(each.get("observedGeneration") or 0) >= generation for each in conditions
    )
