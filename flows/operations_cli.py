"""`llm-rollout` commands of daily operation, on the Prefect server and on what serves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from rollout.errors import BadInput
from rollout.transfer import ABANDONED_AFTER_DAYS

if TYPE_CHECKING:
    from rollout.record import RolloutReport

TargetOption = Annotated[
    str, typer.Option("--target", "-t", help="Environment in deployments/targets/, or a YAML file.")
]


def mount(app: typer.Typer) -> None:
    """Add the commands of this module to `app`."""
    for command in (
        bootstrap,
        run,
        verify,
        benchmark_model,
        profile,
        watch_releases,
        webhook,
        janitor,
        status,
        history,
        rollback,
    ):
        app.command()(command)


def bootstrap(
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="Targets to prepare for; default: all known by name.")
    ] = None,
    pool: Annotated[str | None, typer.Option(help="Where deployments go: laptop or cluster.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that rollouts to one target may take at once.")] = 8,
    image: Annotated[str | None, typer.Option(help="Worker image of the cluster pool.")] = None,
    notify: Annotated[str | None, typer.Option(help="Notification block, e.g. slack-webhook/ops.")] = None,
) -> None:
    """Prepare the Prefect server: work pools, limits, Secret blocks, notifications. Run it as often as you like."""
    from rollout import catalog

    targets = [catalog.load_target(name) for name in target or catalog.known("targets")]
    from flows.bootstrap import CLUSTER_POOL, LAPTOP_POOL, POOL_VARIABLE
    from flows.bootstrap import bootstrap as perform

    if pool not in (None, LAPTOP_POOL, CLUSTER_POOL):
        raise BadInput(f"there is no pool {pool!r}.", where="--pool", resolution=f"{LAPTOP_POOL} or {CLUSTER_POOL}.")
    changes = perform(targets, pool=pool, gpus=gpus, image=image, notify=notify)
    for change in changes:
        typer.echo(f"{change.action.value:9} {change.kind:16} {change.name}  {change.detail}".rstrip())
    chosen = next(change.detail for change in changes if change.name == POOL_VARIABLE)
    typer.echo(f"next: prefect --no-prompt deploy --all && prefect worker start --pool {chosen}")


@contextmanager
def told_to_ci(record: Path, *, junit: Path | None, summary: Path | None) -> Iterator[None]:
    """Write what CI asked for, from the record on disk; whether the block succeeds, fails or is killed."""
    from rollout.clients.records import read_local
    from rollout.summary import summary_markdown

    before = _written_at(record)
    # Prefect lets the flow tear down after a SIGTERM, and then hands the signal on to the handler from before: the
    # default one would end the process on the spot.
    signal.signal(signal.SIGTERM, _exit_as_terminated)
    try:
        yield
    finally:
        if _written_at(record) != before:  # an earlier rollout's record must not speak for this one
            report = read_local(record)
            _tell(report, summary_markdown(report), junit=junit, summary=summary)


def _exit_as_terminated(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _tell(report: RolloutReport, markdown: str, *, junit: Path | None, summary: Path | None) -> None:
    from rollout.summary import github_annotations, junit_xml

    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_text(junit_xml(report), encoding="utf-8")
    if summary is not None:
        _append(summary, markdown)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in github_annotations(report):
            typer.echo(line)


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def run(
    deployment: Annotated[
        str, typer.Argument(metavar="DEPLOYMENT", help="FLOW/NAME, as `prefect deployment ls` shows.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the deployment's.")] = None,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds until CI gives up and cancels the run.")] = 7200,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key, e.g. the pipeline's id: a repeated job joins its first run.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML for CI: one test case a step.")] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Markdown is appended here, e.g. to $GITHUB_STEP_SUMMARY.")
    ] = None,
) -> None:
    """Start a deployment on the Prefect server, wait, and exit with our codes. Needs no cloud credentials.

    The files are written whatever happens, also if CI gives up: SIGTERM, SIGINT and --wait cancel the run.
    """
    from flows.ci import run_on_server

    request = {} if revision is None else {"revision": revision}
    done = run_on_server(deployment, request, idempotency_key=key, deadline_s=wait, say=typer.echo)
    _tell(done.report, done.summary, junit=junit, summary=summary)
    typer.echo(f"{done.outcome}{': ' + done.detail if done.detail else ''}")
    raise typer.Exit(int(done.exit_code))


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset in deployments/models/, or a YAML file.")],
    target: TargetOption,
    policy: Annotated[
        Path | None, typer.Option(help="YAML file of a policy: its benchmark and objectives count.")
    ] = None,
    report: Annotated[Path, typer.Option("--report", help="The machine-readable record.")] = Path("out/verify.json"),
) -> None:
    """Ask the live model server whether it still does what its rollout has proven."""
    from flows.requests import request_of
    from rollout.show import step_table

    request = request_of(model, target, policy_file=policy)
    from flows.verify_model import verify_model

    done = verify_model(request, report_file=str(report))
    for row in step_table(done):
        typer.echo("{} {:<24} {:>7} s  {}".format(*row))


def benchmark_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset in deployments/models/, or a YAML file.")],
    target: TargetOption,
    policy: Annotated[
        Path | None, typer.Option(help="YAML file of a policy: its benchmark and objectives count.")
    ] = None,
    report: Annotated[Path, typer.Option("--report", help="The machine-readable record.")] = Path(
        "out/benchmark-model.json"
    ),
) -> None:
    """Sweep the load on the live model server to saturation; `benchmark URL` does so for any endpoint."""
    from flows.requests import request_of
    from rollout.answers import answers_of
    from rollout.profile_formats import text_table

    request = request_of(model, target, policy_file=policy)
    from flows.benchmark_model import benchmark_model as perform

    done = perform(request, report_file=str(report))
    assert done.benchmark is not None, "the flow ends with an error otherwise"
    assert done.plan is not None, "the flow ends with an error otherwise"
    answers = answers_of(done.benchmark, done.plan.policy.objectives, replicas=done.plan.serving.replicas)
    typer.echo(text_table(("question", "answer"), answers.rows()), nl=False)
    typer.echo(f"{done.verdict.value}; the record is in {report}")


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset in deployments/models/, or a YAML file.")],
    target: TargetOption,
    replicas: Annotated[
        int, typer.Option(min=1, help="Replicas that the autoscaler must bring in the scaling test; 1: no test.")
    ] = 1,
    target_ttft: Annotated[
        float | None, typer.Option("--target-ttft-milliseconds", help="Median TTFT to hold.")
    ] = None,
    target_ntpot: Annotated[
        float | None, typer.Option("--target-ntpot-milliseconds", help="Median NTPOT to hold.")
    ] = None,
    target_itl: Annotated[float | None, typer.Option("--target-itl-milliseconds", help="Median ITL to hold.")] = None,
    max_replicas: Annotated[int, typer.Option(min=1, help="The autoscaler's upper limit.")] = 8,
    adapter: Annotated[str, typer.Option(help="Metrics adapter of the cluster: stackdriver or prometheus.")] = (
        "stackdriver"
    ),
    max_shortfall: Annotated[
        float | None, typer.Option(min=0, help="Share by which a figure may be worse than Google's forecast.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: the preset's.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file of a policy: its benchmark is the sweep.")] = None,
    report: Annotated[Path, typer.Option("--report", help="The machine-readable record.")] = Path("out/profile.json"),
) -> None:
    """Sweep one replica, derive its autoscaler, and test that scaling holds. Policy `teardown: always` leaves nothing.

    Afterwards a rollout with `autoscaling` in its policy applies the autoscaler.
    """
    from flows.requests import request_of
    from rollout.catalog import validated
    from rollout.profiling import ProfilingSpec
    from rollout.show import step_table

    request = request_of(model, target, revision, policy).model_copy(update={"replicas": replicas})
    latencies = {"ttft_ms": target_ttft, "ntpot_ms": target_ntpot, "itl_ms": target_itl}
    scaling = {"targets": latencies, "max_replicas": max_replicas, "adapter": adapter}
    wanted = validated(ProfilingSpec, {"autoscaling": scaling, "max_shortfall": max_shortfall}, where="profile")
    from flows.profile_model import profile_model

    done = profile_model(request, profiling=wanted, report_file=str(report))
    for row in step_table(done):
        typer.echo("{} {:<24} {:>7} s  {}".format(*row))


def watch_releases(
    target: TargetOption,
    model: Annotated[list[str], typer.Option("--model", help="Presets to follow; may be given several times.")],
    tags: Annotated[
        str | None, typer.Option(help="Follow new tags of this pattern, e.g. 'v*', instead of the branch.")
    ] = None,
) -> None:
    """Look once for new commits, or tags, of the followed models, and announce them."""
    from rollout.releases import Followed, WatchRequest

    request = WatchRequest(target=target, follow=tuple(Followed(model=name, tags=tags) for name in model))
    from flows.watch_releases import watch_releases as watch

    announcements = watch(request)
    for announcement in announcements:
        tag = f" ({announcement.tag})" if announcement.tag else ""
        typer.echo(f"announced {announcement.repo_id}@{announcement.commit_sha}{tag} for {announcement.target}")
    if not announcements:
        typer.echo("nothing new")


def webhook(
    deployment: Annotated[str, typer.Option(help="What a message starts, as FLOW/NAME: watch-releases/s3ns-france.")],
    host: Annotated[str, typer.Option(help="Address to listen on; TLS is the proxy's in front.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    secret_block: Annotated[
        str | None, typer.Option(help="Secret block with the webhook's secret; default: $LLM_ROLLOUT_WEBHOOK_SECRET.")
    ] = None,
) -> None:
    """Receive Hugging Face's webhooks: a release is noticed at once instead of at the next poll."""
    from aiohttp import web

    from flows.webhook import webhook_app
    from tasks.credentials import secret_of

    secret = secret_of(secret_block) if secret_block else os.environ.get("LLM_ROLLOUT_WEBHOOK_SECRET", "")
    web.run_app(webhook_app(deployment, secret), host=host, port=port, print=typer.echo)


def janitor(
    target: TargetOption,
    show: Annotated[bool, typer.Option("--show", help="Only show what would be removed.")] = False,
    transfers_after_days: Annotated[
        float,
        typer.Option(min=0, help="Remove what an unfinished transfer left after so many days without a sign of life."),
    ] = ABANDONED_AFTER_DAYS,
) -> None:
    """Clean up after what died: zombie runs, trials that nobody tore down, servers past their expiry, transfers."""
    from flows.janitor import janitor as perform

    reports = perform(target, remove=not show, transfers_after_days=transfers_after_days)
    for change in (change for report in reports for change in report.removed):
        typer.echo(f"removed  {change.kind:16} {change.name}")


def status(target: TargetOption) -> None:
    """Which model commit serves where, since when, with which evidence; and where the cluster disagrees."""
    from rollout.catalog import load_target
    from rollout.clients.drift import status_of

    where = load_target(target)
    live, differences = status_of(where)
    for serving in live:
        typer.echo(
            f"{serving.instance}: {serving.model} since {serving.since:%Y-%m-%d %H:%M} UTC,"
            f" {serving.evidence.value}, run {serving.run_id}"
        )
    if not live:
        typer.echo(f"by its records, nothing serves on {where.name}")
    for difference in differences:
        typer.echo(
            f"drift: {difference.instance}: recorded is {difference.recorded}, live is {difference.live}."
            f" {difference.what_to_do}"
        )


def history(target: TargetOption) -> None:
    """Every rollout to a target, newest first: what, when, how it ended, and its run."""
    from rollout.catalog import load_target
    from rollout.clients.records import RecordStore
    from rollout.ledger import in_order

    for report in reversed(in_order(RecordStore(load_target(target)).read_all())):
        plan = report.plan
        what = f"{plan.serving.name} {plan.model.repo_id}@{plan.model.short_sha}" if plan else "teardown"
        gone = ", torn down" if report.teardown and plan else ""
        typer.echo(f"{report.started_at:%Y-%m-%d %H:%M}  {report.verdict.value + gone:32} {what}  run {report.run_id}")


def rollback(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Preset in deployments/models/, or a YAML file.")],
    target: TargetOption,
    to: Annotated[str, typer.Option("--to", help="Run id or commit (or its beginning) of the history.")],
    report: Annotated[Path, typer.Option("--report", help="The machine-readable record.")] = Path("out/report.json"),
) -> None:
    """Roll out again exactly what a recorded rollout served: its commit, image, flags and replicas."""
    from flows.requests import request_of, rollback_request

    request = rollback_request(request_of(model, target), to, report.with_name(f"{report.stem}-preset.yaml"))
    from flows.rollout_model import rollout_model

    done = rollout_model(request, report_file=str(report))
    typer.echo(f"{done.verdict.value}; the record is in {report}")
    raise typer.Exit(int(done.exit_code))
