"""Look, plan, publish the plan; change nothing."""

from __future__ import annotations

from prefect import flow

from rollout.plan import RolloutPlan
from rollout.request import RolloutRequest, RolloutSpec, resolve
from tasks.planning import observe_target, pin_model, plan_rollout
from tasks.profiling import autoscale_as_profiled
from tasks.step import Story


@flow(name="plan-model", flow_run_name="plan {request.model} → {request.target}")
def plan_model(request: RolloutRequest) -> RolloutPlan:
    """Show what a rollout would do: preflight checks, changes, cost and deadlines. Changes nothing.

    Args:
        request: Model, target and policy, as for the rollout.
    """
    return make_plan(resolve(request), Story(lambda _: None))


def make_plan(spec: RolloutSpec, story: Story) -> RolloutPlan:
    """The first steps of every rollout."""
    model = story.run(pin_model, spec)
    scaling = story.run(autoscale_as_profiled, spec, model) if spec.policy.autoscaling else None
    observed = story.run(observe_target, spec, model, scaling)
    return story.run(plan_rollout, spec, model, observed, scaling)
