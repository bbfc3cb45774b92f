"""Events: what controllers, scheduler, autoscaler and kubelet tell about an object."""

from __future__ import annotations

import copy
import time
import uuid
from typing import Any

from sandbox.cluster.resources import EVENT, NAMESPACE, Resource
from sandbox.cluster.store import Store, micro_timestamp, timestamp

NORMAL, WARNING = "Normal", "Warning"


class Recorder:
    """Writes Events; an event that repeats counts up instead of appearing again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[tuple[str, ...], tuple[str, str]] = {}

    def record(
        self,
        resource: Resource,
        obj: dict[str, Any],
        kind: str,
        reason: str,
        message: str,
        *,
        component: str,
        host: str = "",
        field_path: str = "",
    ) -> None:
        """An event as controllers and kubelets write them (with `source`, `count` and first and last time)."""
        key = (obj["metadata"]["uid"], kind, reason, message, field_path, component)
        if self._count_up(key):
            return
        source = {"component": component} | ({"host": host} if host else {})
        now = timestamp()
        event = self._new(resource, obj, kind, reason, message, field_path)
        event |= {"source": source, "firstTimestamp": now, "lastTimestamp": now, "count": 1, "eventTime": None}
        event |= {"reportingComponent": component, "reportingInstance": host}
        self._write(event, key)

    def schedule(
        self, resource: Resource, obj: dict[str, Any], kind: str, reason: str, message: str, *, action: str
    ) -> None:
        """An event as the scheduler writes them (with `eventTime` and `action`)."""
        event = self._new(resource, obj, kind, reason, message, "")
        event |= {"source": {}, "firstTimestamp": None, "lastTimestamp": None, "eventTime": micro_timestamp()}
        event |= {"action": action, "reportingComponent": "default-scheduler"}
        event |= {"reportingInstance": "default-scheduler-sandbox"}
        self._write(event, None)

    def _new(
        self, resource: Resource, obj: dict[str, Any], kind: str, reason: str, message: str, field_path: str
    ) -> dict[str, Any]:
        metadata = obj["metadata"]
        namespace = metadata.get("namespace", "")
        involved = {"kind": resource.kind, "namespace": namespace, "name": metadata["name"], "uid": metadata["uid"]}
        involved |= {"apiVersion": resource.api_version, "resourceVersion": metadata.get("resourceVersion", "")}
        if field_path:
            involved["fieldPath"] = field_path
        return {
            "kind": "Event",
            "apiVersion": "v1",
            "metadata": {
                "name": f"{metadata['name']}.{time.time_ns():x}",
                "namespace": namespace or "default",
                "uid": str(uuid.uuid4()),
                "creationTimestamp": timestamp(),
            },
            "involvedObject": {name: value for name, value in involved.items() if value},
            "reason": reason,
            "message": message,
            "type": kind,
        }

    def _count_up(self, key: tuple[str, ...]) -> bool:
        place = self._seen.get(key)
        event = self._store.get(EVENT, *place) if place else None
        if event is None:
            return False
        newer = copy.deepcopy(event)
        newer |= {"count": event["count"] + 1, "lastTimestamp": timestamp()}
        self._store.commit(EVENT, newer)
        return True

    def _write(self, event: dict[str, Any], key: tuple[str, ...] | None) -> None:
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        if self._store.get(NAMESPACE, "", namespace) is None:
            return  # its namespace is gone, and with it everybody who could have read it
        self._store.commit(EVENT, event)
        if key is not None:
            self._seen[key] = (namespace, name)
