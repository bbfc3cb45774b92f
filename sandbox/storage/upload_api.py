"""Uploads and downloads of the JSON API: media, multipart and resumable uploads; `alt=media`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from email import message_from_bytes
from email.message import Message
from typing import Any

from aiohttp import web

from sandbox.storage import names
from sandbox.storage.blobs import BlobWriter, Bucket, Content, Store, StoredObject
from sandbox.storage.call import (
    DOCUMENT_LIMIT_BYTES,
    PRECONDITION_PARAMETERS,
    Access,
    Call,
    Route,
    checked,
    receive,
    stated_in_headers,
)
from sandbox.storage.downloads import DOWNLOAD_HEADERS, download
from sandbox.storage.errors import Dialect, StorageError, invalid, no_such_upload, required, unsupported
from sandbox.storage.json_api import STANDARD_PARAMETERS, JsonApi, check_etags, json_response, object_resource
from sandbox.storage.uploads import RESUMABLE_QUANTUM_BYTES, Session, Sessions

CLIENT_CLOSED_REQUEST = 499
"""The answer to a cancelled session, as the service gives it."""

_UPLOAD = r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o"
_CONTENT_RANGE = re.compile(r"bytes (?:(?P<first>\d+)-(?P<last>\d+)|\*)/(?P<total>\d+|\*)")


class UploadApi:
    """Handlers of the routes that carry objects' content."""

    def __init__(self, store: Store, sessions: Sessions, access: Access, json_api: JsonApi) -> None:
        self._store = store
        self._sessions = sessions
        self._access = access
        self._json_api = json_api

    def routes(self) -> Iterable[Route]:
        upload = STANDARD_PARAMETERS | PRECONDITION_PARAMETERS | {"uploadType", "name", "contentEncoding"}
        session = STANDARD_PARAMETERS | PRECONDITION_PARAMETERS | {"uploadType", "name", "upload_id"}
        session_needs = frozenset({"upload_id"})
        # The official client announces the content's type on every request.
        sending = frozenset({"x-goog-hash", "content-md5", "x-upload-content-type", "x-upload-content-length"})
        chunk = sending | {"content-range"}
        for method, handler in (("PUT", self.put_chunk), ("POST", self.put_chunk)):
            yield Route(method, _UPLOAD, handler, Dialect.MEDIA, session, chunk, session_needs)
        yield Route("DELETE", _UPLOAD, self.cancel, Dialect.MEDIA, session, frozenset(), session_needs)
        yield Route("POST", _UPLOAD, self.upload, Dialect.JSON, upload, sending)
        media = STANDARD_PARAMETERS | PRECONDITION_PARAMETERS | {"generation"}
        for prefix in ("/download/storage/v1", "/storage/v1"):
            path = prefix + r"/b/(?P<bucket>[^/]+)/o/(?P<object>[^/]+)"
            yield Route(
                "GET",
                path,
                self.get_object,
                Dialect.JSON,
                media,
                DOWNLOAD_HEADERS,
                alternatives=frozenset({"json", "media"}),
            )

    async def get_object(self, call: Call) -> web.StreamResponse:
        if call.query.get("alt", "json") == "media":
            return self._download(call)
        if "Range" in call.request.headers:
            raise unsupported("a range of an object's metadata")
        return await self._json_api.get_object(call)

    def _download(self, call: Call) -> web.StreamResponse:
        bucket = self._access.bucket(call.caller, call.names["bucket"], "storage.objects.get", resource="object")
        stored = self._access.live(call.caller, bucket, call.names["object"], call.integer("generation"))
        call.preconditions().check(stored, reading=True)
        check_etags(call, stored.etag, reading=True)
        return download(call, self._store, bucket, stored)

    async def upload(self, call: Call) -> web.StreamResponse:
        bucket = self._access.bucket(call.caller, call.names["bucket"], "storage.objects.create", resource="object")
        match call.query.get("uploadType"):
            case "media":
                return await self._media(call, bucket)
            case "multipart":
                return await self._multipart(call, bucket)
            case "resumable":
                return await self._initiate(call, bucket)
            case None:
                raise required("uploadType")
            case other:
                raise invalid(f"Invalid upload type: {other}")

    # One request

    async def _media(self, call: Call, bucket: Bucket) -> web.StreamResponse:
        metadata = {key: call.query[key] for key in ("contentEncoding",) if key in call.query}
        content = await receive(call.body, self._store)
        return await self._publish(call, bucket, content, call.request.headers.get("Content-Type"), metadata)

    async def _multipart(self, call: Call, bucket: Bucket) -> web.StreamResponse:
        header = Message()
        header["Content-Type"] = call.request.headers.get("Content-Type", "")
        boundary = header.get_param("boundary")
        if header.get_content_type() != "multipart/related" or not isinstance(boundary, str):
            raise invalid("Bad content type. Please use multipart.")
        spooled = await receive(call.body, self._store)
        try:
            metadata, content_type, content = await _split_related(spooled, boundary.encode(), self._store)
        finally:
            self._store.discard(spooled.segments)
        return await self._publish(call, bucket, content, content_type, metadata)

    async def _publish(
        self,
        call: Call,
        bucket: Bucket,
        content: Content,
        content_type: str | None,
        metadata: Mapping[str, Any],
    ) -> web.StreamResponse:
        """Make the received content an object, or discard it with the reason."""
        try:
            name = self._name(call, bucket, metadata)
            properties = {"contentType": content_type} | names.object_properties(metadata)
            verified = await checked(content, {**_stated_in_metadata(metadata), **stated_in_headers(call)})
            stored = self._store.publish(bucket, name, verified, properties, call.preconditions())
        finally:
            self._store.discard(content.segments)
        return self._stored_response(call, bucket, stored)

    # Resumable

    async def _initiate(self, call: Call, bucket: Bucket) -> web.StreamResponse:
        metadata = await call.body.read_object()
        headers = call.request.headers
        content_type = headers.get("X-Upload-Content-Type")
        properties = ({"contentType": content_type} if content_type else {}) | names.object_properties(metadata)
        name = self._name(call, bucket, metadata)
        call.preconditions().check(bucket.objects.get(name))
        total = headers.get("X-Upload-Content-Length")
        if total is not None and not total.isdigit():
            raise invalid("Invalid X-Upload-Content-Length.")
        stated = {**_stated_in_metadata(metadata), **stated_in_headers(call)}
        session = self._sessions.start(
            bucket.name, name, properties, stated, call.preconditions(), int(total) if total is not None else None
        )
        # The session's address alone authorises what follows, as in the service.
        location = call.request.url.update_query(upload_id=session.session_id)
        return web.Response(headers={"Location": str(location), "X-GUploader-UploadID": session.session_id})

    async def put_chunk(self, call: Call) -> web.StreamResponse:
        session = self._session(call)
        if session.finished_generation is not None:
            return self._finished(call, session)
        await self._sessions.take_over(session)
        match = self._content_range(call)
        total = int(match["total"]) if match and match["total"] != "*" else None
        self._agree_on_total(session, total)
        if match is None:
            # Without Content-Range the body is the whole content.
            await self._sessions.receive(session, call.body, 0)
            total = session.committed
            self._agree_on_total(session, total)
        elif match["first"]:
            self._check_chunk(call, session, match)
            await self._sessions.receive(session, call.body, int(match["first"]))
        if total is not None and session.committed > total:
            raise invalid("The upload has more bytes than its total size.")
        # A status query (`bytes */N`) ends an upload only if all N bytes are here: so do empty objects and streams
        # end whose last chunk was full. Asked with fewer, or with `*/*`, it just tells how far the upload is.
        if total is None or session.committed < total:
            return self._incomplete(session)
        return await self._finalise(call, session)

    async def cancel(self, call: Call) -> web.StreamResponse:
        session = self._session(call)
        await self._sessions.take_over(session)
        self._sessions.cancel(session)
        return web.Response(status=CLIENT_CLOSED_REQUEST, reason="Client Closed Request")

    def _content_range(self, call: Call) -> re.Match[str] | None:
        header = call.request.headers.get("Content-Range")
        if header is None:
            return None
        match = _CONTENT_RANGE.fullmatch(header.strip())
        if match is None:
            raise invalid(f"Failed to parse Content-Range header: {header}")
        return match

    def _agree_on_total(self, session: Session, total: int | None) -> None:
        if total is None:
            return
        if session.total_bytes not in (None, total):
            raise invalid(
                "Invalid request. The total size in the Content-Range header"
                f" ({total}) differs from the one that was stated before ({session.total_bytes})."
            )
        session.total_bytes = total

    def _check_chunk(self, call: Call, session: Session, match: re.Match[str]) -> None:
        first = int(match["first"])
        if first > session.committed:
            raise invalid(
                f"Invalid request. According to the Content-Range header, the upload offset is {first} byte(s),"
                f" which exceeds already uploaded size of {session.committed} byte(s)."
            )
        length = call.request.content_length
        announced = int(match["last"]) + 1 - first
        if announced < 1 or length not in (None, announced):
            raise invalid("Invalid request. The Content-Range header does not match the body's length.")
        is_last = match["total"] != "*" and int(match["last"]) + 1 == int(match["total"])
        if not is_last and announced < RESUMABLE_QUANTUM_BYTES:
            raise invalid(
                "Invalid request. The number of bytes uploaded is required to be equal or greater than"
                f" {RESUMABLE_QUANTUM_BYTES}, except for the final request (it's recommended to be the exact multiple"
                f" of {RESUMABLE_QUANTUM_BYTES}). The received request contained {announced} bytes, which does not"
                " meet this requirement."
            )

    def _incomplete(self, session: Session) -> web.Response:
        self._sessions.keep_quantum(session)
        headers = {"X-GUploader-UploadID": session.session_id}
        if session.committed:
            headers["Range"] = f"bytes=0-{session.committed - 1}"
        return web.Response(status=308, reason="Resume Incomplete", headers=headers)

    async def _finalise(self, call: Call, session: Session) -> web.StreamResponse:
        content = await self._sessions.content(session)
        try:
            verified = await checked(content, session.stated | stated_in_headers(call))
        except StorageError:
            # The bytes are wrong, and no further request could mend them.
            self._sessions.cancel(session)
            raise
        bucket = self._store.buckets.get(session.bucket)
        if bucket is None or session.finished_generation is not None:
            raise no_such_upload()
        stored = self._store.publish(bucket, session.name, verified, session.properties, session.preconditions)
        self._sessions.finish(session, stored.generation)
        return self._stored_response(call, bucket, stored)

    def _finished(self, call: Call, session: Session) -> web.StreamResponse:
        bucket = self._store.buckets.get(session.bucket)
        if bucket is None:
            raise no_such_upload()
        stored = bucket.live(session.name, session.finished_generation)
        return self._stored_response(call, bucket, stored)

    def _session(self, call: Call) -> Session:
        session = self._sessions.get(call.query["upload_id"])
        if session.bucket != call.names["bucket"]:
            raise no_such_upload()
        return session

    # Shared

    def _name(self, call: Call, bucket: Bucket, metadata: Mapping[str, Any]) -> str:
        """The object's name, from the query or the metadata, once the caller may write it."""
        name = call.query.get("name") or metadata.get("name")
        if not name:
            raise required("name")
        names.check_object_name(name)
        self._access.may_write(call.caller, bucket, name)
        return str(name)

    def _stored_response(self, call: Call, bucket: Bucket, stored: StoredObject) -> web.Response:
        base_url = f"{call.request.scheme}://{call.request.host}"
        response = json_response(call, object_resource(base_url, bucket, stored))
        response.headers["x-goog-hash"] = stored.goog_hash()
        response.headers["x-goog-generation"] = str(stored.generation)
        return response


def _stated_in_metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    names_of = {"crc32c": "crc32c", "md5Hash": "md5"}
    return {name: metadata[key] for key, name in names_of.items() if metadata.get(key) is not None}


async def _split_related(spooled: Content, boundary: bytes, store: Store) -> tuple[dict[str, Any], str | None, Content]:
    """The metadata, content type and content of a multipart/related body.

    Both the official clients and gcloud use it for small objects only, so it is split in memory.
    """
    if spooled.size > 16 * DOCUMENT_LIMIT_BYTES:
        raise unsupported("multipart/related uploads over 128 MiB: use a resumable upload")
    body = spooled.segments[0].read_bytes()
    delimiter = b"--" + boundary
    head = body.find(delimiter)
    second = body.find(b"\r\n" + delimiter, head + len(delimiter))
    end = body.rfind(b"\r\n" + delimiter + b"--")
    if head != 0 or second < 0 or end <= second:
        raise invalid("Missing end boundary in multipart body.")
    _, metadata_text = _part(body[len(delimiter) : second])
    metadata = _json_object(metadata_text)
    headers, data = _part(body[second + 2 + len(delimiter) : end])
    writer = BlobWriter(store.incoming_path())
    await writer.write(data)
    await writer.close()
    content = Content((writer.path,), (writer.size,), writer.crc32c)
    return metadata, headers.get("Content-Type"), content


def _part(text: bytes) -> tuple[Message, bytes]:
    """The headers and the payload of one part; `text` begins behind its boundary."""
    head, separator, payload = text.partition(b"\r\n\r\n")
    if not separator:
        raise invalid("Malformed multipart body.")
    return message_from_bytes(head.lstrip(b"\r\n")), payload


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StorageError(400, "parseError", "Parse Error", "MalformedRequest") from error
    if not isinstance(document, dict):
        raise StorageError(400, "parseError", "Parse Error", "MalformedRequest")
    return document
