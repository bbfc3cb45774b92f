"""Start the GPU node while the last of the weights travel: when, and with which objects.

A node takes minutes to come, and costs from its first one. `cheap` starts it when the rest of the transfer, at the
rate that is measured, takes as long as the node and its image; `fast` starts it with the transfer.
"""

from __future__ import annotations

from rollout.objects import ownership_labels
from rollout.plan import RolloutPlan
from rollout.policy import WarmUp
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.report import Action
from rollout.target import ClusterMode

_NEEDED_KINDS = ("Namespace", "ComputeClass")
"""What must exist for a pod to get such a node; the rollout applies them anyway."""


def why_not(plan: RolloutPlan) -> str:
    """Why there is nothing to warm up; empty when there is."""
    if plan.policy.warm_up is WarmUp.OFF:
        return "not asked for by the policy"
    if plan.target.cluster.mode is ClusterMode.KUBECONFIG:
        return "a kubeconfig cluster has its nodes already"
    if not plan.transfer_bytes:
        return "the weights are there: nothing to wait for"
    deployments = [change for change in plan.changes if change.kind == "Deployment"]
    if any(change.action is not Action.CREATED for change in deployments):
        return "the Deployment is there, and so is its node"
    return ""


def is_due(plan: RolloutPlan, seconds_left: float | None) -> bool:
    """Whether to start the node now; `seconds_left` of the transfer, None before its rate is known."""
    if plan.policy.warm_up is WarmUp.FAST:
        return True
    return seconds_left is not None and seconds_left <= plan.policy.warm_up_lead_s


def hold_s(plan: RolloutPlan) -> float:
    """How long the node may be held: twice the lead when it starts just in time, else as long as the transfer may."""
    if plan.policy.warm_up is WarmUp.FAST:
        return plan.deadlines_s["weights"]
    return 2 * plan.policy.warm_up_lead_s


def warm_up_objects(plan: RolloutPlan) -> tuple[KubernetesObject, ...]:
    """The Job that holds the node, after what it needs to get one."""
    needed = [manifest for manifest in plan.objects if manifest["kind"] in _NEEDED_KINDS]
    return (*needed, warm_up_job(plan))


def warm_up_job(plan: RolloutPlan) -> KubernetesObject:
    """The Job alone: what goes again before the model server comes."""
    deployment = next(manifest for manifest in plan.objects if manifest["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    values = {
        "job_name": f"{plan.serving.name[:54]}-warm-up",  # 63 characters in all
        "namespace": plan.target.namespace,
        "labels": ownership_labels(plan.rollout_id, instance=plan.serving.name),
        "deadline_s": int(hold_s(plan)),
        "image": container["image"],
        "resources": container["resources"]["requests"],
        "node_selector": pod["nodeSelector"],
    }
    return render(read_manifests(["warm-up-job.yaml"]), values)[0]
