"""How a new version takes over from the live one: strategies, the steps as data, and what to do after each look.

Rolling replaces the pods of one Deployment. Blue/green and canary deploy every version as a *revision* with objects of
its own beside the live one, prove it before it gets traffic, shift the traffic, and keep the old one warm for a while.
Everything here is pure: `rollout.revisions` makes the objects, `rollout.clients.traffic` moves the traffic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, model_validator

from rollout.comparison import (
    TESTS,
    Comparison,
    Finding,
    Margins,
    difference_upper_bound,
    requests_to_prove_errors,
)
from rollout.serving import ServingSpec, UpdateStrategy
from rollout.values import KubernetesName, Value, content_digest

IN_PLACE = "inplace"
"""The revision of a Deployment that a rolling update made: it has the serving spec's own name, without a suffix."""
REVISION_DIGITS = 8

ORDER_ANNOTATION = "llm-rollout.dev/order"
"""On the new revision's Deployment: the operator's word, by `kubectl annotate`."""

LOOK_SHARES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""When a step looks at its sample, in units of `min_requests`. The first three looks can only stop a disaster early;
the last two are taken when the one before could not decide."""
PROOF_LOOKS = sum(share >= 1 for share in LOOK_SHARES)

GUARD_REQUESTS = 100
"""Of a step that only guards latencies. Without a failure they prove 4.3 % of errors, within the margin of 5 %."""
PROOF_REQUESTS = 600
"""Of the step that proves them: what 300 s hold at 2/s. The last look has four times as many, 2,400. With the log-sigma
0.7 of a TTFT under load, ((2.13 + 1.64) · 0.7·√2 / ln 1.1)² · π/3 ≈ 1,610 pairs prove 10 % between equals 95 times of
100, and 2,400 prove it 99 times."""


class DeliveryKind(StrEnum):
    ROLLING = "rolling"
    """One Deployment, updated in place."""
    BLUE_GREEN = "blue_green"
    """A second Deployment, compared while it has no traffic; then everything is switched at once."""
    CANARY = "canary"
    """A second Deployment that gets its share of the traffic step by step."""


class CanaryStep(Value):
    weight_percent: Annotated[int, Field(ge=1, le=99)]
    """Share of the traffic that the new revision gets."""
    duration_s: Annotated[float, Field(ge=0)] = 300.0
    """How long the step lasts at least; its probes are spread over this time."""
    min_requests: Annotated[int, Field(ge=16)] | None = None
    """Probes of each revision before the step may end; four times as many where the answer is still open.
    None: 600 in the last step, which proves the latencies, and 100 in those before."""


class Unproven(StrEnum):
    """What follows when the largest sample finds nothing worse and yet proves too little."""

    ROLL_BACK = "roll-back"
    """Only what is proven goes on."""
    GO_ON = "go-on"
    """What nothing speaks against goes on: for services too noisy for a proof."""


class GatewayRef(Value):
    """The Gateway whose HTTPRoute splits the traffic."""

    name: KubernetesName
    class_name: KubernetesName | None = None
    """With a class, e.g. `gke-l7-rilb`, the rollout makes the Gateway; None takes one that is there."""
    hostnames: tuple[str, ...] = ()
    """Which requests are this model's, where several models share the Gateway; empty takes all."""


class ProbeSpec(Value):
    """The requests that both revisions get."""

    max_rate_per_s: Annotated[float, Field(gt=0, le=100)] = 2.0
    """To each revision. 2/s of 32 tokens: a percent of what one H100 answers."""
    input_words: Annotated[int, Field(ge=1)] = 64
    output_tokens: Annotated[int, Field(ge=2)] = 32
    timeout_s: Annotated[float, Field(gt=0)] = 60.0


class DeliveryStrategy(Value):
    """How the new version takes over."""

    kind: DeliveryKind = DeliveryKind.ROLLING
    steps: tuple[CanaryStep, ...] = (
        CanaryStep(weight_percent=5),
        CanaryStep(weight_percent=25),
        CanaryStep(weight_percent=50),
    )
    """Of a canary. At 50 % both carry the same load: only there the latencies compare like with like."""
    min_requests: Annotated[int, Field(ge=16)] | None = None
    """Of blue/green's comparison before the switch, and of the look after any switch. None: 600 and 100."""
    margins: Margins = Margins()
    probes: ProbeSpec = ProbeSpec()
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.05
    """Chance that a delivery calls a version worse that is within all margins; and that it promotes one beyond any.
    How often an equal version is promoted is a matter of the sample: `tests/benchmarks/delivery_power.py`."""
    unproven: Unproven = Unproven.ROLL_BACK
    """With "go-on", `alpha` no longer bounds the promotion of a worse version."""
    gateway: GatewayRef | None = None
    """None: the Service itself moves; a canary is then a matter of how many pods stand behind it."""
    rollback_window_s: Annotated[float, Field(ge=0)] = 600.0
    """How long the old revision is kept warm after the switch. 600 s: two scrapes of an alert with `for: 5m`."""

    @model_validator(mode="after")
    def _weights_rise(self) -> DeliveryStrategy:
        weights = [step.weight_percent for step in self.steps]
        if weights != sorted(set(weights)):
            raise ValueError(f"the weights of the canary's steps must rise, not {weights}")
        if self.kind is DeliveryKind.CANARY and not weights:
            raise ValueError("a canary needs at least one step")
        return self

    @model_validator(mode="after")
    def _errors_can_be_proven(self) -> DeliveryStrategy:
        """Raise ValueError for a sample that could not prove the margin of errors if every request were answered."""
        share, alpha = self.margins.error_share, alpha_of_one_proof(self)
        fewest = math.ceil(requests_to_prove_errors(share, alpha=alpha) / LOOK_SHARES[-1])
        for step in delivery_steps(self, has_live=True)[:-1]:
            if step.min_requests < fewest:
                most = step.looks[-1]
                bound = difference_upper_bound(0, most, 0, most, alpha=alpha)
                raise ValueError(
                    f"min_requests {step.min_requests} of the step at {step.weight_percent} % is too small for"
                    f" margins.error_share {share:g}: even {most} requests without a failure prove no less than"
                    f" {bound:.1%}. Set min_requests to {fewest} or more, or error_share to"
                    f" {math.ceil(bound * 1000) / 1000:g} or more"
                )
        return self

    @property
    def by_revisions(self) -> bool:
        """Whether versions stand side by side, each with objects of its own."""
        return self.kind is not DeliveryKind.ROLLING


# --- Revisions --------------------------------------------------------------------------------------------------------


def revision_name(deployment: Mapping[str, Any]) -> str:
    """The name of what a Deployment's pods run: eight hex digits of its pod template.

    Replicas are not part of it: scaling makes no new revision.
    """
    return content_digest(deployment["spec"]["template"], REVISION_DIGITS)


def suffixed(name: str, revision: str) -> str:
    """The name of a revision's own object, within Kubernetes' 63 characters."""
    if revision == IN_PLACE:
        return name
    return f"{name[: 62 - len(revision)].rstrip('-')}-{revision}"


def revised(serving: ServingSpec, revision: str) -> ServingSpec:
    """The spec under the revision's own names: Deployment, Service and the label that its pods are selected by."""
    return serving.model_copy(
        update={field: suffixed(getattr(serving, field), revision) for field in ("name", "service_name", "app")}
    )


# --- Steps ------------------------------------------------------------------------------------------------------------


class DeliveryStep(Value):
    """One station on the way: shift the traffic, then look."""

    weight_percent: Annotated[int, Field(ge=0, le=100)]
    duration_s: Annotated[float, Field(ge=0)]
    min_requests: int
    compares_latencies: bool
    """Whether the load on both is alike enough; after the switch the old one idles."""
    proves_latencies: bool = True
    """Whether they must be proven no worse to go on; else a step ends when nothing is found worse."""
    unproven: Unproven = Unproven.ROLL_BACK

    @property
    def is_last(self) -> bool:
        return self.weight_percent == 100

    @property
    def looks(self) -> tuple[int, ...]:
        """Sizes of the sample, per revision, at which the step looks."""
        return tuple(math.ceil(self.min_requests * share) for share in LOOK_SHARES)


def delivery_steps(strategy: DeliveryStrategy, *, has_live: bool) -> tuple[DeliveryStep, ...]:
    """The way to all of the traffic. Without a live version there is nothing to compare with and nothing to lose."""
    if not has_live:
        return (DeliveryStep(weight_percent=100, duration_s=0.0, min_requests=0, compares_latencies=False),)
    stations = _stations(strategy)
    before = [
        DeliveryStep(
            weight_percent=weight_percent,
            duration_s=duration_s,
            min_requests=asked or (PROOF_REQUESTS if left == 0 else GUARD_REQUESTS),
            compares_latencies=True,
            proves_latencies=left == 0,
            unproven=strategy.unproven,
        )
        for left, (weight_percent, duration_s, asked) in zip(reversed(range(len(stations))), stations, strict=True)
    ]
    window = DeliveryStep(
        weight_percent=100,
        duration_s=strategy.rollback_window_s,
        min_requests=strategy.min_requests or GUARD_REQUESTS,
        compares_latencies=False,
        proves_latencies=False,
    )
    return (*before, window)


def _stations(strategy: DeliveryStrategy) -> list[tuple[int, float, int | None]]:
    """Weight, duration and requests asked for, of each step before the switch."""
    if strategy.kind is DeliveryKind.CANARY:
        return [(each.weight_percent, each.duration_s, each.min_requests) for each in strategy.steps]
    return [(0, 0.0, strategy.min_requests)] if strategy.kind is DeliveryKind.BLUE_GREEN else []


def alpha_of_one_test(strategy: DeliveryStrategy, steps: Sequence[DeliveryStep]) -> float:
    """Bonferroni's share of `alpha` for each test of each look: the sum over all of them stays within `alpha`."""
    return strategy.alpha / (len(steps) * len(LOOK_SHARES) * TESTS)


def alpha_of_one_proof(strategy: DeliveryStrategy) -> float:
    """The chance of a wrong "no worse" in one look; the looks of the step that proves share `alpha`."""
    return strategy.alpha / PROOF_LOOKS


def probe_rate_per_s(step: DeliveryStep, probes: ProbeSpec, size: int = 0) -> float:
    """Probes per second and revision on the way to a look at `size` requests.

    `min_requests` are spread over the step, but never faster than allowed. What a later look needs comes as fast as
    allowed: the step's time is over.
    """
    if step.duration_s <= 0 or size > step.min_requests:
        return probes.max_rate_per_s
    return min(probes.max_rate_per_s, step.min_requests / step.duration_s)


def replicas_for(weight_percent: int, replicas: int, *, by_gateway: bool) -> int:
    """Pods that the new revision needs for its share.

    A Gateway splits by weight: as many pods as carry it. A Service spreads requests evenly over pods, so there the
    number of pods *is* the share, as near to `weight_percent` as `replicas` live pods allow.
    """
    if weight_percent >= 100:
        return replicas
    if by_gateway or weight_percent == 0:
        return max(1, math.ceil(replicas * weight_percent / 100))
    return max(1, min(replicas, round(replicas * weight_percent / (100 - weight_percent))))


def surge_gpus(strategy: DeliveryStrategy, serving: ServingSpec) -> int:
    """GPUs that must be free beside those of the live version, at the widest point of the delivery."""
    if strategy.by_revisions:
        return serving.replicas * serving.accelerator.count
    return serving.accelerator.count if serving.strategy is UpdateStrategy.ROLLING else 0


# --- Decisions --------------------------------------------------------------------------------------------------------


class Order(StrEnum):
    """The operator's word."""

    HOLD = "hold"
    """Stay at this step until the annotation is gone."""
    PROMOTE = "promote"
    """All of the traffic now; the rollback window still follows."""
    ROLL_BACK = "roll-back"


class Decision(StrEnum):
    HOLD = "hold"
    """Stay, and look again."""
    CONTINUE = "continue"
    """The next step."""
    PROMOTE = "promote"
    """To the last step."""
    FINISH = "finish"
    """The delivery is done: the old revision may go."""
    ROLL_BACK = "roll back"


class Ruling(Value):
    """A decision and its reason."""

    decision: Decision
    reason: str


def decide(
    step: DeliveryStep,
    comparison: Comparison | None,
    misses: Sequence[str],
    *,
    elapsed_s: float,
    order: Order | None = None,
) -> Ruling:
    """What follows from a look. `comparison` is None before there are any requests, or without a live version."""
    if order is Order.ROLL_BACK:
        return Ruling(decision=Decision.ROLL_BACK, reason="the operator said so")
    if misses:
        return Ruling(decision=Decision.ROLL_BACK, reason="objective missed: " + "; ".join(misses))
    if comparison is not None and comparison.finding is Finding.WORSE:
        return Ruling(
            decision=Decision.ROLL_BACK, reason="worse than the live version: " + "; ".join(comparison.reasons)
        )
    if order is Order.HOLD:
        return Ruling(decision=Decision.HOLD, reason="the operator holds it here")
    if order is Order.PROMOTE and not step.is_last:
        return Ruling(decision=Decision.PROMOTE, reason="the operator said so")
    return _by_evidence(step, comparison, elapsed_s)


def _by_evidence(step: DeliveryStep, comparison: Comparison | None, elapsed_s: float) -> Ruling:
    seen = comparison.requests if comparison else 0
    if seen < step.min_requests:
        return Ruling(decision=Decision.HOLD, reason=f"{seen} of {step.min_requests} requests seen")
    if elapsed_s < step.duration_s:
        return Ruling(decision=Decision.HOLD, reason=f"{elapsed_s:.0f} of {step.duration_s:.0f} s have passed")
    if step.is_last:
        # Behind the switch only a fault that shows itself leads back: the proof was due before.
        return Ruling(decision=Decision.FINISH, reason="nothing speaks against it")
    unproven = _unproven(step, comparison) if comparison else ()
    if not unproven:
        open_latencies = comparison is not None and comparison.finding is Finding.UNDECIDED
        found = "nothing found worse" if open_latencies else "no worse"
        return Ruling(decision=Decision.CONTINUE, reason=f"{found} in {seen} requests")
    if seen < step.looks[-1]:
        return Ruling(decision=Decision.HOLD, reason="; ".join(unproven))
    reason = f"{seen} requests do not prove it as good as the live version: {'; '.join(unproven)}"
    if step.unproven is Unproven.GO_ON:
        return Ruling(decision=Decision.CONTINUE, reason=f"nothing found worse, which is enough by policy; {reason}")
    return Ruling(decision=Decision.ROLL_BACK, reason=reason)


def _unproven(step: DeliveryStep, comparison: Comparison) -> tuple[str, ...]:
    """What still lacks the proof that the step asks for: errors at every step, latencies where it proves them."""
    return tuple(
        row.reason
        for row in comparison.rows
        if row.finding is Finding.UNDECIDED and (row.metric is None or step.proves_latencies)
    )


def next_step(index: int, steps: Sequence[DeliveryStep], decision: Decision) -> int | None:
    """The index of the step that follows; None ends the delivery."""
    if decision is Decision.HOLD:
        return index
    if decision is Decision.PROMOTE:
        return len(steps) - 1
    return index + 1 if decision is Decision.CONTINUE else None


# --- The record -------------------------------------------------------------------------------------------------------


class Outcome(StrEnum):
    UNDER_WAY = "under way"
    """Also what a killed run leaves behind."""
    ALREADY_LIVE = "already live"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled back"


class StepOutcome(Value):
    """What happened at one step."""

    weight_percent: int
    """As asked for."""
    replicas: int
    """Pods of the new revision."""
    started_at: datetime
    duration_s: Annotated[float, Field(ge=0)]
    ruling: Ruling
    comparison: Comparison | None = None
    """The last look's."""


class DeliveryReport(Value):
    """How the new revision took over, or why it did not."""

    kind: DeliveryKind
    live_before: str | None
    """The revision that served; None for the first one."""
    revision: str
    outcome: Outcome = Outcome.UNDER_WAY
    reason: str = ""
    steps: tuple[StepOutcome, ...] = ()

    @property
    def is_beside_live(self) -> bool:
        """Whether the delivery stopped halfway, with another revision to lead the traffic back to."""
        return self.outcome is Outcome.UNDER_WAY and self.live_before not in (None, self.revision)
