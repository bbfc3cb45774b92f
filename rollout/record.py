"""The replayable record of a rollout, and the same for people: `report.json` and a markdown page."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from rollout.benchmark import BenchmarkReport
from rollout.delivery import DeliveryReport
from rollout.errors import ExitCode
from rollout.objectives import Verdict as ObjectivesVerdict
from rollout.optimize import GeneratedManifests, ValidatedWith
from rollout.plan import RolloutPlan
from rollout.report import SCHEMA_VERSION, Action, Change, StepReport
from rollout.smoke import SmokeReport
from rollout.transfer import TransferReport
from rollout.values import Value

RECORDS_PREFIX = ".llm-rollout/records/"
"""Where a bucket keeps the records of its rollouts: JSON only, so that no model server takes them for weights."""


class Verdict(StrEnum):
    RUNNING = "running"
    """Also what a killed run leaves behind."""
    WAITING = "waiting for approval"
    DONE = "done"
    OBJECTIVES_MISSED = "objectives missed"
    FAILED = "failed"
    ROLLED_BACK = "rolled back"
    NOT_APPROVED = "not approved"


EXIT_CODES = {
    Verdict.RUNNING: ExitCode.FAILED,
    Verdict.WAITING: ExitCode.NOT_APPROVED,
    Verdict.DONE: ExitCode.DONE,
    Verdict.OBJECTIVES_MISSED: ExitCode.OBJECTIVES_MISSED,
    Verdict.FAILED: ExitCode.FAILED,
    Verdict.ROLLED_BACK: ExitCode.ROLLED_BACK,
    Verdict.NOT_APPROVED: ExitCode.NOT_APPROVED,
}


class TeardownReport(Value):
    """What teardown removed, what it kept on purpose, and what it found still there."""

    removed: tuple[Change, ...] = ()
    kept: tuple[Change, ...] = ()
    """Adopted things and, by policy, weights and bucket; `detail` says why."""
    left: tuple[Change, ...] = ()
    """The inventory: things of ours that should be gone and are not. Empty is the proof."""


class RolloutReport(Value):
    """Everything that is known of one rollout: from the pin to the proof that teardown left nothing behind."""

    schema_version: int = SCHEMA_VERSION
    run_id: str
    """The Prefect flow run."""
    run_url: str | None = None
    started_at: datetime
    duration_s: Annotated[float, Field(ge=0)] = 0.0
    verdict: Verdict = Verdict.RUNNING
    error: str | None = None
    plan: RolloutPlan | None = None
    """None when the run ended before there was a plan, and of generated manifests."""
    generated: GeneratedManifests | None = None
    """The optimised manifests that were applied, of a run of create-manifests."""
    steps: tuple[StepReport, ...] = ()
    weights: TransferReport | None = None
    startup: dict[str, Any] | None = None
    """The start-up waterfall: seconds per phase, bytes per second of loading."""
    smoke: SmokeReport | None = None
    intended: tuple[Change, ...] = ()
    """What a run without a plan (generated manifests) is about to make beyond objects that carry our labels."""
    benchmark: BenchmarkReport | None = None
    objectives: ObjectivesVerdict | None = None
    delivery: DeliveryReport | None = None
    """How the traffic moved; None for a rolling update."""
    teardown: TeardownReport | None = None

    @property
    def exit_code(self) -> ExitCode:
        return EXIT_CODES[self.verdict]

    @property
    def instance(self) -> str | None:
        """Name of the Deployment that the run is about, where it came so far."""
        about = self.plan or self.generated
        return about.serving.name if about else None

    @property
    def ran_on(self) -> ValidatedWith:
        """On which versions the server started, as far as the run came and GKE said."""
        return ValidatedWith.model_validate((self.startup or {}).get("ran_on", {}))

    @property
    def created(self) -> frozenset[tuple[str, str]]:
        """(kind, name) of everything that this rollout made, or set out to make: what teardown may remove.

        The plan counts as well as the steps, because it is written before anything changes: a run that was killed
        between making a thing and saying so still owns it.
        """
        planned = (*(self.plan.changes if self.plan else ()), *self.intended)
        reported = [change for step in self.steps for change in step.changes]
        return frozenset((c.kind, c.name) for c in (*planned, *reported) if c.action is Action.CREATED)

    @property
    def changed_nothing(self) -> bool:
        """No weight byte was sent and no object changed."""
        acted = {Action.CREATED, Action.UPDATED, Action.DELETED}
        return not any(change.action in acted for step in self.steps for change in step.changes)
