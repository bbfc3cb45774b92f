"""The whole story: serve a model on a target, prove that it answers within its objectives, and keep the evidence."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import flow, get_run_logger

from flows.deliver import deliver
from flows.hooks import announce_outcome, clean_up_killed
from flows.plan_model import make_plan, plan_of_now
from rollout.clients.cluster_wait import ServerDoesNotStart
from rollout.errors import RolledBack, RolloutError
from rollout.ledger import stands_over
from rollout.plan import RolloutPlan
from rollout.policy import Teardown
from rollout.record import RolloutReport, TeardownReport
from rollout.request import RolloutRequest, resolve
from rollout.transfer import TransferReport
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
from tasks.serve import apply_manifests, prune_shared, wait_until_available
from tasks.step import Running, Story
from tasks.teardown import require_nothing_left, tear_down_rollout
from tasks.verify import benchmark_server, judge_objectives, require_met, require_passed, smoke_test
from tasks.warm_up import release_node, warm_up_node
from tasks.weights import bind_writer, check_weights_layout, publish_weights, publish_weights_by_pods, release_writer


@flow(
    name="rollout-model",
    flow_run_name="{request.title}",
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
        plan, planned_at = make_plan(spec, story), time.monotonic()
        record.keep(plan=plan)
        require_approval(plan, story)
        with gpus_of(plan):
            plan = plan_of_now(plan, spec, story, age_s=time.monotonic() - planned_at)
            record.keep(plan=plan)
            with torn_down_by_policy(plan, record):
                provision(plan, record)
                if plan.policy.delivery.by_revisions:
                    deliver(plan, record, verify)
                else:
                    update_in_place(plan, record)
                record.story.run(prune_shared, plan)
        record.milestone()
    return record.report


def provision(plan: RolloutPlan, record: Record) -> None:
    """Make what the model needs: whatever does not depend on each other is made at once."""
    story = record.story
    story.run(provision_bucket, plan.target)
    record.milestone()  # the ledger, before anything else is changed
    cluster = story.start(provision_cluster, plan)
    accounts = [story.start(make_service_account, plan)] if plan.target.has_service_account else []
    weights, writer = start_transfer(plan, story, cluster)
    layout = story.start(
        check_weights_layout, plan.target, plan.weights_uri, plan.serving.vllm_release, after=[weights]
    )
    identity = story.start(set_up_workload_identity, plan, after=[cluster, *accounts])
    with warmed_up(plan, story, after=cluster):
        story.join(weights, layout, cluster, *writer, *accounts, identity)
    if writer:
        story.run(release_writer, plan.target)
    record.keep(weights=weights.result())


def start_transfer(
    plan: RolloutPlan, story: Story, cluster: Running[None]
) -> tuple[Running[TransferReport], list[Running[None]]]:
    """Start to move the weights, and what that needs: from here at once, by pods as soon as there is a cluster."""
    transfer = plan.policy.transfer
    if not transfer.pods or not plan.transfer_bytes:  # what is there needs nobody who may write
        return story.start(publish_weights, plan.model, plan.target, transfer), []
    writer = story.start(bind_writer, plan.target, after=[cluster])
    pods = story.start(publish_weights_by_pods, plan.model, plan.serving, plan.target, transfer, after=[writer])
    return pods, [writer]


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
    """One Deployment, a rolling update: the old pods answer until the new ones do, and come back if those fail."""
    story = record.story
    require_no_revisions(plan)
    with taken_back_on_failure(plan, record):
        story.run(apply_manifests, plan)
        record.milestone()
        verify(plan, record)


@contextmanager
def taken_back_on_failure(plan: RolloutPlan, record: Record) -> Iterator[None]:
    """Whatever goes wrong in the block, a missed objective and a cancellation included, what served before comes back.

    Raises RolledBack with the reason; without an earlier version, or where nothing had changed yet, the failure itself.
    """
    try:
        yield
    except BaseException as error:
        if not (stands_over(plan) or (isinstance(error, ServerDoesNotStart) and error.old_pods_serving)):
            raise
        reason = error.summary if isinstance(error, RolloutError) else f"{type(error).__name__}: {error}"
        before = record.story.run(undo_update, plan, reason)
        if before is None:
            raise
        record.story.run(wait_until_available, before)
        if not isinstance(error, Exception):
            raise
        where, resolution = (error.where, error.resolution) if isinstance(error, RolloutError) else (plan.title, "")
        raise RolledBack(f"{reason} The previous revision serves.", where=where, resolution=resolution) from error


def verify(plan: RolloutPlan, record: Record, *, occasion: str = "") -> None:
    """Measure: it starts, it answers, it holds its objectives.

    Without an `occasion` of its own, pods that an earlier sweep has measured are not measured again.
    """
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
    benchmark = story.run(benchmark_server, plan, start.pods, plan.policy.benchmark, occasion)
    record.keep(benchmark=benchmark)
    verdict = story.run(judge_objectives, plan, smoke, benchmark)
    record.keep(objectives=verdict)
    require_met(verdict)


@contextmanager
def torn_down_by_policy(plan: RolloutPlan, record: Record) -> Iterator[None]:
    """Tear down after success or failure, as the policy says; a failure stays the one that is reported."""
    try:
        yield
    except BaseException:
        if plan.policy.teardown is not Teardown.NEVER and stays(plan, record):
            record.story.skip("teardown", "what served before this rollout is not its to remove")
        elif plan.policy.teardown is not Teardown.NEVER:
            try:
                tear_down(plan, record)
            except RolloutError as error:
                get_run_logger().error("the teardown after the failure failed as well: %s", error)
        raise
    if plan.policy.teardown is Teardown.ALWAYS:
        require_nothing_left(tear_down(plan, record))


def stays(plan: RolloutPlan, record: Record) -> bool:
    """Whether something serves under the same name that was there before."""
    delivery = record.report.delivery
    return plan.live_before is not None or (delivery is not None and delivery.live_before is not None)


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
