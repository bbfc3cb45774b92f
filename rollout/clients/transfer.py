"""Publish weights: from the hub into the bucket, proven, resumable, with bounded memory and, streaming, without a disk.

What lies below a model path while and after weights are moved:

    config.json, model-….safetensors, …      final names: only ever given to proven objects
    .llm-rollout/transfer/writer.json        the claim of the run that is writing (`rollout.clients.claim`)
    .llm-rollout/transfer/report-0-of-8.json what a share of a transfer on several machines did, until `finish`
    .llm-rollout/transfer/incoming/<digest>.<part bytes>
                                             a file on its way; its metadata says whether it is proven
    .llm-rollout/ready.json                  the ready marker with the provenance, written last

A live model path stays whole: nothing is given its final name before *every* file of the new commit is proven. Then
names change one by one, each under a generation precondition, and the marker is written. The names of files on their
way follow from what they hold, so a later run finds everything again by one listing; nothing has to be remembered.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime
from functools import partial
from importlib.metadata import version

from pydantic import ValidationError

from rollout.bucket_objects import StoredObject
from rollout.clients.claim import Claim
from rollout.clients.hub import HubClient
from rollout.clients.mover import ByteSource, Job, Mover, progress_of
from rollout.clients.raw_http import HttpPool
from rollout.clients.retrying import with_retries
from rollout.clients.staging import Staging
from rollout.clients.storage import StorageClient
from rollout.clients.uploads import ArrivedPart, Upload, Uploader
from rollout.errors import AnotherWriter, TransferFailed
from rollout.model import ModelFile, PinnedModel
from rollout.report import Action, Change, StepStatus, utc_now
from rollout.target import Target
from rollout.transfer import (
    READY_MARKER,
    WORK_FOLDER,
    FileReport,
    Progress,
    Provenance,
    ProvenFile,
    Route,
    Source,
    TransferReport,
    TransferSpec,
    UnfinishedTransfer,
    content_metadata,
    content_of,
    proven_file,
    shard_files,
)
from rollout.values import content_digest

_INCOMING = f"{WORK_FOLDER}incoming/"
_WRITER = "writer"
"""How the names of claims begin."""
_REPORT = "report-"
_MOVES_AT_ONCE = 8
_TICK_S = 0.5
_ATTEMPTS = 6
"""Of listings and abortions: with back-off from 0.5 s about 15 s."""

OnProgress = Callable[[Progress], None]


def _silent(_: Progress) -> None:
    pass


def publish_weights(
    pinned: PinnedModel,
    target: Target,
    spec: TransferSpec | None = None,
    *,
    token: str | None = None,
    on_progress: OnProgress = _silent,
) -> TransferReport:
    """Bring the pinned files to the target's model path, and write the ready marker last.

    Over weights that are in place and proven, this costs one listing and one read, and the report says `unchanged`.

    Args:
        token: of the Hugging Face account; never logged, never sent to another host.
        on_progress: called a few times per second from the calling thread.

    Raises:
        AnotherWriter: another run is writing the same weights, and goes on.
        HashMismatch: the hub gives other bytes than it states; nothing wrong was left behind.
        TransferFailed: gave up; a rerun sends only what is missing.
        RepositoryGated, RepositoryNotFound, PermissionMissing, BucketNotFound, TransientError.
    """
    run = _Run(pinned, target, spec or TransferSpec(), token)
    started_at = time.monotonic()
    place = run.place
    done = run.nothing_to_do(started_at)
    if done is not None:
        return done
    claim = place.claim(run.spec)
    claim.acquire()
    try:
        place.take_claims_of_shares(run.spec)
        files = run.move(pinned.files, on_progress, claim, sweep=True)
        marker = place.finish(pinned)
    finally:
        claim.release()
    generations = {file.path: file.generation for file in marker.files}
    files = tuple(file.model_copy(update={"generation": generations[file.path]}) for file in files)
    return run.report(files, StepStatus.DONE, started_at)


def nothing_to_do(pinned: PinnedModel, target: Target, spec: TransferSpec) -> TransferReport | None:
    """The report of a transfer over weights that are in place and proven; None if there is something to do."""
    return _Run(pinned, target, spec, None).nothing_to_do(time.monotonic())


def publish_shard(
    pinned: PinnedModel,
    target: Target,
    spec: TransferSpec | None = None,
    *,
    index: int,
    count: int,
    token: str | None = None,
    on_progress: OnProgress = _silent,
) -> TransferReport:
    """Bring one share of the files into the bucket, proven but without their final names; `finish` does the rest.

    Shares claim themselves, not the model path: who starts them sees to it that `publish_weights` does not run as well.

    Args:
        index: of this worker, from 0, as an Indexed Job gives it in JOB_COMPLETION_INDEX.
        count: of workers: every one computes the same shares from the same commit.
    """
    run = _Run(pinned, target, spec or TransferSpec(), token)
    started_at = time.monotonic()
    work = f"{run.place.prefix}{WORK_FOLDER}"
    claim = Claim(run.place.storage, f"{work}writer-{index}-of-{count}.json", ttl_s=run.spec.claim_ttl_s)
    claim.acquire()
    try:
        files = run.move(shard_files(pinned.files, count)[index], on_progress, claim, sweep=False)
        report = run.report(files, StepStatus.DONE, started_at, shard=f"{index + 1} of {count}")
        run.place.storage.write_json(f"{work}{_REPORT}{index}-of-{count}.json", report.model_dump(mode="json"))
    finally:
        claim.release()
    return report


def finish(pinned: PinnedModel, target: Target) -> tuple[TransferReport, ...]:
    """Give the files of all shares their final names, write the ready marker, collect the shares' reports.

    May be repeated: over finished weights it changes nothing.

    Raises:
        TransferFailed: files are missing; names them.
        AnotherWriter: another run was faster.
    """
    place = Place(StorageClient(target), target.weights_prefix(pinned.repo_id, pinned.commit_sha))
    view = place.look()
    if view.marker is None or not view.marker.proves(pinned, view.by_path):
        place.finish(pinned)
    reports = []
    for stored in place.storage.list_objects(f"{place.prefix}{WORK_FOLDER}{_REPORT}"):
        found = place.storage.read_json(stored.name)
        if found is not None:
            reports.append(TransferReport.model_validate(found[0]))
            place.storage.delete(stored)
    return tuple(reports)


def read_provenance(pinned: PinnedModel, target: Target) -> Provenance | None:
    """The ready marker, if it proves that exactly this commit lies at the target's model path: two requests."""
    place = Place(StorageClient(target), target.weights_prefix(pinned.repo_id, pinned.commit_sha))
    view = place.look()
    return view.marker if view.marker is not None and view.marker.proves(pinned, view.by_path) else None


def find_leftovers(target: Target, prefix: str = "") -> tuple[Change, ...]:
    """What unfinished runs left below `prefix`: multipart uploads, temporary objects, claims. Changes nothing."""
    with _connected(target) as (storage, uploader):
        objects, uploads = _temporary(storage, uploader, prefix)
    return (
        *(_change(storage, Action.UNCHANGED, "Object", stored.name) for stored in objects),
        *(_change(storage, Action.UNCHANGED, "MultipartUpload", upload.name) for upload in uploads),
    )


def remove_leftovers(target: Target, prefix: str = "") -> tuple[Change, ...]:
    """Remove what `find_leftovers` finds. A run that is still going on fails, and has to start over."""
    with _connected(target) as (storage, uploader):
        return _remove(storage, uploader, *_temporary(storage, uploader, prefix))


def remove_dead_leftovers(target: Target, prefix: str) -> tuple[Change, ...]:
    """Remove what `find_leftovers` finds below a model path, once it is certain that nobody is writing there.

    Costs one look when there is nothing, and up to a claim's lifetime when its holder ran on another machine.

    Raises:
        AnotherWriter: a run is writing there, and goes on.
    """
    work = f"{prefix}{WORK_FOLDER}"
    ttl_s = TransferSpec().claim_ttl_s
    with _connected(target) as (storage, uploader):
        objects, uploads = _temporary(storage, uploader, work)
        if not objects and not uploads:
            return ()
        claims = {stored.name for stored in objects if stored.name.startswith(f"{work}{_WRITER}")}
        with _held([Claim(storage, name, ttl_s=ttl_s) for name in {f"{work}{_WRITER}.json", *claims}]) as held:
            # Of what was there before the claims were taken; and whoever comes meanwhile waits for ours.
            removed = _remove(storage, uploader, (each for each in objects if each.name not in claims), uploads, held)
    gone = (_change(storage, Action.DELETED, "Object", name) for name in sorted(claims))
    return (*removed, *gone)


def unfinished_transfers(target: Target) -> tuple[UnfinishedTransfer, ...]:
    """The model paths in the bucket where a transfer is going on or was left unfinished, by any run.

    A record tells of a rollout's weights only: `publish-weights` keeps none.
    """
    last_sign: dict[str, datetime] = {}
    with _connected(target) as (storage, uploader):
        objects, uploads = _temporary(storage, uploader, "")
    signs = [*((each.name, each.updated_at) for each in objects), *((each.name, each.begun_at) for each in uploads)]
    for name, at in signs:
        prefix = name[: name.index(WORK_FOLDER)]
        last_sign[prefix] = max(at, last_sign.get(prefix, at))
    return tuple(UnfinishedTransfer(prefix=prefix, last_sign_at=at) for prefix, at in sorted(last_sign.items()))


@contextlib.contextmanager
def _held(claims: Sequence[Claim]) -> Iterator[Callable[[], None]]:
    """Take all claims, watching them side by side, and give them back at the end; yields what renews them.

    Raises:
        AnotherWriter: the holder of one of them goes on.
    """
    try:
        with ThreadPoolExecutor(max(1, len(claims))) as threads:
            list(threads.map(lambda claim: claim.acquire(), claims))

        def renew() -> None:
            for claim in claims:
                claim.renew_if_due()

        yield renew
    finally:
        for claim in claims:
            claim.release()


class View:
    """What a listing shows below a model path, and the marker that was read with it."""

    def __init__(self, by_path: Mapping[str, StoredObject], marker: Provenance | None, marker_generation: int) -> None:
        self.by_path = by_path
        self.marker = marker
        self.marker_generation = marker_generation

    def incoming(self, file: ModelFile) -> StoredObject | None:
        """The object under the file's temporary name, whatever the size of its parts; a proven one first."""
        stem = f"{_INCOMING}{_digest(file)}."
        found = [stored for path, stored in self.by_path.items() if path.startswith(stem)]
        return next((each for each in found if proven_file(file, each) is not None), found[0] if found else None)

    def proven_incoming(self, file: ModelFile) -> StoredObject | None:
        incoming = self.incoming(file)
        return incoming if proven_file(file, incoming) is not None else None

    def proof(self, file: ModelFile) -> ProvenFile | None:
        """The proof of a file under its final name, or under its temporary one."""
        return proven_file(file, self.by_path.get(file.path)) or proven_file(file, self.incoming(file))


class Place:
    """A model path in a bucket."""

    def __init__(self, storage: StorageClient, prefix: str) -> None:
        self.storage = storage
        self.prefix = prefix

    def look(self) -> View:
        """One listing and one read."""
        found = self.storage.read_json(f"{self.prefix}{READY_MARKER}")
        listing = self.storage.list_objects(self.prefix)
        by_path = {stored.name.removeprefix(self.prefix): stored for stored in listing}
        if found is None:
            return View(by_path, None, 0)
        try:
            marker = Provenance.model_validate(found[0])
        except ValidationError:
            marker = None  # not ours, or of another version: it proves nothing, and is replaced
        return View(by_path, marker, found[1])

    def claim(self, spec: TransferSpec) -> Claim:
        """Of the one who writes the whole model path."""
        return Claim(self.storage, f"{self.prefix}{WORK_FOLDER}{_WRITER}.json", ttl_s=spec.claim_ttl_s)

    def take_claims_of_shares(self, spec: TransferSpec) -> None:
        """Claims of pods that a dead flow left behind go; those of pods that still write are respected.

        Raises:
            AnotherWriter: such a pod goes on.
        """
        names = [each.name for each in self.storage.list_objects(f"{self.prefix}{WORK_FOLDER}{_WRITER}-")]
        with _held([Claim(self.storage, name, ttl_s=spec.claim_ttl_s) for name in names]):
            pass

    def incoming_name(self, file: ModelFile, part_bytes: int) -> str:
        return f"{self.prefix}{_INCOMING}{_digest(file)}.{part_bytes}"

    def finish(self, pinned: PinnedModel) -> Provenance:
        """Final names for everything that is proven, then the marker."""
        view = self.look()
        missing = [file.path for file in pinned.files if view.proof(file) is None]
        if missing:
            raise TransferFailed(
                f"{len(missing)} of {len(pinned.files)} files are not in the bucket yet: {', '.join(missing[:5])}.",
                where=f"gs://{self.storage.bucket_name}/{self.prefix}",
                resolution="Rerun the transfer: it sends only these.",
            )
        with ThreadPoolExecutor(_MOVES_AT_ONCE) as threads:
            proven = tuple(threads.map(lambda file: self._name_finally(file, view), pinned.files))
        self._remove_superseded(pinned, view)
        marker = Provenance(
            repo_id=pinned.repo_id,
            commit_sha=pinned.commit_sha,
            files=proven,
            tool_version=version("llm-rollout"),
            finished_at=utc_now(),
        )
        self.storage.write_json(
            f"{self.prefix}{READY_MARKER}", marker.model_dump(mode="json"), if_generation=view.marker_generation
        )
        return marker

    def _name_finally(self, file: ModelFile, view: View) -> ProvenFile:
        current = view.by_path.get(file.path)
        proof = proven_file(file, current)
        incoming = view.incoming(file)
        if proof is not None:
            if incoming is not None:
                self.storage.delete(incoming)
            return proof
        assert incoming is not None, "finish() has looked for missing files"
        name = f"{self.prefix}{file.path}"
        try:
            moved = self.storage.move(incoming, name, if_generation=current.generation if current else 0)
        except AnotherWriter:
            # If the answer to our own move was lost, the official client's retry meets that move.
            found = self.storage.find(name)
            if found is None or proven_file(file, found) is None:
                raise
            self.storage.delete(incoming)
            moved = found
        proof = proven_file(file, moved)
        assert proof is not None, "a copy inside the service keeps bytes and metadata"
        return proof

    def _remove_superseded(self, pinned: PinnedModel, view: View) -> None:
        """Files of the commit that lay here before; nothing that other people put here."""
        wanted = {file.path for file in pinned.files}
        for former in view.marker.files if view.marker else ():
            found = view.by_path.get(former.path)
            if former.path not in wanted and found is not None and found.generation == former.generation:
                self.storage.delete(found)


class _Run:
    """One call of `publish_weights` or `publish_shard`."""

    def __init__(self, pinned: PinnedModel, target: Target, spec: TransferSpec, token: str | None) -> None:
        self.pinned = pinned
        self.target = target
        self.spec = spec
        self._part_bytes = spec.part_bytes_of(pinned.total_bytes)
        """The same for all shards of a commit."""
        self.place = Place(StorageClient(target), target.weights_prefix(pinned.repo_id, pinned.commit_sha))
        self._pool = HttpPool(stall_timeout_s=spec.stall_timeout_s)
        self._hub = HubClient(target.hub_endpoint, token, pool=self._pool)
        self._stop = threading.Event()
        self._jobs: tuple[Job, ...] = ()
        self._removed: tuple[Change, ...] = ()

    def nothing_to_do(self, started_at: float) -> TransferReport | None:
        """The report, if the marker proves that everything is in place: one listing and one read."""
        view = self.place.look()
        if view.marker is None or not view.marker.proves(self.pinned, view.by_path):
            return None
        proven = {file.path: file for file in view.marker.files}
        files = tuple(self.found_report(proven[file.path]) for file in self.pinned.files)
        return self.report(files, StepStatus.UNCHANGED, started_at)

    def move(
        self, files: Sequence[ModelFile], on_progress: OnProgress, claim: Claim, *, sweep: bool
    ) -> tuple[FileReport, ...]:
        """Bring files into the bucket under their temporary names, unless they are there already.

        Args:
            sweep: remove what earlier runs left and this one cannot use. A shard leaves that alone: it may belong to
                another shard.
        """
        started_at = time.monotonic()
        uploader = Uploader(self.place.storage, self._pool)
        view = self.place.look()
        proofs = {file.path: proof for file in files if (proof := view.proof(file)) is not None}
        # Large files first: the small ones fill the gaps at the end.
        todo = sorted((file for file in files if file.path not in proofs), key=lambda file: -file.size_bytes)
        try:
            unfinished = _uploads(uploader, f"{self.place.prefix}{_INCOMING}")
            if sweep:
                self._removed = self._sweep(uploader, view, unfinished)
            sources = self._sources(todo, claim, on_progress)
            self._jobs = tuple(self._make_jobs(todo, sources, view, uploader, unfinished))
            found_bytes = sum(proof.size_bytes for proof in proofs.values())

            def tick() -> None:
                claim.renew_if_due()
                on_progress(progress_of(self._jobs, found_bytes, len(proofs), started_at))

            if self._jobs:
                Mover(self.place.storage, uploader, self.spec, self._jobs).run(tick, self._abandon)
            tick()
        finally:
            self._pool.close()
        moved = {job.file.path: self._file_report(job) for job in self._jobs}
        return tuple(moved.get(file.path) or self.found_report(proofs[file.path]) for file in files)

    def report(
        self,
        files: tuple[FileReport, ...],
        status: StepStatus,
        started_at: float,
        *,
        shard: str = "",
    ) -> TransferReport:
        return TransferReport(
            repo_id=self.pinned.repo_id,
            commit_sha=self.pinned.commit_sha,
            uri=self.target.weights_uri(self.pinned.repo_id, self.pinned.commit_sha),
            route=self.spec.route,
            status=status,
            files=files,
            seconds=time.monotonic() - started_at,
            bytes_received=sum(job.bytes_received for job in self._jobs),
            bytes_sent=sum(job.bytes_sent for job in self._jobs),
            requests=self._pool.requests + self.place.storage.requests,
            retries=sum(job.retries for job in self._jobs),
            leftovers_removed=len(self._removed),
            shard=shard,
        )

    def _sweep(self, uploader: Uploader, view: View, unfinished: Iterable[Upload]) -> tuple[Change, ...]:
        """Remove what is of no use: of other files, uploads in other parts, second uploads of the same file."""
        names = {self.place.incoming_name(file, self._part_bytes) for file in self.pinned.files}
        proven = {found.name for file in self.pinned.files if (found := view.proven_incoming(file)) is not None}
        objects = [
            stored
            for path, stored in view.by_path.items()
            if path.startswith(f"{WORK_FOLDER}{_REPORT}")
            or (path.startswith(_INCOMING) and stored.name not in proven | names)
        ]
        useful = set(_first_by_name(unfinished).values())
        uploads = [upload for upload in unfinished if upload not in useful or upload.name not in names]
        return _remove(self.place.storage, uploader, objects, uploads)

    def _make_jobs(
        self,
        files: Sequence[ModelFile],
        sources: Mapping[str, ByteSource],
        view: View,
        uploader: Uploader,
        unfinished: Iterable[Upload],
    ) -> Iterable[Job]:
        uploads = _first_by_name(unfinished)
        for file in files:
            name = self.place.incoming_name(file, self._part_bytes)
            upload = uploads.get(name)
            arrived = with_retries(partial(_parts, uploader, upload), attempts=_ATTEMPTS) if upload else ()
            yield Job(
                file,
                sources[file.path],
                name,
                part_bytes=self._part_bytes,
                metadata=content_metadata(file),
                upload=upload,
                arrived=arrived,
                # Complete, but its process died before the proof.
                assembled=view.by_path.get(name.removeprefix(self.place.prefix)),
            )

    def _sources(self, files: Sequence[ModelFile], claim: Claim, on_progress: OnProgress) -> Mapping[str, ByteSource]:
        if self.spec.route is Route.STREAM:
            return {file.path: self._hub.open(self.pinned, file) for file in files}
        staging = Staging(self.pinned, self._hub, self.spec, self._stop)
        started_at, found_bytes = time.monotonic(), staging.bytes_on_disk
        with ThreadPoolExecutor(1) as thread:
            staged = thread.submit(staging.stage_all, files)
            try:
                while wait([staged], timeout=_TICK_S).not_done:
                    claim.renew_if_due()
                    on_progress(_staging_progress(staging, found_bytes, files, started_at))
            except BaseException:
                self._abandon()
                raise
            staged.result()
        return {file.path: staging.open(file) for file in files}

    def _abandon(self) -> None:
        """End at once whatever waits for a byte: child processes, connections."""
        self._stop.set()
        self._pool.close()

    def _file_report(self, job: Job) -> FileReport:
        assert job.stored is not None, "the mover ends only when every file is proven"
        return FileReport(
            path=job.file.path,
            size_bytes=job.file.size_bytes,
            sha256=job.sha256,
            crc32c=job.stored.crc32c_hex,
            generation=job.stored.generation,
            source=Source.DISK if self.spec.route is Route.STAGE else Source.HUB,
            route=self.spec.route,
            seconds=job.seconds,
            retries=job.retries,
            bytes_sent=job.bytes_sent,
        )

    def found_report(self, proof: ProvenFile) -> FileReport:
        return FileReport(**proof.model_dump(), source=Source.BUCKET, route=self.spec.route, seconds=0.0)


def _staging_progress(staging: Staging, found_bytes: int, files: Sequence[ModelFile], started_at: float) -> Progress:
    total, on_disk = sum(file.size_bytes for file in files), staging.bytes_on_disk
    elapsed_s = time.monotonic() - started_at
    return Progress(
        bytes_done=min(total, on_disk),
        bytes_total=total,
        files_done=0,
        files_total=len(files),
        bytes_per_s=max(0, on_disk - found_bytes) / elapsed_s if elapsed_s > 0 else 0.0,
        elapsed_s=elapsed_s,
        is_staging=True,
    )


def _first_by_name(uploads: Iterable[Upload]) -> dict[str, Upload]:
    """Of several uploads for one name the oldest, which has most."""
    found: dict[str, Upload] = {}
    for upload in uploads:
        found.setdefault(upload.name, upload)
    return found


def _parts(uploader: Uploader, upload: Upload) -> list[ArrivedPart]:
    return list(uploader.parts(upload))


def _digest(file: ModelFile) -> str:
    """Equal for equal content under an equal name: a later run finds what this one began."""
    return content_digest([file.path, content_of(file), file.size_bytes], 32)


def _is_temporary(name: str) -> bool:
    """Whether an object is one of ours that a finished transfer does not leave behind."""
    return f"/{WORK_FOLDER}" in f"/{name}"


@contextlib.contextmanager
def _connected(target: Target) -> Iterator[tuple[StorageClient, Uploader]]:
    storage = StorageClient(target)
    pool = HttpPool(stall_timeout_s=TransferSpec().stall_timeout_s)
    try:
        yield storage, Uploader(storage, pool)
    finally:
        pool.close()


def _temporary(storage: StorageClient, uploader: Uploader, prefix: str) -> tuple[list[StoredObject], list[Upload]]:
    """What a finished transfer does not leave behind."""
    objects = [stored for stored in storage.list_objects(prefix) if _is_temporary(stored.name)]
    return objects, [upload for upload in _uploads(uploader, prefix) if _is_temporary(upload.name)]


def _uploads(uploader: Uploader, prefix: str) -> list[Upload]:
    return with_retries(lambda: list(uploader.uploads(prefix)), attempts=_ATTEMPTS)


def _remove(
    storage: StorageClient,
    uploader: Uploader,
    objects: Iterable[StoredObject],
    uploads: Iterable[Upload],
    before_each: Callable[[], None] = lambda: None,
) -> tuple[Change, ...]:
    changes = []
    for stored in objects:
        before_each()
        if storage.delete(stored):
            changes.append(_change(storage, Action.DELETED, "Object", stored.name))
    for upload in uploads:
        before_each()
        with_retries(partial(uploader.abort, upload), attempts=_ATTEMPTS)
        changes.append(_change(storage, Action.DELETED, "MultipartUpload", upload.name))
    return tuple(changes)


def _change(storage: StorageClient, action: Action, kind: str, name: str) -> Change:
    return Change(action=action, kind=kind, name=f"gs://{storage.bucket_name}/{name}")
