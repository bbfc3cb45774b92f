"""Runs of a deployment as CI wants them: start once, wait, exit with our codes, and cancel when CI gives up."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from types import FrameType
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from rollout.errors import BadInput, ExitCode
from rollout.record import RolloutReport, Verdict
from rollout.report import StepReport, StepStatus, utc_now
from rollout.summary import summary_markdown
from rollout.values import Value
from tasks.outcomes import OUTCOME_EVENT_PREFIX, outcome_by_state

POLL_S = 2.0
OUTCOME_PATIENCE_S = 20.0
"""The event with the verdict arrives just after the final state; without it, the state alone decides."""

_VERDICTS = {
    "done": Verdict.DONE,
    "rolled-back": Verdict.ROLLED_BACK,
    "objectives-missed": Verdict.OBJECTIVES_MISSED,
    "not-approved": Verdict.NOT_APPROVED,
}
_TOLD_BY_RUN = ("done", "failed", "rolled-back", "objectives-missed")
_STEPS = {StateType.COMPLETED: StepStatus.DONE, StateType.PENDING: StepStatus.SKIPPED}
"""Every other state means that a step failed, or did not end."""


class Outcome(Value):
    """How a run on the server ended, or how we left it."""

    run_id: UUID
    outcome: str
    """`done`, `failed`, `rolled-back`, `objectives-missed`, `not-approved`, `cancelled` or `crashed`."""
    detail: str = ""
    report: RolloutReport
    """What the server knows of the run: its steps. The record itself is in the bucket, for which CI has no rights."""
    page: str = ""
    """The run's own report as Markdown, if it came far enough to write one."""

    @property
    def summary(self) -> str:
        """For people; never empty. A run that others ended has no last word: its page may still say that it waits."""
        return self.page if self.page and self.outcome in _TOLD_BY_RUN else summary_markdown(self.report)

    @property
    def exit_code(self) -> ExitCode:
        return self.report.exit_code


class GivenUp(BaseException):
    """CI sent SIGTERM or SIGINT while we waited, or has waited for long enough."""


def start(client: SyncPrefectClient, deployment: str, request: dict[str, Any], idempotency_key: str | None) -> FlowRun:
    """Start `deployment` (`FLOW/NAME`) with `request` laid over its own; with a known key, the run that has it.

    Raises BadInput for a deployment that does not exist, or that does not take the request.
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
    try:
        return client.create_flow_run_from_deployment(
            found.id, parameters={"request": {**own, **request}}, idempotency_key=idempotency_key, tags=["ci"]
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code != HTTPStatus.CONFLICT:
            raise
        raise BadInput(
            f"the server refuses the parameters: {error.response.json()['detail']}.",
            where=deployment,
            resolution="Compare them with the deployment's form in the Prefect UI.",
        ) from error


def wait(
    client: SyncPrefectClient, run_id: UUID, deadline_s: float, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Wait for the end of a run. Whoever gives up (a signal, the deadline) cancels the run, and waits for no more.

    The cancelled run does what its policy says of teardown; what it cannot do any more, the janitor does.
    """
    try:
        with _signals_raise():
            state = _wait_until_final(client, run_id, time.monotonic() + deadline_s, say)
    except GivenUp as given_up:
        client.set_flow_run_state(run_id, Cancelling(message=f"CI gave up waiting: {given_up}"))
        say(f"the run {run_id} was cancelled")
        return _told(client, run_id, "cancelled", f"CI gave up waiting: {given_up}", patience_s=0.0)
    outcome, detail = _outcome(client, run_id, state)
    return _told(client, run_id, outcome, detail, patience_s=OUTCOME_PATIENCE_S)


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
            raise GivenUp("the run did not end in time; raise --wait")
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
    """What the run's own event says, which knows more than the state: a rollback and a missed objective both fail.

    An approval that nobody gave has no such event: the server itself ends that run.
    """
    by_state = outcome_by_state(state)
    if by_state[0] in ("done", "not-approved"):
        return by_state
    wanted = {"event": {"prefix": [OUTCOME_EVENT_PREFIX]}, "resource": {"id": [f"llm-rollout.run.{run_id}"]}}
    deadline = time.monotonic() + OUTCOME_PATIENCE_S
    while time.monotonic() < deadline:
        response = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
        response.raise_for_status()
        for event in response.json()["events"]:
            return event["event"].removeprefix(OUTCOME_EVENT_PREFIX), event["payload"].get("detail", "")
        time.sleep(POLL_S)
    return by_state


def _told(client: SyncPrefectClient, run_id: UUID, outcome: str, detail: str, *, patience_s: float) -> Outcome:
    """The outcome with what the server has to show for it."""
    run = client.read_flow_run(run_id)
    report = RolloutReport(
        run_id=str(run_id),
        run_url=url_for(run),
        started_at=run.start_time or run.created or utc_now(),
        duration_s=max(0.0, run.total_run_time.total_seconds()),
        verdict=_VERDICTS.get(outcome, Verdict.FAILED),
        error=None if outcome == "done" else f"{outcome}: {detail}",
        steps=_steps(client, run_id, patience_s),
    )
    page = _page(client, run_id)
    return Outcome(run_id=run_id, outcome=outcome, detail=detail, report=report, page=page)


def _steps(client: SyncPrefectClient, run_id: UUID, patience_s: float) -> tuple[StepReport, ...]:
    """The steps by their task runs, of which the server learns a little later than of the run's end."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    deadline = time.monotonic() + patience_s
    while True:
        runs = client.read_task_runs(flow_run_filter=mine)
        if all(run.state is not None and run.state.is_final() for run in runs) or time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    return tuple(sorted((_step(run) for run in runs), key=lambda step: step.started_at))


def _step(run: TaskRun) -> StepReport:
    status = _STEPS.get(run.state.type, StepStatus.FAILED) if run.state else StepStatus.SKIPPED
    said = (run.state.message or run.state.name or "") if run.state else ""
    return StepReport(
        name=run.name,
        status=status,
        started_at=run.start_time or run.expected_start_time or utc_now(),
        duration_s=max(0.0, run.total_run_time.total_seconds()),
        attempts=max(1, run.run_count),
        summary="" if status is StepStatus.DONE else said,
    )


def _page(client: SyncPrefectClient, run_id: UUID) -> str:
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
    """Start a deployment and wait for its end. Raises BadInput."""
    with get_client(sync_client=True) as client:
        run = start(client, deployment, request, idempotency_key)
        say(f"{run.name}: {url_for(run) or run.id}")
        return wait(client, run.id, deadline_s, say)
