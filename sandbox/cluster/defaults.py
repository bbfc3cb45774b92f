"""What the API server fills in: the defaults of each kind, and what is allocated when an object is created."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Callable
from typing import Any

from sandbox.cluster.quantity import parse
from sandbox.cluster.resources import Resource

NAME_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
"""The characters of generated names: no vowels, so that no word appears by chance."""

GPU_RESOURCE, TPU_RESOURCE = "nvidia.com/gpu", "google.com/tpu"
_NOT_READY_S = 300
_TOKEN_S = 3607


def random_suffix(length: int = 5) -> str:
    return "".join(random.choices(NAME_ALPHABET, k=length))


def apply_defaults(resource: Resource, obj: dict[str, Any]) -> None:
    """Fill in the defaults of `obj` in place: what a stored object always has."""
    fill = _DEFAULTS.get(resource.kind)
    if fill is not None and not resource.custom:
        fill(obj)


def _pod_spec(spec: dict[str, Any]) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("securityContext", {})
    spec.setdefault("schedulerName", "default-scheduler")
    if "serviceAccountName" in spec:
        spec.setdefault("serviceAccount", spec["serviceAccountName"])
    for container in (*spec.get("containers", []), *spec.get("initContainers", [])):
        _container(container)
    for volume in spec.get("volumes", []):
        _volume(volume)


def _container(container: dict[str, Any]) -> None:
    container.setdefault("resources", {})
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    image = container.get("image", "")
    latest = ":" not in image.rsplit("/", 1)[-1] or image.endswith(":latest")
    container.setdefault("imagePullPolicy", "Always" if latest and "@" not in image else "IfNotPresent")
    for port in container.get("ports", []):
        port.setdefault("protocol", "TCP")
    for variable in container.get("env", []):
        if reference := (variable.get("valueFrom") or {}).get("fieldRef"):
            reference.setdefault("apiVersion", "v1")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if probe := container.get(name):
            _probe(probe)
    for moment in ("preStop", "postStart"):
        handler = (container.get("lifecycle") or {}).get(moment) or {}
        if "httpGet" in handler:
            _http_get(handler["httpGet"])


def _probe(probe: dict[str, Any]) -> None:
    for key, value in {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}.items():
        if not probe.get(key):
            probe[key] = value
    if "httpGet" in probe:
        _http_get(probe["httpGet"])


def _http_get(action: dict[str, Any]) -> None:
    action.setdefault("path", "/")
    action.setdefault("scheme", "HTTP")


def _volume(volume: dict[str, Any]) -> None:
    if set(volume) == {"name"}:
        volume["emptyDir"] = {}
    for source in ("secret", "configMap", "projected", "downwardAPI"):
        if source in volume:
            volume[source].setdefault("defaultMode", 420)


def _deployment(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    _template(spec)
    strategy = spec.setdefault("strategy", {})
    if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", "25%")
        rolling.setdefault("maxSurge", "25%")
    spec.setdefault("revisionHistoryLimit", 10)
    spec.setdefault("progressDeadlineSeconds", 600)
    obj.setdefault("status", {})


def _template(spec: dict[str, Any]) -> None:
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    _pod_spec(template.setdefault("spec", {}))


def _replica_set(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("replicas", 1)
    _template(spec)
    obj.setdefault("status", {"replicas": 0})


def _job(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    _template_of_job(spec)
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    # With a limit for each index, there is none for the Job.
    spec.setdefault("backoffLimit", 6 if "backoffLimitPerIndex" not in spec else 2**31 - 1)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)
    spec.setdefault("podReplacementPolicy", "TerminatingOrFailed")
    spec.setdefault("manualSelector", False)
    obj.setdefault("status", {})


def _template_of_job(spec: dict[str, Any]) -> None:
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {})
    pod_spec = template.setdefault("spec", {})
    chosen = pod_spec.get("restartPolicy")
    _pod_spec(pod_spec)
    if chosen is None:
        del pod_spec["restartPolicy"]  # a Job must say it: validation refuses the pod's own default


def _pod(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    _pod_spec(spec)
    spec.setdefault("enableServiceLinks", True)
    for container in (*spec.get("containers", []), *spec.get("initContainers", [])):
        limits = container["resources"].get("limits")
        if limits:
            container["resources"]["requests"] = limits | (container["resources"].get("requests") or {})
    obj.setdefault("status", {})


def _service(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    for port in spec.get("ports", []):
        port.setdefault("protocol", "TCP")
        if "port" in port:
            port.setdefault("targetPort", port["port"])
    spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["type"] != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
    obj.setdefault("status", {"loadBalancer": {}})


def _secret(obj: dict[str, Any]) -> None:
    obj.setdefault("type", "Opaque")
    plain = obj.pop("stringData", None)
    if plain:
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
        obj["data"] = (obj.get("data") or {}) | encoded


def _autoscaler(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("minReplicas", 1)
    if not spec.get("metrics"):
        target = {"type": "Utilization", "averageUtilization": 80}
        spec["metrics"] = [{"type": "Resource", "resource": {"name": "cpu", "target": target}}]
    obj.setdefault("status", {"desiredReplicas": 0, "currentMetrics": None})


def _disruption_budget(obj: dict[str, Any]) -> None:
    empty = {"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0}
    obj.setdefault("status", empty)


def _claim(obj: dict[str, Any]) -> None:
    obj.setdefault("spec", {}).setdefault("volumeMode", "Filesystem")
    obj.setdefault("status", {"phase": "Pending"})


def _volume_object(obj: dict[str, Any]) -> None:
    spec = obj.setdefault("spec", {})
    spec.setdefault("persistentVolumeReclaimPolicy", "Retain")
    spec.setdefault("volumeMode", "Filesystem")
    obj.setdefault("status", {"phase": "Available"})


_DEFAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Deployment": _deployment,
    "ReplicaSet": _replica_set,
    "Job": _job,
    "Pod": _pod,
    "Service": _service,
    "Secret": _secret,
    "HorizontalPodAutoscaler": _autoscaler,
    "PodDisruptionBudget": _disruption_budget,
    "PersistentVolumeClaim": _claim,
    "PersistentVolume": _volume_object,
}


def prepare_for_create(resource: Resource, obj: dict[str, Any], new_cluster_ip: Callable[[], str]) -> None:
    """What admission and the allocators add to a new object, in place; nobody owns these fields."""
    if resource.kind == "Namespace":
        obj["spec"] = {"finalizers": ["kubernetes"]}
        obj["status"] = {"phase": "Active"}
    elif resource.kind == "Pod":
        _admit_pod(obj)
    elif resource.kind == "Service" and obj["spec"]["type"] != "ExternalName":
        _allocate_service(obj["spec"], new_cluster_ip)
    elif resource.kind == "Job" and not obj["spec"].get("selector"):
        _select_pods_of_job(obj)


def _admit_pod(obj: dict[str, Any]) -> None:
    spec = obj["spec"]
    account = spec.get("serviceAccountName") or "default"
    spec["serviceAccountName"] = spec["serviceAccount"] = account
    if spec.get("automountServiceAccountToken", True):
        _mount_token(spec)
    tolerations = spec.setdefault("tolerations", [])
    for resource in (GPU_RESOURCE, TPU_RESOURCE):
        if _requests(spec, resource):
            # ExtendedResourceToleration: GKE taints such nodes, and tolerates the taint for pods that ask for a device.
            tolerations.append({"key": resource, "operator": "Exists", "effect": "NoSchedule"})
    for taint in ("not-ready", "unreachable"):
        key = f"node.kubernetes.io/{taint}"
        tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": _NOT_READY_S})
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    obj["status"] = {"phase": "Pending", "qosClass": quality_of_service(spec)}


def _mount_token(spec: dict[str, Any]) -> None:
    name = f"kube-api-access-{random_suffix()}"
    sources: list[dict[str, Any]] = [
        {"serviceAccountToken": {"expirationSeconds": _TOKEN_S, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [
                    {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}},
                ]
            }
        },
    ]
    volumes = spec.setdefault("volumes", [])
    volumes.append({"name": name, "projected": {"sources": sources, "defaultMode": 420}})
    mount = {"name": name, "readOnly": True, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}
    for container in (*spec.get("containers", []), *spec.get("initContainers", [])):
        container.setdefault("volumeMounts", []).append(copy.deepcopy(mount))


def _requests(spec: dict[str, Any], resource: str) -> bool:
    return any(resource in (each["resources"].get("requests") or {}) for each in spec.get("containers", []))


def quality_of_service(spec: dict[str, Any]) -> str:
    """Guaranteed, Burstable or BestEffort: by cpu and memory only, as in Kubernetes."""
    requests, limits = [], []
    for container in spec.get("containers", []):
        resources = container.get("resources") or {}
        for name in ("cpu", "memory"):
            requests.append((resources.get("requests") or {}).get(name))
            limits.append((resources.get("limits") or {}).get(name))
    if not any((*requests, *limits)):
        return "BestEffort"
    pairs = zip(requests, limits, strict=True)
    guaranteed = all(limit and request and parse(limit) == parse(request) for request, limit in pairs)
    return "Guaranteed" if guaranteed else "Burstable"


def _allocate_service(spec: dict[str, Any], new_cluster_ip: Callable[[], str]) -> None:
    spec.setdefault("clusterIP", new_cluster_ip())
    spec.setdefault("clusterIPs", [spec["clusterIP"]])
    spec.setdefault("ipFamilies", ["IPv4"])
    spec.setdefault("ipFamilyPolicy", "SingleStack")


def _select_pods_of_job(obj: dict[str, Any]) -> None:
    uid, name = obj["metadata"]["uid"], obj["metadata"]["name"]
    labels = obj["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {})
    labels |= {"batch.kubernetes.io/controller-uid": uid, "controller-uid": uid}
    labels |= {"batch.kubernetes.io/job-name": name, "job-name": name}
    obj["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
