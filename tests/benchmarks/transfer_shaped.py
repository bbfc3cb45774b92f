"""A link of limited speed on both sides: wall time against the two-pass way, share of the link, memory, disk.

    python tests/benchmarks/transfer_shaped.py [--gib 1 8] [--peer-gib 1] [--runs 3]

Each side is limited to 25 MB/s per connection and 150 MB/s in all, 10 ms per request. What the link allows in practice
is what as many bare sockets read from the hub and discard: the way `floor`. Every way has one run that is not counted.
Prints a markdown table with the run of median time, and the machine's load before and after all runs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from transfer_harness import GIB, Servers, publish_model, run_arm, table, workspace

PER_CONNECTION, TOTAL = 25e6, 150e6
SHAPE = f"per-connection={PER_CONNECTION / 1e6:g}MB/s,total={TOTAL / 1e6:g}MB/s,latency=10ms"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, nargs="+", default=[1, 8])
    parser.add_argument("--peer-gib", type=float, default=1)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for gib in options.gib:
        ways = ("floor", "ours", "two-pass") if gib == options.peer_gib else ("floor", "ours")
        # In hub and bucket, and where the two-pass way is measured, in its download.
        with workspace(len(ways) * int(gib * GIB)) as root:
            publish_model(root / "hub", total_bytes=int(gib * GIB), shards=8)
            with Servers(root, hub=("--shape", SHAPE), storage=("--ingress", SHAPE)) as servers:
                figures = {way: median_run(way, servers, root, options.runs) for way in ways}
        for way, run in figures.items():
            share = gib * GIB / TOTAL / run["seconds"]
            rows.append(
                (
                    way,
                    f"{gib:g}",
                    f"{run['seconds']:.1f}",
                    f"{share:.0%}",
                    f"{figures['floor']['seconds'] / run['seconds']:.0%}",
                    f"{run['seconds'] / figures['two-pass']['seconds']:.2f}" if "two-pass" in figures else "",
                    f"{run['cpu_s']:.1f}",
                    f"{run['peak_bytes'] / 1e6:.0f}",
                    f"{run['disk_bytes'] / 1e9:.2f}",
                )
            )
    loads = f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"Link: {SHAPE} on each side; median of {options.runs}; {loads}.\n")
    headers = (
        "Way",
        "GiB",
        "seconds",
        "of the link",
        "of the floor's rate",
        "of two passes",
        "CPU-s",
        "peak MB",
        "disk GB",
    )
    print(table(headers, rows))


def median_run(way: str, servers: Servers, root: Path, runs: int) -> dict[str, Any]:
    """Of `runs` after one that is not counted: a virtual machine is slow where it touches its memory first."""
    _, *all_runs = (run_arm(way, servers, root, bucket=f"bench-{way}-{number}") for number in range(runs + 1))
    return sorted(all_runs, key=lambda run: run["seconds"])[(runs - 1) // 2]


if __name__ == "__main__":
    main()
