"""The controller manager: Deployments, ReplicaSets, Jobs, endpoints, garbage collection and namespaces.

Every controller is level-triggered, as in Kubernetes: a change only says which object to look at again, and
`reconcile` compares what is with what should be. The order of writes follows a real control plane's.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

from sandbox.cluster.defaults import NAME_ALPHABET
from sandbox.cluster.errors import ApiError
from sandbox.cluster.events import NORMAL, WARNING, Recorder
from sandbox.cluster.quantity import percentage_or_number
from sandbox.cluster.registry import FOREGROUND, ORPHAN, Deletion, Registry, Writer
from sandbox.cluster.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    NAMESPACE,
    POD,
    REPLICA_SET,
    SERVICE_ACCOUNT,
    Resource,
)
from sandbox.cluster.selectors import matches_label_selector
from sandbox.cluster.store import Change, Key, Store, seconds_since, timestamp

MANAGER = "kube-controller-manager"
REVISION = "deployment.kubernetes.io/revision"
REVISION_HISTORY = "deployment.kubernetes.io/revision-history"
HASH_LABEL = "pod-template-hash"
Object: TypeAlias = dict[str, Any]

logger = logging.getLogger(__name__)


class Controller:
    """One control loop. `keys` names the objects to look at again after a change."""

    def __init__(self, registry: Registry, recorder: Recorder) -> None:
        self.registry = registry
        self.store: Store = registry.store
        self.recorder = recorder

    def keys(self, change: Change) -> Iterable[Key]:
        raise NotImplementedError

    def reconcile(self, key: Key) -> float | None:
        """Bring one object on; a number asks to be called again after so many seconds."""
        raise NotImplementedError


class ControllerManager:
    """Runs controllers one step at a time, in the order in which changes arrive."""

    def __init__(self, store: Store, controllers: list[Controller]) -> None:
        self._controllers = controllers
        self._waiting: dict[tuple[Controller, Key], None] = {}
        self._wake = asyncio.Event()
        store.listen(self._on_change)

    def _on_change(self, change: Change) -> None:
        for controller in self._controllers:
            for key in controller.keys(change):
                self.enqueue(controller, key)

    def enqueue(self, controller: Controller, key: Key) -> None:
        self._waiting.setdefault((controller, key))
        self._wake.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                controller, key = next(iter(self._waiting))
                del self._waiting[controller, key]
                again_s = self._step(controller, key)
                if again_s is not None:
                    loop.call_later(max(0.01, again_s), self.enqueue, controller, key)
                await asyncio.sleep(0)

    def _step(self, controller: Controller, key: Key) -> float | None:
        try:
            return controller.reconcile(key)
        except ApiError as error:
            # A refused write (a namespace that goes away, a name that is taken): a later change comes back to it.
            logger.debug("%s: %s: %s", type(controller).__name__, key, error.message)
            return 1.0 if error.code == 409 else None
        except Exception:
            # As client-go does: a failing step is reported, and the other loops go on.
            logger.exception("%s failed at %s", type(controller).__name__, key)
            return None


def key_of(obj: Object) -> Key:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def controller_of(obj: Object) -> Object | None:
    """The owner reference of the controller of an object."""
    references = obj["metadata"].get("ownerReferences") or []
    return next((each for each in references if each.get("controller")), None)


def owner_keys(obj: Object, kind: str) -> list[Key]:
    owner = controller_of(obj)
    return [(obj["metadata"]["namespace"], owner["name"])] if owner and owner["kind"] == kind else []


def owner_reference(resource: Resource, obj: Object) -> Object:
    return {
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "name": obj["metadata"]["name"],
        "uid": obj["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owned_by(store: Store, resource: Resource, owner: Object) -> list[Object]:
    """The objects of a kind that `owner` controls."""
    found = store.find(resource, owner["metadata"]["namespace"])
    return [
        each
        for each in found
        if (reference := controller_of(each)) is not None and reference["uid"] == owner["metadata"]["uid"]
    ]


def pod_ready(pod: Object) -> bool:
    conditions = pod["status"].get("conditions") or []
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def pod_available(pod: Object, min_ready_s: int) -> bool:
    conditions = pod["status"].get("conditions") or []
    since = next((each["lastTransitionTime"] for each in conditions if each["type"] == "Ready"), None)
    return pod_ready(pod) and (min_ready_s == 0 or (since is not None and seconds_since(since) >= min_ready_s))


def pod_active(pod: Object) -> bool:
    finished = pod["status"].get("phase") in ("Succeeded", "Failed")
    return not finished and "deletionTimestamp" not in pod["metadata"]


def set_condition(conditions: list[Object], new: Object) -> list[Object]:
    """The conditions with `new` last; a condition of the same status keeps the time of its last transition."""
    current = next((each for each in conditions if each["type"] == new["type"]), None)
    if current is not None and (current["status"], current["reason"]) == (new["status"], new["reason"]):
        return conditions
    if current is not None and current["status"] == new["status"]:
        new = new | {"lastTransitionTime": current["lastTransitionTime"]}
    return [*(each for each in conditions if each["type"] != new["type"]), new]


def condition(kind: str, status: bool, reason: str, message: str) -> Object:
    now = timestamp()
    return {
        "type": kind,
        "status": str(status),
        "lastUpdateTime": now,
        "lastTransitionTime": now,
        "reason": reason,
        "message": message,
    }


def find_condition(status: Object, kind: str) -> Object | None:
    return next((each for each in status.get("conditions") or [] if each["type"] == kind), None)


def template_hash(template: Object) -> str:
    """A stable name for a pod template, in the alphabet of generated names."""
    digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).digest()
    return "".join(NAME_ALPHABET[byte % len(NAME_ALPHABET)] for byte in digest[:10])


class ReplicaSetController(Controller):
    """Keeps as many pods as a ReplicaSet asks for."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == REPLICA_SET:
            return [key_of(change.obj)]
        return owner_keys(change.obj, "ReplicaSet") if change.resource == POD else []

    def reconcile(self, key: Key) -> float | None:
        replica_set = self.store.get(REPLICA_SET, *key)
        if replica_set is None:
            return None
        pods = owned_by(self.store, POD, replica_set)
        if "deletionTimestamp" not in replica_set["metadata"]:
            self._scale(replica_set, [pod for pod in pods if pod_active(pod)])
        self._write_status(replica_set, pods)
        waiting = replica_set["spec"].get("minReadySeconds", 0)
        return waiting / 2 if waiting and any(pod_ready(pod) for pod in pods) else None

    def _scale(self, replica_set: Object, pods: list[Object]) -> None:
        missing = replica_set["spec"]["replicas"] - len(pods)
        for _ in range(missing):
            self._create_pod(replica_set)
        for pod in sorted(pods, key=_deletion_rank)[: max(0, -missing)]:
            self.registry.delete(POD, pod, Deletion())
            self._tell(replica_set, "SuccessfulDelete", f"Deleted pod: {pod['metadata']['name']}")

    def _create_pod(self, replica_set: Object) -> None:
        metadata = replica_set["metadata"]
        pod = pod_from_template(replica_set["spec"]["template"], f"{metadata['name']}-")
        pod["metadata"]["ownerReferences"] = [owner_reference(REPLICA_SET, replica_set)]
        try:
            created = self.registry.create(POD, pod, metadata["namespace"], Writer(MANAGER))
        except ApiError as error:
            if not (error.details or {}).get("causes"):  # a namespace that goes away is no news
                self._tell(replica_set, "FailedCreate", f"Error creating: {error.message}", WARNING)
            raise
        self._tell(replica_set, "SuccessfulCreate", f"Created pod: {created['metadata']['name']}")

    def _tell(self, replica_set: Object, reason: str, message: str, kind: str = NORMAL) -> None:
        self.recorder.record(REPLICA_SET, replica_set, kind, reason, message, component="replicaset-controller")

    def _write_status(self, replica_set: Object, pods: list[Object]) -> None:
        active = [pod for pod in pods if pod_active(pod)]
        labels = replica_set["spec"]["template"]["metadata"].get("labels") or {}
        min_ready_s = replica_set["spec"].get("minReadySeconds", 0)
        counts = {
            "fullyLabeledReplicas": sum(
                labels.items() <= (pod["metadata"].get("labels") or {}).items() for pod in active
            ),
            "readyReplicas": sum(pod_ready(pod) for pod in active),
            "availableReplicas": sum(pod_available(pod, min_ready_s) for pod in active),
        }
        status = {"replicas": len(active)} | {name: count for name, count in counts.items() if count}
        status["terminatingReplicas"] = sum("deletionTimestamp" in pod["metadata"] for pod in pods)
        status["observedGeneration"] = replica_set["metadata"]["generation"]
        self.registry.write_status(REPLICA_SET, replica_set, replica_set | {"status": status}, MANAGER)


def pod_from_template(template: Object, generate_name: str) -> Object:
    metadata = copy.deepcopy(template.get("metadata") or {})
    metadata["generateName"] = generate_name
    return {"metadata": metadata, "spec": copy.deepcopy(template["spec"])}


def _deletion_rank(pod: Object) -> tuple[bool, bool, bool, str]:
    """Which pod goes first: without a node, not running, not ready, the youngest."""
    bound, running = bool(pod["spec"].get("nodeName")), pod["status"].get("phase") == "Running"
    inverted = "".join(chr(0x10FFFF - ord(each)) for each in pod["metadata"]["creationTimestamp"])
    return bound, running, pod_ready(pod), inverted


class DeploymentController(Controller):
    """Rolls a Deployment's pods from one ReplicaSet to the next."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == DEPLOYMENT:
            return [key_of(change.obj)]
        if change.resource == POD and change.type == "DELETED":
            return self._keys_of_pod(change.obj)  # Recreate waits for the old pods to be gone
        return owner_keys(change.obj, "Deployment") if change.resource == REPLICA_SET else []

    def _keys_of_pod(self, pod: Object) -> list[Key]:
        owners = [self.store.get(REPLICA_SET, *key) for key in owner_keys(pod, "ReplicaSet")]
        return [key for owner in owners if owner is not None for key in owner_keys(owner, "Deployment")]

    def reconcile(self, key: Key) -> float | None:
        deployment = self.store.get(DEPLOYMENT, *key)
        if deployment is None:
            return None
        sets = owned_by(self.store, REPLICA_SET, deployment)
        if "deletionTimestamp" in deployment["metadata"] or deployment["spec"].get("paused"):
            self._write_status(deployment, self._newest(deployment, sets), sets)
            return None
        new = self._newest(deployment, sets)
        old = [each for each in sets if new is None or each["metadata"]["uid"] != new["metadata"]["uid"]]
        if deployment["spec"]["strategy"]["type"] == "Recreate":
            return self._recreate(deployment, new, old)
        return self._roll(deployment, new, old)

    def _newest(self, deployment: Object, sets: list[Object]) -> Object | None:
        wanted = deployment["spec"]["template"]
        same = [each for each in sets if _plain_template(each) == wanted]
        return min(same, key=lambda each: each["metadata"]["creationTimestamp"]) if same else None

    def _roll(self, deployment: Object, new: Object | None, old: list[Object]) -> float | None:
        new = self._ensure_new_set(deployment, new, old)
        if new is None:
            return None
        replicas, _, unavailable = _limits(deployment)
        wanted = self._new_replicas(deployment, new, old)
        if wanted != new["spec"]["replicas"]:
            new = self._scale(deployment, new, wanted)
        else:
            self._scale_down_old(deployment, new, old, replicas - unavailable)
        return self._finish(deployment, new)

    def _recreate(self, deployment: Object, new: Object | None, old: list[Object]) -> float | None:
        running = [each for each in old if each["spec"]["replicas"] > 0]
        for each in running:
            self._scale(deployment, each, 0)
        pods = [pod for each in old for pod in owned_by(self.store, POD, each)]
        if running or any(pod["status"].get("phase") not in ("Succeeded", "Failed") for pod in pods):
            self._write_status(deployment, new, [*old, *([new] if new else [])])
            return None
        new = self._ensure_new_set(deployment, new, old)
        if new is not None and new["spec"]["replicas"] != deployment["spec"]["replicas"]:
            new = self._scale(deployment, new, deployment["spec"]["replicas"])
        return self._finish(deployment, new) if new is not None else None

    def _ensure_new_set(self, deployment: Object, new: Object | None, old: list[Object]) -> Object | None:
        """The ReplicaSet of the current template; None when it was just made and the next step goes on from there."""
        revision = str(1 + max((_revision(each) for each in old), default=0))
        if new is not None:
            if _revision(new) < int(revision):
                new = self._annotate_set(deployment, new, revision)
            return self._adopt_revision(deployment, new)
        created = self._create_set(deployment, old, revision)
        self._set_new_progress(deployment, revision, "NewReplicaSetCreated", f'Created new replica set "{created}"')
        return None

    def _adopt_revision(self, deployment: Object, new: Object) -> Object:
        """Carry the revision over to the Deployment after a rollback to a ReplicaSet that was there already."""
        revision = new["metadata"]["annotations"][REVISION]
        changed = copy.deepcopy(self.store.get(DEPLOYMENT, *key_of(deployment)) or deployment)
        annotations = changed["metadata"].setdefault("annotations", {})
        if annotations.get(REVISION) != revision:
            annotations[REVISION] = revision
            self.registry.write_status(DEPLOYMENT, deployment, changed, MANAGER)
        return new

    def _set_new_progress(self, deployment: Object, revision: str, reason: str, message: str) -> None:
        current = self.store.get(DEPLOYMENT, *key_of(deployment)) or deployment
        changed = copy.deepcopy(current)
        changed["metadata"].setdefault("annotations", {})[REVISION] = revision
        conditions = changed["status"].get("conditions") or []
        progress = condition("Progressing", True, reason, message)
        changed["status"]["conditions"] = set_condition(conditions, progress)
        self.registry.write_status(DEPLOYMENT, current, changed, MANAGER)

    def _create_set(self, deployment: Object, old: list[Object], revision: str) -> str:
        metadata, spec = deployment["metadata"], deployment["spec"]
        name_hash = template_hash(spec["template"])
        template = copy.deepcopy(spec["template"])
        template["metadata"].setdefault("labels", {})[HASH_LABEL] = name_hash
        selector = copy.deepcopy(spec["selector"])
        selector.setdefault("matchLabels", {})[HASH_LABEL] = name_hash
        replicas = self._first_replicas(deployment, old)
        body: Object = {
            "metadata": {
                "name": f"{metadata['name']}-{name_hash}",
                "labels": dict(template["metadata"]["labels"]),
                "annotations": _own_annotations(metadata) | self._set_annotations(deployment) | {REVISION: revision},
                "ownerReferences": [owner_reference(DEPLOYMENT, deployment)],
            },
            "spec": {"replicas": replicas, "selector": selector, "template": template},
        }
        if spec.get("minReadySeconds"):
            body["spec"]["minReadySeconds"] = spec["minReadySeconds"]
        created = self.registry.create(REPLICA_SET, body, metadata["namespace"], Writer(MANAGER))
        name: str = created["metadata"]["name"]
        if replicas:
            self._tell(deployment, f"Scaled up replica set {name} from 0 to {replicas}")
        return name

    def _set_annotations(self, deployment: Object) -> dict[str, str]:
        replicas, surge, _ = _limits(deployment)
        prefix = "deployment.kubernetes.io"
        return {f"{prefix}/desired-replicas": str(replicas), f"{prefix}/max-replicas": str(replicas + surge)}

    def _annotate_set(self, deployment: Object, replica_set: Object, revision: str) -> Object:
        changed = copy.deepcopy(replica_set)
        before = changed["metadata"].get("annotations") or {}
        annotations = self._set_annotations(deployment) | {REVISION: revision}
        if before.get(REVISION):
            history = [each for each in (before.get(REVISION_HISTORY), before[REVISION]) if each]
            annotations[REVISION_HISTORY] = ",".join(history)
        changed["metadata"]["annotations"] = before | annotations
        return self.registry.update(REPLICA_SET, replica_set, changed, Writer(MANAGER))

    def _first_replicas(self, deployment: Object, old: list[Object]) -> int:
        replicas, surge, _ = _limits(deployment)
        if deployment["spec"]["strategy"]["type"] == "Recreate":
            return replicas
        room = replicas + surge - sum(each["spec"]["replicas"] for each in old)
        return max(0, min(room, replicas))

    def _new_replicas(self, deployment: Object, new: Object, old: list[Object]) -> int:
        replicas, surge, _ = _limits(deployment)
        current: int = new["spec"]["replicas"]
        if current >= replicas:
            return replicas
        room = replicas + surge - current - sum(each["spec"]["replicas"] for each in old)
        return current + max(0, min(room, replicas - current))

    def _scale_down_old(self, deployment: Object, new: Object, old: list[Object], min_available: int) -> None:
        old = sorted(old, key=lambda each: each["metadata"]["creationTimestamp"])
        total = new["spec"]["replicas"] + sum(each["spec"]["replicas"] for each in old)
        new_unavailable = new["spec"]["replicas"] - new["status"].get("availableReplicas", 0)
        budget = total - min_available - new_unavailable
        if budget <= 0:
            return
        remaining: list[Object] = []
        for each in old:  # first what does not serve anyway
            unhealthy = each["spec"]["replicas"] - each["status"].get("availableReplicas", 0)
            drop = min(budget, max(0, unhealthy))
            if drop:
                each = self._scale(deployment, each, each["spec"]["replicas"] - drop)
                budget -= drop
            remaining.append(each)
        available = sum(each["status"].get("availableReplicas", 0) for each in [new, *remaining])
        spare = available - min_available
        for each in remaining:
            drop = min(max(0, spare), each["spec"]["replicas"])
            if drop:
                self._scale(deployment, each, each["spec"]["replicas"] - drop)
                spare -= drop

    def _scale(self, deployment: Object, replica_set: Object, replicas: int) -> Object:
        before, name = replica_set["spec"]["replicas"], replica_set["metadata"]["name"]
        changed = copy.deepcopy(replica_set)
        changed["spec"]["replicas"] = replicas
        annotations = changed["metadata"].setdefault("annotations", {})
        annotations.update(self._set_annotations(deployment))
        changed = self.registry.update(REPLICA_SET, replica_set, changed, Writer(MANAGER))
        word = "up" if replicas > before else "down"
        self._tell(deployment, f"Scaled {word} replica set {name} from {before} to {replicas}")
        return changed

    def _tell(self, deployment: Object, message: str) -> None:
        component = "deployment-controller"
        self.recorder.record(DEPLOYMENT, deployment, NORMAL, "ScalingReplicaSet", message, component=component)

    def _finish(self, deployment: Object, new: Object) -> float | None:
        current = self.store.get(DEPLOYMENT, *key_of(deployment))
        if current is None:
            return None
        sets = owned_by(self.store, REPLICA_SET, current)
        again_s = self._write_status(current, new, sets)
        self._clean_up(current, new, sets)
        return again_s

    def _clean_up(self, deployment: Object, new: Object, sets: list[Object]) -> None:
        """Keep only so many old ReplicaSets as `revisionHistoryLimit` allows, once the rollout is complete."""
        limit = deployment["spec"]["revisionHistoryLimit"]
        progress = find_condition(deployment.get("status") or {}, "Progressing")
        if progress is None or progress["reason"] != "NewReplicaSetAvailable":
            return
        old = [each for each in sets if each["metadata"]["uid"] != new["metadata"]["uid"]]
        idle = [each for each in old if not each["spec"]["replicas"] and not each["status"].get("replicas")]
        for each in sorted(idle, key=_revision)[: max(0, len(old) - limit)]:
            self.registry.delete(REPLICA_SET, each, Deletion())

    def _write_status(self, deployment: Object, new: Object | None, sets: list[Object]) -> float | None:
        before = deployment.get("status") or {}
        status = self._counts(deployment, new, sets)
        conditions = list(before.get("conditions") or [])
        replicas, _, unavailable = _limits(deployment)
        if status.get("availableReplicas", 0) >= replicas - unavailable:
            available = condition("Available", True, "MinimumReplicasAvailable", "Deployment has minimum availability.")
        else:
            message = "Deployment does not have minimum availability."
            available = condition("Available", False, "MinimumReplicasUnavailable", message)
        conditions = set_condition(conditions, available)
        again_s = None
        if new is not None and "deletionTimestamp" not in deployment["metadata"]:
            conditions, again_s = self._progress(deployment, new, before, status, conditions)
        status["conditions"] = conditions
        self.registry.write_status(DEPLOYMENT, deployment, deployment | {"status": status}, MANAGER)
        return again_s

    def _counts(self, deployment: Object, new: Object | None, sets: list[Object]) -> Object:
        def total(name: str) -> int:
            return sum(each["status"].get(name, 0) for each in sets)

        current = self.store.get(REPLICA_SET, *key_of(new)) if new is not None else None
        wanted = sum(each["spec"]["replicas"] for each in sets)
        counts = {
            "replicas": total("replicas"),
            "updatedReplicas": current["status"].get("replicas", 0) if current is not None else 0,
            "readyReplicas": total("readyReplicas"),
            "availableReplicas": total("availableReplicas"),
            "unavailableReplicas": max(0, wanted - total("availableReplicas")),
        }
        shown = {name: count for name, count in counts.items() if count}
        generation = deployment["metadata"]["generation"]
        return {"observedGeneration": generation, **shown, "terminatingReplicas": total("terminatingReplicas")}

    def _progress(
        self, deployment: Object, new: Object, before: Object, status: Object, conditions: list[Object]
    ) -> tuple[list[Object], float | None]:
        deadline_s = deployment["spec"].get("progressDeadlineSeconds")
        current = find_condition(before, "Progressing")
        name = new["metadata"]["name"]
        wanted = deployment["spec"]["replicas"]
        counts = (status.get("updatedReplicas", 0), status.get("replicas", 0), status.get("availableReplicas", 0))
        done = counts == (wanted, wanted, wanted)
        if current is not None and current["reason"] == "NewReplicaSetAvailable" and counts[0] == counts[1]:
            return conditions, None  # a finished rollout does not start over when a pod fails later
        if done:
            message = f'ReplicaSet "{name}" has successfully progressed.'
            return set_condition(conditions, condition("Progressing", True, "NewReplicaSetAvailable", message)), None
        if _has_progressed(before, status):
            message = f'ReplicaSet "{name}" is progressing.'
            progress = condition("Progressing", True, "ReplicaSetUpdated", message)
            # Every step forward restarts the deadline, also under the same reason.
            if current is not None and current["status"] == "True":
                progress["lastTransitionTime"] = current["lastTransitionTime"]
            others = [each for each in conditions if each["type"] != "Progressing"]
            return [*others, progress], deadline_s
        if current is None or deadline_s is None or current["reason"] == "ProgressDeadlineExceeded":
            return conditions, None
        left_s = deadline_s - seconds_since(current["lastUpdateTime"])
        if left_s > 0:
            return conditions, left_s
        message = f'ReplicaSet "{name}" has timed out progressing.'
        return set_condition(conditions, condition("Progressing", False, "ProgressDeadlineExceeded", message)), None


def _has_progressed(before: Object, after: Object) -> bool:
    def old_replicas(status: Object) -> int:
        return status.get("replicas", 0) - status.get("updatedReplicas", 0)

    grown = ("updatedReplicas", "readyReplicas", "availableReplicas")
    return any(after.get(name, 0) > before.get(name, 0) for name in grown) or old_replicas(after) < old_replicas(before)


def _plain_template(replica_set: Object) -> Object:
    """A ReplicaSet's template without the label that the Deployment controller added."""
    template = copy.deepcopy(replica_set["spec"]["template"])
    labels = template["metadata"].get("labels") or {}
    labels.pop(HASH_LABEL, None)
    return template


def _own_annotations(metadata: Object) -> dict[str, str]:
    """A Deployment's annotations that its ReplicaSets carry too."""
    annotations = metadata.get("annotations") or {}
    skipped = {"kubectl.kubernetes.io/last-applied-configuration", REVISION}
    return {key: value for key, value in annotations.items() if key not in skipped}


def _revision(replica_set: Object) -> int:
    return int((replica_set["metadata"].get("annotations") or {}).get(REVISION, 0))


def _limits(deployment: Object) -> tuple[int, int, int]:
    """(replicas, surge, unavailable) in pods: a surge rounds up, unavailability rounds down, never both zero."""
    replicas: int = deployment["spec"]["replicas"]
    strategy = deployment["spec"]["strategy"]
    if strategy["type"] == "Recreate" or replicas == 0:
        return replicas, 0, 0
    surge = percentage_or_number(strategy["rollingUpdate"]["maxSurge"], replicas, round_up=True)
    unavailable = percentage_or_number(strategy["rollingUpdate"]["maxUnavailable"], replicas, round_up=False)
    if surge == unavailable == 0:
        unavailable = 1
    return replicas, surge, min(unavailable, replicas)


class GarbageCollector(Controller):
    """Deletes what lost its owner, and holds an owner back whose deletion is in the foreground."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == EVENT:
            return []
        # Only the uid matters here: owners are found by it, not by name.
        uids = [change.obj["metadata"]["uid"]]
        uids += [each["uid"] for each in change.obj["metadata"].get("ownerReferences") or []]
        interesting = change.type == "DELETED" or "deletionTimestamp" in change.obj["metadata"]
        return [("", uid) for uid in uids] if interesting else []

    def reconcile(self, key: Key) -> float | None:
        uid = key[1]
        owner = next(((kind, obj) for kind, obj in self.store.everything() if obj["metadata"]["uid"] == uid), None)
        dependents = [
            (kind, obj)
            for kind, obj in self.store.everything()
            if any(each["uid"] == uid for each in obj["metadata"].get("ownerReferences") or [])
        ]
        finalizers = owner[1]["metadata"].get("finalizers") or [] if owner is not None else []
        if owner is None:
            for kind, obj in dependents:
                if "deletionTimestamp" not in obj["metadata"]:
                    self.registry.delete(kind, obj, Deletion())
        elif ORPHAN in finalizers:
            for kind, obj in dependents:
                self._orphan(kind, obj, uid)
            self._drop_finalizer(*owner, ORPHAN)
        elif FOREGROUND in finalizers:
            for kind, obj in dependents:
                if "deletionTimestamp" not in obj["metadata"]:
                    self.registry.delete(kind, obj, Deletion(propagation="Foreground"))
            if not dependents:
                self._drop_finalizer(*owner, FOREGROUND)
        return None

    def _orphan(self, kind: Resource, obj: Object, uid: str) -> None:
        changed = copy.deepcopy(obj)
        references = changed["metadata"]["ownerReferences"]
        changed["metadata"]["ownerReferences"] = [each for each in references if each["uid"] != uid]
        self.registry.update(kind, obj, changed, Writer(MANAGER))

    def _drop_finalizer(self, kind: Resource, obj: Object, finalizer: str) -> None:
        changed = copy.deepcopy(obj)
        changed["metadata"]["finalizers"] = [each for each in obj["metadata"]["finalizers"] if each != finalizer]
        self.registry.update(kind, obj, changed, Writer(MANAGER))


class NamespaceController(Controller):
    """Gives a new namespace its service account and CA bundle, and empties one that goes away.

    Emptying begins `deletion_s` after the deletion (Kubernetes: 5 s, for API servers that have not heard of it yet);
    until then the namespace is Terminating and still holds everything.
    """

    def __init__(self, registry: Registry, recorder: Recorder, ca_pem: str, deletion_s: float) -> None:
        super().__init__(registry, recorder)
        self._ca_pem = ca_pem
        self._deletion_s = deletion_s
        self._deleted_at: dict[str, float] = {}
        """Uid of a Terminating namespace -> when it was first seen so."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == NAMESPACE:
            return [key_of(change.obj)]
        namespace = change.obj["metadata"].get("namespace")
        return [("", namespace)] if change.type == "DELETED" and namespace else []

    def reconcile(self, key: Key) -> float | None:
        namespace = self.store.get(NAMESPACE, *key)
        if namespace is None:
            return None
        name = key[1]
        if "deletionTimestamp" in namespace["metadata"]:
            now = time.monotonic()
            since = self._deleted_at.setdefault(namespace["metadata"]["uid"], now)
            if now - since < self._deletion_s:
                return self._deletion_s - (now - since)
            self._empty(namespace)
            return None
        if self.store.get(SERVICE_ACCOUNT, name, "default") is None:
            self.registry.create(SERVICE_ACCOUNT, {"metadata": {"name": "default"}}, name, Writer(MANAGER))
        if self.store.get(CONFIG_MAP, name, "kube-root-ca.crt") is None:
            body = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": self._ca_pem}}
            self.registry.create(CONFIG_MAP, body, name, Writer(MANAGER))
        return None

    def _empty(self, namespace: Object) -> None:
        name = namespace["metadata"]["name"]
        inside = [pair for pair in self.store.everything() if pair[1]["metadata"].get("namespace") == name]
        for kind, obj in inside:
            if "deletionTimestamp" not in obj["metadata"]:
                self.registry.delete(kind, obj, Deletion())
        left = [obj for _, obj in self.store.everything() if obj["metadata"].get("namespace") == name]
        current = self.store.get(NAMESPACE, "", name)
        if not left and current is not None:
            self.store.remove(NAMESPACE, current)
            self._deleted_at.pop(current["metadata"]["uid"], None)


def matching_pods(store: Store, namespace: str, selector: Object) -> list[Object]:
    """The pods of a LabelSelector object."""
    pods = store.find(POD, namespace)
    return [pod for pod in pods if matches_label_selector(selector, pod["metadata"].get("labels") or {})]
