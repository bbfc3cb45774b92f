"""The bucket: made once, adopted, never taken from others; objects under preconditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from rollout import errors
from rollout.clients.layout import check_layout
from rollout.clients.raw_http import HttpPool
from rollout.clients.storage import StorageClient
from rollout.clients.uploads import Uploader
from rollout.report import Action
from rollout.target import CredentialSource, Endpoints, Target
from sandbox import models
from sandbox.faults import FaultRule, Reply
from sandbox.storage import StorageServer

BUCKET = "weights-bucket"
Maker = Callable[..., StorageClient]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageServer]:
    with StorageServer(root=tmp_path / "storage", project="my-project", foreign_buckets=["taken"]) as server:
        yield server


def target(storage: StorageServer, bucket: str = BUCKET, **more: Any) -> Target:
    settings: dict[str, Any] = {"project": "my-project", "region": "europe-west1"} | more
    return Target(
        name="test",
        credentials=CredentialSource.ANONYMOUS,
        bucket=bucket,
        endpoints=Endpoints(storage=storage.url),
        **settings,
    )


@pytest.fixture
def client(storage: StorageServer) -> StorageClient:
    client = StorageClient(target(storage))
    client.ensure_bucket()
    return client


def put(client: StorageClient, name: str, data: bytes) -> None:
    client._bucket.blob(name).upload_from_string(data)


def test_a_bucket_is_made_private_uniform_labelled_and_in_the_region(storage: StorageServer) -> None:
    client = StorageClient(target(storage))
    assert not client.bucket_exists()
    assert client.ensure_bucket({"model": "m"}).action is Action.CREATED
    found = client._client.get_bucket(BUCKET)
    assert found.location == "EUROPE-WEST1"
    assert found.iam_configuration.uniform_bucket_level_access_enabled
    assert found.iam_configuration.public_access_prevention == "enforced"
    assert found.labels == {"managed-by": "llm-rollout", "model": "m"}
    (rule,) = found.lifecycle_rules
    assert (rule["action"], rule["condition"]) == ({"type": "AbortIncompleteMultipartUpload"}, {"age": 7})
    assert client.ensure_bucket().action is Action.UNCHANGED


def test_a_bucket_that_others_made_is_adopted_and_never_deleted(storage: StorageServer) -> None:
    client = StorageClient(target(storage))
    client._client.create_bucket(BUCKET, location="europe-west1")
    change = client.ensure_bucket()
    assert (change.action, change.detail) == (Action.ADOPTED, "uniform bucket-level access is off")
    assert client.delete_bucket().action is Action.ADOPTED
    assert client.bucket_exists()


def test_a_bucket_in_another_region_is_refused(client: StorageClient, storage: StorageServer) -> None:
    with pytest.raises(errors.BadInput, match="is in europe-west1, the target in u-france-east1"):
        StorageClient(target(storage, region="u-france-east1")).ensure_bucket()


def test_a_name_that_belongs_to_somebody_else_is_refused(storage: StorageServer) -> None:
    taken = StorageClient(target(storage, "taken"))
    for act in (taken.ensure_bucket, taken.bucket_exists):
        with pytest.raises(errors.BucketNotOurs, match="gs://taken"):
            act()
    with pytest.raises(errors.PermissionMissing, match=r"storage\.objects\.list"):
        taken.list_objects()


def test_a_bucket_of_ours_is_deleted_only_when_empty(client: StorageClient) -> None:
    put(client, "x", b"1")
    with pytest.raises(errors.LeftoversFound, match="still holds objects"):
        client.delete_bucket()
    assert [change.name for change in client.delete_prefix("")] == [f"gs://{BUCKET}/x"]
    assert client.delete_bucket().action is Action.DELETED
    assert client.delete_bucket().action is Action.UNCHANGED


def test_what_is_not_there_has_its_own_errors(client: StorageClient, storage: StorageServer) -> None:
    with pytest.raises(errors.NotFound):
        client.read("absent")
    assert client.read_json("absent") is None
    assert client.find("absent") is None
    absent = StorageClient(target(storage, "absent-bucket"))
    with pytest.raises(errors.BucketNotFound, match="absent-bucket"):
        absent.list_objects()


def test_a_listing_goes_over_pages_and_carries_size_crc_and_generation(client: StorageClient) -> None:
    put(client, "a/x", b"123456789")
    put(client, "b", b"")
    (stored,) = client.list_objects("a/")
    assert (stored.name, stored.size_bytes, stored.crc32c_hex) == ("a/x", 9, "e3069283")
    assert [one.name for one in client.list_objects()] == ["a/x", "b"]


def test_a_document_is_written_only_over_the_version_that_was_read(client: StorageClient) -> None:
    first = client.write_json("doc.json", {"n": 1}, if_generation=0)
    assert client.read_json("doc.json") == ({"n": 1}, first)
    with pytest.raises(errors.AnotherWriter, match=r"doc\.json"):
        client.write_json("doc.json", {"n": 2}, if_generation=0)
    second = client.write_json("doc.json", {"n": 2}, if_generation=first)
    with pytest.raises(errors.AnotherWriter):
        client.write_json("doc.json", {"n": 3}, if_generation=first)
    assert client.read_json("doc.json") == ({"n": 2}, second)


def test_an_object_that_is_no_json_says_which(client: StorageClient) -> None:
    put(client, "doc.json", b"{")
    with pytest.raises(errors.RolloutError, match=r"doc\.json: the object is not JSON"):
        client.read_json("doc.json")


def test_a_move_loses_against_what_was_written_meanwhile(client: StorageClient) -> None:
    put(client, "temporary", b"new")
    put(client, "final", b"other")
    (temporary,) = client.list_objects("temporary")
    with pytest.raises(errors.AnotherWriter, match="final"):
        client.move(temporary, "final", if_generation=0)
    assert client.read("final") == b"other"
    current = client.find("final")
    assert current is not None
    client.move(temporary, "final", if_generation=current.generation)
    assert client.read("final") == b"new"
    assert client.find("temporary") is None


def test_only_the_listed_generation_is_deleted(client: StorageClient) -> None:
    put(client, "x", b"1")
    (old,) = client.list_objects()
    put(client, "x", b"2")
    assert not client.delete(old)
    assert client.read("x") == b"2"


def test_ranges_are_half_open(client: StorageClient) -> None:
    put(client, "x", b"0123456789")
    assert client.read("x", start=2, end=5) == b"234"
    assert client.read("x", end=3) == b"012"


def test_a_busy_service_is_a_transient_error_in_the_end(client: StorageClient, storage: StorageServer) -> None:
    storage.faults.add(FaultRule(fault=Reply(status=503), path="uploads"))
    uploader = Uploader(client, HttpPool(stall_timeout_s=5))
    with pytest.raises(errors.TransientError, match="status 503"):
        list(uploader.uploads(""))


def test_unfinished_uploads_are_listed_with_their_parts_and_aborted_twice_without_harm(client: StorageClient) -> None:
    uploader = Uploader(client, HttpPool(stall_timeout_s=5))
    upload = uploader.begin("a/b c", {"key": "value"})
    sent = uploader.send(upload, 2, b"123456789", 0xE3069283)
    (listed,) = uploader.uploads("a/")
    assert listed[:2] == upload[:2]
    assert abs(listed.begun_at - upload.begun_at) < timedelta(minutes=1)
    assert list(uploader.parts(upload)) == [sent]
    with pytest.raises(errors.TransientError, match="BadDigest"):
        uploader.send(upload, 1, b"123456789", 1)
    uploader.abort(upload)
    uploader.abort(upload)
    assert list(uploader.uploads("")) == []
    with pytest.raises(errors.NotFound):
        uploader.complete(upload, [sent])


def test_the_layout_of_any_path_is_checked_by_reading_headers_only(
    client: StorageClient, storage: StorageServer, tmp_path: Path
) -> None:
    folder = models.tiny_model(tmp_path / "model")
    truncated = models.truncate_shard(folder)
    models.add_original_folder(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            put(client, f"some/where/{path.relative_to(folder).as_posix()}", path.read_bytes())
    report = check_layout(target(storage), f"gs://{BUCKET}/some/where")
    messages = " ".join(finding.message for finding in report.findings)
    assert truncated in messages
    assert "the folder original/ holds weights" in messages
    wrong = check_layout(target(storage), f"gs://{BUCKET}/some")
    assert wrong.findings[0].message.endswith(f"Did you mean gs://{BUCKET}/some/where?")
