"""The transfer by pods of the cluster: start the Job, follow it, give the files their names, collect the reports.

The Job's name follows from its work. A run that was killed leaves it behind at work, and the next run goes on with it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from rollout.clients.cluster import ClusterClient
from rollout.clients.job_wait import POLL_S, JobWait, condition_of
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import OnProgress, Place, finish, nothing_to_do, read_provenance
from rollout.diagnosis import container_statuses
from rollout.errors import RolloutError, TransferFailed, TransientError
from rollout.model import PinnedModel
from rollout.objects import SHARED_KINDS
from rollout.rendering import KubernetesObject
from rollout.report import Action, Change, StepStatus
from rollout.target import Target
from rollout.transfer import FileReport, Progress, Source, TransferReport, TransferSpec
from rollout.transfer_job import WRITER_KSA, ShardRequest, transfer_objects

log = logging.getLogger(__name__)

_LISTING_S = 5.0
"""Between two looks at what is proven in the bucket: one listing each."""


def publish_by_pods(
    pinned: PinnedModel,
    target: Target,
    spec: TransferSpec,
    *,
    instance: str,
    rollout_id: str,
    token: str | None,
    on_progress: OnProgress,
    on_pods: Callable[[str], None] = log.info,
) -> TransferReport:
    """What `publish_weights` does, by `spec.pods` pods of the target's cluster. Afterwards the Job is gone.

    Args:
        instance: the Deployment that the weights are for.
        token: of the hub, for the pods; None for public models.
        on_pods: told what each pod does, when that changes.

    Raises:
        TransferFailed: with the last words of the pod that failed; what has arrived is kept.
        AnotherWriter: another run is writing the same weights, and goes on.
        NotFound: there is no cluster.
    """
    started_at = time.monotonic()
    done = nothing_to_do(pinned, target, spec)
    if done is not None:
        return done
    cluster = ClusterClient.connect(target)
    request = ShardRequest(pinned=pinned, target=target, spec=spec, shards=spec.pods)
    objects = transfer_objects(request, instance=instance, rollout_id=rollout_id, token=token)
    place = Place(StorageClient(target), target.weights_prefix(pinned.repo_id, pinned.commit_sha))
    claim = place.claim(spec)
    claim.acquire()
    try:
        _remove_failed(cluster, objects)
        cluster.apply(objects)
        wait = _Wait(cluster, request.job_name, on_pods)
        looked_at = 0.0
        while not wait.is_complete():
            claim.renew_if_due()
            if time.monotonic() - looked_at >= _LISTING_S:
                looked_at = time.monotonic()
                with contextlib.suppress(TransientError):  # shown again in a moment; the pods go on
                    on_progress(_progress(pinned, place, started_at))
            time.sleep(POLL_S)
        reports = finish(pinned, target)
    except TransferFailed:
        _remove(cluster, objects)  # its last words are told; pods that start after all would send beside the next run
        raise
    finally:
        claim.release()
    _remove(cluster, objects)
    return _report(pinned, target, spec, reports, time.monotonic() - started_at)


class _Wait(JobWait):
    failure = TransferFailed
    what = "the transfer"
    rerun = "Rerun: what has arrived is kept."

    def is_complete(self) -> bool:
        job, pods = self.look()
        if condition_of(job, "Complete") is not None:
            return True
        failed = condition_of(job, "Failed")
        if failed is not None:
            raise TransferFailed(
                f"{failed.get('reason')}: {self._words_of_failure(pods)}", where=self.where, resolution=self.rerun
            )
        self.judge_start(pods)
        return False

    def _words_of_failure(self, pods: Sequence[KubernetesObject]) -> str:
        for pod in pods:
            for container in container_statuses(pod):
                ended: Mapping[str, object] = (container.get("state") or {}).get("terminated") or {}
                if ended.get("exitCode"):
                    return f"{pod['metadata']['name']} said: {self.last_words(pod, container['name'])}"
        return "no pod is left to tell why"


def writers_at_work(cluster: ClusterClient) -> tuple[str, ...]:
    """Names of the Jobs that still write weights from the target's namespace."""
    namespace = cluster.target.namespace
    jobs = cluster.api.get(cluster.api.resource("batch/v1", "Job").path(namespace))["items"]
    return tuple(
        job["metadata"]["name"]
        for job in jobs
        if job["spec"]["template"]["spec"].get("serviceAccountName") == WRITER_KSA
        and condition_of(job, "Complete") is None
        and condition_of(job, "Failed") is None
    )


def remove_writer(cluster: ClusterClient) -> tuple[Change, ...]:
    """The Kubernetes service account of the pods; nothing if it is gone already or somebody else's."""
    metadata = {"name": WRITER_KSA, "namespace": cluster.target.namespace}
    changes = cluster.delete([{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}])
    return tuple(change for change in changes if change.action is Action.DELETED)


def _remove_failed(cluster: ClusterClient, objects: Sequence[KubernetesObject]) -> None:
    """Of a run that was killed before it could."""
    live = cluster.find(objects[-1])
    if live is not None and condition_of(live, "Failed") is not None:
        cluster.delete(_of_the_job(objects))


def _remove(cluster: ClusterClient, objects: Sequence[KubernetesObject]) -> None:
    try:
        cluster.delete(_of_the_job(objects))
    except RolloutError as error:
        # What was moved, or why it was not, matters more; the Job's time to live and the teardown remove it as well.
        log.warning("the transfer's objects are left behind: %s", error)


def _of_the_job(objects: Sequence[KubernetesObject]) -> tuple[KubernetesObject, ...]:
    """Without what other models of the namespace use: that goes with the last of them."""
    return tuple(each for each in objects if each["kind"] not in SHARED_KINDS)


def _progress(pinned: PinnedModel, place: Place, started_at: float) -> Progress:
    """By whole files: what is under way in the pods, only they know."""
    view = place.look()
    proven = [file for file in pinned.files if view.proof(file) is not None]
    done, elapsed_s = sum(file.size_bytes for file in proven), time.monotonic() - started_at
    return Progress(
        bytes_done=done,
        bytes_total=pinned.total_bytes,
        files_done=len(proven),
        files_total=len(pinned.files),
        bytes_per_s=done / elapsed_s if elapsed_s > 0 else 0.0,
        elapsed_s=elapsed_s,
    )


def _report(
    pinned: PinnedModel, target: Target, spec: TransferSpec, shares: Sequence[TransferReport], seconds: float
) -> TransferReport:
    """One report of all shares; a file whose share's report is gone (a run was killed in `finish`) was found there."""
    marker = read_provenance(pinned, target)
    if marker is None:
        raise TransferFailed(
            "the weights changed right after they were proven.",
            where=target.weights_uri(pinned.repo_id, pinned.commit_sha),
            resolution="Find out who else writes there, then rerun.",
        )
    by_path = {file.path: file for share in shares for file in share.files}
    files = tuple(
        by_path[proven.path].model_copy(update={"generation": proven.generation})
        if proven.path in by_path
        else FileReport(**proven.model_dump(), source=Source.BUCKET, route=spec.route, seconds=0.0)
        for proven in marker.files
    )
    return TransferReport(
        repo_id=pinned.repo_id,
        commit_sha=pinned.commit_sha,
        uri=target.weights_uri(pinned.repo_id, pinned.commit_sha),
        route=spec.route,
        status=StepStatus.DONE,
        files=files,
        seconds=seconds,
        bytes_received=sum(share.bytes_received for share in shares),
        bytes_sent=sum(share.bytes_sent for share in shares),
        requests=sum(share.requests for share in shares),
        retries=sum(share.retries for share in shares),
    )
