"""The transfer inside the cluster as objects: an Indexed Job whose pods each bring one share of the files.

`rollout.clients.transfer_cluster` starts and follows it; `rollout.clients.transfer_job` is what its pods run.
"""

from __future__ import annotations

import base64
from typing import Annotated

from pydantic import Field

from rollout.errors import BadInput
from rollout.model import PinnedModel
from rollout.objects import ownership_labels
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.target import Target
from rollout.transfer import MIB, TransferSpec
from rollout.values import Value

REQUEST_FILE_VARIABLE = "TRANSFER_REQUEST_FILE"
"""Path of the mounted ConfigMap's file: one variable holds at most 128 KiB, which 700 files exceed."""
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in every pod of an Indexed Job."""
TOKEN_VARIABLE = "HF_TOKEN"

WRITER_KSA = "weights-writer"
"""Kubernetes service account of the pods; bound to the bucket by itself, so that no serving pod may write."""

_MANIFESTS = ("service-account.yaml", "transfer-config-map.yaml", "transfer-job.yaml")
_CPUS = 4
"""Hashing takes one core per 1.4 GB/s, sockets and TLS about two."""


class ShardRequest(Value):
    """What every pod of the Job needs to know; the same for all of them."""

    pinned: PinnedModel
    target: Target
    spec: TransferSpec
    shards: Annotated[int, Field(ge=1, le=1000)]

    @property
    def job_name(self) -> str:
        """The same for the same work, so that a second start finds the first."""
        return f"weights-{self.digest(10)}"


def shard_of(request_json: str, index: str | None) -> tuple[ShardRequest, int]:
    """The request and the index (from 0) of one pod.

    Raises:
        BadInput: the index is none of the request's.
    """
    request = ShardRequest.model_validate_json(request_json)
    if index is None or not index.isdigit() or int(index) >= request.shards:
        raise BadInput(
            f"{INDEX_VARIABLE}={index} is none of {request.shards} shares.",
            resolution="This runs in the pods of manifests/transfer-job.yaml only.",
        )
    return request, int(index)


def writer_member(target: Target, project_number: str) -> str:
    """The IAM member that stands for the pods: their Kubernetes service account itself."""
    return target.universe.workload_identity_principal(target.project, project_number, target.namespace, WRITER_KSA)


def transfer_objects(
    request: ShardRequest, *, instance: str, rollout_id: str, token: str | None
) -> tuple[KubernetesObject, ...]:
    """What does `request` inside the cluster, the Job last.

    Args:
        instance: the Deployment that the weights are for: whoever removes it removes these as well.
        token: of the hub, for a Secret of the Job's own; None for public models.
    """
    spec = request.spec
    memory_mib = spec.memory_limit_bytes // MIB
    labels = ownership_labels(rollout_id, instance=instance) | {"app": request.job_name}
    files = [*(["namespace.yaml"] if request.target.namespace != "default" else []), *_MANIFESTS]
    values = {
        "job_name": request.job_name,
        "namespace": request.target.namespace,
        "labels": labels,
        "shared_labels": ownership_labels(rollout_id),
        "ksa": WRITER_KSA,
        "ksa_annotations": {},
        "shards": request.shards,
        "writer_ksa": WRITER_KSA,
        "image": spec.pod_image,
        "transfer_request": request.model_dump_json(),
        "hub_token_secret": request.job_name,
        # A quarter on top: the kernel's socket buffers count for the pod, too.
        "resources": {"cpu": str(_CPUS), "memory": f"{memory_mib + memory_mib // 4}Mi"},
    }
    if token is not None:
        files.insert(len(files) - 1, "hf-token.yaml")
        values["hub_token_base64"] = base64.b64encode(token.encode()).decode()
    return render(read_manifests(files), values)
