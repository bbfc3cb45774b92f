"""Field sets: which fields an object has, in which two objects differ, and their `fieldsV1` form in managedFields.

A path is a tuple of the elements that `fieldsV1` uses: `f:name` for a field, `k:{"name":"c"}` for an item of a list
with keys, `v:"x"` for a member of a set. A set of paths names leaves, and containers where they are owned as such.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

from sandbox.cluster import schema
from sandbox.cluster.schema import Node, Shape

Path: TypeAlias = tuple[str, ...]
Paths: TypeAlias = frozenset[Path]

_SYSTEM = frozenset(
    {
        ("f:apiVersion",),
        ("f:kind",),
        ("f:metadata",),
        *(
            ("f:metadata", f"f:{name}")
            for name in (
                "creationTimestamp",
                "deletionGracePeriodSeconds",
                "deletionTimestamp",
                "generation",
                "managedFields",
                "name",
                "namespace",
                "resourceVersion",
                "selfLink",
                "uid",
            )
        ),
    }
)
"""Fields that belong to the API server: nobody manages them."""


def without_system(paths: Paths) -> Paths:
    return frozenset(path for path in paths if path[:2] not in _SYSTEM and path not in _SYSTEM)


def key_of(item: dict[str, Any], keys: tuple[str, ...]) -> str:
    """`k:{"containerPort":8080,"protocol":"TCP"}`: the item's name in a list with keys."""
    values = {key: item.get(key, schema.KEY_DEFAULTS.get(key)) for key in sorted(keys)}
    return "k:" + json.dumps(values, separators=(",", ":"))


def member(value: Any) -> str:
    return "v:" + json.dumps(value, separators=(",", ":"))


def children(value: Any, node: Node) -> list[tuple[str, Any, Node]] | None:
    """What stands below a value: (path element, value, its place); None for a leaf."""
    if node.shape in (Shape.STRUCT, Shape.MAP) and isinstance(value, dict):
        return [(f"f:{key}", each, schema.child(node, key)) for key, each in value.items()]
    if node.shape is Shape.LIST_MAP and isinstance(value, list):
        below = schema.item(node)
        return [(key_of(each, node.keys), each, below) for each in value]
    if node.shape is Shape.SET and isinstance(value, list):
        return [(member(each), each, schema.Node(Shape.SCALAR)) for each in value]
    return None


def applied(value: Any, node: Node, here: Path = ()) -> Paths:
    """The fields that an applied configuration owns: its leaves, its list items, and its empty containers."""
    below = children(value, node)
    if not below:
        return frozenset({here}) if here else frozenset()
    own = {here} if here and here[-1].startswith("k:") else set()
    return frozenset(own).union(*(applied(each, place, (*here, element)) for element, each, place in below))


def everything(value: Any, node: Node, here: Path) -> Paths:
    """A value's own path and all below it: what somebody owns who wrote the whole value."""
    below = children(value, node) or []
    return frozenset({here}).union(*(everything(each, place, (*here, element)) for element, each, place in below))


@dataclass(frozen=True)
class Difference:
    added: Paths
    modified: Paths
    removed: Paths

    @property
    def written(self) -> Paths:
        return self.added | self.modified


def compare(old: Any, new: Any, node: Node) -> Difference:
    """The fields in which two objects differ; fields of the API server are left out."""
    added: set[Path] = set()
    modified: set[Path] = set()
    removed: set[Path] = set()
    _compare(old, new, node, (), added, modified, removed)
    return Difference(*(without_system(frozenset(paths)) for paths in (added, modified, removed)))


def _compare(
    old: Any, new: Any, node: Node, here: Path, added: set[Path], modified: set[Path], removed: set[Path]
) -> None:
    before, after = children(old, node), children(new, node)
    if before is None or after is None:
        if old != new:
            modified.add(here)
        return
    old_items = {element: (value, place) for element, value, place in before}
    new_items = {element: (value, place) for element, value, place in after}
    for element, (value, place) in new_items.items():
        path = (*here, element)
        if element in old_items:
            _compare(old_items[element][0], value, place, path, added, modified, removed)
        else:
            added |= everything(value, place, path)
    for element, (value, place) in old_items.items():
        if element not in new_items:
            removed |= everything(value, place, (*here, element))


def to_fields_v1(paths: Paths) -> dict[str, Any]:
    """The nested form of managedFields; `.` marks a container that is owned beside its children."""
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        place = reduce(lambda node, element: node.setdefault(element, {}), path, tree)
        place["."] = {}
    return {key: _prune_dots(value) for key, value in tree.items() if key != "."}


def _prune_dots(tree: dict[str, Any]) -> dict[str, Any]:
    if set(tree) <= {"."}:
        return {}
    return {key: {} if key == "." else _prune_dots(value) for key, value in tree.items()}


def from_fields_v1(tree: dict[str, Any], here: Path = ()) -> Paths:
    if not tree:
        return frozenset({here}) if here else frozenset()
    found: set[Path] = set()
    for element, below in tree.items():
        found |= {here} if element == "." else from_fields_v1(below, (*here, element))
    return frozenset(found)


def shown(path: Path) -> str:
    """The path as conflicts name it: `.spec.template.spec.containers[name="c"].image`."""
    return "".join(_shown_element(element) for element in path)


def keyed(path: str, obj: dict[str, Any], node: Node) -> str:
    """`spec.containers[0].x` as server-side apply names it: `.spec.containers[name="c"].x`."""
    shown_path, place = "", node
    value: Any = obj
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", path):
        if not part.startswith("["):
            value, place = value.get(part) if isinstance(value, dict) else None, schema.child(place, part)
            shown_path += f".{part}"
            continue
        value = value[int(part[1:-1])]
        shown_path += _shown_element(key_of(value, place.keys)) if place.shape is Shape.LIST_MAP else part
        place = schema.item(place)
    return shown_path


def _shown_element(element: str) -> str:
    kind, _, rest = element.partition(":")
    if kind == "f":
        return f".{rest}"
    if kind == "v":
        return f"[={rest}]"
    pairs = (f"{key}={json.dumps(value)}" for key, value in json.loads(rest).items())
    return f"[{','.join(pairs)}]"
