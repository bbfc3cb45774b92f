"""The stage route: files on a local disk first, for those who want the local copy.

Files in xet come through huggingface_hub (hf_xet), large others through hf_transfer, which huggingface_hub 2 no longer
calls by itself. Neither compares the content with the hub's hash; the upload that follows does. A file is staged under
a temporary name and renamed when complete, so a killed run leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rollout.clients.hub import HubClient
from rollout.clients.retrying import transient, with_retries
from rollout.errors import TransferFailed
from rollout.model import ModelFile, PinnedModel
from rollout.selection import refuse_unsafe_name
from rollout.transfer import TransferSpec

_READ_BYTES = 2**20
_UNFINISHED = ".unfinished"

_HF_TRANSFER = "import hf_transfer, json, sys; hf_transfer.download(**json.load(sys.stdin))"
"""A process of its own: hf_transfer keeps the interpreter's lock, so nothing else would run until the file is there."""


class DiskFile:
    """A local file, read in ranges by many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def where(self) -> str:
        return str(self._path)

    def reject(self) -> None:
        """The content is wrong: a rerun has to fetch the file again."""
        self._path.unlink(missing_ok=True)

    def read(self, start: int, view: memoryview) -> Iterator[int]:
        """Fill `view` from `start`.

        Raises:
            TransferFailed: the file is shorter than the hub says.
        """
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            filled = 0
            while filled < len(view):
                count = os.preadv(descriptor, [view[filled : filled + _READ_BYTES]], start + filled)
                if not count:
                    raise TransferFailed(
                        "the staged file is too short.", where=self.where, resolution="Delete it, rerun."
                    )
                filled += count
                yield count
        finally:
            os.close(descriptor)


def staging_folder(pinned: PinnedModel, spec: TransferSpec) -> Path:
    """Where the stage route keeps this commit: below `spec.staging_dir`, or below the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    base = Path(spec.staging_dir or f"{cache}/llm-rollout/staging").expanduser()
    return base / pinned.repo_id / pinned.commit_sha


def stage_files(pinned: PinnedModel, files: Sequence[ModelFile], hub: HubClient, spec: TransferSpec) -> Path:
    """Download files that are not in the staging folder yet.

    Raises:
        CheckpointInvalid: a name that would leave the folder.
        TransferFailed: a file does not arrive.
    """
    folder = staging_folder(pinned, spec)
    for file in files:
        refuse_unsafe_name(file.path)
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            _stage(pinned, file, path, hub, spec)
    return folder


def _stage(pinned: PinnedModel, file: ModelFile, path: Path, hub: HubClient, spec: TransferSpec) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.is_xet:
        hub.download(pinned, file, path.parents[len(Path(file.path).parts) - 1])
        return
    unfinished = path.with_name(path.name + _UNFINISHED)
    if file.size_bytes > spec.part_bytes:
        with_retries(lambda: _download_in_parallel(pinned, file, unfinished, hub, spec), attempts=spec.attempts)
    else:
        with_retries(lambda: _download(pinned, file, unfinished, hub), attempts=spec.attempts)
    unfinished.replace(path)


def _download_in_parallel(pinned: PinnedModel, file: ModelFile, path: Path, hub: HubClient, spec: TransferSpec) -> None:
    url, headers = hub.open(pinned, file).address()
    arguments = {
        "url": url,
        "filename": str(path),
        "max_files": spec.connections,
        "chunk_size": spec.part_bytes,
        "parallel_failures": spec.connections - 1,
        "max_retries": spec.attempts,
        "headers": headers,
    }
    # The signed address and the token go through a pipe: arguments of a process can be read by others, and so could
    # its messages be, which are dropped.
    child = subprocess.run(
        [sys.executable, "-c", _HF_TRANSFER], input=json.dumps(arguments).encode(), capture_output=True, check=False
    )
    where = f"{pinned.repo_id}/{file.path}"
    if child.returncode != 0:
        raise transient("hf_transfer could not fetch the file.", where=where)
    if path.stat().st_size != file.size_bytes:
        raise transient("hf_transfer wrote a file of the wrong size.", where=where)


def _download(pinned: PinnedModel, file: ModelFile, path: Path, hub: HubClient) -> None:
    data = bytearray(file.size_bytes)
    if data:
        for _ in hub.open(pinned, file).read(0, memoryview(data)):
            pass
    path.write_bytes(data)
