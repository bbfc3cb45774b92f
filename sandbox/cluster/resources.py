"""The table of kinds that this API server serves, and the custom resources that GKE brings along."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from sandbox.cluster.schema import Node, root

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
READ_ONLY = ("get", "list", "watch")
_POD_TEMPLATE: dict[str, Any] = {"metadata": {}, "spec": {"containers": []}}


@dataclass(frozen=True)
class Resource:
    """One kind of object and how it is served."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    model: str | None = None
    """The official client's model of it; None for custom resources."""
    subresources: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    has_generation: bool = False
    returns_deleted: bool = False
    """DELETE answers with the object, not with a Status."""
    zero: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    """The structs that exist in an empty Go object: they are never reported as created by somebody."""
    required: tuple[str, ...] = ()
    """Fields that a custom resource's schema requires, e.g. `spec.priorities`."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def node(self) -> Node:
        return root(self.model)

    @property
    def custom(self) -> bool:
        return self.model is None

    @property
    def singular(self) -> str:
        return self.kind.lower()

    @property
    def empty(self) -> dict[str, Any]:
        return copy.deepcopy({"metadata": {}} | self.zero)


def _core(kind: str, plural: str, **more: Any) -> Resource:
    return Resource("", "v1", kind, plural, model=more.pop("model", f"V1{kind}"), **more)


POD = _core(
    "Pod",
    "pods",
    short_names=("po",),
    subresources=("status", "log", "portforward", "proxy"),
    has_generation=True,
    returns_deleted=True,
    zero={"spec": {"containers": []}},
)
NAMESPACE = _core(
    "Namespace", "namespaces", namespaced=False, short_names=("ns",), subresources=("status",), returns_deleted=True
)
NODE = _core("Node", "nodes", namespaced=False, short_names=("no",), subresources=("status",), zero={"spec": {}})
SERVICE = _core(
    "Service",
    "services",
    short_names=("svc",),
    subresources=("status", "proxy"),
    returns_deleted=True,
    zero={"spec": {}},
)
SERVICE_ACCOUNT = _core("ServiceAccount", "serviceaccounts", short_names=("sa",), returns_deleted=True)
SECRET = _core("Secret", "secrets")
CONFIG_MAP = _core("ConfigMap", "configmaps", short_names=("cm",))
EVENT = _core("Event", "events", short_names=("ev",), model="CoreV1Event")
DEPLOYMENT = Resource(
    "apps",
    "v1",
    "Deployment",
    "deployments",
    short_names=("deploy",),
    model="V1Deployment",
    subresources=("status", "scale"),
    has_generation=True,
    zero={"spec": {"template": _POD_TEMPLATE, "strategy": {}}},
)
REPLICA_SET = Resource(
    "apps",
    "v1",
    "ReplicaSet",
    "replicasets",
    short_names=("rs",),
    model="V1ReplicaSet",
    subresources=("status", "scale"),
    has_generation=True,
    zero={"spec": {"template": _POD_TEMPLATE}},
)
JOB = Resource(
    "batch",
    "v1",
    "Job",
    "jobs",
    model="V1Job",
    subresources=("status",),
    has_generation=True,
    zero={"spec": {"template": _POD_TEMPLATE}},
)
ENDPOINT_SLICE = Resource(
    "discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", model="V1EndpointSlice", has_generation=True
)
ROLE = Resource("rbac.authorization.k8s.io", "v1", "Role", "roles", model="V1Role")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "v1", "RoleBinding", "rolebindings", model="V1RoleBinding")
CLUSTER_ROLE = Resource(
    "rbac.authorization.k8s.io", "v1", "ClusterRole", "clusterroles", namespaced=False, model="V1ClusterRole"
)
CLUSTER_ROLE_BINDING = Resource(
    "rbac.authorization.k8s.io",
    "v1",
    "ClusterRoleBinding",
    "clusterrolebindings",
    namespaced=False,
    model="V1ClusterRoleBinding",
)
CRD = Resource(
    "apiextensions.k8s.io",
    "v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
    short_names=("crd", "crds"),
    model="V1CustomResourceDefinition",
    verbs=READ_ONLY,
)
COMPUTE_CLASS = Resource(
    "cloud.google.com",
    "v1",
    "ComputeClass",
    "computeclasses",
    namespaced=False,
    subresources=("status",),
    has_generation=True,
    required=("spec.priorities",),
)

BUILT_IN: tuple[Resource, ...] = (
    POD,
    NAMESPACE,
    NODE,
    SERVICE,
    SERVICE_ACCOUNT,
    SECRET,
    CONFIG_MAP,
    EVENT,
    _core(
        "PersistentVolumeClaim",
        "persistentvolumeclaims",
        short_names=("pvc",),
        subresources=("status",),
        returns_deleted=True,
        zero={"spec": {"resources": {}}},
    ),
    _core(
        "PersistentVolume",
        "persistentvolumes",
        namespaced=False,
        short_names=("pv",),
        subresources=("status",),
        returns_deleted=True,
        zero={"spec": {}},
    ),
    DEPLOYMENT,
    REPLICA_SET,
    JOB,
    Resource(
        "autoscaling",
        "v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        short_names=("hpa",),
        model="V2HorizontalPodAutoscaler",
        subresources=("status",),
        zero={"spec": {"scaleTargetRef": {}}},
    ),
    Resource(
        "policy",
        "v1",
        "PodDisruptionBudget",
        "poddisruptionbudgets",
        short_names=("pdb",),
        model="V1PodDisruptionBudget",
        subresources=("status",),
        has_generation=True,
        zero={"spec": {}},
    ),
    ENDPOINT_SLICE,
    # Kept, and acted upon by nobody: as in a cluster without a controller of ingresses.
    Resource(
        "networking.k8s.io",
        "v1",
        "Ingress",
        "ingresses",
        short_names=("ing",),
        model="V1Ingress",
        subresources=("status",),
        has_generation=True,
        zero={"spec": {}},
    ),
    Resource("coordination.k8s.io", "v1", "Lease", "leases", model="V1Lease", zero={"spec": {}}),
    ROLE,
    ROLE_BINDING,
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    CRD,
)

CUSTOM: tuple[Resource, ...] = (
    COMPUTE_CLASS,
    Resource(
        "monitoring.googleapis.com",
        "v1",
        "PodMonitoring",
        "podmonitorings",
        subresources=("status",),
        has_generation=True,
        required=("spec.endpoints", "spec.selector"),
    ),
    Resource(
        "gateway.networking.k8s.io",
        "v1",
        "Gateway",
        "gateways",
        short_names=("gtw",),
        subresources=("status",),
        has_generation=True,
        required=("spec.gatewayClassName", "spec.listeners"),
    ),
    Resource(
        "gateway.networking.k8s.io",
        "v1",
        "HTTPRoute",
        "httproutes",
        subresources=("status",),
        has_generation=True,
        required=("spec",),
    ),
    Resource(
        "networking.gke.io",
        "v1",
        "HealthCheckPolicy",
        "healthcheckpolicies",
        subresources=("status",),
        has_generation=True,
        required=("spec.targetRef",),
    ),
    Resource(
        "inference.networking.k8s.io",
        "v1",
        "InferencePool",
        "inferencepools",
        short_names=("infpool",),
        subresources=("status",),
        has_generation=True,
        required=("spec.endpointPickerRef", "spec.selector", "spec.targetPorts"),
    ),
)


def definition(resource: Resource) -> dict[str, Any]:
    """The CustomResourceDefinition object that installs a custom resource."""
    name = f"{resource.plural}.{resource.group}"
    names: dict[str, Any] = {"plural": resource.plural, "singular": resource.singular, "kind": resource.kind}
    names |= {"listKind": f"{resource.kind}List", "shortNames": list(resource.short_names)}
    return {
        "metadata": {"name": name},
        "spec": {
            "group": resource.group,
            "names": names,
            "scope": "Namespaced" if resource.namespaced else "Cluster",
            "conversion": {"strategy": "None"},
            "versions": [
                {
                    "name": resource.version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
                    "subresources": {"status": {}},
                }
            ],
        },
        "status": {
            "acceptedNames": names,
            "storedVersions": [resource.version],
            "conditions": [
                {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z", "reason": reason}
                for kind, reason in (("NamesAccepted", "NoConflicts"), ("Established", "InitialNamesAccepted"))
            ],
        },
    }
