"""Clean up after what died: the part of teardown that no process was left to do."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from rollout.catalog import load_target, target_title
from rollout.record import TeardownReport
from rollout.report import utc_now
from rollout.transfer import ABANDONED_AFTER_DAYS
from tasks.janitor import (
    find_abandoned,
    find_dead_transfers,
    find_half_done,
    find_zombies,
    sweep_abandoned,
    sweep_transfer,
    take_back_half_done,
)
from tasks.limits import target_alone
from tasks.step import Story
from tasks.teardown import require_nothing_left

SWEEP_DEADLINE_S = 1800.0
"""As a teardown's: GKE deletes a cluster in five to ten minutes; three times that."""


def run_name() -> str:
    return f"janitor of {target_title(flow_run.parameters['target'])}"


@flow(name="janitor", flow_run_name=run_name)
def janitor(
    target: str, remove: bool = True, transfers_after_days: Annotated[float, Field(ge=0)] = ABANDONED_AFTER_DAYS
) -> tuple[TeardownReport, ...]:
    """Find runs whose worker is gone, and finish or undo their work.

    A rollout that died over or beside a live version is taken back. A model server that a policy (a trial, a failed
    rollout) or the annotation `llm-rollout.dev/expires-at` wants gone is torn down; what served before never is. What
    a dead transfer of weights left in the bucket is removed once nobody is likely to continue it.

    Args:
        target: Name of an environment in deployments/targets/, or the path of such a file.
        remove: Off shows what would be marked, taken back and removed, and changes nothing.
        transfers_after_days: How long an unfinished transfer must have given no sign of life. Until then a rerun
            continues it.
    """
    where = load_target(target)
    story = Story(lambda _: None)
    story.run(find_zombies, target, utc_now(), mark=remove)
    if not remove:
        story.run(find_half_done, where, utc_now())
        story.run(find_abandoned, where, utc_now())
        story.run(find_dead_transfers, where, utc_now(), transfers_after_days)
        return ()
    with target_alone(where.name):  # looked at only now: whoever held the target may have changed it
        for rollout in story.run(find_half_done, where, utc_now()):
            story.run(take_back_half_done, where, rollout)
        found = story.run(find_abandoned, where, utc_now())
        reports = tuple(story.run(sweep_abandoned, where, item, SWEEP_DEADLINE_S) for item in found)
        for dead in story.run(find_dead_transfers, where, utc_now(), transfers_after_days):
            story.run(sweep_transfer, where, dead)
    for report in reports:
        require_nothing_left(report)
    return reports
