"""Find what died without cleaning up after itself, and finish its work."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, State

from rollout.clients.cluster import ClusterClient
from rollout.clients.records import RecordStore
from rollout.clients.restore import take_back
from rollout.clients.sweeping import sweep
from rollout.clients.transfer import remove_dead_leftovers, unfinished_transfers
from rollout.errors import AnotherWriter, BucketNotFound, NotFound
from rollout.ledger import Abandoned, abandoned, half_done
from rollout.record import RolloutReport, TeardownReport, Verdict
from rollout.rendering import KubernetesObject
from rollout.report import StepStatus
from rollout.show import teardown_markdown
from rollout.target import Target
from rollout.transfer import ABANDONED_AFTER_DAYS, UnfinishedTransfer
from tasks.outcomes import ANNOUNCED_FLOWS, announce
from tasks.step import Artifact, Outcome, step

FLOWS = (
    *ANNOUNCED_FLOWS,
    "teardown-model",
    "publish-weights",
    "plan-model",
    "verify-model",
    "benchmark-model",
    "watch-releases",
    "janitor",
    "recommend-model",
    "create-manifests",
)
"""All of ours that a deployment runs."""
HEARTBEAT = "prefect.flow-run.heartbeat"
SILENCE = timedelta(minutes=15)
"""Prefect's runs give a sign of life every 180 s by default; five in a row are missing after this."""
START_PATIENCE = timedelta(minutes=30)
"""A run that a worker has taken and that has not begun gives no signs of life. The cluster pool waits 900 s for its pod
(`pod_watch_timeout_seconds`); twice that."""
PAGE = 200
"""The most runs that the server hands out at once."""
FOREIGN_RUN_PATIENCE = timedelta(days=1)
"""A record of a run that this server does not know (a laptop's own server) counts as alive for so long: longer than
any rollout takes."""


@step("find zombies")
def find_zombies(target: str, now: datetime, *, mark: bool = True) -> Outcome[tuple[str, ...]]:
    """Mark as crashed the runs on `target` that claim to be running or starting and give no sign of life.

    No hook of such a run is left to tell anybody, so the rollouts among them are announced here. Without `mark` they
    are only shown.
    """
    rows: list[dict[str, Any]] = []
    with get_client(sync_client=True) as client:
        for run in _unfinished(client):
            why = _death_of(client, run, now) if target_of(run.parameters) == target else ""
            if why:
                if mark:
                    _declare_dead(client, run, why)
                rows.append({"run": run.name, "id": str(run.id), "since": str(run.start_time), "why": why})
    return Outcome(
        value=tuple(row["id"] for row in rows),
        summary=f"{len(rows)} zombies {'marked as crashed' if mark else 'found'}",
        status=StepStatus.DONE if rows and mark else StepStatus.UNCHANGED,
        data={"zombies": rows},
        artifact=Artifact("zombies", "Runs whose worker is gone", table=rows),
    )


@step("find half-done rollouts")
def find_half_done(target: Target, now: datetime) -> Outcome[tuple[RolloutReport, ...]]:
    """Rollouts whose run died over or beside a live version. Changes nothing."""
    records = list(RecordStore(target).read_all())
    found = half_done(records, _alive(records, now), now)
    rows = [{"rollout": report.plan.title if report.plan else "", "run": report.run_id} for report in found]
    return Outcome(
        value=found,
        summary=f"{len(found)} half-done rollouts among {len(records)} records",
        data={"half_done": rows},
        artifact=Artifact("half-done", f"Rollouts to {target.name} that died halfway", table=rows),
    )


@step("take back")
def take_back_half_done(target: Target, report: RolloutReport) -> Outcome[None]:
    """Give the live version its place and its traffic back, and note it in the record of the run that died."""
    changes = take_back(report)
    why = "its run died halfway; the janitor led everything back to what served before"
    RecordStore(target).write(report.model_copy(update={"verdict": Verdict.ROLLED_BACK, "error": why}))
    return Outcome(
        value=None,
        summary=f"{report.plan.title if report.plan else report.run_id}: {len(changes)} objects",
        status=StepStatus.DONE if changes else StepStatus.UNCHANGED,
        changes=changes,
    )


@step("find abandoned")
def find_abandoned(target: Target, now: datetime) -> Outcome[tuple[Abandoned, ...]]:
    """Compare records, live objects and live runs: which model servers should be gone? Changes nothing."""
    records = list(RecordStore(target).read_all())
    manifests = _objects(target)
    found = abandoned(records, manifests, _alive(records, now), now)
    rows = [{"model server": item.instance, "why": item.why.value, "run": item.run_id or ""} for item in found]
    return Outcome(
        value=found,
        summary=f"{len(found)} abandoned model servers among {len(records)} records and {len(manifests)} objects",
        status=StepStatus.DONE,
        data={"abandoned": rows},
        artifact=Artifact("abandoned", f"What should be gone from {target.name}", table=rows),
    )


@step("find dead transfers")
def find_dead_transfers(
    target: Target, now: datetime, after_days: float = ABANDONED_AFTER_DAYS
) -> Outcome[tuple[UnfinishedTransfer, ...]]:
    """Transfers of weights that have given no sign of life for `after_days`. Changes nothing."""
    try:
        found = unfinished_transfers(target)
    except BucketNotFound:
        found = ()
    dead = tuple(each for each in found if now - each.last_sign_at >= timedelta(days=after_days))
    rows = [
        {
            "model path": f"gs://{target.bucket}/{each.prefix}",
            "last sign": str(each.last_sign_at),
            "dead": "yes" if each in dead else "no",
        }
        for each in found
    ]
    return Outcome(
        value=dead,
        summary=f"{len(dead)} dead transfers among {len(found)} unfinished ones",
        data={"unfinished": rows},
        artifact=Artifact("dead-transfers", f"Unfinished transfers to {target.name}", table=rows),
    )


@step("sweep transfer")
def sweep_transfer(target: Target, dead: UnfinishedTransfer) -> Outcome[None]:
    """Remove what a dead transfer left: parts, temporary objects, its claim. What is published stays."""
    uri = f"gs://{target.bucket}/{dead.prefix}"
    try:
        changes = remove_dead_leftovers(target, dead.prefix)
    except AnotherWriter as error:
        return Outcome(value=None, summary=f"{uri}: {error.summary}", status=StepStatus.UNCHANGED)
    return Outcome(
        value=None,
        summary=f"{uri}: {len(changes)} leftovers of a dead transfer removed",
        status=StepStatus.DONE if changes else StepStatus.UNCHANGED,
        changes=changes,
    )


@step("sweep")
def sweep_abandoned(target: Target, item: Abandoned, deadline_s: float) -> Outcome[TeardownReport]:
    """Finish the teardown of one abandoned model server."""
    logger = get_run_logger()
    report = sweep(target, item, deadline_s=deadline_s, on_progress=lambda part: logger.info("%s", part))
    return Outcome(
        value=report,
        summary=f"{item.instance}: {item.why.value}; {len(report.removed)} removed, {len(report.left)} left",
        status=StepStatus.DONE if report.removed else StepStatus.UNCHANGED,
        changes=report.removed,
        artifact=Artifact("sweep", f"Sweep of {item.instance}: inventory", markdown=teardown_markdown(report)),
    )


def target_of(parameters: dict[str, Any]) -> str | None:
    """The target that a run of any of our flows works on."""
    request = parameters.get("request")
    found = request.get("target") if isinstance(request, dict) else parameters.get("target")
    return str(found) if found is not None else None


def _unfinished(client: SyncPrefectClient) -> list[FlowRun]:
    """Every run that a worker has, page by page. One that changes meanwhile may be missed: the next hour finds it."""
    types = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=types))
    found: dict[UUID, FlowRun] = {}
    for offset in itertools.count(0, PAGE):
        page = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))),
            flow_run_filter=FlowRunFilter(state=states),
            sort=FlowRunSort.ID_DESC,
            limit=PAGE,
            offset=offset,
        )
        found |= {run.id: run for run in page}
        if len(page) < PAGE:
            break
    return list(found.values())


def _death_of(client: SyncPrefectClient, run: FlowRun, now: datetime) -> str:
    """Why a run counts as dead; empty while it may be alive."""
    since = run.state.timestamp if run.state else run.start_time
    if since is None:
        return ""
    if run.state is not None and run.state.is_pending():
        minutes = START_PATIENCE.total_seconds() / 60
        return (
            f"it did not begin within {minutes:.0f} minutes: its worker is gone"
            if now - since >= START_PATIENCE
            else ""
        )
    if now - since < SILENCE or _gave_sign_of_life(client, run, now):
        return ""
    return f"no sign of life for {SILENCE.total_seconds() / 60:.0f} minutes: its worker is gone"


def _gave_sign_of_life(client: SyncPrefectClient, run: FlowRun, now: datetime) -> bool:
    wanted = {
        "event": {"name": [HEARTBEAT]},
        "resource": {"id": [f"prefect.flow-run.{run.id}"]},
        "occurred": {"since": (now - SILENCE).isoformat()},
    }
    response = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
    response.raise_for_status()
    return bool(response.json()["events"])


def _declare_dead(client: SyncPrefectClient, run: FlowRun, why: str) -> None:
    state: State[Any] = Crashed(message=why)
    client.set_flow_run_state(run.id, state, force=True)
    flow = client.read_flow(run.flow_id).name
    if flow in ANNOUNCED_FLOWS:
        announce(flow, run, state)


def _alive(records: Iterable[RolloutReport], now: datetime) -> list[str]:
    """Ids of the runs that may still finish their own work."""
    with get_client(sync_client=True) as client:
        return [record.run_id for record in records if _may_be_alive(client, record, now)]


def _may_be_alive(client: SyncPrefectClient, record: RolloutReport, now: datetime) -> bool:
    if record.verdict not in (Verdict.RUNNING, Verdict.WAITING):
        return False
    try:
        run = client.read_flow_run(UUID(record.run_id))
    except ObjectNotFound:
        return now - record.started_at < FOREIGN_RUN_PATIENCE
    return run.state is not None and not run.state.is_final()


def _objects(target: Target) -> tuple[KubernetesObject, ...]:
    try:
        return ClusterClient.connect(target).inventory()
    except NotFound:
        return ()  # no cluster, nothing in it
