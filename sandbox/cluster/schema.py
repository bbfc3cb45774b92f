"""The types of the built-in kinds, read from the official client's models.

The client's models are generated from Kubernetes' own OpenAPI document, so they know every field and its type. What
they do not carry is the merge strategy (`x-kubernetes-list-map-keys`, `patchMergeKey`, `x-kubernetes-map-type`); the
tables here hold it for the fields that this API server serves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

from kubernetes import client


class Shape(Enum):
    STRUCT = "struct"
    MAP = "map"
    LIST_MAP = "list with keys"
    SET = "set"
    ATOMIC = "atomic"
    SCALAR = "scalar"


@dataclass(frozen=True)
class Node:
    """One place of a schema. `type_name` is the client's name of the type, `keys` those of a list with keys."""

    shape: Shape
    type_name: str = "object"
    keys: tuple[str, ...] = ()


FREE_FORM = Node(Shape.MAP, "Dict[str, object]")
"""A place whose type nobody declared: maps merge, everything else is replaced (as in a CRD without list keys)."""

_ATOMIC_TYPES = frozenset(
    {
        "V1ConfigMapKeySelector",
        "V1LabelSelector",
        "V1LocalObjectReference",
        "V1NodeSelector",
        "V1NodeSelectorTerm",
        "V1ObjectFieldSelector",
        "V1ObjectReference",
        "V1OwnerReference",
        "V1ResourceFieldSelector",
        "V1SecretKeySelector",
        "V1TypedLocalObjectReference",
    }
)
_ATOMIC_FIELDS = frozenset({("V1PodSpec", "nodeSelector"), ("V1ServiceSpec", "selector")})
_SETS = frozenset({("V1ObjectMeta", "finalizers")})
_LIST_KEYS: dict[tuple[str, str], tuple[str, ...]] = {
    ("V1Container", "env"): ("name",),
    ("V1Container", "ports"): ("containerPort", "protocol"),
    ("V1Container", "volumeDevices"): ("devicePath",),
    ("V1Container", "volumeMounts"): ("mountPath",),
    ("V1DeploymentStatus", "conditions"): ("type",),
    ("V1HorizontalPodAutoscalerV2Status", "conditions"): ("type",),
    ("V1JobStatus", "conditions"): ("type",),
    ("V1NodeStatus", "conditions"): ("type",),
    ("V1ObjectMeta", "ownerReferences"): ("uid",),
    ("V1PodDisruptionBudgetStatus", "conditions"): ("type",),
    ("V1PodSpec", "containers"): ("name",),
    ("V1PodSpec", "ephemeralContainers"): ("name",),
    ("V1PodSpec", "hostAliases"): ("ip",),
    ("V1PodSpec", "imagePullSecrets"): ("name",),
    ("V1PodSpec", "initContainers"): ("name",),
    ("V1PodSpec", "topologySpreadConstraints"): ("topologyKey", "whenUnsatisfiable"),
    ("V1PodSpec", "volumes"): ("name",),
    ("V1PodStatus", "conditions"): ("type",),
    ("V1PodStatus", "podIPs"): ("ip",),
    ("V1ReplicaSetStatus", "conditions"): ("type",),
    ("V1ServiceAccount", "secrets"): ("name",),
    ("V1ServiceSpec", "ports"): ("port", "protocol"),
    ("V1ServiceStatus", "conditions"): ("type",),
    ("V2HorizontalPodAutoscalerStatus", "conditions"): ("type",),
}
_STRATEGIC_KEYS = {("V1Container", "ports"): "containerPort", ("V1ServiceSpec", "ports"): "port"}
"""Strategic merge has one key per list, where server-side apply has several."""

KEY_DEFAULTS = {"protocol": "TCP"}
"""Defaults of key fields: a port without a protocol is the TCP port."""

_GENERIC = re.compile(r"^(List|Dict)\[(?:str, )?(.+)\]$")


@cache
def fields_of(type_name: str) -> dict[str, str] | None:
    """JSON field -> type of that field; None when `type_name` is not one of the client's models."""
    model = getattr(client, type_name, None)
    if model is None or not hasattr(model, "attribute_map"):
        return None
    return {model.attribute_map[attribute]: kind for attribute, kind in model.openapi_types.items()}


def root(model: str | None) -> Node:
    return Node(Shape.STRUCT, model) if model else FREE_FORM


def element_type(type_name: str) -> str:
    """`List[X]` and `Dict[str, X]` -> X."""
    matched = _GENERIC.match(type_name)
    return matched.group(2) if matched else "object"


@cache
def child(node: Node, key: str) -> Node:
    """The place named `key` below a struct or a map."""
    if node.shape is Shape.MAP:
        return _shape_of("", "", element_type(node.type_name))
    fields = fields_of(node.type_name) or {}
    return _shape_of(node.type_name, key, fields.get(key, "object"))


def item(node: Node) -> Node:
    """The place of a list's items."""
    return _shape_of("", "", element_type(node.type_name))


def strategic_key(owner: Node, field: str) -> str | None:
    """The `patchMergeKey` of a list below `owner`; None when a strategic merge replaces the list."""
    place = (owner.type_name, field)
    if place in _STRATEGIC_KEYS:
        return _STRATEGIC_KEYS[place]
    keys = _LIST_KEYS.get(place)
    # topologySpreadConstraints have two apply keys but merge by the first.
    return keys[0] if keys else None


def is_set(owner: Node, field: str) -> bool:
    return (owner.type_name, field) in _SETS


def _shape_of(owner: str, field: str, type_name: str) -> Node:
    place = (owner, field)
    if place in _LIST_KEYS:
        return Node(Shape.LIST_MAP, type_name, _LIST_KEYS[place])
    if place in _SETS:
        return Node(Shape.SET, type_name)
    if place in _ATOMIC_FIELDS or type_name in _ATOMIC_TYPES or type_name.startswith("List["):
        return Node(Shape.ATOMIC, type_name)
    if type_name.startswith("Dict["):
        return Node(Shape.MAP, type_name)
    if fields_of(type_name) is not None:
        return Node(Shape.STRUCT, type_name)
    # A value of an undeclared type merges like a CRD's: see `FREE_FORM`.
    return FREE_FORM if type_name == "object" and not owner else Node(Shape.SCALAR, type_name)


def unknown_fields(value: Any, type_name: str, path: str = "") -> Iterator[str]:
    """Paths of fields that the type does not have, spelt as the API server does: `spec.containers[0].imagee`."""
    if type_name.startswith("List["):
        for index, each in enumerate(value if isinstance(value, list) else []):
            yield from unknown_fields(each, element_type(type_name), f"{path}[{index}]")
    elif type_name.startswith("Dict["):
        for key, each in (value if isinstance(value, dict) else {}).items():
            yield from unknown_fields(each, element_type(type_name), f"{path}.{key}" if path else key)
    elif isinstance(value, dict) and (fields := fields_of(type_name)) is not None:
        for key, each in value.items():
            here = f"{path}.{key}" if path else key
            if key in fields:
                yield from unknown_fields(each, fields[key], here)
            else:
                yield here


def without_unknown_fields(value: Any, type_name: str) -> Any:
    """The value as the API server would store it: unknown fields are dropped, and so are nulls."""
    if type_name.startswith("List[") and isinstance(value, list):
        return [without_unknown_fields(each, element_type(type_name)) for each in value]
    if type_name.startswith("Dict[") and isinstance(value, dict):
        return {key: without_unknown_fields(each, element_type(type_name)) for key, each in value.items()}
    if isinstance(value, dict) and (fields := fields_of(type_name)) is not None:
        return {
            key: without_unknown_fields(each, fields[key])
            for key, each in value.items()
            if key in fields and each is not None
        }
    return value


_GO_TYPES = {"str": "string", "int": "int32", "bool": "bool", "datetime": "Time"}
_SCALARS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "datetime": (str,)}


def wrong_type(value: Any, type_name: str, path: str = "", holder: str = "") -> str | None:
    """Go's message about the first value of a wrong JSON type, or None when all fit."""
    if value is None:
        return None
    if type_name.startswith("List["):
        return _wrong_list(value, type_name, path, holder)
    if type_name.startswith("Dict["):
        return _wrong_map(value, element_type(type_name), path, holder)
    if (fields := fields_of(type_name)) is not None:
        if not isinstance(value, dict):
            return _cannot_unmarshal(value, holder, path, f"v1.{_bare(type_name)}")
        for key, each in value.items():
            if key in fields:
                found = wrong_type(each, fields[key], f"{path}.{key}" if path else key, _bare(type_name))
                if found:
                    return found
        return None
    allowed = _SCALARS.get(type_name)
    fits = allowed is None or (isinstance(value, allowed) and not (type_name == "int" and isinstance(value, bool)))
    return None if fits else _cannot_unmarshal(value, holder, path, _GO_TYPES[type_name])


def _wrong_list(value: Any, type_name: str, path: str, holder: str) -> str | None:
    inner = element_type(type_name)
    if not isinstance(value, list):
        return _cannot_unmarshal(value, holder, path, f"[]v1.{_bare(inner)}" if inner[0] == "V" else f"[]{inner}")
    found = (wrong_type(each, inner, path, holder) for each in value)
    return next((message for message in found if message), None)


def _wrong_map(value: Any, inner: str, path: str, holder: str) -> str | None:
    if not isinstance(value, dict):
        return _cannot_unmarshal(value, holder, path, "map[string]string")
    if _is_quantity(holder, path) and all(isinstance(each, str | int | float) for each in value.values()):
        return None  # a quantity may be a bare number
    found = (wrong_type(each, inner, path, holder) for each in value.values())
    return next((message for message in found if message), None)


def _is_quantity(holder: str, path: str) -> bool:
    return path.rsplit(".", 1)[-1] in {"limits", "requests", "capacity", "allocatable", "hard", "used", "overhead"}


def _cannot_unmarshal(value: Any, holder: str, path: str, go_type: str) -> str:
    json_type = {str: "string", bool: "bool", dict: "object", list: "array"}.get(type(value), "number")
    return f"json: cannot unmarshal {json_type} into Go struct field {holder}.{path} of type {go_type}"


def _bare(type_name: str) -> str:
    return re.sub(r"^(Core|Apps|Batch)?V\d+", "", type_name)
