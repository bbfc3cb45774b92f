"""The moving of bytes: ranged reads into pooled buffers, hashing in one pass, parallel uploads out of the same buffers.

    fetchers (N threads)           hashing                       senders (N threads)
    hub or disk → a free buffer →  sha256 in file order,    ┬→   part → multipart upload
                                   crc32c of the part       ┘    buffer goes back when hashed *and* sent

*Memory* is the number of buffers. A thread takes a free buffer before it takes the next part, so the earliest part that
hashing waits for always has one: no order of arrival can block the rest.

*Proof.* sha256 runs over the bytes in memory; every part is sent with the crc32c of the same bytes, which the service
checks; and the crc32c that the service computes over the assembled object must equal the one of the hashed stream. Only
then is the object marked as proven, and only proven objects are ever given a final name (`rollout.clients.transfer`).

*Resume.* Parts that an earlier process sent are found by listing. sha256 cannot be continued from the middle, so such a
part is read from the hub once more for hashing, and not sent; what the dead process sent is then proven like everything
else by the crc32c of the whole. Files are worked on in order, one per core at a time, so a kill costs that reading for
these few files only. A wrong sha256 leads to the same second reading: only parts whose crc32c differs are sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import google_crc32c
import numpy as np

from rollout.bucket_objects import StoredObject
from rollout.clients.retrying import wait_before_retry_s, with_retries
from rollout.clients.storage import StorageClient
from rollout.clients.uploads import ArrivedPart, Upload, Uploader
from rollout.crc32c import combine_all
from rollout.errors import HashMismatch, NotFound, TransferFailed, TransientError
from rollout.model import ModelFile
from rollout.transfer import Part, Progress, TransferSpec, plan_parts, proof_metadata

T = TypeVar("T")

HASH_ATTEMPTS = 3
"""Times that a file is read before its sha256 counts as wrong at the source."""

LANES = min(4, os.cpu_count() or 1)
"""Files in work at a time: hashing one takes one core (1.4 GiB/s). More would cost more reading after a kill."""

_TICK_S = 0.25
"""Between two looks of a waiting thread at the stop signal, and two reports of progress."""

_CRC_SLICE_BYTES = 2**20
"""crc32c holds the interpreter's lock: 60 µs per MiB, after which others get their turn."""


class ByteSource(Protocol):
    """Where a file's bytes come from."""

    @property
    def where(self) -> str: ...

    def read(self, start: int, view: memoryview) -> Iterator[int]:
        """Fill `view` from `start`, and yield how many bytes came each time. Raises TransientError to be continued."""
        ...

    def reject(self) -> None:
        """The bytes that came were not the file's: forget where they came from. The next reading gets others."""
        ...


class _Pass:
    """The hashing of one reading of a file."""

    def __init__(self, file: ModelFile) -> None:
        self.sha256 = hashlib.sha256()
        self.git_sha1 = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        self.next_to_hash = 1
        self.waiting: dict[int, tuple[Part, Buffer]] = {}
        self.is_hashing = False


class Job:
    """One file on its way, with what is known to be in the bucket already."""

    def __init__(
        self,
        file: ModelFile,
        source: ByteSource,
        name: str,
        *,
        part_bytes: int,
        metadata: Mapping[str, str],
        upload: Upload | None = None,
        arrived: Sequence[ArrivedPart] = (),
        assembled: StoredObject | None = None,
    ) -> None:
        self.file = file
        self.source = source
        self.name = name
        """Temporary name in the bucket."""
        self.parts = plan_parts(file.size_bytes, part_bytes)
        self.metadata = dict(metadata)
        self.upload = upload
        self.assembled = assembled
        self.arrived = {part.number: part for part in arrived if self._fits(part)}
        self.crc32cs: dict[int, int] = {}
        self.lock = threading.Lock()
        """Held for moments only: the thread that shows progress takes it, too."""
        self.begin_lock = threading.Lock()
        self.retries = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.seconds = 0.0
        self.passes = 0
        self.stored: StoredObject | None = None
        """The proven object."""
        self._started_at: float | None = None
        self.start_pass()
        self.bytes_found = self.bytes_in_bucket
        """What an earlier run had sent."""

    @property
    def is_multipart(self) -> bool:
        return len(self.parts) > 1

    @property
    def crc32c(self) -> int:
        return combine_all((self.crc32cs[part.number], part.size_bytes) for part in self.parts)

    @property
    def sha256(self) -> str:
        return self._pass.sha256.hexdigest()

    @property
    def is_right(self) -> bool:
        """Whether the hashed bytes are what the hub says the file holds."""
        if self.file.sha256 is not None:
            return self.sha256 == self.file.sha256
        return self._pass.git_sha1.hexdigest() == self.file.git_blob_sha1

    @property
    def bytes_in_bucket(self) -> int:
        if self.stored is not None or self.assembled is not None:
            return self.file.size_bytes
        with self.lock:
            return sum(part.size_bytes for part in self.arrived.values())

    def start_pass(self) -> None:
        """Read the file from its beginning (again)."""
        self.passes += 1
        self.to_read = iter(self.parts)
        self._pass = _Pass(self.file)
        self.unfinished = len(self.parts)
        """Parts of this pass that are not yet both hashed and in the bucket."""

    def forget_sent(self) -> None:
        """Trust nothing that was sent."""
        self.upload, self.assembled = None, None
        with self.lock:
            self.arrived.clear()

    def proof(self) -> dict[str, str]:
        """Metadata that marks the object as proven."""
        return proof_metadata(self.sha256, self.crc32c)

    def count(self, *, received: int = 0, sent: int = 0, retries: int = 0) -> None:
        with self.lock:
            self.bytes_received += received
            self.bytes_sent += sent
            self.retries += retries

    def next_part(self) -> Part | None:
        if self._started_at is None:
            self._started_at = time.monotonic()
        return next(self.to_read, None)

    def finish(self, stored: StoredObject) -> None:
        self.stored = stored
        self.seconds = time.monotonic() - (self._started_at or time.monotonic())

    def hash_in_order(self, part: Part, buffer: Buffer, done: Callable[[Job, Buffer], None]) -> None:
        """Hash this part and those behind it that came early; or leave it to the thread that hashes the ones before."""
        current = self._pass  # `done` may begin the next one
        with self.lock:
            current.waiting[part.number] = (part, buffer)
            if current.is_hashing:
                return
            current.is_hashing = True
        while True:
            with self.lock:
                following = current.waiting.pop(current.next_to_hash, None)
                if following is None:
                    current.is_hashing = False
                    return
                current.next_to_hash += 1
            view = following[1].view[: following[0].size_bytes]
            if self.file.sha256 is None:
                current.git_sha1.update(view)
            current.sha256.update(view)
            done(self, following[1])

    def _fits(self, part: ArrivedPart) -> bool:
        return part.number <= len(self.parts) and self.parts[part.number - 1].size_bytes == part.size_bytes


class Buffer:
    """Memory for one part; goes back to the pool when its last user is done."""

    def __init__(self, size_bytes: int) -> None:
        data = bytearray(size_bytes)
        self.view = memoryview(data)
        # crc32c takes read-only bytes or arrays; this is the same memory.
        self._array = np.frombuffer(data, dtype=np.uint8)
        self.users = 0

    def crc32c(self, size_bytes: int) -> int:
        crc = 0
        for start in range(0, size_bytes, _CRC_SLICE_BYTES):
            crc = google_crc32c.extend(crc, self._array[start : min(start + _CRC_SLICE_BYTES, size_bytes)])
        return crc


class Mover:
    """Bring files into the bucket under their temporary names, each proven."""

    def __init__(self, storage: StorageClient, uploader: Uploader, spec: TransferSpec, jobs: Sequence[Job]) -> None:
        self._storage = storage
        self._uploader = uploader
        self._spec = spec
        self._lock = threading.Lock()
        self._unstarted = list(reversed(jobs))
        self._lanes: list[Job] = []
        """Files of which parts are still to be read."""
        self._open = len(jobs)
        self._stop = threading.Event()
        # None tells one waiting thread that all is done.
        self._to_send: queue.SimpleQueue[tuple[Job, Part, Buffer] | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._buffer_bytes = max((1, *(job.parts[0].size_bytes for job in jobs)))
        self._unmade = min(spec.buffers(self._buffer_bytes), sum(len(job.parts) for job in jobs))

    def run(self, tick: Callable[[], None], abandon: Callable[[], None]) -> None:
        """Move everything, calling `tick` a few times per second.

        Args:
            abandon: closes the connections, so that threads which wait for a byte end at once.

        Raises:
            HashMismatch: the source keeps giving other bytes than it states.
            TransferFailed, and whatever clients or `tick` raise; what has arrived stays for the next run.
        """
        count = self._spec.connections
        with ThreadPoolExecutor(2 * count, thread_name_prefix="transfer") as threads:
            workers = [threads.submit(loop) for loop in (self._fetch_loop, self._send_loop) for _ in range(count)]
            try:
                self._watch(workers, tick)
            except BaseException:
                self._stop.set()
                abandon()
                raise

    def _watch(self, workers: Sequence[Future[None]], tick: Callable[[], None]) -> None:
        running: set[Future[None]] = set(workers)
        while running:
            ended, running = wait(running, timeout=_TICK_S, return_when=FIRST_EXCEPTION)
            for worker in ended:
                worker.result()
            tick()

    @property
    def _is_over(self) -> bool:
        return self._stop.is_set() or self._open == 0

    # Fetchers

    def _fetch_loop(self) -> None:
        while not self._is_over:
            try:
                buffer = self._next_buffer()
            except queue.Empty:
                continue
            if buffer is None:
                return
            taken = self._next_part()
            if taken is None:
                # The last parts are on their way; a file that turns out wrong is read again.
                self._free.put(buffer)
                self._stop.wait(_TICK_S / 10)
            elif taken[0].is_multipart:
                self._fetch(*taken, buffer)
            else:
                self._move_small(*taken, buffer)

    def _next_buffer(self) -> Buffer | None:
        """A buffer that is free, or a new one: the first bytes need not wait until all of them are made."""
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        with self._lock:
            may_make = self._unmade > 0
            self._unmade -= may_make
        return Buffer(self._buffer_bytes) if may_make else self._free.get(timeout=_TICK_S)

    def _next_part(self) -> tuple[Job, Part] | None:
        """The next part to read. Files are begun in order, as many at a time as cores can hash."""
        with self._lock:
            while True:
                if len(self._lanes) < LANES and self._unstarted:
                    self._lanes.append(self._unstarted.pop())
                if not self._lanes:
                    return None
                job = self._lanes.pop(0)
                part = job.next_part()
                if part is not None:
                    self._lanes.append(job)
                    return job, part

    def _fetch(self, job: Job, part: Part, buffer: Buffer) -> None:
        crc32c = self._read(job, part, buffer)
        if job.crc32cs.get(part.number, crc32c) != crc32c:
            # Two readings differ: a third one tells whether the first was wrong, or this one.
            crc32c = self._read(job, part, buffer)
        must_send = self._must_send(job, part, crc32c)
        job.crc32cs[part.number] = crc32c
        buffer.users = 2 if must_send else 1
        if must_send:
            self._to_send.put((job, part, buffer))
        job.hash_in_order(part, buffer, self._release)

    def _must_send(self, job: Job, part: Part, crc32c: int) -> bool:
        if job.assembled is not None:
            return False
        if part.number in job.arrived and job.crc32cs.get(part.number, crc32c) == crc32c:
            return False
        with job.begin_lock:
            if job.upload is None:
                job.upload = self._retrying(job, lambda: self._uploader.begin(job.name, job.metadata))
        return True

    def _read(self, job: Job, part: Part, buffer: Buffer) -> int:
        """Fill the buffer, going on from where a failed attempt stopped; returns the crc32c."""
        view = buffer.view[: part.size_bytes]
        filled = failures = 0
        while filled < len(view):
            try:
                for count in job.source.read(part.start + filled, view[filled:]):
                    filled += count
                    failures = 0
                    job.count(received=count)
                    if self._stop.is_set():
                        raise TransferFailed("the transfer was stopped.", where=job.source.where)
            except TransientError as error:
                failures += 1
                if failures >= self._spec.attempts or self._stop.wait(wait_before_retry_s(failures, error)):
                    raise TransferFailed(
                        f"gave up after {failures} attempts: {error.summary}",
                        where=job.source.where,
                        resolution="Rerun: what has arrived is kept.",
                    ) from error
                job.count(retries=1)
        return buffer.crc32c(part.size_bytes)

    # Senders

    def _send_loop(self) -> None:
        while not self._is_over:
            try:
                item = self._to_send.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if item is None:
                return
            job, part, buffer = item
            self._send(job, part, buffer)
            self._release(job, buffer)

    def _send(self, job: Job, part: Part, buffer: Buffer) -> None:
        upload, crc32c = job.upload, job.crc32cs[part.number]
        assert upload is not None, "a part is queued only once its upload is begun"
        view = buffer.view[: part.size_bytes]

        def attempt() -> ArrivedPart:
            job.count(sent=part.size_bytes)
            return self._uploader.send(upload, part.number, view, crc32c)

        arrived = self._retrying(job, attempt)
        with job.lock:
            job.arrived[part.number] = arrived

    def _release(self, job: Job, buffer: Buffer) -> None:
        with self._lock:
            buffer.users -= 1
            if buffer.users:
                return
            job.unfinished -= 1
            is_last = job.unfinished == 0
        self._free.put(buffer)
        if is_last:
            self._settle(job)

    # Proof

    def _settle(self, job: Job) -> None:
        """All bytes were read and sent: prove them, or read what is wrong again."""
        if not job.is_right:
            job.source.reject()
            self._read_again(job, "the sha256 of what the source gives")
            return
        stored = job.assembled or self._assemble(job)
        if (stored.size_bytes, stored.crc32c) != (job.file.size_bytes, job.crc32c):
            # Sent by a process that died: nothing of it is trusted any more.
            self._storage.delete(stored)
            job.forget_sent()
            self._read_again(job, "the crc32c of the assembled object")
            return
        self._finish(job, self._retrying(job, lambda: self._storage.describe(stored, job.proof())))

    def _assemble(self, job: Job) -> StoredObject:
        upload = job.upload
        assert upload is not None, "a file of several parts has an upload"
        # Not found: completed by an attempt whose answer was lost, if the object is there.
        with contextlib.suppress(NotFound):
            self._retrying(job, lambda: self._uploader.complete(upload, list(job.arrived.values())))
        stored = self._retrying(job, lambda: self._storage.find(job.name))
        if stored is None:
            raise TransferFailed("the upload vanished before it was complete.", where=job.name, resolution="Rerun.")
        return stored

    def _read_again(self, job: Job, what: str) -> None:
        if job.passes >= HASH_ATTEMPTS:
            if job.upload is not None and job.assembled is None:
                self._uploader.abort(job.upload)
            raise self._mismatch(job, what)
        job.start_pass()
        with self._lock:
            self._lanes.insert(0, job)

    def _mismatch(self, job: Job, what: str) -> HashMismatch:
        return HashMismatch(
            f"{what} differs from the hub's after {job.passes} readings; nothing wrong was left in the bucket.",
            where=job.source.where,
            resolution="A cache or proxy may hold a damaged copy: try another network, then ask the owner.",
        )

    def _finish(self, job: Job, stored: StoredObject) -> None:
        job.finish(stored)
        with self._lock:
            self._open -= 1
            is_last = self._open == 0
        if is_last:
            for _ in range(self._spec.connections):
                self._free.put(None)
                self._to_send.put(None)

    # Small files

    def _move_small(self, job: Job, part: Part, buffer: Buffer) -> None:
        """A file of one part is proven before its first byte is sent, and needs one request."""
        for _ in range(HASH_ATTEMPTS):
            job.crc32cs[part.number] = self._read(job, part, buffer)
            buffer.users = 1
            job.hash_in_order(part, buffer, lambda _job, _buffer: None)
            if job.is_right:
                break
            job.source.reject()
            job.start_pass()
        else:
            raise self._mismatch(job, "the hash of what the source gives")

        def attempt() -> StoredObject:
            job.count(sent=part.size_bytes)
            return self._uploader.put(
                job.name, buffer.view[: part.size_bytes], job.crc32c, {**job.metadata, **job.proof()}
            )

        self._finish(job, self._retrying(job, attempt))
        self._free.put(buffer)

    def _retrying(self, job: Job, call: Callable[[], T]) -> T:
        return with_retries(
            call, attempts=self._spec.attempts, stop=self._stop, on_retry=lambda _: job.count(retries=1)
        )


def progress_of(jobs: Sequence[Job], found_bytes: int, found_files: int, started_at: float) -> Progress:
    """Where the jobs stand; `found_*` is what was in the bucket, proven, before they began."""
    elapsed_s = time.monotonic() - started_at
    arrived = max(0, sum(job.bytes_in_bucket - job.bytes_found for job in jobs))
    return Progress(
        bytes_done=found_bytes + sum(job.bytes_in_bucket for job in jobs),
        bytes_total=found_bytes + sum(job.file.size_bytes for job in jobs),
        files_done=found_files + sum(job.stored is not None for job in jobs),
        files_total=found_files + len(jobs),
        bytes_per_s=arrived / elapsed_s if elapsed_s > 0 else 0.0,
        elapsed_s=elapsed_s,
    )
