"""One event for the end of a rollout: what notifications, CI and other pipelines listen to.

The run's own hooks send it (`flows/hooks.py`), and whoever ends a run from outside: the janitor.
"""

from __future__ import annotations

import uuid
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.states import State

from rollout.errors import NotApproved, ObjectivesMissed, RolledBack

OUTCOME_EVENT_PREFIX = "llm-rollout.rollout."
"""Followed by `done`, `failed`, `rolled-back`, `objectives-missed`, `not-approved`, `cancelled` or `crashed`."""

ANNOUNCED_FLOWS = ("rollout-model", "profile-model")
"""Flows whose ends are announced; they are also those that ask for approval."""

EXPIRED_PAUSE = "The flow was "
"""How the server's message begins when it fails a run whose approval nobody gave: "The flow was paused and never
resumed." Our flows never begin one so. No process of ours lives then, so there is no hook and no event."""

_OUTCOMES: dict[type[BaseException], str] = {
    RolledBack: "rolled-back",
    ObjectivesMissed: "objectives-missed",
    NotApproved: "not-approved",
}


def announce(flow: str, run: FlowRun, state: State[Any]) -> None:
    """Send the event of a run that ended in `state`; the same state gives the same event."""
    outcome, detail = outcome_of(state)
    emit_event(
        event=OUTCOME_EVENT_PREFIX + outcome,
        resource={
            "prefect.resource.id": f"llm-rollout.run.{run.id}",
            "prefect.resource.name": run.name,
            "llm-rollout.outcome": outcome,
        },
        related=[
            {
                "prefect.resource.id": f"prefect.flow-run.{run.id}",
                "prefect.resource.role": "flow-run",
                "prefect.resource.name": run.name,
            }
        ],
        payload={"flow": flow, "detail": detail, "request": run.parameters.get("request") or {}},
        id=uuid.uuid5(run.id, f"{OUTCOME_EVENT_PREFIX}{state.id}"),
    )


def outcome_of(state: State[Any]) -> tuple[str, str]:
    """(outcome, one line of detail) of a final state."""
    if state.is_completed():
        return "done", ""
    if state.is_cancelled() or state.is_cancelling():
        return "cancelled", state.message or ""
    if state.is_crashed():
        return "crashed", state.message or ""
    error = state.result(raise_on_failure=False)
    outcome = next((name for kind, name in _OUTCOMES.items() if isinstance(error, kind)), "failed")
    return outcome, str(error)


def outcome_by_state(state: State[Any]) -> tuple[str, str]:
    """The same where only the server's word is left: no result of the run, and no event of its own."""
    message = state.message or ""
    if state.is_failed() and message.startswith(EXPIRED_PAUSE):
        return "not-approved", f"nobody answered in time; nothing was changed ({message})"
    if state.is_failed():
        return "failed", message
    return outcome_of(state)
