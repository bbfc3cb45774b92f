"""What the records of a target say: which commit serves where and since when, what came before, what nobody cleaned up.

Pure. The records are in the target's bucket (`rollout.clients.records`), oldest first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from rollout.delivery import DeliveryReport, Outcome
from rollout.diff import ObjectDiff
from rollout.objects import INSTANCE_LABEL, MODEL_ANNOTATION, ROLLOUT_LABEL
from rollout.optimize import ValidatedWith
from rollout.plan import LiveVersion, RolloutPlan
from rollout.policy import Teardown
from rollout.profiles import image_version
from rollout.record import RolloutReport, Verdict
from rollout.report import Action, StepStatus
from rollout.values import Value

EXPIRY_ANNOTATION = "llm-rollout.dev/expires-at"
"""ISO 8601 time on a Deployment of ours, after which the janitor tears its model server down."""

APPLY_STEP = "apply manifests"
UNDO_STEP = "undo update"
CHANGED_BY_HAND = "Somebody changed it by hand: roll out again to put it back, or roll out what should be there."

_REVISION = re.compile(r"-[0-9a-f]{8}")


class Serving(Value):
    """A model server that the records say is live."""

    instance: str
    """Name of the Deployment."""
    repo_id: str
    commit_sha: str
    image: str
    rollout_id: str
    since: datetime
    """Start of the first rollout that applied exactly this, without another in between."""
    evidence: Verdict
    """How the newest rollout of it ended: `done` means that it held its objectives."""
    run_id: str
    run_url: str | None = None

    @property
    def model(self) -> str:
        return f"{self.repo_id}@{self.commit_sha}"


class Drift(Value):
    """A difference between the records and the cluster."""

    instance: str
    recorded: str
    live: str
    what_to_do: str


class Leftover(StrEnum):
    """Why the janitor may remove a model server."""

    UNFINISHED_TEARDOWN = "its teardown did not finish"
    DEAD_TRIAL = "its rollout died before the teardown that its policy asks for"
    EXPIRED = "it is past its expiry"


class Abandoned(Value):
    """A model server that nobody needs any more, by the word of its record or of its annotation."""

    instance: str
    why: Leftover
    run_id: str | None = None


def applied(report: RolloutReport) -> bool:
    """Whether the rollout changed, or confirmed, what is served."""
    reached = {step.name for step in report.steps if step.status in (StepStatus.DONE, StepStatus.UNCHANGED)}
    return report.plan is not None and APPLY_STEP in reached


def serving_now(records: Iterable[RolloutReport]) -> dict[str, Serving]:
    """Live model servers by instance. A rollout that was rolled back leaves what served before it."""
    live: dict[str, Serving] = {}
    for report in in_order(records):
        for instance in _torn_down(report, live):
            del live[instance]
        if report.plan is not None and applied(report) and not _ended_without_trace(report):
            instance = report.plan.serving.name
            live[instance] = _serving(report, report.plan, live.get(instance))
    return live


def last_applied(records: Iterable[RolloutReport], instance: str) -> RolloutReport | None:
    """The newest record of a rollout that `instance` may serve from; None if the records know of none."""
    found: RolloutReport | None = None
    for report in in_order(records):
        if _torn_down(report, [instance]):
            found = None
        if report.plan is not None and report.plan.serving.name == instance:
            found = report if applied(report) and not _ended_without_trace(report) else found
    return found


def validated_with(
    records: Iterable[RolloutReport], model: str, server_version: str, accelerator: str
) -> ValidatedWith:
    """The versions of cluster, nodes and driver on which the newest good run of the same model server started."""
    wanted = (model, server_version.removeprefix("v"), accelerator)
    for report in reversed(in_order(records)):
        if report.verdict is Verdict.DONE and report.ran_on.cluster_version and _served(report) == wanted:
            return report.ran_on
    return ValidatedWith()


def _served(report: RolloutReport) -> tuple[str, str, str] | None:
    """Repository, version of the server, and accelerator."""
    if report.plan is not None:
        repo_id, serving = report.plan.model.repo_id, report.plan.serving
    elif report.generated is not None:
        repo_id, serving = report.generated.request.model, report.generated.serving
    else:
        return None
    return repo_id, image_version(serving.image).removeprefix("v"), serving.accelerator.type


def standing(records: Iterable[RolloutReport], instance: str) -> LiveVersion | None:
    """What serves as `instance` and stays by the policy of the rollout that brought it; None if there is nothing such.

    What a trial, or a failed rollout that owes its teardown, left behind is not standing. Where the newest version
    never answered, it is the last one that did: what a failure goes back to.
    """
    found: RolloutReport | None = None
    for report in in_order(records):
        if _torn_down(report, [instance]):
            found = None
        elif report.plan is not None and report.plan.serving.name == instance:
            stays = applied(report) and not _ended_without_trace(report) and _reason(report) is None
            if stays and (found is None or _has_answered(report) or not _has_answered(found)):
                found = report
    if found is None or found.plan is None:
        return None
    return LiveVersion(
        model=f"{found.plan.model.repo_id}@{found.plan.model.commit_sha}",
        rollout_id=found.plan.rollout_id,
        run_id=found.run_id,
        answered=_has_answered(found),
    )


def _has_answered(report: RolloutReport) -> bool:
    return report.verdict in (Verdict.DONE, Verdict.OBJECTIVES_MISSED)


def proven_revision(records: Iterable[RolloutReport], instance: str, live: str, there: Collection[str]) -> str:
    """The revision that counts as live when the cluster says `live` and has the revisions `there`.

    Another than `live` if the delivery that gave it the traffic never ended: it died within its rollback window, and
    what served before still stands.
    """
    newest: DeliveryReport | None = None
    for report in in_order(records):
        if report.plan is not None and report.plan.serving.name == instance and report.delivery is not None:
            newest = report.delivery
    if newest is None or not newest.is_beside_live or newest.revision != live:
        return live
    before = newest.live_before
    return before if before is not None and before in there else live


def half_done(
    records: Iterable[RolloutReport],
    alive: Iterable[str],
    now: datetime,
    *,
    grace: timedelta = timedelta(minutes=10),
) -> tuple[RolloutReport, ...]:
    """Rollouts that died over or beside a live version, with nobody left to lead the traffic back to it.

    Only the newest rollout of an instance: a later one has finished what an earlier one began, or will.
    """
    busy = set(alive)
    newest = {report.plan.serving.name: report for report in in_order(records) if report.plan is not None}
    return tuple(
        report
        for report in newest.values()
        if report.verdict is Verdict.RUNNING
        and report.run_id not in busy
        and now - _ended_at(report) >= grace
        and report.plan is not None
        and stands_over(report.plan)
    )


def stands_over(plan: RolloutPlan) -> bool:
    """Whether another version serves, or served, where `plan` goes, and is worth going back to."""
    before = plan.live_before
    return before is not None and before.answered and before.rollout_id != plan.rollout_id


def still_owned(records: Iterable[RolloutReport]) -> frozenset[tuple[str, str]]:
    """(kind, name) of what rollouts created and nobody of ours removed since: what a teardown may remove.

    A teardown settles what earlier runs made, also those that were killed, and so does a step that removes what its
    plan no longer holds. What a teardown kept stays in the ledger: another model uses it, or the policy keeps it.
    """
    made: dict[tuple[str, str], datetime] = {}
    gone: dict[tuple[str, str], datetime] = {}
    for report in records:
        for thing in report.created:
            made[thing] = max(report.started_at, made.get(thing, report.started_at))
        for thing, removed_at in _removals(report):
            gone[thing] = max(removed_at, gone.get(thing, removed_at))
    return frozenset(thing for thing, made_at in made.items() if thing not in gone or made_at > gone[thing])


def _removals(report: RolloutReport) -> Iterator[tuple[tuple[str, str], datetime]]:
    for step in report.steps:
        for change in step.changes:
            if change.action is Action.DELETED:
                yield (change.kind, change.name), step.started_at
    # A teardown may continue an old record: what counts is when it ended.
    for change in report.teardown.removed if report.teardown else ():
        yield (change.kind, change.name), _ended_at(report)


def _ended_at(report: RolloutReport) -> datetime:
    """When the record was last written."""
    return report.started_at + timedelta(seconds=report.duration_s)


def drift(live: Mapping[str, Serving], manifests: Iterable[Mapping[str, Any]]) -> tuple[Drift, ...]:
    """Where records and cluster disagree: other weights, another rollout, a server that is missing or unknown."""
    deployments = _by_instance(manifests)
    found: list[Drift] = []
    for instance in sorted(live.keys() | deployments.keys()):
        recorded = live.get(instance)
        if instance not in deployments:
            assert recorded is not None
            advice = "Roll it out again, or tear it down, so that the records know."
            found.append(Drift(instance=instance, recorded=recorded.model, live="nothing", what_to_do=advice))
            continue
        # Several revisions stand side by side while the old one is kept warm: one of them must be the recorded one.
        differences = [_difference(instance, recorded, manifest) for manifest in deployments[instance]]
        found += next((difference for difference in differences if not difference), differences[0])
    return tuple(found)


def object_drift(instance: str, diffs: Iterable[ObjectDiff]) -> tuple[Drift, ...]:
    """The differences of single objects: `diffs` are what it would take to have them as they were rolled out."""
    found: list[Drift] = []
    for diff in diffs:
        where = f"{diff.kind} {diff.name}"
        if diff.action is Action.CREATED:
            found.append(Drift(instance=instance, recorded=where, live="nothing", what_to_do=CHANGED_BY_HAND))
        found += [
            Drift(
                instance=instance,
                recorded=f"{where} {field.path}: {field.after or 'absent'}",
                live=field.before or "absent",
                what_to_do=CHANGED_BY_HAND,
            )
            for field in diff.fields
        ]
    return tuple(found)


def abandoned(
    records: Iterable[RolloutReport],
    manifests: Iterable[Mapping[str, Any]],
    alive: Iterable[str],
    now: datetime,
    *,
    grace: timedelta = timedelta(minutes=10),
) -> tuple[Abandoned, ...]:
    """Model servers that should have been torn down and were not, each once.

    `alive` are ids of flow runs that may still do it themselves. Records younger than `grace` are left alone: a run
    that ends at this moment may be in between. Only what a policy or an annotation asks for is named, never a server
    that merely looks unused.
    """
    busy = set(alive)
    newest: dict[str, RolloutReport] = {}
    for report in in_order(records):
        for instance in _torn_down(report, newest):
            del newest[instance]
        if report.plan is not None:
            newest[report.plan.serving.name] = report
    found: dict[str, Abandoned] = {}
    for instance, report in newest.items():
        why = _reason(report) or _expiry(report, now)
        if why is not None and report.run_id not in busy and now - _ended_at(report) >= grace:
            found[instance] = Abandoned(instance=instance, why=why, run_id=report.run_id)
    for instance, revisions in _by_instance(manifests).items():
        expiries = [(manifest["metadata"].get("annotations") or {}).get(EXPIRY_ANNOTATION) for manifest in revisions]
        if all(expiry is not None and _is_past(expiry, now) for expiry in expiries):
            # The record of its rollout, if there is one, must know that it no longer serves.
            run_id = newest[instance].run_id if instance in newest else None
            found.setdefault(instance, Abandoned(instance=instance, why=Leftover.EXPIRED, run_id=run_id))
    return tuple(found[instance] for instance in sorted(found))


def in_order(records: Iterable[RolloutReport]) -> Sequence[RolloutReport]:
    return sorted(records, key=lambda report: report.started_at)


def _serving(report: RolloutReport, plan: RolloutPlan, before: Serving | None) -> Serving:
    same = before is not None and before.rollout_id == plan.rollout_id
    return Serving(
        instance=plan.serving.name,
        repo_id=plan.model.repo_id,
        commit_sha=plan.model.commit_sha,
        image=plan.serving.image,
        rollout_id=plan.rollout_id,
        since=before.since if same and before else report.started_at,
        evidence=report.verdict,
        run_id=report.run_id,
        run_url=report.run_url,
    )


def _torn_down(report: RolloutReport, instances: Iterable[str]) -> list[str]:
    """Those of `instances` whose Deployment, or a revision of it (`NAME-8f14e45f`), a teardown removed."""
    removed = report.teardown.removed if report.teardown else ()
    names = {change.name.rpartition("/")[2] for change in removed if change.kind == "Deployment"}
    return [i for i in instances if any(n == i or _REVISION.fullmatch(n.removeprefix(i)) for n in names)]


def _by_instance(manifests: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Deployments by the model server that they are a revision of."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            labels = manifest["metadata"].get("labels") or {}
            found.setdefault(labels.get(INSTANCE_LABEL, manifest["metadata"]["name"]), []).append(manifest)
    return found


def _ended_without_trace(report: RolloutReport) -> bool:
    return _live_version_stayed(report) or report.teardown is not None


def _live_version_stayed(report: RolloutReport) -> bool:
    """Whether what served before still does: rolled back, also on a cancellation, or stopped beside it."""
    delivery = report.delivery
    went_back = delivery is not None and (delivery.outcome is Outcome.ROLLED_BACK or delivery.is_beside_live)
    undone = any(step.name == UNDO_STEP and step.status is StepStatus.DONE for step in report.steps)
    return went_back or undone or report.verdict is Verdict.ROLLED_BACK


def _reason(report: RolloutReport) -> Leftover | None:
    """Why the server of this record, the newest of its instance, should be gone."""
    if report.teardown is not None:
        return Leftover.UNFINISHED_TEARDOWN if report.teardown.left else None
    assert report.plan is not None, "only records with a plan have an instance"
    if _live_version_stayed(report) or report.plan.live_before is not None:
        return None  # what serves, or served, is not this rollout's to remove
    policy = report.plan.policy.teardown
    failed = report.verdict in (Verdict.RUNNING, Verdict.FAILED, Verdict.OBJECTIVES_MISSED)
    dead = policy is Teardown.ALWAYS or (policy is Teardown.ON_FAILURE and failed)
    return Leftover.DEAD_TRIAL if dead and report.verdict is not Verdict.NOT_APPROVED else None


def _expiry(report: RolloutReport, now: datetime) -> Leftover | None:
    """Whether the policy of the newest rollout says that its server's time is over."""
    plan = report.plan
    if plan is None or plan.policy.expires_after_s is None or plan.live_before is not None or not applied(report):
        return None
    over = report.teardown is None and now > report.started_at + timedelta(seconds=plan.policy.expires_after_s)
    return Leftover.EXPIRED if over else None


def _is_past(expiry: str, now: datetime) -> bool:
    """An unreadable time, or one without a zone, is not past: the janitor removes nothing on a guess."""
    try:
        moment = datetime.fromisoformat(expiry)
    except ValueError:
        return False
    return moment.tzinfo is not None and moment <= now


def _difference(instance: str, recorded: Serving | None, manifest: Mapping[str, Any]) -> list[Drift]:
    template = (manifest.get("spec") or {}).get("template") or {}
    annotations = (template.get("metadata") or {}).get("annotations") or {}
    annotations = {**annotations, **(manifest["metadata"].get("annotations") or {})}
    labels = manifest["metadata"].get("labels") or {}
    live = annotations.get(MODEL_ANNOTATION, "unknown weights")
    if recorded is None:
        advice = "Roll out again: the rollout adopts or replaces it, and the records know."
        return [Drift(instance=instance, recorded="nothing", live=live, what_to_do=advice)]
    if live != recorded.model:
        advice = "Somebody changed it by hand, or rolled it back: roll out what should serve."
        return [Drift(instance=instance, recorded=recorded.model, live=live, what_to_do=advice)]
    if labels.get(ROLLOUT_LABEL) not in (None, recorded.rollout_id):
        advice = "Its settings come from another rollout than the records know of: compare with `llm-rollout plan`."
        rollouts = (f"rollout {recorded.rollout_id}", f"rollout {labels[ROLLOUT_LABEL]}")
        return [Drift(instance=instance, recorded=rollouts[0], live=rollouts[1], what_to_do=advice)]
    return []
