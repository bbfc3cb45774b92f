"""The scheduler and the cluster autoscaler: a node for every pod, or the words of why there is none."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from sandbox.cluster.controllers import Controller, Object, key_of
from sandbox.cluster.events import NORMAL, WARNING, Recorder
from sandbox.cluster.nodes import COMPUTE_CLASS_LABEL, NodePlan, NodePool, Refusal, lacking, requests_of
from sandbox.cluster.quantity import parse
from sandbox.cluster.registry import Deletion, Registry, Writer
from sandbox.cluster.resources import COMPUTE_CLASS, NODE, POD
from sandbox.cluster.selectors import is_subset
from sandbox.cluster.store import Change, Key, seconds_since, timestamp

SCHEDULER = "kube-scheduler"
AUTOSCALER = "cluster-autoscaler"
RETRY_S = 1.0
"""An autoscaler that was refused looks again; GKE takes minutes, and a rehearsal has less time."""


class Scheduler(Controller):
    """Binds pods to nodes, and asks for a node where none fits."""

    def __init__(self, registry: Registry, recorder: Recorder, pool: NodePool) -> None:
        super().__init__(registry, recorder)
        self._pool = pool
        self._coming: dict[str, NodePlan] = {}
        """Nodes under way, by the uid of the pod that asked."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == POD and change.type != "DELETED":
            return [] if change.obj["spec"].get("nodeName") else [key_of(change.obj)]
        if change.resource in (NODE, COMPUTE_CLASS) or (change.resource == POD and change.type == "DELETED"):
            return [key_of(pod) for pod in self.store.find(POD) if not pod["spec"].get("nodeName")]
        return []

    def reconcile(self, key: Key) -> float | None:
        pod = self.store.get(POD, *key)
        if pod is None or pod["spec"].get("nodeName") or "deletionTimestamp" in pod["metadata"]:
            return None
        reasons: Counter[str] = Counter()
        for node in self.store.find(NODE):
            why = self._misfit(pod, node)
            if not why:
                self._bind(pod, node["metadata"]["name"])
                return None
            reasons.update(why)
        self._report_unschedulable(pod, reasons)
        return self._ask_for_node(pod)

    def _misfit(self, pod: Object, node: Object) -> list[str]:
        """Why a pod does not go onto a node, in the scheduler's words; empty when it does."""
        if node["spec"].get("unschedulable"):
            return ["node(s) were unschedulable"]
        if not is_subset(pod["spec"].get("nodeSelector") or {}, node["metadata"].get("labels") or {}):
            return ["node(s) didn't match Pod's node affinity/selector"]
        for taint in node["spec"].get("taints") or []:
            if taint["effect"] != "PreferNoSchedule" and not _tolerated(taint, pod):
                return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
        free = self._free(node)
        return [f"Insufficient {name}" for name in lacking(requests_of(pod), free)]

    def _free(self, node: Object) -> dict[str, Decimal]:
        free = {name: parse(value) for name, value in node["status"]["allocatable"].items()}
        for pod in self.store.find(POD):
            done = pod["status"].get("phase") in ("Succeeded", "Failed")
            if pod["spec"].get("nodeName") == node["metadata"]["name"] and not done:
                for name, value in requests_of(pod).items():
                    free[name] = free.get(name, Decimal(0)) - value
        return free

    def _bind(self, pod: Object, node: str) -> None:
        changed = copy.deepcopy(pod)
        changed["spec"]["nodeName"] = node
        scheduled = {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": timestamp()}
        changed["status"]["conditions"] = [scheduled]
        self.store.commit(POD, changed)
        message = f"Successfully assigned {pod['metadata']['namespace']}/{pod['metadata']['name']} to {node}"
        self.recorder.schedule(POD, pod, NORMAL, "Scheduled", message, action="Binding")

    def _report_unschedulable(self, pod: Object, reasons: Counter[str]) -> None:
        message = _unschedulable_message(len(self.store.find(NODE)), reasons)
        conditions = pod["status"].get("conditions") or []
        if any(each.get("message") == message for each in conditions):
            return
        failed = {
            "type": "PodScheduled",
            "observedGeneration": pod["metadata"]["generation"],
            "status": "False",
            "lastProbeTime": None,
            "lastTransitionTime": timestamp(),
            "reason": "Unschedulable",
            "message": message,
        }
        status = pod["status"] | {"conditions": [failed]}
        self.registry.write_status(POD, pod, pod | {"status": status}, SCHEDULER)
        self.recorder.schedule(POD, pod, WARNING, "FailedScheduling", message, action="Scheduling")

    def _ask_for_node(self, pod: Object) -> float | None:
        uid = pod["metadata"]["uid"]
        if uid in self._coming:
            return None
        plan = self._pool.plan_for(pod)
        if isinstance(plan, NodePlan):
            if self._will_share(pod, plan):
                return None
            refusal = self._pool.refuse_by_limits(plan)
            if refusal is None:
                self._scale_up(pod, plan)
                return None
            plan = refusal
        self._tell_refusal(pod, plan)
        return RETRY_S

    def _will_share(self, pod: Object, plan: NodePlan) -> bool:
        """A node under way that has room for this pod too: several small pods share a node of eight GPUs."""
        same = [uid for uid, coming in self._coming.items() if coming == plan]
        if not same:
            return False
        pending = [each for each in self.store.find(POD) if each["metadata"]["uid"] in same]
        free = {name: parse(value) for name, value in self._pool.allocatable(plan.machine).items()}
        for each in pending:
            for name, value in requests_of(each).items():
                free[name] = free.get(name, Decimal(0)) - value
        return not lacking(requests_of(pod), free)

    def _tell_refusal(self, pod: Object, refusal: Refusal) -> None:
        kind = NORMAL if refusal.reason == "NotTriggerScaleUp" else WARNING
        self.recorder.record(POD, pod, kind, refusal.reason, refusal.message, component=AUTOSCALER)

    def _scale_up(self, pod: Object, plan: NodePlan) -> None:
        message = f"pod triggered scale-up: [{{{self._pool.group_url(plan)} 0->1 (max: 1000)}}]"
        self.recorder.record(POD, pod, NORMAL, "TriggeredScaleUp", message, component=AUTOSCALER)
        self._coming[pod["metadata"]["uid"]] = plan
        delay_s = self._pool.settings.creation_s
        asyncio.get_running_loop().call_later(delay_s, self._deliver, pod["metadata"]["uid"], plan)

    def _deliver(self, uid: str, plan: NodePlan) -> None:
        self._coming.pop(uid, None)
        node = self.registry.create(NODE, self._pool.create(plan), "", Writer(AUTOSCALER))
        self.recorder.record(
            NODE,
            node,
            NORMAL,
            "NodeReady",
            f"Node {node['metadata']['name']} status is now: NodeReady",
            component="kubelet",
        )


class NodeRemover(Controller):
    """Takes away nodes that have been empty for a while, as the autoscaler does."""

    def __init__(self, registry: Registry, recorder: Recorder, pool: NodePool) -> None:
        super().__init__(registry, recorder)
        self._pool = pool
        self._empty_since: dict[str, str] = {}

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == NODE and change.type != "DELETED":
            return [key_of(change.obj)]
        node = change.obj["spec"].get("nodeName") if change.resource == POD else None
        return [("", node)] if node else []

    def reconcile(self, key: Key) -> float | None:
        name, delay_s = key[1], self._pool.settings.removal_s
        node = self.store.get(NODE, "", name)
        made_here = node is not None and name.startswith("gk3-nap-")
        used = any(pod["spec"].get("nodeName") == name for pod in self.store.find(POD))
        if node is None or used or delay_s is None or not made_here:
            self._empty_since.pop(name, None)
            return None
        left_s: float = delay_s - seconds_since(self._empty_since.setdefault(name, timestamp()))
        if left_s > 0:
            return left_s
        self.recorder.record(
            NODE, node, NORMAL, "ScaleDown", "node removed by cluster autoscaler", component=AUTOSCALER
        )
        self.registry.delete(NODE, node, Deletion())
        return None


def _tolerated(taint: dict[str, Any], pod: Object) -> bool:
    if taint["key"] == COMPUTE_CLASS_LABEL:
        # GKE adds this toleration to pods that select the class.
        return bool((pod["spec"].get("nodeSelector") or {}).get(COMPUTE_CLASS_LABEL) == taint["value"])
    for each in pod["spec"].get("tolerations") or []:
        fits_key = each.get("key") in (None, taint["key"])
        fits_value = each.get("operator") == "Exists" or each.get("value", "") == taint.get("value", "")
        if fits_key and fits_value and each.get("effect") in (None, "", taint["effect"]):
            return True
    return False


def _unschedulable_message(nodes: int, reasons: Counter[str]) -> str:
    if nodes == 0:
        return "no nodes available to schedule pods"
    listed = ", ".join(sorted(f"{count} {reason}" for reason, count in reasons.items()))
    # Only a lack of resources could be cured by taking them from other pods.
    hopeless = not any(reason.startswith("Insufficient") for reason in reasons)
    cure = "Preemption is not helpful for scheduling" if hopeless else "No preemption victims found for incoming pod"
    head = f"0/{nodes} nodes are available"
    return f"{head}: {listed}. no new claims to deallocate, preemption: {head}: {nodes} {cure}."
