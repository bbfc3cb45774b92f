"""Every error that a user can meet. Each says what happened, where, and what to do next.

Vendor exceptions stop at the clients: `raise BucketNotFound(...) from error`. Only `TransientError` is retried.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What `llm-rollout` exits with, so that CI can act on it."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    """Also what the command line itself uses for a wrong option."""
    ROLLED_BACK = 3
    OBJECTIVES_MISSED = 4
    NOT_APPROVED = 5
    LEFTOVERS = 6
    """A teardown that found something of ours still there."""


class RolloutError(Exception):
    """What went wrong (`summary`), where (`where`) and what to do next (`resolution`)."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, summary: str, *, where: str = "", resolution: str = "") -> None:
        self.summary = summary
        self.where = where
        self.resolution = resolution
        super().__init__(summary, where, resolution)

    def __str__(self) -> str:
        head = f"{self.where}: {self.summary}" if self.where else self.summary
        return f"{head} {self.resolution}" if self.resolution else head

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect persists failures by pickle; keyword-only arguments need their own constructor.
        return (_rebuild, (type(self), self.summary, self.where, self.resolution))


def _rebuild(kind: type[RolloutError], summary: str, where: str, resolution: str) -> RolloutError:
    return kind(summary, where=where, resolution=resolution)


class TransientError(RolloutError):
    """Worth another try as it is: a lost connection, a 429 or 5xx, a stale etag."""

    retry_after_s: float | None = None
    """The server's wish (Retry-After), if it stated one."""


class BadInput(RolloutError):
    """The request itself cannot work; nothing was changed."""

    exit_code = ExitCode.BAD_INPUT


class RepositoryNotFound(BadInput):
    """The Hugging Face repository does not exist, or is private and invisible to the token."""


class RepositoryGated(BadInput):
    """The licence is not accepted, or the token is missing or lacks the right to read the repository."""


class RepositoryRenamed(BadInput):
    """The repository goes by another name now; the summary says which."""


class RevisionNotFound(BadInput):
    """The repository has no such branch, tag or commit."""


class CheckpointInvalid(BadInput):
    """The checkpoint is incomplete or inconsistent: a missing shard, a wrong size, an index that disagrees."""


class LayoutInvalid(BadInput):
    """A model path in a bucket that a model server could not load."""


class BucketNotFound(BadInput):
    """The bucket does not exist."""


class BucketNotOurs(BadInput):
    """The bucket's name is taken by another project, or the caller may not use it."""


class PermissionMissing(BadInput):
    """The caller lacks an IAM permission; the summary names it."""


class ApiDisabled(BadInput):
    """A Google Cloud API is not enabled in the project."""


class UniverseMismatch(BadInput):
    """The credentials belong to another universe than the target."""


class NotFound(RolloutError):
    """A resource that should be there is not."""


class AlreadyExists(RolloutError):
    """A resource of that name is there already."""


class ConcurrentChange(TransientError):
    """Somebody else changed the same thing in between (a stale etag): read again, then write again."""


class QuotaExceeded(BadInput):
    """The project's quota does not allow what was asked for; the summary names the metric."""


class PreflightFailed(BadInput):
    """One or more preflight checks failed; nothing was changed."""


class ClusterUnreachable(RolloutError):
    """The Kubernetes API server does not answer."""


class ManifestRejected(BadInput):
    """The Kubernetes API server refuses an object; nothing was applied."""


class FieldConflict(RolloutError):
    """Another field manager owns a field that the plan sets."""


class TransferFailed(RolloutError):
    """The weights did not arrive whole; what did arrive is kept for the next attempt."""


class HashMismatch(TransferFailed):
    """Bytes differ from what the hub says they are; the bad object was deleted."""


class AnotherWriter(RolloutError):
    """Another run is writing the same thing; this one stops."""


class StartupFailed(RolloutError):
    """The model server cannot become ready; the summary is the diagnosis."""


class DeadlineExceeded(RolloutError):
    """A step did not finish within the time that the plan gives it."""


class SmokeFailed(RolloutError):
    """The endpoint answers wrongly, or not at all."""

    exit_code = ExitCode.FAILED


class LoadFailed(RolloutError):
    """The in-cluster load generator did not deliver a stage; the summary is the pod's reason."""


class ObjectivesMissed(RolloutError):
    """The measured figures miss an objective."""

    exit_code = ExitCode.OBJECTIVES_MISSED


class RolledBack(RolloutError):
    """The new version failed and the old one serves again."""

    exit_code = ExitCode.ROLLED_BACK


class NotApproved(RolloutError):
    """Approval was refused, or did not come before its deadline; nothing was changed."""

    exit_code = ExitCode.NOT_APPROVED


class LeftoversFound(RolloutError):
    """Teardown finished, but something of ours is still there."""

    exit_code = ExitCode.LEFTOVERS
