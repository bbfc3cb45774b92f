"""Bulk uploads through the XML API: whole small objects, and multipart uploads whose parts go out in parallel.

Three properties of the service shape what is built on this (https://cloud.google.com/storage/docs/multipart-uploads):
multipart uploads take no preconditions, completing one overwrites what has the name, and etags of parts are opaque.
So an upload never has a final name, and `rollout.clients.transfer` moves the object there once it is proven.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from rollout import errors
from rollout.bucket_objects import StoredObject
from rollout.clients.raw_http import Body, HttpPool, HttpResponse
from rollout.clients.retrying import TRANSIENT_STATUSES, transient
from rollout.clients.storage import StorageClient, bucket_not_found
from rollout.report import utc_now

_LISTING_BYTES = 8 * 2**20
"""A page of 1000 uploads or parts takes about 300 KiB."""


_DAMAGED = frozenset({"BadDigest", "CrcMismatch"})
"""https://cloud.google.com/storage/docs/xml-api/reference-status: both say that a stated hash was not met."""


class Upload(NamedTuple):
    """An upload that was begun and neither completed nor aborted."""

    name: str
    upload_id: str
    begun_at: datetime
    """By the service where it was listed, by our clock where it was begun here."""


class ArrivedPart(NamedTuple):
    number: int
    size_bytes: int
    etag: str


class Uploader:
    """Uploads into one bucket. Every method is one request (a listing: one per page) and may be repeated.

    Raises (all methods):
        TransientError: try again.
        PermissionMissing, BucketNotFound: trying again would not help.
        NotFound: there is no such upload (any more).
    """

    def __init__(self, storage: StorageClient, pool: HttpPool) -> None:
        self._storage = storage
        self._pool = pool

    def put(self, name: str, body: Body, crc32c: int, metadata: Mapping[str, str]) -> StoredObject:
        """Write a whole object; the service refuses bytes without `crc32c`."""
        headers = _described(metadata) | _stated(crc32c)
        with self._pool.request("PUT", self._url(name), self._headers(headers), body) as response:
            self._check(response, f"gs://{self._storage.bucket_name}/{name}")
            response.text()
            return StoredObject(
                name=name,
                size_bytes=len(body),
                crc32c=crc32c,
                generation=int(response.headers["x-goog-generation"]),
                updated_at=utc_now(),
                metadata=dict(metadata),
            )

    def begin(self, name: str, metadata: Mapping[str, str]) -> Upload:
        """Start an upload whose object will carry `metadata`."""
        answer = self._xml("POST", name, "uploads=", headers=_described(metadata))
        return Upload(name, _text(answer, "UploadId"), utc_now())

    def uploads(self, prefix: str) -> Iterator[Upload]:
        """Unfinished uploads of objects below `prefix`, oldest first for each name."""
        query = {"uploads": "", "prefix": prefix}
        while True:
            answer = self._xml("GET", "", urlencode(query))
            for item in answer.iterfind("{*}Upload"):
                begun_at = datetime.fromisoformat(_text(item, "Initiated"))
                yield Upload(_text(item, "Key"), _text(item, "UploadId"), begun_at)
            if _text(answer, "IsTruncated") != "true":
                return
            query |= {
                "key-marker": _text(answer, "NextKeyMarker"),
                "upload-id-marker": _text(answer, "NextUploadIdMarker"),
            }

    def parts(self, upload: Upload) -> Iterator[ArrivedPart]:
        """What has arrived of an upload."""
        query = {"uploadId": upload.upload_id}
        while True:
            answer = self._xml("GET", upload.name, urlencode(query))
            for item in answer.iterfind("{*}Part"):
                yield ArrivedPart(int(_text(item, "PartNumber")), int(_text(item, "Size")), _text(item, "ETag"))
            if _text(answer, "IsTruncated") != "true":
                return
            query["part-number-marker"] = _text(answer, "NextPartNumberMarker")

    def send(self, upload: Upload, number: int, body: Body, crc32c: int) -> ArrivedPart:
        """Send one part, in place of an earlier one of that number; the service refuses bytes without `crc32c`."""
        query = urlencode({"uploadId": upload.upload_id, "partNumber": number})
        url = self._url(upload.name, query)
        with self._pool.request("PUT", url, self._headers(_stated(crc32c)), body) as response:
            self._check(response, f"part {number} of gs://{self._storage.bucket_name}/{upload.name}")
            response.text()
            return ArrivedPart(number, len(body), response.headers["ETag"])

    def complete(self, upload: Upload, parts: Sequence[ArrivedPart]) -> None:
        """Assemble the object under the upload's name, over whatever has it."""
        root = ElementTree.Element("CompleteMultipartUpload")
        for part in sorted(parts):
            item = ElementTree.SubElement(root, "Part")
            ElementTree.SubElement(item, "PartNumber").text = str(part.number)
            ElementTree.SubElement(item, "ETag").text = part.etag
        query = urlencode({"uploadId": upload.upload_id})
        self._xml("POST", upload.name, query, body=ElementTree.tostring(root))

    def abort(self, upload: Upload) -> None:
        """Remove an upload and its parts; that it is gone already is as good."""
        url = self._url(upload.name, urlencode({"uploadId": upload.upload_id}))
        with self._pool.request("DELETE", url, self._headers({})) as response:
            if response.status != 404:
                self._check(response, f"gs://{self._storage.bucket_name}/{upload.name}")
            response.text()

    def _xml(
        self, method: str, name: str, query: str, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
    ) -> ElementTree.Element:
        url = self._url(name, query)
        with self._pool.request(method, url, self._headers(headers or {}), body) as response:
            where = f"gs://{self._storage.bucket_name}/{name}"
            self._check(response, where)
            text = response.text(_LISTING_BYTES)
        try:
            answer = ElementTree.fromstring(text)
        except ElementTree.ParseError as error:
            raise transient("Cloud Storage answers with broken XML.", where=where) from error
        if answer.tag.endswith("Error"):
            # As in S3, a completion may begin with status 200 and fail afterwards.
            raise transient(f"Cloud Storage could not do it ({answer.findtext('{*}Code')}).", where=where)
        return answer

    def _url(self, name: str, query: str = "") -> str:
        path = f"/{quote(name)}" if name else ""
        return f"{self._storage.endpoint}/{self._storage.bucket_name}{path}{'?' if query else ''}{query}"

    def _headers(self, more: Mapping[str, str]) -> dict[str, str]:
        return {"User-Agent": "llm-rollout", **self._storage.auth_headers(), **more}

    def _check(self, response: HttpResponse, where: str) -> None:
        if response.status < 300:
            return
        text = response.text()
        code, message = _error(text)
        if response.status in TRANSIENT_STATUSES or code in _DAMAGED:
            # The bytes were changed on their way; they are still right in our memory.
            summary = f"Cloud Storage answers with status {response.status} {code}."
            raise transient(summary, where=where, retry_after=response.headers.get("Retry-After"))
        if code == "NoSuchBucket":
            raise bucket_not_found(where)
        if response.status == 404:
            raise errors.NotFound("there is no such upload (any more).", where=where)
        if response.status in (401, 403):
            raise errors.PermissionMissing(
                message or "the account may not do this.",
                where=where,
                resolution="Grant roles/storage.objectUser on the bucket to the account that runs this.",
            )
        raise errors.TransferFailed(
            f"Cloud Storage answers with status {response.status} {code} {message}", where=where
        )


def _described(metadata: Mapping[str, str]) -> dict[str, str]:
    described = {f"x-goog-meta-{key}": value for key, value in metadata.items()}
    return {"Content-Type": "application/octet-stream", **described}


def _stated(crc32c: int) -> dict[str, str]:
    return {"x-goog-hash": f"crc32c={base64.b64encode(crc32c.to_bytes(4, 'big')).decode()}"}


def _error(text: str) -> tuple[str, str]:
    """Code and details of an XML error; empty for anything else."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return "", ""
    return root.findtext("{*}Code") or "", root.findtext("{*}Details") or root.findtext("{*}Message") or ""


def _text(element: ElementTree.Element, name: str) -> str:
    text = element.findtext(f"{{*}}{name}")
    if text is None:
        raise transient(f"Cloud Storage left {name} out of its answer.")
    return text
