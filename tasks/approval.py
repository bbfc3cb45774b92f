"""Ask a person before anything changes. The run holds no GPU and no bucket while it waits."""

from __future__ import annotations

from typing import Literal

from prefect import get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from pydantic import Field

from rollout.errors import NotApproved
from rollout.plan import RolloutPlan
from rollout.policy import Approval
from rollout.report import StepReport, StepStatus, utc_now
from rollout.show import plan_markdown
from tasks.step import Story

NAME = "approval"


class ApprovalAnswer(RunInput):
    """The form that the Prefect UI shows while the run waits."""

    decision: Literal["approve", "reject"] = Field("reject", description="Approve to apply the plan as shown.")
    reason: str = Field("", description="Kept in the record.", max_length=500)


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
        answer = pause_flow_run(
            wait_for_input=ApprovalAnswer.with_initial_data(description=plan_markdown(plan)),
            timeout=int(policy.approval_timeout_s),
            poll_interval=2,
        )
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
