"""The stage route: files on a local disk first, for those who want the local copy.

Files in xet go through huggingface_hub (hf_xet), others through hf_transfer, which huggingface_hub 2 no longer calls.
Neither checks a hash; the upload that follows does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rollout.clients.hub import HubClient
from rollout.model import ModelFile, PinnedModel
from rollout.transfer import TransferSpec


class DiskFile:
    """A local file, read in ranges by many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def where(self) -> str:
        return str(self._path)

    def read(self, start: int, view: memoryview) -> Iterator[int]:
        raise NotImplementedError


def stage_files(pinned: PinnedModel, files: Sequence[ModelFile], hub: HubClient, spec: TransferSpec) -> Path:
    raise NotImplementedError
