"""Ask a person before anything changes.

A run of a deployment is suspended: its process ends, so that neither a worker nor a GPU is held, and the answer starts
it anew. It then makes its plan again, and the answer counts only for exactly the plan that was shown: if the model's
branch or the target has moved meanwhile, the new plan is shown and asked for. A run from the command line waits in its
process, since nobody could start it again.
"""

from __future__ import annotations

from typing import Literal

from prefect import get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment
from pydantic import Field

from rollout.approval import approval_markdown, shown_digest
from rollout.errors import NotApproved
from rollout.plan import RolloutPlan
from rollout.report import StepReport, StepStatus, utc_now
from rollout.target import Approval
from tasks.step import Story

NAME = "approval"


class ApprovalAnswer(RunInput):
    """The form that the Prefect UI shows while the run waits."""

    decision: Literal["approve", "reject"] = Field(
        "reject",
        title="Decision",
        description="Approve applies the plan as shown; reject ends the run and changes nothing.",
        json_schema_extra={"position": 0},
    )
    reason: str = Field(
        "",
        title="Reason",
        description="Why, for those who read the record later.",
        max_length=500,
        json_schema_extra={"position": 1},
    )


def require_approval(plan: RolloutPlan, story: Story) -> None:
    """Wait for the answer that the policy asks for; raise `NotApproved` for a rejection or after the deadline."""
    policy = plan.policy
    if policy.approval is Approval.NEVER:
        story.skip(NAME, "not asked for by the policy")
        return
    if policy.approval is Approval.ON_CHANGE and not plan.changes_anything:
        story.skip(NAME, "the plan changes nothing")
        return
    started_at = utc_now()
    get_run_logger().info("waiting for approval of rollout %s in the Prefect UI", plan.rollout_id)
    try:
        answer = _ask(plan)
    except FlowPauseTimeout as error:
        raise NotApproved(
            f"nobody answered within {policy.approval_timeout_s:.0f} s; nothing was changed.",
            where=plan.title,
            resolution="Start the rollout again, and answer in the Prefect UI.",
        ) from error
    story.keep(
        StepReport(
            name=NAME,
            status=StepStatus.DONE if answer.decision == "approve" else StepStatus.FAILED,
            started_at=started_at,
            duration_s=(utc_now() - started_at).total_seconds(),
            summary=f"{answer.decision}: {answer.reason or 'no reason given'}",
        )
    )
    if answer.decision != "approve":
        raise NotApproved(f"rejected: {answer.reason or 'no reason given'}; nothing was changed.", where=plan.title)


def _ask(plan: RolloutPlan) -> ApprovalAnswer:
    """The answer to exactly this plan, whether it was given to this process or to an earlier one of the same run."""
    form = ApprovalAnswer.with_initial_data(description=approval_markdown(plan))
    timeout_s = int(plan.policy.approval_timeout_s)
    key = f"{NAME}-{shown_digest(plan)}"
    if deployment.id is None:
        return pause_flow_run(wait_for_input=form, timeout=timeout_s, poll_interval=2, key=key)
    return suspend_flow_run(wait_for_input=form, timeout=timeout_s, key=key)
