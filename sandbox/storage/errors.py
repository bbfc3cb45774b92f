"""What Cloud Storage answers when it refuses: one error, rendered as the JSON API, the XML API or a download does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from xml.sax.saxutils import escape

from aiohttp import web


class Dialect(Enum):
    JSON = "json"
    XML = "xml"
    MEDIA = "media"
    """Downloads and sessions of the JSON API: the message as plain text."""


@dataclass
class StorageError(Exception):
    """A refusal. `reason` is the JSON API's word for it, `code` the XML API's."""

    status: int
    reason: str
    message: str
    code: str
    details: str = ""
    location: tuple[str, str] | None = None
    """(locationType, location): which header or parameter is to blame."""

    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"

    def response(self, dialect: Dialect) -> web.Response:
        if self.status == 304:
            return web.Response(status=304)
        text, content_type = {
            Dialect.JSON: (self._json(), "application/json"),
            Dialect.XML: (self._xml(), "application/xml"),
            Dialect.MEDIA: (self.message, "text/html"),
        }[dialect]
        return web.Response(
            status=self.status, text=text, content_type=content_type, charset="UTF-8", headers=self.headers
        )

    def _json(self) -> str:
        item = {"message": self.message, "domain": "global", "reason": self.reason}
        if self.location:
            item |= {"locationType": self.location[0], "location": self.location[1]}
        return json.dumps({"error": {"code": self.status, "message": self.message, "errors": [item]}}, indent=2)

    def _xml(self) -> str:
        # Details stays even when empty: the official client reads it from every 400 of an uploaded part.
        return (
            "<?xml version='1.0' encoding='UTF-8'?>"
            f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message>"
            f"<Details>{escape(self.details)}</Details></Error>"
        )


def unsupported(what: str) -> StorageError:
    """501 for what only the real service does, and for what nobody does: nothing is ignored in silence."""
    return StorageError(
        501, "notImplemented", f"The storage stand-in does not implement {what}.", "NotImplemented", what
    )


def invalid(message: str, *, code: str = "InvalidArgument", details: str = "") -> StorageError:
    return StorageError(400, "invalid", message, code, details or message)


@contextmanager
def reading_document() -> Iterator[None]:
    """A document whose parts have other types than they should is the client's mistake: 400."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise invalid(f"Invalid argument: {error}") from error


def required(parameter: str) -> StorageError:
    return StorageError(
        400, "required", f"Required parameter: {parameter}", "InvalidArgument", location=("parameter", parameter)
    )


def no_such_bucket() -> StorageError:
    return StorageError(404, "notFound", "The specified bucket does not exist.", "NoSuchBucket")


def no_such_object(bucket: str, name: str, generation: int | None = None) -> StorageError:
    message = f"No such object: {bucket}/{name}" + (f"#{generation}" if generation is not None else "")
    return StorageError(404, "notFound", message, "NoSuchKey", message)


def no_such_upload() -> StorageError:
    return StorageError(404, "notFound", "The requested upload was not found.", "NoSuchUpload")


def precondition_failed(details: str) -> StorageError:
    return StorageError(
        412,
        "conditionNotMet",
        "At least one of the pre-conditions you specified did not hold.",
        "PreconditionFailed",
        details,
        ("header", "If-Match"),
    )


def not_modified() -> StorageError:
    return StorageError(304, "notModified", "", "NotModified")


def conflict(message: str, code: str) -> StorageError:
    return StorageError(409, "conflict", message, code)


def name_taken() -> StorageError:
    return conflict(
        "The requested bucket name is not available. The bucket namespace is shared by all users of the system."
        " Please select a different name and try again.",
        "BucketAlreadyExists",
    )


def already_owned() -> StorageError:
    return conflict(
        "Your previous request to create the named bucket succeeded and you already own it.", "BucketAlreadyOwnedByYou"
    )


def bucket_not_empty() -> StorageError:
    return conflict("The bucket you tried to delete is not empty.", "BucketNotEmpty")


def forbidden(caller: str, permission: str, resource: str) -> StorageError:
    """`resource` is "bucket", "object" or "project"."""
    of = "Google Cloud project" if resource == "project" else f"Google Cloud Storage {resource}"
    message = (
        f"{caller} does not have {permission} access to the {of}."
        f" Permission '{permission}' denied on resource (or it may not exist)."
    )
    return StorageError(403, "forbidden", message, "AccessDenied", message)


def wrong_checksum(kind: str, provided: str, calculated: str) -> StorageError:
    """`kind` is "CRC32C" or "MD5 hash"."""
    message = f'Provided {kind} "{provided}" doesn\'t match calculated {kind} "{calculated}".'
    return StorageError(400, "invalid", message, "BadDigest", message)


def range_not_satisfiable(requested: str, size: int) -> StorageError:
    return StorageError(
        416,
        "requestedRangeNotSatisfiable",
        "Request range not satisfiable",
        "InvalidRange",
        requested,
        ("header", "Range"),
        # The official client tells by this that it has read an empty object to its end.
        {"Content-Range": f"bytes */{size}"},
    )
