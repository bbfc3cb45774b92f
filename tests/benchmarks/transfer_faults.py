"""Four GiB while 1 % of the data requests fail in each of twelve ways: exact result, bytes sent again.

    python tests/benchmarks/transfer_faults.py [--gib 4] [--percent 1]

`sent again` is what the bucket received beyond the model's size; `read again` the same at the hub. Prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import urllib.request
from pathlib import Path

from transfer_harness import GIB, REPO, Servers, publish_model, run_arm, table, workspace

from sandbox.hub_store import HubStore

HUB_FAULTS = (
    {"kind": "reply", "status": 503},
    {"kind": "reply", "status": 429, "retry_after_s": 1},
    {"kind": "drop", "at": 0.5},
    {"kind": "truncate", "at": 0.5},
    {"kind": "stall", "seconds": 60, "at": 0.5},
    {"kind": "ignore-range"},
    {"kind": "misstate-length", "factor": 0.5},
    {"kind": "corrupt"},
)
STORAGE_FAULTS = (
    {"kind": "reply", "status": 503},
    {"kind": "reply", "status": 429, "retry_after_s": 1},
    {"kind": "drop", "during": "request", "at": 0.5},
    {"kind": "drop", "during": "response", "at": 0.0},
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--percent", type=float, default=1)
    options = parser.parse_args()
    with workspace() as root:
        publish_model(root / "hub", total_bytes=int(options.gib * GIB), shards=16)
        hub = plan(HUB_FAULTS, "resolve/.*safetensors", "GET", options.percent)
        storage = plan(STORAGE_FAULTS, "partNumber", "PUT", options.percent)
        with Servers(root, hub=("--faults", hub), storage=("--faults", storage)) as servers:
            run = run_arm("ours", servers, root, "--stall-timeout-s", "3", bucket="bench", keep=True)
            exact = is_exact(servers, root)
            injected = servers.faults()
    total = run["total_bytes"]
    rows = [
        ("bit-exact", "yes" if exact else "NO"),
        ("seconds", f"{run['seconds']:.1f}"),
        ("faults at the hub", ", ".join(f"{count} {kind}" for kind, count in sorted(injected.items()))),
        ("retries", run["retries"]),
        ("sent again", f"{run['bytes_sent'] / total - 1:.2%}"),
        ("read again", f"{run['bytes_received'] / total - 1:.2%}"),
    ]
    print(table(("Figure", f"{options.gib:g} GiB, {options.percent:g} % of each of 12 faults"), rows))


def plan(faults: tuple[dict[str, object], ...], path: str, method: str, percent: float) -> str:
    rules = [{"fault": fault, "path": path, "method": method, "probability": percent / 100} for fault in faults]
    return json.dumps({"seed": 1, "rules": rules})


def is_exact(servers: Servers, root: Path) -> bool:
    """Whether the bucket, read back as a client reads it, holds the bytes whose hashes the hub states."""
    repository = HubStore(root / "hub").repository(REPO)
    commit = repository.resolve("main") if repository else None
    assert commit is not None
    return all(
        sha256(f"{servers.storage_url}/bench/{REPO}/{commit.sha}/{file.path}") == file.sha256
        for file in commit.files
        if file.sha256
    )


def sha256(url: str) -> str:
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as response:
        while chunk := response.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
