"""Finish the teardown that a dead run owes, and note it in the record of that run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from rollout.clients.records import RecordStore
from rollout.clients.teardown import tear_down
from rollout.errors import BucketNotFound
from rollout.ledger import Abandoned
from rollout.policy import Weights
from rollout.record import RolloutReport, TeardownReport, Verdict
from rollout.target import Target


def sweep(
    target: Target, abandoned: Abandoned, *, deadline_s: float, on_progress: Callable[[str], None] = lambda _: None
) -> TeardownReport:
    """Tear down what `abandoned` names. Weights go only if the policy of its record says so.

    Idempotent; `left` of the report names what should be gone and is not.
    """
    store = RecordStore(target)
    records = list(store.read_all())
    record = next((r for r in reversed(records) if abandoned.run_id is not None and r.run_id == abandoned.run_id), None)
    plan = record.plan if record else None
    teardown = tear_down(
        target,
        abandoned.instance,
        weights=plan.policy.weights if plan else Weights.KEEP,
        owned=store.owned(),
        deadline_s=deadline_s,
        on_progress=on_progress,
    )
    if record is not None:
        _note(store, record, abandoned, teardown)
    return teardown


def _note(store: RecordStore, record: RolloutReport, abandoned: Abandoned, teardown: TeardownReport) -> None:
    changes: dict[str, object] = {"teardown": teardown}
    if record.verdict is Verdict.RUNNING:
        changes |= {"verdict": Verdict.FAILED, "error": record.error or f"swept: {abandoned.why.value}"}
    with contextlib.suppress(BucketNotFound):  # by policy, it may have gone with the weights
        store.write(record.model_copy(update=changes))
