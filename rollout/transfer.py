"""The transfer of weights as data: what is asked for, how files are cut into parts, and the proof of what arrived.

The work itself is in `rollout.clients.transfer`; how long it takes at which size is in `predict_transfer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from rollout.bucket_objects import StoredObject
from rollout.errors import BadInput
from rollout.model import ModelFile, PinnedModel
from rollout.report import StepStatus
from rollout.selection import RESERVED_FOLDER
from rollout.values import CommitSha, RepoId, Sha256, Value

MIB = 2**20

MIN_PART_BYTES = 5 * MIB
MAX_PART_BYTES = 5 * 1024 * MIB
MAX_PARTS = 10_000
"""https://cloud.google.com/storage/quotas#requests: limits of XML API multipart uploads."""

_PARTS_PER_CONNECTION = 32
"""At least, unless that makes parts smaller than the service allows."""

PROCESS_BYTES = 160 * MIB
"""What a process takes that has imported the clients, with TLS buffers and thread stacks; measured at 95 MiB."""

READY_MARKER = f"{RESERVED_FOLDER}ready.json"
"""Below the model path; written last. Who finds it, and in it the objects of the listing, has the proof."""


WORK_FOLDER = f"{RESERVED_FOLDER}transfer/"
"""Below the model path: claims and files on their way; empty once a transfer has finished."""


ABANDONED_AFTER_DAYS = 7
"""A killed transfer whose branch has moved on is never taken up again, and its parts cost as much as objects; seven
days without a sign of life: longer than anybody waits with a rerun, which would have to send everything anew."""


class Route(StrEnum):
    STREAM = "stream"
    """From the hub straight into the bucket, through memory."""
    STAGE = "stage"
    """To a local folder (hf_xet, hf_transfer), then into the bucket: for those who want the local copy."""


class TransferSpec(Value):
    """How weights are moved."""

    route: Route = Route.STREAM
    memory_limit_bytes: Annotated[int, Field(ge=256 * MIB)] = 512 * MIB
    """Resident memory of the transferring process, whatever the size of the model."""
    part_bytes: Annotated[int, Field(ge=MIN_PART_BYTES, le=MAX_PART_BYTES)] = 16 * MIB
    """Of the largest part; `part_bytes_of` a small model is less. 16 MiB: at 50 MB/s per connection one request each
    0.3 s, so that a 20 ms round trip costs 6 %; 22 such buffers fit into the default memory."""
    connections: Annotated[int, Field(ge=1, le=64)] = 8
    """To the hub, and as many to the bucket."""
    stall_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """A connection that moves no byte for so long has failed; 30 s: beyond any retransmission that still succeeds."""
    attempts: Annotated[int, Field(ge=1)] = 8
    """Per part, in a row without a byte of progress; 8: with back-off from 0.5 s to 30 s about a minute and a half."""
    claim_ttl_s: Annotated[float, Field(gt=0)] = 60.0
    """A writer that has not renewed its claim for so long is dead; it renews three times as often."""
    staging_dir: str | None = None
    """Folder of the stage route; None takes a folder of the model in the user's cache."""
    pods: Annotated[int, Field(ge=0, le=1000)] = 0
    """Pods of the cluster that share the files; 0: from where the flow runs. `predict_transfer` tells what they buy."""
    pod_image: str | None = None
    """Image of these pods: any that holds this package, such as the worker's, best pinned by digest."""
    include: tuple[str, ...] = ()
    """Patterns of files to transfer beyond the default choice."""
    exclude: tuple[str, ...] = ()
    """Patterns of files to leave out."""

    @model_validator(mode="after")
    def _buffers_fit(self) -> TransferSpec:
        if self.buffers(self.part_bytes) < 2:
            raise ValueError(
                f"part_bytes={self.part_bytes} leaves no room for two buffers in memory_limit_bytes="
                f"{self.memory_limit_bytes}: raise the limit or lower part_bytes"
            )
        return self

    @model_validator(mode="after")
    def _pods_have_an_image(self) -> TransferSpec:
        if self.pods and not self.pod_image:
            raise ValueError(f"pods={self.pods} need pod_image: an image that holds this package, e.g. the worker's")
        return self

    @model_validator(mode="after")
    def _pods_stream(self) -> TransferSpec:
        if self.pods and self.route is Route.STAGE:
            raise ValueError(f"route=stage wants a disk, and the {self.pods} pods have none: use stream, or pods=0")
        return self

    def buffers(self, part_bytes: int) -> int:
        """How many parts of this size may be in memory."""
        return (self.memory_limit_bytes - PROCESS_BYTES) // part_bytes

    def part_bytes_of(self, model_bytes: int) -> int:
        """The size of the parts into which a model of `model_bytes` is cut, in whole MiB below `part_bytes`.

        A part is sent once it has been read, so the upload begins one part late on each connection: with
        `_PARTS_PER_CONNECTION` of them that is 3 % of the time.
        """
        wanted = math.ceil(model_bytes / self.connections / _PARTS_PER_CONNECTION / MIB) * MIB
        return min(self.part_bytes, max(MIN_PART_BYTES, wanted))


class Part(Value):
    """A range of a file: what one request moves."""

    number: Annotated[int, Field(ge=1, le=MAX_PARTS)]
    start: Annotated[int, Field(ge=0)]
    size_bytes: Annotated[int, Field(ge=0)]

    @property
    def end(self) -> int:
        return self.start + self.size_bytes


def plan_parts(size_bytes: int, part_bytes: int) -> tuple[Part, ...]:
    """Cut a file into parts of equal size, the last one shorter; an empty file is one empty part.

    Raises:
        BadInput: more parts than a multipart upload may have.
    """
    count = max(1, math.ceil(size_bytes / part_bytes))
    if count > MAX_PARTS:
        raise BadInput(
            f"a file of {size_bytes:,} bytes needs {count:,} parts of {part_bytes:,} bytes; {MAX_PARTS:,} are allowed.",
            resolution=f"Set part_bytes to at least {math.ceil(size_bytes / MAX_PARTS / MIB)} MiB.",
        )
    starts = (index * part_bytes for index in range(count))
    return tuple(
        Part(number=number, start=start, size_bytes=min(part_bytes, size_bytes - start))
        for number, start in enumerate(starts, 1)
    )


class Progress(Value):
    """Where a transfer stands."""

    bytes_done: int
    """Arrived in the bucket, or found there; while `is_staging`, on the disk."""
    bytes_total: int
    files_done: int
    files_total: int
    bytes_per_s: float
    """Over the whole run so far, without what was found there."""
    elapsed_s: float
    is_staging: bool = False
    """The route `stage` fetches the files to the disk; the way into the bucket is still to come."""

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far; None before the first byte."""
        return (self.bytes_total - self.bytes_done) / self.bytes_per_s if self.bytes_per_s > 0 else None

    @property
    def share(self) -> float:
        return self.bytes_done / self.bytes_total if self.bytes_total else 1.0

    @property
    def text(self) -> str:
        """For people: bytes, rate and time left."""
        place = " on the disk" if self.is_staging else ""
        left = "starting" if self.seconds_left is None else f"{self.seconds_left:.0f} s left"
        return (
            f"{self.bytes_done / 1e9:.2f} of {self.bytes_total / 1e9:.2f} GB{place},"
            f" {self.bytes_per_s / 1e6:.0f} MB/s, {left}"
        )


class UnfinishedTransfer(Value):
    """A model path where a transfer is going on or was left unfinished."""

    prefix: str
    """In the bucket; ends in a slash unless it is the bucket's root."""
    last_sign_at: datetime
    """When it last wrote there: a living transfer renews its claim three times a minute."""


class Source(StrEnum):
    """Where the bytes of a file came from."""

    HUB = "hub"
    DISK = "disk"
    BUCKET = "bucket"
    """It was there already, and proven."""


class FileReport(Value):
    """One file's way into the bucket."""

    path: str
    size_bytes: int
    sha256: Sha256
    crc32c: str
    """Hexadecimal; computed here over the bytes that gave `sha256`, and equal to the bucket's."""
    generation: int
    source: Source
    route: Route
    seconds: float
    retries: int = 0
    bytes_sent: int = 0
    """To the bucket, with what had to be sent again."""


class TransferReport(Value):
    """What a transfer did. `status` is `unchanged` when the marker proved that nothing was to do."""

    repo_id: RepoId
    commit_sha: CommitSha
    uri: str
    """Model path: what `--model` takes."""
    route: Route
    status: StepStatus
    files: tuple[FileReport, ...]
    seconds: float
    bytes_received: int = 0
    """From the hub, with what had to be read again."""
    bytes_sent: int = 0
    requests: int = 0
    """To hub and bucket."""
    retries: int = 0
    leftovers_removed: int = 0
    """Unfinished uploads and temporary objects of earlier runs."""
    shard: str = ""
    """`2 of 8` when this was one share of a larger transfer."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def bytes_per_s(self) -> float:
        return self.total_bytes / self.seconds if self.seconds else 0.0

    def rows(self) -> list[dict[str, str | int | float]]:
        """One row per file for a table artifact."""
        return [
            {
                "file": file.path,
                "bytes": file.size_bytes,
                "sha256": file.sha256,
                "crc32c": file.crc32c,
                "source": file.source.value,
                "route": file.route.value,
                "seconds": round(file.seconds, 2),
                "retries": file.retries,
            }
            for file in self.files
        ]


class ProvenFile(Value):
    """A file that was hashed on its way and found equal in the bucket."""

    path: str
    size_bytes: int
    sha256: Sha256
    crc32c: str
    generation: int


class Provenance(Value):
    """The ready marker: which commit lies here, and the proof of every file. Written last, in one piece."""

    schema_version: int = 1
    repo_id: RepoId
    commit_sha: CommitSha
    files: tuple[ProvenFile, ...]
    tool: str = "llm-rollout"
    tool_version: str
    finished_at: datetime

    def proves(self, pinned: PinnedModel, listing: Mapping[str, StoredObject]) -> bool:
        """Whether `listing` (by path below the model path) still holds exactly the files of `pinned`."""
        if (self.repo_id, self.commit_sha) != (pinned.repo_id, pinned.commit_sha):
            return False
        proven = {file.path: file for file in self.files}
        return all(
            file.path in proven and is_same_object(proven[file.path], file, listing.get(file.path))
            for file in pinned.files
        )


_CONTENT_KEY, _SHA256_KEY, _CRC32C_KEY = "llm-rollout-content", "llm-rollout-sha256", "llm-rollout-crc32c"


def content_of(file: ModelFile) -> str:
    """What the hub says the file holds, as one word."""
    return f"sha256:{file.sha256}" if file.sha256 else f"git-blob-sha1:{file.git_blob_sha1}"


def content_metadata(file: ModelFile) -> dict[str, str]:
    """Custom metadata of an object that is meant to hold `file`; not yet a proof."""
    return {_CONTENT_KEY: content_of(file)}


def proof_metadata(sha256: str, crc32c: int) -> dict[str, str]:
    """Custom metadata that turns `content_metadata` into a proof: set once the object's bytes were found right."""
    return {_SHA256_KEY: sha256, _CRC32C_KEY: f"{crc32c:08x}"}


def proven_file(file: ModelFile, found: StoredObject | None) -> ProvenFile | None:
    """The proof that an object carries in its metadata, if it is one of `file` and still fits the object's bytes."""
    if found is None or found.size_bytes != file.size_bytes:
        return None
    stated = found.metadata
    if stated.get(_CONTENT_KEY) != content_of(file) or stated.get(_CRC32C_KEY) != found.crc32c_hex:
        return None
    return ProvenFile(
        path=file.path,
        size_bytes=file.size_bytes,
        sha256=stated.get(_SHA256_KEY, ""),
        crc32c=found.crc32c_hex,
        generation=found.generation,
    )


def is_same_object(proven: ProvenFile, wanted: ModelFile, found: StoredObject | None) -> bool:
    """Whether the object is the very one that was proven, and what was proven is what is wanted."""
    return (
        found is not None
        and found.generation == proven.generation
        and found.size_bytes == proven.size_bytes == wanted.size_bytes
        and found.crc32c_hex == proven.crc32c
        and wanted.sha256 in (None, proven.sha256)
    )


def shard_files(files: Iterable[ModelFile], count: int) -> tuple[tuple[ModelFile, ...], ...]:
    """Share files out over `count` workers: largest first, each to the worker with the least so far.

    Every worker computes the same shares from the same commit, so nothing has to be agreed upon. The largest share is
    at most 4/3 - 1/(3·count) of the best possible one (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    shares: list[list[ModelFile]] = [[] for _ in range(count)]
    loads = [0] * count
    for file in sorted(files, key=lambda file: (-file.size_bytes, file.path)):
        least = loads.index(min(loads))
        shares[least].append(file)
        loads[least] += file.size_bytes
    return tuple(tuple(share) for share in shares)


class Links(Value):
    """Rates in bytes/s that bound a transfer; the defaults are planning figures, not promises: measure your own."""

    hub_per_connection: float = 60e6
    """One HTTPS stream from the hub's CDN."""
    hub_total: float = 10e9
    """All pods together."""
    storage_per_connection: float = 100e6
    """One multipart part into Cloud Storage in the same region."""
    storage_total: float = 25e9
    """200 Gbit/s: Cloud Storage's default ingress quota per project and region is in this order."""
    network_per_pod: float = 2e9
    """16 Gbit/s: a pod on a machine with eight vCPUs."""
    hash_per_core: float = 1.4e9
    """sha256 with the CPU's SHA instructions, measured; about 0.45e9 without."""
    cores_per_pod: Annotated[int, Field(ge=1)] = 4
    pod_start_s: float = 45.0
    """Schedule, pull and start a pod on a node that exists."""


class TransferForecast(Value):
    """How long a transfer takes and what bounds it."""

    pods: int
    connections: int
    """Of one pod, to the hub."""
    bytes_per_s: float
    seconds: float
    bound_by: str
    largest_share_bytes: int


def predict_transfer(
    files: Sequence[ModelFile], *, pods: int, connections: int, links: Links | None = None
) -> TransferForecast:
    """Forecast from the narrowest of the links: streams, network card, hashing, hub and bucket.

    A pod moves at ``min(connections × per connection, network, cores × hash rate)``; all pods together at most at what
    hub and bucket give. The run lasts as long as the largest share. Files are not split between pods, so more pods
    than large files buy nothing: `shard_files` then leaves pods idle, and the forecast says so.
    """
    links = links or Links()
    share = max((sum(file.size_bytes for file in share) for share in shard_files(files, pods)), default=0)
    total = sum(file.size_bytes for file in files)
    busy = max(1, min(pods, math.ceil(total / share) if share else 1))
    rates = {
        "the hub's streams": connections * links.hub_per_connection,
        "the bucket's streams": connections * links.storage_per_connection,
        # Every byte passes the card twice, but in opposite directions.
        "the pod's network": links.network_per_pod,
        "hashing": links.cores_per_pod * links.hash_per_core,
        "the hub": links.hub_total / busy,
        "the bucket": links.storage_total / busy,
    }
    bound_by = min(rates, key=lambda name: rates[name])
    seconds = share / rates[bound_by] + (links.pod_start_s if pods > 1 else 0.0)
    return TransferForecast(
        pods=pods,
        connections=connections,
        bytes_per_s=total / seconds if seconds else 0.0,
        seconds=seconds,
        bound_by=bound_by,
        largest_share_bytes=share,
    )
