"""The longest chain and the picture of a rollout's steps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from rollout.critical_path import chain_sentence, longest_chain, timeline
from rollout.report import StepReport, StepStatus

START = datetime(2026, 11, 1, 12, 0, 0, tzinfo=UTC)


def took(name: str, start_s: float, end_s: float, status: StepStatus = StepStatus.DONE) -> StepReport:
    begin = START + timedelta(seconds=start_s)
    return StepReport(name=name, status=status, started_at=begin, duration_s=end_s - start_s)


STEPS = (
    took("bucket", 0, 1),
    took("cluster", 1, 301),
    took("weights", 1.1, 501),
    took("layout", 501.2, 503),
    took("identity", 301.1, 302),
    took("benchmark", 503, 503, StepStatus.SKIPPED),
    took("wait", 503.3, 600),
)


def test_the_chain_leads_through_what_ended_last_before_each_step() -> None:
    assert [step.name for step in longest_chain(STEPS)] == ["bucket", "weights", "layout", "wait"]


def test_another_chain_is_named_when_the_cluster_is_slower() -> None:
    steps = (took("bucket", 0, 1), took("cluster", 1, 301), took("weights", 1, 100), took("wait", 301, 310))
    assert [step.name for step in longest_chain(steps)] == ["bucket", "cluster", "wait"]


def test_the_sentence_names_what_counts() -> None:
    assert chain_sentence(STEPS) == "Longest chain, 600.0 s: weights 499.9 s → wait 96.7 s."


def test_steps_of_no_length_do_not_go_round_in_circles() -> None:
    steps = (took("a", 0, 0), took("b", 0, 0), took("c", 0.1, 0.1))
    assert longest_chain(steps)[-1].name == "c"


def test_nothing_ran_and_nothing_is_said() -> None:
    assert longest_chain(()) == ()
    assert chain_sentence(()) == ""


def test_the_timeline_marks_the_chain_and_leaves_skipped_steps_out() -> None:
    lines = timeline(STEPS).splitlines()
    assert lines[3] == f"* weights     499.9 s {'█' * 33}{'·' * 7}"
    assert lines[2] == f"  cluster     300.0 s {'█' * 20}{'·' * 20}"
    assert lines[-2] == f"* wait         96.7 s {'·' * 34}{'█' * 6}"
    assert "benchmark" not in timeline(STEPS)
    assert timeline(()) == ""
