"""What CI is told: JUnit, annotations, Markdown."""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree

from rollout.record import RolloutReport, Verdict
from rollout.report import StepReport, StepStatus
from rollout.summary import github_annotations, junit_xml, summary_markdown

NOW = datetime(2026, 11, 23, tzinfo=UTC)


def step(name: str, status: StepStatus, summary: str = "", error: str | None = None) -> StepReport:
    return StepReport(name=name, status=status, started_at=NOW, duration_s=1.5, summary=summary, error=error)


def report(verdict: Verdict, *steps: StepReport, error: str | None = None) -> RolloutReport:
    return RolloutReport(
        run_id="r",
        run_url="http://prefect/runs/r",
        started_at=NOW,
        duration_s=3,
        verdict=verdict,
        error=error,
        steps=steps,
    )


def test_junit_has_a_case_for_every_step() -> None:
    text = junit_xml(
        report(
            Verdict.FAILED,
            step("pin model", StepStatus.DONE, "12 files"),
            step("benchmark", StepStatus.SKIPPED, "not asked for"),
            step("smoke test", StepStatus.FAILED, "chat: no <answer> & \x1b[31mred", "SmokeFailed: chat"),
        )
    )
    suite = ElementTree.fromstring(text)[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [case.get("name") for case in suite] == ["pin model", "benchmark", "smoke test"]
    failure = suite[2].find("failure")
    assert failure is not None
    assert failure.get("message") == "chat: no <answer> & [31mred"
    assert failure.text == "SmokeFailed: chat"


def test_a_rollout_that_ends_without_a_failed_step_still_fails_in_junit() -> None:
    text = junit_xml(report(Verdict.NOT_APPROVED, step("plan", StepStatus.DONE), error="rejected: too dear"))
    suite = ElementTree.fromstring(text)[0]
    assert suite.get("failures") == "1"
    assert suite[1].get("name") == "not approved"


def test_success_has_no_annotations_and_a_failure_has_one_line() -> None:
    assert github_annotations(report(Verdict.DONE, step("plan", StepStatus.DONE))) == ()
    failed = step("wait: start, pods", StepStatus.FAILED, "100% of\nquota")
    lines = github_annotations(report(Verdict.FAILED, failed))
    assert lines == ("::error title=wait%3A start%2C pods::100%25 of%0Aquota",)


def test_the_markdown_begins_with_the_verdict_and_ends_with_the_link() -> None:
    text = summary_markdown(report(Verdict.DONE, step("plan", StepStatus.DONE)))
    assert "**Done** after 3 s." in text
    assert text.endswith("[The run in Prefect](http://prefect/runs/r)\n")
