"""Reading objects' content, for the JSON API (`alt=media`) and the XML API alike."""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import format_datetime
from urllib.parse import quote

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

from sandbox.storage.blobs import Bucket, Store, StoredObject
from sandbox.storage.call import Call
from sandbox.storage.errors import range_not_satisfiable, unsupported
from sandbox.wire import SlicedBody

DOWNLOAD_HEADERS = frozenset({"range", "if-match", "if-none-match"})

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PROPERTY_HEADERS = {
    "contentEncoding": "Content-Encoding",
    "contentDisposition": "Content-Disposition",
    "contentLanguage": "Content-Language",
    "cacheControl": "Cache-Control",
}


class ObjectBody(SlicedBody):
    """An object's bytes on their way: its files stay while they are sent, whatever happens to the object."""

    def __init__(
        self, call: Call, store: Store, bucket: Bucket, stored: StoredObject, span: range, status: int
    ) -> None:
        headers = object_headers(bucket, stored)
        if status == 206:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{stored.size}"
        super().__init__(
            store.content(bucket, stored).segments,
            offset=span.start,
            count=len(span),
            status=status,
            headers=headers,
            link=call.upstream,
        )
        self._store = store
        self._held = store.hold(bucket, stored)

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        if self.prepared:
            return await super().prepare(request)
        try:
            return await super().prepare(request)
        finally:
            self._store.release(self._held)


def object_headers(bucket: Bucket, stored: StoredObject) -> dict[str, str]:
    """The headers that describe an object whole, also when only a part of it is sent."""
    properties = stored.properties
    headers = {
        "Content-Type": properties.get("contentType", "application/octet-stream"),
        "ETag": f'"{stored.etag}"',
        "Last-Modified": format_datetime(datetime.fromisoformat(stored.updated), usegmt=True),
        "Accept-Ranges": "bytes",
        "x-goog-generation": str(stored.generation),
        "x-goog-metageneration": str(stored.metageneration),
        "x-goog-hash": stored.goog_hash(),
        "x-goog-storage-class": properties.get("storageClass", bucket.resource["storageClass"]),
        "x-goog-stored-content-encoding": properties.get("contentEncoding", "identity"),
        "x-goog-stored-content-length": str(stored.size),
    }
    if stored.component_count is not None:
        headers["x-goog-component-count"] = str(stored.component_count)
    headers |= {header: properties[key] for key, header in _PROPERTY_HEADERS.items() if key in properties}
    # Header values are latin-1 at best; the service sends other text percent-encoded.
    return headers | {
        f"x-goog-meta-{key}": quote(value, safe=" !\"#$%&'()*+,/:;<=>?@[\\]^`{|}")
        for key, value in properties.get("metadata", {}).items()
    }


def download(call: Call, store: Store, bucket: Bucket, stored: StoredObject) -> web.StreamResponse:
    """200 with the whole object, 206 with the range that the request asks for, or 416."""
    encoding = stored.properties.get("contentEncoding", "")
    if encoding == "gzip" and "gzip" not in call.request.headers.get("Accept-Encoding", ""):
        raise unsupported("decompressive transcoding: accept gzip, or store the object without contentEncoding")
    requested = call.request.headers.get("Range")
    if requested is None:
        return ObjectBody(call, store, bucket, stored, range(stored.size), 200)
    return ObjectBody(call, store, bucket, stored, requested_span(requested, stored.size), 206)


def requested_span(header: str, size: int) -> range:
    """The bytes that a Range header asks for: `bytes=2-5`, `bytes=2-`, `bytes=-5`; one range only."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or not (match[1] or match[2]):
        raise unsupported(f"the range {header!r}: one range of bytes only")
    if not match[1]:
        first, last = max(0, size - int(match[2])), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    if first >= size or last < first:
        raise range_not_satisfiable(header, size)
    return range(first, last + 1)
