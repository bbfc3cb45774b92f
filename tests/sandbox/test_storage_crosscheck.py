"""The same operations against our storage stand-in and against gcp-storage-emulator, where both claim to do them.

The emulator ignores locations, uniform access, labels and `ifGenerationMatch=0`, and has no XML multipart uploads:
these are not in the table.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from gcp_storage_emulator.server import create_server
from google.api_core import exceptions as api_exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.exceptions import GoogleCloudError

from sandbox.storage import StorageServer

QUANTUM = 256 << 10
DATA = os.urandom(3 * QUANTUM + 11)

Operation: TypeAlias = Callable[[storage.Bucket], Any]
"""What a caller sees of an operation: a value, or the class of the error."""


def stored(bucket: storage.Bucket, name: str = "x", data: bytes = DATA) -> storage.Blob:
    blob = bucket.blob(name)
    blob.upload_from_string(data, content_type="text/plain")
    return blob


def resumable(bucket: storage.Bucket) -> Any:
    blob = bucket.blob("dir/resumable", chunk_size=QUANTUM)
    blob.upload_from_file(io.BytesIO(DATA), size=len(DATA))
    found = bucket.get_blob("dir/resumable")
    return found.size, found.crc32c, found.download_as_bytes(raw_download=True) == DATA


def composed(bucket: storage.Bucket) -> Any:
    blob = bucket.blob("composed")
    blob.compose([stored(bucket, "a", b"1"), stored(bucket, "b", b"23")])
    return blob.download_as_bytes(checksum=None)


def listed(bucket: storage.Bucket) -> Any:
    for name in ("a/1", "a/2", "b"):
        stored(bucket, name, b"x")
    listing = bucket.list_blobs(delimiter="/")
    return [blob.name for blob in listing], sorted(listing.prefixes)


def copied(bucket: storage.Bucket) -> Any:
    bucket.copy_blob(stored(bucket), bucket, "copy")
    return bucket.blob("copy").download_as_bytes(checksum=None) == DATA


def patched(bucket: storage.Bucket) -> Any:
    blob = stored(bucket)
    blob.metadata = {"a": "1"}
    blob.patch()
    return bucket.get_blob("x").metadata


def granted(bucket: storage.Bucket) -> Any:
    policy = bucket.get_iam_policy()
    policy.bindings = [{"role": "roles/storage.objectViewer", "members": {"user:a@example.com"}}]
    bucket.set_iam_policy(policy)
    return [(binding["role"], sorted(binding["members"])) for binding in bucket.get_iam_policy().bindings]


def corrupted(bucket: storage.Bucket) -> Any:
    blob = bucket.blob("x")
    blob.crc32c = "AAAAAA=="
    blob.upload_from_string(b"data", checksum=None)


OPERATIONS: dict[str, Operation] = {
    "an upload in one request": lambda bucket: stored(bucket).download_as_bytes() == DATA,
    "hashes and size": lambda bucket: (stored(bucket).size, bucket.get_blob("x").crc32c, bucket.get_blob("x").md5_hash),
    "content type": lambda bucket: stored(bucket) and bucket.get_blob("x").content_type,
    "a resumable upload": resumable,
    "a range": lambda bucket: stored(bucket).download_as_bytes(start=5, end=9, checksum=None) == DATA[5:10],
    "compose": composed,
    "a listing with a delimiter": listed,
    "copy": copied,
    "custom metadata": patched,
    "a missing object": lambda bucket: bucket.blob("missing").download_as_bytes(),
    "a missing object's metadata": lambda bucket: bucket.get_blob("missing"),
    "deleting twice": lambda bucket: (stored(bucket).delete(), bucket.blob("x").delete()),
    "deleting a bucket with objects": lambda bucket: stored(bucket) and bucket.delete(),
    "making a bucket twice": lambda bucket: bucket.client.create_bucket(bucket.name),
    "a missing bucket": lambda bucket: bucket.client.get_bucket("missing"),
    "a policy": granted,
    "a wrong crc32c": corrupted,
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[storage.Client, storage.Client]]:
    root: Path = tmp_path_factory.mktemp("storage")
    emulator = create_server("127.0.0.1", 0, in_memory=True)
    emulator.start()
    try:
        with StorageServer(root=root) as ours:
            host, port = emulator._api._httpd.server_address[:2]
            yield client_of(ours.url), client_of(f"http://{host}:{port}")
    finally:
        emulator.stop()


def client_of(url: str) -> storage.Client:
    return storage.Client(project="proj", credentials=AnonymousCredentials(), client_options={"api_endpoint": url})


def seen(client: storage.Client, bucket_name: str, operation: Operation) -> Any:
    try:
        return operation(client.create_bucket(bucket_name))
    except (GoogleCloudError, api_exceptions.GoogleAPICallError) as error:
        return type(error)


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_show_the_same(clients: tuple[storage.Client, storage.Client], name: str) -> None:
    ours, emulator = (seen(client, name.replace(" ", "-").replace("'", ""), OPERATIONS[name]) for client in clients)
    assert ours == emulator
