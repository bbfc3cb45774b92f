"""The steps of a delivery as data, the decisions, the names and objects of revisions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.comparison import TESTS, Comparison, Finding, Row, Sample, compare_errors
from rollout.delivery import (
    IN_PLACE,
    LOOK_SHARES,
    CanaryStep,
    Decision,
    DeliveryKind,
    DeliveryReport,
    DeliveryStep,
    DeliveryStrategy,
    GatewayRef,
    Order,
    Outcome,
    ProbeSpec,
    Unproven,
    alpha_of_one_proof,
    alpha_of_one_test,
    decide,
    delivery_steps,
    next_step,
    probe_rate_per_s,
    replicas_for,
    revised,
    suffixed,
    surge_gpus,
)
from rollout.ledger import abandoned
from rollout.model import ModelFile, PinnedModel
from rollout.objects import INSTANCE_LABEL, serving_objects
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy, Teardown
from rollout.record import RolloutReport, Verdict
from rollout.revisions import (
    REVISION_LABEL,
    backend_name,
    backend_service,
    front_service,
    http_route,
    planned_objects,
    revision_of,
    revision_of_plan,
    revision_plan,
    revisions_in,
    route_weights,
    shared_selector,
)
from rollout.serving import Accelerator, ServingSpec, UpdateStrategy
from rollout.stage import LatencyMetric
from rollout.target import Target
from tests.benchmarks.delivery_power import Noise, deliver

CANARY = DeliveryStrategy(kind=DeliveryKind.CANARY)
BLUE_GREEN = DeliveryStrategy(kind=DeliveryKind.BLUE_GREEN)
TARGET = Target(name="test", project="my-project", region="u-france-east1", bucket="weights", namespace="serving")
SERVING = ServingSpec(served_model_name="google/gemma-4-31B-it")
MODEL = PinnedModel(
    repo_id="google/gemma-4-31B-it",
    revision="main",
    commit_sha="0" * 40,
    files=(ModelFile(path="config.json", size_bytes=2, git_blob_sha1="1" * 40),),
)


def plan_of(serving: ServingSpec = SERVING, strategy: DeliveryStrategy = CANARY) -> RolloutPlan:
    objects = planned_objects(MODEL, serving, TARGET, strategy, rollout_id="0123456789")
    return make_plan(MODEL, serving, TARGET, RolloutPolicy(delivery=strategy), Observation(), objects)


def compared(finding: Finding, requests: int = 100) -> Comparison:
    row = Row(question="failed requests", baseline="", canary="", finding=finding, reason=f"because {finding.value}")
    return Comparison(requests=requests, rows=(row,))


def deployment(objects: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == "Deployment"]
    return found


# --- Steps ------------------------------------------------------------------------------------------------------------


def test_a_canary_climbs_to_everything_and_stays_for_the_rollback_window() -> None:
    steps = delivery_steps(CANARY, has_live=True)
    assert [step.weight_percent for step in steps] == [5, 25, 50, 100]
    assert [step.compares_latencies for step in steps] == [True, True, True, False]
    assert steps[-1].duration_s == CANARY.rollback_window_s


def test_blue_green_compares_without_traffic_and_switches_at_once() -> None:
    assert [step.weight_percent for step in delivery_steps(BLUE_GREEN, has_live=True)] == [0, 100]


@pytest.mark.parametrize("strategy", [CANARY, BLUE_GREEN], ids=lambda strategy: strategy.kind.value)
def test_only_the_step_before_the_switch_proves_latencies_and_asks_enough_for_it(strategy: DeliveryStrategy) -> None:
    *guards, proof, window = delivery_steps(strategy, has_live=True)
    assert proof.proves_latencies
    assert (proof.min_requests, proof.looks[-1]) == (600, 2400)
    for step in (*guards, window):
        assert not step.proves_latencies
        assert step.min_requests == 100


def test_the_first_version_of_all_takes_everything_without_waiting() -> None:
    (only,) = delivery_steps(CANARY, has_live=False)
    assert (only.weight_percent, only.duration_s, only.min_requests) == (100, 0.0, 0)
    assert decide(only, None, (), elapsed_s=0.0).decision is Decision.FINISH


@pytest.mark.parametrize("weights", [(25, 5), (5, 5)])
def test_weights_that_do_not_rise_are_refused(weights: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="must rise"):
        DeliveryStrategy(steps=tuple(CanaryStep(weight_percent=weight) for weight in weights))


def test_a_canary_without_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one step"):
        DeliveryStrategy(kind=DeliveryKind.CANARY, steps=())


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"kind": "canary", "steps": [{"weight_percent": 5, "min_requests": 21}, {"weight_percent": 50}]}, "at 5 %"),
        ({"kind": "blue_green", "min_requests": 16}, "at 0 %"),
        ({"kind": "blue_green", "margins": {"error_share": 0.001}}, "Set min_requests to 1132 or more"),
    ],
)
def test_a_sample_that_can_never_prove_the_margin_of_errors_is_refused(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError, match=where) as caught:
        DeliveryStrategy.model_validate(settings)
    assert "Set min_requests to" in str(caught.value)


def test_the_smallest_sample_that_is_accepted_can_prove_the_margin_of_errors() -> None:
    smallest = CanaryStep(weight_percent=50, min_requests=22)
    (step, _) = delivery_steps(CANARY.model_copy(update={"steps": (smallest,)}), has_live=True)
    assert DeliveryStrategy(kind=DeliveryKind.CANARY, steps=(smallest,)).steps == (smallest,)
    most = Sample(e2e_s=[1.0] * step.looks[-1])
    found = compare_errors(most, most, CANARY.margins, alpha_worse=0.001, alpha_proof=alpha_of_one_proof(CANARY))
    assert found.finding is Finding.NO_WORSE


def test_a_rolling_update_compares_nothing_and_accepts_any_sample() -> None:
    assert DeliveryStrategy(min_requests=16).min_requests == 16


def test_all_tests_of_all_looks_together_spend_alpha() -> None:
    steps = delivery_steps(CANARY, has_live=True)
    assert alpha_of_one_test(CANARY, steps) * len(steps) * len(LOOK_SHARES) * TESTS == pytest.approx(CANARY.alpha)


def test_probes_fill_the_step_and_never_hurry_beyond_their_limit() -> None:
    step = delivery_steps(CANARY, has_live=True)[0]
    assert probe_rate_per_s(step, ProbeSpec()) == pytest.approx(100 / 300)
    assert probe_rate_per_s(step.model_copy(update={"duration_s": 1.0}), ProbeSpec(max_rate_per_s=3)) == 3
    assert probe_rate_per_s(step.model_copy(update={"duration_s": 0.0}), ProbeSpec(max_rate_per_s=3)) == 3


def test_what_a_step_needs_beyond_its_time_comes_as_fast_as_allowed() -> None:
    step, probes = delivery_steps(CANARY, has_live=True)[0], ProbeSpec(max_rate_per_s=3)
    assert probe_rate_per_s(step, probes, step.min_requests) == pytest.approx(100 / 300)
    assert probe_rate_per_s(step, probes, step.looks[-1]) == 3


@pytest.mark.parametrize(
    ("weight", "replicas", "by_gateway", "expected"),
    [
        (0, 8, True, 1),
        (5, 1, True, 1),
        (25, 8, True, 2),
        (26, 8, True, 3),
        (100, 8, True, 8),
        (0, 8, False, 1),
        (20, 8, False, 2),
        (50, 8, False, 8),
        (90, 8, False, 8),
        (5, 1, False, 1),
        (100, 8, False, 8),
    ],
)
def test_a_share_of_the_traffic_needs_its_share_of_the_pods(
    weight: int, replicas: int, by_gateway: bool, expected: int
) -> None:
    assert replicas_for(weight, replicas, by_gateway=by_gateway) == expected


def test_the_surge_is_the_whole_second_version_or_one_pod() -> None:
    serving = ServingSpec(served_model_name="m", replicas=3, accelerator=Accelerator(count=2))
    assert surge_gpus(CANARY, serving) == 6
    assert surge_gpus(DeliveryStrategy(), serving) == 2
    assert surge_gpus(DeliveryStrategy(), serving.model_copy(update={"strategy": UpdateStrategy.RECREATE})) == 0


# --- Decisions --------------------------------------------------------------------------------------------------------

MIDDLE = DeliveryStep(weight_percent=25, duration_s=300.0, min_requests=100, compares_latencies=True)
LAST = DeliveryStep(weight_percent=100, duration_s=300.0, min_requests=100, compares_latencies=False)


@pytest.mark.parametrize(
    ("step", "comparison", "misses", "elapsed_s", "order", "decision", "reason"),
    [
        (MIDDLE, compared(Finding.NO_WORSE), (), 300, None, Decision.CONTINUE, "no worse in 100 requests"),
        (MIDDLE, compared(Finding.NO_WORSE), (), 299, None, Decision.HOLD, "299 of 300 s"),
        (MIDDLE, compared(Finding.NO_WORSE, 99), (), 300, None, Decision.HOLD, "99 of 100 requests"),
        (MIDDLE, None, (), 0, None, Decision.HOLD, "0 of 100"),
        (MIDDLE, compared(Finding.UNDECIDED), (), 300, None, Decision.HOLD, "because undecided"),
        (MIDDLE, compared(Finding.UNDECIDED, 400), (), 300, None, Decision.ROLL_BACK, "do not prove"),
        (MIDDLE, compared(Finding.WORSE, 10), (), 1, None, Decision.ROLL_BACK, "because worse"),
        (MIDDLE, compared(Finding.NO_WORSE), ("TTFT p90 is late",), 300, None, Decision.ROLL_BACK, "TTFT p90 is late"),
        (MIDDLE, compared(Finding.NO_WORSE), (), 300, Order.ROLL_BACK, Decision.ROLL_BACK, "operator"),
        (MIDDLE, compared(Finding.NO_WORSE), (), 300, Order.HOLD, Decision.HOLD, "operator"),
        (MIDDLE, compared(Finding.WORSE), (), 300, Order.HOLD, Decision.ROLL_BACK, "because worse"),
        (MIDDLE, None, (), 0, Order.PROMOTE, Decision.PROMOTE, "operator"),
        (MIDDLE, compared(Finding.WORSE), (), 0, Order.PROMOTE, Decision.ROLL_BACK, "because worse"),
        (LAST, compared(Finding.UNDECIDED), (), 300, None, Decision.FINISH, "nothing speaks against it"),
        (LAST, compared(Finding.WORSE), (), 10, None, Decision.ROLL_BACK, "because worse"),
        (LAST, compared(Finding.NO_WORSE), (), 10, Order.PROMOTE, Decision.HOLD, "10 of 300 s"),
    ],
)
def test_what_follows_from_a_look(
    step: DeliveryStep,
    comparison: Comparison | None,
    misses: tuple[str, ...],
    elapsed_s: float,
    order: Order | None,
    decision: Decision,
    reason: str,
) -> None:
    ruling = decide(step, comparison, misses, elapsed_s=elapsed_s, order=order)
    assert ruling.decision is decision
    assert reason in ruling.reason


def open_latency(requests: int) -> Comparison:
    row = Row(
        question="TTFT typical",
        metric=LatencyMetric.TTFT,
        baseline="",
        canary="",
        finding=Finding.UNDECIDED,
        reason="because undecided",
    )
    return Comparison(requests=requests, rows=(row,))


def test_a_step_that_guards_goes_on_without_a_proof_of_latencies_and_not_without_one_of_errors() -> None:
    guard = MIDDLE.model_copy(update={"proves_latencies": False})
    on = decide(guard, open_latency(100), (), elapsed_s=300)
    assert (on.decision, on.reason) == (Decision.CONTINUE, "nothing found worse in 100 requests")
    assert decide(guard, compared(Finding.UNDECIDED), (), elapsed_s=300).decision is Decision.HOLD
    assert decide(MIDDLE, open_latency(100), (), elapsed_s=300).decision is Decision.HOLD


def test_what_stays_unproven_goes_on_only_by_policy() -> None:
    lenient = DeliveryStrategy(kind=DeliveryKind.BLUE_GREEN, unproven=Unproven.GO_ON)
    step, _ = delivery_steps(lenient, has_live=True)
    assert decide(step, open_latency(1200), (), elapsed_s=0).decision is Decision.HOLD
    on = decide(step, open_latency(2400), (), elapsed_s=0)
    assert on.decision is Decision.CONTINUE
    assert "by policy" in on.reason
    assert "because undecided" in on.reason
    assert decide(step, compared(Finding.WORSE, 2400), (), elapsed_s=0).decision is Decision.ROLL_BACK


@given(st.lists(st.sampled_from(Decision), max_size=30))
def test_every_sequence_of_decisions_leads_forward_or_out(decisions: list[Decision]) -> None:
    steps = delivery_steps(CANARY, has_live=True)
    index: int | None = 0
    for decision in decisions:
        if decision is Decision.CONTINUE and steps[index].is_last:
            continue  # never decided there: see the next test
        following = next_step(index, steps, decision)
        assert following is None or index <= following < len(steps)
        if following is None:
            assert decision in (Decision.FINISH, Decision.ROLL_BACK)
            return
        index = following


@given(st.sampled_from(Finding), st.integers(0, 500), st.floats(0, 1000), st.sampled_from([None, *Order]))
def test_the_last_step_never_continues_and_others_never_finish(
    finding: Finding, requests: int, elapsed_s: float, order: Order | None
) -> None:
    looked = compared(finding, requests)
    assert decide(LAST, looked, (), elapsed_s=elapsed_s, order=order).decision in (
        Decision.HOLD,
        Decision.FINISH,
        Decision.ROLL_BACK,
    )
    assert decide(MIDDLE, looked, (), elapsed_s=elapsed_s, order=order).decision is not Decision.FINISH


# --- Whole deliveries -------------------------------------------------------------------------------------------------

# The noise of a TTFT under load; `tests/benchmarks/delivery_power.py` prints the whole table.
LOADED = Noise(0.7, 0.3)


@pytest.mark.parametrize("strategy", [CANARY, BLUE_GREEN], ids=lambda strategy: strategy.kind.value)
@pytest.mark.parametrize(("factor", "promoted"), [(1.0, True), (1.5, False)], ids=["equal", "half as long again"])
def test_under_load_equals_are_promoted_and_what_is_slower_goes_back(
    strategy: DeliveryStrategy, factor: float, promoted: bool
) -> None:
    source = np.random.default_rng(20261127)
    as_due = [deliver(strategy, LOADED, factor, source).promoted is promoted for _ in range(60)]
    assert sum(as_due) / len(as_due) >= 0.95


def test_a_version_at_the_margin_is_promoted_no_more_often_than_allowed() -> None:
    source = np.random.default_rng(20261127)
    factor = 1 + CANARY.margins.latency_share
    promoted = [deliver(CANARY, Noise(0.3, 0.1), factor, source).promoted for _ in range(60)]
    assert sum(promoted) / len(promoted) <= CANARY.alpha


# --- Revisions --------------------------------------------------------------------------------------------------------


def test_a_rolling_update_plans_what_it_always_planned() -> None:
    rolling = planned_objects(MODEL, SERVING, TARGET, DeliveryStrategy(), rollout_id="0123456789")
    assert rolling == serving_objects(MODEL, SERVING, TARGET, rollout_id="0123456789")


def test_a_revision_has_names_and_selectors_of_its_own_and_belongs_to_its_model() -> None:
    plan = plan_of()
    revision = revision_of_plan(plan)
    found = deployment(plan.objects)
    assert found["metadata"]["name"] == f"{SERVING.name}-{revision}"
    assert found["metadata"]["labels"][INSTANCE_LABEL] == SERVING.name
    assert found["spec"]["selector"]["matchLabels"] == {"app": f"{SERVING.app}-{revision}"}
    template = found["spec"]["template"]["metadata"]["labels"]
    assert template["app"] == f"{SERVING.app}-{revision}"
    assert template[INSTANCE_LABEL] == SERVING.name
    assert shared_selector(SERVING).items() <= template.items()
    services = [item["metadata"]["name"] for item in plan.objects if item["kind"] == "Service"]
    assert services == [f"{SERVING.service_name}-{revision}"]


def test_the_pods_of_an_in_place_deployment_are_selected_by_the_shared_selector_too() -> None:
    in_place = deployment(serving_objects(MODEL, SERVING, TARGET, rollout_id="0123456789"))
    assert shared_selector(SERVING).items() <= in_place["spec"]["template"]["metadata"]["labels"].items()


def test_what_the_pods_run_decides_the_revision_and_their_number_does_not() -> None:
    assert revision_of_plan(plan_of()) == revision_of_plan(plan_of(SERVING.model_copy(update={"replicas": 3})))
    assert revision_of_plan(plan_of()) != revision_of_plan(plan_of(SERVING.model_copy(update={"max_num_seqs": 64})))


def test_a_revisions_plan_is_what_the_serving_tasks_understand() -> None:
    plan = plan_of(SERVING.model_copy(update={"replicas": 4}))
    half = revision_plan(plan, replicas=2)
    assert half.serving == revised(SERVING, revision_of_plan(plan)).model_copy(update={"replicas": 2})
    assert deployment(half.objects)["spec"]["replicas"] == 2
    assert deployment(revision_plan(plan).objects)["spec"]["replicas"] == 4


@given(st.from_regex(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True))
def test_suffixed_names_are_names(name: str) -> None:
    suffixed_name = suffixed(name, "0123abcd")
    assert ServingSpec(served_model_name="m", name=suffixed_name).name == suffixed_name
    assert suffixed_name.endswith("-0123abcd")
    assert suffixed(name, IN_PLACE) == name
    serving = ServingSpec(served_model_name="m", service_name=name)
    assert backend_name(serving, IN_PLACE) != name
    assert ServingSpec(served_model_name="m", service_name=backend_name(serving, IN_PLACE))


def test_a_gateway_is_planned_only_where_the_rollout_makes_it() -> None:
    def kinds(gateway: GatewayRef) -> list[str]:
        return [item["kind"] for item in plan_of(strategy=CANARY.model_copy(update={"gateway": gateway})).objects]

    assert "Gateway" not in kinds(GatewayRef(name="theirs"))
    assert kinds(GatewayRef(name="ours", class_name="gke-l7-rilb")).count("Gateway") == 1
    # GKE's load balancer must ask /health, wherever the Gateway comes from.
    assert "HealthCheckPolicy" in kinds(GatewayRef(name="theirs"))
    assert "HealthCheckPolicy" not in [item["kind"] for item in plan_of().objects]


def test_the_route_holds_the_weights_and_they_can_be_read_back() -> None:
    plan = plan_of()
    gateway = GatewayRef(name="models", hostnames=("gemma.example.com",))
    route = http_route(plan, gateway, {IN_PLACE: 95, "0123abcd": 5})
    assert route["spec"]["hostnames"] == ["gemma.example.com"]
    assert {each["name"]: each["weight"] for each in route["spec"]["rules"][0]["backendRefs"]} == {
        f"{SERVING.service_name}-{IN_PLACE}": 95,
        f"{SERVING.service_name}-0123abcd": 5,
    }
    assert route_weights(route, SERVING, [IN_PLACE, "0123abcd"]) == {IN_PLACE: 95, "0123abcd": 5}
    assert route_weights(route, SERVING, [IN_PLACE]) == {IN_PLACE: 95}


def test_live_objects_know_their_revision_and_the_front_belongs_to_none() -> None:
    plan = plan_of()
    revision = revision_of_plan(plan)
    in_place = serving_objects(MODEL, SERVING, TARGET, rollout_id="0123456789")
    front = front_service(plan, revision, {"app": "x"})
    route = http_route(plan, GatewayRef(name="models"), {revision: 100})
    assert [revision_of(item, SERVING) for item in (front, route)] == [None, None]
    assert revision_of(deployment(in_place), SERVING) == IN_PLACE
    assert revision_of(backend_service(plan, IN_PLACE), SERVING) == IN_PLACE
    assert revisions_in([*in_place, *plan.objects, front], SERVING) == {IN_PLACE, revision}
    another = SERVING.model_copy(update={"name": "another-model"})
    assert revisions_in(plan.objects, another) == set()


def test_what_goes_with_its_owner_belongs_to_no_revision() -> None:
    pod = {"kind": "Pod", "metadata": {"name": "p", "labels": {INSTANCE_LABEL: SERVING.name}, "ownerReferences": [{}]}}
    assert revision_of(pod, SERVING) is None


def test_every_object_of_a_revision_carries_its_label() -> None:
    plan = plan_of(SERVING.model_copy(update={"replicas": 2}))
    own = [item for item in plan.objects if INSTANCE_LABEL in item["metadata"]["labels"]]
    assert {item["kind"] for item in own} >= {"Deployment", "Service", "PodDisruptionBudget"}
    assert {item["metadata"]["labels"][REVISION_LABEL] for item in own} == {revision_of_plan(plan)}


# --- What a dead run leaves -------------------------------------------------------------------------------------------


def report_of(verdict: Verdict, delivery: DeliveryReport | None) -> RolloutReport:
    plan = plan_of(strategy=CANARY)
    policy = plan.policy.model_copy(update={"teardown": Teardown.ON_FAILURE})
    started_at = datetime(2026, 1, 1, tzinfo=UTC)
    dead = plan.model_copy(update={"policy": policy})
    return RolloutReport(run_id="dead", started_at=started_at, verdict=verdict, plan=dead, delivery=delivery)


@pytest.mark.parametrize(
    ("verdict", "live_before", "outcome", "is_abandoned"),
    [
        (Verdict.RUNNING, "live0000", Outcome.UNDER_WAY, False),
        (Verdict.ROLLED_BACK, "live0000", Outcome.ROLLED_BACK, False),
        (Verdict.RUNNING, None, Outcome.UNDER_WAY, True),
    ],
    ids=["killed beside a live version", "rolled back", "killed as the first version"],
)
def test_the_janitor_never_takes_what_served_before(
    verdict: Verdict, live_before: str | None, outcome: Outcome, is_abandoned: bool
) -> None:
    delivery = DeliveryReport(kind=DeliveryKind.CANARY, live_before=live_before, revision="new00000", outcome=outcome)
    found = abandoned([report_of(verdict, delivery)], (), (), datetime(2026, 1, 2, tzinfo=UTC))
    assert bool(found) is is_abandoned
