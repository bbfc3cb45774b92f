"""The stage route: files on a local disk first, for those who want the local copy.

Files in xet come through huggingface_hub (hf_xet), large others through hf_transfer, which huggingface_hub 2 no longer
calls by itself. Neither compares the content with the hub's hash; the upload that follows does, and has a file that is
wrong fetched again. A file is staged under a temporary name and renamed when complete, so a killed run leaves nothing
that looks finished: whole files are kept, and the one on its way is begun anew (hf_transfer cannot go on in the middle;
hf_xet finds its chunks in its own cache, where that is switched on).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rollout.clients.hub import HubClient
from rollout.clients.retrying import transient, with_retries
from rollout.errors import TransferFailed
from rollout.model import ModelFile, PinnedModel
from rollout.selection import refuse_unsafe_name
from rollout.transfer import MIB, TransferSpec

_READ_BYTES = 2**20
_UNFINISHED = ".unfinished"

_CHUNK_BYTES = 4 * MIB
"""hf_transfer writes whole chunks: with the default stall timeout of 30 s, a connection below 140 kB/s has stalled."""

_LOOK_S = 0.25
"""Between two looks at a child process and what it has written."""


class DiskFile:
    """A staged file, read in ranges by many threads; fetched again after it was rejected."""

    def __init__(self, path: Path, stage: Callable[[], None]) -> None:
        self._path = path
        self._stage = stage
        self._lock = threading.Lock()

    @property
    def where(self) -> str:
        return str(self._path)

    def reject(self) -> None:
        """The content is wrong: the next reading, or a rerun, fetches the file again."""
        self._path.unlink(missing_ok=True)

    def read(self, start: int, view: memoryview) -> Iterator[int]:
        """Fill `view` from `start`.

        Raises:
            TransferFailed: the file is shorter than the hub says, or does not arrive.
        """
        with self._lock:
            if not self._path.exists():
                self._stage()
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


class Staging:
    """Files of one commit on their way to a local folder. `stop` ends it soon, wherever it is."""

    def __init__(self, pinned: PinnedModel, hub: HubClient, spec: TransferSpec, stop: threading.Event) -> None:
        self._pinned = pinned
        self._hub = hub
        self._spec = spec
        self._stop = stop
        # Below `spec.staging_dir`, or below the user's cache.
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        base = Path(spec.staging_dir or f"{cache}/llm-rollout/staging").expanduser()
        self.folder = base / pinned.repo_id / pinned.commit_sha

    @property
    def bytes_on_disk(self) -> int:
        """What the files there take, unfinished ones included: blocks, for tools write at several places of a file."""
        found = 0
        for path in self.folder.rglob("*"):
            try:
                found += path.stat().st_blocks * 512
            except FileNotFoundError:  # renamed or removed since it was listed
                continue
        return found

    def stage_all(self, files: Sequence[ModelFile]) -> None:
        """Download the files that are not in the folder yet.

        Raises:
            CheckpointInvalid: a name that would leave the folder.
            TransferFailed: a file does not arrive; the disk is full, or was never large enough.
        """
        missing = [file for file in files if not self._is_there(file)]
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = sum(file.size_bytes for file in missing)
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise TransferFailed(
                f"the files need {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left.",
                where=str(self.folder),
                resolution="Free space, name a larger disk in transfer.staging_dir, or take the route `stream`.",
            )
        for file in missing:
            self.stage(file)

    def open(self, file: ModelFile) -> DiskFile:
        return DiskFile(self._path(file), lambda: self.stage(file))

    def stage(self, file: ModelFile) -> None:
        """Download one file, trying again as often as the spec says.

        Raises:
            TransferFailed: it does not arrive.
            RepositoryGated, RepositoryNotFound: the hub refuses.
        """
        path = self._path(file)
        with self._disk_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
        with_retries(lambda: self._fetch(file, path), attempts=self._spec.attempts, stop=self._stop)

    def _path(self, file: ModelFile) -> Path:
        refuse_unsafe_name(file.path)
        return self.folder / file.path

    def _is_there(self, file: ModelFile) -> bool:
        path = self._path(file)
        return path.is_file() and path.stat().st_size == file.size_bytes

    def _fetch(self, file: ModelFile, path: Path) -> None:
        if file.is_xet:
            self._run_tool("huggingface_hub", self._hub.download_arguments(self._pinned, file, self.folder), file)
            return
        unfinished = path.with_name(path.name + _UNFINISHED)
        with self._disk_errors():
            if file.size_bytes > self._spec.part_bytes:
                # hf_transfer begins anew, and writes over what is there: nothing would grow for as long.
                unfinished.unlink(missing_ok=True)
                self._run_tool("hf_transfer", self._hf_transfer_arguments(file, unfinished), file)
                if unfinished.stat().st_size != file.size_bytes:
                    raise transient("hf_transfer wrote a file of the wrong size.", where=self._where(file))
            else:
                unfinished.write_bytes(self._read(file))
            unfinished.replace(path)

    def _read(self, file: ModelFile) -> bytes:
        data = bytearray(file.size_bytes)
        if data:
            for _ in self._hub.open(self._pinned, file).read(0, memoryview(data)):
                pass
        return bytes(data)

    def _hf_transfer_arguments(self, file: ModelFile, path: Path) -> dict[str, Any]:
        url, headers = self._hub.open(self._pinned, file).address()
        connections = self._spec.connections
        return {
            "url": url,
            "filename": str(path),
            "max_files": connections,
            "chunk_size": min(_CHUNK_BYTES, self._spec.part_bytes),
            # It takes both or neither, and no more failures at once than connections.
            "parallel_failures": connections - 1,
            "max_retries": self._spec.attempts if connections > 1 else 0,
            "headers": headers,
        }

    def _run_tool(self, tool: str, arguments: Mapping[str, Any], file: ModelFile) -> None:
        """Run a child process to its end, or until the folder has not grown for the stall timeout."""
        with subprocess.Popen(
            [sys.executable, "-m", "rollout.clients.fetching"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as child:
            assert child.stdin is not None, "a pipe"
            assert child.stdout is not None, "a pipe"
            try:
                with child.stdin:
                    child.stdin.write(json.dumps({"tool": tool, "arguments": arguments}).encode())
                self._watch(child, file)
                told = child.stdout.read()
            finally:
                child.kill()
        if child.returncode != 0:
            raise self._error(tool, json.loads(told or b"{}"), file)

    def _watch(self, child: subprocess.Popen[bytes], file: ModelFile) -> None:
        seen, grew_at = self.bytes_on_disk, time.monotonic()
        while child.poll() is None:
            if self._stop.wait(_LOOK_S):
                raise TransferFailed("the transfer was stopped.", where=self._where(file))
            now = self.bytes_on_disk
            if now != seen:
                seen, grew_at = now, time.monotonic()
            elif time.monotonic() - grew_at > self._spec.stall_timeout_s:
                raise transient(f"no byte came for {self._spec.stall_timeout_s:.0f} s.", where=self._where(file))

    def _error(self, tool: str, told: Mapping[str, Any], file: ModelFile) -> Exception:
        if told.get("status") is not None:
            return self._hub.refusal(self._pinned, told["status"], told["code"], told["retry_after"])
        if told.get("errno") is not None:
            return self._disk_error(told["errno"])
        return transient(
            f"{tool} could not fetch the file ({told.get('kind', 'it was killed')}).", where=self._where(file)
        )

    def _where(self, file: ModelFile) -> str:
        return f"{self._pinned.repo_id}@{self._pinned.short_sha}/{file.path}"

    def _disk_error(self, number: int) -> TransferFailed:
        return TransferFailed(
            f"the disk refuses: {os.strerror(number)}.",
            where=str(self.folder),
            resolution="Free space, name another disk in transfer.staging_dir, or take the route `stream`.",
        )

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._disk_error(error.errno or 0) from error
