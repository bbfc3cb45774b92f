"""Progressive delivery: the new revision beside the live one, proven, given traffic step by step, or taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rollout.clients.traffic import Traffic
from rollout.delivery import (
    Decision,
    DeliveryReport,
    DeliveryStep,
    Outcome,
    StepOutcome,
    delivery_steps,
    next_step,
    replicas_for,
)
from rollout.errors import ObjectivesMissed, RolledBack, RolloutError
from rollout.plan import RolloutPlan
from rollout.revisions import revision_of_plan, revision_plan
from tasks.deliver import (
    observe_traffic,
    publish_delivery,
    retire_others,
    roll_back,
    settle_traffic,
    shift_traffic,
    watch_step,
)
from tasks.record import Record
from tasks.serve import apply_manifests, wait_until_available
from tasks.verify import require_passed, smoke_test

Verify = Callable[[RolloutPlan, Record], None]


def deliver(plan: RolloutPlan, record: Record, verify: Verify) -> None:
    """Deploy the plan's revision, `verify` it without traffic, and move the traffic to it.

    Raises RolledBack, with the reason, when a live version serves again after a failure of whatever kind; without a
    live version, the failure itself.
    """
    story = record.story
    revision = revision_of_plan(plan)
    traffic = story.run(observe_traffic, plan)
    keep(record, DeliveryReport(kind=plan.policy.delivery.kind, live_before=traffic.live, revision=revision))
    story.run(settle_traffic, plan, traffic, revision)
    if traffic.live == revision:
        story.run(apply_manifests, revision_plan(plan))
        verify(revision_plan(plan), record)
        end(record, Outcome.ALREADY_LIVE)
    else:
        take_over(plan, traffic, record, verify)
        end(record, Outcome.PROMOTED)
    story.run(retire_others, plan, revision)


def take_over(plan: RolloutPlan, traffic: Traffic, record: Record, verify: Verify) -> None:
    """From nothing to all of the traffic, or back to nothing."""
    story = record.story
    steps = delivery_steps(plan.policy.delivery, has_live=traffic.live is not None)
    # A load sweep measures the whole revision, since its objectives are about all replicas.
    first = plan.serving.replicas if plan.policy.benchmark else replicas_at(steps[0], plan)
    deployed = revision_plan(plan, replicas=first)
    with rolled_back_on_failure(plan, traffic.live, record):
        story.run(apply_manifests, deployed)
        record.milestone()
        verify(deployed, record)
        index: int | None = 0
        while index is not None:
            deployed = scaled(plan, deployed, steps[index], record)
            outcome = take_step(plan, deployed, traffic.live, steps[index], record)
            if outcome.ruling.decision is Decision.ROLL_BACK:
                raise ObjectivesMissed(outcome.ruling.reason, where=f"{outcome.weight_percent} % of the traffic")
            index = next_step(index, steps, outcome.ruling.decision)


def take_step(
    plan: RolloutPlan, deployed: RolloutPlan, live: str | None, step: DeliveryStep, record: Record
) -> StepOutcome:
    """Shift, ask the smoke suite again now that there is traffic, and compare."""
    story = record.story
    revision = revision_of_plan(plan)
    story.run(shift_traffic, plan, live, revision, step.weight_percent)
    record.milestone()
    if step.weight_percent and live is not None:
        require_passed(story.run(smoke_test, deployed))
    outcome = story.run(watch_step, plan, live, revision, step, deployed.serving.replicas)
    report = delivery_of(record)
    keep(record, report.model_copy(update={"steps": (*report.steps, outcome)}))
    return outcome


def scaled(plan: RolloutPlan, deployed: RolloutPlan, step: DeliveryStep, record: Record) -> RolloutPlan:
    """The revision with the pods that the step needs; it gets its share only once they are there."""
    wanted = replicas_at(step, plan)
    if plan.policy.delivery.gateway is not None:
        wanted = max(wanted, deployed.serving.replicas)  # more pods than needed do no harm there
    if wanted == deployed.serving.replicas:
        return deployed
    resized = revision_plan(plan, replicas=wanted)
    record.story.run(apply_manifests, resized)
    record.story.run(wait_until_available, resized)
    return resized


def replicas_at(step: DeliveryStep, plan: RolloutPlan) -> int:
    by_gateway = plan.policy.delivery.gateway is not None
    return replicas_for(step.weight_percent, plan.serving.replicas, by_gateway=by_gateway)


@contextmanager
def rolled_back_on_failure(plan: RolloutPlan, live: str | None, record: Record) -> Iterator[None]:
    """Whatever goes wrong in the block, a cancellation included, `live` serves everything again."""
    try:
        yield
    except BaseException as error:
        if live is None:
            raise
        reason = error.summary if isinstance(error, RolloutError) else f"{type(error).__name__}: {error}"
        record.story.run(roll_back, plan, live, revision_of_plan(plan), reason)
        end(record, Outcome.ROLLED_BACK, reason)
        if not isinstance(error, Exception):
            raise
        resolution = error.resolution if isinstance(error, RolloutError) else ""
        raise RolledBack(f"{reason} ({live} serves)", where=plan.title, resolution=resolution) from error


def delivery_of(record: Record) -> DeliveryReport:
    report = record.report.delivery
    assert report is not None, "deliver() keeps a report before anything else"
    return report


def keep(record: Record, report: DeliveryReport) -> None:
    record.keep(delivery=report)


def end(record: Record, outcome: Outcome, reason: str = "") -> None:
    """Keep and show how the delivery ended."""
    report = delivery_of(record).model_copy(update={"outcome": outcome, "reason": reason})
    keep(record, report)
    publish_delivery(report)
