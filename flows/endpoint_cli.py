"""`llm-rollout smoke` and `benchmark`: any OpenAI endpoint by its URL, without a target and without Prefect."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.curves_cli import DEFAULT_CURVES
from rollout.errors import ExitCode

if TYPE_CHECKING:
    from rollout.benchmark import BenchmarkReport
    from rollout.history import CurveRecord, HistoryStore
    from rollout.objectives import Objectives
    from rollout.smoke import Capabilities, SmokeResult
    from rollout.workload import Workload

UrlArgument = Annotated[
    str, typer.Argument(metavar="URL", help="Base address without /v1, e.g. http://127.0.0.1:8080.")
]
NameOption = Annotated[
    str | None, typer.Option("--model", help="Served model name; default: the only one that /v1/models names.")
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="Preset in deployments/models/, which tells what the model can do."),
]


def mount(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (smoke, benchmark):
        app.command()(command)


def smoke(url: UrlArgument, model: NameOption = None, preset: PresetOption = None) -> None:
    """Check an endpoint: health, the tutorial's question, streaming, tools, images, long context, refusals.

    Without a preset, tools, reasoning and images are reported as not applicable.
    """
    from rollout.clients.openai_api import run_smoke_suite

    report = run_smoke_suite(
        url,
        model or _only_model(url),
        _capabilities(preset),
        on_result=_show,
    )
    typer.echo(report.summary())
    raise typer.Exit(int(ExitCode.DONE if report.passed else ExitCode.FAILED))


def benchmark(
    url: UrlArgument,
    model: NameOption = None,
    workload: Annotated[
        str, typer.Option(help="quickstart, or one of its six use cases, e.g. chatbot.")
    ] = "quickstart",
    dataset: Annotated[
        Path | None, typer.Option(help='Own prompts instead: JSON lines {"prompt": …, "output_tokens": …}.')
    ] = None,
    arrivals: Annotated[str | None, typer.Option(help="poisson (independent users) or constant.")] = None,
    shared_prefix: Annotated[
        int | None, typer.Option(min=1, help="Tokens that all prompts begin with; default: nothing is shared.")
    ] = None,
    prefix_groups: Annotated[int, typer.Option(min=1, help="Different shared beginnings.")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws lengths and arrivals; default 0.")] = None,
    prompt_salt: Annotated[
        str | None, typer.Option(help="Repeats the very prompts of a report with this `prompt_salt`.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    rate: Annotated[
        list[float] | None, typer.Option("--rate", help="Fixed rate in requests/s, repeatable; default: adaptive.")
    ] = None,
    start_rate: Annotated[float, typer.Option(min=0.001, help="First rate of an adaptive sweep.")] = 1.0,
    stage_seconds: Annotated[float, typer.Option(min=0.1, help="How long each stage sends requests.")] = 30.0,
    max_stages: Annotated[int, typer.Option(min=1, max=100)] = 14,
    objectives: Annotated[
        Path | None, typer.Option(help="YAML file of objectives, as in a policy; a miss exits with 4.")
    ] = None,
    demand: Annotated[
        float | None, typer.Option(min=0.001, help="Requests/s to serve: how many replicas does it take?")
    ] = None,
    accelerator: Annotated[str, typer.Option(help="What serves, e.g. nvidia-l4: kept with the curve.")] = "",
    accelerator_count: Annotated[int, typer.Option(min=1)] = 1,
    price: Annotated[
        float | None, typer.Option("--usd-per-accelerator-hour", min=0.0001, help="For the cost of tokens.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for the curve's pictures (PNG).")] = None,
    history: Annotated[Path, typer.Option(help="Folder where curves are kept.")] = DEFAULT_CURVES,
    keep: Annotated[bool, typer.Option(help="Keep the curve for `llm-rollout curves` and `profiles`.")] = True,
    report: Annotated[Path, typer.Option(help="Where the JSON report goes.")] = Path("out/benchmark.json"),
) -> None:
    """Sweep the load on an endpoint to saturation: latencies, throughput, knee, and what follows from them."""
    from flows.requests import settings_of
    from rollout.answers import answers_of
    from rollout.benchmark import BenchmarkSpec
    from rollout.catalog import validated
    from rollout.clients.history import FolderHistory
    from rollout.clients.loadgen import describe, run_benchmark
    from rollout.cost import Price, cost_at_knee
    from rollout.history import records_of, yardstick
    from rollout.objectives import Objectives, judge
    from rollout.profile_formats import text_table
    from rollout.show import cost_sentence

    load = _workload(workload, dataset, arrivals, shared_prefix, prefix_groups, seed)
    spec = validated(
        BenchmarkSpec,
        {
            "workload": load,
            "endpoint": endpoint,
            "rates_per_s": rate or (),
            "start_rate_per_s": start_rate,
            "stage_duration_s": stage_seconds,
            "max_stages": max_stages,
            "prompt_salt": prompt_salt,
        },
        where="benchmark",
    )
    wanted = Objectives() if objectives is None else settings_of(Objectives, objectives, "objectives")
    asked = {"demand_rate_per_s": demand or wanted.demand_rate_per_s, "smoke_checks": ()}  # these are `smoke`'s
    wanted = validated(Objectives, {**wanted.model_dump(mode="json"), **asked}, where="objectives")
    _require_writable(report, *([] if pictures is None else [pictures]))
    served = model or _only_model(url)
    measured = run_benchmark(
        url, spec, model=served, on_stage=lambda stage: typer.echo(describe(stage)), objectives=wanted
    )
    hardware = {"accelerator": accelerator, "accelerator_count": accelerator_count}
    measured = measured.model_copy(update={"environment": measured.environment.model_copy(update=hardware)})
    report.write_text(measured.model_dump_json(indent=2) + "\n", encoding="utf-8")

    typer.echo("\n" + text_table(("question", "answer"), answers_of(measured, wanted).rows()), nl=False)
    cost = None
    if price is not None:
        stated = Price(usd_per_gpu_hour=price, source="stated with the question")
        cost = cost_at_knee(measured.stages, stated, gpus=accelerator_count)
    if cost is not None:
        typer.echo(cost_sentence(cost))
    for note in measured.notes:
        typer.echo(f"note: {note}")
    store = FolderHistory(history)
    earlier = records_of(store, measured.spec.workload.key)
    baseline = yardstick(earlier, measured)
    verdict = judge(wanted, measured.stages, cost=cost, baseline=baseline.report.stages if baseline else ())
    if objectives is not None:
        typer.echo(verdict.summary())
    if pictures is not None:
        _draw(measured, wanted, pictures)
    if keep:
        _keep(measured, store, earlier, good=verdict.met)
    typer.echo(f"the report is in {report}")
    if objectives is not None and not verdict.met:
        raise typer.Exit(int(ExitCode.OBJECTIVES_MISSED))


def _workload(
    name: str, dataset: Path | None, arrivals: str | None, shared: int | None, groups: int, seed: int | None
) -> Workload:
    from rollout.catalog import unreadable, validated
    from rollout.errors import BadInput
    from rollout.workload import Workload, dataset_workload, workload_named

    if dataset is None:
        chosen = workload_named(name)
    else:
        try:
            lines = dataset.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read the dataset: {unreadable(error)}.", where=str(dataset)) from error
        chosen = dataset_workload("dataset", lines)
    changes: dict[str, object] = {} if arrivals is None else {"arrivals": arrivals}
    changes |= {} if seed is None else {"seed": seed}
    changes |= {} if shared is None else {"shared_prefix": {"tokens": shared, "groups": groups}}
    return validated(Workload, {**chosen.model_dump(), **changes}, where="benchmark") if changes else chosen


def _require_writable(report: Path, *folders: Path) -> None:
    """Before a sweep of many minutes, not after it."""
    from rollout.errors import BadInput

    if report.is_dir():
        raise BadInput("this is a folder; the report is a file.", where=str(report))
    for folder in (report.parent, *folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise BadInput(f"cannot write there: {error.strerror}.", where=str(folder)) from error


def _draw(measured: BenchmarkReport, wanted: Objectives, folder: Path) -> None:
    from rollout.pictures import curve_pictures

    folder.mkdir(parents=True, exist_ok=True)
    for name, png in curve_pictures(measured.stages, title=measured.environment.model, limits=wanted.latencies).items():
        (folder / f"{name}.png").write_bytes(png)
    typer.echo(f"the pictures are in {folder}")


def _keep(measured: BenchmarkReport, store: HistoryStore, earlier: Sequence[CurveRecord], *, good: bool) -> None:
    """Keep the curve, and say how it differs from the last of the earlier ones that may be compared."""
    from rollout.history import compare, keep, record_to_keep
    from rollout.profile_formats import text_table

    record = record_to_keep(earlier, measured, good=good, run_name="llm-rollout benchmark")
    if record is None:
        return
    keep(store, record)
    comparable = [each for each in earlier if each.is_comparable_with(record)]
    if comparable:
        rows = compare(comparable[-1], record).table()
        typer.echo(f"\nagainst the curve of {comparable[-1].report.started_at:%Y-%m-%d %H:%M} UTC:")
        typer.echo(text_table(list(rows[0]), [list(row.values()) for row in rows]), nl=False)


def _show(result: SmokeResult) -> None:
    detail = " ".join(result.detail.split())
    typer.echo(f"{result.outcome.value:14} {result.name:18} {detail}\n{'':14} {result.curl}")


def _only_model(url: str) -> str:
    from rollout.clients.openai_api import OpenAiApi
    from rollout.errors import BadInput

    served = sorted(OpenAiApi(url).models())
    if len(served) != 1:
        raise BadInput(
            f"the endpoint serves {len(served)} models: {', '.join(served) or 'none'}.",
            where=url,
            resolution="Name one with --model.",
        )
    return served[0]


def _capabilities(preset: str | None) -> Capabilities:
    from rollout.catalog import load_model
    from rollout.smoke import Capabilities

    if preset is None:
        return Capabilities()
    serving = load_model(preset).serving
    # Without its config.json, a model that is served with an image limit is taken for one that sees images.
    config = {"vision_config": {"served": True}} if serving.max_images_per_prompt else {}
    return Capabilities.of(config, serving)
