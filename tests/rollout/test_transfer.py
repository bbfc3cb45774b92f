"""The transfer as data: parts, proof, shares, forecast, and the arithmetic of CRC-32C."""

from __future__ import annotations

from datetime import UTC, datetime

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.bucket_objects import GcsUri, StoredObject
from rollout.crc32c import combine_all
from rollout.errors import BadInput
from rollout.model import ModelFile, PinnedModel
from rollout.transfer import (
    MIB,
    MIN_PART_BYTES,
    Links,
    Progress,
    Provenance,
    ProvenFile,
    Route,
    TransferSpec,
    content_metadata,
    plan_parts,
    predict_transfer,
    proof_metadata,
    proven_file,
    shard_files,
)

GB = 10**9
FILES_52 = [
    ModelFile(path=f"m-{n}.safetensors", size_bytes=size, sha256="0" * 64) for n, size in enumerate([50 * GB, 2 * GB])
]
FILES_700 = [ModelFile(path=f"m-{n:03}.safetensors", size_bytes=43 * GB // 10, sha256="0" * 64) for n in range(163)]
FILES_1300 = [ModelFile(path=f"m-{n:03}.safetensors", size_bytes=8 * GB, sha256="0" * 64) for n in range(163)]


@given(st.integers(0, 200 * MIB), st.integers(5 * MIB, 64 * MIB))
def test_parts_cover_a_file_exactly_and_only_the_last_one_is_shorter(size: int, part_bytes: int) -> None:
    parts = plan_parts(size, part_bytes)
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].start, parts[-1].end) == (0, size)
    assert all(part.size_bytes == part_bytes for part in parts[:-1])


def test_more_parts_than_an_upload_may_have_name_the_size_that_would_do() -> None:
    with pytest.raises(BadInput, match="at least 20 MiB"):
        plan_parts(10_000 * 20 * MIB, 5 * MIB)


def test_parts_that_leave_no_room_for_two_buffers_are_refused() -> None:
    with pytest.raises(ValidationError, match="leaves no room for two buffers"):
        TransferSpec(part_bytes=256 * MIB)


def test_pods_have_no_disk_to_stage_on() -> None:
    with pytest.raises(ValidationError, match="route=stage wants a disk"):
        TransferSpec(pods=2, pod_image="worker", route=Route.STAGE)


@given(st.integers(0, 2 * 10**12), st.integers(1, 64))
def test_parts_of_a_small_model_are_small_enough_to_keep_every_connection_busy(size: int, connections: int) -> None:
    spec = TransferSpec(connections=connections)
    part_bytes = spec.part_bytes_of(size)
    assert MIN_PART_BYTES <= part_bytes <= spec.part_bytes
    assert part_bytes % MIB == 0
    if MIN_PART_BYTES < part_bytes < spec.part_bytes:
        assert size / part_bytes / connections == pytest.approx(32, rel=MIB / part_bytes)


def test_the_size_of_parts_is_read_off_the_model() -> None:
    spec = TransferSpec(connections=8, part_bytes=16 * MIB)
    sizes = [spec.part_bytes_of(size * MIB) for size in (0, 1024, 2048, 4096, 52_000)]
    assert sizes == [5 * MIB, 5 * MIB, 8 * MIB, 16 * MIB, 16 * MIB]


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_the_crc_of_joined_pieces_follows_from_the_pieces(pieces: list[bytes]) -> None:
    combined = combine_all((google_crc32c.value(piece), len(piece)) for piece in pieces)
    assert combined == google_crc32c.value(b"".join(pieces))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 200])
def test_shares_hold_every_file_once_and_are_the_same_for_every_worker(count: int) -> None:
    shares = shard_files(FILES_700, count)
    assert len(shares) == count
    assert sorted(file.path for share in shares for file in share) == [file.path for file in FILES_700]
    assert shares == shard_files(list(reversed(FILES_700)), count)


def test_shares_are_even_within_grahams_bound() -> None:
    loads = [sum(file.size_bytes for file in share) for share in shard_files(FILES_1300, 8)]
    best = sum(file.size_bytes for file in FILES_1300) / 8
    assert max(loads) <= (4 / 3 - 1 / 24) * (best + 8 * GB)


@pytest.mark.parametrize(
    ("files", "pods", "connections", "bound_by", "minutes"),
    [
        (FILES_52, 1, 8, "the hub's streams", 1.8),
        (FILES_52, 2, 8, "the hub's streams", 2.5),  # one file of 50 GB: the second pod buys nothing
        (FILES_700, 1, 8, "the hub's streams", 24.3),
        (FILES_700, 8, 32, "the hub", 2.0),
        (FILES_1300, 8, 32, "the hub", 3.0),
        (FILES_1300, 1, 64, "the pod's network", 10.9),
    ],
)
def test_the_forecast_names_what_bounds_a_transfer(
    files: list[ModelFile], pods: int, connections: int, bound_by: str, minutes: float
) -> None:
    forecast = predict_transfer(files, pods=pods, connections=connections)
    assert forecast.bound_by == bound_by
    assert forecast.seconds / 60 == pytest.approx(minutes, abs=0.1)


def test_more_pods_never_forecast_a_longer_transfer_beyond_their_start() -> None:
    links = Links(pod_start_s=0.0)
    seconds = [predict_transfer(FILES_700, pods=pods, connections=16, links=links).seconds for pods in (1, 2, 4, 8, 16)]
    assert seconds == sorted(seconds, reverse=True)


def test_progress_knows_its_end_only_after_the_first_byte() -> None:
    start = Progress(bytes_done=0, bytes_total=100, files_done=0, files_total=1, bytes_per_s=0, elapsed_s=1)
    assert start.seconds_left is None
    assert start.text == "0.00 of 0.00 GB, 0 MB/s, starting"
    assert start.model_copy(update={"bytes_done": 50, "bytes_per_s": 10.0}).seconds_left == 5.0
    later = Progress(
        bytes_done=13 * 10**9, bytes_total=52 * 10**9, files_done=3, files_total=12, bytes_per_s=650e6, elapsed_s=20
    )
    assert later.text == "13.00 of 52.00 GB, 650 MB/s, 60 s left"


FILE = ModelFile(path="model.safetensors", size_bytes=3, sha256="a" * 64)
FOUND = StoredObject(
    name="model.safetensors",
    size_bytes=3,
    crc32c=0xABCDEF01,
    generation=7,
    updated_at=datetime(2026, 1, 1, tzinfo=UTC),
)
PROVEN = ProvenFile(path=FILE.path, size_bytes=3, sha256="a" * 64, crc32c="abcdef01", generation=7)
PINNED = PinnedModel(repo_id="org/m", revision="main", commit_sha="1" * 40, files=(FILE,))
MARKER = Provenance(
    repo_id="org/m",
    commit_sha="1" * 40,
    files=(PROVEN,),
    tool_version="1",
    finished_at=datetime(2026, 1, 1, tzinfo=UTC),
)


def test_the_marker_proves_what_is_unchanged_since() -> None:
    assert MARKER.proves(PINNED, {FILE.path: FOUND})


@pytest.mark.parametrize(
    "found",
    [
        None,
        FOUND.model_copy(update={"generation": 8}),
        FOUND.model_copy(update={"size_bytes": 4}),
        FOUND.model_copy(update={"crc32c": 1}),
    ],
)
def test_the_marker_proves_nothing_about_other_objects(found: StoredObject | None) -> None:
    assert not MARKER.proves(PINNED, {FILE.path: found} if found else {})


def test_the_marker_of_another_commit_or_of_other_files_proves_nothing() -> None:
    listing = {FILE.path: FOUND}
    assert not MARKER.proves(PINNED.model_copy(update={"commit_sha": "2" * 40}), listing)
    other = FILE.model_copy(update={"path": "new.safetensors"})
    assert not MARKER.proves(PINNED.model_copy(update={"files": (FILE, other)}), listing)


def test_an_object_is_proven_only_by_metadata_that_fits_its_bytes() -> None:
    complete = FOUND.model_copy(update={"metadata": {**content_metadata(FILE), **proof_metadata("a" * 64, 0xABCDEF01)}})
    assert proven_file(FILE, complete) == PROVEN
    assert proven_file(FILE, FOUND) is None
    assert proven_file(FILE, complete.model_copy(update={"metadata": content_metadata(FILE)})) is None
    assert proven_file(FILE, complete.model_copy(update={"crc32c": 2})) is None
    assert proven_file(FILE.model_copy(update={"sha256": "b" * 64}), complete) is None


@pytest.mark.parametrize("text", ["", "s3://bucket", "gs://", "gs://B", "bucket/x"])
def test_what_is_no_cloud_storage_address_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="gs://"):
        GcsUri.parse(text)


def test_an_address_is_read_and_written() -> None:
    assert str(GcsUri.parse("gs://bucket/a/b/")) == "gs://bucket/a/b"
    assert GcsUri.parse("gs://bucket").prefix == ""
    assert GcsUri.parse("gs://bucket/a/b").prefix == "a/b/"
