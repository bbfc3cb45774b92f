"""A hub and a bucket on loopback, and a model that goes from one to the other: what the transfer's tests share."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rollout.clients.hub import HubClient
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import publish_weights
from rollout.model import ModelRef, PinnedModel
from rollout.target import CredentialSource, Endpoints, Target, WeightsLayout
from rollout.transfer import TransferReport, TransferSpec
from sandbox.faults import Fault, FaultRule
from sandbox.hub import HubServer
from sandbox.storage import StorageServer
from sandbox.wire import RequestRecord

MIB = 2**20
REPO = "org/model"
BUCKET = "weights-bucket"
PART_BYTES = 5 * MIB
SPEC = TransferSpec(
    part_bytes=PART_BYTES, connections=4, stall_timeout_s=5.0, claim_ttl_s=3.0, memory_limit_bytes=256 * MIB
)
"""Small parts, so that small files have several."""

LFS = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def random_bytes(seed: str, count: int) -> bytes:
    """The same bytes for the same seed."""
    return hashlib.shake_128(seed.encode()).digest(count)


def model_files(*, shards: int = 2, shard_bytes: int = 5 * MIB + 345, seed: str = "a") -> dict[str, bytes]:
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    return {
        ".gitattributes": LFS,
        "README.md": b"# model",
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "merges.txt": b"",
        "tokenizer.json": random_bytes("tokenizer", 1000),
        **{name: random_bytes(f"{seed}{name}", shard_bytes) for name in names},
    }


class WeightsPlace:
    """One hub with one model, one bucket, and what went over the wire."""

    def __init__(
        self, hub: HubServer, storage: StorageServer, *, layout: WeightsLayout, files: Mapping[str, bytes]
    ) -> None:
        self.hub = hub
        self.storage = storage
        self.files = dict(files)
        self.hub.store.publish(REPO, self.files)
        self.target = Target(
            name="test",
            project="test-project",
            region="europe-west1",
            credentials=CredentialSource.ANONYMOUS,
            bucket=BUCKET,
            weights_layout=layout,
            endpoints=Endpoints(hub=hub.url, storage=storage.url),
        )
        self.client = StorageClient(self.target)
        self.client.ensure_bucket()

    def pin(self, token: str | None = None, **more: Any) -> PinnedModel:
        return HubClient(self.hub.url, token, stall_timeout_s=5.0).pin(ModelRef(repo_id=REPO), **more)

    def publish(self, pinned: PinnedModel | None = None, spec: TransferSpec = SPEC, **more: Any) -> TransferReport:
        return publish_weights(pinned or self.pin(), self.target, spec, **more)

    def prefix(self, pinned: PinnedModel) -> str:
        return self.target.weights_prefix(pinned.repo_id, pinned.commit_sha)

    def names(self) -> set[str]:
        return {stored.name for stored in self.client.list_objects()}

    def assert_published(self, pinned: PinnedModel) -> None:
        """Exactly the pinned files and the marker lie at the model path, bit for bit."""
        prefix = self.prefix(pinned)
        expected = {f"{prefix}{file.path}" for file in pinned.files} | {f"{prefix}.llm-rollout/ready.json"}
        assert {name for name in self.names() if name.startswith(prefix)} == expected
        for file in pinned.files:
            assert self.client.read(f"{prefix}{file.path}") == self.files[file.path], file.path

    def sent_bytes(self) -> int:
        """Bodies of object data that the bucket received."""
        return sum(record.bytes_received for record in self.storage.requests if record.method == "PUT")

    def hub_requests(self) -> list[RequestRecord]:
        return [record for record in self.hub.requests if "/resolve/" in record.path or "/repos/" in record.path]


def on_hub(fault: Fault, **more: Any) -> FaultRule:
    """A rule for requests of large files, to the hub or its CDN."""
    return FaultRule(fault=fault, **{"method": "GET", "path": r"(resolve|repos)/.*safetensors|/repos/", **more})


def on_storage(fault: Fault, **more: Any) -> FaultRule:
    """A rule for uploaded parts."""
    return FaultRule(fault=fault, **{"method": "PUT", "path": "partNumber", **more})


@contextlib.contextmanager
def renewed_elsewhere(storage: StorageClient, name: str, **claim: Any) -> Iterator[None]:
    """A claim that somebody renews while the block runs."""
    ended = threading.Event()

    def renew() -> None:
        while not ended.is_set():
            storage.write_json(name, {"host": "elsewhere", "pid": 1, "writer": "0", "ttl_s": 2.0, **claim})
            ended.wait(0.2)

    writer = threading.Thread(target=renew)
    writer.start()
    try:
        while storage.find(name) is None:
            time.sleep(0.02)
        yield
    finally:
        ended.set()
        writer.join()


def start(folder: Path, **hub_options: Any) -> tuple[HubServer, StorageServer]:
    return HubServer(root=folder / "hub", **hub_options).start(), StorageServer(root=folder / "storage").start()
