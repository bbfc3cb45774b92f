"""Apply the manifests and wait until the model server can answer."""

from __future__ import annotations

from prefect import get_run_logger

from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_wait import LogLine, Progress, WaitReport
from rollout.diagnosis import StartupObservation
from rollout.diff import diff_markdown
from rollout.ledger import APPLY_STEP
from rollout.plan import RolloutPlan
from rollout.report import Action, StepStatus
from rollout.show import table
from tasks.step import Artifact, Outcome, ProgressBar, step


@step(APPLY_STEP)
def apply_manifests(plan: RolloutPlan) -> Outcome[None]:
    """Server-side dry run of everything, then server-side apply in dependency order; prune what the plan dropped."""
    cluster = ClusterClient.connect(plan.target)
    updates = tuple(diff for diff in cluster.preview(plan.objects).diffs if diff.fields)
    applied = cluster.apply(plan.objects)
    changes = applied + cluster.prune(plan.objects, plan.serving.name)
    acted = [change for change in changes if change.action in (Action.CREATED, Action.UPDATED, Action.DELETED)]
    rows = [(c.action.value, c.kind, c.name, c.detail) for c in changes]
    changed = [diff_markdown(updates)] if updates else []
    return Outcome(
        value=None,
        summary=f"{len(acted)} of {len(changes)} objects changed",
        status=StepStatus.DONE if acted else StepStatus.UNCHANGED,
        changes=changes,
        artifact=Artifact(
            "manifests",
            f"Kubernetes objects of {plan.serving.name}",
            markdown="\n\n".join([table(("action", "kind", "name", "changed fields"), rows), *changed]),
        ),
    )


@step("wait until available", retries=1)
def wait_until_available(plan: RolloutPlan) -> Outcome[WaitReport]:
    """Watch the start; end early, with the diagnosis, when it cannot succeed."""
    logger = get_run_logger()
    bar = ProgressBar("start-up", f"Start of {plan.serving.name}")
    shown: list[str] = []

    def show(progress: Progress) -> None:
        if progress.fraction_loaded is not None:
            bar.update(progress.fraction_loaded * 100)
        if [progress.message] != shown[-1:]:
            shown.append(progress.message)
            logger.info("%.0f s: %s", progress.elapsed_s, progress.message)

    def follow(line: LogLine) -> None:
        logger.debug("%s: %s", line.pod, line.text)

    report = ClusterClient.connect(plan.target).wait_available(
        plan.serving.name,
        deadline_s=plan.deadlines_s["available"],
        context=StartupObservation(
            serving=plan.serving,
            target=plan.target,
            repo_id=plan.model.repo_id,
            weights_uri=plan.weights_uri,
            weights_bytes=plan.model.total_bytes,
        ),
        on_progress=show,
        on_log=follow,
    )
    bar.update(100.0)
    waterfalls = "\n\n".join(waterfall.markdown for waterfall in report.waterfalls)
    return Outcome(
        value=report,
        summary=f"{len(report.pods)} pods available after {report.duration_s:.1f} s",
        data=report.model_dump(mode="json"),
        artifact=Artifact("start-up-waterfall", f"Where the start of {plan.serving.name} spent its time", waterfalls),
    )
