"""The record of a rollout: what every step did, found and changed. Written as `report.json` and as artifacts."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from rollout.values import Value

SCHEMA_VERSION = 1


class Action(StrEnum):
    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"
    ADOPTED = "adopted"
    """Found there, not made by us: teardown leaves it alone."""
    UNCHANGED = "unchanged"

    @property
    def planned(self) -> str:
        """As a plan says it, before anything has happened."""
        return {"created": "create", "updated": "update", "deleted": "delete"}.get(self.value, self.value)


class Change(Value):
    """One thing outside of us that a step touched, or found as wanted."""

    action: Action
    kind: str
    """`Bucket`, `Object`, `ServiceAccount`, `IamBinding`, `Cluster`, `Deployment`…"""
    name: str
    """Unique within the kind: a resource name, `namespace/name`, a `gs://` address."""
    detail: str = ""


class StepStatus(StrEnum):
    DONE = "done"
    UNCHANGED = "unchanged"
    """Everything was already as planned; nothing was changed."""
    SKIPPED = "skipped"
    FAILED = "failed"


class StepReport(Value):
    """What one step did."""

    name: str
    status: StepStatus
    started_at: datetime
    duration_s: Annotated[float, Field(ge=0)]
    attempts: Annotated[int, Field(ge=1)] = 1
    summary: str = ""
    """One line for people."""
    changes: tuple[Change, ...] = ()
    data: dict[str, Any] = {}
    """The step's own figures, JSON only."""
    error: str | None = None


def utc_now() -> datetime:
    return datetime.now(UTC)
