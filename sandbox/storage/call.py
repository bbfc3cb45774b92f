"""One request as the handlers see it: who calls, with which parameters, and its body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from aiohttp import web

from sandbox.shaping import Link
from sandbox.storage import checksums
from sandbox.storage.blobs import MD5_LIMIT_BYTES, BlobWriter, Bucket, Content, Preconditions, Store, StoredObject
from sandbox.storage.errors import Dialect, StorageError, forbidden, invalid, no_such_bucket, wrong_checksum
from sandbox.storage.iam import Caller, granted

DOCUMENT_LIMIT_BYTES = 8 << 20
"""Bodies that are documents (metadata, policies, part lists of up to 10,000 parts) are far smaller."""

PRECONDITION_PARAMETERS = frozenset(
    {"ifGenerationMatch", "ifGenerationNotMatch", "ifMetagenerationMatch", "ifMetagenerationNotMatch"}
)


class Body:
    """A request's body, read in the chunks in which it arrives, at the pace of the link, and counted."""

    def __init__(self, request: web.Request, link: Link) -> None:
        self._request = request
        self._link = link
        self.received = 0

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._request.content.iter_any():
            self.received += len(chunk)
            await self._link.passage(self._request.transport, len(chunk))
            yield chunk

    async def read(self) -> bytes:
        """The whole body of a request that carries a document."""
        collected = bytearray()
        async for chunk in self.chunks():
            collected += chunk
            if len(collected) > DOCUMENT_LIMIT_BYTES:
                raise StorageError(413, "uploadTooLarge", "Request body is too large.", "EntityTooLarge")
        return bytes(collected)

    async def read_object(self) -> dict[str, Any]:
        """The JSON object of the body; an empty body is an empty object."""
        text = await self.read()
        try:
            document = json.loads(text or b"{}")
        except ValueError as error:
            raise StorageError(400, "parseError", "Parse Error", "MalformedRequest") from error
        if not isinstance(document, dict):
            raise StorageError(400, "parseError", "Parse Error", "MalformedRequest")
        return document

    async def drain(self) -> None:
        """Read what is left, so that the connection can serve the next request."""
        async for _ in self.chunks():
            pass


@dataclass
class Call:
    """A request that a route has accepted: its path's names are decoded, its parameters and headers are known ones."""

    request: web.Request
    caller: Caller
    names: Mapping[str, str]
    query: Mapping[str, str]
    body: Body
    upstream: Link
    """The direction of answers."""
    sent: int = field(default=0)
    """Bytes of the answer's body."""

    def integer(self, parameter: str) -> int | None:
        text = self.query.get(parameter)
        if text is None:
            return None
        if not text.lstrip("-").isdigit():
            raise invalid(f"Invalid value for {parameter}: {text!r} is not an integer.")
        return int(text)

    def preconditions(self) -> Preconditions:
        return Preconditions(
            self.integer("ifGenerationMatch"),
            self.integer("ifGenerationNotMatch"),
            self.integer("ifMetagenerationMatch"),
            self.integer("ifMetagenerationNotMatch"),
        )


Handler: TypeAlias = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Route:
    """A method and path with everything that its handler understands; the rest is refused with 501."""

    method: str
    path: str
    """A regular expression for the percent-encoded path; its groups become `Call.names`, decoded."""
    handler: Handler
    dialect: Dialect
    query: frozenset[str] = frozenset()
    headers: frozenset[str] = frozenset()
    """Lower-case names of headers that change what a request means; `x-goog-meta-` stands for all of that prefix."""
    needs: frozenset[str] = frozenset()
    """Query parameters that must be there for the route to be meant (the XML API's `uploads`, `partNumber`, …)."""
    alternatives: frozenset[str] = frozenset({"json"})
    """What the query parameter `alt` may be."""


class Access:
    """Looks buckets up on behalf of a caller: foreign buckets, missing buckets, missing permissions."""

    def __init__(self, store: Store, foreign_buckets: frozenset[str]) -> None:
        self._store = store
        self.foreign_buckets = foreign_buckets

    def bucket(self, caller: Caller, name: str, permission: str, *, resource: str = "bucket") -> Bucket:
        """The bucket, once the caller is known to hold `permission` on it."""
        if name in self.foreign_buckets:
            raise forbidden(caller.shown_as, permission, resource)
        bucket = self._store.buckets.get(name)
        if bucket is None:
            raise no_such_bucket()
        self.require(caller, bucket, permission, resource=resource)
        return bucket

    def require(self, caller: Caller, bucket: Bucket, permission: str, *, resource: str = "object") -> None:
        if not caller.is_operator and permission not in self.permissions(caller, bucket):
            raise forbidden(caller.shown_as, permission, resource)

    def permissions(self, caller: Caller, bucket: Bucket) -> frozenset[str]:
        return granted({"bindings": self._store.effective_bindings(bucket)}, caller)

    def live(self, caller: Caller, bucket: Bucket, name: str, generation: int | None = None) -> StoredObject:
        """The object; who may not list a bucket does not learn which objects it lacks."""
        if name not in bucket.objects:
            self.require(caller, bucket, "storage.objects.list", resource="bucket")
        return bucket.live(name, generation)

    def may_write(self, caller: Caller, bucket: Bucket, name: str) -> None:
        """Replacing an object needs the right to delete it."""
        self.require(caller, bucket, "storage.objects.create")
        if name in bucket.objects:
            self.require(caller, bucket, "storage.objects.delete")


async def receive(body: Body, store: Store) -> Content:
    """Stream a body that is an object's content into a file of its own; the file is the caller's to discard."""
    path = store.incoming_path()
    writer = BlobWriter(path)
    try:
        async for chunk in body.chunks():
            await writer.write(chunk)
    except BaseException:
        await writer.close()
        path.unlink()
        raise
    await writer.close()
    return Content((path,), (writer.size,), writer.crc32c)


async def checked(content: Content, stated: Mapping[str, str]) -> Content:
    """`content` with its MD5 (where due), once the checksums that the sender stated are found right.

    Args:
        stated: by `crc32c` and `md5`, in base64.
    """
    if (crc32c := stated.get("crc32c")) is not None:
        calculated = checksums.encode_crc32c(content.crc32c)
        if crc32c != calculated:
            raise wrong_checksum("CRC32C", crc32c, calculated)
    md5 = stated.get("md5")
    if md5 is None and content.size > MD5_LIMIT_BYTES:
        return content
    calculated = await asyncio.to_thread(checksums.files_md5, content.segments)
    if md5 is not None and md5 != calculated:
        raise wrong_checksum("MD5 hash", md5, calculated)
    return Content(content.segments, content.sizes, content.crc32c, calculated)


def stated_in_headers(call: Call) -> dict[str, str]:
    headers = call.request.headers
    stated = checksums.parse_goog_hash(headers.getall("x-goog-hash", []))
    if unknown := set(stated) - {"crc32c", "md5"}:
        raise invalid(f"Unknown hash {sorted(unknown)[0]!r} in x-goog-hash.")
    if (md5 := headers.get("Content-MD5")) is not None:
        stated["md5"] = md5
    return stated
