"""`llm-rollout`: one command per flow. Heavy imports wait until a command runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from flows import endpoint_cli, operations_cli
from flows.curves_cli import curves_app
from flows.profiles_cli import profiles_app
from rollout.errors import ExitCode, RolloutError
from rollout.universe import GOOGLE_DEFAULT_DOMAIN, Universe

if TYPE_CHECKING:
    from rollout.record import RolloutReport
    from rollout.request import RolloutRequest

app = typer.Typer(
    name="llm-rollout",
    help="Roll out language models with vLLM on GKE, and keep the evidence.",
    epilog=(
        "Exit codes: 0 done and within objectives; 1 failed; 2 bad input; 3 rolled back; 4 objectives missed;"
        " 5 not approved; 6 teardown left something behind. PREFECT_LOGGING_LEVEL=DEBUG shows every detail."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(profiles_app, name="profiles")
app.add_typer(curves_app, name="curves")


class Engine(StrEnum):
    """What serves in the rehearsal."""

    SIMULATED = "simulated"
    VLLM = "vllm"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Preset in deployments/models/, or a YAML file.")]
TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="Environment in deployments/targets/, or a YAML file.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the preset's.")]
ReportOption = Annotated[Path, typer.Option("--report", help="The machine-readable record; updated after every step.")]
PolicyOption = Annotated[
    Path | None, typer.Option("--policy", help="YAML file with the rollout's policy (objectives, teardown, …).")
]
DEFAULT_REPORT = Path("out/report.json")

DEFAULTS = {
    # A server of its own (no PREFECT_API_URL) takes half a minute on a fresh home; Prefect's own limit is 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_CLASS": "flows.terminal.Terminal",
}
"""Prefect's settings on the command line, unless the environment says otherwise."""

_PREFECT_IS_AWAY = "Failed to reach API at "
"""How Prefect's client begins the RuntimeError that it raises before a flow starts, when no server answers."""


@app.command()
def presets() -> None:
    """List the models and targets that are known by name."""
    from rollout import catalog

    for folder in ("models", "targets"):
        typer.echo(f"{folder}:")
        for name in catalog.known(folder):
            typer.echo(f"  {name}")


@app.command()
def plan(
    model: ModelArgument, target: TargetOption, revision: RevisionOption = None, policy: PolicyOption = None
) -> None:
    """Show what a rollout would do: preflight, changes, cost. Changes nothing."""
    request = _request(model, target, revision, policy)
    from flows.plan_model import plan_model
    from rollout.show import plan_markdown

    typer.echo(plan_markdown(plan_model(request)))


@app.command()
def rollout(
    model: ModelArgument,
    target: TargetOption,
    revision: RevisionOption = None,
    policy: PolicyOption = None,
    report: ReportOption = DEFAULT_REPORT,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML for CI: one test case a step.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Markdown is appended here, e.g. to $GITHUB_STEP_SUMMARY.")
    ] = None,
) -> None:
    """Roll a model out: weights, identity, manifests, smoke test, benchmark, objectives."""
    request = _request(model, target, revision, policy)
    from flows.rollout_model import rollout_model

    with operations_cli.told_to_ci(report, junit=junit, summary=summary):
        done = rollout_model(request, report_file=str(report))
    _finish(done, report)


@app.command()
def publish_weights(
    model: ModelArgument, target: TargetOption, revision: RevisionOption = None, policy: PolicyOption = None
) -> None:
    """Transfer a model's weights from Hugging Face to the target's bucket, proven by hash."""
    request = _request(model, target, revision, policy)
    from flows.publish_weights import publish_model_weights

    transfer = publish_model_weights(request)
    typer.echo(f"{transfer.status.value}: {transfer.uri} ({transfer.bytes_sent:,} bytes sent)")


@app.command()
def check_layout(
    uri: Annotated[str, typer.Argument(metavar="GS_URI", help="Model path, e.g. gs://bucket/org/name/commit.")],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="Whose credentials and endpoints; default: Application Default Credentials."
        ),
    ] = None,
    universe: Annotated[
        str, typer.Option(help="Domain of the bucket's universe, where no target says it.")
    ] = GOOGLE_DEFAULT_DOMAIN,
) -> None:
    """Check that a model server could load from a path in a bucket: config.json, every shard, tokenizer."""
    from rollout.bucket_objects import GcsUri
    from rollout.catalog import load_target
    from rollout.clients.google_auth import target_of_bucket
    from rollout.clients.layout import check_layout as check
    from rollout.layout import require_valid

    whose = load_target(target) if target else target_of_bucket(GcsUri.parse(uri).bucket, Universe(domain=universe))
    report = check(whose, uri)
    for finding in report.findings:
        typer.echo(f"{finding.severity.value}: {finding.message}")
    require_valid(report)
    typer.echo(f"{uri} can be loaded")


@app.command()
def teardown(
    target: TargetOption,
    model: Annotated[str | None, typer.Option(help="Preset whose model server goes.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Record of the rollout; it is continued.")] = None,
    run: Annotated[
        str | None, typer.Option(help="Beginning of the id of a rollout's run, as `history` shows it.")
    ] = None,
    instance: Annotated[
        str | None, typer.Option(help="Name of a Deployment of ours without a preset, e.g. of create-manifests.")
    ] = None,
    delete_weights: Annotated[
        bool, typer.Option("--delete-weights", help="Weights and our bucket go as well.")
    ] = False,
) -> None:
    """Remove a model server and what its rollouts made, and prove that nothing of it is left."""
    from flows.teardown_model import teardown_model
    from rollout.policy import Weights

    weights = Weights.DELETE if delete_weights else Weights.KEEP
    path = str(report) if report else None
    done = teardown_model(target, model=model, report_file=path, weights=weights, run=run, instance=instance)
    assert done.teardown is not None
    for state, changes in (("removed", done.teardown.removed), ("kept", done.teardown.kept)):
        for change in changes:
            typer.echo(f"{state:8} {change.kind:16} {change.name}  {change.detail}".rstrip())
    typer.echo("nothing of ours is left")


@app.command()
def rehearse(
    engine: Annotated[Engine, typer.Option(help="What serves: a simulated vLLM, or real vLLM on the CPU.")] = (
        Engine.SIMULATED
    ),
    ui: Annotated[bool, typer.Option("--ui", help="Leave the Prefect UI running until Ctrl-C.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of everything that the rehearsal makes.")] = Path("out/rehearsal"),
) -> None:
    """Perform the whole rollout on this machine against an embedded cloud, twice, and tear it down."""
    from flows.rehearsal import rehearse as perform

    raise typer.Exit(perform(out, engine.value, ui=ui))


def _request(model: str, target: str, revision: str | None, policy_file: Path | None) -> RolloutRequest:
    from flows.requests import request_of

    return request_of(model, target, revision, policy_file)


def _finish(report: RolloutReport, path: Path) -> None:
    from rollout.show import step_table

    for row in step_table(report):
        typer.echo("{} {:<24} {:>7} s  {}".format(*row))
    typer.echo(f"{report.verdict.value}; the record is in {path}")
    raise typer.Exit(int(report.exit_code))


endpoint_cli.mount(app)
operations_cli.mount(app)


def main() -> None:
    """The console script. Every error ends in one message and an exit code that CI can act on."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except RolloutError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(int(error.exit_code))
    except ValidationError as error:
        from rollout.catalog import explain

        typer.echo(f"error: {explain(error)}", err=True)
        sys.exit(int(ExitCode.BAD_INPUT))
    except RuntimeError as error:
        if not str(error).startswith(_PREFECT_IS_AWAY):
            raise
        typer.echo(f"error: {error}: is PREFECT_API_URL right, and does the Prefect server run?", err=True)
        sys.exit(int(ExitCode.FAILED))
