"""What happens when a rollout ends: everybody can learn of it, and what a killed run owes is done.

Prefect calls these hooks by keyword, on cancellation and crash in another process than the run's: everything comes
from the run's parameters and from the records in the bucket.
"""

from __future__ import annotations

import logging
import uuid
from datetime import timedelta
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.states import State
from pydantic import ValidationError

from rollout.clients.records import RecordStore
from rollout.clients.restore import take_back
from rollout.clients.sweeping import sweep
from rollout.errors import NotApproved, ObjectivesMissed, RolledBack, RolloutError
from rollout.ledger import abandoned
from rollout.record import RolloutReport
from rollout.report import utc_now
from rollout.request import RolloutRequest, resolve

OUTCOME_EVENT_PREFIX = "llm-rollout.rollout."
"""Followed by `done`, `failed`, `rolled-back`, `objectives-missed`, `not-approved`, `cancelled` or `crashed`."""

_AT_ONCE = timedelta(0)
"""No grace: the run is known to be over."""

CLEAN_UP_DEADLINE_S = 600.0
"""A runner waits for its hooks; what takes longer (a cluster) is the janitor's."""

logger = logging.getLogger("prefect.flow_runs.hooks")

_OUTCOMES: dict[type[BaseException], str] = {
    RolledBack: "rolled-back",
    ObjectivesMissed: "objectives-missed",
    NotApproved: "not-approved",
}


def announce_outcome(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """One event for the end of a rollout: what notifications and other pipelines listen to."""
    outcome, detail = outcome_of(state)
    parameters = flow_run.parameters.get("request") or {}
    emit_event(
        event=OUTCOME_EVENT_PREFIX + outcome,
        resource={
            "prefect.resource.id": f"llm-rollout.run.{flow_run.id}",
            "prefect.resource.name": flow_run.name,
            "llm-rollout.outcome": outcome,
        },
        related=[
            {
                "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
                "prefect.resource.role": "flow-run",
                "prefect.resource.name": flow_run.name,
            }
        ],
        payload={"flow": flow.name, "detail": detail, "request": parameters},
        id=uuid.uuid5(flow_run.id, f"{OUTCOME_EVENT_PREFIX}{state.id}"),
    )


def outcome_of(state: State[Any]) -> tuple[str, str]:
    """(outcome, one line of detail) of a final state."""
    if state.is_completed():
        return "done", ""
    if state.is_cancelled():
        return "cancelled", state.message or ""
    if state.is_crashed():
        return "crashed", state.message or ""
    error = state.result(raise_on_failure=False)
    outcome = next((name for kind, name in _OUTCOMES.items() if isinstance(error, kind)), "failed")
    return outcome, str(error)


def clean_up_killed(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Do the teardown that the policy of a cancelled or crashed run asks for, as far as the run did not do it itself.

    A failure here is logged and left to the janitor, which tries again every hour.
    """
    try:
        request = RolloutRequest.model_validate(flow_run.parameters.get("request"))
        target = resolve(request).target
        records = list(RecordStore(target).read_all())
        mine: list[RolloutReport] = [record for record in records if record.run_id == str(flow_run.id)]
        if not mine:
            return  # it died before it changed anything
        for record in mine:
            take_back(record)
        others = [record.run_id for record in records if record.run_id != str(flow_run.id)]
        for item in abandoned(records, (), others, utc_now(), grace=_AT_ONCE):
            report = sweep(target, item, deadline_s=CLEAN_UP_DEADLINE_S)
            logger.info("%s %s: %d things removed", flow.name, state.name, len(report.removed))
    except (RolloutError, ValidationError) as error:
        logger.warning("the clean-up after %s did not finish, the janitor will: %s", flow_run.name, error)
