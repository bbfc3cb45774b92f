"""What an apply would change, as text for people: live objects against what the server would make of the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rollout.plan import object_name
from rollout.report import Action, Change
from rollout.values import Value, content_digest

_SERVERS_OWN = frozenset(
    {
        "managedFields",
        "resourceVersion",
        "generation",
        "uid",
        "creationTimestamp",
        "selfLink",
        "deletionGracePeriodSeconds",
    }
)
_CONTROLLERS_OWN = frozenset({"deployment.kubernetes.io/revision"})
_KEYS_OF_LISTS = ("name", "containerPort", "mountPath", "port", "ip", "type")
"""Fields by which Kubernetes tells the elements of its lists apart, most usual first."""

_ABSENT = object()


class FieldChange(Value):
    """One field: its path as Kubernetes writes it, and its values before and after as JSON ('' where absent)."""

    path: str
    before: str
    after: str


class ObjectDiff(Value):
    """One object: what happens to it, and which fields change."""

    action: Action
    kind: str
    name: str
    """`namespace/name`, or the name of a cluster-scoped object."""
    fields: tuple[FieldChange, ...] = ()

    @property
    def change(self) -> Change:
        detail = ", ".join(field.path for field in self.fields[:5]) + (", …" if len(self.fields) > 5 else "")
        return Change(action=self.action, kind=self.kind, name=self.name, detail=detail)


def diff_object(live: Mapping[str, Any] | None, planned: Mapping[str, Any] | None) -> ObjectDiff:
    """Compare an object as it is with what the server says it would be (a dry run's answer, defaults filled).

    `None` stands for absent on either side. Secrets' data are shown as digests only.
    """
    either = planned or live
    if either is None:
        raise ValueError("an object must exist before or after")
    before, after = _comparable(live), _comparable(planned)
    fields = tuple(_field_changes("", before, after)) if live and planned else ()
    if live is None:
        action = Action.CREATED
    elif planned is None:
        action = Action.DELETED
    else:
        action = Action.UPDATED if fields else Action.UNCHANGED
    return ObjectDiff(action=action, kind=str(either["kind"]), name=object_name(dict(either)), fields=fields)


def diff_markdown(diffs: tuple[ObjectDiff, ...]) -> str:
    """The diffs as Markdown: a line for each object, and the changed fields as a diff block."""
    lines: list[str] = []
    for diff in diffs:
        lines.append(f"- **{diff.action.value}** {diff.kind} `{diff.name}`")
        if diff.fields:
            lines += ["", "  ```diff"]
            for change in diff.fields:
                lines += [f"  - {change.path}: {change.before}"] if change.before else []
                lines += [f"  + {change.path}: {change.after}"] if change.after else []
            lines += ["  ```", ""]
    return "\n".join(lines) + "\n" if lines else "No objects.\n"


def masked(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a Secret's data replaced by digests: equal data look equal, and nothing can be read."""
    result = dict(manifest)
    if manifest.get("kind") == "Secret":
        for key in ("data", "stringData"):
            if manifest.get(key):
                result[key] = {name: f"(secret {content_digest(value, 8)})" for name, value in manifest[key].items()}
    return result


def _comparable(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    if manifest is None:
        return {}
    result = {key: value for key, value in masked(manifest).items() if key not in ("status", "apiVersion", "kind")}
    metadata = {key: value for key, value in manifest["metadata"].items() if key not in _SERVERS_OWN}
    annotations = metadata.get("annotations") or {}
    metadata["annotations"] = {key: value for key, value in annotations.items() if key not in _CONTROLLERS_OWN}
    result["metadata"] = metadata
    return result


def _field_changes(path: str, before: Any, after: Any) -> Iterator[FieldChange]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _field_changes(_join(path, key), before.get(key, _ABSENT), after.get(key, _ABSENT))
        return
    if isinstance(before, list) and isinstance(after, list):
        yield from _list_changes(path, before, after)
        return
    if {_json_text(before), _json_text(after)} <= {"", "{}", "[]", "null"}:
        return  # absent and empty are the same to Kubernetes
    yield FieldChange(path=path, before=_json_text(before), after=_json_text(after))


def _list_changes(path: str, before: list[Any], after: list[Any]) -> Iterator[FieldChange]:
    key = _list_key(before + after)
    if key:
        left, right = ({item[key]: item for item in items} for items in (before, after))
        for name in [*left, *(name for name in right if name not in left)]:
            shown = json.dumps(name)
            yield from _field_changes(f"{path}[{key}={shown}]", left.get(name, _ABSENT), right.get(name, _ABSENT))
        return
    if all(isinstance(item, str) for item in before + after):
        # Arguments: what came and went says more than which index changed.
        for item in before:
            if item not in after:
                yield FieldChange(path=f"{path}[]", before=_json_text(item), after="")
        for item in after:
            if item not in before:
                yield FieldChange(path=f"{path}[]", before="", after=_json_text(item))
        if sorted(before) == sorted(after):
            yield FieldChange(path=path, before=_json_text(before), after=_json_text(after))
        return
    for index in range(max(len(before), len(after))):
        old = before[index] if index < len(before) else _ABSENT
        new = after[index] if index < len(after) else _ABSENT
        yield from _field_changes(f"{path}[{index}]", old, new)


def _list_key(items: list[Any]) -> str | None:
    for key in _KEYS_OF_LISTS:
        if items and all(isinstance(item, dict) and key in item for item in items):
            return key
    return None


def _join(path: str, key: str) -> str:
    return f"{path}[{json.dumps(key)}]" if "." in key or "/" in key else f"{path}.{key}"


def _json_text(value: Any) -> str:
    """Compact JSON; the empty text for what is absent."""
    return "" if value is _ABSENT else json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
