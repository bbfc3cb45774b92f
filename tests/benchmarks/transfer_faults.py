"""Four GiB while 1 % of the data requests fail in each of thirteen ways: exact result, bytes sent again.

    python tests/benchmarks/transfer_faults.py [--gib 4] [--percent 1]

Beside these, the hub's signed links expire every few seconds, and some of its answers redirect to another host. `sent
again` is what the bucket received beyond the model's size; `read again` the same at the hub. Prints a table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from transfer_harness import CHECKOUT, GIB, READY_TIMEOUT_S, REPO, Servers, publish_model, run_arm, table, workspace

from sandbox.hub_store import HubStore
from sandbox.processes import Child

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
    {"kind": "stall", "seconds": 60},
)
LINK_TTL_S = 5
REDIRECTS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--percent", type=float, default=1)
    options = parser.parse_args()
    with workspace(3 * int(options.gib * GIB)) as root:
        publish_model(root / "hub", total_bytes=int(options.gib * GIB), shards=16)
        with Child(
            [sys.executable, "-m", "sandbox.hub", "--root", str(root / "hub")], log=root / "mirror.log", cwd=CHECKOUT
        ) as mirror:
            origin = mirror.ready_line(READY_TIMEOUT_S)["url"]
            redirects = {"fault": {"kind": "redirect", "origin": origin}, "path": "/resolve/", "first": REDIRECTS}
            # What the hub answers is a link to its CDN, so that is where most of the requests go.
            hub = plan([redirects, *rules(HUB_FAULTS, "/repos/", "GET", options.percent)])
            storage = plan(rules(STORAGE_FAULTS, "partNumber", "PUT", options.percent))
            hub_options = ("--faults", hub, "--cdn-link-ttl-s", str(LINK_TTL_S))
            with Servers(root, hub=hub_options, storage=("--faults", storage)) as servers:
                run = run_arm("ours", servers, root, "--stall-timeout-s", "3", bucket="bench", keep=True)
                exact = is_exact(servers, root)
                at_hub, at_bucket = servers.stats("hub"), servers.stats("storage")
    total = run["total_bytes"]
    expired = sum(record["status"] == 403 for record in at_hub["requests"])
    rows = [
        ("bit-exact", "yes" if exact else "NO"),
        ("seconds", f"{run['seconds']:.1f}"),
        ("faults at the hub", counted(at_hub["faults"])),
        ("links that had expired", expired),
        ("faults at the bucket", counted(at_bucket["faults"])),
        ("retries", run["retries"]),
        ("sent again", f"{run['bytes_sent'] / total - 1:.2%}"),
        ("read again", f"{run['bytes_received'] / total - 1:.2%}"),
    ]
    ways = len(HUB_FAULTS) + len(STORAGE_FAULTS)
    print(table(("Figure", f"{options.gib:g} GiB, {options.percent:g} % of each of {ways} faults"), rows))


def counted(faults: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items()))


def rules(faults: Sequence[dict[str, object]], path: str, method: str, percent: float) -> list[dict[str, object]]:
    return [{"fault": fault, "path": path, "method": method, "probability": percent / 100} for fault in faults]


def plan(all_rules: Sequence[dict[str, object]]) -> str:
    return json.dumps({"seed": 1, "rules": list(all_rules)})


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
