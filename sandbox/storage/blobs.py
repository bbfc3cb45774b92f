"""Buckets and objects on disk.

An object is a directory of segment files plus `meta.json`, prepared aside and renamed into place, so it appears whole
or not at all (also after `kill -9`; a power cut may lose it, nothing is synced). Composing, copying and completing a
multipart upload hard-link segments and combine checksums: no byte is copied.

    ROOT/buckets/BUCKET/bucket.json
    ROOT/buckets/BUCKET/objects/GENERATION/{meta.json,00000,00001,…}
    ROOT/buckets/BUCKET/multipart/UPLOAD/…      XML multipart uploads (uploads.py)
    ROOT/sessions/SESSION/…                     resumable uploads (uploads.py)
    ROOT/incoming/…                             bytes on their way; wiped at start

All bookkeeping runs in the serving thread's event loop without awaiting, so a precondition and the change that it
guards are one step. Only bulk reads and writes run on worker threads.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sandbox.storage import checksums
from sandbox.storage.errors import no_such_object, not_modified, precondition_failed

WRITE_BATCH_BYTES = 1 << 20
"""1 MiB: large enough that handing a batch to a worker thread (about 0.1 ms) costs little at 1 GB/s."""

MD5_LIMIT_BYTES = 8 << 20
"""Larger objects get an MD5 only when the sender states one: MD5 runs at half the speed that this server must reach."""

WRITABLE_PROPERTIES = (
    "contentType",
    "contentEncoding",
    "contentDisposition",
    "contentLanguage",
    "cacheControl",
    "customTime",
    "metadata",
    "storageClass",
)


def now_rfc3339() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def versions_etag(*versions: int) -> str:
    """The service's etags: a protobuf message of the version counters in base64; the first of a bucket is `CAE=`."""
    message = bytearray()
    for number, version in enumerate(versions, start=1):
        message.append(number << 3)
        while version > 0x7F:
            message.append(version & 0x7F | 0x80)
            version >>= 7
        message.append(version)
    return base64.b64encode(bytes(message)).decode()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file atomically."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Content:
    """Finished bytes: segment files in order, their sizes, and the checksums of the whole."""

    segments: tuple[Path, ...]
    sizes: tuple[int, ...]
    crc32c: int
    md5: str | None = None

    @property
    def size(self) -> int:
        return sum(self.sizes)


def joined(contents: Sequence[Content]) -> Content:
    """The concatenation; it has no MD5, as composite objects have none."""
    crc = 0
    for content in contents:
        crc = checksums.combine_crc32c(crc, content.crc32c, content.size)
    segments = tuple(segment for content in contents for segment in content.segments)
    return Content(segments, tuple(size for content in contents for size in content.sizes), crc)


@dataclass
class StoredObject:
    """A live object. `properties` holds what a client may write."""

    name: str
    generation: int
    sizes: tuple[int, ...]
    crc32c: int
    md5: str | None
    properties: dict[str, Any]
    created: str
    updated: str
    metageneration: int = 1
    component_count: int | None = None

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def etag(self) -> str:
        return versions_etag(self.generation, self.metageneration)

    def goog_hash(self) -> str:
        crc = f"crc32c={checksums.encode_crc32c(self.crc32c)}"
        return f"{crc},md5={self.md5}" if self.md5 else crc


@dataclass(frozen=True)
class Preconditions:
    """What must hold of the live object for a request to go on; generation 0 means that there is none."""

    generation_match: int | None = None
    generation_not_match: int | None = None
    metageneration_match: int | None = None
    metageneration_not_match: int | None = None

    def check(self, current: StoredObject | None, *, reading: bool = False) -> None:
        """Raises the 412 of the service, or on reads its 304 when the object is the one that the client knows."""
        generation = current.generation if current else 0
        metageneration = current.metageneration if current else None
        if self.generation_match is not None and generation != self.generation_match:
            raise precondition_failed("x-goog-if-generation-match")
        if self.metageneration_match is not None and metageneration != self.metageneration_match:
            raise precondition_failed("x-goog-if-metageneration-match")
        for unwanted, actual in (
            (self.generation_not_match, generation),
            (self.metageneration_not_match, metageneration),
        ):
            if unwanted is not None and unwanted == actual:
                raise not_modified() if reading and current else precondition_failed("x-goog-if-generation-not-match")


@dataclass
class Bucket:
    """A bucket of the operator. `resource` holds the fields that a client may write, as the API shows them."""

    name: str
    project: str
    resource: dict[str, Any]
    bindings: list[dict[str, Any]]
    created: str
    updated: str
    metageneration: int = 1
    objects: dict[str, StoredObject] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        return versions_etag(self.metageneration)

    @property
    def public_access_prevented(self) -> bool:
        return self.resource["iamConfiguration"]["publicAccessPrevention"] == "enforced"

    def live(self, name: str, generation: int | None = None) -> StoredObject:
        found = self.objects.get(name)
        if found is None or (generation is not None and found.generation != generation):
            raise no_such_object(self.name, name, generation)
        return found


class BlobWriter:
    """Appends to a file and checksums it on worker threads, one batch at a time, while the next bytes come in."""

    def __init__(self, path: Path, *, size: int = 0, crc32c: int = 0) -> None:
        self.path = path
        self.size = size
        self.crc32c = crc32c
        self._file = path.open("ab", buffering=0)
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._flushing: asyncio.Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        self._batch.append(chunk)
        self._batch_bytes += len(chunk)
        if self._batch_bytes >= WRITE_BATCH_BYTES:
            await self._hand_over()

    async def close(self) -> None:
        """After this, the file, `size` and `crc32c` cover everything that was written."""
        try:
            if self._batch:
                await self._hand_over()
            await self._settle()
        finally:
            self._file.close()

    async def _hand_over(self) -> None:
        await self._settle()
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        self._flushing = asyncio.get_running_loop().run_in_executor(None, self._flush, batch)

    async def _settle(self) -> None:
        if self._flushing is not None:
            # Shielded: a cancelled request must not leave a thread writing to a file that is about to close.
            flushing = self._flushing
            await asyncio.shield(flushing)
            self._flushing = None

    def _flush(self, batch: list[bytes]) -> None:
        for chunk in batch:
            view = memoryview(chunk)
            while view:
                view = view[self._file.write(view) :]
            self.crc32c = checksums.extend_crc32c(self.crc32c, chunk)
            self.size += len(chunk)


class Store:
    """The state of the server: buckets with their objects, in memory for lookups and on disk for good."""

    def __init__(self, root: Path, *, iam_propagation_s: float = 0.0) -> None:
        self.root = root
        self._iam_propagation_s = iam_propagation_s
        self._superseded_bindings: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        self.incoming = root / "incoming"
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)
        (root / "buckets").mkdir(exist_ok=True)
        self.buckets: dict[str, Bucket] = {}
        self._last_generation = 0
        self._readers: dict[Path, int] = {}
        self._retired: set[Path] = set()
        for path in sorted((root / "buckets").glob("*/bucket.json")):
            self._load_bucket(path)

    # Buckets

    def add_bucket(self, name: str, project: str, resource: dict[str, Any], bindings: list[dict[str, Any]]) -> Bucket:
        now = now_rfc3339()
        bucket = Bucket(name, project, resource, bindings, now, now)
        (self.bucket_path(name) / "objects").mkdir(parents=True)
        self.buckets[name] = bucket
        self._save_bucket(bucket)
        return bucket

    def set_bindings(self, bucket: Bucket, bindings: list[dict[str, Any]]) -> None:
        """Change the policy; callers feel it once the propagation time is over."""
        self._superseded_bindings[bucket.name] = (
            time.monotonic() + self._iam_propagation_s,
            self.effective_bindings(bucket),
        )
        bucket.bindings = bindings
        self.touch_bucket(bucket)

    def effective_bindings(self, bucket: Bucket) -> list[dict[str, Any]]:
        until, bindings = self._superseded_bindings.get(bucket.name, (0.0, bucket.bindings))
        return bindings if time.monotonic() < until else bucket.bindings

    def touch_bucket(self, bucket: Bucket) -> None:
        """Record a change that the caller made to the bucket's resource or policy."""
        bucket.metageneration += 1
        bucket.updated = now_rfc3339()
        self._save_bucket(bucket)

    def remove_bucket(self, bucket: Bucket) -> None:
        del self.buckets[bucket.name]
        self._superseded_bindings.pop(bucket.name, None)
        self._discard(self.bucket_path(bucket.name))

    def bucket_path(self, name: str) -> Path:
        return self.root / "buckets" / name

    # Objects

    def incoming_path(self) -> Path:
        return self.incoming / uuid.uuid4().hex

    def publish(
        self,
        bucket: Bucket,
        name: str,
        content: Content,
        properties: Mapping[str, Any],
        preconditions: Preconditions,
        *,
        component_count: int | None = None,
    ) -> StoredObject:
        """Make `content` the live object `name`, in place of what was there. Its segments are linked, not moved."""
        previous = bucket.objects.get(name)
        preconditions.check(previous)
        now = now_rfc3339()
        stored = StoredObject(
            name=name,
            generation=self._next_generation(),
            sizes=content.sizes,
            crc32c=content.crc32c,
            md5=content.md5,
            properties={key: value for key, value in properties.items() if value is not None},
            created=now,
            updated=now,
            component_count=component_count,
        )
        staged = self.incoming_path()
        staged.mkdir()
        for index, segment in enumerate(content.segments):
            os.link(segment, staged / _segment_name(index))
        write_json(staged / "meta.json", asdict(stored))
        staged.rename(self._object_path(bucket, stored))
        bucket.objects[name] = stored
        if previous is not None:
            self._retire(self._object_path(bucket, previous))
        return stored

    def update_object(self, bucket: Bucket, stored: StoredObject) -> None:
        """Record a change that the caller made to the object's properties."""
        stored.metageneration += 1
        stored.updated = now_rfc3339()
        write_json(self._object_path(bucket, stored) / "meta.json", asdict(stored))

    def remove_object(self, bucket: Bucket, stored: StoredObject) -> None:
        del bucket.objects[stored.name]
        self._retire(self._object_path(bucket, stored))

    def content(self, bucket: Bucket, stored: StoredObject) -> Content:
        folder = self._object_path(bucket, stored)
        segments = tuple(folder / _segment_name(index) for index in range(len(stored.sizes)))
        return Content(segments, stored.sizes, stored.crc32c, stored.md5)

    def hold(self, bucket: Bucket, stored: StoredObject) -> Path:
        """Keep the object's files while someone reads them, whatever happens to the object; `release` the result."""
        folder = self._object_path(bucket, stored)
        self._readers[folder] = self._readers.get(folder, 0) + 1
        return folder

    def release(self, folder: Path) -> None:
        self._readers[folder] -= 1
        if not self._readers[folder]:
            del self._readers[folder]
            if folder in self._retired:
                self._retired.discard(folder)
                self._discard(folder)

    def discard(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _retire(self, folder: Path) -> None:
        if folder in self._readers:
            # The metadata goes at once, so that a restart does not find the object again.
            (folder / "meta.json").unlink()
            self._retired.add(folder)
        else:
            self._discard(folder)

    def _discard(self, folder: Path) -> None:
        doomed = self.incoming_path()
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _object_path(self, bucket: Bucket, stored: StoredObject) -> Path:
        return self.bucket_path(bucket.name) / "objects" / str(stored.generation)

    def _next_generation(self) -> int:
        """Microseconds since the epoch, as the service's generations look, and never the same twice."""
        self._last_generation = max(self._last_generation + 1, time.time_ns() // 1000)
        return self._last_generation

    def _save_bucket(self, bucket: Bucket) -> None:
        state = {name: value for name, value in vars(bucket).items() if name != "objects"}
        write_json(self.bucket_path(bucket.name) / "bucket.json", state)

    def _load_bucket(self, path: Path) -> None:
        bucket = Bucket(**json.loads(path.read_text(encoding="utf-8")))
        self.buckets[bucket.name] = bucket
        for folder in sorted((path.parent / "objects").iterdir(), key=lambda folder: int(folder.name)):
            meta = folder / "meta.json"
            if not meta.exists():
                shutil.rmtree(folder)
                continue
            state = json.loads(meta.read_text(encoding="utf-8"))
            stored = StoredObject(**state | {"sizes": tuple(state["sizes"])})
            # Two generations of a name: the server died between publishing one and dropping the other.
            if older := bucket.objects.get(stored.name):
                shutil.rmtree(self._object_path(bucket, older))
            bucket.objects[stored.name] = stored
            self._last_generation = max(self._last_generation, stored.generation)


def _segment_name(index: int) -> str:
    return f"{index:05d}"
