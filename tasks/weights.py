"""Weights from the hub to the bucket, proven by hash, and the check that a model server can load them."""

from __future__ import annotations

from prefect import get_run_logger

from rollout.clients import transfer
from rollout.clients.layout import check_layout
from rollout.layout import LayoutReport, require_valid
from rollout.model import PinnedModel
from rollout.report import Action, Change, StepStatus
from rollout.target import Target
from rollout.transfer import Progress, TransferReport, TransferSpec
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
    logger = get_run_logger()
    title = f"{model.repo_id}@{model.short_sha}"
    uri = target.weights_uri(model.repo_id, model.commit_sha)
    _ended.discard(uri)
    _seconds_left.pop(uri, None)
    with ProgressBar("weights-progress", f"Weights of {title}") as bar:
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
            report = transfer.publish_weights(model, target, spec, token=hub_token(target), on_progress=show)
        finally:
            _ended.add(uri)
        bar.update(100.0, f"{report.total_bytes / 1e9:.2f} GB are there")
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
        artifact=Artifact("weights", f"Weights of {title}: what was proven", table=report.rows()),
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
