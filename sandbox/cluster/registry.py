"""What a write means: defaults, validation, field managers, generations, finalizers, cascades.

The API and the controllers both write through a `Registry`, as both write through the API server in a real cluster.
"""

from __future__ import annotations

import copy
import itertools
import uuid
from dataclasses import dataclass
from typing import Any

from sandbox.cluster import apply as ssa
from sandbox.cluster import errors, schema
from sandbox.cluster.apply import Manager, Managers
from sandbox.cluster.defaults import apply_defaults, prepare_for_create, random_suffix
from sandbox.cluster.resources import NAMESPACE, POD, Resource
from sandbox.cluster.store import Store, later, timestamp
from sandbox.cluster.validation import check

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
_SERVER_FIELDS = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds")
_STATUS_ON_CREATE = frozenset({"Node", "CustomResourceDefinition"})
_GENERATION_FROM = frozenset({"spec", "endpoints", "ports", "addressType"})


@dataclass(frozen=True)
class Writer:
    """Who writes, through which endpoint, and whether it counts."""

    manager: str
    subresource: str = ""
    dry_run: bool = False


@dataclass(frozen=True)
class Deletion:
    """The options of a DELETE."""

    propagation: str = "Background"
    grace_s: int | None = None
    uid: str | None = None
    """Precondition: only this very object."""
    resource_version: str | None = None
    dry_run: bool = False


class Registry:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.denied: dict[str, str] = {}
        """Plural of a resource -> why admission denies new objects of it."""
        self._addresses = itertools.count(10)

    def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        obj = self.store.get(resource, namespace, name)
        if obj is None:
            raise errors.not_found(resource.group, resource.plural, name)
        return obj

    def create(self, resource: Resource, body: dict[str, Any], namespace: str, writer: Writer) -> dict[str, Any]:
        """Store a new object. 404 without its namespace, 403 in one that goes away, 409 when it is there already."""
        obj = copy.deepcopy(body)
        metadata = obj.setdefault("metadata", {})
        self._name(resource, metadata, namespace)
        self._require_namespace(resource, metadata["name"], namespace)
        self._admit(resource, metadata["name"])
        if not resource.custom and resource.kind not in _STATUS_ON_CREATE:
            obj.pop("status", None)
        metadata.pop("managedFields", None)
        self._stamp(resource, obj)
        apply_defaults(resource, obj)
        if resource.kind == "Namespace":
            metadata.setdefault("labels", {})["kubernetes.io/metadata.name"] = metadata["name"]
        manager = Manager(writer.manager, "Update", resource.api_version)
        ssa.track_update(None, obj, manager, node=resource.node, empty=resource.empty, now=timestamp())
        return self._insert(resource, obj, dry_run=writer.dry_run)

    def update(
        self,
        resource: Resource,
        live: dict[str, Any],
        new: dict[str, Any],
        writer: Writer,
    ) -> dict[str, Any]:
        """Replace `live` by `new`; an object that is equal afterwards is not written. 409 when `new` is stale."""
        wanted = new.get("metadata", {}).get("resourceVersion")
        if wanted and wanted != live["metadata"]["resourceVersion"]:
            raise errors.stale(resource.group, resource.plural, live["metadata"]["name"])
        obj = self._settled(resource, live, new, writer.subresource)
        manager = Manager(writer.manager, "Update", resource.api_version, writer.subresource)
        ssa.track_update(live, obj, manager, node=resource.node, empty=resource.empty, now=timestamp())
        return self._store_change(resource, live, obj, dry_run=writer.dry_run)

    def write_status(
        self, resource: Resource, live: dict[str, Any], new: dict[str, Any], manager: str
    ) -> dict[str, Any]:
        """A controller's write of an object's status (and annotations), onto whatever version is newest."""
        metadata = live["metadata"]
        current = self.store.get(resource, metadata.get("namespace", ""), metadata["name"])
        if current is None or current["metadata"]["uid"] != metadata["uid"]:
            return live  # gone meanwhile: there is nothing to report any more
        obj = copy.deepcopy(new)
        obj["metadata"]["resourceVersion"] = current["metadata"]["resourceVersion"]
        return self.update(resource, current, obj, Writer(manager, "status"))

    def apply(
        self,
        resource: Resource,
        config: dict[str, Any],
        namespace: str,
        name: str,
        writer: Writer,
        *,
        force: bool,
    ) -> tuple[dict[str, Any], bool]:
        """Server-side apply: (object, whether it was created). 409 names the managers in the way."""
        live = self.store.get(resource, namespace, name)
        manager = Manager(writer.manager, "Apply", resource.api_version, writer.subresource)
        start = live if live is not None else resource.empty
        merged, managers = ssa.apply(start, config, manager, node=resource.node, force=force, now=timestamp())
        if live is None:
            return self._create_applied(resource, merged, managers, namespace, name, writer), True
        obj = self._settled(resource, live, merged, writer.subresource)
        ssa.write_managers(obj, managers)
        return self._store_change(resource, live, obj, dry_run=writer.dry_run), False

    def delete(self, resource: Resource, obj: dict[str, Any], how: Deletion) -> dict[str, Any]:
        """Delete, or mark for deletion what still has to end, be finalised or be emptied. Answers with the object."""
        metadata = obj["metadata"]
        self._check_preconditions(resource, metadata, how)
        marked = copy.deepcopy(obj)
        if resource == NAMESPACE:
            marked["metadata"].setdefault("deletionTimestamp", timestamp())
            marked["status"] = {**marked.get("status", {}), "phase": "Terminating"}
            return marked if how.dry_run else self.store.commit(resource, marked)
        grace_s = self._grace_s(resource, obj, how)
        finalizers = marked["metadata"].setdefault("finalizers", [])
        extra = {"Foreground": FOREGROUND, "Orphan": ORPHAN}.get(how.propagation)
        if extra is not None and extra not in finalizers and (resource != POD):
            finalizers.append(extra)
        if not finalizers:
            del marked["metadata"]["finalizers"]
            if grace_s == 0:
                return obj if how.dry_run else self._remove(resource, marked)
        if "deletionTimestamp" in metadata and metadata.get("deletionGracePeriodSeconds", 0) <= grace_s:
            return obj
        marked["metadata"]["deletionTimestamp"] = later(grace_s)
        marked["metadata"]["deletionGracePeriodSeconds"] = grace_s
        if "generation" in metadata:
            marked["metadata"]["generation"] = metadata["generation"] + 1
        return marked if how.dry_run else self.store.commit(resource, marked)

    def _remove(self, resource: Resource, marked: dict[str, Any]) -> dict[str, Any]:
        if resource == POD and "deletionTimestamp" in marked["metadata"]:
            # The kubelet's last word: the grace period is over. Watchers see it before the pod is gone.
            marked["metadata"] |= {"deletionTimestamp": timestamp(), "deletionGracePeriodSeconds": 0}
            self.store.commit(resource, marked)
        return self.store.remove(resource, marked)

    def _grace_s(self, resource: Resource, obj: dict[str, Any], how: Deletion) -> int:
        if resource != POD:
            return 0
        finished = obj["status"].get("phase") in ("Succeeded", "Failed")
        if not obj["spec"].get("nodeName") or finished:
            return 0
        default: int = obj["spec"].get("terminationGracePeriodSeconds", 30)
        return default if how.grace_s is None else how.grace_s

    def _check_preconditions(self, resource: Resource, metadata: dict[str, Any], how: Deletion) -> None:
        for name, wanted, found, meanwhile in (
            ("UID", how.uid, metadata["uid"], "deleted and then recreated"),
            ("ResourceVersion", how.resource_version, metadata["resourceVersion"], "modified"),
        ):
            if wanted is not None and wanted != found:
                why = (
                    f"the {name} in the precondition ({wanted}) does not match the {name} in record ({found}). "
                    f"The object might have been {meanwhile}"
                )
                # By its kind: the one place where Kubernetes does so (apiserver/pkg/registry/rest/delete.go).
                raise errors.conflict(resource.group, resource.kind, metadata["name"], why)

    def _create_applied(
        self,
        resource: Resource,
        obj: dict[str, Any],
        managers: Managers,
        namespace: str,
        name: str,
        writer: Writer,
    ) -> dict[str, Any]:
        obj = copy.deepcopy(obj)
        if writer.subresource:
            raise errors.not_found(resource.group, resource.plural, name)
        obj["metadata"]["name"] = name
        self._name(resource, obj["metadata"], namespace)
        self._require_namespace(resource, name, namespace)
        self._admit(resource, name)
        self._stamp(resource, obj)
        apply_defaults(resource, obj)
        if resource.kind == "Namespace":
            obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name
        ssa.write_managers(obj, managers)
        return self._insert(resource, obj, dry_run=writer.dry_run)

    def _insert(self, resource: Resource, obj: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
        check(resource, obj, None)
        metadata = obj["metadata"]
        if self.store.get(resource, metadata.get("namespace", ""), metadata["name"]) is not None:
            raise errors.already_exists(resource.group, resource.plural, metadata["name"])
        prepare_for_create(resource, obj, self._new_cluster_ip)
        return obj if dry_run else self.store.commit(resource, obj)

    def _settled(
        self, resource: Resource, live: dict[str, Any], new: dict[str, Any], subresource: str
    ) -> dict[str, Any]:
        """`new` as it may be stored over `live`: only what the endpoint may change, with the server's own fields."""
        obj = copy.deepcopy(new)
        metadata = obj.setdefault("metadata", {})
        if subresource == "status":
            obj = copy.deepcopy(live) | {"status": obj.get("status", {})}
            if "annotations" in metadata:
                obj["metadata"]["annotations"] = metadata["annotations"]
            metadata = obj["metadata"]
        elif "status" in resource.subresources:
            obj.pop("status", None)
            if "status" in live:
                obj["status"] = copy.deepcopy(live["status"])
        for name in (*_SERVER_FIELDS, "name", "namespace", "generateName", "resourceVersion"):
            metadata.pop(name, None)
            if name in live["metadata"]:
                metadata[name] = live["metadata"][name]
        for name in ("labels", "annotations", "finalizers", "ownerReferences"):
            if name in metadata and not metadata[name]:
                del metadata[name]
        apply_defaults(resource, obj)
        if resource.kind == "Service":
            for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                if name in live["spec"]:
                    obj["spec"].setdefault(name, live["spec"][name])
        check(resource, obj, live)
        if resource.has_generation and subresource != "status" and _spec_of(resource, obj) != _spec_of(resource, live):
            metadata["generation"] = live["metadata"].get("generation", 0) + 1
        return obj

    def _store_change(
        self, resource: Resource, live: dict[str, Any], obj: dict[str, Any], *, dry_run: bool
    ) -> dict[str, Any]:
        if _without_times(obj) == _without_times(live):
            return live
        if dry_run:
            return obj
        if obj["metadata"].get("deletionTimestamp") and not obj["metadata"].get("finalizers") and resource != POD:
            # Taking the last finalizer is the deletion itself: watches see no version without it.
            return self.store.remove(resource, obj)
        return self.store.commit(resource, obj)

    def _name(self, resource: Resource, metadata: dict[str, Any], namespace: str) -> None:
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + random_suffix()
        metadata.setdefault("name", "")
        if resource.namespaced:
            given = metadata.setdefault("namespace", namespace)
            if given != namespace:
                raise errors.bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )

    def _require_namespace(self, resource: Resource, name: str, namespace: str) -> None:
        if not resource.namespaced:
            return
        holder = self.store.get(NAMESPACE, "", namespace)
        if holder is None:
            raise errors.not_found("", "namespaces", namespace)
        # Events may still be told while their namespace goes away, or nobody would learn why it hangs.
        if holder["metadata"].get("deletionTimestamp") and resource.kind != "Event":
            raise errors.namespace_terminating(resource.group, resource.plural, name, namespace)

    def _admit(self, resource: Resource, name: str) -> None:
        if resource.plural in self.denied:
            raise errors.denied(resource.group, resource.plural, name, self.denied[resource.plural])

    def _stamp(self, resource: Resource, obj: dict[str, Any]) -> None:
        metadata = obj["metadata"]
        for name in ("resourceVersion", *_SERVER_FIELDS):
            metadata.pop(name, None)
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = timestamp()
        if resource.has_generation:
            metadata["generation"] = 1
        obj["kind"], obj["apiVersion"] = resource.kind, resource.api_version

    def _new_cluster_ip(self) -> str:
        number = next(self._addresses)
        return f"10.0.{number // 250}.{number % 250 + 1}"


def _spec_of(resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
    spec = {key: value for key, value in obj.items() if key in _GENERATION_FROM}
    if resource.kind == "Deployment":
        # Kubernetes counts a Deployment's annotations as part of what was asked for.
        spec["annotations"] = obj["metadata"].get("annotations") or {}
    if resource.kind == "Pod":
        spec["spec"] = {key: value for key, value in obj["spec"].items() if key != "nodeName"}
    return spec


def _without_times(obj: dict[str, Any]) -> dict[str, Any]:
    """An object for comparison: an apply that changes nothing but a manager's time is no change."""
    metadata = dict(obj["metadata"])
    entries = metadata.pop("managedFields", None) or []
    metadata["managedFields"] = [{key: value for key, value in entry.items() if key != "time"} for entry in entries]
    return obj | {"metadata": metadata}


def decode(resource: Resource, body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A request's body as the server understands it, and the paths of the fields that it does not know.

    Raises 400 when a value has the wrong JSON type.
    """
    if resource.custom:
        return {key: value for key, value in body.items() if value is not None}, []
    assert resource.model is not None
    wrong = schema.wrong_type(body, resource.model)
    if wrong is not None:
        message = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: {wrong}'
        raise errors.bad_request(message)
    unknown = list(schema.unknown_fields(body, resource.model))
    return schema.without_unknown_fields(body, resource.model), unknown
