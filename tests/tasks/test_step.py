"""The story that a flow tells: retries of transient failures only, one artifact a step, a report for every step."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from prefect import flow
from prefect.artifacts import Artifact as StoredArtifact
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from rollout.errors import BadInput, TransientError
from rollout.report import Action, Change, StepReport, StepStatus
from rollout.target import Target
from tasks.record import recorded
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


def test_what_people_are_shown_is_not_what_the_work_fails_of() -> None:
    """The Prefect server restarts in the middle: no artifact, no progress, but the work goes on."""

    @step("works")
    def works() -> Outcome[int]:
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
            with ProgressBar("never-shown", "Work", every_s=0) as bar:
                for percent in range(100):
                    bar.update(percent)
            Artifact("never-shown", "A table", table=[{"a": 1}]).publish()
        return Outcome(value=7, summary="seven")

    @flow
    def tell() -> int:
        return Story(lambda _: None).run(works)

    assert tell() == 7


def test_a_record_that_cannot_be_shown_does_not_hide_why_the_rollout_failed(tmp_path: Path) -> None:
    target = Target(name="t", project="some-project", region="europe-west1", bucket="weights")
    nowhere = {PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}

    @flow
    def tell() -> None:
        with temporary_settings(nowhere), recorded(target, str(tmp_path / "report.json")):
            raise BadInput("the real reason.")

    with pytest.raises(BadInput, match="the real reason"):
        tell()
    assert "the real reason" in (tmp_path / "report.json").read_text()


def test_a_progress_bar_shows_the_last_state_with_its_details() -> None:
    @step("long")
    def long() -> Outcome[None]:
        with ProgressBar("long-work", "Weights") as bar:
            for percent in range(101):
                bar.update(percent, f"{percent} of 100 GB")
        return Outcome(value=None, summary="")

    @flow
    def tell() -> None:
        Story(lambda _: None).run(long)

    tell()
    stored = StoredArtifact.get("long-work")
    assert stored is not None
    assert (stored.data, stored.description) == (100.0, "Weights: 100 of 100 GB")
