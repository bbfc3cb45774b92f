"""A rerun over finished weights: how many requests, how many bytes, as counted by the client. Prints a table.

python tests/benchmarks/transfer_rerun.py
"""

from __future__ import annotations

from transfer_harness import GIB, Servers, publish_model, run_arm, table, workspace


def main() -> None:
    rows = []
    with workspace(GIB) as root:
        publish_model(root / "hub", total_bytes=GIB // 4, shards=8)
        with Servers(root) as servers:
            for name in ("first run", "rerun"):
                run = run_arm("ours", servers, root, bucket="bench", keep=True)
                rows.append((name, run["status"], run["requests"], run["bytes_sent"], f"{run['seconds']:.2f}"))
    headers = ("Run", "status", "requests", "bytes sent", "seconds, with the pin")
    print(table(headers, rows))


if __name__ == "__main__":
    main()
