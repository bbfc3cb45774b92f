"""The whole story: serve a model on a target, prove that it answers within its objectives, and keep the evidence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow, get_run_logger

from flows.deliver import deliver
from flows.hooks import announce_outcome, clean_up_killed
from flows.plan_model import make_plan
from rollout.clients.cluster_wait import ServerDoesNotStart
from rollout.errors import RolledBack, RolloutError
from rollout.plan import RolloutPlan
from rollout.policy import Teardown
from rollout.record import RolloutReport, TeardownReport
from rollout.request import RolloutRequest, resolve
from rollout.warm_up import why_not
from tasks.approval import require_approval
from tasks.deliver import require_no_revisions, undo_update
from tasks.limits import gpus_of
from tasks.provision import (
    make_service_account,
    provision_bucket,
    provision_cluster,
    set_up_workload_identity,
)
from tasks.record import Record, recorded
from tasks.serve import apply_manifests, wait_until_available
from tasks.step import Running, Story
from tasks.teardown import require_nothing_left, tear_down_rollout
from tasks.verify import benchmark_model, judge_objectives, require_met, require_passed, smoke_test
from tasks.warm_up import release_node, warm_up_node
from tasks.weights import check_weights_layout, publish_weights


@flow(
    name="rollout-model",
    flow_run_name="{request.model} → {request.target}",
    on_completion=[announce_outcome],
    on_failure=[announce_outcome],
    on_crashed=[clean_up_killed, announce_outcome],
    on_cancellation=[clean_up_killed, announce_outcome],
)
def rollout_model(request: RolloutRequest, report_file: str | None = None) -> RolloutReport:
    """Serve a model with vLLM on a target, prove that it answers within its objectives, and keep the evidence.

    Args:
        request: Model, target and policy.
        report_file: Where the machine-readable record goes on this machine; it is kept in the bucket in any case.
    """
    spec = resolve(request)
    with recorded(spec.target, report_file) as record:
        story = record.story
        plan = make_plan(spec, story)
        record.keep(plan=plan)
        require_approval(plan, story)
        with gpus_of(plan), torn_down_by_policy(plan, record):
            provision(plan, record)
            if plan.policy.delivery.by_revisions:
                deliver(plan, record, verify)
            else:
                update_in_place(plan, record)
        record.milestone()
    return record.report


def provision(plan: RolloutPlan, record: Record) -> None:
    """Make what the model needs: whatever does not depend on each other is made at once."""
    story = record.story
    story.run(provision_bucket, plan.target)
    record.milestone()  # the ledger, before anything else is changed
    cluster = story.start(provision_cluster, plan)
    accounts = [story.start(make_service_account, plan)] if plan.target.has_service_account else []
    weights = story.start(publish_weights, plan.model, plan.target, plan.policy.transfer)
    layout = story.start(check_weights_layout, plan.target, plan.weights_uri, after=[weights])
    identity = story.start(set_up_workload_identity, plan, after=[cluster, *accounts])
    with warmed_up(plan, story, after=cluster):
        story.join(weights, layout, cluster, *accounts, identity)
    record.keep(weights=weights.result())


@contextmanager
def warmed_up(plan: RolloutPlan, story: Story, *, after: Running[None]) -> Iterator[None]:
    """Hold the GPU node from the right moment on, and let go of it at the end, whatever happens in between."""
    reason = why_not(plan)
    if reason:
        story.skip("warm up node", reason)
        yield
        return
    node = story.start(warm_up_node, plan, after=[after])
    try:
        yield
    finally:
        story.join(node)
        if node.began and node.result():
            story.run(release_node, plan)


def update_in_place(plan: RolloutPlan, record: Record) -> None:
    """One Deployment, a rolling update: the old pods answer until the new ones do, and stay if they never do."""
    story = record.story
    require_no_revisions(plan)
    story.run(apply_manifests, plan)
    record.milestone()
    try:
        verify(plan, record)
    except ServerDoesNotStart as error:
        if not error.old_pods_serving:
            raise
        story.run(undo_update, plan, error.summary)
        raise RolledBack(
            f"{error.summary} The previous revision serves: {', '.join(error.old_pods_serving)}.",
            where=error.where,
            resolution=error.resolution,
        ) from error


def verify(plan: RolloutPlan, record: Record) -> None:
    """Measure: it starts, it answers, it holds its objectives."""
    story = record.story
    start = story.run(wait_until_available, plan)
    record.keep(startup=start.model_dump(mode="json"))
    smoke = story.run(smoke_test, plan)
    record.keep(smoke=smoke)
    require_passed(smoke)
    if plan.policy.benchmark is None:
        story.skip("benchmark", "not asked for by the policy")
        return
    if plan.policy.autoscaling is not None:
        story.skip("benchmark", "replicas that come and go have no curve; the profile of one was measured before")
        return
    benchmark = story.run(benchmark_model, plan, start.pods, plan.policy.benchmark)
    record.keep(benchmark=benchmark)
    verdict = story.run(judge_objectives, plan, smoke, benchmark)
    record.keep(objectives=verdict)
    require_met(verdict)


@contextmanager
def torn_down_by_policy(plan: RolloutPlan, record: Record) -> Iterator[None]:
    """Tear down after success or failure, as the policy says; a failure stays the one that is reported."""
    try:
        yield
    except RolledBack:
        # What serves again was there before this rollout: it is not this one's to remove.
        raise
    except BaseException:
        if plan.policy.teardown in (Teardown.ALWAYS, Teardown.ON_FAILURE):
            try:
                tear_down(plan, record)
            except RolloutError as error:
                get_run_logger().error("the teardown after the failure failed as well: %s", error)
        raise
    if plan.policy.teardown is Teardown.ALWAYS:
        require_nothing_left(tear_down(plan, record))


def tear_down(plan: RolloutPlan, record: Record) -> TeardownReport:
    """Remove what this rollout made, and keep the inventory."""
    record.milestone()
    report = record.story.run(
        tear_down_rollout,
        plan.target,
        plan.serving.name,
        plan.policy.weights,
        record.report.created,
        plan.deadlines_s["teardown"],
    )
    record.keep(teardown=report)
    return report
