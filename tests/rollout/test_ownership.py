"""What a teardown may remove, by the records alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from rollout.ledger import still_owned
from rollout.record import RolloutReport, TeardownReport
from rollout.report import Action, Change, StepReport, StepStatus

MONDAY = datetime(2026, 11, 23, 6, 0, tzinfo=UTC)
CLUSTER, BUCKET, JOB = ("Cluster", "llm"), ("Bucket", "gs://models"), ("Job", "serving/warm-up")


def changes(action: Action, *things: tuple[str, str]) -> tuple[Change, ...]:
    return tuple(Change(action=action, kind=kind, name=name) for kind, name in things)


def record(
    hour: int,
    *,
    created: tuple[tuple[str, str], ...] = (),
    released: tuple[tuple[str, str], ...] = (),
    removed: tuple[tuple[str, str], ...] | None = None,
    hours: float = 0.1,
) -> RolloutReport:
    """A record from `hour` on; `released` was removed by a step, `removed` by a teardown, if there was one."""
    started_at = MONDAY + timedelta(hours=hour)
    step = StepReport(
        name="provision",
        status=StepStatus.DONE,
        started_at=started_at,
        duration_s=1,
        changes=changes(Action.CREATED, *created) + changes(Action.DELETED, *released),
    )
    teardown = None if removed is None else TeardownReport(removed=changes(Action.DELETED, *removed))
    return RolloutReport(
        run_id=f"run-{hour}", started_at=started_at, duration_s=hours * 3600, steps=(step,), teardown=teardown
    )


@pytest.mark.parametrize(
    ("records", "owned"),
    [
        pytest.param([], set(), id="nothing was rolled out"),
        pytest.param([record(0, created=(CLUSTER, BUCKET))], {CLUSTER, BUCKET}, id="nothing was torn down"),
        pytest.param(
            [record(0, created=(CLUSTER, BUCKET)), record(1), record(2, removed=(CLUSTER,))],
            {BUCKET},
            id="a teardown settles what a killed run made, and keeps what it kept",
        ),
        pytest.param([record(0, created=(JOB,), released=(JOB,))], set(), id="a step removes what it made for a while"),
        pytest.param([record(0, created=(JOB,)), record(1, released=(JOB,))], set(), id="a rerun removes it"),
        pytest.param([record(0, created=(CLUSTER,), removed=(CLUSTER,))], set(), id="a trial removes its own"),
        pytest.param(
            [record(0, removed=(CLUSTER,)), record(1, created=(CLUSTER,))], {CLUSTER}, id="it was made once more"
        ),
        pytest.param(
            [record(0, created=(CLUSTER,), removed=(CLUSTER,), hours=9), record(1, created=(CLUSTER,))],
            set(),
            id="the teardown that continues an old record came last",
        ),
    ],
)
def test_owned_is_what_was_created_and_not_removed_since(
    records: list[RolloutReport], owned: set[tuple[str, str]]
) -> None:
    assert still_owned(records) == owned
    assert still_owned(reversed(records)) == owned
