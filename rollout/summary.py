"""The record of a rollout for CI: JUnit XML, a Markdown summary, and annotations of GitHub Actions. Pure text."""

from __future__ import annotations

from xml.etree import ElementTree

from rollout.record import RolloutReport, Verdict
from rollout.report import StepReport, StepStatus
from rollout.show import report_markdown


def junit_xml(report: RolloutReport) -> str:
    """One test case a step, as GitLab, GitHub and Jenkins show them: failed, skipped or passed, with its seconds."""
    title = report.plan.title if report.plan else "rollout"
    failed = [step for step in report.steps if step.status is StepStatus.FAILED]
    skipped = [step for step in report.steps if step.status is StepStatus.SKIPPED]
    cases = [_case(step, title) for step in report.steps]
    if report.verdict is not Verdict.DONE and not failed:
        cases.append(_verdict_case(report, title))
    failures = len(cases) - len(report.steps) + len(failed)
    suite = ElementTree.Element(
        "testsuite",
        name=title,
        tests=str(len(cases)),
        failures=str(failures),
        skipped=str(len(skipped)),
        time=f"{report.duration_s:.3f}",
        timestamp=report.started_at.isoformat(),
    )
    suite.extend(cases)
    root = ElementTree.Element("testsuites", name="llm-rollout")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def summary_markdown(report: RolloutReport) -> str:
    """The report for `$GITHUB_STEP_SUMMARY`, with a link to the run."""
    link = f"\n[The run in Prefect]({report.run_url})\n" if report.run_url else ""
    return report_markdown(report) + link


def github_annotations(report: RolloutReport) -> tuple[str, ...]:
    """Workflow commands that put failed steps, or the verdict, at the top of a run's page.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions#setting-an-error-message
    """
    failed = [step for step in report.steps if step.status is StepStatus.FAILED]
    lines = [f"::error title={_property(step.name)}::{_data(step.summary)}" for step in failed]
    if not lines and report.verdict is not Verdict.DONE:
        lines = [f"::error title={_property(report.verdict.value)}::{_data(report.error or report.verdict.value)}"]
    return tuple(lines)


def _case(step: StepReport, title: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", name=step.name, classname=title, time=f"{step.duration_s:.3f}")
    if step.status is StepStatus.FAILED:
        ElementTree.SubElement(case, "failure", message=_xml(step.summary)).text = _xml(step.error or step.summary)
    elif step.status is StepStatus.SKIPPED:
        ElementTree.SubElement(case, "skipped", message=_xml(step.summary))
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(step.summary)
    return case


def _verdict_case(report: RolloutReport, title: str) -> ElementTree.Element:
    """The rollout's own failure, where no step failed: cancelled, or ended before its first step."""
    case = ElementTree.Element("testcase", name=report.verdict.value, classname=title, time="0.000")
    ElementTree.SubElement(case, "failure", message=_xml(report.error or report.verdict.value))
    return case


def _xml(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to hold (terminal colours in a log line)."""
    return "".join(c for c in text if c in "\t\n\r" or c >= " ")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
