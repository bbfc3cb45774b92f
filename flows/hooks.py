"""What happens when a rollout ends: everybody can learn of it, and what a killed run owes is done.

Prefect calls these hooks by keyword, on cancellation and crash in another process than the run's: everything comes
from the run's parameters and from the records in the bucket.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import State
from pydantic import ValidationError

from rollout.clients.records import RecordStore
from rollout.clients.restore import take_back
from rollout.clients.sweeping import sweep
from rollout.errors import RolloutError
from rollout.ledger import abandoned
from rollout.record import Verdict
from rollout.report import utc_now
from rollout.request import RolloutRequest, resolve
from rollout.target import Target
from tasks.limits import LEASE_S, target_alone_after
from tasks.outcomes import announce

_AT_ONCE = timedelta(0)
"""No grace: the run is known to be over."""

CLEAN_UP_DEADLINE_S = 600.0
"""A runner waits for its hooks; what takes longer (a cluster) is the janitor's."""

PATIENCE_S = 3 * LEASE_S
"""How long the hook waits for the target: a dead run's own lease ends after one, so this waits out a slow server too. A
rollout of somebody else takes longer, and is not waited for: a cancelled run shows its end only after its hooks."""

logger = logging.getLogger("prefect.flow_runs.hooks")


def announce_outcome(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """One event for the end of a rollout, by the run's own hook."""
    announce(flow.name, flow_run, state)


def clean_up_killed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Do the teardown that the policy of a cancelled or crashed run asks for, as far as the run did not do it itself.

    Alone on the target: a run that was queued behind this one may have taken it over, and may be delivering the same
    revision. A failure here, or a target that stays taken, is logged and left to the janitor, which tries again every
    hour, and to the next rollout, which settles the traffic.
    """
    try:
        request = RolloutRequest.model_validate(flow_run.parameters.get("request"))
        target = resolve(request).target
        if not any(record.run_id == str(flow_run.id) for record in RecordStore(target).read_all()):
            return  # it died before it changed anything
        from_deployment = flow_run.deployment_id is not None
        with target_alone_after(target.name, from_deployment=from_deployment, patience_s=PATIENCE_S):
            _clean_up(target, str(flow_run.id), f"{flow.name} {state.name}")
    except (RolloutError, ValidationError) as error:
        logger.warning("the clean-up after %s did not finish, the janitor will: %s", flow_run.name, error)


def _clean_up(target: Target, run_id: str, what: str) -> None:
    """Take back what the run left half done, and remove what it owes; by the records as they are now."""
    records = list(RecordStore(target).read_all())
    for record in records:
        # What is done stays: a run may die after its verdict, and before the server knows of it.
        if record.run_id == run_id and record.verdict is not Verdict.DONE and take_back(record):
            why = f"{record.error or what}; everything was led back to what served before"
            RecordStore(target).write(record.model_copy(update={"verdict": Verdict.ROLLED_BACK, "error": why}))
    others = [record.run_id for record in records if record.run_id != run_id]
    for item in abandoned(records, (), others, utc_now(), grace=_AT_ONCE):
        report = sweep(target, item, deadline_s=CLEAN_UP_DEADLINE_S)
        logger.info("%s: %d things removed", what, len(report.removed))
