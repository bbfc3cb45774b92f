"""Every measured curve, kept and compared: is this rollout better than the last one, and what changed?

Records are JSON files under keys that sort by workload, then by date. Pure: where they are kept is a `HistoryStore`
(`rollout.clients.history` has a folder and a bucket).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from pydantic import ValidationError

from rollout.benchmark import BenchmarkReport, Environment
from rollout.catalog import explain
from rollout.curve import build_curve, interpolate, operating_rate
from rollout.stage import LatencyMetric, Percentile
from rollout.values import Value

log = logging.getLogger(__name__)


class CurveRecord(Value):
    """A measured curve and what it was measured on."""

    report: BenchmarkReport
    good: bool = False
    """The rollout met its objectives: it may serve as the yardstick of the next one."""
    run_name: str = ""

    @property
    def environment(self) -> Environment:
        return self.report.environment

    def is_comparable_with(self, other: CurveRecord) -> bool:
        """Same load, model name and accelerators; commit, image and flags may differ: that is what is compared."""

        def what(record: CurveRecord) -> tuple[object, ...]:
            environment = record.environment
            load = record.report.spec.workload.key
            return load, environment.model, environment.accelerator, environment.accelerator_count

        return what(self) == what(other)

    @property
    def key(self) -> str:
        """`<workload key>/<UTC time>-<environment key>.json`: one prefix holds all that may be compared."""
        stamp = self.report.started_at.strftime("%Y%m%dT%H%M%SZ")
        return f"{self.report.spec.workload.key}/{stamp}-{self.environment.key}.json"


class HistoryStore(Protocol):
    """Where records live."""

    def read(self, key: str) -> Mapping[str, Any]: ...

    def write(self, key: str, value: Mapping[str, Any]) -> None: ...

    def keys(self, prefix: str) -> Sequence[str]: ...


def keep(store: HistoryStore, record: CurveRecord) -> str:
    """Store a record and return its key."""
    store.write(record.key, record.model_dump(mode="json"))
    return record.key


def record_to_keep(
    records: Sequence[CurveRecord], report: BenchmarkReport, *, good: bool, run_name: str
) -> CurveRecord | None:
    """What a verdict on `report` adds to `records`, or changes in them; None if they say it already.

    A rerun hands on stages that are kept: the same curve is one record, and the last verdict on it counts.
    """
    known = next((record for record in records if record.report.stages == report.stages), None)
    if known is None:
        return CurveRecord(report=report, good=good, run_name=run_name)
    return None if known.good == good else known.model_copy(update={"good": good})


def records_of(store: HistoryStore, workload_key: str | None = None, *, model: str | None = None) -> list[CurveRecord]:
    """All records of a workload (None: of all), oldest first; of one served model, if given."""
    prefix = "" if workload_key is None else f"{workload_key}/"
    keys = (key for key in store.keys(prefix) if key.endswith(".json"))
    records = [record for key in keys if (record := _record(store, key)) is not None]
    chosen = (record for record in records if model is None or record.environment.model == model)
    return sorted(chosen, key=lambda record: (record.report.started_at, record.key))


def _record(store: HistoryStore, key: str) -> CurveRecord | None:
    """None, with a warning, for a record of another version: it must not fail the rollout that seeks a yardstick."""
    try:
        return CurveRecord.model_validate(store.read(key))
    except ValidationError as error:
        log.warning("the kept curve %s cannot be read by this version and is left out: %s", key, explain(error))
        return None


def last_good(records: Sequence[CurveRecord], *, before: datetime | None = None) -> CurveRecord | None:
    """The youngest good record; the yardstick for `no worse than the last good rollout`."""
    candidates = [r for r in records if r.good and (before is None or r.report.started_at < before)]
    return max(candidates, key=lambda record: record.report.started_at, default=None)


def yardstick(records: Sequence[CurveRecord], report: BenchmarkReport) -> CurveRecord | None:
    """The last good curve before `report` that it may be compared with."""
    measured = CurveRecord(report=report)
    others = [each for each in records if each.is_comparable_with(measured) and each.report.stages != report.stages]
    return last_good(others, before=report.started_at)


class Difference(Value):
    """One figure in two runs."""

    name: str
    before: float
    after: float
    unit: str
    higher_is_better: bool

    @property
    def change(self) -> float:
        """Relative change; positive is better. NaN if it cannot be told."""
        if not self.before or math.isnan(self.before) or math.isnan(self.after):
            return math.nan
        change = (self.after - self.before) / self.before
        return change if self.higher_is_better else -change


class Comparison(Value):
    """Two runs side by side."""

    before: str
    """Key of the record."""
    after: str
    changed: dict[str, tuple[str, str]]
    """What differs in the environment: model commit, image, flags, accelerator."""
    differences: tuple[Difference, ...]

    def table(self) -> list[dict[str, str]]:
        """Rows for a table artifact."""
        return [
            {
                "figure": row.name,
                "before": f"{row.before:.4g} {row.unit}",
                "after": f"{row.after:.4g} {row.unit}",
                "change": "–" if math.isnan(row.change) else f"{row.change:+.1%} {_word(row.change)}",
            }
            for row in self.differences
        ]


def _word(change: float) -> str:
    return "better" if change > 0 else "worse" if change < 0 else ""


def compare(before: CurveRecord, after: CurveRecord) -> Comparison:
    """Knee, saturated throughput, and latencies at 80 % of the earlier run's knee."""
    old, new = before.report, after.report
    rate = operating_rate(old.stages)
    differences = [
        Difference(name="knee", before=_knee(old), after=_knee(new), unit="requests/s", higher_is_better=True),
        Difference(
            name="output tokens/s at saturation",
            before=old.curve.max_output_tokens_per_s,
            after=new.curve.max_output_tokens_per_s,
            unit="tokens/s",
            higher_is_better=True,
        ),
    ]
    for metric in (LatencyMetric.TTFT, LatencyMetric.ITL, LatencyMetric.NTPOT):
        for percentile in (Percentile.P50, Percentile.P99):
            differences.append(
                Difference(
                    name=f"{metric.value.upper()} {percentile.value} at {rate:.3g} requests/s",
                    before=interpolate(old.stages, rate, metric, percentile) * 1e3,
                    after=interpolate(new.stages, rate, metric, percentile) * 1e3,
                    unit="ms",
                    higher_is_better=False,
                )
            )
    return Comparison(
        before=before.key,
        after=after.key,
        changed=_changed(before.environment, after.environment),
        differences=tuple(differences),
    )


def _knee(report: BenchmarkReport) -> float:
    curve = build_curve(report.stages, resolution=report.spec.resolution)
    return curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s


def _changed(before: Environment, after: Environment) -> dict[str, tuple[str, str]]:
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {name: (_text(old[name]), _text(new[name])) for name in old if old[name] != new[name]}


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
