"""The base of every value that travels between steps, and the formats of names."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

_UNITS = {
    "usd_per_hour": "USD per hour",
    "per_s": "per second",
    "s": "seconds",
    "bytes": "bytes",
    "gib": "GiB",
    "percent": "%",
}
"""Endings of field names that state a unit."""


def field_title(name: str, _: object = None) -> str:
    """`approval_timeout_s` → `Approval timeout (seconds)`: forms and documentation show it where no title is given."""
    for ending, unit in _UNITS.items():
        if name.endswith(f"_{ending}"):
            return f"{field_title(name.removesuffix(f'_{ending}'))} ({unit})"
    words = name.replace("_", " ").replace("usd ", "USD ")
    return words[:1].upper() + words[1:]


class Value(BaseModel):
    """Frozen, closed (an unknown field is an error) and hashable by content."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, field_title_generator=field_title
    )

    def digest(self, length: int = 12) -> str:
        """Hex digest of the canonical JSON form: equal values give equal digests in every process."""
        return content_digest(self.model_dump(mode="json"), length)


def content_digest(data: Any, length: int = 12) -> str:
    """The first `length` hex digits of the sha256 of `data` as canonical JSON (sorted keys, no blanks)."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


KubernetesName = Annotated[
    str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$", min_length=1, max_length=63)
]
"""RFC 1035 label: what Services require, and therefore what every object of ours uses."""

BucketName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]$", min_length=3, max_length=222)
]
"""https://cloud.google.com/storage/docs/buckets#naming"""

ServiceAccountId = Annotated[str, StringConstraints(pattern=r"^[a-z][-a-z0-9]{4,28}[a-z0-9]$")]
"""https://cloud.google.com/iam/docs/service-accounts-create: 6 to 30 characters."""

RepoId = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=96)
]
"""`organisation/name`, as huggingface_hub's validate_repo_id demands of repositories outside the legacy root."""

CommitSha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
