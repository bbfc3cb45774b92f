"""The ledger in the bucket: each target has its own, and knows what the others serve out of the same bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.errors import BadInput
from rollout.target import CredentialSource, Endpoints, Target
from sandbox.storage import StorageServer
from tests.rollout.test_ledger import SERVER, record, removal


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[tuple[Target, Target]]:
    """Two targets that share a bucket."""
    with StorageServer(root=tmp_path / "storage", project="my-project") as server:
        first = Target(
            name="paris",
            project="my-project",
            region="europe-west9",
            credentials=CredentialSource.ANONYMOUS,
            bucket="weights-of-ours",
            endpoints=Endpoints(storage=server.url),
        )
        yield first, first.model_copy(update={"name": "london"})


def test_a_bucket_that_does_not_exist_holds_no_records(targets: tuple[Target, Target]) -> None:
    store = RecordStore(targets[0])
    assert list(store.read_all()) == []
    assert store.served_elsewhere() == ()
    assert store.find("run-0") is None


def test_targets_that_share_a_bucket_do_not_mix_their_records(targets: tuple[Target, Target]) -> None:
    paris, london = (RecordStore(target) for target in targets)
    StorageClient(targets[0]).ensure_bucket()
    paris.write(record(0, "a"))
    london.write(record(1, "b"))
    london.write(record(2, "c"))
    assert [report.run_id for report in paris.read_all()] == ["run-0"]
    assert [report.run_id for report in london.read_all()] == ["run-1", "run-2"]
    assert london.find("run-0") is None
    assert paris.served_elsewhere() == (f"london/{SERVER}",)
    london.write(removal(3))
    assert paris.served_elsewhere() == ()


def test_a_run_is_known_by_the_beginning_of_its_id_if_it_is_the_only_one(targets: tuple[Target, Target]) -> None:
    store = RecordStore(targets[0])
    StorageClient(targets[0]).ensure_bucket()
    store.write(record(0, "a"))
    store.write(record(1, "b"))
    assert store.named("run-1").run_id == "run-1"
    with pytest.raises(BadInput, match="2 rollouts have a run id"):
        store.named("run-")
    with pytest.raises(BadInput, match="no rollouts have a run id"):
        store.named("other")
