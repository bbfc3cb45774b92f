"""`llm-rollout profiles`: the commands of `gcloud container ai profiles`, over Google's data, our own, and files.

Without `--target` nothing is asked of any cloud: profiles come from the records under `--history`, and manifests are
rendered here. Heavy imports wait until a command runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from rollout.sources import Generator, SourceName

if TYPE_CHECKING:
    from rollout.model_facts import ModelFacts
    from rollout.optimize import GeneratedManifests, ManifestRequest, ValidatedWith
    from rollout.profiles import Profile, ProfileQuery, ProfileSource, Targets
    from rollout.target import Target

EnumT = TypeVar("EnumT", bound=StrEnum)

_SETTINGS: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None, "add_completion": False}

profiles_app = typer.Typer(
    name="profiles", help="Measured and catalogued profiles of models on accelerators.", **_SETTINGS
)
models_app = typer.Typer(help="Models that have profiles.", **_SETTINGS)
servers_app = typer.Typer(help="Model servers that have profiles.", **_SETTINGS)
versions_app = typer.Typer(help="Versions of a model server that have profiles.", **_SETTINGS)
benchmarks_app = typer.Typer(help="Every load point of the profiles.", **_SETTINGS)
use_cases_app = typer.Typer(help="Workloads that profiles are measured with.", **_SETTINGS)
stacks_app = typer.Typer(help="Serving stacks.", **_SETTINGS)
manifests_app = typer.Typer(help="Optimised Kubernetes manifests.", **_SETTINGS)
dashboards_app = typer.Typer(help="Dashboards of vLLM's metrics.", **_SETTINGS)
for _name, _group in (
    ("models", models_app),
    ("model-servers", servers_app),
    ("model-server-versions", versions_app),
    ("benchmarks", benchmarks_app),
    ("use-cases", use_cases_app),
    ("serving-stacks", stacks_app),
    ("manifests", manifests_app),
    ("dashboards", dashboards_app),
):
    profiles_app.add_typer(_group, name=_name)


TargetOption = Annotated[
    str | None, typer.Option("--target", "-t", help="Environment in deployments/targets/, or a YAML file.")
]
SourceOption = Annotated[
    list[SourceName] | None,
    typer.Option("--source", help="May be repeated. Default: history, and google when there is a --target."),
]
FileOption = Annotated[
    list[Path] | None,
    typer.Option("--file", help="CSV of `benchmarks list`, our JSON, or inference-perf's folder."),
]
HistoryOption = Annotated[Path, typer.Option("--history", help="Folder with records of rollouts.")]
FormatOption = Annotated[str, typer.Option("--format", help="table, csv, json or yaml; gcloud's profile, csvprofile.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model, e.g. openai/gpt-oss-20b.")]
RequiredModel = Annotated[str, typer.Option("--model", help="The model, e.g. openai/gpt-oss-20b.")]
ServerOption = Annotated[str | None, typer.Option("--model-server", help="The model server, e.g. vllm.")]
RequiredServer = Annotated[str, typer.Option("--model-server", help="The model server, e.g. vllm.")]
VersionOption = Annotated[
    str | None,
    typer.Option(
        "--model-server-version", help="The server's version; default: all that are known (gcloud's default: latest)."
    ),
]
AcceleratorOption = Annotated[str | None, typer.Option("--accelerator-type", help="E.g. nvidia-h100-80gb.")]
CountOption = Annotated[int | None, typer.Option("--accelerator-count", min=1, help="Accelerators of one replica.")]
PriceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--usd-per-accelerator-hour",
        help="ACCELERATOR=USD, what you pay with its share of the machine; before list prices. May be repeated.",
    ),
]
InstanceOption = Annotated[str | None, typer.Option("--instance-type", help="E.g. a3-highgpu-1g.")]
PricingOption = Annotated[str, typer.Option("--pricing-model", help="on-demand, spot, 1-year-cud or 3-years-cud.")]
UseCaseOption = Annotated[str | None, typer.Option("--use-case", help="A name of `use-cases list`.")]
StackOption = Annotated[str | None, typer.Option("--serving-stack", help="vllm or llm-d.")]
StackVersionOption = Annotated[str | None, typer.Option("--serving-stack-version")]
TtftOption = Annotated[float | None, typer.Option("--target-ttft-milliseconds", help="P50 time to the first token.")]
NtpotOption = Annotated[
    float | None, typer.Option("--target-ntpot-milliseconds", help="P50 request latency / output tokens.")
]
ItlOption = Annotated[float | None, typer.Option("--target-itl-milliseconds", help="P50 time between tokens.")]
InputCostOption = Annotated[float | None, typer.Option("--target-cost-per-million-input-tokens", help="USD.")]
OutputCostOption = Annotated[float | None, typer.Option("--target-cost-per-million-output-tokens", help="USD.")]
RatioOption = Annotated[
    float, typer.Option("--output-input-cost-ratio", help="What an output token costs in input tokens.")
]
SortOption = Annotated[
    str, typer.Option("--sort-by", help="Column keys with commas between; ~ before a key sorts downwards.")
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many rows.")]

DEFAULT_HISTORY = Path("out")
ON_DEMAND = "on-demand"


@models_app.command("list")
def list_models(
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """Models that the sources know."""
    _print_names_of(_sources(target, source, file, history), "model", lambda each: each.models(), output_format)


@servers_app.command("list")
def list_model_servers(
    model: RequiredModel,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """Model servers of a model."""
    found = _sources(target, source, file, history)
    _print_names_of(found, "model_server", lambda each: each.model_servers(model), output_format)


@versions_app.command("list")
def list_model_server_versions(
    model: RequiredModel,
    model_server: RequiredServer,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """Versions of a model server for a model."""
    found = _sources(target, source, file, history)
    _print_names_of(
        found, "model_server_version", lambda each: each.model_server_versions(model, model_server), output_format
    )


@profiles_app.command("list")
def list_profiles(
    model: ModelOption = None,
    model_server: ServerOption = None,
    model_server_version: VersionOption = None,
    accelerator_type: AcceleratorOption = None,
    accelerator_count: CountOption = None,
    instance_type: InstanceOption = None,
    usd_per_accelerator_hour: PriceOption = None,
    pricing_model: PricingOption = ON_DEMAND,
    use_case: UseCaseOption = None,
    serving_stack: StackOption = None,
    serving_stack_version: StackVersionOption = None,
    target_ttft_milliseconds: TtftOption = None,
    target_ntpot_milliseconds: NtpotOption = None,
    target_itl_milliseconds: ItlOption = None,
    target_cost_per_million_input_tokens: InputCostOption = None,
    target_cost_per_million_output_tokens: OutputCostOption = None,
    target_input_length: Annotated[int | None, typer.Option(help="Mean input tokens, within 20 %.")] = None,
    target_output_length: Annotated[int | None, typer.Option(help="Mean output tokens, within 20 %.")] = None,
    output_input_cost_ratio: RatioOption = 4.0,
    sort_by: SortOption = "usd_per_million_output_tokens",
    limit: LimitOption = None,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """Profiles at saturation, or at the highest throughput within the latency targets."""
    from rollout.profile_formats import format_named, pricing_named, render_list
    from rollout.profiles import ProfileQuery, ask, select

    query = ProfileQuery(
        model=model,
        model_server=model_server,
        model_server_version=model_server_version,
        accelerator=accelerator_type,
        accelerator_count=accelerator_count,
        instance_type=instance_type,
        usd_per_accelerator_hour=_stated_prices(usd_per_accelerator_hour),
        pricing_model=pricing_named(pricing_model),
        output_to_input_ratio=output_input_cost_ratio,
        use_case=use_case,
        serving_stack=serving_stack,
        serving_stack_version=serving_stack_version,
        input_length=target_input_length,
        output_length=target_output_length,
        targets=_targets(target_ttft_milliseconds, target_ntpot_milliseconds, target_itl_milliseconds),
        max_usd_per_million_input_tokens=target_cost_per_million_input_tokens,
        max_usd_per_million_output_tokens=target_cost_per_million_output_tokens,
        sort_by=tuple(filter(None, sort_by.split(","))),
        limit=limit,
    )
    form = format_named(output_format)
    found = select(ask(_sources(target, source, file, history, query), query), query)
    _print_notes(found.notes)
    typer.echo(render_list(found, form), nl=False)


@benchmarks_app.command("list")
def list_benchmarks(
    model: ModelOption = None,
    model_server: ServerOption = None,
    model_server_version: VersionOption = None,
    accelerator_type: AcceleratorOption = None,
    accelerator_count: CountOption = None,
    instance_type: InstanceOption = None,
    usd_per_accelerator_hour: PriceOption = None,
    pricing_model: PricingOption = ON_DEMAND,
    use_case: UseCaseOption = None,
    serving_stack: StackOption = None,
    serving_stack_version: StackVersionOption = None,
    output_input_cost_ratio: RatioOption = 4.0,
    limit: LimitOption = None,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "csv",
) -> None:
    """Every load point of the matching profiles; CSV unless told otherwise."""
    from rollout.profile_formats import BENCHMARK_LIST_COLUMNS, format_named, pricing_named, render_list
    from rollout.profiles import ProfileQuery, ask, select

    query = ProfileQuery(
        model=model,
        model_server=model_server,
        model_server_version=model_server_version,
        accelerator=accelerator_type,
        accelerator_count=accelerator_count,
        instance_type=instance_type,
        usd_per_accelerator_hour=_stated_prices(usd_per_accelerator_hour),
        pricing_model=pricing_named(pricing_model),
        output_to_input_ratio=output_input_cost_ratio,
        use_case=use_case,
        serving_stack=serving_stack,
        serving_stack_version=serving_stack_version,
        limit=limit,
    )
    form = format_named(output_format)
    answer = ask(_sources(target, source, file, history, query), query, every_point=True)
    found = select(answer, query, every_point=True)
    _print_notes(found.notes)
    typer.echo(render_list(found, form, BENCHMARK_LIST_COLUMNS), nl=False)


@use_cases_app.command("list")
def list_use_cases(
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """The quickstart's six use cases, and what else the sources were measured with."""
    from rollout.profile_formats import format_named, render_use_cases
    from rollout.profiles import ProfileQuery, ask, use_cases

    answer = ask(_sources(target, source, file, history), ProfileQuery())
    _print_notes(answer.notes)
    typer.echo(render_use_cases(use_cases(answer.profiles), format_named(output_format)), nl=False)


@stacks_app.command("list")
def list_serving_stacks(output_format: FormatOption = "table") -> None:
    """Serving stacks that manifests can be rendered for."""
    from rollout.optimize import ServingStack

    _print_names("serving_stack", list(ServingStack), output_format)


@profiles_app.command()
def recommend(
    model: ModelOption = None,
    target_ttft_milliseconds: TtftOption = None,
    target_ntpot_milliseconds: NtpotOption = None,
    target_itl_milliseconds: ItlOption = None,
    requests_per_s: Annotated[float | None, typer.Option(help="Demand in requests per second.")] = None,
    output_tokens_per_s: Annotated[float | None, typer.Option(help="Demand in output tokens per second.")] = None,
    use_case: UseCaseOption = None,
    accelerator_type: Annotated[list[str] | None, typer.Option(help="Only these; may be repeated.")] = None,
    usd_per_accelerator_hour: PriceOption = None,
    pricing_model: PricingOption = ON_DEMAND,
    region: Annotated[str | None, typer.Option(help="Where prices count; default: the target's, or Google's.")] = None,
    max_usd_per_hour: Annotated[float | None, typer.Option(help="Budget of all replicas.")] = None,
    target_cost_per_million_output_tokens: OutputCostOption = None,
    output_input_cost_ratio: RatioOption = 4.0,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
    output_format: FormatOption = "table",
) -> None:
    """Rank the profiles that meet the requirements, with replicas, cost and headroom; say why the others lost."""
    from rollout.clients.quickstart import recommendation
    from rollout.profile_formats import format_named, pricing_named, render_recommendation
    from rollout.profiles import ProfileQuery
    from rollout.recommend import Requirements

    pricing = pricing_named(pricing_model)
    where, stated = _target(target), _stated_prices(usd_per_accelerator_hour)
    requirements = Requirements(
        model=model,
        targets=_targets(target_ttft_milliseconds, target_ntpot_milliseconds, target_itl_milliseconds),
        requests_per_s=requests_per_s,
        output_tokens_per_s=output_tokens_per_s,
        use_case=use_case,
        accelerators=tuple(accelerator_type or ()),
        pricing_model=pricing,
        region=region or (where.region if where else None),
        max_usd_per_hour=max_usd_per_hour,
        max_usd_per_million_output_tokens=target_cost_per_million_output_tokens,
        output_to_input_ratio=output_input_cost_ratio,
    )
    query = ProfileQuery(
        model=model,
        usd_per_accelerator_hour=stated,
        pricing_model=pricing,
        output_to_input_ratio=output_input_cost_ratio,
    )
    sources = _sources(target, source, file, history, query)
    found, notes = recommendation(where, requirements, sources, query)
    _print_notes(notes)
    typer.echo(render_recommendation(found, format_named(output_format)), nl=False)


@manifests_app.command("create")
def create_manifests(
    context: typer.Context,
    model: RequiredModel,
    accelerator_type: Annotated[str, typer.Option("--accelerator-type", help="E.g. nvidia-h100-80gb.")],
    model_server: RequiredServer = "vllm",
    model_server_version: Annotated[
        str | None,
        typer.Option(
            "--model-server-version",
            help="Default: the newest that is known here; with --generator=google, gcloud's default: latest.",
        ),
    ] = None,
    accelerator_count: Annotated[
        int | None, typer.Option(min=1, help="Accelerators of one replica; default: as few as hold the model.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: the target's, or default.")] = None,
    service_account: Annotated[
        str | None, typer.Option(help="Kubernetes service account; default: the target's, or default.")
    ] = None,
    target_ttft_milliseconds: TtftOption = None,
    target_ntpot_milliseconds: NtpotOption = None,
    target_itl_milliseconds: ItlOption = None,
    use_case: Annotated[str, typer.Option(help="Optimise for this use case.")] = "Chatbot",
    target_input_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt; default: the use case's.")
    ] = None,
    target_output_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer; default: the use case's.")
    ] = None,
    model_bucket_uri: Annotated[
        str | None, typer.Option(help="gs://BUCKET/PATH with config.json and weights; default: Hugging Face.")
    ] = None,
    serving_stack: Annotated[str, typer.Option(help="vllm or llm-d.")] = "vllm",
    min_replicas: Annotated[int, typer.Option(min=1, help="The autoscaler's lower limit: capacity for bursts.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="The autoscaler's upper limit.")] = 10,
    utilisation: Annotated[
        float | None, typer.Option(help="The HPA threshold's share of the load at the target; default: 0.8.")
    ] = None,
    metrics_adapter: Annotated[str, typer.Option(help="stackdriver or prometheus.")] = "stackdriver",
    boot_disk_gib: Annotated[int | None, typer.Option(min=10, help="Cache weights on a larger boot disk.")] = None,
    gke_version: Annotated[
        str | None, typer.Option(help="The cluster's version, checked and named in the header; default: the target's.")
    ] = None,
    node_version: Annotated[str | None, typer.Option(help="The nodes' version, for the header; likewise.")] = None,
    gpu_driver_version: Annotated[
        str | None, typer.Option(help="E.g. 580.82.07, for the header: GKE does not tell the number.")
    ] = None,
    project_number: Annotated[str | None, typer.Option(help="For the IAM command in the comments.")] = None,
    config: Annotated[Path | None, typer.Option(help="config.json of a model that is not in the table.")] = None,
    weights_gib: Annotated[float | None, typer.Option(help="Size of its weights in GiB.")] = None,
    from_hub: Annotated[bool, typer.Option("--from-hub", help="Ask the hub for config.json and sizes.")] = False,
    generator: Annotated[Generator, typer.Option(help="Rendered here, or by Google.")] = Generator.LOCAL,
    output: Annotated[str, typer.Option(help="manifest, comments or all.")] = "all",
    output_path: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
    target: TargetOption = None,
    source: SourceOption = None,
    file: FileOption = None,
    history: HistoryOption = DEFAULT_HISTORY,
) -> None:
    """Deployment, Service, PodMonitoring; with a latency target an autoscaler, with a bucket the fastest loading."""
    from rollout.catalog import validated
    from rollout.clients.quickstart import curve_of, manifests_by_google
    from rollout.optimize import LATEST_VERSION, ManifestRequest, Output, ValidatedWith, request_sizing
    from rollout.profiles import ProfileQuery

    where = _target(target)
    targets = _targets(target_ttft_milliseconds, target_ntpot_milliseconds, target_itl_milliseconds)
    stated: dict[str, Any] = {
        "model": model,
        "model_server": model_server,
        "model_server_version": model_server_version or LATEST_VERSION,
        "accelerator_type": accelerator_type,
        "accelerator_count": accelerator_count,
        "namespace": namespace or (where.namespace if where else "default"),
        "service_account": service_account or (where.ksa if where else "default"),
        "targets": targets,
        "use_case": use_case,
        "input_length": target_input_length,
        "output_length": target_output_length,
        "model_bucket_uri": model_bucket_uri,
        "serving_stack": serving_stack,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "adapter": metrics_adapter,
        "boot_disk_gib": boot_disk_gib,
        "gke_version": gke_version,
        "project": where.project if where else None,
        "project_number": project_number,
    }
    if where:
        stated["universe"] = where.universe
    if utilisation is not None:
        stated["utilisation"] = utilisation
    request = validated(ManifestRequest, stated, where="manifests create")
    wanted = _choice(Output, output, "--output")
    if generator is Generator.GOOGLE:
        _refuse_what_google_would_ignore(context)
        text = manifests_by_google(request, where, model_server_version or "", wanted)
    else:
        flags = ValidatedWith(
            cluster_version=gke_version, node_version=node_version, gpu_driver_version=gpu_driver_version
        )
        request = _on_versions(request, flags, where, history)
        facts = _facts(model, config, weights_gib, where, from_hub=from_hub)
        curve = None
        if targets.given():
            query = ProfileQuery(
                model=model,
                model_server=model_server,
                model_server_version=model_server_version,
                accelerator=accelerator_type,
                accelerator_count=request_sizing(request, facts).accelerator_count,
            )
            curve, notes = curve_of(_sources(target, source, file, history, query), query, use_case)
            _print_notes(notes)
        text = _rendered_here(request, facts, curve).text(wanted)
    if output_path is None:
        typer.echo(text, nl=False)
    else:
        output_path.parent.mkdir(parents=True, exist_ok=True)
        output_path.write_text(text, encoding="utf-8")
        typer.echo(f"Output saved to {output_path}")


@dashboards_app.command("create")
def create_dashboard(
    kind: Annotated[str, typer.Option(help="cloud-monitoring or grafana.")] = "cloud-monitoring",
    target_ttft_milliseconds: TtftOption = None,
    target_ntpot_milliseconds: NtpotOption = None,
    target_itl_milliseconds: ItlOption = None,
    output_path: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
) -> None:
    """A dashboard of vLLM's metrics as JSON, with the objectives drawn in."""
    from rollout.dashboards import DashboardKind, dashboard_json

    targets = _targets(target_ttft_milliseconds, target_ntpot_milliseconds, target_itl_milliseconds)
    text = dashboard_json(_choice(DashboardKind, kind, "--kind"), targets)
    if output_path is None:
        typer.echo(text, nl=False)
    else:
        output_path.write_text(text, encoding="utf-8")
        typer.echo(f"Output saved to {output_path}")


def _sources(
    target: str | None,
    names: Sequence[SourceName] | None,
    files: Sequence[Path] | None,
    history: Path,
    query: ProfileQuery | None = None,
) -> list[ProfileSource]:
    from rollout.clients.quickstart import sources_of
    from rollout.profiles import ProfileQuery

    where = _target(target)
    chosen = names or ([SourceName.HISTORY] if where is None else [SourceName.HISTORY, SourceName.GOOGLE])
    return sources_of(where, chosen, query or ProfileQuery(), files=files or (), history=history)


def _target(name: str | None) -> Target | None:
    from rollout.catalog import load_target

    return load_target(name) if name else None


def _targets(ttft_ms: float | None, ntpot_ms: float | None, itl_ms: float | None) -> Targets:
    from rollout.catalog import validated
    from rollout.profiles import Targets

    given = {"ttft_ms": ttft_ms, "ntpot_ms": ntpot_ms, "itl_ms": itl_ms}
    return validated(Targets, given, where="latency targets")


def _print_names_of(
    sources: Sequence[ProfileSource], key: str, question: Callable[[ProfileSource], Sequence[str]], output_format: str
) -> None:
    from rollout.profiles import ask_names

    names, notes = ask_names(sources, question)
    _print_notes(notes)
    _print_names(key, names, output_format)


def _print_notes(notes: Sequence[str]) -> None:
    """On stderr, so that every format stays what a program reads."""
    from rollout.profile_formats import render_notes

    typer.echo(render_notes(notes), nl=False, err=True)


def _print_names(key: str, names: Sequence[str], output_format: str) -> None:
    from rollout.profile_formats import format_named, render_data

    data = [{key: str(name)} for name in sorted(set(names))]
    typer.echo(render_data(data, format_named(output_format)) if data else "", nl=False)


def _choice(kind: type[EnumT], name: str, flag: str) -> EnumT:
    from rollout.errors import BadInput

    try:
        return kind(name)
    except ValueError:
        raise BadInput(f"there is no {name!r}.", where=flag, resolution=f"Known are {', '.join(kind)}.") from None


def _on_versions(
    request: ManifestRequest, flags: ValidatedWith, target: Target | None, history: Path
) -> ManifestRequest:
    """With the versions that the header names: as stated, of the newest good record, of the target's cluster."""
    from rollout.clients.quickstart import versions_of
    from rollout.clients.records import read_folder
    from rollout.ledger import validated_with
    from rollout.optimize import ValidatedWith

    now = versions_of(target, request.accelerator_type) if target else ValidatedWith()
    served = (request.model, request.model_server_version, request.accelerator_type)
    known = flags.or_else(validated_with(read_folder(history), *served)).or_else(now)
    return request.model_copy(update={"validated": known, "gke_version": flags.cluster_version or now.cluster_version})


def _stated_prices(given: Sequence[str] | None) -> dict[str, float]:
    import re

    from rollout.accelerators import accelerator
    from rollout.errors import BadInput

    prices = {}
    for text in given or ():
        name, _, usd = text.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", usd) or not float(usd):
            raise BadInput(
                f"{text!r} is not ACCELERATOR=USD.",
                where="--usd-per-accelerator-hour",
                resolution="E.g. --usd-per-accelerator-hour nvidia-h200-141gb=10.85.",
            )
        prices[accelerator(name).name] = float(usd)
    return prices


def _facts(
    model: str, config: Path | None, weights_gib: float | None, target: Target | None, *, from_hub: bool
) -> ModelFacts:
    import json

    from rollout.catalog import validated
    from rollout.errors import BadInput
    from rollout.model_facts import ModelFacts, known_model

    if from_hub:
        from rollout.clients.hub_facts import facts_from_hub

        return facts_from_hub(model, target)
    if config is None and weights_gib is None:
        return known_model(model)
    if config is None or weights_gib is None:
        raise BadInput("--config and --weights-gib belong together.", where="manifests create")
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"not a config.json: {error}", where=str(config)) from error
    stated = {"repo_id": model, "weights_bytes": int(weights_gib * 2**30), "config": data, "source": str(config)}
    return validated(ModelFacts, stated, where=str(config))


def _rendered_here(request: ManifestRequest, facts: ModelFacts, curve: Profile | None) -> GeneratedManifests:
    from rollout.optimize import generate_manifests
    from rollout.report import utc_now

    return generate_manifests(request, facts, on=utc_now().date(), profile=curve)


_GOOGLE_HONOURS = frozenset(
    {
        *("model", "model_server", "model_server_version", "accelerator_type", "namespace", "model_bucket_uri"),
        *("target_ttft_milliseconds", "target_ntpot_milliseconds", "generator", "output", "output_path", "target"),
    }
)
"""Options of `manifests create` that Google's API v1 has a field for, or that are about the output."""


def _refuse_what_google_would_ignore(context: typer.Context) -> None:
    from rollout.errors import BadInput

    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in _GOOGLE_HONOURS and _is_typed(context, name)
    ]
    if given:
        raise BadInput(
            f"Google's generator takes no {', '.join(given)}.",
            where="--generator",
            resolution="Leave it out, or use --generator=local.",
        )


def _is_typed(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"
