"""Approval: shown, answered through Prefect's API as the UI does, and counted only for the plan that was shown."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow

from flows.bootstrap import bootstrap
from flows.ci import wait
from flows.rollout_model import rollout_model
from rollout.clients.hub import HubClient
from rollout.clients.storage import StorageClient
from rollout.errors import ExitCode, NotApproved
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.report import StepReport, StepStatus
from rollout.request import RolloutRequest, resolve
from rollout.target import Approval
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from tasks.approval import NAME, require_approval
from tasks.step import Story
from tests.flows.command_line import DEADLINE_S
from tests.flows.conftest import TINY_REPO, Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def client() -> Any:
    with get_client(sync_client=True) as opened:
        yield opened


def run_of_deployment(client: SyncPrefectClient, stage: Stage, **policy: Any) -> FlowRun:
    """A run of the rollout as a deployment; `execute` does what a worker does with it."""
    bootstrap([stage.target])
    deployment = rollout_model.to_deployment(stage.target.name, entrypoint_type=EntrypointType.MODULE_PATH)
    deployment_id = deployment.apply()
    assert isinstance(deployment_id, UUID)
    request = stage.request(approval="always", **policy).model_dump(mode="json")
    return client.create_flow_run_from_deployment(deployment_id, parameters={"request": request})


def execute(client: SyncPrefectClient, run: FlowRun) -> State[Any]:
    """Run the flow in this process until it ends or is suspended, as the process that a worker starts does."""
    current = client.read_flow_run(run.id)
    parameters = {"request": RolloutRequest.model_validate(current.parameters["request"])}
    try:
        state = run_flow(rollout_model, flow_run=current, parameters=parameters, return_type="state")
    except Pause as suspended:
        return suspended.state
    assert isinstance(state, State)
    return state


def answer(client: SyncPrefectClient, run_id: UUID, **form: str) -> dict[str, Any]:
    """Submit the form as the UI does."""
    response = client.request("POST", f"/flow_runs/{run_id}/resume", json={"run_input": form})
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


def shown_to_the_approver(client: SyncPrefectClient, run_id: UUID) -> str:
    state = client.read_flow_run(run_id).state
    assert state is not None
    keyset = state.state_details.run_input_keyset
    assert keyset is not None
    return client.request("GET", f"/flow_runs/{run_id}/input/{keyset['description']}").text


def test_a_deployment_is_suspended_and_continues_with_the_answer(client: SyncPrefectClient, stage: Stage) -> None:
    run = run_of_deployment(client, stage, teardown="always", weights="delete")
    suspended = execute(client, run)
    assert (suspended.name, suspended.is_paused()) == ("Suspended", True)
    assert not StorageClient(stage.target).bucket_exists(), "nothing changes before the answer"
    assert suspended.state_details.pause_timeout is not None
    page = shown_to_the_approver(client, run.id)
    for part in (TINY_REPO, "USD per hour", "GB", "create Deployment", "objectives"):
        assert part in page

    assert answer(client, run.id, decision="approve", reason="looks right")["status"] == "ACCEPT"
    ended = execute(client, run)
    assert ended.is_completed(), ended.message
    report = ended.result()
    (approval,) = [step for step in report.steps if step.name == NAME]
    assert approval.status is StepStatus.DONE
    assert approval.summary == "approve: looks right"


def test_a_rejected_plan_changes_nothing_and_ends_with_its_own_code(client: SyncPrefectClient, stage: Stage) -> None:
    run = run_of_deployment(client, stage)
    execute(client, run)
    answer(client, run.id, decision="reject", reason="too dear")
    ended = execute(client, run)
    assert ended.is_failed()
    assert isinstance(ended.result(raise_on_failure=False), NotApproved)
    assert not StorageClient(stage.target).bucket_exists()
    outcome = wait(client, run.id, DEADLINE_S)
    assert outcome.exit_code is ExitCode.NOT_APPROVED
    assert "too dear" in outcome.detail
    assert "**Not approved**" in outcome.summary


def test_an_approval_that_nobody_gives_ends_with_the_same_code(client: SyncPrefectClient, stage: Stage) -> None:
    run = run_of_deployment(client, stage, approval_timeout_s=1)
    suspended = execute(client, run)
    deadline = suspended.state_details.pause_timeout
    assert deadline is not None
    while datetime.now(UTC) <= deadline:
        threading.Event().wait(0.1)
    # The server ends it so by itself within seconds, and at once when an answer comes too late.
    answer(client, run.id, decision="approve", reason="too late")
    outcome = wait(client, run.id, DEADLINE_S)
    assert outcome.exit_code is ExitCode.NOT_APPROVED
    assert "nobody answered in time; nothing was changed" in outcome.detail
    assert "**Not approved**" in outcome.summary


def test_an_answer_counts_only_for_the_plan_that_was_shown(
    client: SyncPrefectClient, stage: Stage, cloud: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = run_of_deployment(client, stage)
    execute(client, run)
    first = shown_to_the_approver(client, run.id)
    HubStore(cloud.hub_root).publish(TINY_REPO, tiny_model(tmp_path_factory.mktemp("newer"), seed=7))
    answer(client, run.id, decision="approve", reason="for the old commit")
    again = execute(client, run)
    assert again.name == "Suspended", "the branch has moved: the new plan needs an answer of its own"
    assert shown_to_the_approver(client, run.id) != first
    answer(client, run.id, decision="reject", reason="not today")
    assert execute(client, run).is_failed()


def test_an_answer_that_is_not_on_the_form_is_refused_and_the_run_goes_on_waiting(
    client: SyncPrefectClient, stage: Stage
) -> None:
    run = run_of_deployment(client, stage)
    execute(client, run)
    assert answer(client, run.id, decision="maybe")["status"] == "REJECT"
    state = client.read_flow_run(run.id).state
    assert state is not None
    assert state.is_paused()


# --- From the command line, where the process waits -------------------------------------------------------------------


@flow
def ask(plan: RolloutPlan) -> list[StepReport]:
    kept: list[StepReport] = []
    require_approval(plan, Story(lambda reports: kept.extend(reports[len(kept) :])))
    return kept


def plan_for(stage: Stage, **policy: Any) -> RolloutPlan:
    spec = resolve(stage.request(**policy))
    pinned = HubClient(spec.target.hub_endpoint, None).pin(spec.model)
    return make_plan(pinned, spec.serving, spec.target, spec.policy, Observation(), [])


def test_a_run_without_deployment_waits_in_its_process(client: SyncPrefectClient, stage: Stage) -> None:
    plan = plan_for(stage, approval="always")
    name = f"waits-{stage.target.namespace}"

    def answer_when_paused() -> None:
        deadline = time.monotonic() + DEADLINE_S
        with get_client(sync_client=True) as own:
            while time.monotonic() < deadline:
                body = {"flow_runs": {"name": {"any_": [name]}, "state": {"type": {"any_": ["PAUSED"]}}}}
                for found in own.request("POST", "/flow_runs/filter", json=body).json():
                    answer(own, UUID(found["id"]), decision="approve", reason="from the form")
                    return
                threading.Event().wait(0.2)

    thread = threading.Thread(target=answer_when_paused)
    thread.start()
    (report,) = ask.with_options(flow_run_name=name)(plan)
    thread.join()
    assert report.summary == "approve: from the form"


def test_nobody_answers_in_time_and_nothing_changes(stage: Stage) -> None:
    plan = plan_for(stage, approval="always", approval_timeout_s=1)
    with pytest.raises(NotApproved, match="nobody answered within 1 s; nothing was changed"):
        ask(plan)


@pytest.mark.parametrize("policy", [Approval.NEVER, Approval.ON_CHANGE])
def test_nobody_is_asked_without_need(stage: Stage, policy: Approval) -> None:
    plan = plan_for(stage, approval=policy.value).model_copy(update={"changes": ()})
    (report,) = ask(plan)
    assert report.status is StepStatus.SKIPPED
