"""A Kubernetes cluster that serves models: preview, apply, prune, delete, wait, reach.

Changes go through server-side apply with the field manager `llm-rollout` and never force. Only objects that carry our
label are ever deleted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Self

from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException, new_client_from_config

from rollout.clients.cluster_api import ATTEMPTS, ClusterApi, Snapshot
from rollout.clients.cluster_wait import LogLine, Progress, StartupWait, WaitReport, follow_deployment_logs
from rollout.clients.gke import Gke
from rollout.clients.google_auth import credentials_for, google_errors
from rollout.clients.port_forward import service_endpoint
from rollout.diagnosis import StartupObservation
from rollout.diff import ObjectDiff, diff_markdown, diff_object
from rollout.errors import (
    BadInput,
    DeadlineExceeded,
    FieldConflict,
    ManifestRejected,
    NotFound,
    PermissionMissing,
    QuotaExceeded,
    RolloutError,
)
from rollout.objects import (
    COMPUTE_CLASS_LABEL,
    INSTANCE_LABEL,
    INVENTORY_KINDS,
    MANAGED_BY_LABEL,
    MANAGER,
    is_ours,
    scales,
    with_autoscaled_replicas,
    without_ownership,
)
from rollout.plan import object_name
from rollout.rendering import KubernetesObject
from rollout.report import Action, Change
from rollout.rights import Denied, Right
from rollout.target import ClusterMode, Target
from rollout.values import Value

APPLY_PATCH = "application/apply-patch+yaml"
"""JSON is YAML: the body is sent as JSON."""

REVISION_ANNOTATION = "deployment.kubernetes.io/revision"
TEMPLATE_HASH_LABEL = "pod-template-hash"

DELETE_DEADLINE_S = 600.0
"""The grace period (120 s by default), the namespace controller's own rounds and a node that is slow to answer."""

REVIEWS_AT_ONCE = 8
"""A plan asks for about sixty rights, a few milliseconds each: so they take half a second even over a far line."""

_REFUSALS = (ManifestRejected, FieldConflict, NotFound, QuotaExceeded, PermissionMissing)
"""What the API server may answer to an object; a preview collects them, to show all at once."""

_SYSTEM_MADE = frozenset({"default", "kube-root-ca.crt", "openshift-service-ca.crt", "istio-ca-root-cert"})
"""Objects that Kubernetes itself, OpenShift and Istio put into every namespace."""


_OTHERS_KINDS = (
    ("apps/v1", "StatefulSet"),
    ("apps/v1", "DaemonSet"),
    ("batch/v1", "CronJob"),
    ("networking.k8s.io/v1", "Ingress"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
)
"""What no rollout makes, and others may have where it is: a namespace that holds it is not deleted with it."""

_SYSTEM_NAMESPACES = ("kube-", "gke-", "gmp-", "custom-metrics")
"""Of Kubernetes, GKE and the metrics adapter: they come and go with the cluster."""


class ApplyPreview(Value):
    """What an apply would do, by the server's own word. Nothing has changed."""

    diffs: tuple[ObjectDiff, ...]

    @property
    def changes(self) -> tuple[Change, ...]:
        return tuple(diff.change for diff in self.diffs)

    @property
    def markdown(self) -> str:
        return diff_markdown(self.diffs)


class Revision(Value):
    """One generation of a Deployment's pods, as its ReplicaSet keeps it."""

    number: int
    replica_set: str
    image: str
    args: tuple[str, ...]
    annotations: dict[str, str]
    """The pod template's, with our provenance."""


class NodeRoom(Value):
    """The nodes that pods may go to, and what is free on them."""

    nodes: int
    idle_gpus: int
    """Those that no pod has requested, counted in groups that one pod can have."""


class ClusterClient:
    """One namespace of one cluster."""

    def __init__(self, api: ClusterApi, target: Target) -> None:
        self.api = api
        self.target = target

    @classmethod
    def connect(cls, target: Target, *, attempts: int = ATTEMPTS) -> Self:
        """Reach the target's cluster: through GKE's API, or by a kubeconfig context.

        `attempts` bounds how often each request is tried while the API server does not answer: the default outlasts an
        API server that is away for a minute.

        Raises NotFound if GKE has no such cluster, BadInput for a kubeconfig that does not help, PermissionMissing, and
        ClusterUnreachable.
        """
        if target.cluster.mode is ClusterMode.KUBECONFIG:
            return cls(ClusterApi(_client_from_kubeconfig(target), attempts=attempts), target)
        return cls(ClusterApi(_client_from_gke(target), attempts=attempts), target)

    # --- Changing -----------------------------------------------------------------------------------------------------

    def preview(self, manifests: Sequence[KubernetesObject]) -> ApplyPreview:
        """Dry-run everything on the server, and compare with what is live.

        Raises the refusal; if several objects are refused, one ManifestRejected names them all.
        """
        diffs: list[ObjectDiff] = []
        refusals: list[RolloutError] = []
        for manifest in manifests:
            try:
                diffs.append(self._dry_run(manifest, manifests))
            except _REFUSALS as refusal:
                refusals.append(_about(manifest, refusal))
        if len(refusals) == 1:
            raise refusals[0]
        if refusals:
            raise ManifestRejected("; ".join(map(str, refusals)), where=self.api.host)
        return ApplyPreview(diffs=tuple(diffs))

    def apply(self, manifests: Sequence[KubernetesObject]) -> tuple[Change, ...]:
        """Apply in the order given, after a dry run of everything. What is as planned already is not touched."""
        changes: list[Change] = []
        for manifest, diff in zip(manifests, self.preview(manifests).diffs, strict=True):
            if diff.action in (Action.CREATED, Action.UPDATED):
                try:
                    self._server_side_apply(self._wanted(manifest), dry_run=False)
                except _REFUSALS as refusal:
                    raise _about(manifest, refusal) from refusal
            changes.append(diff.change)
        return tuple(changes)

    def prune(self, manifests: Sequence[KubernetesObject], instance: str) -> tuple[Change, ...]:
        """Delete objects of the Deployment `instance` that are ours and that the plan no longer holds."""
        planned = {(manifest["kind"], object_name(manifest)) for manifest in manifests}
        surplus = [
            manifest
            for manifest in self.inventory({INSTANCE_LABEL: instance})
            if (manifest["kind"], object_name(manifest)) not in planned
            and not manifest["metadata"].get("ownerReferences")
        ]
        return self.delete(surplus)

    def prune_shared(self, manifests: Sequence[KubernetesObject]) -> tuple[Change, ...]:
        """Delete what is ours, belongs to no single Deployment, is not in the plan and is used by nobody any more.

        These are ComputeClasses and service accounts, of which a plan with another accelerator or identity has others.
        Used is what a pod or a Deployment names, old pods that still run included; whoever may not list the pods of all
        namespaces cannot know, and deletes nothing.
        """
        planned = {(manifest["kind"], object_name(manifest)) for manifest in manifests}
        surplus = [
            item
            for item in self.inventory()
            if item["kind"] in ("ComputeClass", "ServiceAccount")
            and INSTANCE_LABEL not in item["metadata"].get("labels", {})
            and (item["kind"], object_name(item)) not in planned
        ]
        if not surplus:
            return ()
        try:
            used = self._used_by_pods()
        except PermissionMissing:
            return ()
        return self.delete([item for item in surplus if (item["kind"], object_name(item)) not in used])

    def _used_by_pods(self) -> set[tuple[str, str]]:
        """(kind, name) of the compute classes and service accounts that pods and Deployments name."""
        pods = [(item["metadata"]["namespace"], item["spec"]) for item in self.api.get("/api/v1/pods")["items"]]
        pods += [
            (item["metadata"]["namespace"], item["spec"]["template"]["spec"])
            for item in self.api.get(self.api.resource("apps/v1", "Deployment").path())["items"]
        ]
        used: set[tuple[str, str]] = set()
        for namespace, spec in pods:
            used.add(("ServiceAccount", f"{namespace}/{spec.get('serviceAccountName', 'default')}"))
            compute_class = (spec.get("nodeSelector") or {}).get(COMPUTE_CLASS_LABEL)
            if compute_class:
                used.add(("ComputeClass", compute_class))
        return used

    def delete(
        self, manifests: Sequence[KubernetesObject], *, deadline_s: float = DELETE_DEADLINE_S
    ) -> tuple[Change, ...]:
        """Delete in reverse order what is ours, and wait until it is gone.

        What somebody else made, and a Namespace that holds something of somebody else, is left and reported as adopted.
        Raises DeadlineExceeded naming what is still there.
        """
        changes: list[Change] = []
        going: list[KubernetesObject] = []
        for manifest in reversed(manifests):
            name = object_name(manifest)
            live = self._find(manifest)
            if live is None:
                changes.append(Change(action=Action.UNCHANGED, kind=manifest["kind"], name=name, detail="not there"))
                continue
            reason = self._reason_to_keep(live)
            if reason:
                changes.append(Change(action=Action.ADOPTED, kind=manifest["kind"], name=name, detail=reason))
                continue
            going.append(live)
            if live["metadata"].get("ownerReferences"):
                continue  # goes with its owner; deleted by hand it would only be made anew
            with contextlib.suppress(NotFound):
                # Foreground: an owner goes only after what it owns, so that "gone" means the pods too.
                self.api.request("DELETE", self.api.path_of(live), {"propagationPolicy": "Foreground"})
            changes.append(Change(action=Action.DELETED, kind=manifest["kind"], name=name))
        self._await_gone(going, deadline_s)
        return tuple(changes)

    def rollback(self, name: str) -> Change:
        """Give the Deployment `name` an earlier pod template back: the one that still serves, or else the previous one.

        Raises NotFound if there is none.
        """
        replica_sets = self._replica_sets(name)
        if len(replica_sets) < 2:
            raise NotFound(
                f"the Deployment {name} has no earlier revision.",
                where=self.target.namespace,
                resolution="Apply an earlier plan instead.",
            )
        current, *earlier = replica_sets
        serving = (item for item in earlier if (item.get("status") or {}).get("readyReplicas"))
        previous = next(serving, earlier[0])
        live = self.api.get(self._path("apps/v1", "Deployment", name))
        template = previous["spec"]["template"]
        labels = {key: value for key, value in template["metadata"]["labels"].items() if key != TEMPLATE_HASH_LABEL}
        manifest: KubernetesObject = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": name,
                "namespace": self.target.namespace,
                "labels": live["metadata"].get("labels") or {},
                # The provenance of what serves again, as `serving_objects` states it in both places.
                "annotations": template["metadata"].get("annotations") or {},
            },
            "spec": {
                **{key: live["spec"][key] for key in ("replicas", "selector", "strategy", "progressDeadlineSeconds")},
                "template": {**template, "metadata": {**template["metadata"], "labels": labels}},
            },
        }
        manifest["spec"]["template"]["metadata"].pop("creationTimestamp", None)
        self._server_side_apply(manifest, dry_run=False)
        detail = f"back to revision {_revision_number(previous)} from {_revision_number(current)}"
        return Change(action=Action.UPDATED, kind="Deployment", name=f"{self.target.namespace}/{name}", detail=detail)

    # --- Reading ------------------------------------------------------------------------------------------------------

    def find(self, manifest: KubernetesObject) -> KubernetesObject | None:
        """The live object of the same kind and name, or None."""
        return self._find(manifest)

    def inventory(self, labels: Mapping[str, str] | None = None) -> tuple[KubernetesObject, ...]:
        """Everything of ours that the target can hold, narrowed by labels, in the order of application."""
        selector = ",".join(f"{key}={value}" for key, value in {MANAGED_BY_LABEL: MANAGER, **(labels or {})}.items())
        return tuple(item for item in self._list_all({"labelSelector": selector}) if self._in_reach(item))

    def instances(self) -> frozenset[tuple[str, str]]:
        """(namespace, instance) of every model server of ours in the whole cluster."""
        query = {"labelSelector": f"{MANAGED_BY_LABEL}={MANAGER}"}
        found = self.api.get(self.api.resource("apps/v1", "Deployment").path(), query)["items"]
        return frozenset(
            (item["metadata"]["namespace"], item["metadata"]["labels"].get(INSTANCE_LABEL, item["metadata"]["name"]))
            for item in found
        )

    def foreign_pods(self) -> tuple[str, ...]:
        """`namespace/name` of the pods that somebody else runs in the cluster."""
        return tuple(
            f"{item['metadata']['namespace']}/{item['metadata']['name']}"
            for item in self.api.get("/api/v1/pods", {})["items"]
            if not is_ours(item)
            and item["status"].get("phase") in ("Pending", "Running")
            and not item["metadata"]["namespace"].startswith(_SYSTEM_NAMESPACES)
        )

    def gpu_room(self, node_selector: Mapping[str, str], group: int) -> NodeRoom:
        """The nodes that match, and how many of their GPUs are free in groups of `group` on one node.

        Raises PermissionMissing if the caller may not list nodes or the pods of all namespaces.
        """
        selector = ",".join(f"{key}={value}" for key, value in sorted(node_selector.items()))
        nodes = self.api.get("/api/v1/nodes", {"labelSelector": selector})["items"]
        nodes = [node for node in nodes if not _repels(node, node_selector)]
        free = {node["metadata"]["name"]: _gpus(node["status"].get("allocatable")) for node in nodes}
        for pod in self.api.get("/api/v1/pods", {})["items"] if free else ():
            if pod["spec"].get("nodeName") in free and pod["status"].get("phase") in ("Pending", "Running"):
                containers = pod["spec"]["containers"]
                free[pod["spec"]["nodeName"]] -= sum(_gpus(each["resources"].get("requests")) for each in containers)
        return NodeRoom(nodes=len(free), idle_gpus=sum(max(0, gpus) // group * group for gpus in free.values()))

    def revisions(self, name: str) -> tuple[Revision, ...]:
        """The revisions of the Deployment `name` that Kubernetes keeps, newest first."""
        return tuple(_revision(replica_set) for replica_set in self._replica_sets(name))

    def api_groups(self) -> frozenset[str]:
        """The API groups that the cluster serves, those of its add-ons included."""
        return frozenset(group["name"] for group in self.api.get("/apis")["groups"])

    def namespace_exists(self, namespace: str) -> bool:
        return self.api.find(f"/api/v1/namespaces/{namespace}") is not None

    def caller(self) -> str:
        """The name by which the API server knows us."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        try:
            review = self.api.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", None, body)
        except NotFound:
            return "the caller"  # before Kubernetes 1.28
        name: str = review["status"]["userInfo"]["username"]
        return name

    def denied(self, rights: Iterable[Right]) -> tuple[Denied, ...]:
        """Those of `rights` that we lack, by the API server's own word: RBAC and GKE's IAM both count.

        Kinds that are not installed are passed over.
        """
        asked = [attributes for right in rights if (attributes := self._attributes(right))]
        with ThreadPoolExecutor(max_workers=REVIEWS_AT_ONCE) as pool:
            allowed = list(pool.map(self._may, asked))
        return tuple(
            Denied(resource=_shown(each), verb=each["verb"], namespace=each["namespace"])
            for each, granted in zip(asked, allowed, strict=True)
            if not granted
        )

    def ready_replicas(self, name: str) -> int:
        """How many pods of the Deployment `name` are ready."""
        deployment = self.api.get(self._path("apps/v1", "Deployment", name))
        return int((deployment.get("status") or {}).get("readyReplicas", 0))

    def autoscaler_says(self, name: str) -> str:
        """The conditions of the HorizontalPodAutoscaler `name`, in its own words."""
        autoscaler = self.api.get(self._path("autoscaling/v2", "HorizontalPodAutoscaler", name))
        conditions = (autoscaler.get("status") or {}).get("conditions") or []
        return "; ".join(f"{each['type']} is {each['status']}: {each.get('message', '')}" for each in conditions)

    # --- Waiting and reaching -----------------------------------------------------------------------------------------

    def wait_available(
        self,
        name: str,
        *,
        deadline_s: float,
        context: StartupObservation | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_log: Callable[[LogLine], None] | None = None,
        patience_factor: float = 1.0,
    ) -> WaitReport:
        """Watch the Deployment `name` until all of its new pods are available.

        `context` tells the diagnosis what was planned: serving, target, weights. The rest of it is observed here.
        Faults that may heal get their category's patience, times `patience_factor`.

        Raises StartupFailed as soon as it cannot succeed, and DeadlineExceeded after `deadline_s` seconds.
        """
        wait = StartupWait(
            self.api,
            self.target.namespace,
            name,
            context=context or StartupObservation(target=self.target),
            on_progress=on_progress,
            on_log=on_log,
            patience_factor=patience_factor,
        )
        return wait.run(deadline_s)

    def follow_logs(self, name: str, on_line: Callable[[LogLine], None], stop: threading.Event) -> None:
        """Pass on the log lines of all pods of the Deployment `name`, from now on, until `stop` is set."""
        follow_deployment_logs(self.api, self.target.namespace, name, on_line, stop)

    def endpoint(self, service_name: str, *, pod: str | None = None) -> AbstractContextManager[str]:
        """The Service's base URL, or that of one `pod` behind it.

        Its address inside the cluster, otherwise a port-forward that lives in the block.
        """
        return service_endpoint(self.api, self.target.namespace, service_name, pod=pod)

    # --- Parts --------------------------------------------------------------------------------------------------------

    def _dry_run(self, manifest: KubernetesObject, manifests: Sequence[KubernetesObject]) -> ObjectDiff:
        namespace = manifest["metadata"].get("namespace")
        if namespace and self._will_be_made(namespace, manifests):
            self._validate_elsewhere(manifest)
            return diff_object(None, manifest)
        live = self._find(manifest)
        result = self._server_side_apply(self._wanted(manifest, live), dry_run=True)
        diff = diff_object(live, result)
        if diff.action is Action.UNCHANGED and live is not None and not is_ours(live):
            return diff.model_copy(update={"action": Action.ADOPTED})
        return diff

    def _wanted(self, manifest: KubernetesObject, live: KubernetesObject | None = None) -> KubernetesObject:
        live = live or self._find(manifest)
        if live is None:
            return manifest
        wanted = manifest if is_ours(live) else without_ownership(manifest)
        return with_autoscaled_replicas(wanted, live) if self._is_autoscaled(manifest) else wanted

    def _is_autoscaled(self, manifest: KubernetesObject) -> bool:
        if manifest["kind"] != "Deployment":
            return False
        if "replicas" not in manifest["spec"]:
            return True  # by an autoscaler that may be applied only after it
        autoscalers = self.api.get(self._path("autoscaling/v2", "HorizontalPodAutoscaler"))["items"]
        return any(scales(autoscaler, manifest) for autoscaler in autoscalers)

    def _will_be_made(self, namespace: str, manifests: Sequence[KubernetesObject]) -> bool:
        planned = any(m["kind"] == "Namespace" and m["metadata"]["name"] == namespace for m in manifests)
        return planned and not self.namespace_exists(namespace)

    def _validate_elsewhere(self, manifest: KubernetesObject) -> None:
        """Dry-run an object whose namespace does not exist yet, under another name in `default`."""
        metadata = {key: value for key, value in manifest["metadata"].items() if key != "name"}
        metadata |= {"namespace": "default", "generateName": f"{MANAGER}-preview-"}
        path = self.api.resource(manifest["apiVersion"], manifest["kind"]).path("default")
        query = {"dryRun": "All", "fieldValidation": "Strict", "fieldManager": MANAGER}
        self.api.request("POST", path, query, {**manifest, "metadata": metadata})

    def _server_side_apply(self, manifest: KubernetesObject, *, dry_run: bool) -> KubernetesObject:
        query: dict[str, str] = {"fieldManager": MANAGER, "fieldValidation": "Strict"}
        if dry_run:
            query["dryRun"] = "All"
        return self.api.request("PATCH", self.api.path_of(manifest), query, manifest, APPLY_PATCH)

    def _attributes(self, right: Right) -> dict[str, str] | None:
        """The right as a SelfSubjectAccessReview asks for it; None where the cluster knows no such kind."""
        try:
            resource = self.api.resource(right.api_version, right.kind)
        except NotFound:
            return None
        # To Kubernetes, a namespace is an object within itself; only its list is the cluster's.
        is_ours = right.kind == "Namespace" and right.verb != "list"
        return {
            "group": right.api_version.rpartition("/")[0],
            "resource": resource.plural,
            "subresource": right.subresource,
            "verb": right.verb,
            "namespace": self.target.namespace if resource.namespaced or is_ours else "",
            "name": self.target.namespace if is_ours else "",
        }

    def _may(self, attributes: Mapping[str, str]) -> bool:
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        review = self.api.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", None, body)
        return bool(review["status"].get("allowed"))

    def _find(self, manifest: KubernetesObject) -> KubernetesObject | None:
        return self.api.find(self.api.path_of(manifest))

    def _path(self, api_version: str, kind: str, name: str | None = None) -> str:
        return self.api.resource(api_version, kind).path(self.target.namespace, name)

    def _list_all(
        self, query: Mapping[str, str], kinds: Sequence[tuple[str, str]] = INVENTORY_KINDS
    ) -> Iterable[KubernetesObject]:
        for api_version, kind in kinds:
            try:
                listing = self.api.get(self._path(api_version, kind), query)
            except NotFound:
                continue
            for item in listing["items"]:
                yield {"apiVersion": api_version, "kind": kind, **item}

    def _in_reach(self, item: KubernetesObject) -> bool:
        return item["kind"] != "Namespace" or item["metadata"]["name"] == self.target.namespace

    def _reason_to_keep(self, live: KubernetesObject) -> str:
        if not is_ours(live):
            return "made by somebody else"
        if live["kind"] != "Namespace":
            return ""
        try:
            items = [*self._list_all({}), *self._list_all({}, _OTHERS_KINDS)]
        except PermissionMissing as error:
            return f"may hold what the caller may not list ({error.summary})"
        foreign = [
            f"{item['kind']} {item['metadata']['name']}"
            for item in items
            if item["metadata"].get("namespace") == live["metadata"]["name"]
            and not is_ours(item)
            and item["metadata"]["name"] not in _SYSTEM_MADE
        ]
        return f"still holds {', '.join(foreign[:3])}, which is not ours" if foreign else ""

    def _await_gone(self, manifests: Sequence[KubernetesObject], deadline_s: float) -> None:
        stop = threading.Event()
        timer = threading.Timer(deadline_s, stop.set)
        timer.daemon = True
        timer.start()
        try:
            left = [manifest for manifest in manifests if not self._is_gone(manifest, stop)]
        finally:
            timer.cancel()
        if left:
            names = ", ".join(f"{manifest['kind']} {object_name(manifest)}" for manifest in left)
            raise DeadlineExceeded(
                f"still being deleted after {deadline_s:.0f} s: {names}.",
                where=self.target.namespace,
                resolution="Look at its finalizers with `kubectl get -o yaml`, and run the teardown again.",
            )

    def _is_gone(self, manifest: KubernetesObject, stop: threading.Event) -> bool:
        metadata = manifest["metadata"]
        collection = self.api.resource(manifest["apiVersion"], manifest["kind"]).path(metadata.get("namespace"))
        try:
            query = {"fieldSelector": f"metadata.name={metadata['name']}"}
            for event in self.api.follow(collection, query, stop=stop, quiet_s=2.0):
                if isinstance(event, Snapshot):
                    if all(item["metadata"]["uid"] != metadata["uid"] for item in event.items):
                        return True
                elif event.type == "DELETED" and event.item["metadata"]["uid"] == metadata["uid"]:
                    return True
        except NotFound:
            return True  # its namespace, or its whole kind, is gone
        return False

    def _replica_sets(self, name: str) -> list[KubernetesObject]:
        deployment = self.api.get(self._path("apps/v1", "Deployment", name))
        uid = deployment["metadata"]["uid"]
        listing = self.api.get(self._path("apps/v1", "ReplicaSet"))
        owned = [
            item
            for item in listing["items"]
            if any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences") or [])
        ]
        return sorted(owned, key=_revision_number, reverse=True)


def _shown(attributes: Mapping[str, str]) -> str:
    """`deployments.apps`, `pods/log`"""
    subresource = f"/{attributes['subresource']}" if attributes["subresource"] else ""
    group = f".{attributes['group']}" if attributes["group"] else ""
    return f"{attributes['resource']}{subresource}{group}"


def _repels(node: KubernetesObject, node_selector: Mapping[str, str]) -> bool:
    """Whether a taint keeps pods with that selector away: not the GPU's own, and not that of the class they select."""
    taints = node["spec"].get("taints") or ()
    tolerated = {("nvidia.com/gpu", "present"), *node_selector.items()}
    return any(
        taint["effect"] != "PreferNoSchedule" and (taint["key"], taint.get("value")) not in tolerated
        for taint in taints
    )


def _gpus(amounts: Mapping[str, str] | None) -> int:
    return int((amounts or {}).get("nvidia.com/gpu", 0))


def _revision_number(replica_set: KubernetesObject) -> int:
    return int((replica_set["metadata"].get("annotations") or {}).get(REVISION_ANNOTATION, 0))


def _revision(replica_set: KubernetesObject) -> Revision:
    template = replica_set["spec"]["template"]
    container = template["spec"]["containers"][0]
    return Revision(
        number=_revision_number(replica_set),
        replica_set=replica_set["metadata"]["name"],
        image=container["image"],
        args=tuple(container.get("args") or ()),
        annotations=template["metadata"].get("annotations") or {},
    )


def _about(manifest: KubernetesObject, refusal: RolloutError) -> RolloutError:
    """The refusal with the object's name in front: one message tells which file to correct."""
    where = f"{manifest['kind']} {object_name(manifest)}"
    return type(refusal)(refusal.summary, where=where, resolution=refusal.resolution)


# --- Connections ------------------------------------------------------------------------------------------------------


def _client_from_kubeconfig(target: Target) -> ApiClient:
    try:
        return new_client_from_config(config_file=target.cluster.kubeconfig, context=target.cluster.context)
    except (ConfigException, OSError) as error:
        raise BadInput(
            f"the kubeconfig does not lead to a cluster: {error}",
            where=f"target {target.name}",
            resolution="Set target.cluster.kubeconfig and target.cluster.context, or $KUBECONFIG.",
        ) from error


def _client_from_gke(target: Target) -> ApiClient:
    cluster = Gke(target).get()
    if cluster is None or cluster.connection is None:
        raise NotFound(
            f"there is no cluster {target.cluster.name} in {target.project}, {target.region}.",
            where=f"target {target.name}",
            resolution="Roll out with target.cluster.create_if_absent: true, or name an existing cluster.",
        )
    configuration = Configuration(host=cluster.connection.url)
    configuration.ca_cert_data = cluster.connection.ca_pem
    credentials = credentials_for(target)
    if not isinstance(credentials, AnonymousCredentials):

        def present_token(configuration: Configuration) -> None:
            # Called before every request: a wait of half an hour outlives a token.
            with google_errors(f"target {target.name}"):
                if not credentials.valid:
                    credentials.refresh(Request())
            configuration.api_key["authorization"] = f"Bearer {credentials.token}"

        configuration.refresh_api_key_hook = present_token  # type: ignore[assignment]  # declared as None
        present_token(configuration)
    return ApiClient(configuration)
