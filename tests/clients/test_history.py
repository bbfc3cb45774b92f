from __future__ import annotations

from pathlib import Path

import pytest

from rollout.clients.history import BucketHistory
from rollout.clients.storage import StorageClient
from rollout.errors import NotFound
from rollout.target import CredentialSource, Endpoints, Target
from sandbox.storage import StorageServer


def test_curves_live_under_a_prefix_of_the_bucket(tmp_path: Path) -> None:
    with StorageServer(root=tmp_path / "storage", project="my-project") as server:
        target = Target(
            name="test",
            project="my-project",
            region="europe-west1",
            credentials=CredentialSource.ANONYMOUS,
            bucket="curves-of-ours",
            endpoints=Endpoints(storage=server.url),
        )
        history = BucketHistory(target)
        assert list(history.keys("w/")) == []
        StorageClient(target).ensure_bucket()
        for key in ("w/2.json", "w/1.json", "other/1.json"):
            history.write(key, {"key": key})
        assert list(history.keys("w/")) == ["w/1.json", "w/2.json"]
        assert history.read("w/2.json") == {"key": "w/2.json"}
        assert [stored.name for stored in StorageClient(target).list_objects(".llm-rollout/curves/other/")] == [
            ".llm-rollout/curves/other/1.json"
        ]
        with pytest.raises(NotFound, match="no such curve"):
            history.read("w/3.json")
