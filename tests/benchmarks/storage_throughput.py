"""How fast the storage stand-in is: it must not be the bottleneck of what is measured against it.

Run: `python tests/benchmarks/storage_throughput.py [--mib 1024] [--connections 8]`. The server runs as a process of its
own; prints one line of MB/s (10^6 bytes) per way. Through raw sockets the client costs almost nothing.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.cloud.storage import transfer_manager

sys.path.insert(0, str(Path(__file__).parents[2]))

from sandbox.processes import Child

MIB = 1 << 20
PART_BYTES = 32 * MIB
BUCKET = "throughput"


@contextmanager
def server(root: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "sandbox.storage", "--root", str(root / "storage")]
    with Child(command, log=root / "storage.log", cwd=Path(__file__).parents[2]) as child:
        yield child.ready_line(60)["url"]


def request(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {answer[:500]!r}")
        return answer if method != "PUT" else response.headers["ETag"].encode()
    finally:
        connection.close()


def raw_multipart(url: str, size: int, connections: int) -> None:
    path = f"/{BUCKET}/raw"
    match = re.search(rb"<UploadId>([^<]+)", request(url, "POST", f"{path}?uploads"))
    assert match is not None
    upload_id, payload = match[1].decode(), os.urandom(PART_BYTES)

    def put(number: int) -> str:
        etag = request(url, "PUT", f"{path}?partNumber={number}&uploadId={upload_id}", payload).decode()
        return f"<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>"

    with ThreadPoolExecutor(connections) as pool:
        parts = "".join(pool.map(put, range(1, size // PART_BYTES + 1)))
    document = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>"
    request(url, "POST", f"{path}?uploadId={upload_id}", document.encode())


def raw_ranges(url: str, size: int, connections: int) -> None:
    def get(start: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        connection.request("GET", f"/{BUCKET}/raw", headers={"Range": f"bytes={start}-{start + PART_BYTES - 1}"})
        response = connection.getresponse()
        buffer = bytearray(MIB)
        while response.readinto(buffer):
            pass
        connection.close()

    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(get, range(0, size, PART_BYTES)))


def measure(name: str, size: int, action: Callable[[], object]) -> None:
    started = time.perf_counter()
    action()
    print(f"{name:42s} {size / (time.perf_counter() - started) / 1e6:7.0f} MB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--connections", type=int, default=8)
    arguments = parser.parse_args()
    size, connections = arguments.mib * MIB, arguments.connections
    with tempfile.TemporaryDirectory() as folder, server(Path(folder)) as url:
        source = Path(folder) / "source"
        with source.open("wb") as file:
            for _ in range(arguments.mib):
                file.write(os.urandom(MIB))
        client = storage.Client(
            project="throughput", credentials=AnonymousCredentials(), client_options={"api_endpoint": url}
        )
        bucket = client.create_bucket(BUCKET)
        measure("raw sockets, XML multipart", size, lambda: raw_multipart(url, size, connections))
        measure("raw sockets, ranged download", size, lambda: raw_ranges(url, size, connections))
        resumable = bucket.blob("resumable", chunk_size=PART_BYTES)
        measure("client, resumable, 1 connection", size, lambda: resumable.upload_from_filename(str(source)))
        xml, options = bucket.blob("xml"), {"worker_type": "thread", "max_workers": connections}
        measure(
            "client, XML multipart",
            size,
            lambda: transfer_manager.upload_chunks_concurrently(str(source), xml, chunk_size=PART_BYTES, **options),
        )
        measure(
            "client, ranged download",
            size,
            lambda: transfer_manager.download_chunks_concurrently(
                xml, str(Path(folder) / "copy"), chunk_size=PART_BYTES, **options
            ),
        )


if __name__ == "__main__":
    main()
