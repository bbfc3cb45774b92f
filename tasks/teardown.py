"""Remove what a rollout made, and prove that nothing of it is left."""

from __future__ import annotations

from prefect import get_run_logger

from rollout.clients.records import RecordStore
from rollout.clients.teardown import tear_down
from rollout.errors import LeftoversFound
from rollout.policy import Weights
from rollout.record import TeardownReport
from rollout.report import StepStatus
from rollout.show import teardown_markdown
from rollout.target import Target
from tasks.step import Artifact, Outcome, step


@step("teardown")
def tear_down_rollout(
    target: Target, instance: str, weights: Weights, owned: frozenset[tuple[str, str]], deadline_s: float
) -> Outcome[TeardownReport]:
    """Delete in reverse order, then take inventory. `owned` adds to what the bucket's records say was created."""
    logger = get_run_logger()
    report = tear_down(
        target,
        instance,
        weights=weights,
        owned=owned | RecordStore(target).owned(),
        deadline_s=deadline_s,
        on_progress=lambda part: logger.info("%s", part),
    )
    return Outcome(
        value=report,
        summary=f"{len(report.removed)} things removed, {len(report.kept)} kept, {len(report.left)} left",
        status=StepStatus.DONE if report.removed else StepStatus.UNCHANGED,
        changes=report.removed,
        data={"kept": [c.model_dump(mode="json") for c in report.kept]},
        artifact=Artifact("teardown", f"Teardown of {instance}: inventory", markdown=teardown_markdown(report)),
    )


def require_nothing_left(report: TeardownReport) -> None:
    """Raise `LeftoversFound` naming what should be gone and is not."""
    if report.left:
        raise LeftoversFound(
            "still there: "
            + ", ".join(f"{change.kind} {change.name} ({change.detail})" for change in report.left)
            + ".",
            where="teardown",
            resolution="Run the teardown again; what stays needs a person.",
        )
