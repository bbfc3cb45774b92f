"""Weights from the hub to the bucket, proven by hash, and the check that a model server can load them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger

from rollout.clients import transfer
from rollout.clients.cluster import ClusterClient
from rollout.clients.iam import OBJECT_USER, BucketPolicy, ensure_binding, remove_binding
from rollout.clients.layout import check_layout
from rollout.clients.projects import Projects
from rollout.clients.transfer import OnProgress
from rollout.clients.transfer_cluster import publish_by_pods, remove_writer, writers_at_work
from rollout.layout import LayoutReport, require_valid
from rollout.model import PinnedModel
from rollout.plan import rollout_id
from rollout.report import Action, Change, StepStatus
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, Target
from rollout.transfer import Progress, TransferReport, TransferSpec
from rollout.transfer_job import writer_member
from tasks.credentials import hub_token
from tasks.step import Artifact, Outcome, ProgressBar, step

_seconds_left: dict[str, float] = {}
_ended: set[str] = set()
"""By address of the weights, for the step that starts the node meanwhile: tasks of one flow run share the process."""


def seconds_left(uri: str) -> float | None:
    """How long the transfer to `uri` still takes at the rate that is measured; None before that is known."""
    return _seconds_left.get(uri)


def transfer_ended(uri: str) -> bool:
    """Whether the transfer to `uri` is over in this process, well or badly."""
    return uri in _ended


@step("publish weights")
def publish_weights(model: PinnedModel, target: Target, spec: TransferSpec) -> Outcome[TransferReport]:
    """Transfer what the bucket does not hold yet; every byte is compared with the hub's hashes on its way."""
    with _shown(model, target) as show:
        report = transfer.publish_weights(model, target, spec, token=hub_token(target), on_progress=show)
    return _outcome(model, report)


@step("writer identity")
def bind_writer(target: Target) -> Outcome[None]:
    """Let the pods of a transfer write the bucket: they, and not the pods that serve. Needs the workload pool."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return Outcome(value=None, summary="a kubeconfig cluster brings its own identity", status=StepStatus.SKIPPED)
    member = writer_member(target, Projects(target).get().number)
    change = ensure_binding(BucketPolicy(target, target.bucket), OBJECT_USER, member)
    return Outcome(
        value=None,
        summary=f"{member} may write gs://{target.bucket}",
        status=StepStatus.DONE if change else StepStatus.UNCHANGED,
        changes=(change,) if change else (),
    )


@step("writer's right")
def release_writer(target: Target) -> Outcome[None]:
    """Take the right to write the bucket, and the account that had it, from the pods of a transfer that has ended.

    The next one asks for it anew. Another transfer that is still at work keeps it; the last one takes it away.
    """
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return Outcome(value=None, summary="a kubeconfig cluster brings its own identity", status=StepStatus.SKIPPED)
    busy = writers_at_work(ClusterClient.connect(target))
    if busy:
        return Outcome(value=None, summary=f"{', '.join(busy)} still write", status=StepStatus.SKIPPED)
    member = writer_member(target, Projects(target).get().number)
    change = remove_binding(BucketPolicy(target, target.bucket), OBJECT_USER, member)
    changes = (*([change] if change else []), *remove_writer(ClusterClient.connect(target)))
    return Outcome(
        value=None,
        summary=f"{member} may no longer write gs://{target.bucket}",
        status=StepStatus.DONE if changes else StepStatus.UNCHANGED,
        changes=changes,
    )


@step("publish weights")
def publish_weights_by_pods(
    model: PinnedModel, serving: ServingSpec, target: Target, spec: TransferSpec
) -> Outcome[TransferReport]:
    """The same by a Job in the cluster, whose pods share the files."""
    with _shown(model, target) as show:
        report = publish_by_pods(
            model,
            target,
            spec,
            instance=serving.name,
            rollout_id=rollout_id(model, serving, target),
            # Only the token that the target names: one of this machine's environment is not for the cluster.
            token=hub_token(target) if target.hub_token_secret else None,
            on_progress=show,
            on_pods=get_run_logger().info,
        )
    return _outcome(model, report)


@contextmanager
def _shown(model: PinnedModel, target: Target) -> Iterator[OnProgress]:
    """What is to be told of a transfer's progress: to people, and to the step that starts the node meanwhile."""
    logger = get_run_logger()
    uri = target.weights_uri(model.repo_id, model.commit_sha)
    _ended.discard(uri)
    _seconds_left.pop(uri, None)
    with ProgressBar("weights-progress", f"Weights of {model.repo_id}@{model.short_sha}") as bar:
        tenths = 0

        def show(progress: Progress) -> None:
            nonlocal tenths
            bar.update(progress.share * 100, progress.text)
            if progress.seconds_left is not None and not progress.is_staging:
                _seconds_left[uri] = progress.seconds_left
            if int(progress.share * 10) > tenths:
                tenths = int(progress.share * 10)
                logger.info("%d %%: %s", tenths * 10, progress.text)

        try:
            yield show
        finally:
            _ended.add(uri)
        bar.update(100.0, f"{model.total_bytes / 1e9:.2f} GB are there")


def _outcome(model: PinnedModel, report: TransferReport) -> Outcome[TransferReport]:
    unchanged = report.status is StepStatus.UNCHANGED
    proof = f"{len(report.files)} files, {report.total_bytes / 1e9:.2f} GB, sha256 verified"
    return Outcome(
        value=report,
        summary=f"{proof}; already there, nothing was sent"
        if unchanged
        else f"{proof}; {report.bytes_sent / 1e9:.2f} GB sent in {report.seconds:.1f} s by {report.route.value}",
        status=report.status,
        changes=(
            Change(
                action=Action.UNCHANGED if unchanged else Action.CREATED,
                kind="Weights",
                name=report.uri,
                detail=f"commit {report.commit_sha}",
            ),
        ),
        data={"bytes_sent": report.bytes_sent, "requests": report.requests, "retries": report.retries},
        artifact=Artifact(
            "weights", f"Weights of {model.repo_id}@{model.short_sha}: what was proven", table=report.rows()
        ),
    )


@step("check layout")
def check_weights_layout(target: Target, uri: str, vllm_release: str | None) -> Outcome[LayoutReport]:
    """config.json at the model path, every shard of the index, tokenizer; nothing that a model server trips over."""
    report = check_layout(target, uri, vllm_release=vllm_release)
    require_valid(report)
    return Outcome(
        value=report,
        summary=report.summary,
        status=StepStatus.DONE,
        data=report.model_dump(mode="json"),
        artifact=Artifact("layout", f"Layout of {uri}", table=report.rows()),
    )
