"""One writer at a time: a claim object that its holder renews, and that others may take over once it is dead.

The claim keeps two runs from doing the same work. It is not what keeps the result right: every final name and the ready
marker are written under a generation precondition, so even a writer that was wrongly declared dead cannot overwrite.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from rollout.clients.storage import StorageClient
from rollout.errors import AnotherWriter, RolloutError
from rollout.report import utc_now

RENEWALS_PER_TTL = 3
_POLLS_PER_TTL = 12


class Claim:
    """The claim on one object name. Not thread-safe: one thread acquires, renews and releases it."""

    def __init__(self, storage: StorageClient, name: str, *, ttl_s: float) -> None:
        self._storage = storage
        self._name = name
        self._ttl_s = ttl_s
        self._id = uuid.uuid4().hex
        self._generation = 0
        self._renewed_at = 0.0

    def acquire(self) -> None:
        """Take the claim, after waiting whether a holder that left it behind is still alive.

        Raises:
            AnotherWriter: its holder renewed it while we watched.
        """
        found = self._storage.read_json(self._name)
        if found is None:
            self._write(0)
            return
        data, generation = found
        if not _holder_died_here(data):
            self._watch(data, generation)
        self._write(generation)

    def renew_if_due(self) -> None:
        """Call it often.

        Raises:
            AnotherWriter: somebody took the claim over, because we did not renew it in time.
        """
        if time.monotonic() - self._renewed_at >= self._ttl_s / RENEWALS_PER_TTL:
            self._write(self._generation)

    def release(self) -> None:
        """Give the claim back, if it is still ours."""
        # What the run failed of is the error to show; a claim that stays behind runs out by itself.
        with contextlib.suppress(RolloutError):
            found = self._storage.find(self._name)
            if found is not None and found.generation == self._generation:
                self._storage.delete(found)

    def _write(self, generation: int) -> None:
        self._generation = self._storage.write_json(self._name, self._content(), if_generation=generation)
        self._renewed_at = time.monotonic()

    def _content(self) -> dict[str, object]:
        return {
            "writer": self._id,
            **_this_process(),
            "ttl_s": self._ttl_s,
            "renewed_at": utc_now().isoformat(),
        }

    def _watch(self, data: dict[str, object], generation: int) -> None:
        # Our own clock and the generation decide, so that clocks that differ between machines do no harm.
        ttl_s = float(str(data["ttl_s"]))
        deadline = time.monotonic() + ttl_s
        while time.monotonic() < deadline:
            threading.Event().wait(ttl_s / _POLLS_PER_TTL)
            found = self._storage.find(self._name)
            if found is None:
                raise self._refusal(data, "has just finished")
            if found.generation != generation:
                raise self._refusal(data, "is writing the same weights")

    def _refusal(self, data: dict[str, object], what: str) -> AnotherWriter:
        return AnotherWriter(
            f"another run (process {data['pid']} on {data['host']}) {what}.",
            where=f"gs://{self._storage.bucket_name}/{self._name}",
            resolution="Let it finish; a rerun then finds everything in place.",
        )


def _this_process() -> dict[str, object]:
    """Host name and process id do not tell processes apart: pods of one share have the same, one after the other."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "ids_of": _ids_of(), "started": _started(os.getpid())}


def _ids_of() -> str:
    """Within what process ids are unique: this boot of this machine and, in a container, its own namespace."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""


def _started(pid: int) -> str:
    """When the process began, in ticks since the boot (man 5 proc, field 22); empty if there is none, or no /proc."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _holder_died_here(data: dict[str, object]) -> bool:
    """Whether the holder is proven to be a process of this machine that is gone: then there is nothing to wait for."""
    here = _this_process()
    if (data["host"], data.get("ids_of")) != (here["host"], here["ids_of"]):
        return False
    pid = int(str(data["pid"]))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) != data.get("started")
