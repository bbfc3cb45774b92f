"""Uploads in progress, on disk so that they outlive the server: resumable sessions and XML multipart uploads."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandbox.storage import checksums
from sandbox.storage.blobs import BlobWriter, Bucket, Content, Preconditions, Store, now_rfc3339, write_json
from sandbox.storage.call import Body
from sandbox.storage.errors import StorageError, invalid, no_such_upload

RESUMABLE_QUANTUM_BYTES = 256 << 10
"""The service persists resumable uploads in multiples of 256 KiB."""

MINIMUM_PART_BYTES = 5 << 20
"""5 MiB for every part but the last: https://cloud.google.com/storage/quotas#requests."""

MAXIMUM_PART_NUMBER = 10_000


@dataclass
class Session:
    """A resumable upload. `crc32c` is None when it has to be computed again from the persisted bytes."""

    session_id: str
    bucket: str
    name: str
    properties: dict[str, Any]
    stated: dict[str, str]
    """Checksums that the sender stated at the start."""
    preconditions: Preconditions
    total_bytes: int | None
    finished_generation: int | None = None
    committed: int = 0
    crc32c: int | None = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    receiving: asyncio.Task[Any] | None = None

    def persistent(self) -> dict[str, Any]:
        volatile = {"committed", "crc32c", "lock", "receiving"}
        return {name: value for name, value in vars(self).items() if name not in volatile} | {
            "preconditions": asdict(self.preconditions)
        }


class Sessions:
    """The resumable uploads of the server."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sessions"
        self._root.mkdir(exist_ok=True)
        self._sessions: dict[str, Session] = {}
        for path in self._root.glob("*/session.json"):
            state = json.loads(path.read_text(encoding="utf-8"))
            session = Session(**state | {"preconditions": Preconditions(**state["preconditions"])})
            data = path.parent / "data"
            if data.exists():
                session.committed = _quantised(data.stat().st_size)
                os.truncate(data, session.committed)
                session.crc32c = None
            self._sessions[session.session_id] = session

    def start(
        self,
        bucket: str,
        name: str,
        properties: Mapping[str, Any],
        stated: Mapping[str, str],
        preconditions: Preconditions,
        total_bytes: int | None,
    ) -> Session:
        session = Session(
            secrets.token_urlsafe(48), bucket, name, dict(properties), dict(stated), preconditions, total_bytes
        )
        (self._root / session.session_id).mkdir()
        self.data(session).touch()
        self._save(session)
        self._sessions[session.session_id] = session
        return session

    def get(self, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None:
            raise no_such_upload()
        return session

    def data(self, session: Session) -> Path:
        return self._root / session.session_id / "data"

    async def take_over(self, session: Session) -> None:
        """End the request that is sending to this session, if any: its client has moved on to a new one."""
        if session.receiving is not None:
            session.receiving.cancel()
        async with session.lock:
            pass

    async def receive(self, session: Session, body: Body, offset: int) -> None:
        """Append the body, of which the bytes before `committed` are known already.

        Whatever ends this early, the bytes that arrived count, down to a multiple of 256 KiB.
        """
        async with session.lock:
            session.receiving = asyncio.current_task()
            try:
                await self._append(session, body, session.committed - offset)
            finally:
                session.receiving = None

    async def _append(self, session: Session, body: Body, known: int) -> None:
        writer = BlobWriter(self.data(session), size=session.committed, crc32c=await self.crc32c(session))
        complete = False
        try:
            async for chunk in body.chunks():
                fresh = chunk[known:] if known else chunk
                known -= len(chunk) - len(fresh)
                if fresh:
                    await writer.write(fresh)
            complete = True
        finally:
            await writer.close()
            session.committed, session.crc32c = writer.size, writer.crc32c
            if not complete:
                self.keep_quantum(session)

    def keep_quantum(self, session: Session) -> None:
        """Forget the bytes beyond the last multiple of 256 KiB."""
        kept = _quantised(session.committed)
        if kept != session.committed:
            os.truncate(self.data(session), kept)
            session.committed, session.crc32c = kept, None

    async def crc32c(self, session: Session) -> int:
        if session.crc32c is None:
            session.crc32c = await asyncio.to_thread(checksums.file_crc32c, self.data(session))
        return session.crc32c

    async def content(self, session: Session) -> Content:
        return Content((self.data(session),), (session.committed,), await self.crc32c(session))

    def finish(self, session: Session, generation: int) -> None:
        """Keep the session's memory, so that a client that lost the answer can ask for it again."""
        session.finished_generation = generation
        self._save(session)
        self.data(session).unlink()

    def cancel(self, session: Session) -> None:
        del self._sessions[session.session_id]
        shutil.rmtree(self._root / session.session_id)

    def _save(self, session: Session) -> None:
        write_json(self._root / session.session_id / "session.json", session.persistent())


def _quantised(size: int) -> int:
    return size - size % RESUMABLE_QUANTUM_BYTES


@dataclass(frozen=True)
class Part:
    """An uploaded part: everything about it is in its file's name, so it appears in one step."""

    path: Path
    number: int
    size: int
    crc32c: int
    etag: str

    _NAME = re.compile(r"(\d{5})-(\d+)-([0-9a-f]{8})-([0-9a-f]{32})")

    @classmethod
    def read(cls, path: Path) -> Part:
        match = cls._NAME.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path} is not a part of an upload")
        return cls(path, int(match[1]), int(match[2]), int(match[3], 16), f'"{match[4]}"')

    @property
    def content(self) -> Content:
        return Content((self.path,), (self.size,), self.crc32c)

    @property
    def modified(self) -> float:
        """Seconds since the epoch."""
        return self.path.stat().st_mtime


@dataclass
class MultipartUpload:
    """An XML multipart upload. Its parts are the files in its folder."""

    upload_id: str
    name: str
    properties: dict[str, Any]
    initiated: str
    parts: dict[int, Part] = field(default_factory=dict)


class MultipartUploads:
    """The XML multipart uploads of the server, by bucket."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uploads: dict[str, dict[str, MultipartUpload]] = {}
        for path in (store.root / "buckets").glob("*/multipart/*/upload.json"):
            upload = MultipartUpload(**json.loads(path.read_text(encoding="utf-8")))
            for part_path in sorted(path.parent.glob("[0-9]*")):
                part = Part.read(part_path)
                upload.parts[part.number] = part
            self._uploads.setdefault(path.parts[-4], {})[upload.upload_id] = upload

    def start(self, bucket: Bucket, name: str, properties: Mapping[str, Any]) -> MultipartUpload:
        upload = MultipartUpload(secrets.token_urlsafe(48), name, dict(properties), now_rfc3339())
        folder = self._folder(bucket, upload)
        folder.mkdir(parents=True)
        state = {key: value for key, value in vars(upload).items() if key != "parts"}
        write_json(folder / "upload.json", state)
        self._uploads.setdefault(bucket.name, {})[upload.upload_id] = upload
        return upload

    def get(self, bucket: Bucket, name: str, upload_id: str) -> MultipartUpload:
        upload = self._uploads.get(bucket.name, {}).get(upload_id)
        if upload is None or upload.name != name:
            raise no_such_upload()
        return upload

    def of_bucket(self, bucket: Bucket) -> Iterator[MultipartUpload]:
        """By object name, then by age, as they are listed."""
        uploads = self._uploads.get(bucket.name, {}).values()
        return iter(sorted(uploads, key=lambda upload: (upload.name, upload.initiated, upload.upload_id)))

    def add_part(self, bucket: Bucket, upload: MultipartUpload, number: int, content: Content) -> Part:
        """Take the received file as part `number`, in place of an earlier one."""
        # The upload may have been aborted or completed while the part was on its way.
        self.get(bucket, upload.name, upload.upload_id)
        etag = uuid.uuid4().hex
        path = self._folder(bucket, upload) / f"{number:05d}-{content.size}-{content.crc32c:08x}-{etag}"
        content.segments[0].rename(path)
        if (previous := upload.parts.get(number)) is not None:
            previous.path.unlink()
        upload.parts[number] = part = Part(path, number, content.size, content.crc32c, f'"{etag}"')
        return part

    def chosen(self, upload: MultipartUpload, wanted: list[tuple[int, str]]) -> list[Part]:
        """The parts that a completion names (numbers and etags), found to make a valid object."""
        if not wanted:
            raise invalid("You must specify at least one part.", code="MalformedCompleteMultipartUploadRequest")
        numbers = [number for number, _ in wanted]
        if numbers != sorted(set(numbers)):
            raise invalid(
                "The list of parts was not in ascending order. Parts must be ordered by part number.",
                code="InvalidPartOrder",
            )
        parts = [_matching_part(upload, number, etag) for number, etag in wanted]
        for part in parts[:-1]:
            if part.size < MINIMUM_PART_BYTES:
                raise invalid(
                    "Your proposed upload is smaller than the minimum allowed object size.",
                    code="EntityTooSmall",
                    details=f"Part {part.number} has {part.size} bytes; {MINIMUM_PART_BYTES} are the minimum.",
                )
        return parts

    def remove(self, bucket: Bucket, upload: MultipartUpload) -> None:
        del self._uploads[bucket.name][upload.upload_id]
        shutil.rmtree(self._folder(bucket, upload))

    def forget(self, bucket: str) -> None:
        """The bucket is gone, and its uploads' files with it."""
        self._uploads.pop(bucket, None)

    def _folder(self, bucket: Bucket, upload: MultipartUpload) -> Path:
        return self._store.bucket_path(bucket.name) / "multipart" / upload.upload_id


def _matching_part(upload: MultipartUpload, number: int, etag: str) -> Part:
    part = upload.parts.get(number)
    # S3's clients may leave the quotes of an etag out.
    if part is None or part.etag.strip('"') != etag.strip('"'):
        raise StorageError(
            400,
            "invalid",
            "One or more of the specified parts could not be found. The part may not have been uploaded,"
            " or the specified entity tag may not match the part's entity tag.",
            "InvalidPart",
            f"Part {number}",
        )
    return part
