"""The loop: measure a model on an accelerator, and learn from the curve how to scale it."""

from __future__ import annotations

import time

from prefect import flow

from flows.hooks import announce_outcome, clean_up_killed
from flows.plan_model import make_plan, plan_of_now
from flows.rollout_model import provision, torn_down_by_policy, update_in_place
from rollout.autoscaling import Autoscaling
from rollout.plan import RolloutPlan
from rollout.profiles import Profile
from rollout.profiling import ProfilingSpec, autoscaled, require_profilable, scaling_benchmark, scaling_rate_per_s
from rollout.record import RolloutReport
from rollout.request import RolloutRequest, resolve
from rollout.revisions import with_replicas
from tasks.approval import require_approval
from tasks.limits import gpus_of
from tasks.profiling import (
    compare_with_forecast,
    derive_autoscaler,
    judge_replicas,
    profile_of,
    require_forecast,
    require_held,
    require_metrics_adapter,
    require_unserved,
    scale_out,
)
from tasks.record import Record, recorded
from tasks.serve import apply_manifests


@flow(
    name="profile-model",
    flow_run_name="profile {request.title}",
    on_completion=[announce_outcome],
    on_failure=[announce_outcome],
    on_crashed=[clean_up_killed, announce_outcome],
    on_cancellation=[clean_up_killed, announce_outcome],
)
def profile_model(
    request: RolloutRequest, profiling: ProfilingSpec | None = None, report_file: str | None = None
) -> RolloutReport:
    """Sweep one replica, keep its profile, derive the autoscaler, and test that scaling holds what it promises.

    A later rollout whose policy has `autoscaling` finds the profile, and applies the autoscaler that follows from it.

    Args:
        request: As for a rollout; `replicas` is how many the scaling test must bring (1: no test), and teardown
            `always` makes it a measurement that leaves nothing but its profile.
        profiling: Latency targets, the autoscaler's bounds, and how far the forecast may be missed.
        report_file: Where the machine-readable record goes on this machine; it is kept in the bucket in any case.
    """
    spec = resolve(request)
    require_profilable(spec.policy)
    wanted = profiling or ProfilingSpec()
    with recorded(spec.target, report_file) as record:
        story = record.story
        # For all replicas: quota and cost are about the whole.
        plan, planned_at = make_plan(spec, story), time.monotonic()
        record.keep(plan=plan)
        require_unserved(plan)
        require_approval(plan, story)
        with gpus_of(plan):
            plan = plan_of_now(plan, spec, story, age_s=time.monotonic() - planned_at)
            record.keep(plan=plan)
            with torn_down_by_policy(plan, record):
                measure_and_scale(plan, wanted, record)
        record.milestone()
    return record.report


def measure_and_scale(plan: RolloutPlan, wanted: ProfilingSpec, record: Record) -> None:
    """One replica's profile, what follows from it, and whether it holds."""
    story = record.story
    provision(plan, record)
    if plan.serving.replicas > 1:
        story.run(require_metrics_adapter, plan.target)
    single = with_replicas(plan, 1)
    update_in_place(single, record)
    assert record.report.benchmark is not None, "require_profilable() saw to it"
    profile = story.run(profile_of, single, record.report.benchmark)
    forecast = story.run(compare_with_forecast, single, profile)
    scaling = story.run(derive_autoscaler, single, profile, wanted.autoscaling)
    hold_scaling(plan, profile, scaling, wanted, record)
    require_forecast(forecast, wanted)


def hold_scaling(
    plan: RolloutPlan, profile: Profile, scaling: Autoscaling, wanted: ProfilingSpec, record: Record
) -> None:
    """The autoscaler itself brings all replicas, under the load that it should leave each of them."""
    story, replicas = record.story, plan.serving.replicas
    if replicas == 1:
        story.skip("scale out", "one replica is all that was asked for")
        return
    assert plan.policy.benchmark is not None, "require_profilable() saw to it"
    # Quota and budget are about the plan's replicas, so the test goes no further.
    bounds = wanted.autoscaling.model_copy(update={"max_replicas": replicas})
    rate_per_s = scaling_rate_per_s(profile, wanted.autoscaling.targets, replicas)
    scaled = autoscaled(with_replicas(plan, 1), scaling, bounds)
    story.run(apply_manifests, scaled)
    stage = story.run(scale_out, scaled, scaling_benchmark(plan.policy.benchmark, rate_per_s), replicas)
    require_held(story.run(judge_replicas, stage, wanted, replicas))
