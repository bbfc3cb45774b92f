"""Run the storage stand-in as a process: prints `{"url": …}` when ready, ends on SIGTERM or when its stdin closes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sandbox.faults import FaultPlan
from sandbox.processes import wait_for_stop
from sandbox.shaping import Shape
from sandbox.storage.server import StorageServer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.storage", description="Cloud Storage on loopback.")
    parser.add_argument("--root", type=Path, required=True, help="directory of all state")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--project", help="the operator's only project (default: any)")
    parser.add_argument("--foreign-bucket", action="append", default=[], metavar="NAME", help="owned by someone else")
    parser.add_argument("--location", action="append", metavar="NAME", help="permitted bucket location (default: any)")
    parser.add_argument("--iam-propagation-s", type=float, default=0.0, help="seconds until a policy change is felt")
    parser.add_argument("--faults", type=FaultPlan.from_json, metavar="JSON", help="see sandbox.faults")
    parser.add_argument("--ingress", type=Shape.parse, metavar="SHAPE", help="per-connection=50MB/s,total=200MB/s")
    parser.add_argument("--egress", type=Shape.parse, metavar="SHAPE", help="the same for answers")
    arguments = parser.parse_args()
    with StorageServer(
        root=arguments.root,
        port=arguments.port,
        project=arguments.project,
        foreign_buckets=arguments.foreign_bucket,
        allowed_locations=arguments.location,
        iam_propagation_s=arguments.iam_propagation_s,
        faults=arguments.faults,
        ingress=arguments.ingress,
        egress=arguments.egress,
    ) as server:
        print(json.dumps({"url": server.url}), flush=True)
        wait_for_stop()


if __name__ == "__main__":
    main()
