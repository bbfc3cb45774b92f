"""The rules that the API server holds new and changed objects to, with its own words.

Covered: names, labels, pod templates (containers, images, resources, volumes, probes), Deployments, Jobs, Services,
autoscalers and the required fields of custom resources. Rules outside this list are not simulated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from sandbox.cluster.defaults import GPU_RESOURCE
from sandbox.cluster.errors import Cause, invalid, invalid_value, not_supported, required
from sandbox.cluster.quantity import parse
from sandbox.cluster.resources import Resource
from sandbox.cluster.selectors import matches_label_selector

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, "
    "and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is "
    "'[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    r"'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_LABEL_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_LABEL_LENGTH, _NAME_LENGTH = 63, 253


def check(resource: Resource, obj: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Raise the 422 that lists every broken rule. `old` is the stored object when this is a change."""
    causes = [*_metadata(resource, obj["metadata"])]
    if resource.custom:
        causes += [required(path) for path in resource.required if not _has(obj, path)]
    elif rules := _RULES.get(resource.kind):
        causes += rules(obj, old)
    if causes:
        raise invalid(resource.group, resource.kind, obj["metadata"].get("name", ""), causes)


def _has(obj: dict[str, Any], path: str) -> bool:
    value: Any = obj
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return value is not None


def _quoted(value: Any) -> str:
    """As Go prints it: with the keys of an object in order."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def _metadata(resource: Resource, metadata: dict[str, Any]) -> Iterator[Cause]:
    name = metadata.get("name", "")
    if not name:
        yield required("metadata.name", "name or generateName is required")
        return
    pattern, rule, length = _SUBDOMAIN, _SUBDOMAIN_RULE, _NAME_LENGTH
    if resource.kind == "Namespace":
        pattern, rule, length = _LABEL, _LABEL_RULE, _LABEL_LENGTH
    elif resource.kind == "Service":
        pattern, rule, length = _DNS_1035, _DNS_1035_RULE, _LABEL_LENGTH
    if len(name) > length:
        yield invalid_value("metadata.name", _quoted(name), f"must be no more than {length} bytes")
    if not pattern.fullmatch(name):
        yield invalid_value("metadata.name", _quoted(name), rule)
    yield from _labels(metadata.get("labels") or {}, "metadata.labels")


def _labels(labels: dict[str, str], field: str) -> Iterator[Cause]:
    for value in labels.values():
        if len(value) > _LABEL_LENGTH:
            yield invalid_value(field, _quoted(value), f"must be no more than {_LABEL_LENGTH} bytes")
        if not _LABEL_VALUE.fullmatch(value):
            yield invalid_value(field, _quoted(value), _LABEL_VALUE_RULE)


def _selector_fits(spec: dict[str, Any]) -> Iterator[Cause]:
    selector = spec.get("selector") or {}
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        yield (
            required("spec.selector")
            if not spec.get("selector")
            else invalid_value("spec.selector", _quoted(selector), "empty selector is invalid for deployment")
        )
        return
    labels = spec["template"].get("metadata", {}).get("labels") or {}
    if not matches_label_selector(selector, labels):
        why = "`selector` does not match template `labels`"
        yield invalid_value("spec.template.metadata.labels", _quoted(labels), why)


def _immutable(obj: dict[str, Any], old: dict[str, Any] | None, *path: str) -> Iterator[Cause]:
    if old is None:
        return
    before, after = old["spec"].get(path[-1]), obj["spec"].get(path[-1])
    if before != after:
        yield invalid_value(".".join(path), _quoted(after), "field is immutable")


def _deployment(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    spec = obj["spec"]
    yield from _non_negative(spec, "replicas")
    yield from _selector_fits(spec)
    yield from _template(spec["template"], ("Always",))
    rolling = spec["strategy"].get("rollingUpdate")
    if spec["strategy"]["type"] not in ("RollingUpdate", "Recreate"):
        yield not_supported("spec.strategy.type", spec["strategy"]["type"], ("Recreate", "RollingUpdate"))
    elif spec["strategy"]["type"] == "Recreate" and rolling:
        why = "may not be specified when strategy `type` is 'Recreate'"
        yield Cause("FieldValueForbidden", f"Forbidden: {why}", "spec.strategy.rollingUpdate")
    elif rolling and str(rolling["maxUnavailable"]).strip("%") == str(rolling["maxSurge"]).strip("%") == "0":
        shown = _quoted(rolling["maxUnavailable"])
        yield invalid_value("spec.strategy.rollingUpdate.maxUnavailable", shown, "may not be 0 when `maxSurge` is 0")
    yield from _immutable(obj, old, "spec", "selector")


def _replica_set(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    yield from _non_negative(obj["spec"], "replicas")
    yield from _selector_fits(obj["spec"])
    yield from _template(obj["spec"]["template"], ("Always",))
    yield from _immutable(obj, old, "spec", "selector")


def _job(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    spec = obj["spec"]
    for field in ("parallelism", "completions", "backoffLimit", "backoffLimitPerIndex", "maxFailedIndexes"):
        yield from _non_negative(spec, field)
    if "backoffLimitPerIndex" in spec and spec["completionMode"] != "Indexed":
        shown = str(spec["backoffLimitPerIndex"])
        yield invalid_value("spec.backoffLimitPerIndex", shown, "requires indexed completion mode")
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield required("spec.backoffLimitPerIndex", "when maxFailedIndexes is specified")
    if spec["completionMode"] == "Indexed" and spec.get("completions") is None:
        yield required("spec.completions", "when completion mode is Indexed")
    if "restartPolicy" not in spec["template"]["spec"]:
        yield required("spec.template.spec.restartPolicy", 'valid values: "OnFailure", "Never"')
    yield from _template(spec["template"], ("OnFailure", "Never"))
    yield from _immutable(obj, old, "spec", "template")


def _non_negative(spec: dict[str, Any], field: str) -> Iterator[Cause]:
    if (spec.get(field) or 0) < 0:
        yield invalid_value(f"spec.{field}", str(spec[field]), "must be greater than or equal to 0")


def _pod(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    if old is None:
        yield from _pod_spec(obj["spec"], "spec")
    elif _without_images(obj["spec"]) != _without_images(old["spec"]):
        fields = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,"
        fields += "`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` "
        fields += "(allow it to be set to 1 if it was previously negative)"
        message = f"Forbidden: pod updates may not change fields other than {fields}"
        yield Cause("FieldValueForbidden", message, "spec")


def _without_images(spec: dict[str, Any]) -> dict[str, Any]:
    changeable = {"activeDeadlineSeconds", "tolerations", "nodeName"}
    bare = {key: value for key, value in spec.items() if key not in changeable}
    for name in ("containers", "initContainers"):
        bare[name] = [{key: value for key, value in each.items() if key != "image"} for each in spec.get(name, [])]
    return bare


def _template(template: dict[str, Any], policies: tuple[str, ...]) -> Iterator[Cause]:
    yield from _labels(template.get("metadata", {}).get("labels") or {}, "spec.template.metadata.labels")
    spec = template["spec"]
    policy = spec.get("restartPolicy", policies[0])
    if policy not in policies:
        yield not_supported("spec.template.spec.restartPolicy", policy, policies)
    yield from _pod_spec(spec, "spec.template.spec")


def _pod_spec(spec: dict[str, Any], at: str) -> Iterator[Cause]:
    if not spec.get("containers"):
        yield required(f"{at}.containers")
    volumes: set[str] = set()
    for index, volume in enumerate(spec.get("volumes", [])):
        name = volume.get("name", "")
        if not name:
            yield required(f"{at}.volumes[{index}].name")
        if name in volumes:
            yield _duplicate(f"{at}.volumes[{index}].name", name)
        volumes.add(name)
        if set(volume) == {"name"}:
            yield required(f"{at}.volumes[{index}]", "must specify a volume type")
    for field in ("containers", "initContainers"):
        names: set[str] = set()
        for index, container in enumerate(spec.get(field, [])):
            here = f"{at}.{field}[{index}]"
            if container.get("name") in names:
                yield _duplicate(f"{here}.name", container["name"])
            names.add(container.get("name", ""))
            yield from _container(container, here, volumes)


def _duplicate(field: str, value: str) -> Cause:
    return Cause("FieldValueDuplicate", f'Duplicate value: "{value}"', field)


def _container(container: dict[str, Any], at: str, volumes: set[str]) -> Iterator[Cause]:
    name = container.get("name", "")
    if not name:
        yield required(f"{at}.name")
    elif not _LABEL.fullmatch(name):
        yield invalid_value(f"{at}.name", _quoted(name), _LABEL_RULE)
    if not container.get("image"):
        yield required(f"{at}.image")
    for index, port in enumerate(container.get("ports", [])):
        if not 0 < port.get("containerPort", 0) < 65536:
            shown = str(port.get("containerPort", 0))
            yield invalid_value(f"{at}.ports[{index}].containerPort", shown, "must be between 1 and 65535, inclusive")
    for index, variable in enumerate(container.get("env", [])):
        if not variable.get("name"):
            yield required(f"{at}.env[{index}].name")
        if variable.get("value") and variable.get("valueFrom"):
            why = "may not be specified when `value` is not empty"
            yield invalid_value(f"{at}.env[{index}].valueFrom", '""', why)
    for index, mount in enumerate(container.get("volumeMounts", [])):
        if mount.get("name") not in volumes:
            field = f"{at}.volumeMounts[{index}].name"
            yield Cause("FieldValueNotFound", f'Not found: "{mount.get("name")}"', field)
    yield from _resources(container.get("resources") or {}, f"{at}.resources")
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(probe) is not None:
            yield from _probe(container[probe], f"{at}.{probe}")


def _probe(probe: dict[str, Any], at: str) -> Iterator[Cause]:
    if not any(handler in probe for handler in ("httpGet", "tcpSocket", "exec", "grpc")):
        yield required(at, "must specify a handler type")
    if not at.endswith("readinessProbe") and probe.get("successThreshold", 1) != 1:
        yield invalid_value(f"{at}.successThreshold", str(probe["successThreshold"]), "must be 1")


def _resources(resources: dict[str, Any], at: str) -> Iterator[Cause]:
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for part, quantities in (("limits", limits), ("requests", requests)):
        for name, value in quantities.items():
            try:
                parse(value)
            except ValueError as error:
                yield invalid_value(f"{at}.{part}[{name}]", _quoted(value), str(error))
                return
    for name, value in requests.items():
        if name == GPU_RESOURCE and name not in limits:
            yield required(f"{at}.limits", "Limit must be set for non overcommitable resources")
        elif name == GPU_RESOURCE and parse(value) != parse(limits[name]):
            shown = f"must be equal to {name} limit of {limits[name]}"
            yield invalid_value(f"{at}.requests", _quoted(str(value)), shown)
        elif name in limits and parse(value) > parse(limits[name]):
            shown = f"must be less than or equal to {name} limit of {limits[name]}"
            yield invalid_value(f"{at}.requests", _quoted(str(value)), shown)


def _service(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    spec = obj["spec"]
    kinds = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
    if spec["type"] not in kinds:
        yield not_supported("spec.type", spec["type"], kinds)
    headless = spec.get("clusterIP") == "None"
    if not spec.get("ports") and not headless and spec["type"] != "ExternalName":
        yield required("spec.ports")
    for index, port in enumerate(spec.get("ports", [])):
        if not 0 < port.get("port", 0) < 65536:
            shown = str(port.get("port", 0))
            yield invalid_value(f"spec.ports[{index}].port", shown, "must be between 1 and 65535, inclusive")
        if len(spec["ports"]) > 1 and not port.get("name"):
            yield required(f"spec.ports[{index}].name")
    if old is not None and old["spec"].get("clusterIP") and spec.get("clusterIP") != old["spec"]["clusterIP"]:
        shown = f'["{spec.get("clusterIP", "")}"]'
        yield invalid_value("spec.clusterIPs[0]", shown, "may not change once set")


def _autoscaler(obj: dict[str, Any], old: dict[str, Any] | None) -> Iterator[Cause]:
    spec = obj["spec"]
    for field in ("kind", "name"):
        if not (spec.get("scaleTargetRef") or {}).get(field):
            yield required(f"spec.scaleTargetRef.{field}")
    if spec.get("maxReplicas", 0) < 1:
        yield invalid_value("spec.maxReplicas", str(spec.get("maxReplicas", 0)), "must be greater than 0")
    elif spec["maxReplicas"] < spec["minReplicas"]:
        why = "must be greater than or equal to `minReplicas`"
        yield invalid_value("spec.maxReplicas", str(spec["maxReplicas"]), why)


_RULES: dict[str, Callable[[dict[str, Any], dict[str, Any] | None], Iterator[Cause]]] = {
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "Job": _job,
    "Pod": _pod,
    "Service": _service,
    "HorizontalPodAutoscaler": _autoscaler,
}
