"""Nodes and where they come from: machine types, compute classes, the autoscaler's quota and stock-outs.

A cluster starts without GPU nodes and makes them when a pod asks, as GKE Autopilot and node auto-creation do: a pod
that selects a ComputeClass gets its machine type, one that selects `cloud.google.com/gke-accelerator` a machine with
that accelerator, one that selects a TPU and its topology such a slice of one host, and any other pod a general-purpose
machine. Not simulated: slices of several hosts, and quota and stock of TPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sandbox.cluster.defaults import GPU_RESOURCE, TPU_RESOURCE, random_suffix
from sandbox.cluster.quantity import parse
from sandbox.cluster.resources import COMPUTE_CLASS, NODE
from sandbox.cluster.store import Store, timestamp

COMPUTE_CLASS_LABEL = "cloud.google.com/compute-class"
ACCELERATOR_LABEL = "cloud.google.com/gke-accelerator"
TPU_LABEL = "cloud.google.com/gke-tpu-accelerator"
TPU_TOPOLOGY_LABEL = "cloud.google.com/gke-tpu-topology"
_PODS_PER_NODE = "110"


@dataclass(frozen=True)
class Machine:
    """A machine type: what a node of it can give to pods."""

    name: str
    cpu: int
    memory_gib: int
    accelerator: str = ""
    gpus: int = 0
    tpus: int = 0
    topology: str = ""

    @property
    def devices(self) -> dict[str, str]:
        """Its accelerators as a resource of the node."""
        amounts = {GPU_RESOURCE: self.gpus, TPU_RESOURCE: self.tpus}
        return {name: str(count) for name, count in amounts.items() if count}


MACHINES: tuple[Machine, ...] = (
    Machine("e2-standard-8", 8, 32),
    Machine("a3-edgegpu-8g-nolssd", 208, 1872, "nvidia-h100-80gb", 8),
    Machine("a3-highgpu-1g", 26, 234, "nvidia-h100-80gb", 1),
    Machine("a3-highgpu-2g", 52, 468, "nvidia-h100-80gb", 2),
    Machine("a3-highgpu-4g", 104, 936, "nvidia-h100-80gb", 4),
    Machine("a3-highgpu-8g", 208, 1872, "nvidia-h100-80gb", 8),
    Machine("a3-ultragpu-8g", 224, 2952, "nvidia-h200-141gb", 8),
    Machine("a2-highgpu-1g", 12, 85, "nvidia-tesla-a100", 1),
    Machine("a2-ultragpu-1g", 12, 170, "nvidia-a100-80gb", 1),
    Machine("g2-standard-48", 48, 192, "nvidia-l4", 4),
    Machine("g2-standard-24", 24, 96, "nvidia-l4", 2),
    Machine("g2-standard-8", 8, 32, "nvidia-l4", 1),
    Machine("n1-standard-8", 8, 30, "nvidia-tesla-t4", 1),
    Machine("ct5lp-hightpu-1t", 24, 48, "tpu-v5-lite-podslice", tpus=1, topology="1x1"),
    Machine("ct5lp-hightpu-4t", 112, 192, "tpu-v5-lite-podslice", tpus=4, topology="2x2"),
    Machine("ct6e-standard-1t", 44, 448, "tpu-v6e-slice", tpus=1, topology="1x1"),
    Machine("ct6e-standard-4t", 180, 720, "tpu-v6e-slice", tpus=4, topology="2x2"),
)
"""Sizes of https://cloud.google.com/compute/docs/gpus and, for TPUs,
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus."""


@dataclass
class NodeSettings:
    """The cloud below the cluster; tests change the limits while it runs."""

    creation_s: float = 1.0
    """From TriggeredScaleUp to a Ready node: about 300 s on GKE."""

    removal_s: float | None = 600.0
    """How long a node stays when it is empty (GKE: ten minutes); None keeps it."""

    gpu_quota: int = 16
    """GPUs that the project may use; above it a scale-up fails with `GCE quota exceeded`."""

    gpus_in_stock: int | None = None
    """GPUs that the zone has left; None: enough. Without stock a scale-up fails with `GCE out of resources`."""

    ephemeral_storage: str = "200Gi"
    """Allocatable local disk of a node."""

    zone: str = "u-france-east1-b"
    project: str = "sandbox-project"
    auto_creation: bool = True
    """Node auto-creation at all; off, only nodes made by hand serve."""

    machines: tuple[Machine, ...] = field(default=MACHINES)


@dataclass(frozen=True)
class Refusal:
    """Why no node will come for a pod: the reason and message of the autoscaler's event."""

    reason: str
    message: str


@dataclass(frozen=True)
class NodePlan:
    """A node that would fit a pod."""

    machine: Machine
    compute_class: str


class NodePool:
    """Decides which node a pod needs, and makes and removes Node objects."""

    def __init__(self, store: Store, settings: NodeSettings) -> None:
        self._store = store
        self.settings = settings
        self._addresses = itertools.count(2)

    def plan_for(self, pod: dict[str, Any]) -> NodePlan | Refusal:
        """The node to create for a pod, or the autoscaler's reason for creating none."""
        selector = pod["spec"].get("nodeSelector") or {}
        requests = requests_of(pod)
        candidates = self._candidates(selector)
        if not candidates:
            return Refusal(
                "NotTriggerScaleUp", "pod didn't trigger scale-up: 1 node(s) didn't match Pod's node affinity/selector"
            )
        fitting = [each for each in candidates if not lacking(requests, self.allocatable(each.machine))]
        if not fitting:
            missing = {name for each in candidates for name in lacking(requests, self.allocatable(each.machine))}
            listed = ", ".join(f"1 Insufficient {name}" for name in sorted(missing))
            return Refusal("NotTriggerScaleUp", f"pod didn't trigger scale-up: {listed}")
        # The smallest machine that fits, as Autopilot bills by it; a compute class names its own order.
        return fitting[0] if COMPUTE_CLASS_LABEL in selector else min(fitting, key=lambda each: _size(each.machine))

    def _candidates(self, selector: dict[str, str]) -> list[NodePlan]:
        """Machines whose labels would satisfy a node selector; none when nobody would create such a node."""
        if not self.settings.auto_creation:
            return []
        wanted_class = selector.get(COMPUTE_CLASS_LABEL)
        plans = (
            self._of_class(wanted_class) if wanted_class else [NodePlan(each, "") for each in self.settings.machines]
        )
        return [plan for plan in plans if selector.items() <= _labels(plan, self.settings.zone).items()]

    def _of_class(self, name: str) -> list[NodePlan]:
        compute_class = self._store.get(COMPUTE_CLASS, "", name)
        if compute_class is None:
            return []
        spec = compute_class["spec"]
        if not (spec.get("nodePoolAutoCreation") or {}).get("enabled"):
            return []
        machines = {each.name: each for each in self.settings.machines}
        plans = []
        for priority in spec["priorities"]:
            machine = machines.get(priority.get("machineType", ""))
            gpu = priority.get("gpu") or {}
            if machine is None and gpu.get("type"):
                machine = next((each for each in machines.values() if each.accelerator == gpu["type"]), None)
            if machine is not None and gpu.get("type") in (None, machine.accelerator):
                plans.append(NodePlan(machine, name))
        return plans

    def refuse_by_limits(self, plan: NodePlan) -> Refusal | None:
        """The event of a scale-up that the project's quota or the zone's stock does not allow."""
        zone, gpus = self.settings.zone, plan.machine.gpus
        used = sum(gpus_of(node) for node in self._store.find(NODE))
        cause = None
        if gpus and used + gpus > self.settings.gpu_quota:
            cause = "GCE quota exceeded"
        elif gpus and self.settings.gpus_in_stock is not None and gpus > self.settings.gpus_in_stock:
            cause = "GCE out of resources"
        if cause is None:
            return None
        failed = f"Node scale up in zones {zone} associated with this pod failed: {cause}."
        return Refusal("FailedScaleUp", f"{failed} Pod is at risk of not being scheduled.")

    def group_url(self, plan: NodePlan) -> str:
        """The managed instance group that a TriggeredScaleUp event names."""
        base = f"https://www.googleapis.com/compute/v1/projects/{self.settings.project}/zones/{self.settings.zone}"
        return f"{base}/instanceGroups/gk3-nap-{plan.machine.name}-grp"

    def allocatable(self, machine: Machine) -> dict[str, str]:
        amounts = {"cpu": str(machine.cpu), "memory": f"{machine.memory_gib}Gi", "pods": _PODS_PER_NODE}
        amounts["ephemeral-storage"] = self.settings.ephemeral_storage
        return amounts | machine.devices

    def create(self, plan: NodePlan) -> dict[str, Any]:
        """A Ready node, as the store keeps it (not yet committed: the caller writes it)."""
        machine = plan.machine
        name = f"gk3-nap-{machine.name}-{random_suffix(8)}-{random_suffix(4)}"
        labels = _labels(plan, self.settings.zone) | {"kubernetes.io/hostname": name}
        taints = [{"key": device, "value": "present", "effect": "NoSchedule"} for device in machine.devices]
        if plan.compute_class:
            taints.append({"key": COMPUTE_CLASS_LABEL, "value": plan.compute_class, "effect": "NoSchedule"})
        amounts = self.allocatable(machine)
        if self.settings.gpus_in_stock is not None:
            self.settings.gpus_in_stock -= machine.gpus
        address = f"10.128.0.{next(self._addresses)}"
        provider = f"gce://{self.settings.project}/{self.settings.zone}/{name}"
        return {
            "metadata": {"name": name, "labels": labels},
            "spec": {"providerID": provider} | ({"taints": taints} if taints else {}),
            "status": {
                "capacity": amounts,
                "allocatable": amounts,
                "addresses": [
                    {"type": "InternalIP", "address": address},
                    {"type": "Hostname", "address": name},
                ],
                "conditions": node_conditions(ready=True),
                "nodeInfo": _NODE_INFO,
                "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            },
        }


_NODE_INFO = {
    "machineID": "",
    "systemUUID": "",
    "bootID": "",
    "kernelVersion": "6.12.0+",
    "osImage": "Container-Optimized OS from Google",
    "containerRuntimeVersion": "containerd://2.1.0",
    "kubeletVersion": "v1.36.0-gke.1000000",
    "kubeProxyVersion": "",
    "operatingSystem": "linux",
    "architecture": "amd64",
}


def node_conditions(*, ready: bool) -> list[dict[str, Any]]:
    now = timestamp()
    times = {"lastHeartbeatTime": now, "lastTransitionTime": now}
    if not ready:
        lost = {"reason": "NodeStatusUnknown", "message": "Kubelet stopped posting node status."}
        return [{"type": "Ready", "status": "Unknown", **times, **lost}]
    healthy = {"reason": "KubeletReady", "message": "kubelet is posting ready status"}
    return [
        {
            "type": "MemoryPressure",
            "status": "False",
            **times,
            "reason": "KubeletHasSufficientMemory",
            "message": "kubelet has sufficient memory available",
        },
        {
            "type": "DiskPressure",
            "status": "False",
            **times,
            "reason": "KubeletHasNoDiskPressure",
            "message": "kubelet has no disk pressure",
        },
        {"type": "Ready", "status": "True", **times, **healthy},
    ]


def _labels(plan: NodePlan, zone: str) -> dict[str, str]:
    labels = {
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "node.kubernetes.io/instance-type": plan.machine.name,
        "topology.kubernetes.io/region": zone.rsplit("-", 1)[0],
        "topology.kubernetes.io/zone": zone,
    }
    if plan.machine.tpus:
        labels[TPU_LABEL] = plan.machine.accelerator
        labels[TPU_TOPOLOGY_LABEL] = plan.machine.topology
    elif plan.machine.accelerator:
        labels[ACCELERATOR_LABEL] = plan.machine.accelerator
        labels["cloud.google.com/gke-accelerator-count"] = str(plan.machine.gpus)
    return labels | ({COMPUTE_CLASS_LABEL: plan.compute_class} if plan.compute_class else {})


def _size(machine: Machine) -> tuple[int, int]:
    return machine.gpus + machine.tpus, machine.cpu


def gpus_of(node: dict[str, Any]) -> int:
    return int(node["status"].get("capacity", {}).get(GPU_RESOURCE, 0))


def requests_of(pod: dict[str, Any]) -> dict[str, Decimal]:
    """What a pod asks of a node; init containers run one after the other before the others."""
    spec = pod["spec"]
    total = _sum(each["resources"].get("requests") or {} for each in spec["containers"])
    for container in spec.get("initContainers", []):
        for name, value in (container["resources"].get("requests") or {}).items():
            total[name] = max(total.get(name, Decimal(0)), parse(value))
    return total | {"pods": Decimal(1)}


def _sum(requests: Iterable[dict[str, str]]) -> dict[str, Decimal]:
    total: dict[str, Decimal] = {}
    for each in requests:
        for name, value in each.items():
            total[name] = total.get(name, Decimal(0)) + parse(value)
    return total


def lacking(requests: dict[str, Decimal], free: dict[str, Any]) -> list[str]:
    """The names of the resources of which there is not enough, in the scheduler's order."""
    return [name for name, value in sorted(requests.items()) if value > parse(free.get(name, "0"))]
