"""The transfer inside the cluster as objects: an Indexed Job whose pods each bring one share of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from rollout.errors import BadInput
from rollout.model import PinnedModel
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.target import Target
from rollout.transfer import MIB, TransferSpec
from rollout.values import KubernetesName, Value

REQUEST_VARIABLE = "TRANSFER_REQUEST"
INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in every pod of an Indexed Job."""
TOKEN_VARIABLE = "HF_TOKEN"

_MANIFEST = "transfer-job.yaml"
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


def shard_of(environment: Mapping[str, str]) -> tuple[ShardRequest, int]:
    """The request and the index (from 0) of the pod that has this environment.

    Raises:
        BadInput: a variable is missing, or the index is none of the request's.
    """
    missing = [name for name in (REQUEST_VARIABLE, INDEX_VARIABLE) if name not in environment]
    if missing:
        raise BadInput(
            f"{' and '.join(missing)} are not set.", resolution=f"This runs in the pods of manifests/{_MANIFEST} only."
        )
    request = ShardRequest.model_validate_json(environment[REQUEST_VARIABLE])
    index = environment[INDEX_VARIABLE]
    if not index.isdigit() or int(index) >= request.shards:
        raise BadInput(f"{INDEX_VARIABLE}={index} is none of {request.shards} shares.")
    return request, int(index)


def transfer_job_object(
    request: ShardRequest,
    *,
    image: str,
    writer_ksa: KubernetesName,
    hub_token_secret: KubernetesName = "hf-secret",
    labels: Mapping[str, str],
) -> KubernetesObject:
    """The Job that does `request`.

    Args:
        image: any that holds this package, best pinned by digest.
        writer_ksa: Kubernetes service account whose Google identity holds roles/storage.objectUser on the bucket.
        hub_token_secret: Secret with the key `hf_api_token`; it may be absent for public models.
    """
    memory_mib = request.spec.memory_limit_bytes // MIB
    values = {
        "job_name": request.job_name,
        "namespace": request.target.namespace,
        "labels": dict(labels),
        "shards": request.shards,
        "writer_ksa": writer_ksa,
        "image": image,
        "transfer_request": request.model_dump_json(),
        "hub_token_secret": hub_token_secret,
        # A quarter on top: the kernel's socket buffers count for the pod, too.
        "resources": {"cpu": str(_CPUS), "memory": f"{memory_mib + memory_mib // 4}Mi"},
    }
    (job,) = render(read_manifests([_MANIFEST]), values)
    return job
