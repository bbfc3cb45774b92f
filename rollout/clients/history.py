"""Where measured curves are kept: a local folder, or a prefix of the target's bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.clients.storage import StorageClient
from rollout.errors import BadInput, NotFound
from rollout.target import Target

HISTORY_PREFIX = ".llm-rollout/curves/"


class FolderHistory:
    """A `rollout.history.HistoryStore` in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Mapping[str, Any]:
        """Raises NotFound."""
        try:
            value: Mapping[str, Any] = json.loads((self._folder / key).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise NotFound("there is no such curve.", where=str(self._folder / key)) from error
        except (ValueError, OSError) as error:
            raise BadInput(
                "the kept curve cannot be read.", where=str(self._folder / key), resolution="Remove the file."
            ) from error
        return value

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        """Replaces the file atomically."""
        path = self._folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(value, indent=1), encoding="utf-8")
        draft.replace(path)

    def keys(self, prefix: str) -> Sequence[str]:
        folder = self._folder / prefix
        return sorted(str(path.relative_to(self._folder)) for path in folder.rglob("*.json")) if folder.is_dir() else []


class BucketHistory:
    """A `rollout.history.HistoryStore` in the target's bucket."""

    def __init__(self, target: Target, *, prefix: str = HISTORY_PREFIX) -> None:
        self._storage = StorageClient(target)
        self._prefix = prefix

    def read(self, key: str) -> Mapping[str, Any]:
        """Raises NotFound."""
        found = self._storage.read_json(self._prefix + key)
        if found is None:
            raise NotFound("there is no such curve.", where=f"gs://{self._storage.bucket_name}/{self._prefix}{key}")
        value: Mapping[str, Any] = found[0]
        return value

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        self._storage.write_json(self._prefix + key, value)

    def keys(self, prefix: str) -> Sequence[str]:
        if not self._storage.bucket_exists():
            return []
        stored = self._storage.list_objects(self._prefix + prefix)
        return sorted(each.name.removeprefix(self._prefix) for each in stored)
