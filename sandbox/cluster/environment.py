"""A container's environment: literals, references to Secrets, ConfigMaps and the pod's own fields, `$(VAR)`."""

from __future__ import annotations

import base64
import re
from typing import Any

from sandbox.cluster.resources import CONFIG_MAP, SECRET, Resource
from sandbox.cluster.store import Store

_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_QUOTED_KEY = re.compile(r"^metadata\.(labels|annotations)\['(.+)'\]$")


class ConfigError(Exception):
    """What the environment refers to is not there: CreateContainerConfigError, with the kubelet's message."""


def resolve(store: Store, pod: dict[str, Any], container: dict[str, Any]) -> dict[str, str]:
    """The variables of a container, in order; later ones may use earlier ones by `$(NAME)`."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= _all_of(store, pod, source)
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            value = _from(store, pod, variable["valueFrom"])
            if value is not None:
                found[variable["name"]] = value
        else:
            found[variable["name"]] = expand(variable.get("value", ""), found)
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """`$(NAME)` by its value; `$$` is a dollar, and an unknown name stays as it is."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match.group(0) == "$$" else variables.get(match.group(1), match.group(0))

    return _REFERENCE.sub(replace, text)


def _all_of(store: Store, pod: dict[str, Any], source: dict[str, Any]) -> dict[str, str]:
    kind, reference = (SECRET, source["secretRef"]) if "secretRef" in source else (CONFIG_MAP, source["configMapRef"])
    data = _data(store, pod, kind, reference)
    return {f"{source.get('prefix', '')}{key}": value for key, value in data.items()}


def _from(store: Store, pod: dict[str, Any], source: dict[str, Any]) -> str | None:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    for name, kind in (("secretKeyRef", SECRET), ("configMapKeyRef", CONFIG_MAP)):
        if name in source:
            reference = source[name]
            value = _data(store, pod, kind, reference).get(reference["key"])
            if value is None and not reference.get("optional"):
                where = f"{pod['metadata']['namespace']}/{reference['name']}"
                raise ConfigError(f"couldn't find key {reference['key']} in {kind.kind} {where}")
            return value
    raise ConfigError(f"unsupported source of an environment variable: {', '.join(source)}")


def _data(store: Store, pod: dict[str, Any], kind: Resource, reference: dict[str, Any]) -> dict[str, str]:
    obj = store.get(kind, pod["metadata"]["namespace"], reference["name"])
    if obj is None:
        if reference.get("optional"):
            return {}
        raise ConfigError(f'{kind.singular} "{reference["name"]}" not found')
    data = obj.get("data") or {}
    return {key: base64.b64decode(value).decode() for key, value in data.items()} if kind == SECRET else dict(data)


def _field(pod: dict[str, Any], path: str) -> str:
    if matched := _QUOTED_KEY.match(path):
        group, key = matched.groups()
        return str((pod["metadata"].get(group) or {}).get(key, ""))
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)
