"""Move the traffic from the live revision to the new one, look after every step, and lead it back if need be."""

from __future__ import annotations

import time
from contextlib import ExitStack

from prefect import get_run_logger

from rollout.clients.cluster import ClusterClient
from rollout.clients.probing import Probed, Prober
from rollout.clients.records import RecordStore
from rollout.clients.restore import restore_before
from rollout.clients.traffic import Traffic, TrafficClient
from rollout.comparison import COMPARED, Comparison, Sample, compare, missed_limits
from rollout.delivery import (
    IN_PLACE,
    Decision,
    DeliveryReport,
    DeliveryStep,
    Order,
    Ruling,
    StepOutcome,
    alpha_of_one_proof,
    alpha_of_one_test,
    decide,
    delivery_steps,
    probe_rate_per_s,
)
from rollout.errors import BadInput
from rollout.ledger import UNDO_STEP, proven_revision
from rollout.plan import RolloutPlan
from rollout.report import Action, Change, StepStatus, utc_now
from rollout.revisions import backend_name
from rollout.show import delivery_markdown
from tasks.step import Artifact, Outcome, step

ORDER_POLL_S = 5.0
"""How long an operator's word may go unheard."""


def _traffic(plan: RolloutPlan) -> TrafficClient:
    return TrafficClient(ClusterClient.connect(plan.target), plan)


def _status(changes: tuple[Change, ...]) -> StepStatus:
    acted = any(change.action in (Action.CREATED, Action.UPDATED, Action.DELETED) for change in changes)
    return StepStatus.DONE if acted else StepStatus.UNCHANGED


@step("observe traffic")
def observe_traffic(plan: RolloutPlan) -> Outcome[Traffic]:
    """Which revision is live, by the cluster's own word; but for one whose delivery died before it was proven."""
    traffic = _traffic(plan).read()
    live = f"{traffic.live} is live" if traffic.live else "nothing is live yet"
    if traffic.live is not None:
        records = RecordStore(plan.target).read_all()
        proven = proven_revision(records, plan.serving.name, traffic.live, traffic.revisions)
        if proven != traffic.live:
            live = f"{traffic.live} has the traffic, and its delivery never ended: {proven} counts as live"
            traffic = traffic.model_copy(update={"live": proven})
    return Outcome(
        value=traffic, summary=live, status=StepStatus.UNCHANGED, data={"traffic": traffic.model_dump(mode="json")}
    )


def require_no_revisions(plan: RolloutPlan) -> None:
    """Raise BadInput where a rolling update would cut off the revision that serves."""
    revisions = sorted(set(_traffic(plan).read().revisions) - {IN_PLACE})
    if revisions:
        raise BadInput(
            f"revisions serve {plan.serving.name} ({', '.join(revisions)}); a rolling update knows one Deployment.",
            where=f"target {plan.target.name}, policy.delivery.kind",
            resolution="Go on with blue_green or canary, or tear the model down first.",
        )


@step("settle traffic")
def settle_traffic(plan: RolloutPlan, traffic: Traffic, revision: str) -> Outcome[None]:
    """Undo what an earlier delivery left half-done: all traffic to the live revision, other candidates removed."""
    client = _traffic(plan)
    changes: tuple[Change, ...] = ()
    if traffic.live is not None:
        changes += client.restore(traffic.live)
    for abandoned in sorted(set(traffic.revisions) - {traffic.live, revision}):
        changes += client.retire(abandoned)
    return Outcome(
        value=None,
        summary=f"all traffic goes to {traffic.live}" if traffic.live else "there is no traffic yet",
        status=_status(changes),
        changes=changes,
    )


@step("shift traffic")
def shift_traffic(plan: RolloutPlan, live: str | None, revision: str, weight_percent: int) -> Outcome[None]:
    """Give the new revision its share, and wait until gateway and endpoints have followed."""
    changes = _traffic(plan).shift(live, revision, weight_percent)
    return Outcome(value=None, summary=f"{weight_percent} % to {revision}", status=_status(changes), changes=changes)


@step("compare", retries=0)
def watch_step(
    plan: RolloutPlan, live: str | None, revision: str, at: DeliveryStep, replicas: int
) -> Outcome[StepOutcome]:
    """Probe both revisions side by side until the step's question is answered."""
    outcome = _StepWatch(plan, live, revision, at, replicas).run()
    return Outcome(
        value=outcome,
        summary=f"at {at.weight_percent} %: {outcome.ruling.decision.value}, {outcome.ruling.reason}",
        status=StepStatus.FAILED if outcome.ruling.decision is Decision.ROLL_BACK else StepStatus.DONE,
        data=outcome.model_dump(mode="json"),
    )


@step("roll back")
def roll_back(plan: RolloutPlan, live: str, revision: str, reason: str) -> Outcome[None]:
    """All traffic back to the live revision; then the new one answers what it has begun, and goes."""
    client = _traffic(plan)
    changes = client.restore(live) + _retire(plan, client, revision)
    return Outcome(value=None, summary=f"{live} serves again: {reason}", changes=changes)


@step("retire")
def retire_others(plan: RolloutPlan, revision: str) -> Outcome[None]:
    """Remove every revision but the live one, after it has answered what it has begun."""
    client = _traffic(plan)
    others = sorted(set(client.read().revisions) - {revision})
    changes: tuple[Change, ...] = client.restore(revision) if others else ()
    for other in others:
        changes += _retire(plan, client, other)
    return Outcome(
        value=None,
        summary=f"removed {', '.join(others)}" if others else "nothing else was there",
        status=_status(changes),
        changes=changes,
    )


@step(UNDO_STEP)
def undo_update(plan: RolloutPlan, reason: str) -> Outcome[RolloutPlan | None]:
    """Give an in-place Deployment back what served before; None if there is nothing to undo."""
    restored = restore_before(plan)
    acted = restored.changed_anything
    what = f"back to {restored.plan.title}" if acted else "nothing had changed"
    return Outcome(
        value=restored.plan if acted else None,
        summary=f"{what}: {reason}",
        status=StepStatus.DONE if acted else StepStatus.UNCHANGED,
        changes=restored.changes,
    )


def publish_delivery(report: DeliveryReport) -> None:
    """The delivery as an artifact, step by step."""
    Artifact("delivery", f"Delivery of revision {report.revision}", markdown=delivery_markdown(report)).publish()


def _retire(plan: RolloutPlan, client: TrafficClient, revision: str) -> tuple[Change, ...]:
    left = client.drain(revision, timeout_s=float(plan.serving.termination_grace_period_s))
    if left:
        get_run_logger().warning(
            "%s still answers %d requests; its pods give them another %d s",
            revision,
            left,
            plan.serving.termination_grace_period_s,
        )
    return client.retire(revision)


class _StepWatch:
    """One step of a delivery: probes, looks, decisions."""

    def __init__(self, plan: RolloutPlan, live: str | None, revision: str, at: DeliveryStep, replicas: int) -> None:
        self._plan = plan
        self._strategy = plan.policy.delivery
        self._live = live
        self._revision = revision
        self._at = at
        self._replicas = replicas
        self._cluster = ClusterClient.connect(plan.target)
        self._traffic = TrafficClient(self._cluster, plan)
        self._baseline, self._canary = Sample(), Sample()
        self._started_at, self._started = utc_now(), time.monotonic()
        self._comparison: Comparison | None = None

    def run(self) -> StepOutcome:
        if self._live is None or not self._at.min_requests:
            return self._outcome(self._look(None))
        with ExitStack() as stack:
            probed = [
                Probed(stack.enter_context(self._cluster.endpoint(backend_name(self._plan.serving, name))), sample)
                for name, sample in ((self._live, self._baseline), (self._revision, self._canary))
            ]
            prober = Prober(probed, self._plan.serving.served_model_name, self._strategy.probes)
            return self._outcome(self._watch(prober))

    def _watch(self, prober: Prober) -> Ruling:
        order: Order | None = None
        for size in self._at.looks:
            order = self._probe_up_to(size, prober)
            if self._ends_step(order):
                break
            if size >= self._at.min_requests:
                order = self._sit_out()
            ruling = self._look(order)
            if ruling.decision is not Decision.HOLD:
                return ruling
        while order is Order.HOLD:
            time.sleep(ORDER_POLL_S)
            order = self._traffic.order(self._revision)
        return self._look(order)

    def _probe_up_to(self, size: int, prober: Prober) -> Order | None:
        """Probes until the sample has `size` requests, or until the operator decides."""
        rate = probe_rate_per_s(self._at, self._strategy.probes, size)
        order = self._traffic.order(self._revision)
        began_s, before = self._elapsed_s(), self._canary.requests
        while (missing := size - self._canary.requests) > 0 and not self._ends_step(order):
            prober.probe(min(missing, max(1, int(rate * ORDER_POLL_S))), rate)
            order = self._wait_until(began_s + (self._canary.requests - before) / rate)
        return order

    def _sit_out(self) -> Order | None:
        """What is left of the step's duration; ends early by the operator's word."""
        return self._wait_until(self._at.duration_s)

    def _wait_until(self, elapsed_s: float) -> Order | None:
        """Wait until the step has lasted so long, or until the operator ends it; returns the operator's word."""
        order = self._traffic.order(self._revision)
        while (left := elapsed_s - self._elapsed_s()) > 0 and not self._ends_step(order):
            time.sleep(min(left, ORDER_POLL_S))
            order = self._traffic.order(self._revision)
        return order

    def _look(self, order: Order | None) -> Ruling:
        steps = delivery_steps(self._strategy, has_live=self._live is not None)
        alpha = alpha_of_one_test(self._strategy, steps)
        objectives = self._plan.policy.objectives
        misses: tuple[str, ...] = ()
        if self._canary.requests:
            self._comparison = compare(
                self._baseline,
                self._canary,
                self._strategy.margins,
                alpha_worse=alpha,
                alpha_proof=alpha_of_one_proof(self._strategy),
                latencies=COMPARED if self._at.compares_latencies else (),
            )
            misses = missed_limits(self._canary, objectives.latencies, objectives.max_failed_share, alpha=alpha)
        return decide(self._at, self._comparison, misses, elapsed_s=self._elapsed_s(), order=order)

    def _ends_step(self, order: Order | None) -> bool:
        """A promotion ends every step but the last, which is its rollback window."""
        return order is Order.ROLL_BACK or (order is Order.PROMOTE and not self._at.is_last)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def _outcome(self, ruling: Ruling) -> StepOutcome:
        return StepOutcome(
            weight_percent=self._at.weight_percent,
            replicas=self._replicas,
            started_at=self._started_at,
            duration_s=self._elapsed_s(),
            ruling=ruling,
            comparison=self._comparison,
        )
