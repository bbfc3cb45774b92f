"""The XML API: objects by path, and multipart uploads. https://cloud.google.com/storage/docs/xml-api/reference-methods.

As in the service, multipart uploads take no preconditions and their objects have no MD5. Etags of parts are opaque.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from urllib.parse import unquote
from xml.etree import ElementTree

from aiohttp import web

from sandbox.storage import names
from sandbox.storage.blobs import Bucket, Preconditions, Store, StoredObject, joined
from sandbox.storage.call import Access, Call, Route, checked, receive, stated_in_headers
from sandbox.storage.checksums import encode_crc32c
from sandbox.storage.downloads import DOWNLOAD_HEADERS, download, object_headers
from sandbox.storage.errors import Dialect, invalid
from sandbox.storage.json_api import check_etags
from sandbox.storage.uploads import MAXIMUM_PART_NUMBER, MultipartUpload, MultipartUploads

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
PAGE_LIMIT = 1000

_BUCKET = r"/(?P<bucket>[^/]+)/?"
_OBJECT = r"/(?P<bucket>[^/]+)/(?P<object>.+)"
_PRECONDITIONS = frozenset(
    {
        "x-goog-if-generation-match",
        "x-goog-if-generation-not-match",
        "x-goog-if-metageneration-match",
        "x-goog-if-metageneration-not-match",
    }
)
_PROPERTIES = {
    "Content-Type": "contentType",
    "Content-Disposition": "contentDisposition",
    "Content-Language": "contentLanguage",
    "Cache-Control": "cacheControl",
    "x-goog-storage-class": "storageClass",
}
_PROPERTY_HEADERS = frozenset({"x-goog-meta-", "x-goog-storage-class"})
_HASHES = frozenset({"x-goog-hash", "content-md5"})


class XmlApi:
    """Handlers of the XML API's routes."""

    def __init__(self, store: Store, uploads: MultipartUploads, access: Access) -> None:
        self._store = store
        self._uploads = uploads
        self._access = access

    def routes(self) -> Iterable[Route]:
        # The official client repeats the metadata headers of the initiation on every request of an upload.
        described = _PROPERTY_HEADERS
        for method, path, handler, query, headers, needs in (
            ("GET", _BUCKET, self.list_uploads, _LISTING | {"uploads"}, frozenset(), {"uploads"}),
            ("POST", _OBJECT, self.initiate, {"uploads"}, described, {"uploads"}),
            ("PUT", _OBJECT, self.put_part, {"uploadId", "partNumber"}, described | _HASHES, {"uploadId"}),
            ("POST", _OBJECT, self.complete, {"uploadId"}, described, {"uploadId"}),
            ("DELETE", _OBJECT, self.abort, {"uploadId"}, described, {"uploadId"}),
            ("GET", _OBJECT, self.list_parts, {"uploadId"} | _PART_LISTING, frozenset(), {"uploadId"}),
            ("PUT", _OBJECT, self.put_object, set(), described | _HASHES | _PRECONDITIONS, set()),
            ("GET", _OBJECT, self.get_object, {"generation"}, DOWNLOAD_HEADERS | _PRECONDITIONS, set()),
            ("HEAD", _OBJECT, self.head_object, {"generation"}, _PRECONDITIONS | {"if-match", "if-none-match"}, set()),
            ("DELETE", _OBJECT, self.delete_object, {"generation"}, _PRECONDITIONS, set()),
        ):
            yield Route(method, path, handler, Dialect.XML, frozenset(query), frozenset(headers), frozenset(needs))

    # Objects

    async def put_object(self, call: Call) -> web.StreamResponse:
        bucket = self._writable(call)
        content = await receive(call.body, self._store)
        try:
            verified = await checked(content, stated_in_headers(call))
            stored = self._store.publish(
                bucket, call.names["object"], verified, _properties(call), _preconditions(call)
            )
        finally:
            self._store.discard(content.segments)
        return web.Response(headers=_result_headers(bucket, stored))

    async def get_object(self, call: Call) -> web.StreamResponse:
        bucket, stored = self._readable(call)
        return download(call, self._store, bucket, stored)

    async def head_object(self, call: Call) -> web.StreamResponse:
        bucket, stored = self._readable(call)
        return download(call, self._store, bucket, stored)

    async def delete_object(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.delete")
        stored = self._access.live(call.caller, bucket, call.names["object"], call.integer("generation"))
        _preconditions(call).check(stored)
        self._store.remove_object(bucket, stored)
        return web.Response(status=204)

    # Multipart uploads

    async def initiate(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.multipartUploads.create")
        self._writable(call)
        if await call.body.read():
            raise invalid("A request to initiate a multipart upload has no body.", code="MalformedPOSTRequest")
        upload = self._uploads.start(bucket, call.names["object"], _properties(call))
        answer = _element("InitiateMultipartUploadResult", Bucket=bucket.name, Key=upload.name)
        _append(answer, UploadId=upload.upload_id)
        return _xml_response(answer)

    async def put_part(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.objects.create")
        upload = self._upload(call, bucket)
        number = call.integer("partNumber")
        if number is None or not 1 <= number <= MAXIMUM_PART_NUMBER:
            raise invalid(f"Part number must be an integer between 1 and {MAXIMUM_PART_NUMBER}, inclusive.")
        stated = stated_in_headers(call)
        content = await receive(call.body, self._store)
        try:
            await checked(content, stated)
            part = self._uploads.add_part(bucket, upload, number, content)
        finally:
            self._store.discard(content.segments)
        hashes = f"crc32c={encode_crc32c(content.crc32c)}" + (f",md5={stated['md5']}" if "md5" in stated else "")
        return web.Response(headers={"ETag": part.etag, "x-goog-hash": hashes})

    async def complete(self, call: Call) -> web.StreamResponse:
        bucket = self._writable(call)
        wanted = _wanted_parts(await call.body.read())
        upload = self._upload(call, bucket)
        parts = self._uploads.chosen(upload, wanted)
        stored = self._store.publish(
            bucket,
            upload.name,
            joined([part.content for part in parts]),
            upload.properties,
            Preconditions(),
            component_count=len(parts),
        )
        self._uploads.remove(bucket, upload)
        location = f"{call.request.scheme}://{call.request.host}{call.request.rel_url.raw_path}"
        answer = _element("CompleteMultipartUploadResult", Location=location, Bucket=bucket.name, Key=upload.name)
        _append(answer, ETag=f'"{stored.etag}"')
        response = _xml_response(answer)
        response.headers.update(_result_headers(bucket, stored))
        return response

    async def abort(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.multipartUploads.abort")
        self._uploads.remove(bucket, self._upload(call, bucket))
        return web.Response(status=204)

    async def list_parts(self, call: Call) -> web.StreamResponse:
        bucket = self._bucket(call, "storage.multipartUploads.listParts")
        upload = self._upload(call, bucket)
        limit, after = _limit(call, "max-parts"), call.integer("part-number-marker") or 0
        rest = [part for number, part in sorted(upload.parts.items()) if number > after]
        answer = _element("ListPartsResult", Bucket=bucket.name, Key=upload.name, UploadId=upload.upload_id)
        _append(answer, StorageClass=upload.properties.get("storageClass", bucket.resource["storageClass"]))
        _append(answer, PartNumberMarker=after)
        if len(rest) > limit:
            _append(answer, NextPartNumberMarker=rest[limit - 1].number)
        _append(answer, MaxParts=limit, IsTruncated=str(len(rest) > limit).lower())
        for part in rest[:limit]:
            modified = datetime.fromtimestamp(part.modified, UTC).isoformat(timespec="milliseconds")
            item = ElementTree.SubElement(answer, "Part")
            _append(item, PartNumber=part.number, LastModified=modified.replace("+00:00", "Z"))
            _append(item, ETag=part.etag, Size=part.size)
        return _xml_response(answer)

    async def list_uploads(self, call: Call) -> web.StreamResponse:
        bucket = self._access.bucket(call.caller, call.names["bucket"], "storage.multipartUploads.list")
        limit, prefix = _limit(call, "max-uploads"), call.query.get("prefix", "")
        uploads = [upload for upload in self._uploads.of_bucket(bucket) if upload.name.startswith(prefix)]
        rest = _after(uploads, call.query.get("key-marker", ""), call.query.get("upload-id-marker", ""))
        answer = _element("ListMultipartUploadsResult", Bucket=bucket.name)
        _append(answer, KeyMarker=call.query.get("key-marker", ""))
        _append(answer, UploadIdMarker=call.query.get("upload-id-marker", ""), Prefix=prefix)
        if len(rest) > limit:
            _append(answer, NextKeyMarker=rest[limit - 1].name, NextUploadIdMarker=rest[limit - 1].upload_id)
        _append(answer, MaxUploads=limit, IsTruncated=str(len(rest) > limit).lower())
        for upload in rest[:limit]:
            item = ElementTree.SubElement(answer, "Upload")
            _append(item, Key=upload.name, UploadId=upload.upload_id, Initiated=upload.initiated)
            _append(item, StorageClass=upload.properties.get("storageClass", bucket.resource["storageClass"]))
        return _xml_response(answer)

    # Shared

    def _bucket(self, call: Call, permission: str) -> Bucket:
        return self._access.bucket(call.caller, call.names["bucket"], permission, resource="object")

    def _writable(self, call: Call) -> Bucket:
        bucket = self._bucket(call, "storage.objects.create")
        names.check_object_name(call.names["object"])
        self._access.may_write(call.caller, bucket, call.names["object"])
        return bucket

    def _readable(self, call: Call) -> tuple[Bucket, StoredObject]:
        bucket = self._bucket(call, "storage.objects.get")
        stored = self._access.live(call.caller, bucket, call.names["object"], call.integer("generation"))
        _preconditions(call).check(stored, reading=True)
        check_etags(call, stored.etag, reading=True)
        return bucket, stored

    def _upload(self, call: Call, bucket: Bucket) -> MultipartUpload:
        return self._uploads.get(bucket, call.names["object"], call.query["uploadId"])


_LISTING = frozenset({"max-uploads", "key-marker", "upload-id-marker", "prefix"})
_PART_LISTING = frozenset({"max-parts", "part-number-marker"})


def _after(uploads: list[MultipartUpload], key: str, upload_id: str) -> list[MultipartUpload]:
    """The uploads behind the markers: names after `key`; of `key` itself, those behind `upload_id`."""
    if not key:
        return uploads
    same = [upload for upload in uploads if upload.name == key]
    ids = [upload.upload_id for upload in same]
    behind = same[ids.index(upload_id) + 1 :] if upload_id in ids else []
    return behind + [upload for upload in uploads if upload.name > key]


def _limit(call: Call, parameter: str) -> int:
    limit = call.integer(parameter)
    if limit is None:
        return PAGE_LIMIT
    if limit < 1:
        raise invalid(f"Invalid value for {parameter}.")
    return min(limit, PAGE_LIMIT)


def _properties(call: Call) -> dict[str, object]:
    headers = call.request.headers
    properties: dict[str, object] = {key: headers[name] for name, key in _PROPERTIES.items() if name in headers}
    metadata = {
        name.lower().removeprefix("x-goog-meta-"): unquote(value)
        for name, value in headers.items()
        if name.lower().startswith("x-goog-meta-")
    }
    if "storageClass" in properties:
        names.checked_storage_class(properties["storageClass"])
    return properties | ({"metadata": metadata} if metadata else {})


def _preconditions(call: Call) -> Preconditions:
    def stated(name: str) -> int | None:
        text = call.request.headers.get(f"x-goog-if-{name}")
        if text is None:
            return None
        if not text.isdigit():
            raise invalid(f"Invalid argument: x-goog-if-{name}: {text}")
        return int(text)

    return Preconditions(
        stated("generation-match"),
        stated("generation-not-match"),
        stated("metageneration-match"),
        stated("metageneration-not-match"),
    )


def _result_headers(bucket: Bucket, stored: StoredObject) -> dict[str, str]:
    """What the answer to a finished upload says of the object."""
    wanted = ("ETag", "x-goog-generation", "x-goog-metageneration", "x-goog-hash", "x-goog-stored-content-length")
    headers = object_headers(bucket, stored)
    return {name: headers[name] for name in wanted}


def _wanted_parts(document: bytes) -> list[tuple[int, str]]:
    """Part numbers and etags of a CompleteMultipartUpload, in its order; clients send it with and without namespace."""
    try:
        root = ElementTree.fromstring(document)
        return [(int(_text(part, "PartNumber")), _text(part, "ETag")) for part in root.iterfind("{*}Part")]
    except (ElementTree.ParseError, ValueError) as error:
        raise invalid(
            "The XML you provided was not well-formed or did not validate against our published schema.",
            code="MalformedCompleteMultipartUploadRequest",
        ) from error


def _text(part: ElementTree.Element, name: str) -> str:
    text = part.findtext(f"{{*}}{name}")
    if text is None:
        raise ValueError(f"a part without {name}")
    return text.strip()


def _element(name: str, **children: object) -> ElementTree.Element:
    root = ElementTree.Element(name, xmlns=NAMESPACE)
    _append(root, **children)
    return root


def _append(parent: ElementTree.Element, **children: object) -> None:
    """Add a child with text for each argument."""
    for name, text in children.items():
        ElementTree.SubElement(parent, name).text = str(text)


def _xml_response(root: ElementTree.Element) -> web.Response:
    text = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return web.Response(body=text, content_type="application/xml", charset="UTF-8")
