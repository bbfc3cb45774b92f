"""Objects in a bucket as values, and `gs://` addresses."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Self

from pydantic import Field

from rollout.errors import BadInput
from rollout.values import Value

_GCS_URI = re.compile(r"gs://([a-z0-9][-_.a-z0-9]{1,220}[a-z0-9])(?:/(.*))?")


class StoredObject(Value):
    """One object as a listing shows it."""

    name: str
    size_bytes: Annotated[int, Field(ge=0)]
    crc32c: int
    """Of the whole object, computed by the service."""
    generation: int
    updated_at: datetime
    """By the service where it was listed, by our clock where it was written here."""
    metadata: dict[str, str] = {}

    @property
    def crc32c_hex(self) -> str:
        return f"{self.crc32c:08x}"


class GcsUri(Value):
    """`gs://bucket/name`; the name is empty for the bucket itself."""

    bucket: str
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a `gs://` address.

        Raises:
            BadInput: it is none.
        """
        match = _GCS_URI.fullmatch(text)
        if match is None:
            raise BadInput(
                f"{text!r} is not a Cloud Storage address.", resolution="Write gs://bucket or gs://bucket/path."
            )
        return cls(bucket=match[1], name=match[2] or "")

    @property
    def prefix(self) -> str:
        """The name as a folder: with a trailing slash, or empty for the bucket itself."""
        return f"{self.name.rstrip('/')}/" if self.name else ""

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.name}".rstrip("/")
