"""The story that a flow tells: retries of transient failures only, one artifact a step, a report for every step."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from prefect import flow
from prefect.artifacts import Artifact as StoredArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from rollout.errors import BadInput, TransientError
from rollout.report import Action, Change, StepReport, StepStatus
from tasks.step import Artifact, Outcome, ProgressBar, Story, step

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def test_a_transient_failure_is_tried_again_and_the_attempts_are_reported() -> None:
    tries: list[int] = []
    kept: list[tuple[StepReport, ...]] = []

    @step("flaky", retries=3)
    def flaky() -> Outcome[int]:
        tries.append(1)
        if len(tries) < 3:
            raise TransientError("the connection was lost.")
        return Outcome(value=7, summary="seven")

    @flow
    def tell() -> int:
        return Story(kept.append).run(flaky.with_options(retry_delay_seconds=0))

    assert tell() == 7
    (report,) = kept[-1]
    assert (report.status, report.attempts, report.summary) == (StepStatus.DONE, 3, "seven")


def test_bad_input_is_not_tried_again_and_the_failure_is_kept() -> None:
    tries: list[int] = []
    kept: list[tuple[StepReport, ...]] = []

    @step("refused")
    def refused() -> Outcome[None]:
        tries.append(1)
        raise BadInput("the name is wrong.", where="model", resolution="Correct it.")

    @flow
    def tell() -> None:
        Story(kept.append).run(refused)

    with pytest.raises(BadInput, match=r"model: the name is wrong\. Correct it\."):
        tell()
    assert len(tries) == 1
    (report,) = kept[-1]
    assert report.status is StepStatus.FAILED
    assert report.error == "BadInput: model: the name is wrong. Correct it."


def test_steps_are_kept_in_the_order_of_their_start_and_not_of_their_joining() -> None:
    kept: list[tuple[StepReport, ...]] = []
    change = Change(action=Action.CREATED, kind="Bucket", name="gs://b")

    @step("one")
    def one() -> Outcome[str]:
        return Outcome(value="1", summary="first", changes=(change,))

    @step("two")
    def two() -> Outcome[str]:
        return Outcome(value="2", summary="second", status=StepStatus.UNCHANGED)

    @flow
    def tell() -> str:
        story = Story(kept.append)
        first = story.start(one)
        second = story.start(two, after=[first])
        story.join(second, first)
        story.skip("three", "not asked for")
        return second.result() + first.result()

    assert tell() == "21"
    assert [report.name for report in kept[-1]] == ["one", "two", "three"]
    assert [report.status for report in kept[-1]] == [StepStatus.DONE, StepStatus.UNCHANGED, StepStatus.SKIPPED]
    assert kept[-1][0].changes == (change,)


def test_a_step_publishes_its_artifact() -> None:
    @step("shows")
    def shows() -> Outcome[None]:
        rows = [{"check": "billing", "state": "ok"}]
        return Outcome(value=None, summary="shown", artifact=Artifact("shown-table", "What was shown", table=rows))

    @flow
    def tell() -> None:
        Story(lambda _: None).run(shows)

    tell()
    stored = StoredArtifact.get("shown-table")
    assert stored is not None
    assert "billing" in str(stored.data)


def test_a_step_after_others_begins_when_they_have_ended_and_its_time_counts_from_there() -> None:
    kept: list[tuple[StepReport, ...]] = []

    @step("slow")
    def slow() -> Outcome[None]:
        time.sleep(0.3)
        return Outcome(value=None, summary="")

    @step("next")
    def following() -> Outcome[None]:
        return Outcome(value=None, summary="")

    @flow
    def tell() -> None:
        story = Story(kept.append)
        first = story.start(slow)
        story.join(first, story.start(following, after=[first]))

    tell()
    first, second = kept[-1]
    assert (first.name, second.name) == ("slow", "next")
    assert second.started_at >= first.started_at + timedelta(seconds=0.3)


def test_joined_steps_all_end_before_the_failure_of_one_is_raised_and_what_came_after_it_never_begins() -> None:
    kept: list[tuple[StepReport, ...]] = []

    @step("broken")
    def broken() -> Outcome[None]:
        raise BadInput("broken.")

    @step("slow")
    def slow() -> Outcome[None]:
        time.sleep(0.3)
        return Outcome(value=None, summary="")

    @flow
    def tell() -> None:
        story = Story(kept.append)
        first = story.start(broken)
        story.join(first, story.start(slow, after=[first]), story.start(slow))

    with pytest.raises(BadInput, match="broken"):
        tell()
    # Two that begin at once have no order.
    assert sorted((report.name, report.status) for report in kept[-1]) == [
        ("broken", StepStatus.FAILED),
        ("slow", StepStatus.DONE),
    ]


def test_what_the_server_does_not_take_costs_the_picture_and_not_the_work() -> None:
    @step("long")
    def long() -> Outcome[int]:
        bar = ProgressBar("gone", "a bar that somebody deletes meanwhile", every_s=0.0)
        with get_client(sync_client=True) as client:
            (shown,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["gone"])))
            client.request("DELETE", f"/artifacts/{shown.id}").raise_for_status()
        bar.update(50.0, "half of it")
        return Outcome(value=7, summary="seven")

    @flow
    def tell() -> int:
        return Story(lambda _: None).run(long)

    assert tell() == 7
