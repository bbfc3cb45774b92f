"""Objects, their versions and the history that watches read: what etcd and the watch cache are to an API server.

One resourceVersion counts over all kinds. Stored objects are never changed in place: whoever changes one commits a
new object, so readers may keep references. Everything here runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import copy
import datetime
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from sandbox.cluster.resources import Resource

Key: TypeAlias = tuple[str, str]
"""(namespace, name); the namespace of cluster-wide objects is empty."""

HISTORY_LENGTH = 10_000
"""Changes kept for watches that start in the past: a rehearsal makes a few hundred."""

WATCH_BACKLOG = 10_000


def timestamp() -> str:
    """Now, as Kubernetes writes it: seconds, UTC."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp() -> str:
    """Now with microseconds, as the `eventTime` of events has it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds_since(stamp: str) -> float:
    """How long ago a timestamp of either form was; negative when it lies in the future."""
    return (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(stamp)).total_seconds()


def later(seconds: float) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Change:
    """One committed write: ADDED, MODIFIED or DELETED, with the object before it where there was one."""

    version: int
    type: str
    resource: Resource
    obj: dict[str, Any]
    old: dict[str, Any] | None


class Watcher:
    """A queue of changes that one watch request reads; None ends it."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        self.queue: asyncio.Queue[Change | dict[str, Any] | None] = asyncio.Queue(WATCH_BACKLOG)


class Store:
    def __init__(self) -> None:
        self.version = 1000
        self.compacted = 0
        """Changes up to this version are forgotten: a watch from before gets 410 Gone."""
        self._objects: dict[Resource, dict[Key, dict[str, Any]]] = {}
        self._history: deque[Change] = deque()
        self._watchers: set[Watcher] = set()
        self._listeners: list[Callable[[Change], None]] = []

    def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        return self._objects.get(resource, {}).get((namespace, name))

    def find(self, resource: Resource, namespace: str | None = None) -> list[dict[str, Any]]:
        """All objects of a kind, by namespace and name; `namespace` None means all of them."""
        objects = self._objects.get(resource, {})
        return [objects[key] for key in sorted(objects) if namespace in (None, key[0])]

    def everything(self) -> Iterator[tuple[Resource, dict[str, Any]]]:
        for resource, objects in list(self._objects.items()):
            for obj in list(objects.values()):
                yield resource, obj

    def commit(self, resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
        """Store a new object or a new version of one, and tell everybody."""
        key = _key(obj)
        old = self._objects.setdefault(resource, {}).get(key)
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self._objects[resource][key] = obj
        self._tell(Change(self.version, "MODIFIED" if old else "ADDED", resource, obj, old))
        return obj

    def remove(self, resource: Resource, obj: dict[str, Any]) -> dict[str, Any]:
        old = self._objects[resource].pop(_key(obj))
        last = copy.deepcopy(old)
        self.version += 1
        last["metadata"]["resourceVersion"] = str(self.version)
        self._tell(Change(self.version, "DELETED", resource, last, old))
        return last

    def listen(self, listener: Callable[[Change], None]) -> None:
        """Call `listener` on every change, at once and inside the write: it must only take note."""
        self._listeners.append(listener)

    def watch(self, resource: Resource) -> Watcher:
        watcher = Watcher(resource)
        self._watchers.add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def since(self, version: int, resource: Resource) -> list[Change]:
        """The changes of a kind after `version`, oldest first."""
        return [change for change in self._history if change.version > version and change.resource == resource]

    def compact(self) -> None:
        """Forget all history, as etcd does every five minutes."""
        self._history.clear()
        self.compacted = self.version

    def end_watches(self, last: dict[str, Any] | None = None) -> None:
        """End every running watch, after sending `last` (e.g. an ERROR event) when it is given."""
        for watcher in self._watchers:
            if last is not None:
                watcher.queue.put_nowait(last)
            watcher.queue.put_nowait(None)

    def _tell(self, change: Change) -> None:
        self._history.append(change)
        if len(self._history) > HISTORY_LENGTH:
            self.compacted = self._history.popleft().version
        for watcher in self._watchers:
            if watcher.resource == change.resource:
                watcher.queue.put_nowait(change)
        for listener in self._listeners:
            listener(change)


def _key(obj: dict[str, Any]) -> Key:
    metadata = obj["metadata"]
    return metadata.get("namespace", ""), metadata["name"]
