"""Pin the model, look at what is there, make the plan and show it. Nothing here changes anything."""

from __future__ import annotations

from rollout import preflight
from rollout.autoscaling import Autoscaling
from rollout.clients.hub import HubClient
from rollout.clients.observe import observe
from rollout.model import PinnedModel
from rollout.plan import Observation, RolloutPlan, make_plan, rollout_id
from rollout.profiling import autoscaler_of
from rollout.rendering import KubernetesObject
from rollout.report import Action
from rollout.request import RolloutSpec
from rollout.revisions import planned_objects
from rollout.show import plan_markdown
from tasks.credentials import hub_token
from tasks.step import Artifact, Outcome, step


@step("pin model")
def pin_model(spec: RolloutSpec) -> Outcome[PinnedModel]:
    """Resolve the revision to a commit, once, and choose the files to transfer."""
    transfer = spec.policy.transfer
    hub = HubClient(spec.target.hub_endpoint, hub_token(spec.target))
    pinned = hub.pin(spec.model, transfer.include, transfer.exclude)
    rows = [
        {"file": file.path, "bytes": file.size_bytes, "hash": file.sha256 or f"git:{file.git_blob_sha1}"}
        for file in pinned.files
    ] + [{"file": path, "bytes": None, "hash": "left out"} for path in pinned.excluded]
    return Outcome(
        value=pinned,
        summary=f"{pinned.repo_id}@{pinned.revision} is {pinned.commit_sha}: {len(pinned.files)} files,"
        f" {pinned.total_bytes / 1e9:.2f} GB; {len(pinned.excluded)} left out",
        data={"commit_sha": pinned.commit_sha, "files": len(pinned.files), "total_bytes": pinned.total_bytes},
        artifact=Artifact("model-files", f"Files of {pinned.repo_id} at {pinned.commit_sha}", table=rows),
    )


@step("observe")
def observe_target(spec: RolloutSpec, model: PinnedModel, scaling: Autoscaling | None = None) -> Outcome[Observation]:
    """Read what exists and run every preflight check. Failed checks are shown all at once by `plan_rollout`."""
    objects = _objects(spec, model, scaling)
    delivery = spec.policy.delivery
    observed = observe(model, spec.serving, spec.target, objects, delivery, hub_token=hub_token(spec.target))
    rows = [
        {"check": check.name, "state": check.state.value, "why": check.why, "what to do": check.resolution}
        for check in observed.checks
    ]
    states = [check.state for check in observed.checks]
    counted = ", ".join(f"{states.count(state)} {state.value}" for state in preflight.CheckState if state in states)
    return Outcome(
        value=observed,
        summary=f"{len(rows)} preflight checks: {counted}",
        data={"checks": rows},
        artifact=Artifact("preflight", "Preflight checks: what could stop this rollout", table=rows),
    )


@step("plan")
def plan_rollout(
    spec: RolloutSpec, model: PinnedModel, observed: Observation, scaling: Autoscaling | None = None
) -> Outcome[RolloutPlan]:
    """Turn observation and spec into the plan, publish it, and stop here when a preflight check failed."""
    plan = make_plan(model, spec.serving, spec.target, spec.policy, observed, _objects(spec, model, scaling))
    preflight.require(plan.checks)
    actions = [change.action for change in plan.changes]
    counted = ", ".join(f"{actions.count(action)} {action.value}" for action in Action if action in actions)
    return Outcome(
        value=plan,
        summary=f"rollout {plan.rollout_id}: {counted}; {plan.transfer_bytes / 1e9:.2f} GB to transfer",
        data={"rollout_id": plan.rollout_id, "transfer_bytes": plan.transfer_bytes, "usd_per_hour": plan.usd_per_hour},
        artifact=Artifact("plan", f"Plan: {plan.title}", markdown=plan_markdown(plan)),
    )


def _objects(spec: RolloutSpec, model: PinnedModel, scaling: Autoscaling | None) -> tuple[KubernetesObject, ...]:
    serving, target = spec.serving, spec.target
    identity = rollout_id(model, serving, target)
    objects = planned_objects(model, serving, target, spec.policy.delivery, rollout_id=identity)
    if scaling is None or spec.policy.autoscaling is None:
        return objects
    return (*objects, autoscaler_of(scaling, spec.policy.autoscaling, serving, target, rollout_id=identity))
