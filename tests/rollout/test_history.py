from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from rollout.benchmark import BenchmarkSpec, Environment, benchmark_report
from rollout.clients.history import FolderHistory
from rollout.errors import BadInput, NotFound
from rollout.history import CurveRecord, compare, keep, last_good, record_to_keep, records_of, yardstick
from rollout.workload import workload_named
from tests.rollout.curves import QueueServer


class Memory:
    """A store without a place."""

    def __init__(self) -> None:
        self.values: dict[str, Mapping[str, Any]] = {}

    def read(self, key: str) -> Mapping[str, Any]:
        return self.values[key]

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        self.values[key] = value

    def keys(self, prefix: str) -> Sequence[str]:
        return [key for key in self.values if key.startswith(prefix)]


def record(day: int, *, capacity: float = 10, good: bool = True, image: str = "a", model: str = "m") -> CurveRecord:
    spec = BenchmarkSpec()
    report = benchmark_report(
        spec,
        Environment(model=model, image=image),
        QueueServer(capacity).sweep(spec),
        started_at=datetime(2026, 11, day, tzinfo=UTC),
        duration_s=60,
    )
    return CurveRecord(report=report, good=good, run_name=f"run-{day}")


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Memory | FolderHistory:
    return Memory() if request.param == "memory" else FolderHistory(tmp_path / "curves")


def test_records_come_back_whole_and_oldest_first(store: Memory | FolderHistory) -> None:
    kept = [record(3), record(1, model="other"), record(2)]
    for each in kept:
        keep(store, each)
    key = BenchmarkSpec().workload.key
    assert [each.run_name for each in records_of(store, key)] == ["run-1", "run-2", "run-3"]
    assert records_of(store, key, model="other") == [kept[1]]
    assert records_of(store, workload_named("chatbot").key) == []


def test_the_yardstick_is_the_youngest_good_record() -> None:
    records = [record(1), record(2), record(3, good=False)]
    found = last_good(records)
    assert found is not None
    assert found.run_name == "run-2"
    earlier = last_good(records, before=datetime(2026, 11, 2, tzinfo=UTC))
    assert earlier is not None
    assert earlier.run_name == "run-1"
    assert last_good([]) is None


def test_the_yardstick_of_a_report_is_a_curve_of_the_same_accelerators_before_it() -> None:
    def on(accelerator: str, day: int) -> CurveRecord:
        made = record(day)
        environment = made.environment.model_copy(update={"accelerator": accelerator})
        return made.model_copy(update={"report": made.report.model_copy(update={"environment": environment})})

    measured = on("nvidia-h100-80gb", 9).report.model_copy(update={"stages": record(9, capacity=5).report.stages})
    kept = [on("nvidia-h100-80gb", 1), on("nvidia-l4", 2), on("nvidia-h100-80gb", 20)]
    found = yardstick(kept, measured)
    assert found is not None
    assert found.run_name == "run-1"
    assert yardstick([kept[1]], measured) is None
    assert yardstick([CurveRecord(report=measured, good=True)], measured) is None, "a curve is no yardstick of itself"


def test_a_comparison_names_what_changed_and_which_figures_got_worse() -> None:
    comparison = compare(record(1, image="a"), record(2, image="b", capacity=5))
    rows = {row["figure"]: row for row in comparison.table()}
    assert comparison.changed == {"image": ("a", "b")}
    assert rows["knee"]["change"].endswith("worse")
    assert rows["knee"]["change"].startswith("-5")
    assert any(name.startswith("TTFT p99") for name in rows)


def test_equal_runs_do_not_differ() -> None:
    comparison = compare(record(1), record(2))
    assert comparison.changed == {}
    assert {row.change for row in comparison.differences} == {0.0}


def test_a_missing_curve_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such curve"):
        FolderHistory(tmp_path).read("a/b.json")


def test_a_record_of_another_version_is_left_out_and_a_broken_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderHistory(tmp_path)
    keep(store, record(1))
    store.write(f"{BenchmarkSpec().workload.key}/newer.json", {"report": {"of": "tomorrow"}})
    assert [each.run_name for each in records_of(store)] == ["run-1"]
    assert "newer.json cannot be read by this version" in caplog.text
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(BadInput, match=r"cut\.json: the kept curve cannot be read"):
        records_of(store)


def test_the_last_verdict_on_a_curve_counts(store: Memory | FolderHistory) -> None:
    """A sweep missed its objectives; they were eased, and the rerun handed on the same stages."""
    missed = record(1, good=False)
    keep(store, missed)
    rerun = missed.report.model_copy(update={"started_at": datetime(2026, 11, 2, tzinfo=UTC)})
    changed = record_to_keep([missed], rerun, good=True, run_name="run-2")
    assert changed is not None
    keep(store, changed)
    (kept,) = records_of(store, BenchmarkSpec().workload.key)
    assert (kept.good, kept.run_name) == (True, "run-1")
    assert record_to_keep([kept], rerun, good=True, run_name="run-2") is None


def test_another_curve_is_another_record() -> None:
    new = record(2, capacity=11)
    assert record_to_keep([record(1)], new.report, good=True, run_name="run-2") == new
