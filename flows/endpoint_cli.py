"""`llm-rollout smoke` and `benchmark`: any OpenAI endpoint by its URL, without a target and without Prefect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rollout.errors import ExitCode

if TYPE_CHECKING:
    from rollout.smoke import Capabilities, SmokeResult

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
    rate: Annotated[
        list[float] | None, typer.Option("--rate", help="Fixed rate in requests/s, repeatable; default: adaptive.")
    ] = None,
    stage_seconds: Annotated[float, typer.Option(min=0.1, help="How long each stage sends requests.")] = 30.0,
    max_stages: Annotated[int, typer.Option(min=1, max=100)] = 14,
    report: Annotated[Path, typer.Option(help="Where the JSON report goes.")] = Path("out/benchmark.json"),
) -> None:
    """Sweep the load on an endpoint to saturation: latencies, throughput, knee."""
    from rollout.benchmark import BenchmarkSpec
    from rollout.clients.loadgen import describe, run_benchmark
    from rollout.show import curve_summary
    from rollout.workload import workload_named

    spec = BenchmarkSpec(
        workload=workload_named(workload),
        rates_per_s=tuple(rate or ()),
        stage_duration_s=stage_seconds,
        max_stages=max_stages,
    )
    measured = run_benchmark(
        url, spec, model=model or _only_model(url), on_stage=lambda stage: typer.echo(describe(stage))
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(measured.model_dump_json(indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{curve_summary(measured)}\nthe report is in {report}")


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
