"""Model repositories on disk, as the hub stand-in serves them: commits, branches, tags, content-addressed files.

    <root>/hashes.json                    hashes of files that were published, by device, inode, size and mtime
    <root>/<org>/<name>/repository.json   branches, tags, gate; or where the repository moved to
    <root>/<org>/<name>/commits/<sha>.json
    <root>/<org>/<name>/blobs/<hash>      hard links to what was published, or copies

A commit's sha follows from its content alone, so publishing the same files again changes nothing, and a model that was
hashed once costs a few stat calls. Files are hard links: replace a published file, never write into it.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

Gate: TypeAlias = Literal[False, "auto", "manual"]
"""How access to a gated repository is granted: at once, or by its authors; False if it is not gated."""

_GIT_LIMIT_BYTES = 10 * 2**20
"""The hub refuses larger files in git: they must be LFS."""

_LFS_PATTERNS = tuple(
    f"*.{suffix}"
    for suffix in (
        *("7z", "arrow", "bin", "bz2", "ckpt", "ftz", "gguf", "gz", "h5", "joblib", "model", "msgpack", "npy", "npz"),
        *("onnx", "ot", "parquet", "pb", "pickle", "pkl", "pt", "pth", "rar", "safetensors", "tflite", "tgz", "wasm"),
        *("xz", "zip", "zst"),
    )
)
"""What the .gitattributes that the hub puts into a new model repository names; a published one takes its place."""

_BINARY_SAMPLE_BYTES = 512
"""The hub looks at so many bytes of an upload to tell text from binary content."""


class HubFile(BaseModel):
    """One file of a commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size_bytes: int
    git_oid: str
    """sha1 of the git blob: of the content, or of the LFS pointer."""
    sha256: str | None = None
    """Of the content; stated for LFS files only."""

    @property
    def blob_name(self) -> str:
        return self.sha256 or self.git_oid


class HubCommit(BaseModel):
    """An immutable state of a repository."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha: str
    title: str
    date: datetime
    files: tuple[HubFile, ...]
    """Sorted by path."""

    @functools.cached_property
    def by_path(self) -> Mapping[str, HubFile]:
        return {file.path: file for file in self.files}


class RepositoryRecord(BaseModel):
    """What may change about a repository."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    created_at: datetime
    branches: dict[str, str] = {}
    tags: dict[str, str] = {}
    gate: Gate = False
    private: bool = False
    moved_to: str | None = None
    """The repository's new id, if it was renamed."""


class HubRepository:
    """One repository as it is on disk now."""

    def __init__(self, repo_id: str, folder: Path) -> None:
        self.repo_id = repo_id
        self.folder = folder
        self.record = RepositoryRecord.model_validate_json((folder / "repository.json").read_bytes())

    def resolve(self, revision: str) -> HubCommit | None:
        """The commit at a branch, a tag, a full sha or an unambiguous beginning of one; None if there is none."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.record.branches.get(name) or self.record.tags.get(name) or self._expand(revision)
        return None if sha is None else _load_commit(self.folder / "commits" / f"{sha}.json")

    def blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.blob_name

    def _expand(self, prefix: str) -> str | None:
        if len(prefix) < 7 or not set(prefix) <= set("0123456789abcdef"):
            return None
        matches = [path.stem for path in (self.folder / "commits").glob(f"{prefix}*.json")]
        return matches[0] if len(matches) == 1 else None


@functools.lru_cache(maxsize=256)
def _load_commit(path: Path) -> HubCommit:
    # Commits never change, so reading each once is enough.
    return HubCommit.model_validate_json(path.read_bytes())


class HubStore:
    """All repositories under a directory. Several threads may use one store; several processes may read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        root.mkdir(parents=True, exist_ok=True)
        self._hashes_path = root / "hashes.json"
        self._hashes: dict[str, str] = {}
        if self._hashes_path.exists():
            self._hashes = json.loads(self._hashes_path.read_bytes())

    def repository(self, repo_id: str) -> HubRepository | None:
        """The repository of that id, None if there is none. One that moved says so in its record."""
        folder = self._folder(repo_id)
        return HubRepository(repo_id, folder) if (folder / "repository.json").is_file() else None

    def publish(
        self,
        repo_id: str,
        files: Path | Mapping[str, Path | bytes],
        *,
        branch: str = "main",
        tags: Iterable[str] = (),
        title: str = "Upload model",
    ) -> str:
        """Commit a folder, or named contents, as the new state of a branch; the repository is made if need be.

        A mapping may use names that no folder can hold, such as `../escape`: what a hostile repository would state.

        Returns:
            The commit's sha.
        """
        with self._lock:
            folder = self._folder(repo_id)
            for part in ("commits", "blobs"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            sources = _walk(files) if isinstance(files, Path) else files
            patterns = _lfs_patterns(sources.get(".gitattributes"))
            committed = tuple(self._add(folder, path, source, patterns) for path, source in sorted(sources.items()))
            commit = HubCommit(sha=_commit_sha(committed), title=title, date=datetime.now(UTC), files=committed)
            commit_path = folder / "commits" / f"{commit.sha}.json"
            if not commit_path.exists():
                _write_atomically(commit_path, commit.model_dump_json().encode())
            existing = self.repository(repo_id)
            record = existing.record if existing else RepositoryRecord(created_at=datetime.now(UTC))
            self._save(
                folder,
                record.model_copy(
                    update={
                        "branches": record.branches | {branch: commit.sha},
                        "tags": record.tags | dict.fromkeys(tags, commit.sha),
                        "moved_to": None,
                    }
                ),
            )
            _write_atomically(self._hashes_path, json.dumps(self._hashes).encode())
            return commit.sha

    def restrict(self, repo_id: str, *, gate: Gate = False, private: bool = False) -> None:
        """Set who may read a repository."""
        with self._lock:
            repository = self.repository(repo_id)
            if repository is None:
                raise LookupError(f"no repository {repo_id} under {self.root}")
            self._save(repository.folder, repository.record.model_copy(update={"gate": gate, "private": private}))

    def rename(self, repo_id: str, new_repo_id: str) -> None:
        """Move a repository; the old id redirects to the new one."""
        old, new = self._folder(repo_id), self._folder(new_repo_id)
        with self._lock:
            new.parent.mkdir(parents=True, exist_ok=True)
            old.rename(new)
            old.mkdir()
            self._save(old, RepositoryRecord(created_at=datetime.now(UTC), moved_to=new_repo_id))

    def _save(self, folder: Path, record: RepositoryRecord) -> None:
        _write_atomically(folder / "repository.json", record.model_dump_json().encode())

    def _folder(self, repo_id: str) -> Path:
        organisation, _, name = repo_id.partition("/")
        if not name or "/" in name or {organisation, name} & {"", ".", ".."}:
            raise ValueError(f"{repo_id!r} is not an organisation and a name")
        return self.root / organisation / name

    def _add(self, folder: Path, path: str, source: Path | bytes, lfs_patterns: Iterable[str]) -> HubFile:
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if any(fnmatch.fnmatch(PurePosixPath(path).name, p) for p in lfs_patterns) or _must_be_lfs(size, source):
            sha256 = self._hash(source, "sha256")
            file = HubFile(path=path, size_bytes=size, git_oid=_git_sha1(lfs_pointer(sha256, size)), sha256=sha256)
        else:
            file = HubFile(path=path, size_bytes=size, git_oid=self._hash(source, "git"))
        _place(source, folder / "blobs" / file.blob_name)
        return file

    def _hash(self, source: Path | bytes, kind: Literal["sha256", "git"]) -> str:
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest() if kind == "sha256" else _git_sha1(source)
        status = source.stat()
        key = f"{kind}:{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
        if key not in self._hashes:
            if kind == "git":
                self._hashes[key] = _git_sha1(source.read_bytes())
            else:
                with source.open("rb") as stream:
                    self._hashes[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._hashes[key]


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """What git holds in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def tree_oid(files: Iterable[HubFile], directory: str) -> str:
    """The sha1 that git gives to a directory; `""` is the root."""
    prefix = f"{directory}/" if directory else ""
    return _tree_sha1(
        [(file.path.removeprefix(prefix), file.git_oid) for file in files if file.path.startswith(prefix)]
    )


def _tree_sha1(blobs: Iterable[tuple[str, str]]) -> str:
    entries: dict[str, tuple[bytes, str]] = {}
    below: dict[str, list[tuple[str, str]]] = {}
    for path, oid in blobs:
        name, slash, rest = path.partition("/")
        if slash:
            below.setdefault(name, []).append((rest, oid))
        else:
            entries[name] = (b"100644", oid)
    for name, inside in below.items():
        # Git sorts a directory as if its name ended in a slash.
        entries[name + "/"] = (b"40000", _tree_sha1(inside))
    body = b"".join(
        mode + b" " + name.removesuffix("/").encode() + b"\0" + bytes.fromhex(oid)
        for name, (mode, oid) in sorted(entries.items(), key=lambda entry: entry[0].encode())
    )
    return hashlib.sha1(b"tree %d\0" % len(body) + body).hexdigest()


def _commit_sha(files: Iterable[HubFile]) -> str:
    return hashlib.sha1(b"commit\0" + tree_oid(files, "").encode()).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs_patterns(gitattributes: Path | bytes | None) -> tuple[str, ...]:
    if gitattributes is None:
        return _LFS_PATTERNS
    content = gitattributes.read_bytes() if isinstance(gitattributes, Path) else gitattributes
    return tuple(line.split()[0] for line in content.decode().splitlines() if "filter=lfs" in line)


def _must_be_lfs(size: int, source: Path | bytes) -> bool:
    if size > _GIT_LIMIT_BYTES:
        return True
    if isinstance(source, bytes):
        return b"\0" in source[:_BINARY_SAMPLE_BYTES]
    with source.open("rb") as stream:
        return b"\0" in stream.read(_BINARY_SAMPLE_BYTES)


def _walk(folder: Path) -> dict[str, Path | bytes]:
    found: dict[str, Path | bytes] = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    if not found:
        raise FileNotFoundError(f"nothing to publish in {folder}")
    return found


def _place(source: Path | bytes, blob: Path) -> None:
    if blob.exists():
        return
    if isinstance(source, bytes):
        _write_atomically(blob, source)
        return
    temporary = _beside(blob)
    try:
        os.link(source.resolve(), temporary)
    except OSError:  # Another file system, or one without hard links.
        shutil.copyfile(source, temporary)
    temporary.replace(blob)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = _beside(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
