"""Clean up after what died: the part of teardown that no process was left to do."""

from __future__ import annotations

from prefect import flow

from rollout.catalog import load_target
from rollout.record import TeardownReport
from rollout.report import utc_now
from tasks.janitor import find_abandoned, find_zombies, sweep_abandoned
from tasks.limits import target_alone
from tasks.step import Story
from tasks.teardown import require_nothing_left

SWEEP_DEADLINE_S = 1800.0
"""As a teardown's: GKE deletes a cluster in five to ten minutes; three times that."""


@flow(name="janitor", flow_run_name="janitor of {target}")
def janitor(target: str, remove: bool = True) -> tuple[TeardownReport, ...]:
    """Find runs whose worker is gone and model servers that should be gone, and finish their teardown.

    Only what a policy (a trial, a failed rollout) or the annotation `llm-rollout.dev/expires-at` asks for is removed;
    a live version never is.

    Args:
        target: Name of an environment in deployments/targets/, or the path of such a file.
        remove: Off shows what would be removed, and leaves it.
    """
    where = load_target(target)
    story = Story(lambda _: None)
    story.run(find_zombies, target, utc_now())
    if not remove:
        story.run(find_abandoned, where, utc_now())
        return ()
    with target_alone(where.name):  # looked at only now: whoever held the target may have changed it
        found = story.run(find_abandoned, where, utc_now())
        reports = tuple(story.run(sweep_abandoned, where, item, SWEEP_DEADLINE_S) for item in found)
    for report in reports:
        require_nothing_left(report)
    return reports
