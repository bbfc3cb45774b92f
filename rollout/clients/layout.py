"""Look at a model path in a bucket: one listing, the small files, and the headers of the shards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from rollout import layout
from rollout.bucket_objects import GcsUri
from rollout.clients.retrying import with_retries
from rollout.clients.storage import StorageClient
from rollout.layout import LayoutReport, SafetensorsHeader
from rollout.target import Target

_READS_AT_ONCE = 8
_ATTEMPTS = 5
_FIRST_READ_BYTES = 2**17
"""Most headers are shorter, so that one read per shard is enough."""


def check_layout(target: Target, uri: str, *, vllm_release: str | None = None) -> LayoutReport:
    """Whether a model server could load from `uri`, any `gs://` path that the target's credentials may read.

    Args:
        vllm_release: of the image that will serve, if it is known.

    Raises:
        BadInput: not a `gs://` address.
        BucketNotFound, PermissionMissing, TransientError.
    """
    place = GcsUri.parse(uri)
    storage = StorageClient(target.model_copy(update={"bucket": place.bucket}))
    sizes = {stored.name.removeprefix(place.prefix): stored.size_bytes for stored in storage.list_objects(place.prefix)}
    present = [name for name in layout.DOCUMENTS if name in sizes]
    shards = layout.shards_to_read(sizes)
    with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        read = partial(_read, storage, place.prefix)
        documents = dict(zip(present, threads.map(read, present), strict=True))
        headers = dict(zip(shards, threads.map(partial(_header, storage, place.prefix), shards), strict=True))
    elsewhere = () if layout.CONFIG in sizes else _config_paths(storage)
    return layout.check(
        str(place).rstrip("/"), sizes, documents, headers, config_paths=elsewhere, vllm_release=vllm_release
    )


def _read(storage: StorageClient, prefix: str, path: str, *, end: int | None = None) -> bytes:
    return with_retries(lambda: storage.read(f"{prefix}{path}", end=end), attempts=_ATTEMPTS)


def _header(storage: StorageClient, prefix: str, shard: str) -> SafetensorsHeader | str:
    data = _read(storage, prefix, shard, end=_FIRST_READ_BYTES)
    try:
        size = layout.header_bytes(data)
        if size > len(data) == _FIRST_READ_BYTES:
            data = _read(storage, prefix, shard, end=size)
        return layout.parse_header(data)
    except ValueError as error:
        return str(error)


def _config_paths(storage: StorageClient) -> tuple[str, ...]:
    """Every path in the bucket that could be a model path."""
    names = (stored.name for stored in storage.list_objects())
    return tuple(
        str(GcsUri(bucket=storage.bucket_name, name=name.rpartition("/")[0]))
        for name in names
        if name.rpartition("/")[2] == layout.CONFIG
    )
