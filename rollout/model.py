"""What is rolled out: a repository at a revision, and the same pinned to a commit with the proof of every file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from rollout.values import CommitSha, RepoId, Sha256, Value


class ModelRef(Value):
    """A Hugging Face repository at a branch, tag or commit."""

    repo_id: RepoId
    revision: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\s]+$")] = "main"


class ModelFile(Value):
    """One file of a repository at a commit, with the hash that the hub states for it."""

    path: str
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256 | None = None
    """Stated by the hub for LFS and xet files."""
    git_blob_sha1: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Stated by the hub for files that live in git itself: sha1 of `blob <size>\\0<content>`."""
    is_xet: bool = False


class PinnedModel(Value):
    """A commit, its files to transfer, and what was left out. Nothing after the plan ever sees a branch name."""

    repo_id: RepoId
    revision: str
    """What was asked for; only for display."""
    commit_sha: CommitSha
    files: tuple[ModelFile, ...]
    excluded: tuple[str, ...] = ()
    """Paths in the repository that are not transferred (other formats, `original/`, images…)."""
    gated: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def short_sha(self) -> str:
        return self.commit_sha[:12]
