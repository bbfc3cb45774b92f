"""Keep the record of a run while it happens: locally after every step, in the bucket at every milestone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from rollout.clients.records import RecordStore, write_local
from rollout.errors import BucketNotFound, NotApproved, ObjectivesMissed, RolledBack, RolloutError
from rollout.record import RolloutReport, Verdict
from rollout.report import StepReport, utc_now
from rollout.show import report_markdown
from rollout.target import Target
from tasks.step import Artifact, Story

_VERDICTS: dict[type[BaseException], Verdict] = {
    ObjectivesMissed: Verdict.OBJECTIVES_MISSED,
    RolledBack: Verdict.ROLLED_BACK,
    NotApproved: Verdict.NOT_APPROVED,
}


class Record:
    """A report in the making."""

    def __init__(self, report: RolloutReport, target: Target, path: Path | None) -> None:
        self._report = report
        self._target = target
        self._path = path
        self._earlier = report.steps
        self._in_bucket = False
        self.story = Story(self._keep_steps, self._keep_picture)

    @property
    def report(self) -> RolloutReport:
        return self._report

    def keep(self, **fields: Any) -> None:
        """Set fields of the report, and write it to the local file."""
        elapsed_s = (utc_now() - self._report.started_at).total_seconds()
        self._report = self._report.model_copy(update={"duration_s": elapsed_s, **fields})
        if self._path is not None:
            write_local(self._report, self._path)

    def milestone(self) -> None:
        """Write the record to the bucket; where there is none (any more), the local one stands."""
        with suppress(BucketNotFound):
            RecordStore(self._target).write(self._report)
            self._in_bucket = True

    def close(self) -> None:
        """Write the verdict to the bucket if the record is there already; a failure to do so hides no other."""
        if self._in_bucket:
            try:
                self.milestone()
            except RolloutError as error:
                get_run_logger().warning("the bucket's record lacks its verdict: %s", error)

    def _keep_picture(self, key: str, png: bytes) -> None:
        """Beside the local record: `<record>-<key>.png`."""
        if self._path is not None:
            self._path.with_name(f"{self._path.stem}-{key}.png").write_bytes(png)

    def _keep_steps(self, steps: tuple[StepReport, ...]) -> None:
        self.keep(steps=self._earlier + steps)


def _of_earlier_attempt(target: Target) -> RolloutReport | None:
    if (flow_run.run_count or 0) < 2:
        return None
    with suppress(BucketNotFound):
        found = RecordStore(target).find(str(flow_run.id))
        if found is not None:
            # What the first plan set out to make, the next one finds there.
            planned = found.plan.changes if found.plan else ()
            changes = {"verdict": Verdict.RUNNING, "error": None, "intended": (*found.intended, *planned)}
            return found.model_copy(update=changes)
    return None


@contextmanager
def recorded(target: Target, report_file: str | None, *, earlier: RolloutReport | None = None) -> Iterator[Record]:
    """A record that ends with the verdict, whatever happens in between; `earlier` is continued instead of a new one.

    A run that is started again (a retry in the UI) continues its own: the record is the ledger of what it has made.
    """
    report = (
        earlier
        or _of_earlier_attempt(target)
        or RolloutReport(
            run_id=str(flow_run.id), run_url=flow_run.ui_url, started_at=flow_run.scheduled_start_time or utc_now()
        )
    )
    record = Record(report, target, Path(report_file) if report_file else None)
    try:
        yield record
    except Pause:
        # Suspended: the run waits for its approval and starts anew with the answer.
        record.keep(verdict=Verdict.WAITING)
        raise
    except BaseException as error:
        verdict = next((v for kind, v in _VERDICTS.items() if isinstance(error, kind)), Verdict.FAILED)
        record.keep(verdict=verdict, error=f"{type(error).__name__}: {error}")
        raise
    else:
        if record.report.verdict is Verdict.RUNNING and earlier is None:
            record.keep(verdict=Verdict.DONE)
        elif record.report.verdict is Verdict.RUNNING:  # a run that was killed does not end well by being removed
            record.keep(verdict=Verdict.FAILED, error=record.report.error or "its run died, and it was torn down")
    finally:
        record.close()
        Artifact("rollout-report", "The rollout, step by step", markdown=report_markdown(record.report)).publish()
