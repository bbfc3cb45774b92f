"""One way to move a model, as a process of its own, so that its CPU time and memory are its own: prints one JSON line.

    python tests/benchmarks/transfer_arms.py ARM --hub URL --storage URL --repo ORG/NAME --bucket NAME …

ours:      rollout.clients.transfer.publish_weights, route stream
stage:     the same, route stage
two-pass:  huggingface_hub.snapshot_download to a folder, then google-cloud-storage's transfer_manager from there
floor:     as many sockets as connections, sha256 and crc32c of what comes, discard: no upload at all

Imports are done before the clock starts, in every arm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import google_crc32c
import numpy as np
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import transfer_manager
from huggingface_hub import snapshot_download

from rollout.clients.hub import HubClient
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import publish_weights
from rollout.model import ModelRef, PinnedModel
from rollout.target import CredentialSource, Endpoints, Target
from rollout.transfer import Route, TransferSpec


def main() -> None:
    options = _options()
    target = Target(
        name="benchmark",
        project="benchmark-project",
        region="europe-west1",
        credentials=CredentialSource.ANONYMOUS,
        bucket=options.bucket,
        endpoints=Endpoints(hub=options.hub, storage=options.storage),
    )
    arm: Callable[[argparse.Namespace, Target], dict[str, object]] = ARMS[options.arm]
    before = _usage()
    started_at = time.perf_counter()
    extra = arm(options, target)
    after = _usage()
    figures = {
        "seconds": time.perf_counter() - started_at,
        "cpu_s": after["cpu_s"] - before["cpu_s"],
        "peak_bytes": after["peak_bytes"],
        "disk_bytes": _folder_bytes(options.scratch),
        **extra,
    }
    print(json.dumps(figures))


def _ours(options: argparse.Namespace, target: Target, route: Route = Route.STREAM) -> dict[str, object]:
    StorageClient(target).ensure_bucket()
    pinned = HubClient(options.hub, None).pin(ModelRef(repo_id=options.repo))
    spec = TransferSpec(
        route=route,
        connections=options.connections,
        part_bytes=options.part_mib << 20,
        staging_dir=str(options.scratch),
        stall_timeout_s=options.stall_timeout_s,
    )
    report = publish_weights(pinned, target, spec)
    return {
        "status": report.status,
        "bytes_received": report.bytes_received,
        "bytes_sent": report.bytes_sent,
        "total_bytes": report.total_bytes,
        "requests": report.requests,
        "retries": report.retries,
    }


def _stage(options: argparse.Namespace, target: Target) -> dict[str, object]:
    return _ours(options, target, Route.STAGE)


def _two_pass(options: argparse.Namespace, target: Target) -> dict[str, object]:
    folder = Path(
        snapshot_download(options.repo, local_dir=options.scratch / "model", endpoint=options.hub, token=False)
    )
    client = storage.Client(
        project=target.project,
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": options.storage},
    )
    bucket = client.create_bucket(target.bucket, location=target.region)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith(".cache/"):
            continue
        blob = bucket.blob(name)
        if path.stat().st_size > 32 << 20:
            transfer_manager.upload_chunks_concurrently(
                str(path), blob, max_workers=options.connections, worker_type=options.workers
            )
        else:
            blob.upload_from_filename(str(path))
    return {}


def _floor(options: argparse.Namespace, _: Target) -> dict[str, object]:
    hub = HubClient(options.hub, None)
    pinned = hub.pin(ModelRef(repo_id=options.repo))
    parts = options.part_mib << 20
    work = [
        (file.path, start, min(parts, file.size_bytes - start))
        for file in pinned.files
        for start in range(0, file.size_bytes, parts)
    ]
    lock = threading.Lock()

    def fetch() -> None:
        url = urlsplit(options.hub)
        connection = socket.create_connection((url.hostname or "", url.port or 80))
        buffer = bytearray(parts)
        view, array = memoryview(buffer), np.frombuffer(buffer, dtype=np.uint8)
        while True:
            with lock:
                if not work:
                    return
                path, start, size = work.pop(0)
            if size < parts and path.endswith(".json"):
                continue
            _get(connection, url.netloc, _path(hub, pinned, path), start, view[:size])
            hashlib.sha256(view[:size])
            google_crc32c.value(array[:size])

    threads = [threading.Thread(target=fetch) for _ in range(options.connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {}


def _path(hub: object, pinned: PinnedModel, path: str) -> str:
    return f"/{pinned.repo_id}/resolve/{pinned.commit_sha}/{path}"


def _get(connection: socket.socket, host: str, path: str, start: int, view: memoryview) -> None:
    connection.sendall(
        f"GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={start}-{start + len(view) - 1}\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1)
    filled = 0
    while filled < len(view):
        filled += connection.recv_into(view[filled:])


def _usage() -> dict[str, float]:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_s": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak_bytes": max(own.ru_maxrss, children.ru_maxrss) * 1024,
    }


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=sorted(ARMS))
    parser.add_argument("--hub", required=True)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--repo", required=True)
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--part-mib", type=int, default=16)
    parser.add_argument("--stall-timeout-s", type=float, default=30.0)
    parser.add_argument("--workers", choices=("process", "thread"), default="process")
    return parser.parse_args()


ARMS: dict[str, Callable[[argparse.Namespace, Target], dict[str, object]]] = {
    "ours": _ours,
    "stage": _stage,
    "two-pass": _two_pass,
    "floor": _floor,
}

if __name__ == "__main__":
    main()
