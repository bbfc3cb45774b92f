"""Where the records of a target and its cluster disagree, down to single fields. Only reads."""

from __future__ import annotations

from rollout.clients.cluster import ClusterClient
from rollout.clients.records import RecordStore
from rollout.errors import FieldConflict, ManifestRejected, NotFound
from rollout.ledger import CHANGED_BY_HAND, Drift, Serving, drift, last_applied, object_drift, serving_now
from rollout.target import Target


def status_of(target: Target) -> tuple[tuple[Serving, ...], tuple[Drift, ...]]:
    """What serves by the records, and every difference to what is live.

    The objects of the newest rollout go through the server's dry run: what it would change, somebody else has changed.
    """
    records = list(RecordStore(target).read_all())
    live = serving_now(records)
    try:
        cluster = ClusterClient.connect(target)
        manifests = cluster.inventory()
    except NotFound:
        return tuple(live.values()), drift(live, ())
    found = drift(live, manifests)
    for instance in live.keys() - {each.instance for each in found}:
        report = last_applied(records, instance)
        if report is None or report.plan is None:
            continue
        try:
            found += object_drift(instance, cluster.preview(report.plan.objects).diffs)
        except (FieldConflict, ManifestRejected) as refusal:
            found += (Drift(instance=instance, recorded="as planned", live=str(refusal), what_to_do=CHANGED_BY_HAND),)
    return tuple(live.values()), found
