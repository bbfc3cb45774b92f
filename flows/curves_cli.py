"""`llm-rollout curves`: the kept load sweeps, two of them side by side, and what they say over time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rollout.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from rollout.history import CurveRecord

curves_app = typer.Typer(
    help="Kept load sweeps: list them, compare two, and see whether a server gets slower over time.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DEFAULT_CURVES = Path("out/curves")
"""Where `llm-rollout benchmark URL` keeps them; `llm-rollout profiles` finds them there, too."""

HistoryOption = Annotated[Path, typer.Option("--history", help="Folder of kept curves; without --target.")]
TargetOption = Annotated[
    str | None, typer.Option("--target", "-t", help="Curves of rollouts to this environment, from its bucket.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Served model name.")]
WorkloadOption = Annotated[str | None, typer.Option("--workload", help="Name of the workload, e.g. chatbot.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


@curves_app.command("list")
def list_curves(
    history: HistoryOption = DEFAULT_CURVES,
    target: TargetOption = None,
    model: ModelOption = None,
    workload: WorkloadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Every kept curve, oldest first; its time is its name for `compare`."""
    records = _records(history, target, model, workload)
    rows = [
        {
            "time": _time(record),
            "model": record.environment.model,
            "commit": (record.environment.commit_sha or "")[:10],
            "workload": record.report.spec.workload.name,
            "accelerator": _accelerator(record),
            "knee": _knee(record),
            "tokens/s": f"{record.report.curve.max_output_tokens_per_s:.0f}",
            "good": "yes" if record.good else "no",
            "run": record.run_name,
        }
        for record in records
    ]
    _print(rows, as_json)


@curves_app.command("compare")
def compare_curves(
    before: Annotated[str | None, typer.Argument(help="Time of the earlier curve; default: the last but one.")] = None,
    after: Annotated[str | None, typer.Argument(help="Time of the later curve; default: the last.")] = None,
    history: HistoryOption = DEFAULT_CURVES,
    target: TargetOption = None,
    model: ModelOption = None,
    workload: WorkloadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Two curves side by side: knee, throughput, latencies, and what differs in how they were served."""
    from rollout.history import compare

    records = _records(history, target, model, workload)
    later = _chosen(records, after) if after else records[-1] if records else None
    if later is None:
        raise BadInput("there is no curve to compare.", where=_where(history, target), resolution=_MEASURE)
    others = [each for each in records if each is not later and each.is_comparable_with(later)]
    earlier = _chosen(records, before) if before else others[-1] if others else None
    if earlier is None:
        raise BadInput(
            f"no other curve has the workload, model and accelerator of {_time(later)}.",
            where=_where(history, target),
            resolution=_MEASURE,
        )
    if not earlier.is_comparable_with(later):
        raise BadInput(
            f"{_time(earlier)} and {_time(later)} differ in workload, model or accelerator, so nothing follows from"
            " their difference.",
            where="curves compare",
            resolution="`llm-rollout curves list` shows which belong together.",
        )
    comparison = compare(earlier, later)
    if as_json:
        typer.echo(comparison.model_dump_json(indent=2))
        return
    _print(comparison.table(), as_json=False)
    for name, (old, new) in comparison.changed.items():
        typer.echo(f"{name}: {old or '–'} -> {new or '–'}")


@curves_app.command("trend")
def trend_of_curves(
    history: HistoryOption = DEFAULT_CURVES,
    target: TargetOption = None,
    model: ModelOption = None,
    workload: WorkloadOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether comparable curves get better or worse over time, or only vary. Exits with 4 if a figure gets worse."""
    from rollout.trend import Direction, trends

    groups: list[list[CurveRecord]] = []
    for record in _records(history, target, model, workload):
        group = next((each for each in groups if each[0].is_comparable_with(record)), None)
        if group is None:
            groups.append([record])
        else:
            group.append(record)
    if not groups:
        raise BadInput("there is no curve.", where=_where(history, target), resolution=_MEASURE)
    rows = [
        {
            "model": group[0].environment.model,
            "workload": group[0].report.spec.workload.name,
            "curves": str(len(group)),
            "figure": trend.figure,
            "first": f"{trend.first:.4g} {trend.unit}",
            "last": f"{trend.last:.4g} {trend.unit}",
            "change": f"{trend.change:+.1%}",
            "95 % interval": f"{trend.lowest:+.1%} to {trend.highest:+.1%}",
            "direction": trend.direction.value,
        }
        for group in groups
        for trend in trends(group)
    ]
    _print(rows, as_json)
    if any(row["direction"] == Direction.WORSE.value for row in rows):
        raise typer.Exit(int(ExitCode.OBJECTIVES_MISSED))


_MEASURE = "Measure one with `llm-rollout benchmark URL`, or roll out with a benchmark and name its --target."


def _records(history: Path, target: str | None, model: str | None, workload: str | None) -> list[CurveRecord]:
    from rollout.catalog import load_target
    from rollout.clients.history import BucketHistory, FolderHistory
    from rollout.history import HistoryStore, records_of

    store: HistoryStore = FolderHistory(history) if target is None else BucketHistory(load_target(target))
    records = records_of(store, model=model)
    return [each for each in records if workload in (None, each.report.spec.workload.name)]


def _chosen(records: Sequence[CurveRecord], time: str) -> CurveRecord:
    found = [record for record in records if _time(record).startswith(time)]
    if len(found) != 1:
        raise BadInput(
            f"{len(found)} curves have a time that begins with {time!r}.",
            where="curves compare",
            resolution="`llm-rollout curves list` shows their times.",
        )
    return found[0]


def _time(record: CurveRecord) -> str:
    return record.report.started_at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _accelerator(record: CurveRecord) -> str:
    environment = record.environment
    return f"{environment.accelerator_count} x {environment.accelerator}" if environment.accelerator else ""


def _knee(record: CurveRecord) -> str:
    curve = record.report.curve
    return f"{curve.knee.rate_per_s:.3g}/s" if curve.knee else f"> {curve.highest_sustained_per_s:.3g}/s"


def _where(history: Path, target: str | None) -> str:
    return f"target {target}" if target else str(history)


def _print(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    from rollout.profile_formats import text_table

    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
    elif rows:
        typer.echo(text_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows]), nl=False)
    else:
        typer.echo("no curves")
