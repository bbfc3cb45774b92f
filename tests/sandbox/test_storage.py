"""The storage stand-in behaves as Cloud Storage does, through the official client and over plain HTTP."""

from __future__ import annotations

import base64
import http.client
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import google_crc32c
import pytest
import requests
from google.api_core import exceptions as api_exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import transfer_manager
from hypothesis import given
from hypothesis import strategies as st

from sandbox.faults import Corrupt, FaultPlan, FaultRule, Reply
from sandbox.storage import StorageServer
from sandbox.storage.checksums import combine_crc32c

MIB = 1 << 20
QUANTUM = 256 << 10
FOREIGN = "someone-elses-bucket"
PRINCIPAL = (
    "principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/p.svc.id.goog"
    "/subject/ns/default/sa/vllm"
)


def crc32c(data: bytes) -> str:
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StorageServer]:
    with StorageServer(root=tmp_path / "storage", foreign_buckets=[FOREIGN]) as running:
        yield running


def client_of(server: StorageServer) -> storage.Client:
    return storage.Client(
        project="proj", credentials=AnonymousCredentials(), client_options={"api_endpoint": server.url}
    )


@pytest.fixture
def client(server: StorageServer) -> storage.Client:
    return client_of(server)


@pytest.fixture
def bucket(client: storage.Client) -> storage.Bucket:
    return client.create_bucket("weights")


@pytest.fixture
def upload_url(server: StorageServer, bucket: storage.Bucket) -> str:
    return f"{server.url}/upload/storage/v1/b/{bucket.name}/o"


def as_member(member: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sandbox-identity:{member}"}


def start_session(upload_url: str, name: str, **query: str) -> str:
    answer = requests.post(upload_url, params={"uploadType": "resumable", "name": name, **query}, timeout=60)
    answer.raise_for_status()
    return answer.headers["Location"]


def put(url: str, data: bytes, content_range: str, **headers: str) -> requests.Response:
    return requests.put(url, data=data, headers={"Content-Range": content_range, **headers}, timeout=60)


def start_multipart(server: StorageServer, path: str) -> str:
    answer = requests.post(f"{server.url}{path}?uploads", timeout=60)
    match = re.search("<UploadId>(.+)</UploadId>", answer.text)
    assert match, answer.text
    return match[1]


def put_part(server: StorageServer, path: str, upload_id: str, number: int, data: bytes, **headers: str) -> Any:
    query = {"partNumber": str(number), "uploadId": upload_id}
    return requests.put(f"{server.url}{path}", params=query, data=data, headers=headers, timeout=60)


def complete(server: StorageServer, path: str, upload_id: str, parts: list[tuple[int, str]]) -> requests.Response:
    items = "".join(f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>" for number, etag in parts)
    body = f"<CompleteMultipartUpload>{items}</CompleteMultipartUpload>"
    return requests.post(f"{server.url}{path}", params={"uploadId": upload_id}, data=body, timeout=60)


# Buckets


def test_a_bucket_keeps_what_it_was_made_with(client: storage.Client) -> None:
    wanted = client.bucket("configured")
    wanted.labels = {"team": "ml"}
    wanted.iam_configuration.uniform_bucket_level_access_enabled = True
    wanted.iam_configuration.public_access_prevention = "enforced"
    wanted.add_lifecycle_abort_incomplete_multipart_upload_rule(age=1)
    client.create_bucket(wanted, location="europe-west4")
    found = client.get_bucket("configured")
    assert (found.location, found.location_type, found.labels) == ("EUROPE-WEST4", "region", {"team": "ml"})
    assert found.iam_configuration.uniform_bucket_level_access_enabled
    assert found.iam_configuration.public_access_prevention == "enforced"
    assert [rule["action"]["type"] for rule in found.lifecycle_rules] == ["AbortIncompleteMultipartUpload"]
    assert found.soft_delete_policy.retention_duration_seconds == 604_800
    assert (found.metageneration, found.etag) == (1, "CAE=")


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("weights", 409, "Your previous request to create the named bucket succeeded and you already own it."),
        (FOREIGN, 409, "The requested bucket name is not available. The bucket namespace is shared by all users"),
        ("Upper", 400, "Invalid bucket name: 'Upper'"),
        ("ab", 400, "Invalid bucket name: 'ab'"),
        ("goog-weights", 400, "Invalid bucket name: 'goog-weights'"),
        ("192.168.5.4", 400, "Invalid bucket name: '192.168.5.4'"),
        ("models.example.com", 403, "Another user owns the domain models.example.com"),
    ],
)
def test_creating_a_bucket_is_refused_with_the_services_reason(
    server: StorageServer, bucket: storage.Bucket, name: str, status: int, message: str
) -> None:
    answer = requests.post(f"{server.url}/storage/v1/b", params={"project": "proj"}, json={"name": name}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, status)
    assert error["message"].startswith(message)


def test_a_bucket_outside_the_permitted_locations_is_refused(tmp_path: Path) -> None:
    with StorageServer(root=tmp_path, allowed_locations=["u-france-east1"]) as server:
        client = client_of(server)
        with pytest.raises(api_exceptions.PreconditionFailed, match=r"constraints/gcp\.resourceLocations"):
            client.create_bucket("weights", location="US")
        assert client.create_bucket("weights", location="u-france-east1").location == "U-FRANCE-EAST1"


def test_someone_elses_bucket_answers_403_naming_the_permission(client: storage.Client) -> None:
    with pytest.raises(api_exceptions.Forbidden, match=r"does not have storage\.buckets\.get access"):
        client.get_bucket(FOREIGN)


def test_patching_a_bucket_with_a_stale_metageneration_fails(bucket: storage.Bucket) -> None:
    bucket.labels = {"a": "1"}
    bucket.patch(if_metageneration_match=1)
    bucket.labels = {"a": "2"}
    with pytest.raises(api_exceptions.PreconditionFailed, match="At least one of the pre-conditions you specified"):
        bucket.patch(if_metageneration_match=1)


def test_a_bucket_with_objects_cannot_be_deleted(bucket: storage.Bucket) -> None:
    bucket.blob("x").upload_from_string(b"x")
    with pytest.raises(api_exceptions.Conflict, match="The bucket you tried to delete is not empty"):
        bucket.delete()
    bucket.delete(force=True)
    assert not bucket.exists()


def test_buckets_are_listed_by_project(client: storage.Client, bucket: storage.Bucket) -> None:
    client.create_bucket("of-another-project", project="other")
    assert [found.name for found in client.list_buckets()] == ["weights"]


# Objects


@pytest.mark.parametrize("size", [0, 1, QUANTUM, 3 * MIB + 7])
def test_a_resumable_upload_arrives_whole(bucket: storage.Bucket, size: int) -> None:
    data = os.urandom(size)
    blob = bucket.blob("dir/ü #?%.bin", chunk_size=QUANTUM * 4)
    blob.upload_from_file(io.BytesIO(data), size=size)
    assert blob.download_as_bytes() == data
    assert (blob.size, blob.crc32c) == (size, crc32c(data))


def test_a_stream_of_unknown_length_arrives_whole(bucket: storage.Bucket) -> None:
    data = os.urandom(3 * QUANTUM)
    with bucket.blob("stream").open("wb", chunk_size=QUANTUM) as sink:
        sink.write(data)
    assert bucket.blob("stream").download_as_bytes() == data


def test_a_status_query_never_finishes_an_upload(upload_url: str, bucket: storage.Bucket) -> None:
    data = os.urandom(2 * QUANTUM)
    session = start_session(upload_url, "x")
    assert put(session, data[:QUANTUM], f"bytes 0-{QUANTUM - 1}/*").status_code == 308
    for total in ("*", str(len(data))):
        answer = put(session, b"", f"bytes */{total}")
        assert (answer.status_code, answer.headers["Range"]) == (308, f"bytes=0-{QUANTUM - 1}")
    assert not bucket.blob("x").exists()
    assert put(session, data[QUANTUM:], f"bytes {QUANTUM}-{len(data) - 1}/{len(data)}").status_code == 200
    # A client that lost the answer asks again.
    assert put(session, b"", f"bytes */{len(data)}").json()["size"] == str(len(data))


def test_an_upload_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    data = os.urandom(2 * QUANTUM)
    with StorageServer(root=tmp_path) as server:
        client_of(server).create_bucket("weights")
        session = start_session(f"{server.url}/upload/storage/v1/b/weights/o", "x")
        put(session, data[:QUANTUM], f"bytes 0-{QUANTUM - 1}/*")
        upload_id = start_multipart(server, "/weights/parts")
        etag = put_part(server, "/weights/parts", upload_id, 1, data).headers["ETag"]
        old_url = server.url
    with StorageServer(root=tmp_path) as server:
        session = session.replace(old_url, server.url)
        assert put(session, b"", "bytes */*").headers["Range"] == f"bytes=0-{QUANTUM - 1}"
        assert put(session, data[QUANTUM:], f"bytes {QUANTUM}-{len(data) - 1}/{len(data)}").status_code == 200
        assert complete(server, "/weights/parts", upload_id, [(1, etag)]).status_code == 200
        bucket = client_of(server).bucket("weights")
        assert bucket.blob("x").download_as_bytes() == bucket.blob("parts").download_as_bytes() == data


def test_a_lost_connection_leaves_whole_quanta_behind(server: StorageServer, upload_url: str) -> None:
    session = urlsplit(start_session(upload_url, "x"))
    connection = http.client.HTTPConnection(session.netloc, timeout=60)
    connection.putrequest("PUT", f"{session.path}?{session.query}")
    connection.putheader("Content-Length", str(4 * QUANTUM))
    connection.putheader("Content-Range", f"bytes 0-{4 * QUANTUM - 1}/{4 * QUANTUM}")
    connection.endheaders()
    connection.send(bytes(2 * QUANTUM + 100))
    # The query takes the session over from the stalled request; how much had arrived is the socket's affair.
    answer = put(session.geturl(), b"", "bytes */*")
    assert answer.status_code == 308
    kept = answer.headers.get("Range", "bytes=0--1").removeprefix("bytes=0-")
    assert int(kept) + 1 in {0, QUANTUM, 2 * QUANTUM}
    connection.close()


def test_a_chunk_beyond_what_is_known_is_refused(upload_url: str) -> None:
    answer = put(start_session(upload_url, "x"), b"x" * 10, "bytes 100-109/110")
    assert answer.status_code == 400
    assert "the upload offset is 100 byte(s), which exceeds already uploaded size of 0 byte(s)" in answer.text


def test_a_cancelled_session_is_gone(upload_url: str) -> None:
    session = start_session(upload_url, "x")
    assert requests.delete(session, timeout=60).status_code == 499
    assert put(session, b"", "bytes */*").status_code == 404


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"crc32c": "AAAAAA=="}, 'Provided CRC32C "AAAAAA==" doesn\'t match calculated CRC32C "'),
        ({"md5Hash": "1B2M2Y8AsgTpgAmY7PhCfg=="}, 'Provided MD5 hash "1B2M2Y8AsgTpgAmY7PhCfg==" doesn\'t match'),
    ],
)
def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    upload_url: str, bucket: storage.Bucket, stated: dict[str, str], message: str
) -> None:
    started = requests.post(upload_url, params={"uploadType": "resumable", "name": "x"}, json=stated, timeout=60)
    answer = put(started.headers["Location"], b"hello", "bytes 0-4/5")
    assert answer.status_code == 400
    assert answer.text.startswith(message)
    assert not bucket.blob("x").exists()


def test_preconditions_guard_every_change(bucket: storage.Bucket) -> None:
    blob = bucket.blob("x")
    blob.upload_from_string(b"1", if_generation_match=0)
    first = blob.generation
    stale = {"if_generation_match": 0}
    for change in (
        lambda: bucket.blob("x").upload_from_string(b"2", **stale),
        lambda: bucket.blob("x").upload_from_file(io.BytesIO(b"2"), **stale),
        lambda: bucket.blob("x").delete(if_generation_match=first + 1),
        lambda: bucket.blob("x").compose([blob], if_generation_match=0),
        lambda: bucket.copy_blob(blob, bucket, "x", if_generation_match=0),
    ):
        with pytest.raises(api_exceptions.PreconditionFailed):
            change()
    assert bucket.get_blob("x").generation == first


def test_the_xml_api_honours_preconditions(server: StorageServer, bucket: storage.Bucket) -> None:
    url, headers = f"{server.url}/{bucket.name}/x", {"x-goog-if-generation-match": "0"}
    assert requests.put(url, data=b"1", headers=headers, timeout=60).status_code == 200
    answer = requests.put(url, data=b"2", headers=headers, timeout=60)
    assert answer.status_code == 412
    assert "<Code>PreconditionFailed</Code>" in answer.text
    assert "<Details>x-goog-if-generation-match</Details>" in answer.text


@pytest.mark.parametrize(
    ("requested", "status", "body"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=5-100", 206, b"56789"),
        ("bytes=10-", 416, None),
        ("bytes=1-2,4-5", 501, None),
    ],
)
@pytest.mark.parametrize("path", ["/weights/x", "/download/storage/v1/b/weights/o/x?alt=media"])
def test_ranges(
    server: StorageServer, bucket: storage.Bucket, path: str, requested: str | None, status: int, body: bytes | None
) -> None:
    blobs = [bucket.blob(name) for name in ("a", "b")]
    for blob, part in zip(blobs, (b"0123", b"456789"), strict=True):
        blob.upload_from_string(part)
    bucket.blob("x").compose(blobs)
    headers = {} if requested is None else {"Range": requested}
    answer = requests.get(server.url + path, headers=headers, timeout=60)
    assert answer.status_code == status
    if body is not None:
        assert answer.content == body
        assert answer.headers["x-goog-hash"] == f"crc32c={crc32c(b'0123456789')}"


def test_reading_goes_on_while_the_object_is_replaced(server: StorageServer, bucket: storage.Bucket) -> None:
    data = os.urandom(16 * MIB)
    bucket.blob("x").upload_from_string(data)
    answer = requests.get(f"{server.url}/weights/x", stream=True, timeout=60)
    bucket.blob("x").upload_from_string(b"new")
    assert answer.raw.read() == data


def test_metadata_is_patched_key_by_key(bucket: storage.Bucket) -> None:
    blob = bucket.blob("x")
    blob.metadata = {"keep": "1", "drop": "2"}
    blob.upload_from_string(b"x")
    blob.metadata = {"keep": "1", "drop": None}
    blob.patch()
    found = bucket.get_blob("x")
    assert (found.metadata, found.metageneration) == ({"keep": "1"}, 2)


def test_listing_pages_folds_and_filters(bucket: storage.Bucket) -> None:
    for name in ("a/1", "a/2", "b", "c/1", "d"):
        bucket.blob(name).upload_from_string(b"x")
    listing = bucket.list_blobs(delimiter="/", page_size=2)
    assert [[blob.name for blob in page] for page in listing.pages] == [["b"], ["d"]]
    assert listing.prefixes == {"a/", "c/"}
    assert [blob.name for blob in bucket.list_blobs(prefix="a/", start_offset="a/2")] == ["a/2"]


def test_compose_copy_and_move_keep_content_and_checksums(bucket: storage.Bucket) -> None:
    parts = [os.urandom(1000), b"", os.urandom(7)]
    blobs = [bucket.blob(f"part-{index}") for index in range(3)]
    for blob, part in zip(blobs, parts, strict=True):
        blob.upload_from_string(part)
    whole = bucket.blob("whole")
    whole.compose(blobs)
    whole.reload()
    assert (whole.crc32c, whole.component_count, whole.md5_hash) == (crc32c(b"".join(parts)), 3, None)
    bucket.move_blob(whole, "moved", if_generation_match=0)
    assert not whole.exists()
    bucket.copy_blob(bucket.blob("moved"), bucket, "copied")
    assert bucket.blob("copied").download_as_bytes() == b"".join(parts)
    with pytest.raises(
        api_exceptions.BadRequest, match=r"source components provided \(33\) exceeds the maximum \(32\)"
    ):
        whole.compose(blobs * 11)


@pytest.mark.parametrize("name", ["a\nb", ".", "..", "x" * 1025, ".well-known/acme-challenge/x"])
def test_invalid_object_names_are_refused(bucket: storage.Bucket, name: str) -> None:
    with pytest.raises(api_exceptions.BadRequest):
        bucket.blob(name).upload_from_string(b"x")


# XML multipart uploads


def test_the_transfer_manager_moves_a_file_in_parts(bucket: storage.Bucket, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(os.urandom(11 * MIB))
    blob = bucket.blob("dir/in parts")
    blob.metadata = {"sha256": "abc"}
    transfer_manager.upload_chunks_concurrently(str(source), blob, chunk_size=5 * MIB, worker_type="thread")
    transfer_manager.download_chunks_concurrently(blob, str(copy), chunk_size=4 * MIB, worker_type="thread")
    assert copy.read_bytes() == source.read_bytes()
    found = bucket.get_blob("dir/in parts")
    assert (found.crc32c, found.metadata) == (crc32c(source.read_bytes()), {"sha256": "abc"})


@pytest.mark.parametrize(
    ("sizes", "chosen", "code"),
    [
        ([1000, 1000], [1, 2], "EntityTooSmall"),
        ([5 * MIB, 1], [2, 1], "InvalidPartOrder"),
        ([1], [1, 2], "InvalidPart"),
        ([1], [], "MalformedCompleteMultipartUploadRequest"),
    ],
)
def test_a_completion_that_makes_no_object_is_refused(
    server: StorageServer, bucket: storage.Bucket, sizes: list[int], chosen: list[int], code: str
) -> None:
    upload_id = start_multipart(server, "/weights/x")
    etags = {
        number: put_part(server, "/weights/x", upload_id, number, bytes(size)).headers["ETag"]
        for number, size in enumerate(sizes, start=1)
    }
    answer = complete(server, "/weights/x", upload_id, [(number, etags.get(number, '"0"')) for number in chosen])
    assert (answer.status_code, f"<Code>{code}</Code>" in answer.text) == (400, True)
    assert not bucket.blob("x").exists()


def test_parts_are_checked_listed_replaced_and_aborted(server: StorageServer, bucket: storage.Bucket) -> None:
    upload_id = start_multipart(server, "/weights/x")
    wrong = put_part(server, "/weights/x", upload_id, 1, b"data", **{"x-goog-hash": "crc32c=AAAAAA=="})
    assert (wrong.status_code, "<Code>BadDigest</Code>" in wrong.text) == (400, True)
    for data in (b"old", b"new!"):
        right = {"x-goog-hash": f"crc32c={crc32c(data)}"}
        assert put_part(server, "/weights/x", upload_id, 1, data, **right).headers["x-goog-hash"]
    url = f"{server.url}/weights/x?uploadId={upload_id}"
    listed = requests.get(url, timeout=60).text
    assert re.findall("<PartNumber>(.+?)</PartNumber>|<Size>(.+?)</Size>", listed) == [("1", ""), ("", "4")]
    assert requests.delete(url, timeout=60).status_code == 204
    gone = put_part(server, "/weights/x", upload_id, 2, b"late")
    assert (gone.status_code, "<Code>NoSuchUpload</Code>" in gone.text) == (404, True)


def test_a_buckets_uploads_are_listed_in_pages(server: StorageServer, bucket: storage.Bucket) -> None:
    started = [(name, start_multipart(server, f"/weights/{name}")) for name in ("a", "b", "b", "c")]
    seen: list[tuple[str, str]] = []
    query = {"uploads": "", "max-uploads": "1"}
    while True:
        text = requests.get(f"{server.url}/weights", params=query, timeout=60).text
        seen += re.findall("<Upload><Key>(.+?)</Key><UploadId>(.+?)</UploadId>", text)
        if "<IsTruncated>false" in text:
            break
        markers = re.search("<NextKeyMarker>(.+?)</NextKeyMarker><NextUploadIdMarker>(.+?)</Next", text)
        assert markers
        query |= {"key-marker": markers[1], "upload-id-marker": markers[2]}
    assert seen == started


# IAM


def test_a_stale_policy_is_refused(bucket: storage.Bucket) -> None:
    mine, theirs = bucket.get_iam_policy(), bucket.get_iam_policy()
    for policy in (mine, theirs):
        policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"serviceAccount:a@b.c"}})
    bucket.set_iam_policy(mine)
    with pytest.raises(api_exceptions.PreconditionFailed):
        bucket.set_iam_policy(theirs)


@pytest.mark.parametrize(
    ("member", "shown_as"),
    [("serviceAccount:gsa@proj.iam.gserviceaccount.com", "gsa@proj.iam.gserviceaccount.com"), (PRINCIPAL, "Caller")],
)
def test_a_workload_reads_only_what_its_role_permits(
    server: StorageServer, bucket: storage.Bucket, member: str, shown_as: str
) -> None:
    bucket.blob("x").upload_from_string(b"data")
    url, headers = f"{server.url}/storage/v1/b/weights/o/x", as_member(member)
    refused = requests.get(url, headers=headers, timeout=60)
    assert refused.status_code == 403
    assert refused.json()["error"]["message"] == (
        f"{shown_as} does not have storage.objects.get access to the Google Cloud Storage object."
        " Permission 'storage.objects.get' denied on resource (or it may not exist)."
    )
    policy = bucket.get_iam_policy()
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {member}})
    bucket.set_iam_policy(policy)
    assert requests.get(url, headers=headers, timeout=60).status_code == 200
    assert requests.delete(url, headers=headers, timeout=60).status_code == 403


def test_a_grant_is_felt_after_its_propagation(tmp_path: Path) -> None:
    with StorageServer(root=tmp_path, iam_propagation_s=3600) as server:
        bucket = client_of(server).create_bucket("weights")
        policy = bucket.get_iam_policy()
        policy.bindings.append({"role": "roles/storage.objectViewer", "members": {PRINCIPAL}})
        bucket.set_iam_policy(policy)
        answer = requests.get(f"{server.url}/storage/v1/b/weights/o", headers=as_member(PRINCIPAL), timeout=60)
        assert answer.status_code == 403


def test_public_members_are_refused_where_public_access_is_prevented(client: storage.Client) -> None:
    wanted = client.bucket("private")
    wanted.iam_configuration.public_access_prevention = "enforced"
    bucket = client.create_bucket(wanted)
    policy = bucket.get_iam_policy()
    policy.bindings.append({"role": "roles/storage.objectViewer", "members": {"allUsers"}})
    with pytest.raises(api_exceptions.PreconditionFailed, match="since public access prevention is enforced"):
        bucket.set_iam_policy(policy)


def test_permissions_are_tested_for_the_caller(server: StorageServer, bucket: storage.Bucket) -> None:
    asked = ["storage.objects.create", "storage.buckets.delete"]
    assert bucket.test_iam_permissions(asked) == asked
    url = f"{server.url}/storage/v1/b/weights/iam/testPermissions"
    answer = requests.get(url, params={"permissions": asked}, headers=as_member(PRINCIPAL), timeout=60)
    assert "permissions" not in answer.json()


# Refusals, faults, process


@pytest.mark.parametrize(
    ("method", "path", "document"),
    [
        ("POST", "/storage/v1/b?project=proj", "[1"),
        ("POST", "/storage/v1/b?project=proj", '{"name": 5}'),
        ("POST", "/storage/v1/b?project=proj", '{"name": "new", "labels": 3}'),
        ("PATCH", "/storage/v1/b/weights", '{"lifecycle": {"rule": 3}}'),
        ("PUT", "/storage/v1/b/weights/iam", '{"bindings": 5}'),
        ("PUT", "/storage/v1/b/weights/iam", '{"bindings": [{"role": "roles/owner", "members": ["user:a@b.c"]}]}'),
        ("POST", "/storage/v1/b/weights/o/x/compose", '{"sourceObjects": [1]}'),
        ("POST", "/upload/storage/v1/b/weights/o?uploadType=multipart", "{}"),
        ("GET", "/storage/v1/b/weights/o?maxResults=0", ""),
        ("GET", "/storage/v1/b/weights/o?pageToken=%25%25", ""),
        ("GET", "/storage/v1/b/weights/o?fields=items(", ""),
        ("GET", "/storage/v1/b/weights/o/%FF", ""),
    ],
)
def test_malformed_requests_are_the_clients_fault(
    server: StorageServer, bucket: storage.Bucket, method: str, path: str, document: str
) -> None:
    assert requests.request(method, server.url + path, data=document, timeout=60).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/storage/v1/b/weights/acl", {}, 404),
        ("GET", "/storage/v1/b/weights/o?matchGlob=*.json", {}, 501),
        ("PUT", "/storage/v1/b/weights", {}, 405),
        ("POST", "/batch/storage/v1", {}, 404),
        ("PUT", "/weights/x", {"x-goog-encryption-key": "secret"}, 501),
        ("PUT", "/weights/x", {"Content-Encoding": "gzip"}, 501),
        ("POST", "/weights/x?uploads", {"x-goog-if-generation-match": "0"}, 501),
        ("GET", "/weights/x", {"If-Modified-Since": "Sat, 01 Jan 2000 00:00:00 GMT"}, 501),
        ("GET", "/weights?list-type=2", {}, 501),
        ("GET", "/storage/v1/b/missing", {}, 404),
    ],
)
def test_what_is_not_known_is_refused(
    server: StorageServer, bucket: storage.Bucket, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = requests.request(method, server.url + path, headers=headers, timeout=60)
    assert answer.status_code == status


def test_a_refused_body_is_read_so_that_the_connection_lives(server: StorageServer, bucket: storage.Bucket) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    for _ in range(2):
        connection.request("PUT", "/missing/x", body=bytes(MIB))
        answer = connection.getresponse()
        assert (answer.status, b"<Code>NoSuchBucket</Code>" in answer.read()) == (404, True)
    connection.close()


def test_injected_faults_reach_uploads_and_downloads(tmp_path: Path) -> None:
    busy = FaultRule(fault=Reply(status=503), method="POST", path="/upload/", first=1)
    broken = FaultRule(fault=Corrupt(), method="GET", path="/download/", first=1)
    with StorageServer(root=tmp_path, faults=FaultPlan([busy, broken])) as server:
        bucket = client_of(server).create_bucket("weights")
        bucket.blob("x").upload_from_string(b"data", if_generation_match=0)
        url = f"{server.url}/download/storage/v1/b/weights/o/x?alt=media"
        assert requests.get(url, timeout=60).content != b"data"
        assert bucket.blob("x").download_as_bytes() == b"data"
        assert server.faults.injected == {"reply": 1, "corrupt": 1}
        told = requests.get(f"{server.url}/_sandbox/stats", timeout=60).json()
        assert told == {"faults": {"reply": 1, "corrupt": 1}}
        assert [record.status for record in server.requests if record.path.startswith("/upload/")] == [503, 200]


@given(st.binary(), st.binary())
def test_checksums_combine(first: bytes, second: bytes) -> None:
    combined = combine_crc32c(google_crc32c.value(first), google_crc32c.value(second), len(second))
    assert combined == google_crc32c.value(first + second)
