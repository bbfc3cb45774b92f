"""Back to what served before: the part of a failed rollout that no client may notice."""

from __future__ import annotations

from rollout.clients.cluster import ClusterClient
from rollout.clients.records import RecordStore
from rollout.clients.traffic import TrafficClient
from rollout.errors import NotFound
from rollout.ledger import stands_over
from rollout.objects import ROLLOUT_LABEL
from rollout.plan import RolloutPlan
from rollout.record import RolloutReport
from rollout.report import Action, Change
from rollout.values import Value


class Restored(Value):
    """What serves again."""

    plan: RolloutPlan
    """The earlier one; where no record holds it, the failed one with the Deployment's earlier pods."""
    changes: tuple[Change, ...]

    @property
    def changed_anything(self) -> bool:
        return any(change.action is not Action.UNCHANGED for change in self.changes)


def restore_before(plan: RolloutPlan) -> Restored:
    """Give an in-place Deployment back what served before `plan`.

    From the record of that rollout: its whole set of objects, exactly as it was. Without a record, from the pod
    template that Kubernetes keeps. Raises NotFound if there is neither.
    """
    cluster = ClusterClient.connect(plan.target)
    record = RecordStore(plan.target).find(plan.live_before.run_id) if plan.live_before else None
    if record is None or record.plan is None:
        return Restored(plan=plan, changes=(cluster.rollback(plan.serving.name),))
    before = record.plan.model_copy(update={"target": plan.target})
    changes = cluster.apply(before.objects) + cluster.prune(before.objects, before.serving.name)
    return Restored(plan=before, changes=changes)


def take_back(record: RolloutReport) -> tuple[Change, ...]:
    """Undo the half-done rollout of a dead run over or beside a live version; nothing where there is nothing to undo.

    Asks the cluster first: a later rollout may have finished what this one began.
    """
    plan = record.plan
    if plan is None:
        return ()
    cluster = ClusterClient.connect(plan.target)
    if plan.policy.delivery.by_revisions:
        return TrafficClient(cluster, plan).undo(record.delivery) if record.delivery else ()
    deployment = next(item for item in plan.objects if item["kind"] == "Deployment")
    live = cluster.find(deployment)
    is_this_one = live is not None and (live["metadata"].get("labels") or {}).get(ROLLOUT_LABEL) == plan.rollout_id
    if not (is_this_one and stands_over(plan)):
        return ()
    try:
        return restore_before(plan).changes
    except NotFound:
        return ()  # somebody took away what there was to go back to
