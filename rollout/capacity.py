"""Room for GPU pods: on nodes that are there, and on nodes that the quota and the node pool still allow.

Quota is counted in whole machines: one replica with one GPU on an `a3-edgegpu-8g-nolssd` takes eight GPUs of it.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from rollout.accelerators import accelerator
from rollout.delivery import DeliveryStrategy, surge_gpus
from rollout.plan import RolloutPlan
from rollout.preflight import Check, failed, not_applicable, ok, unknown, warning
from rollout.report import Action
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, Target
from rollout.values import Value

SURGE = "surge capacity"
_ROLLING = "deliver with `kind: rolling`, which needs one pod more"
_RECREATE = "set `strategy: recreate` (the old pod goes first; nothing answers in between)"


class GpuRoom(Value):
    """What is free for pods of one serving spec."""

    gpus_per_node: Annotated[int, Field(ge=1)]
    idle_gpus: Annotated[int, Field(ge=0)] = 0
    """On nodes that exist, requested by no pod."""
    free_quota: float | None
    """GPUs of the region's quota that nothing uses; None when it could not be read."""
    more_nodes: Annotated[int, Field(ge=0)] | None = None
    """How far the node pool may still grow; None without such a limit."""

    def new_nodes(self, replicas: int, gpus: int) -> int:
        """Machines that `replicas` more pods of `gpus` GPUs each need beyond the existing ones."""
        missing = max(0, replicas - self.idle_gpus // gpus)
        return math.ceil(missing / max(1, self.gpus_per_node // gpus))

    def why_not(self, replicas: int, gpus: int) -> str:
        """What stops `replicas` more pods; empty when they fit, or when the quota is unknown and nothing else does."""
        nodes = self.new_nodes(replicas, gpus)
        needed = nodes * self.gpus_per_node
        if self.more_nodes is not None and nodes > self.more_nodes:
            return f"{nodes} more nodes, and the node pool may grow by {self.more_nodes}"
        if self.free_quota is not None and needed > self.free_quota:
            return f"{needed} more GPUs (nodes of {self.gpus_per_node}), and the quota has {self.free_quota:.0f} left"
        return ""


def gpus_per_node(serving: ServingSpec, target: Target) -> int:
    """GPUs of the machines that will hold the pods: the node pool's, the ComputeClass's, else the usual machine's."""
    pool = target.cluster.node_pool
    if target.cluster.mode is ClusterMode.STANDARD and pool is not None:
        return pool.accelerator_count
    if serving.accelerator.compute_class is not None:
        return serving.accelerator.machine_gpu_count
    return accelerator(serving.accelerator.type).machine_for(serving.accelerator.count).accelerators


def gpus_at_once(plan: RolloutPlan) -> int:
    """GPUs that the pods of `plan` hold at the widest point of its delivery: its replicas and what stands beside them.

    A Deployment that an update in place makes, or leaves as it is, has no pods to replace. Of a delivery by revisions
    the plan does not know whether something is live, so both versions count.
    """
    strategy, serving = plan.policy.delivery, plan.serving
    updates = any(change.kind == "Deployment" and change.action is Action.UPDATED for change in plan.changes)
    surge = surge_gpus(strategy, serving) if strategy.by_revisions or updates else 0
    return serving.replicas * serving.accelerator.count + surge


def check_surge(
    serving: ServingSpec, strategy: DeliveryStrategy, room: GpuRoom, *, running: int, replaces_pods: bool
) -> Check:
    """Whether the pods of the new version fit beside those of the live one, as the delivery needs it.

    Without that an update waits for ever: the new pod for a GPU, and the old one for the new one. That stops a rollout
    which replaces pods; a first one is only warned of the next. `running` pods of exactly the planned Deployment are
    there already.
    """
    if not surge_gpus(strategy, serving):
        return not_applicable(SURGE, "strategy recreate: the old pod goes before the new one comes")
    gpus = serving.accelerator.count
    beside = surge_gpus(strategy, serving) // gpus
    missing = max(0, serving.replicas - running)
    first = missing + beside  # what the next delivery will need is worth a warning
    again = missing if strategy.by_revisions else beside
    planned = again if replaces_pods else first
    name = strategy.kind.value.replace("_", "/") + (" delivery" if strategy.by_revisions else " update")
    cure = _ROLLING if strategy.by_revisions else _RECREATE
    blocked = room.why_not(planned, gpus)
    if not blocked and room.free_quota is None and room.new_nodes(planned, gpus):
        return unknown(SURGE, f"a {name} needs a new node, and the quota could not be read", cure)
    pods = "one pod" if beside == 1 else f"{beside} pods"
    if not blocked:
        return ok(SURGE, f"a {name} finds room for {pods} more")
    why = f"a {name} starts {pods} beside the others: it would need {blocked}"
    resolution = f"Raise the quota or the node pool's max_nodes, or {cure}."
    return (
        failed(SURGE, why, resolution)
        if replaces_pods
        else warning(SURGE, f"the first start fits, but {why}", resolution)
    )
