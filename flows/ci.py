"""Runs of a deployment as CI wants them: start once, wait, exit with our codes, and cancel when CI gives up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows.hooks import OUTCOME_EVENT_PREFIX
from rollout.errors import BadInput, DeadlineExceeded, ExitCode
from rollout.values import Value

POLL_S = 2.0
OUTCOME_PATIENCE_S = 20.0
"""The event with the verdict arrives just after the final state; without it, the state alone decides."""

_CODES = {
    "done": ExitCode.DONE,
    "rolled-back": ExitCode.ROLLED_BACK,
    "objectives-missed": ExitCode.OBJECTIVES_MISSED,
    "not-approved": ExitCode.NOT_APPROVED,
}


class Outcome(Value):
    """How a run on the server ended."""

    run_id: UUID
    outcome: str
    """`done`, `failed`, `rolled-back`, `objectives-missed`, `not-approved`, `cancelled` or `crashed`."""
    detail: str = ""
    summary: str = ""
    """The report as Markdown, if the run came far enough to write one."""

    @property
    def exit_code(self) -> ExitCode:
        return _CODES.get(self.outcome, ExitCode.FAILED)


class GivenUp(BaseException):
    """CI sent SIGTERM or SIGINT while we waited."""


def start(client: SyncPrefectClient, deployment: str, request: dict[str, Any], idempotency_key: str | None) -> FlowRun:
    """Start `deployment` (`FLOW/NAME`) with `request` laid over its own; with a known key, the run that has it.

    Raises BadInput for a deployment that does not exist.
    """
    try:
        found = client.read_deployment_by_name(deployment)
    except ObjectNotFound as error:
        raise BadInput(
            f"there is no deployment {deployment!r} on the Prefect server.",
            where="--deployment",
            resolution="Give FLOW/NAME as `prefect deployment ls` shows it.",
        ) from error
    own = found.parameters.get("request") or {}
    return client.create_flow_run_from_deployment(
        found.id, parameters={"request": {**own, **request}}, idempotency_key=idempotency_key, tags=["ci"]
    )


def wait(
    client: SyncPrefectClient, run_id: UUID, deadline_s: float, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Wait for the end of a run. Whoever gives up (a signal, the deadline) cancels the run, and waits for no more.

    The cancelled run does what its policy says of teardown; what it cannot do any more, the janitor does.
    Raises DeadlineExceeded, GivenUp.
    """
    try:
        with _signals_raise():
            state = _wait_until_final(client, run_id, time.monotonic() + deadline_s, say)
    except (GivenUp, DeadlineExceeded):
        client.set_flow_run_state(run_id, Cancelling(message="CI gave up waiting"))
        say(f"the run {run_id} was cancelled")
        raise
    outcome, detail = _outcome(client, run_id, state)
    return Outcome(run_id=run_id, outcome=outcome, detail=detail, summary=_report(client, run_id))


def _wait_until_final(
    client: SyncPrefectClient, run_id: UUID, deadline: float, say: Callable[[str], None]
) -> State[Any]:
    shown = ""
    while True:
        state = client.read_flow_run(run_id).state
        if state is not None and state.name != shown:
            shown = state.name or ""
            say(shown)
        if state is not None and state.is_final():
            return state
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the run did not end in time.", where=str(run_id), resolution="Raise --wait.")
        time.sleep(POLL_S)


@contextmanager
def _signals_raise() -> Iterator[None]:
    def give_up(number: int, _: FrameType | None) -> None:
        raise GivenUp(signal.Signals(number).name)

    before = {number: signal.signal(number, give_up) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(client: SyncPrefectClient, run_id: UUID, state: State[Any]) -> tuple[str, str]:
    """What the run's own event says, which knows more than the state: a rollback and a missed objective both fail."""
    if state.is_completed():
        return "done", ""
    wanted = {"event": {"prefix": [OUTCOME_EVENT_PREFIX]}, "resource": {"id": [f"llm-rollout.run.{run_id}"]}}
    deadline = time.monotonic() + OUTCOME_PATIENCE_S
    while time.monotonic() < deadline:
        response = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
        response.raise_for_status()
        for event in response.json()["events"]:
            return event["event"].removeprefix(OUTCOME_EVENT_PREFIX), event["payload"].get("detail", "")
        time.sleep(POLL_S)
    fallback = "cancelled" if state.is_cancelled() else "crashed" if state.is_crashed() else "failed"
    return fallback, state.message or ""


def _report(client: SyncPrefectClient, run_id: UUID) -> str:
    found = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            key=ArtifactFilterKey(any_=["rollout-report"]), flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])
        )
    )
    # A suspended run leaves a report of its own: the newest one has the verdict.
    newest = max(found, key=lambda artifact: artifact.created or datetime.min.replace(tzinfo=UTC), default=None)
    return "" if newest is None else str(newest.data)


def run_on_server(
    deployment: str,
    request: dict[str, Any],
    *,
    idempotency_key: str | None,
    deadline_s: float,
    say: Callable[[str], None],
) -> Outcome:
    """Start a deployment and wait for its end. Raises BadInput, DeadlineExceeded, GivenUp."""
    with get_client(sync_client=True) as client:
        run = start(client, deployment, request, idempotency_key)
        say(f"{run.name}: {url_for(run) or run.id}")
        return wait(client, run.id, deadline_s, say)
