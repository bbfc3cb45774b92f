"""Profiles as text, and from text: the quickstart's table, gcloud's CSV (written and read), JSON and YAML."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Any

import yaml

from rollout.accelerators import ACCELERATORS
from rollout.cost import DEFAULT_OUTPUT_TO_INPUT_RATIO, Price, PricingModel, token_cost
from rollout.errors import BadInput
from rollout.profiles import (
    BENCHMARK_COLUMNS,
    OUR_BENCHMARK_COLUMNS,
    OUR_COLUMNS,
    PROFILE_COLUMNS,
    Column,
    Evidence,
    Gap,
    LoadPoint,
    Profile,
    ProfileList,
    Row,
    Source,
    UseCase,
)
from rollout.recommend import Loser, Recommendation

LIST_COLUMNS = (*PROFILE_COLUMNS, *OUR_COLUMNS)
BENCHMARK_LIST_COLUMNS = (*BENCHMARK_COLUMNS, *OUR_BENCHMARK_COLUMNS)


class Format(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    YAML = "yaml"


_GCLOUD_NAMES = {"profile": Format.TABLE, "csvprofile": Format.CSV}

_PRICING_NAMES = {"1-year-cud": PricingModel.COMMITMENT_1Y, "3-years-cud": PricingModel.COMMITMENT_3Y}


def format_named(name: str) -> Format:
    """By our name or gcloud's (`profile`, `csvprofile`)."""
    try:
        return _GCLOUD_NAMES.get(name) or Format(name)
    except ValueError:
        known = ", ".join((*Format, *_GCLOUD_NAMES))
        raise BadInput(f"there is no format {name!r}.", where="--format", resolution=f"Known are {known}.") from None


def pricing_named(name: str) -> PricingModel:
    """By our name or gcloud's (`1-year-cud`, `3-years-cud`)."""
    try:
        return _PRICING_NAMES.get(name) or PricingModel(name)
    except ValueError:
        known = ", ".join((*PricingModel, *_PRICING_NAMES))
        raise BadInput(
            f"there is no pricing model {name!r}.", where="--pricing-model", resolution=f"Known are {known}."
        ) from None


def render_rows(rows: Sequence[Row], columns: Sequence[Column], form: Format) -> str:
    """The rows in that form, with a line break at the end."""
    if form is Format.TABLE:
        return text_table([column.header for column in columns], [[c.text(row) for c in columns] for row in rows])
    if form is Format.CSV:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(column.csv_header for column in columns)
        writer.writerows([column.text(row) for column in columns] for row in rows)
        return out.getvalue()
    return render_data([{column.key: column.value(row) for column in columns} for row in rows], form)


def render_data(data: Sequence[Mapping[str, object]], form: Format) -> str:
    """Plain records in any form; all records have the keys of the first."""
    if form is Format.JSON:
        return json.dumps(list(data), indent=2, ensure_ascii=False) + "\n"
    if form is Format.YAML:
        return yaml.safe_dump([dict(each) for each in data], sort_keys=False, allow_unicode=True, width=120)
    header = list(data[0]) if data else []
    cells = [["" if value is None else str(value) for value in each.values()] for each in data]
    if form is Format.TABLE:
        return text_table([name.replace("_", " ").title() for name in header], cells)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *cells])
    return out.getvalue()


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two blanks apart, as gcloud prints them."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows))
    return "".join(line.rstrip() + "\n" for line in lines)


def render_gaps(found: Sequence[Gap]) -> str:
    """Predictions beside measurements, one line for each figure; empty without any."""
    rows = [
        [
            gap.prediction.model,
            f"{gap.prediction.accelerator_count} x {gap.prediction.accelerator}",
            label,
            f"{predicted:.4g}",
            f"{measured:.4g}",
            f"{share:+.0%}",
            gap.workload,
            _named(gap.prediction),
            _named(gap.measurement),
        ]
        for gap in found
        for label, predicted, measured, share in gap.differences()
    ]
    compared = ("Predicted", "Measured", "Difference", "Workload", "Prediction", "Measurement")
    return text_table(["Model", "Accelerator", "Figure", *compared], rows) if rows else ""


def render_use_cases(found: Sequence[UseCase], form: Format) -> str:
    """The quickstart's table of use cases: input and output tokens, ratio, description."""
    rows = [
        {
            "use_case": each.name,
            "input_tokens": each.input_tokens,
            "output_tokens": each.output_tokens,
            "ratio": each.ratio,
            "description": each.description,
        }
        for each in found
    ]
    return render_data(rows, form)


def render_list(found: ProfileList, form: Format, columns: Sequence[Column] = LIST_COLUMNS) -> str:
    """Rows, and predictions beside measurements: below a table, in JSON and YAML as `gaps` of the prediction.

    A CSV is gcloud's, and holds the rows alone. The notes are the caller's to show (`render_notes`): no format has a
    place for them that a program would not trip over.
    """
    if form is Format.CSV:
        return render_rows(found.rows, columns, form)
    if form is Format.TABLE:
        text = render_rows(found.rows, columns, form) if found.rows else ""
        return "\n".join(part for part in (text, render_gaps(found.gaps)) if part)
    return render_data(
        [
            {column.key: column.value(row) for column in columns} | {"gaps": _gaps_of(row.profile, found.gaps)}
            for row in found.rows
        ],
        form,
    )


def _gaps_of(prediction: Profile, gaps: Sequence[Gap]) -> list[dict[str, object]]:
    return [
        {
            "figure": label,
            "predicted": predicted,
            "measured": measured,
            "difference": round(share, 4),
            "workload": gap.workload,
            "measurement": _named(gap.measurement),
        }
        for gap in gaps
        if gap.prediction == prediction
        for label, predicted, measured, share in gap.differences()
    ]


def render_notes(notes: Iterable[str]) -> str:
    """A line for each note, without repetitions; empty without any."""
    return "".join(f"Note: {note}\n" for note in dict.fromkeys(notes))


def render_recommendation(found: Recommendation, form: Format) -> str:
    """Options, best first, then the losers with their reasons: below a table, elsewhere as rows without a rank."""
    rows: list[dict[str, object]] = [
        {
            "rank": rank,
            "model": each.profile.model,
            "accelerator": f"{each.profile.accelerator_count} x {each.profile.accelerator}",
            "replicas": each.replicas,
            "usd_per_hour": _rounded(each.usd_per_hour, 2),
            "usd_per_million_input_tokens": _rounded(each.usd_per_million_input_tokens, 3),
            "usd_per_million_output_tokens": _rounded(each.usd_per_million_output_tokens, 3),
            "output_tokens_per_s": round(each.point.output_tokens_per_s * each.replicas),
            "ntpot_ms": _rounded(each.point.ntpot_ms, 1),
            "ttft_ms": _rounded(each.point.ttft_ms, 1),
            "headroom": f"{each.headroom:.0%}",
            "source": each.profile.source.name,
            "date": each.profile.source.as_of.isoformat() if each.profile.source.as_of else None,
        }
        for rank, each in enumerate(found.options, 1)
    ]
    if form is not Format.TABLE:
        return render_data([*({**row, "reason": None} for row in rows), *map(_loser_row, found.losers)], form)
    for row in rows:
        row["usd_per_hour"] = "no price" if row["usd_per_hour"] is None else row["usd_per_hour"]
    losers = "".join(
        f"Not chosen: {each.profile.model} on {each.profile.accelerator_count} x {each.profile.accelerator}"
        f" ({_named(each.profile)}): {each.reason}\n"
        for each in found.losers
    )
    return "\n".join(part for part in (render_data(rows, form) if rows else "", losers) if part)


def _loser_row(loser: Loser) -> dict[str, object]:
    profile = loser.profile
    unknown = ("replicas", "usd_per_hour", "usd_per_million_input_tokens", "usd_per_million_output_tokens")
    figures = ("output_tokens_per_s", "ntpot_ms", "ttft_ms", "headroom")
    return {
        "rank": None,
        "model": profile.model,
        "accelerator": f"{profile.accelerator_count} x {profile.accelerator}",
        **dict.fromkeys((*unknown, *figures)),
        "source": profile.source.name,
        "date": profile.source.as_of.isoformat() if profile.source.as_of else None,
        "reason": loser.reason,
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _named(profile: Profile) -> str:
    day = profile.source.as_of.isoformat() if profile.source.as_of else ""
    return ", ".join(filter(None, (profile.source.name, profile.model_server_version, day)))


# --- Reading ---------------------------------------------------------------------------------------------------------

_REQUIRED = ("Accelerator Type", "Model Name", "Model Server Name", "Output Tokens/s")


def read_benchmarks_csv(text: str, *, name: str) -> tuple[Profile, ...]:
    """Profiles from the CSV of `benchmarks list`, ours or gcloud's: one for each server on each instance type.

    gcloud's CSV does not say with which pricing model it was made: those profiles state none. Raises BadInput with the
    number of the line that cannot be read.
    """
    reader = csv.DictReader(io.StringIO(text))
    missing = [column for column in _REQUIRED if column not in (reader.fieldnames or ())]
    if missing:
        raise BadInput(
            f"no column {', '.join(map(repr, missing))}.",
            where=name,
            resolution="Save it with: gcloud container ai profiles benchmarks list … > FILE",
        )
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for number, line in enumerate(reader, 2):
        if None in line.values() or None in line:
            raise BadInput(f"line {number} does not have the header's columns.", where=name)
        row = {column: value.strip() for column, value in line.items()}
        groups.setdefault(tuple(row.get(column, "") for column in _IDENTITY), []).append(row | {"": str(number)})
    return tuple(_profile_of(rows, name) for rows in groups.values())


_IDENTITY = (
    *("Instance Type", "Accelerator Type", "Model Name", "Model Server Name", "Model Server Version"),
    *("Accelerator Count", "Use Case", "Serving Stack", "Pricing Model", "Evidence", "Source", "Date"),
)

_POINT_COLUMNS = {
    "output_tokens_per_s": "Output Tokens/s",
    "ntpot_ms": "NTPOT (ms)",
    "ttft_ms": "TTFT (ms)",
    "itl_ms": "ITL (ms)",
    "requests_per_s": "QPS",
    "input_tokens_per_s": "Input Tokens/s",
    "running_requests": "Running Requests",
    "usd_per_million_input_tokens": "Cost/M Input Tokens",
    "usd_per_million_output_tokens": "Cost/M Output Tokens",
}


def _profile_of(rows: Sequence[Mapping[str, str]], name: str) -> Profile:
    first = rows[0]
    instance, accelerator = first.get("Instance Type", ""), first["Accelerator Type"]

    def stated(column: str) -> str | None:
        value = first.get(column, "")
        return None if value in ("", "N/A") else value

    written, pricing_text, day = stated("Evidence"), stated("Pricing Model"), stated("Date")
    points = tuple(_point_of(row, name) for row in rows)
    return Profile(
        model=first["Model Name"],
        model_server=first["Model Server Name"],
        model_server_version=stated("Model Server Version") or "",
        accelerator=accelerator,
        accelerator_count=int(stated("Accelerator Count") or accelerators_of(instance, accelerator)),
        instance_type=instance,
        serving_stack=stated("Serving Stack"),
        use_case=stated("Use Case"),
        pricing_model=pricing_named(pricing_text) if pricing_text else None,
        points=points,
        source=Source(
            name=stated("Source") or name,
            evidence=Evidence(written) if written else Evidence.PREDICTION,
            as_of=date.fromisoformat(day) if day else None,
        ),
    )


def _point_of(row: Mapping[str, str], name: str) -> LoadPoint:
    values: dict[str, float] = {}
    for field, column in _POINT_COLUMNS.items():
        text = row.get(column, "")
        if text in ("", "N/A"):
            continue
        try:
            values[field] = float(text)
        except ValueError:
            raise BadInput(f"line {row['']}: {column} is {text!r}, not a number.", where=name) from None
    if "output_tokens_per_s" not in values:
        raise BadInput(f"line {row['']}: Output Tokens/s is missing.", where=name)
    return LoadPoint.model_validate(values)


def accelerators_of(instance: str, accelerator: str) -> int:
    """How many accelerators an instance type has; 1 where it is not known."""
    known = ACCELERATORS.get(accelerator)
    return next((m.accelerators for m in known.machines if m.type == instance), 1) if known else 1


def read_inference_perf(
    reports: Mapping[str, Mapping[str, Any]],
    *,
    name: str,
    model: str,
    accelerator: str,
    accelerator_count: int = 1,
    price: Price | None = None,
    pricing_model: PricingModel = PricingModel.ON_DEMAND,
    output_to_input_ratio: float = DEFAULT_OUTPUT_TO_INPUT_RATIO,
) -> Profile:
    """A profile from inference-perf's stage reports (file name -> content), each one load point.

    The reports name neither model nor accelerator; `pricing_model` is that of `price`. Raises BadInput for a report
    without successful requests, which would have no latency.
    """
    points = [
        _inference_perf_point(report, file, accelerator_count, price, output_to_input_ratio)
        for file, report in reports.items()
    ]
    if not points:
        raise BadInput(
            "no stage report.", where=name, resolution="inference-perf writes stage_<n>_lifecycle_metrics.json files."
        )
    return Profile(
        model=model,
        accelerator=accelerator,
        accelerator_count=accelerator_count,
        points=tuple(points),
        pricing_model=pricing_model if price else None,
        source=Source(name=name, evidence=Evidence.MEASUREMENT),
    )


def _inference_perf_point(
    report: Mapping[str, Any], file: str, gpus: int, price: Price | None, ratio: float
) -> LoadPoint:
    successes = report.get("successes") or {}
    throughput = successes.get("throughput") or {}
    latency = successes.get("latency") or {}
    if not successes.get("count") or not throughput:
        raise BadInput("the stage has no successful request.", where=file)

    def median_ms(metric: str) -> float | None:
        found = latency.get(metric) or {}
        seconds = found.get("median", found.get("p50"))
        return None if seconds is None else float(seconds) * 1e3

    inputs, outputs = float(throughput["input_tokens_per_sec"]), float(throughput["output_tokens_per_sec"])
    cost = None
    if price is not None:
        cost = token_cost(
            price, gpus=gpus, input_tokens_per_s=inputs, output_tokens_per_s=outputs, output_to_input_ratio=ratio
        )
    return LoadPoint(
        requests_per_s=float(throughput["requests_per_sec"]),
        output_tokens_per_s=outputs,
        input_tokens_per_s=inputs,
        ttft_ms=median_ms("time_to_first_token"),
        ntpot_ms=median_ms("normalized_time_per_output_token"),
        itl_ms=median_ms("inter_token_latency"),
        usd_per_million_input_tokens=cost.usd_per_million_input_tokens if cost else None,
        usd_per_million_output_tokens=cost.usd_per_million_output_tokens if cost else None,
    )
