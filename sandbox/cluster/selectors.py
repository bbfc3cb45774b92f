"""Label and field selectors of lists and watches, and the LabelSelector objects of workloads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from sandbox.cluster.errors import bad_request

Matcher: TypeAlias = Callable[[dict[str, Any]], bool]

_SET_BASED = re.compile(r"^([^\s!=,()]+)\s+(in|notin)\s*\(([^()]*)\)$")
_EQUALITY = re.compile(r"^([^\s!=,()]+)\s*(==|=|!=)\s*([^\s!=,()]*)$")
_EXISTS = re.compile(r"^(!?)\s*([^\s!=,()]+)$")
_METADATA_FIELDS = frozenset({"metadata.name", "metadata.namespace"})
_FIELDS: dict[str, frozenset[str]] = {
    "Pod": frozenset(
        {
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "status.phase",
            "status.podIP",
        }
    ),
    "Event": frozenset(
        {
            "involvedObject.kind",
            "involvedObject.name",
            "involvedObject.namespace",
            "involvedObject.uid",
            "reason",
            "reportingComponent",
            "source",
            "type",
        }
    ),
    "Job": frozenset({"status.successful"}),
    "Namespace": frozenset({"status.phase"}),
    "Node": frozenset({"spec.unschedulable"}),
    "ReplicaSet": frozenset({"status.replicas"}),
    "Secret": frozenset({"type"}),
}


def label_matcher(selector: str) -> Matcher:
    """`app=web,tier in (a, b),!canary` as a test of an object. Raises 400 with the API server's words."""
    tests = [_requirement(text) for text in _split(selector)]
    return lambda obj: all(test(obj["metadata"].get("labels") or {}) for test in tests)


def _split(selector: str) -> list[str]:
    parts = re.split(r",(?![^()]*\))", selector) if selector.strip() else []
    return [part.strip() for part in parts]


def _requirement(text: str) -> Callable[[dict[str, str]], bool]:
    if matched := _SET_BASED.match(text):
        key, operator, values = matched.groups()
        allowed = {value.strip() for value in values.split(",")}
        if operator == "in":
            return lambda labels: labels.get(key) in allowed
        return lambda labels: labels.get(key) not in allowed
    if matched := _EQUALITY.match(text):
        key, operator, value = matched.groups()
        if operator == "!=":
            return lambda labels: labels.get(key) != value
        return lambda labels: labels.get(key) == value
    if matched := _EXISTS.match(text):
        absent, key = matched.groups()
        return lambda labels: (key in labels) != bool(absent)
    if re.search(r"\s(in|notin)\s*\([^)]*$", text):
        raise bad_request("unable to parse requirement: found '', expected: ',', ')' or identifier")
    raise bad_request(f"unable to parse requirement: found '{text}', expected: identifier")


def field_matcher(kind: str, selector: str) -> Matcher:
    """`metadata.name=x,status.phase!=Failed` as a test; 400 for a field that the kind cannot be selected by."""
    allowed = _METADATA_FIELDS | _FIELDS.get(kind, frozenset())
    tests: list[Matcher] = []
    for part in _split(selector):
        matched = re.match(r"^([^=!]+?)\s*(==|=|!=)\s*(.*)$", part)
        if matched is None:
            raise bad_request(f"invalid selector: '{selector}'; can't understand '{part}'")
        path, operator, value = matched.groups()
        if path not in allowed:
            raise bad_request(f"field label not supported: {path}")
        tests.append(_field_test(path, value, wanted=operator != "!="))
    return lambda obj: all(test(obj) for test in tests)


def _field_test(path: str, value: str, *, wanted: bool) -> Matcher:
    def test(obj: dict[str, Any]) -> bool:
        found: Any = obj
        for part in path.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        shown = "" if found is None else str(found).lower() if isinstance(found, bool) else str(found)
        return (shown == value) is wanted

    return test


def matches_label_selector(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """A workload's LabelSelector object against labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_expression(each, labels) for each in selector.get("matchExpressions") or [])


def _expression(expression: dict[str, Any], labels: dict[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    if operator in ("In", "NotIn"):
        return (labels.get(key) in values) is (operator == "In")
    return (key in labels) is (operator == "Exists")


def is_subset(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """A Service's plain selector, or a nodeSelector, against labels."""
    return all(labels.get(key) == value for key, value in selector.items())
