"""Endpoint slices of services, and the small status of disruption budgets."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from sandbox.cluster.controllers import MANAGER, Controller, Object, key_of, matching_pods, owner_reference, pod_ready
from sandbox.cluster.quantity import percentage_or_number
from sandbox.cluster.registry import Writer
from sandbox.cluster.resources import BUILT_IN, ENDPOINT_SLICE, POD, SERVICE
from sandbox.cluster.selectors import is_subset
from sandbox.cluster.store import Change, Key, timestamp

SERVICE_LABEL = "kubernetes.io/service-name"
_BUDGET = next(each for each in BUILT_IN if each.kind == "PodDisruptionBudget")


class EndpointSliceController(Controller):
    """One slice per service, with the addresses of its pods."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == SERVICE:
            return [key_of(change.obj)]
        if change.resource != POD:
            return []
        labels = change.obj["metadata"].get("labels") or {}
        services = self.store.find(SERVICE, change.obj["metadata"]["namespace"])
        return [key_of(each) for each in services if is_subset(each["spec"].get("selector") or {"": ""}, labels)]

    def reconcile(self, key: Key) -> float | None:
        service = self.store.get(SERVICE, *key)
        if service is None or not service["spec"].get("selector") or "deletionTimestamp" in service["metadata"]:
            return None
        slices = self.store.find(ENDPOINT_SLICE, key[0])
        current = next(
            (each for each in slices if (each["metadata"].get("labels") or {}).get(SERVICE_LABEL) == key[1]), None
        )
        pods = [
            pod
            for pod in self.store.find(POD, key[0])
            if is_subset(service["spec"]["selector"], pod["metadata"].get("labels") or {})
            and pod["status"].get("podIP")
            and pod["status"].get("phase") not in ("Succeeded", "Failed")
        ]
        pods.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        endpoints = [_endpoint(pod) for pod in pods] or None
        ports = [_port(each, pods[0]) for each in service["spec"].get("ports", [])] if pods else None
        if current is None:
            self._create(service, endpoints, ports)
        elif (current.get("endpoints"), current.get("ports")) != (endpoints, ports):
            changed = copy.deepcopy(current) | {"endpoints": endpoints, "ports": ports}
            changed["metadata"].setdefault("annotations", {}).update(_trigger_time())
            self.registry.update(ENDPOINT_SLICE, current, changed, Writer(MANAGER))
        return None

    def _create(self, service: Object, endpoints: list[Object] | None, ports: list[Object] | None) -> None:
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        labels = {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io", SERVICE_LABEL: name}
        metadata: Object = {"generateName": f"{name}-", "labels": labels, "annotations": _trigger_time()}
        metadata["ownerReferences"] = [owner_reference(SERVICE, service)]
        body = {"metadata": metadata, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
        self.registry.create(ENDPOINT_SLICE, body, namespace, Writer(MANAGER))


def _trigger_time() -> dict[str, str]:
    return {"endpoints.kubernetes.io/last-change-trigger-time": timestamp()}


def _endpoint(pod: Object) -> Object:
    terminating = "deletionTimestamp" in pod["metadata"]
    ready = pod_ready(pod)
    reference = {"kind": "Pod", "namespace": pod["metadata"]["namespace"], "name": pod["metadata"]["name"]}
    return {
        "addresses": [pod["status"]["podIP"]],
        "conditions": {"ready": ready and not terminating, "serving": ready, "terminating": terminating},
        "targetRef": reference | {"uid": pod["metadata"]["uid"]},
        "nodeName": pod["spec"].get("nodeName"),
    }


def _port(port: Object, pod: Object) -> Object:
    target = port.get("targetPort", port["port"])
    if isinstance(target, str):
        named = [each for container in pod["spec"]["containers"] for each in container.get("ports", [])]
        target = next((each["containerPort"] for each in named if each.get("name") == target), port["port"])
    return {"name": port.get("name", ""), "protocol": port["protocol"], "port": target}


class DisruptionBudgetController(Controller):
    """Counts the healthy pods of a disruption budget."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == _BUDGET:
            return [key_of(change.obj)]
        if change.resource != POD:
            return []
        return [key_of(each) for each in self.store.find(_BUDGET, change.obj["metadata"]["namespace"])]

    def reconcile(self, key: Key) -> float | None:
        budget = self.store.get(_BUDGET, *key)
        if budget is None:
            return None
        spec = budget["spec"]
        pods = matching_pods(self.store, key[0], spec.get("selector") or {})
        healthy = sum(pod_ready(pod) for pod in pods)
        if "maxUnavailable" in spec:
            desired = len(pods) - percentage_or_number(spec["maxUnavailable"], len(pods), round_up=True)
        else:
            desired = percentage_or_number(spec.get("minAvailable", 1), len(pods), round_up=True)
        status = {"observedGeneration": budget["metadata"]["generation"], "expectedPods": len(pods)}
        status |= {"currentHealthy": healthy, "desiredHealthy": max(0, desired)}
        status["disruptionsAllowed"] = max(0, healthy - max(0, desired))
        self.registry.write_status(_BUDGET, budget, budget | {"status": status}, MANAGER)
        return None
