"""Which steps a rollout's duration is made of: the longest chain, and a line of time for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from rollout.bars import bar
from rollout.report import StepReport, StepStatus

SLACK = timedelta(seconds=0.5)
"""A step that starts so long after the end of another may have waited for it: Prefect's own delay between tasks."""


def longest_chain(steps: Sequence[StepReport]) -> tuple[StepReport, ...]:
    """The steps that decide when everything ends, first to last: each began because the one before it had ended.

    Walked from the end: before a step comes the one that ended last of those that had ended when it began. Making
    any other step faster changes nothing.
    """
    ran = [step for step in steps if step.status is not StepStatus.SKIPPED]
    chain: list[StepReport] = []
    current = max(ran, key=_end, default=None)
    while current is not None:
        chain.insert(0, current)
        start = current.started_at
        before = [step for step in ran if step not in chain and _end(step) <= start + SLACK and step.started_at < start]
        current = max(before, key=_end, default=None)
    return tuple(chain)


def chain_sentence(steps: Sequence[StepReport]) -> str:
    """`Longest chain, 612 s: publish weights 540 s → wait until available 71 s.` What takes under 1 % is left out."""
    chain = longest_chain(steps)
    if not chain:
        return ""
    total_s = (_end(chain[-1]) - chain[0].started_at).total_seconds()
    shown = [f"{step.name} {step.duration_s:.1f} s" for step in chain if step.duration_s >= 0.01 * total_s]
    return f"Longest chain, {total_s:.1f} s: {' → '.join(shown)}."


def timeline(steps: Sequence[StepReport]) -> str:
    """A line of text for each step that ran, with a bar; a star marks the longest chain."""
    critical = {id(step) for step in longest_chain(steps)}
    ran = [step for step in steps if step.status is not StepStatus.SKIPPED]
    if not ran:
        return ""
    begin = min(step.started_at for step in ran)
    total_s = (max(_end(step) for step in ran) - begin).total_seconds()
    width = max(len(step.name) for step in ran)
    lines = [
        f"{'*' if id(step) in critical else ' '} {step.name:<{width}}"
        f" {step.duration_s:>8.1f} s {bar((step.started_at - begin).total_seconds(), step.duration_s, total_s)}"
        for step in ran
    ]
    return "\n".join(["```text", *lines, "```"])


def _end(step: StepReport) -> datetime:
    return step.started_at + timedelta(seconds=step.duration_s)
