"""Weights arrive whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from rollout.clients.hub import HubClient
from rollout.clients.raw_http import HttpPool
from rollout.clients.staging import Staging
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import (
    find_leftovers,
    finish,
    publish_shard,
    read_provenance,
    remove_dead_leftovers,
    remove_leftovers,
    unfinished_transfers,
)
from rollout.clients.transfer_job import run_shard
from rollout.clients.uploads import Uploader
from rollout.errors import AnotherWriter, BadInput, HashMismatch, RepositoryGated, TransferFailed, TransientError
from rollout.report import StepStatus, utc_now
from rollout.target import WeightsLayout
from rollout.transfer import WORK_FOLDER, Progress, Route, Source, TransferSpec, content_metadata, content_of
from rollout.transfer_job import ShardRequest
from rollout.values import content_digest
from sandbox.faults import (
    Corrupt,
    Drop,
    Fault,
    FaultRule,
    IgnoreRange,
    MisstateLength,
    Redirect,
    Reply,
    Stall,
    Truncate,
)
from sandbox.hub import HubServer, HubToken
from sandbox.shaping import Shape
from tests.clients.weights_place import (
    BUCKET,
    MIB,
    SPEC,
    WeightsPlace,
    model_files,
    on_hub,
    on_storage,
    renewed_elsewhere,
    start,
)

PlaceMaker = Callable[..., WeightsPlace]


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[PlaceMaker]:
    servers: list[Any] = []

    def make(
        *,
        layout: WeightsLayout = WeightsLayout.CONTENT_ADDRESSED,
        files: dict[str, bytes] | None = None,
        **hub_options: Any,
    ) -> WeightsPlace:
        hub, storage = start(tmp_path, **hub_options)
        servers.extend((hub, storage))
        return WeightsPlace(hub, storage, layout=layout, files=files or model_files())

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def place(make_place: PlaceMaker) -> WeightsPlace:
    return make_place(cdn_link_ttl_s=600)


@pytest.mark.parametrize("layout", list(WeightsLayout))
@pytest.mark.parametrize("cdn_link_ttl_s", [None, 600])
def test_every_file_arrives_bit_for_bit_and_the_marker_comes_last(
    make_place: PlaceMaker, layout: WeightsLayout, cdn_link_ttl_s: float | None
) -> None:
    place = make_place(layout=layout, cdn_link_ttl_s=cdn_link_ttl_s)
    pinned = place.pin()
    seen: list[Progress] = []
    report = place.publish(pinned, on_progress=seen.append)
    place.assert_published(pinned)
    assert report.status is StepStatus.DONE
    assert report.bytes_sent == report.total_bytes == pinned.total_bytes == place.sent_bytes()
    assert seen[-1].bytes_done == seen[-1].bytes_total == pinned.total_bytes
    assert seen[-1].files_done == len(pinned.files)
    assert {row["source"] for row in report.rows()} == {"hub"}
    marker = read_provenance(pinned, place.target)
    assert marker is not None
    assert {file.path: file.generation for file in marker.files} == {
        file.path: file.generation for file in report.files
    }
    last_write = [record for record in place.storage.requests if record.method in ("POST", "PUT")][-1]
    assert "upload" in last_write.path, "the marker is the last object that is written"


def test_a_rerun_costs_one_listing_and_one_read(place: WeightsPlace) -> None:
    pinned = place.pin()
    place.publish(pinned)
    place.hub.forget_requests()
    place.storage.forget_requests()
    report = place.publish(pinned)
    assert report.status is StepStatus.UNCHANGED
    assert (report.bytes_sent, report.requests) == (0, 2)
    assert [record.method for record in place.storage.requests] == ["GET", "GET"]
    assert place.hub.requests == ()


def test_an_object_that_was_changed_behind_our_back_is_sent_again(place: WeightsPlace) -> None:
    pinned = place.pin()
    place.publish(pinned)
    name = f"{place.prefix(pinned)}config.json"
    place.client.write_json(name, {"tampered": True})
    report = place.publish(pinned)
    place.assert_published(pinned)
    assert report.bytes_sent == len(place.files["config.json"])
    assert {file.source for file in report.files} == {Source.HUB, Source.BUCKET}


def test_the_stage_route_leaves_a_local_copy(place: WeightsPlace, tmp_path: Path) -> None:
    pinned = place.pin()
    report = place.publish(pinned, staging(tmp_path))
    place.assert_published(pinned)
    assert {file.source for file in report.files} == {Source.DISK}
    copy = tmp_path / "stage" / pinned.repo_id / pinned.commit_sha
    assert {path.name for path in copy.iterdir()} == {file.path for file in pinned.files}


def staging(tmp_path: Path, **more: Any) -> TransferSpec:
    return SPEC.model_copy(update={"route": Route.STAGE, "staging_dir": str(tmp_path / "stage"), **more})


def test_one_connection_is_enough_for_the_stage_route(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place(files=model_files(shards=1, shard_bytes=17 * MIB))
    pinned = place.pin()
    place.publish(pinned, staging(tmp_path, connections=1))
    place.assert_published(pinned)


def test_what_a_killed_download_left_does_not_look_like_a_stall(make_place: PlaceMaker, tmp_path: Path) -> None:
    # hf_transfer writes chunks of 4 MiB, here one on each connection in two seconds, and all of them take five.
    files = model_files(shards=1, shard_bytes=40 * MIB)
    place = make_place(files=files, shape=Shape.parse("total=8MB/s"))
    pinned = place.pin()
    folder = tmp_path / "stage" / pinned.repo_id / pinned.commit_sha
    folder.mkdir(parents=True)
    (folder / "model-00001-of-00001.safetensors.unfinished").write_bytes(bytes(40 * MIB))
    place.publish(pinned, staging(tmp_path, stall_timeout_s=3.5, attempts=1))
    place.assert_published(pinned)


def test_a_damaged_staged_file_is_fetched_again(place: WeightsPlace, tmp_path: Path) -> None:
    pinned = place.pin()
    shard = next(file for file in pinned.files if file.path.endswith(".safetensors"))
    staged = tmp_path / "stage" / pinned.repo_id / pinned.commit_sha / shard.path
    staged.parent.mkdir(parents=True)
    staged.write_bytes(bytes(shard.size_bytes))
    place.publish(pinned, staging(tmp_path))
    place.assert_published(pinned)


def test_a_file_that_stays_wrong_however_often_it_is_staged_never_gets_a_final_name(
    place: WeightsPlace, tmp_path: Path
) -> None:
    pinned = place.pin()
    place.hub.faults.add(on_hub(Corrupt(at=0.5)))
    with pytest.raises(HashMismatch, match="after 3 readings"):
        place.publish(pinned, staging(tmp_path))
    assert not any(name.endswith(".safetensors") for name in place.names())
    place.hub.faults.clear()
    place.publish(pinned, staging(tmp_path))
    place.assert_published(pinned)


@pytest.mark.parametrize(
    ("fault", "times"), [(Stall(seconds=3600, at=0.5), 6), (Stall(seconds=3600), 2), (Reply(status=503), 3)]
)
def test_staging_survives_a_hub_that_stops_talking_and_says_how_far_it_is(
    make_place: PlaceMaker, tmp_path: Path, fault: Fault, times: int
) -> None:
    place = make_place(files=model_files(shards=2, shard_bytes=12 * MIB))
    pinned = place.pin()
    place.hub.faults.add(on_hub(fault, first=times))
    seen: list[Progress] = []
    place.publish(pinned, staging(tmp_path, stall_timeout_s=1.0), on_progress=seen.append)
    place.assert_published(pinned)
    staged = [progress for progress in seen if progress.is_staging]
    assert staged
    assert {progress.bytes_total for progress in staged} == {pinned.total_bytes}


def test_staging_that_gets_no_byte_gives_up_and_names_the_file(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place(files=model_files(shards=1, shard_bytes=12 * MIB))
    pinned = place.pin()
    place.hub.faults.add(on_hub(Stall(seconds=3600, at=0.5)))
    with pytest.raises(TransientError, match=r"model-00001-of-00001.safetensors: no byte came for 1 s"):
        place.publish(pinned, staging(tmp_path, stall_timeout_s=1.0, attempts=2))


def test_staging_stops_when_the_claim_is_lost(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place(files=model_files(shards=1, shard_bytes=12 * MIB))
    pinned = place.pin()
    place.hub.faults.add(on_hub(Stall(seconds=3600, at=0.5)))
    claim = f"{place.prefix(pinned)}.llm-rollout/transfer/writer.json"

    def take_over(progress: Progress) -> None:
        place.client.write_json(claim, {"writer": "somebody else"})

    with pytest.raises(AnotherWriter):
        place.publish(pinned, staging(tmp_path, stall_timeout_s=3600.0), on_progress=take_over)


def test_a_disk_that_is_too_small_is_told_before_any_byte_moves(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place()
    pinned = place.pin()
    large = pinned.files[-1].model_copy(update={"size_bytes": 10**18})
    hub = HubClient(place.hub.url, None)
    place.hub.forget_requests()
    with pytest.raises(TransferFailed, match=r"need 1000000000\.0 GB, the disk has .* transfer\.staging_dir"):
        Staging(pinned, hub, staging(tmp_path), threading.Event()).stage_all([large])
    assert place.hub.requests == ()


@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "is gated without a token"), ("hf_wrong", "does not accept the token"), ("hf_other", "is gated to the")],
)
def test_what_the_hub_refuses_to_its_own_client_is_told_at_once(
    make_place: PlaceMaker, tmp_path: Path, token: str | None, said: str
) -> None:
    """Files in xet come through huggingface_hub; the stand-in has no xet, so the file is only said to be in it."""
    place = make_place(tokens={"hf_good": HubToken("me", accepted=frozenset({"org/model"})), "hf_other": HubToken("o")})
    place.hub.store.restrict("org/model", gate="manual")
    pinned = place.pin("hf_good")
    in_xet = pinned.files[-1].model_copy(update={"is_xet": True})
    place.hub.forget_requests()
    with pytest.raises(RepositoryGated, match=said):
        Staging(pinned, HubClient(place.hub.url, token), staging(tmp_path), threading.Event()).stage(in_xet)
    assert len(place.hub.requests) == 1
    hub = HubClient(place.hub.url, "hf_good")
    Staging(pinned, hub, staging(tmp_path), threading.Event()).stage(in_xet)


def test_a_disk_that_is_full_is_told_with_the_systems_word(place: WeightsPlace, tmp_path: Path) -> None:
    pinned = place.pin()
    (tmp_path / "stage").write_text("a file where the folder should be")
    with pytest.raises(TransferFailed, match=r"the disk refuses: .*transfer\.staging_dir"):
        place.publish(pinned, staging(tmp_path))


def test_a_damaged_copy_behind_a_link_is_asked_for_anew_by_another_link(make_place: PlaceMaker) -> None:
    place = make_place(cdn_link_ttl_s=600, files=model_files(shards=1, shard_bytes=12 * MIB))
    pinned = place.pin()
    place.hub.forget_requests()
    place.hub.faults.add(on_hub(Corrupt(at=0.5), path="/repos/", first=1))
    place.publish(pinned, SPEC.model_copy(update={"connections": 1}))
    place.assert_published(pinned)
    links = [record for record in place.hub.requests if "/resolve/" in record.path and "safetensors" in record.path]
    assert len(links) == 2


FAULTS: list[tuple[str, list[FaultRule]]] = [
    ("hub answers 503", [on_hub(Reply(status=503), first=3)]),
    ("hub answers 429 with Retry-After", [on_hub(Reply(status=429, retry_after_s=1), first=2)]),
    ("hub connection is reset", [on_hub(Drop(at=0.4), first=4)]),
    ("hub connection is reset before the status", [on_hub(Drop(at=0.0), first=4)]),
    ("hub body is truncated", [on_hub(Truncate(at=0.7), first=4)]),
    ("hub stalls", [on_hub(Stall(seconds=30, at=0.5), first=1)]),
    ("hub ignores the range", [on_hub(IgnoreRange(), first=3)]),
    ("hub lies about the length, short", [on_hub(MisstateLength(factor=0.5), first=3)]),
    ("hub lies about the length, long", [on_hub(MisstateLength(factor=1.5), first=3)]),
    ("hub corrupts a byte", [on_hub(Corrupt(at=0.3), first=1)]),
    ("bucket answers 503", [on_storage(Reply(status=503), first=3)]),
    ("bucket answers 429", [on_storage(Reply(status=429, retry_after_s=1), first=2)]),
    ("bucket drops a request", [on_storage(Drop(during="request", at=0.5), first=3)]),
    ("bucket loses an answer", [on_storage(Drop(at=0.0), first=3)]),
    ("bucket stalls", [on_storage(Stall(seconds=30), first=1)]),
    ("bucket fails to begin", [FaultRule(fault=Reply(status=500), method="POST", path=r"\?uploads", first=2)]),
    (
        "bucket loses the answer to a completion",
        [FaultRule(fault=Drop(at=0.0), method="POST", path="uploadId", first=2)],
    ),
    ("bucket loses the answer to a move", [FaultRule(fault=Drop(at=0.0), method="POST", path="rewriteTo", first=2)]),
    ("bucket loses the answer to the marker", [FaultRule(fault=Drop(at=0.0), method="POST", path="/upload/", first=2)]),
]


@pytest.mark.parametrize("rules", [rules for _, rules in FAULTS], ids=[name for name, _ in FAULTS])
def test_a_passing_fault_is_survived_and_the_result_is_exact(make_place: PlaceMaker, rules: list[FaultRule]) -> None:
    place = make_place()
    pinned = place.pin()
    for rule in rules:
        (place.hub if rule.method == "GET" else place.storage).faults.add(rule)
    place.publish(pinned, SPEC.model_copy(update={"stall_timeout_s": 1.0}))
    injected = place.hub.faults.injected or place.storage.faults.injected
    assert sum(injected.values()) >= 1, "the fault must have been met"
    place.assert_published(pinned)
    assert find_leftovers(place.target) == ()


def test_a_corrupted_part_is_found_and_only_it_is_sent_again(make_place: PlaceMaker) -> None:
    place = make_place(files=model_files(shards=1, shard_bytes=30 * MIB))
    place.hub.faults.add(on_hub(Corrupt(), first=1))
    pinned = place.pin()
    report = place.publish(pinned)
    place.assert_published(pinned)
    assert report.bytes_sent == pinned.total_bytes + 5 * MIB


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Corrupt(at=0.5), HashMismatch),
        (Truncate(at=0.0), TransferFailed),
        (IgnoreRange(), TransferFailed),
        (MisstateLength(factor=0.9), TransferFailed),
        (Reply(status=500), TransferFailed),
    ],
)
def test_a_lasting_fault_is_an_error_that_names_the_file_and_leaves_no_final_name(
    make_place: PlaceMaker, fault: Fault, error: type[Exception]
) -> None:
    place = make_place()
    pinned = place.pin()
    place.hub.faults.add(on_hub(fault))
    with pytest.raises(error, match=r"model-0000\d-of-00002.safetensors"):
        place.publish(pinned, SPEC.model_copy(update={"attempts": 2}))
    assert not any(name.endswith(".safetensors") or name.endswith("ready.json") for name in place.names())
    place.hub.faults.clear()
    place.publish(pinned)
    place.assert_published(pinned)


def test_an_expired_signed_link_is_renewed(make_place: PlaceMaker) -> None:
    place = make_place(cdn_link_ttl_s=600, files=model_files(shards=2, shard_bytes=40 * MIB))
    pinned = place.pin()

    def expire(progress: Progress) -> None:
        if progress.bytes_done:
            place.hub.expire_cdn_links()

    place.publish(pinned, on_progress=expire)
    place.assert_published(pinned)


def test_a_new_link_that_is_refused_is_not_asked_for_again_without_a_pause(make_place: PlaceMaker) -> None:
    place = make_place(cdn_link_ttl_s=600)
    pinned = place.pin()
    place.hub.faults.add(FaultRule(fault=Reply(status=403), path="/repos/"))
    source = HubClient(place.hub.url, None).open(pinned, pinned.files[-2])
    with pytest.raises(TransientError, match="signed link is refused") as refused:
        list(source.read(0, memoryview(bytearray(10))))
    assert refused.value.retry_after_s is None


def test_the_token_goes_to_the_hub_alone(make_place: PlaceMaker) -> None:
    place = make_place(cdn_link_ttl_s=600, tokens={"hf_secret": HubToken("me")})
    pinned = place.pin("hf_secret")
    place.publish(pinned, token="hf_secret")
    hub_host, cdn_host = (url.removeprefix("http://") for url in (place.hub.url, place.hub.cdn_url))
    with_token = {record.host for record in place.hub.requests if record.has_token}
    assert with_token == {hub_host}
    assert any(record.host == cdn_host for record in place.hub.requests)


def test_a_redirect_to_another_host_does_not_get_the_token(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place(tokens={"hf_secret": HubToken("me")})
    other = HubServer(root=tmp_path / "other").start()
    try:
        pinned = place.pin("hf_secret")
        place.hub.faults.add(on_hub(Redirect(origin=other.url), first=1))
        place.publish(pinned, SPEC.model_copy(update={"attempts": 3}), token="hf_secret")
        place.assert_published(pinned)
        assert other.requests
        assert not any(record.has_token for record in other.requests)
    finally:
        other.stop()


def test_a_live_model_path_stays_whole_until_the_new_one_is_proven(make_place: PlaceMaker) -> None:
    place = make_place(layout=WeightsLayout.ROOT)
    old = place.pin()
    place.publish(old)
    before = {stored.name: stored.generation for stored in place.client.list_objects()}
    place.files = model_files(shards=3, seed="b")
    place.hub.store.publish("org/model", place.files)
    new = place.pin()
    place.hub.faults.add(on_hub(Reply(status=500), path="00003-of-00003"))
    with pytest.raises(TransferFailed):
        place.publish(new, SPEC.model_copy(update={"attempts": 2}))
    now = {stored.name: stored.generation for stored in place.client.list_objects()}
    assert before.items() <= now.items(), "the failed run has touched nothing that was live"
    place.hub.faults.clear()
    place.publish(new)
    place.assert_published(new)


def test_files_that_others_put_into_the_path_are_left_alone(make_place: PlaceMaker) -> None:
    place = make_place(layout=WeightsLayout.ROOT)
    place.client.write_json("notes.json", {})
    place.publish()
    assert "notes.json" in place.names()


# A process that is killed


def publishing_process(place: WeightsPlace, folder: Path, spec: TransferSpec) -> subprocess.Popen[bytes]:
    request = folder / "request.json"
    values = {"pinned": place.pin(), "target": place.target, "spec": spec}
    request.write_text(json.dumps({name: value.model_dump(mode="json") for name, value in values.items()}))
    return subprocess.Popen([sys.executable, str(Path(__file__).with_name("publishing_process.py")), str(request)])


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the process ended before that"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def killed(make_place: PlaceMaker, tmp_path: Path) -> WeightsPlace:
    """A place in which a publishing process was killed in the middle."""
    place = make_place(cdn_link_ttl_s=600, files=model_files(shards=3, shard_bytes=40 * MIB))
    # The last shard never comes, so the process cannot be done before it is killed.
    last = place.pin().files[-2]
    place.hub.faults.add(on_hub(Stall(seconds=60), path=last.sha256 or ""))
    process = publishing_process(place, tmp_path, SPEC.model_copy(update={"claim_ttl_s": 60.0}))
    wait_until(lambda: place.sent_bytes() >= 45 * MIB, process)
    process.kill()
    process.wait()
    place.hub.faults.clear()
    return place


def test_after_a_kill_only_what_had_not_arrived_is_sent(killed: WeightsPlace) -> None:
    pinned = killed.pin()
    arrived = killed.sent_bytes()
    assert any(change.kind == "MultipartUpload" for change in find_leftovers(killed.target))
    report = killed.publish(pinned)
    killed.assert_published(pinned)
    in_flight = 2 * SPEC.connections * SPEC.part_bytes
    assert report.bytes_sent <= pinned.total_bytes - arrived + in_flight
    assert report.bytes_sent < pinned.total_bytes
    assert find_leftovers(killed.target) == ()


def test_parts_that_a_dead_process_sent_wrongly_never_get_a_final_name(make_place: PlaceMaker) -> None:
    place = make_place(files=model_files(shards=1, shard_bytes=20 * MIB))
    pinned = place.pin()
    place.hub.faults.add(on_hub(Corrupt(), first=1), on_hub(Reply(status=500)))
    with pytest.raises(TransferFailed):
        place.publish(pinned, SPEC.model_copy(update={"attempts": 2, "connections": 1}))
    assert any(change.kind == "MultipartUpload" for change in find_leftovers(place.target))
    place.hub.faults.clear()
    report = place.publish(pinned)
    place.assert_published(pinned)
    assert report.bytes_sent >= pinned.total_bytes, "nothing of the wrong upload was trusted"


def test_leftovers_of_a_run_that_nobody_continues_are_found_and_removed(killed: WeightsPlace) -> None:
    found = find_leftovers(killed.target)
    assert {change.kind for change in found} >= {"MultipartUpload", "Object"}
    removed = remove_leftovers(killed.target)
    assert {change.name for change in removed} == {change.name for change in found}
    assert find_leftovers(killed.target) == ()
    assert killed.names() == set()


def test_a_path_that_no_record_knows_is_found_by_what_a_killed_run_left_there(killed: WeightsPlace) -> None:
    abandoned = killed.prefix(killed.pin())
    killed.hub.store.publish("org/model", model_files(shards=1, seed="the branch has moved"))
    killed.publish()
    (unfinished,) = unfinished_transfers(killed.target)
    assert unfinished.prefix == abandoned
    assert timedelta() <= utc_now() - unfinished.last_sign_at < timedelta(minutes=5)
    assert remove_dead_leftovers(killed.target, abandoned)
    assert unfinished_transfers(killed.target) == ()


def test_the_leftovers_at_the_buckets_root_are_not_those_of_the_paths_below_it(killed: WeightsPlace) -> None:
    assert remove_dead_leftovers(killed.target, "") == ()
    assert [each.prefix for each in unfinished_transfers(killed.target)] == [killed.prefix(killed.pin())]


def test_leftovers_that_this_run_cannot_use_are_removed_by_it(killed: WeightsPlace) -> None:
    ours = next(change.name for change in find_leftovers(killed.target) if change.kind == "MultipartUpload")
    in_larger_parts = ours.removeprefix(f"gs://{BUCKET}/").replace(f".{5 * MIB}", f".{6 * MIB}")
    Uploader(StorageClient(killed.target), HttpPool(stall_timeout_s=5)).begin(in_larger_parts, {})
    report = killed.publish()
    assert report.leftovers_removed == 1
    assert find_leftovers(killed.target) == ()


def test_an_unproven_object_in_other_parts_does_not_hide_the_proven_one(make_place: PlaceMaker) -> None:
    place = make_place(files=model_files(shards=1))
    pinned = place.pin()
    file = next(file for file in pinned.files if file.path.endswith(".safetensors"))
    digest = content_digest([file.path, content_of(file), file.size_bytes], 32)
    content = place.files[file.path]
    # As a process leaves it that dies between the last part and the proof; its parts were larger.
    uploader = Uploader(place.client, HttpPool(stall_timeout_s=5))
    name = f"{place.prefix(pinned)}{WORK_FOLDER}incoming/{digest}.{16 * MIB}"
    uploader.put(name, content, google_crc32c.value(content), content_metadata(file))
    report = place.publish(pinned)
    place.assert_published(pinned)
    assert report.leftovers_removed == 1


# Two writers


def test_a_process_of_the_same_number_in_another_container_is_not_taken_for_dead(place: WeightsPlace) -> None:
    pinned = place.pin()
    name = f"{place.prefix(pinned)}{WORK_FOLDER}writer.json"
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "ids_of": "of the other container", "started": "1"}
    with renewed_elsewhere(place.client, name, **ours), pytest.raises(AnotherWriter):
        place.publish(pinned)


def test_pods_that_still_write_are_not_disturbed(place: WeightsPlace) -> None:
    pinned = place.pin()
    folder = f"{place.prefix(pinned)}{WORK_FOLDER}"
    place.client.write_json(f"{folder}incoming/0.1", {"of": "a pod"})
    place.client.write_json(f"{folder}writer-0-of-2.json", {"host": "dead", "pid": 1, "writer": "1", "ttl_s": 0.5})
    with renewed_elsewhere(place.client, f"{folder}writer-1-of-2.json"):
        with pytest.raises(AnotherWriter):
            place.publish(pinned)
        with pytest.raises(AnotherWriter):
            remove_dead_leftovers(place.target, place.prefix(pinned))
        assert place.names() == {f"{folder}incoming/0.1", f"{folder}writer-1-of-2.json"}
    remove_dead_leftovers(place.target, place.prefix(pinned))
    assert place.names() == set()


def test_of_two_writers_one_wins_and_the_other_says_so(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place()
    pinned = place.pin()
    place.hub.faults.add(on_hub(Stall(seconds=60), first=1))
    spec = SPEC.model_copy(update={"stall_timeout_s": 60.0, "claim_ttl_s": 2.0})
    process = publishing_process(place, tmp_path, spec)
    wait_until(lambda: any(name.endswith("writer.json") for name in place.names()), process)
    with pytest.raises(AnotherWriter, match=f"process {process.pid} on .* is writing the same weights"):
        place.publish(pinned)
    assert process.poll() is None, "the first writer goes on"
    process.kill()
    process.wait()
    place.hub.faults.clear()
    place.publish(pinned)
    place.assert_published(pinned)


def test_a_claim_that_nobody_renews_is_taken_over(place: WeightsPlace) -> None:
    pinned = place.pin()
    name = f"{place.prefix(pinned)}.llm-rollout/transfer/writer.json"
    dead = {"writer": "x", "host": "another-machine", "pid": 1, "ttl_s": 1.0, "renewed_at": "2026-01-01T00:00:00Z"}
    place.client.write_json(name, dead)
    place.publish(pinned)
    place.assert_published(pinned)


# Beyond one machine


def test_shards_and_a_finish_give_what_one_run_gives(make_place: PlaceMaker, tmp_path: Path) -> None:
    place = make_place(files=model_files(shards=4, shard_bytes=6 * MIB))
    pinned = place.pin()
    request = tmp_path / "request.json"
    request.write_text(ShardRequest(pinned=pinned, target=place.target, spec=SPEC, shards=3).model_dump_json())
    for index in range(3):
        with pytest.raises(TransferFailed, match="are not in the bucket yet"):
            finish(pinned, place.target)
        run_shard({"TRANSFER_REQUEST_FILE": str(request), "JOB_COMPLETION_INDEX": str(index)})
    reports = finish(pinned, place.target)
    assert [report.shard for report in reports] == ["1 of 3", "2 of 3", "3 of 3"]
    place.assert_published(pinned)
    assert finish(pinned, place.target) == (), "a second finish finds nothing to do"
    assert sorted(file.path for report in reports for file in report.files) == [file.path for file in pinned.files]
    assert sum(report.bytes_sent for report in reports) == pinned.total_bytes
    assert place.publish(pinned).status is StepStatus.UNCHANGED


def test_outside_of_its_job_a_share_is_told_where_it_runs() -> None:
    with pytest.raises(BadInput, match="TRANSFER_REQUEST_FILE is not set"):
        run_shard({})


def test_a_shard_that_runs_again_sends_nothing_again(make_place: PlaceMaker) -> None:
    place = make_place()
    pinned = place.pin()
    publish_shard(pinned, place.target, SPEC, index=0, count=2)
    assert publish_shard(pinned, place.target, SPEC, index=0, count=2).bytes_sent == 0
