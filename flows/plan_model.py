"""Look, plan, publish the plan; change nothing."""

from __future__ import annotations

from prefect import flow, get_run_logger

from rollout.approval import shown_digest
from rollout.plan import RolloutPlan
from rollout.request import RolloutRequest, RolloutSpec, resolve
from tasks.approval import require_approval
from tasks.planning import observe_target, pin_model, plan_rollout
from tasks.profiling import autoscale_as_profiled
from tasks.step import Story


@flow(name="plan-model", flow_run_name="plan {request.title}")
def plan_model(request: RolloutRequest) -> RolloutPlan:
    """Show what a rollout would do: preflight checks, changes, cost and deadlines. Changes nothing.

    Args:
        request: Model, target and policy, as for the rollout.
    """
    return make_plan(resolve(request), Story(lambda _: None))


PLAN_FRESH_S = 5.0
"""A plan that has waited longer, for its approval or for the target, is made anew: it takes less than a second."""


def plan_of_now(plan: RolloutPlan, spec: RolloutSpec, story: Story, *, age_s: float) -> RolloutPlan:
    """The plan as it is now that the target is this run's alone: what others did while it waited counts.

    Where the difference is one that an approver would have seen, it is asked for again.
    """
    if age_s < PLAN_FRESH_S:
        return plan
    fresh = make_plan(spec, story)
    if shown_digest(fresh) != shown_digest(plan):
        get_run_logger().warning("the target has changed while this run waited: this is the new plan")
        require_approval(fresh, story)
    return fresh


def make_plan(spec: RolloutSpec, story: Story) -> RolloutPlan:
    """The first steps of every rollout."""
    model = story.run(pin_model, spec)
    scaling = story.run(autoscale_as_profiled, spec, model) if spec.policy.autoscaling else None
    observed = story.run(observe_target, spec, model, scaling)
    return story.run(plan_rollout, spec, model, observed, scaling)
