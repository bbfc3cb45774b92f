"""Hold the GPU node while the last of the weights travel, and let go of it when the model server comes."""

from __future__ import annotations

import time

from rollout.clients.cluster import ClusterClient
from rollout.plan import RolloutPlan
from rollout.report import Action, StepStatus
from rollout.warm_up import hold_s, is_due, warm_up_job, warm_up_objects
from tasks.step import Outcome, step
from tasks.weights import seconds_left, transfer_ended

_LOOK_EVERY_S = 0.5


@step("warm up node")
def warm_up_node(plan: RolloutPlan) -> Outcome[bool]:
    """Wait until it is time, then let a Job ask for the node. Hands on whether there is such a Job."""
    while True:
        if transfer_ended(plan.weights_uri):
            return Outcome(value=False, summary="the transfer ended before a node was due", status=StepStatus.SKIPPED)
        if is_due(plan, seconds_left(plan.weights_uri)):
            break
        time.sleep(_LOOK_EVERY_S)
    left_s = seconds_left(plan.weights_uri)
    changes = ClusterClient.connect(plan.target).apply(warm_up_objects(plan))
    rest = "" if left_s is None else f", {left_s:.0f} s before the end of the transfer"
    return Outcome(
        value=True,
        summary=f"a node is asked for{rest}; held for {hold_s(plan):.0f} s at most",
        changes=changes,
        data={"transfer_seconds_left": left_s},
    )


@step("release node")
def release_node(plan: RolloutPlan) -> Outcome[None]:
    """Give the GPU to the model server: the Job goes, the node stays for the minutes that GKE keeps an empty one."""
    changes = ClusterClient.connect(plan.target).delete([warm_up_job(plan)])
    released = any(change.action is Action.DELETED for change in changes)
    return Outcome(
        value=None,
        summary="the model server may have the node" if released else "nothing held it",
        status=StepStatus.DONE if released else StepStatus.UNCHANGED,
        changes=changes,
    )
