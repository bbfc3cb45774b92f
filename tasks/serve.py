"""Apply the manifests and wait until the model server can answer."""

from __future__ import annotations

import logging

from prefect import get_run_logger

from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_wait import FailedStart, LogLine, Progress, WaitReport
from rollout.clients.first_token import with_first_tokens
from rollout.clients.quickstart import versions_of
from rollout.diagnosis import Category, StartupObservation, is_complaint
from rollout.diff import diff_markdown
from rollout.ledger import APPLY_STEP
from rollout.plan import RolloutPlan
from rollout.report import Action, StepStatus
from rollout.serving import ServingSpec
from rollout.show import diagnosis_markdown, failed_start_markdown, table
from rollout.target import Target
from rollout.waterfall import is_milestone
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


@step("prune")
def prune_shared(plan: RolloutPlan) -> Outcome[None]:
    """Take away the compute classes and service accounts of earlier plans that no pod uses any more.

    At the end: as long as the new version is not proven, the old one may have to come back with all it had.
    """
    changes = ClusterClient.connect(plan.target).prune_shared(plan.objects)
    return Outcome(
        value=None,
        summary=f"{len(changes)} shared objects of earlier plans are gone" if changes else "nothing is left over",
        status=StepStatus.DONE if changes else StepStatus.UNCHANGED,
        changes=changes,
    )


@step("wait until available", retries=1)
def wait_until_available(plan: RolloutPlan) -> Outcome[WaitReport]:
    """Watch the start until one token has come back; end early, with the diagnosis, when it cannot succeed."""
    return watch_start(plan.target, plan.serving, _context(plan), plan.deadlines_s["available"])


def watch_start(
    target: Target, serving: ServingSpec, context: StartupObservation, deadline_s: float
) -> Outcome[WaitReport]:
    """The same for whatever serves; `context` is what was planned, for the diagnosis."""
    cluster = ClusterClient.connect(target)
    with ProgressBar("start-up", f"Start of {serving.name}") as bar:
        watcher = _Watcher(serving.name, bar)
        try:
            available = cluster.wait_available(
                serving.name,
                deadline_s=deadline_s,
                context=context,
                on_progress=watcher.show,
                on_log=watcher.follow,
            )
        except FailedStart as failure:
            watcher.publish(
                failed_start_markdown(failure.summary, failure.diagnosis, failure.waterfalls, failure.log_tail)
            )
            raise
        report = with_first_tokens(available, cluster, serving.service_name, serving.served_model_name)
        report = report.model_copy(update={"ran_on": versions_of(target, serving.accelerator.type)})
        bar.update(100.0, "one token has come back")
    waterfalls = "\n\n".join(waterfall.markdown for waterfall in report.waterfalls)
    return Outcome(
        value=report,
        summary=f"{len(report.pods)} pods available after {report.duration_s:.1f} s, one token in"
        f" {report.first_token_s:.2f} s",
        data=report.model_dump(mode="json"),
        artifact=Artifact("start-up-waterfall", f"Where the start of {serving.name} spent its time", waterfalls),
    )


def _context(plan: RolloutPlan) -> StartupObservation:
    return StartupObservation(
        serving=plan.serving,
        target=plan.target,
        repo_id=plan.model.repo_id,
        weights_uri=plan.weights_uri,
        weights_bytes=plan.model.total_bytes,
    )


class _Watcher:
    """Tells people of a start under way: progress, the log lines that matter, and every fault at its first sight."""

    def __init__(self, name: str, bar: ProgressBar) -> None:
        self._bar = bar
        self._name = name
        self._logger = get_run_logger()
        self._message = ""
        self._told: set[tuple[Category, bool]] = set()

    def show(self, progress: Progress) -> None:
        if progress.fraction_loaded is not None:
            self._bar.update(progress.fraction_loaded * 100, progress.message)
        if progress.message != self._message:
            self._message = progress.message
            self._logger.info("%.0f s: %s", progress.elapsed_s, progress.message)
        fault = progress.diagnosis
        if fault is not None and (fault.category, fault.suspected) not in self._told:
            self._told.add((fault.category, fault.suspected))
            self._logger.warning("%.0f s: %s %s", progress.elapsed_s, fault.category.value, fault.as_text())
            self.publish(diagnosis_markdown(fault))

    def follow(self, line: LogLine) -> None:
        tells = is_milestone(line.text) or is_complaint(line.text)
        self._logger.log(logging.INFO if tells else logging.DEBUG, "%s: %s", line.pod, line.text)

    def publish(self, markdown: str) -> None:
        Artifact("diagnosis", f"What keeps {self._name} from starting", markdown).publish()
