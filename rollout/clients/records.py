"""Where records live: a local file for the caller, and the bucket for everybody who comes after.

The bucket's copy is written before anything but the bucket is changed, and again at every milestone: it is the ledger
from which a teardown knows, after a crash and without the run's memory, what was created.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rollout.catalog import explain, unreadable
from rollout.clients.storage import StorageClient
from rollout.errors import BadInput
from rollout.ledger import serving_now, still_owned
from rollout.record import RECORDS_PREFIX, RolloutReport, Verdict
from rollout.target import Target

READS_AT_ONCE = 16
"""A record is a round trip of some 50 ms and 5 ms of CPU, and a plan reads all of its target: the CPU decides."""


def write_local(report: RolloutReport, path: Path) -> None:
    """Replace the file atomically: a reader sees the old record or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def read_local(path: Path) -> RolloutReport:
    """The record in that file. Raises `BadInput` for a file that is no record."""
    try:
        return RolloutReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read the record: {unreadable(error)}.",
            where=str(path),
            resolution="Give the path of a report.json.",
        ) from error
    except ValidationError as error:
        raise BadInput(f"not a record of a rollout: {explain(error)}", where=str(path)) from error


def read_folder(folder: Path) -> Iterator[RolloutReport]:
    """The records in a folder and in its folders, e.g. `out/report.json`; what is none is passed over."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        with suppress(BadInput):
            yield read_local(path)


class RecordStore:
    """The records of a target, in its bucket; other targets may keep theirs beside them."""

    def __init__(self, target: Target) -> None:
        self._storage = StorageClient(target)
        self._target = target.name

    def write(self, report: RolloutReport) -> None:
        """Keep `report`; its name sorts by time and tells the instance and the run."""
        self._storage.write_json(f"{RECORDS_PREFIX}{self._target}/{_name(report)}", report.model_dump(mode="json"))

    def read_all(self) -> Iterator[RolloutReport]:
        """All records, oldest first. A record that this version cannot read is an error, not a gap."""
        return self._read(f"{RECORDS_PREFIX}{self._target}/")

    def served_elsewhere(self) -> tuple[str, ...]:
        """`target/instance` of what other targets serve out of the same bucket, by their records."""
        targets = {name.removeprefix(RECORDS_PREFIX).partition("/")[0] for name in self._names(RECORDS_PREFIX)}
        return tuple(
            f"{target}/{instance}"
            for target in sorted(targets - {self._target})
            for instance in serving_now(self._read(f"{RECORDS_PREFIX}{target}/"))
        )

    def _names(self, prefix: str) -> list[str]:
        return [stored.name for stored in self._storage.list_objects(prefix)] if self._storage.bucket_exists() else []

    def _read(self, prefix: str) -> Iterator[RolloutReport]:
        for name, found in self._fetched(self._names(prefix)):
            try:
                yield RolloutReport.model_validate(found)
            except ValidationError as error:
                raise BadInput(
                    f"not a record that this version can read: {explain(error)}",
                    where=f"gs://{self._storage.bucket_name}/{name}",
                    resolution="Use the version of llm-rollout that wrote it, or move it away.",
                ) from error

    def _fetched(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """The objects in the order of their names; batches of them travel at once, and no more is held in memory."""
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            for first in range(0, len(names), READS_AT_ONCE):
                batch = names[first : first + READS_AT_ONCE]
                for name, found in zip(batch, threads.map(self._storage.read_json, batch), strict=True):
                    if found is not None:
                        yield name, found[0]

    def find(self, run_id: str) -> RolloutReport | None:
        """The record of a run; None if there is none, or no run is named."""
        return next((report for report in self.read_all() if run_id and report.run_id == run_id), None)

    def named(self, beginning: str) -> RolloutReport:
        """The one record with a plan whose run id begins so. Raises `BadInput` if there is none, or more than one."""
        found = [report for report in self.read_all() if report.plan and report.run_id.startswith(beginning)]
        if len(found) == 1:
            return found[0]
        raise BadInput(
            f"{len(found) or 'no'} rollouts have a run id that begins with {beginning!r}.",
            where=f"gs://{self._storage.bucket_name}",
            resolution="Take the id from `llm-rollout history`.",
        )

    def last_good(self, instance: str, repo_id: str) -> RolloutReport | None:
        """The youngest finished rollout of the same model under the same name; None if there is none."""
        good = [
            record
            for record in self.read_all()
            if record.verdict is Verdict.DONE
            and record.plan is not None
            and (record.plan.serving.name, record.plan.model.repo_id) == (instance, repo_id)
        ]
        return good[-1] if good else None

    def owned(self) -> frozenset[tuple[str, str]]:
        """(kind, name) of everything that rollouts to this target created and no teardown has removed since."""
        return still_owned(self.read_all())


def _name(report: RolloutReport) -> str:
    instance = report.instance or "no-plan"
    return f"{report.started_at:%Y%m%dT%H%M%S}-{instance}-{report.run_id}.json"
