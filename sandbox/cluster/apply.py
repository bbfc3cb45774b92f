"""Server-side apply and the bookkeeping of field managers (managedFields), after structured-merge-diff v6.

`apply` merges a manager's configuration into the live object, gives up what the manager no longer names and nobody
else owns, and refuses to overwrite what somebody else owns unless it is forced. `track_update` does the bookkeeping
of every other write. Not simulated: conversion between API versions (each kind has one version here).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from sandbox.cluster import fields, schema
from sandbox.cluster.errors import Cause, apply_conflict
from sandbox.cluster.fields import Paths
from sandbox.cluster.schema import Node, Shape

BEFORE_FIRST_APPLY = "before-first-apply"
"""Who owns the fields of an object that nobody tracked until somebody applied to it."""


@dataclass(frozen=True)
class Manager:
    """Who wrote: one entry of managedFields, without its fields."""

    name: str
    operation: str
    api_version: str
    subresource: str = ""


@dataclass(frozen=True)
class Ownership:
    """What a manager owns, and since when."""

    paths: Paths
    time: str


Managers = dict[Manager, Ownership]


def read_managers(obj: dict[str, Any]) -> Managers:
    managers: Managers = {}
    for entry in obj.get("metadata", {}).get("managedFields") or []:
        manager = Manager(
            entry["manager"], entry["operation"], entry.get("apiVersion", ""), entry.get("subresource", "")
        )
        managers[manager] = Ownership(fields.from_fields_v1(entry.get("fieldsV1") or {}), entry.get("time", ""))
    return managers


def write_managers(obj: dict[str, Any], managers: Managers) -> None:
    """Set managedFields: appliers first, then by time and name, as the API server sorts them."""
    entries = []
    order = sorted(
        managers.items(), key=lambda pair: (pair[0].operation, pair[1].time, pair[0].name, pair[0].subresource)
    )
    for manager, owned in order:
        if not owned.paths:
            continue
        entry: dict[str, Any] = {
            "manager": manager.name,
            "operation": manager.operation,
            "apiVersion": manager.api_version,
            "time": owned.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": fields.to_fields_v1(owned.paths),
        }
        entries.append(entry | ({"subresource": manager.subresource} if manager.subresource else {}))
    obj["metadata"].pop("managedFields", None)
    if entries:
        obj["metadata"]["managedFields"] = entries


def track_update(
    live: dict[str, Any] | None,
    new: dict[str, Any],
    manager: Manager,
    *,
    node: Node,
    empty: dict[str, Any],
    now: str,
) -> None:
    """Record in `new` that `manager` wrote what differs from `live` (None: it created the object).

    `empty` is the kind's zero value: the structs that exist in Go even when nobody wrote them.
    """
    managers = read_managers(live) if live is not None else {}
    if live is not None and not managers:
        new["metadata"].pop("managedFields", None)
        return  # an object that nobody tracked stays untracked until somebody applies
    difference = _visible(fields.compare(live if live is not None else empty, new, node), manager)
    managers = _take_away(managers, manager, difference, now)
    mine = managers.get(manager, Ownership(frozenset(), now))
    paths = (mine.paths | difference.written) - difference.removed
    if paths != mine.paths or difference.modified:
        managers[manager] = Ownership(paths, now)
    write_managers(new, managers)


def _visible(difference: fields.Difference, manager: Manager) -> fields.Difference:
    """What an endpoint may change at all: status writes do not touch the spec, nor others the status."""
    hidden = "f:spec" if manager.subresource == "status" else "f:status"
    seen = (
        frozenset(path for path in paths if path[0] != hidden)
        for paths in (difference.added, difference.modified, difference.removed)
    )
    return fields.Difference(*seen)


def _take_away(managers: Managers, writer: Manager, difference: fields.Difference, now: str) -> Managers:
    changed = difference.modified | difference.added | difference.removed
    kept: Managers = {}
    for manager, owned in managers.items():
        remaining = owned.paths if manager == writer else owned.paths - changed
        kept[manager] = replace(owned, paths=remaining)
    return kept


def apply(
    live: dict[str, Any],
    config: dict[str, Any],
    manager: Manager,
    *,
    node: Node,
    force: bool,
    now: str,
) -> tuple[dict[str, Any], Managers]:
    """Apply `config` onto `live`, and return the merged object with the new owners.

    `live` is the kind's zero value when the object does not exist. Raises a 409 that names the other managers and
    fields when their values would change and `force` is not set.
    """
    managers = read_managers(live)
    if not managers and live.get("metadata", {}).get("uid"):
        untracked = fields.compare({}, live, node).added
        managers[Manager(BEFORE_FIRST_APPLY, "Update", manager.api_version)] = Ownership(
            frozenset(path for path in untracked if path[0] != "f:status"), now
        )
    wanted = fields.without_system(fields.applied(config, node))
    last = managers.get(manager)
    others = {each: owned for each, owned in managers.items() if each != manager}
    merged = _merge(live, config, node)
    if last is not None:
        still_owned = wanted.union(*(owned.paths for owned in others.values()))
        given_up = _with_structs(last.paths, node) - _with_structs(still_owned, node)
        merged = _without(merged, given_up, frozenset(_prefixes(still_owned)), node, ())
    difference = fields.compare(live, merged, node)
    conflicts = {each: owned.paths & difference.written for each, owned in others.items()}
    conflicts = {each: paths for each, paths in conflicts.items() if paths}
    if conflicts and not force:
        raise _conflict_error(conflicts)
    result = {
        each: replace(owned, paths=owned.paths - difference.written - difference.removed)
        for each, owned in others.items()
    }
    unchanged = last is not None and last.paths == wanted and not difference.written
    result[manager] = last if unchanged and last is not None else Ownership(wanted, now)
    return merged, result


def _merge(live: Any, config: Any, node: Node) -> Any:
    if node.shape in (Shape.STRUCT, Shape.MAP) and isinstance(config, dict):
        merged = dict(live) if isinstance(live, dict) else {}
        for key, value in config.items():
            merged[key] = _merge(merged.get(key), value, schema.child(node, key))
        return merged
    if node.shape is Shape.LIST_MAP and isinstance(config, list):
        place = schema.item(node)
        result = list(live or [])
        index = {fields.key_of(each, node.keys): at for at, each in enumerate(result)}
        for each in config:
            at = index.get(fields.key_of(each, node.keys))
            if at is None:
                result.append(_merge({}, each, place))
            else:
                result[at] = _merge(result[at], each, place)
        return result
    if node.shape is Shape.SET and isinstance(config, list):
        return [*(live or []), *(each for each in config if each not in (live or []))]
    return copy.deepcopy(config)


def _with_structs(paths: Paths, node: Node) -> Paths:
    """The paths and the typed structs above them: a struct goes when the last named field in it goes, a map stays."""
    found = set(paths)
    for path in paths:
        place = node
        for depth, element in enumerate(path):
            place = schema.item(place) if element[0] in "kv" else schema.child(place, element[2:])
            if place.shape not in (Shape.MAP, Shape.SCALAR):
                found.add(path[: depth + 1])
    return frozenset(found)


def _prefixes(paths: Paths) -> set[fields.Path]:
    return {path[:depth] for path in paths for depth in range(1, len(path) + 1)}


def _without(value: Any, given_up: Paths, kept: Paths, node: Node, here: fields.Path) -> Any:
    """The value without the given-up fields; a place above something that is still owned stays."""
    below = fields.children(value, node)
    if below is None:
        return value
    remaining = [
        (element, _without(each, given_up, kept, place, (*here, element)))
        for element, each, place in below
        if (*here, element) not in given_up or (*here, element) in kept
    ]
    if isinstance(value, list):
        return [each for _, each in remaining]
    emptied = {element for element, each in remaining if each in ({}, []) and value[element[2:]] not in ({}, [])}
    return {element[2:]: each for element, each in remaining if element not in emptied}


def _conflict_error(conflicts: dict[Manager, Paths]) -> Exception:
    causes, by_manager = [], {}
    for manager, paths in sorted(conflicts.items(), key=lambda pair: pair[0].name):
        who = _shown_manager(manager)
        by_manager[who] = [fields.shown(path) for path in sorted(paths)]
        causes += [Cause("FieldManagerConflict", f"conflict with {who}", path) for path in by_manager[who]]
    if len(causes) == 1:
        return apply_conflict(f"Apply failed with 1 conflict: {causes[0].message}: {causes[0].field}", causes)
    lines = [
        line
        for who, paths in by_manager.items()
        for line in (f"conflicts with {who}:", *(f"- {path}" for path in paths))
    ]
    return apply_conflict(f"Apply failed with {len(causes)} conflicts: " + "\n".join(lines), causes)


def _shown_manager(manager: Manager) -> str:
    who = f'"{manager.name}"'
    if manager.subresource:
        who += f' with subresource "{manager.subresource}"'
    return who if manager.operation == "Apply" else f"{who} using {manager.api_version}"
