"""Loopback without limits: wall time and CPU per GiB of ours, the two-pass way and the floor. Prints a markdown table.

    python tests/benchmarks/transfer_unshaped.py [--gib 2] [--runs 3]

Hub and bucket are processes of their own on the same machine; their CPU is in a column of its own. The least of the
runs is shown: what else the machine does only ever adds.
"""

from __future__ import annotations

import argparse

from transfer_harness import GIB, Servers, publish_model, run_arm, table, workspace

ARMS = {
    "floor: sockets, sha256, crc32c, discard": ("floor",),
    "ours, stream": ("ours",),
    "ours, stage": ("stage",),
    "snapshot_download, then transfer_manager (processes)": ("two-pass",),
    "snapshot_download, then transfer_manager (threads)": ("two-pass", "--workers", "thread"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with workspace(3 * int(options.gib * GIB)) as root:
        publish_model(root / "hub", total_bytes=int(options.gib * GIB), shards=8)
        with Servers(root) as servers:
            for number, (name, (arm, *more)) in enumerate(ARMS.items()):
                runs = [
                    run_arm(arm, servers, root, *more, bucket=f"bench-{number}-{run}") for run in range(options.runs)
                ]
                least = {key: min(run[key] for run in runs) for key in ("seconds", "cpu_s", "server_cpu_s")}
                rows.append(
                    (
                        name,
                        *(f"{least[key] / options.gib:.2f}" for key in ("seconds", "cpu_s", "server_cpu_s")),
                        f"{max(run['peak_bytes'] for run in runs) / 1e6:.0f}",
                        f"{max(run['disk_bytes'] for run in runs) / 1e9:.2f}",
                    )
                )
    print(table(("Way", "s/GiB", "CPU-s/GiB", "servers' CPU-s/GiB", "peak MB", "disk GB"), rows))


if __name__ == "__main__":
    main()
