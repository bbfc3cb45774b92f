"""What the records say: what serves, what drifted, what nobody cleaned up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rollout.delivery import DeliveryKind, DeliveryReport, Outcome
from rollout.ledger import (
    APPLY_STEP,
    EXPIRY_ANNOTATION,
    Leftover,
    abandoned,
    drift,
    half_done,
    last_applied,
    proven_revision,
    serving_now,
    standing,
    validated_with,
)
from rollout.model import ModelFile, PinnedModel
from rollout.objects import MODEL_ANNOTATION
from rollout.optimize import ValidatedWith
from rollout.plan import LiveVersion, Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy, Teardown
from rollout.profiles import image_version
from rollout.record import RolloutReport, TeardownReport, Verdict
from rollout.report import Action, Change, StepReport, StepStatus
from rollout.serving import ServingSpec
from rollout.target import Target

MONDAY = datetime(2026, 11, 23, 6, 0, tzinfo=UTC)
LATER = MONDAY + timedelta(days=5)
TARGET = Target(name="s3ns", project="my-project", region="u-france-east1", bucket="my-bucket")
SERVER = "vllm-gemma"


def plan_of(commit: str, teardown: Teardown = Teardown.NEVER, live_before: LiveVersion | None = None) -> RolloutPlan:
    model = PinnedModel(
        repo_id="google/gemma",
        revision="main",
        commit_sha=commit.ljust(40, "0"),
        files=(ModelFile(path="config.json", size_bytes=1),),
    )
    serving = ServingSpec(name=SERVER, served_model_name="gemma")
    observed = Observation(live_before=live_before)
    return make_plan(model, serving, TARGET, RolloutPolicy(teardown=teardown), observed, [])


def record(
    day: int,
    commit: str,
    verdict: Verdict = Verdict.DONE,
    *,
    applies: bool = True,
    teardown: Teardown = Teardown.NEVER,
    over: LiveVersion | None = None,
    **fields: Any,
) -> RolloutReport:
    started = MONDAY + timedelta(days=day)
    step = StepReport(name=APPLY_STEP, status=StepStatus.DONE, started_at=started, duration_s=1)
    return RolloutReport(
        run_id=f"run-{day}",
        started_at=started,
        duration_s=60,
        verdict=verdict,
        plan=plan_of(commit, teardown, over),
        steps=(step,) if applies else (),
        **fields,
    )


def removal(day: int, *, left: bool = False) -> RolloutReport:
    """The record of a teardown on its own, which has no plan."""
    change = Change(action=Action.DELETED, kind="Deployment", name=f"default/{SERVER}")
    found = TeardownReport(removed=(change,), left=(change,) if left else ())
    return RolloutReport(run_id=f"run-{day}", started_at=MONDAY + timedelta(days=day), teardown=found)


def deployment(commit: str, **annotations: str) -> dict[str, Any]:
    live = {MODEL_ANNOTATION: f"google/gemma@{commit.ljust(40, '0')}", **annotations}
    return {"kind": "Deployment", "metadata": {"name": SERVER, "namespace": "default", "annotations": live}}


def test_the_newest_applied_rollout_serves_since_the_first_of_its_kind() -> None:
    serving = serving_now([record(2, "b"), record(0, "a"), record(1, "b", Verdict.OBJECTIVES_MISSED)])[SERVER]
    assert serving.commit_sha.startswith("b")
    assert serving.since == MONDAY + timedelta(days=1)
    assert (serving.run_id, serving.evidence) == ("run-2", Verdict.DONE)


def canary(outcome: Outcome) -> DeliveryReport:
    return DeliveryReport(kind=DeliveryKind.CANARY, live_before="aaaaaaaa", revision="bbbbbbbb", outcome=outcome)


@pytest.mark.parametrize(
    "newest",
    [
        record(1, "b", Verdict.ROLLED_BACK),
        record(1, "b", Verdict.FAILED, applies=False),
        record(1, "b", Verdict.FAILED, delivery=canary(Outcome.ROLLED_BACK)),
        record(1, "b", Verdict.RUNNING, delivery=canary(Outcome.UNDER_WAY)),
    ],
    ids=["rolled back", "never applied", "cancelled", "killed halfway"],
)
def test_what_was_rolled_back_or_never_applied_does_not_serve(newest: RolloutReport) -> None:
    assert serving_now([record(0, "a"), newest])[SERVER].commit_sha.startswith("a")


def test_after_a_teardown_nothing_serves_until_the_next_rollout() -> None:
    assert serving_now([record(0, "a"), removal(1)]) == {}
    assert last_applied([record(0, "a"), removal(1)], SERVER) is None
    found = last_applied([record(0, "a"), removal(1), record(2, "b")], SERVER)
    assert found is not None
    assert found.run_id == "run-2"


def test_records_and_cluster_that_agree_show_no_drift() -> None:
    assert drift(serving_now([record(0, "a")]), [deployment("a")]) == ()


@pytest.mark.parametrize(
    ("records", "manifests", "recorded", "live"),
    [
        ([record(0, "a")], [], "google/gemma@a", "nothing"),
        ([record(0, "a")], [deployment("b")], "google/gemma@a", "google/gemma@b"),
        ([], [deployment("b")], "nothing", "google/gemma@b"),
    ],
)
def test_drift_is_named_with_what_to_do(
    records: list[RolloutReport], manifests: list[dict[str, Any]], recorded: str, live: str
) -> None:
    (found,) = drift(serving_now(records), manifests)
    assert found.recorded.startswith(recorded)
    assert found.live.startswith(live)
    assert found.what_to_do


@pytest.mark.parametrize(
    ("report", "why"),
    [
        (record(0, "a", Verdict.RUNNING, teardown=Teardown.ALWAYS), Leftover.DEAD_TRIAL),
        (record(0, "a", Verdict.DONE, teardown=Teardown.ALWAYS), Leftover.DEAD_TRIAL),
        (record(0, "a", Verdict.RUNNING, teardown=Teardown.ON_FAILURE), Leftover.DEAD_TRIAL),
        (record(0, "a", Verdict.DONE, teardown=Teardown.ON_FAILURE), None),
        (record(0, "a", Verdict.RUNNING), None),
        (record(0, "a", Verdict.FAILED), None),
        (record(0, "a", Verdict.NOT_APPROVED, applies=False, teardown=Teardown.ALWAYS), None),
    ],
)
def test_only_what_the_policy_asks_for_is_abandoned(report: RolloutReport, why: Leftover | None) -> None:
    found = abandoned([report], [deployment("a")], [], LATER)
    assert [item.why for item in found] == ([] if why is None else [why])


def test_a_run_that_is_alive_or_just_ended_is_left_alone() -> None:
    trial = record(0, "a", Verdict.RUNNING, teardown=Teardown.ALWAYS)
    assert abandoned([trial], [], [trial.run_id], LATER) == ()
    assert abandoned([trial], [], [], MONDAY + timedelta(minutes=5)) == ()


def test_a_newer_rollout_of_the_same_server_takes_it_over() -> None:
    trial = record(0, "a", Verdict.RUNNING, teardown=Teardown.ALWAYS)
    assert abandoned([trial, record(1, "b")], [deployment("b")], [], LATER) == ()


def test_a_teardown_that_left_something_is_finished_and_one_that_did_not_is_over() -> None:
    unfinished = record(0, "a", teardown=Teardown.ALWAYS).model_copy(
        update={"teardown": TeardownReport(left=(Change(action=Action.UNCHANGED, kind="Disk", name="d"),))}
    )
    assert [item.why for item in abandoned([unfinished], [], [], LATER)] == [Leftover.UNFINISHED_TEARDOWN]
    trial = record(0, "a", Verdict.RUNNING, teardown=Teardown.ALWAYS)
    assert abandoned([trial, removal(1)], [], [], LATER) == ()


@pytest.mark.parametrize(
    ("expiry", "expired"),
    [
        ((LATER - timedelta(seconds=1)).isoformat(), True),
        ((LATER + timedelta(seconds=1)).isoformat(), False),
        ("yesterday", False),
        ("2020-01-01T00:00:00", False),  # no time zone: not a moment
    ],
)
def test_an_annotation_sets_an_expiry(expiry: str, expired: bool) -> None:
    rollout = record(0, "a")
    found = abandoned([rollout], [deployment("a", **{EXPIRY_ANNOTATION: expiry})], [], LATER)
    assert [(item.why, item.run_id) for item in found] == ([(Leftover.EXPIRED, rollout.run_id)] if expired else [])


# --- What serves, and stays -------------------------------------------------------------------------------------------

LIVE = LiveVersion(model="google/gemma@a", rollout_id="of-a", run_id="run-0", answered=True)


@pytest.mark.parametrize(
    ("records", "run_id"),
    [
        ([], None),
        ([record(0, "a")], "run-0"),
        ([record(0, "a"), record(1, "b")], "run-1"),
        ([record(0, "a"), record(1, "b", Verdict.ROLLED_BACK)], "run-0"),
        ([record(0, "a"), record(1, "b", Verdict.RUNNING, teardown=Teardown.ALWAYS)], "run-0"),
        ([record(0, "a", Verdict.RUNNING, teardown=Teardown.ALWAYS)], None),
        ([record(0, "a", Verdict.FAILED, teardown=Teardown.ON_FAILURE)], None),
        ([record(0, "a", applies=False)], None),
        ([record(0, "a"), removal(1)], None),
        ([record(0, "a"), record(1, "b", Verdict.RUNNING)], "run-0"),
        ([record(0, "a"), record(1, "b", Verdict.FAILED), record(2, "b", Verdict.RUNNING)], "run-0"),
        ([record(0, "a"), record(1, "a", Verdict.FAILED)], "run-0"),
        ([record(0, "a", Verdict.FAILED), record(1, "b", Verdict.FAILED)], "run-1"),
        ([record(0, "a"), removal(1), record(2, "b", Verdict.FAILED)], "run-2"),
    ],
    ids=[
        "nothing",
        "one",
        "the newest",
        "what came back",
        "a trial over it",
        "a killed trial",
        "a failed one that owes its teardown",
        "never applied",
        "torn down",
        "killed over a proven one",
        "killed again over it",
        "the proven one, rolled out again in vain",
        "none was proven",
        "the proven one is torn down",
    ],
)
def test_what_stands_before_a_rollout(records: list[RolloutReport], run_id: str | None) -> None:
    found = standing(records, SERVER)
    assert (found.run_id if found else None) == run_id


@pytest.mark.parametrize(
    ("outcome", "live", "there", "counts"),
    [
        (Outcome.UNDER_WAY, "b", ("a", "b"), "a"),
        (Outcome.UNDER_WAY, "b", ("b",), "b"),
        (Outcome.UNDER_WAY, "a", ("a", "b"), "a"),
        (Outcome.PROMOTED, "b", ("a", "b"), "b"),
        (Outcome.UNDER_WAY, "c", ("a", "b", "c"), "c"),
    ],
    ids=["died in its window", "the old one is gone", "before all of the traffic", "promoted", "by somebody else"],
)
def test_a_revision_whose_delivery_died_does_not_count_as_live(
    outcome: Outcome, live: str, there: tuple[str, ...], counts: str
) -> None:
    delivery = DeliveryReport(kind=DeliveryKind.BLUE_GREEN, live_before="a", revision="b", outcome=outcome)
    records = [record(0, "a"), record(1, "b", Verdict.RUNNING, delivery=delivery)]
    assert proven_revision(records, SERVER, live, there) == counts
    assert proven_revision(records, "another", live, there) == live


def test_only_a_version_that_answered_is_worth_going_back_to() -> None:
    broken = standing([record(0, "a", Verdict.FAILED)], SERVER)
    assert broken is not None
    assert not broken.answered


def test_a_dead_run_over_a_live_version_is_half_done_and_never_abandoned() -> None:
    dead = record(1, "b", Verdict.RUNNING, teardown=Teardown.ON_FAILURE, over=LIVE)
    history = [record(0, "a"), dead]
    assert half_done(history, [], LATER) == (dead,)
    assert half_done(history, [dead.run_id], LATER) == ()
    assert half_done(history, [], dead.started_at + timedelta(minutes=2)) == ()
    assert half_done([*history, record(2, "c")], [], LATER) == ()
    assert abandoned(history, [deployment("a")], [], LATER) == ()


def expiring(day: int, commit: str, after: timedelta, over: LiveVersion | None = None) -> RolloutReport:
    report = record(day, commit, over=over)
    assert report.plan is not None
    policy = report.plan.policy.model_copy(update={"expires_after_s": after.total_seconds()})
    return report.model_copy(update={"plan": report.plan.model_copy(update={"policy": policy})})


@pytest.mark.parametrize(
    ("records", "gone"),
    [
        ([expiring(0, "a", timedelta(days=1))], True),
        ([expiring(0, "a", timedelta(days=30))], False),
        ([expiring(0, "a", timedelta(days=1)), expiring(4, "a", timedelta(days=2))], False),
        ([expiring(0, "a", timedelta(days=1)), removal(1)], False),
        ([record(0, "a"), expiring(1, "b", timedelta(days=1), over=LIVE)], False),
    ],
    ids=["past", "not yet", "renewed by a rollout", "torn down", "over a version that stays"],
)
def test_a_policy_may_end_a_server_after_a_time(records: list[RolloutReport], gone: bool) -> None:
    found = abandoned(records, [deployment("a")], [], LATER)
    assert [each.why for each in found] == ([Leftover.EXPIRED] if gone else [])


def test_a_dead_first_rollout_is_not_half_done() -> None:
    assert half_done([record(0, "a", Verdict.RUNNING)], [], LATER) == ()


def test_versions_are_those_of_the_newest_good_run_of_the_same_server_on_the_same_accelerator() -> None:
    def on(version: str) -> dict[str, Any]:
        return {"ran_on": {"cluster_version": version}}

    records = [
        record(1, "a", startup=on("1.34")),
        record(3, "b", startup=on("1.35")),
        record(4, "c", startup={}),
        record(5, "d", Verdict.FAILED, startup=on("1.36")),
    ]
    serving = records[0].plan.serving if records[0].plan else ServingSpec(served_model_name="gemma")
    version = image_version(serving.image)

    assert validated_with(records, "google/gemma", version, serving.accelerator.type).cluster_version == "1.35"
    assert validated_with(records, "google/gemma", "v0.1.0", serving.accelerator.type) == ValidatedWith()
    assert validated_with(records, "google/gemma", version, "nvidia-l4") == ValidatedWith()
