"""`python -m sandbox.cluster --root DIR`: the cluster as a process of its own.

Prints one JSON line when ready: `url`, and `ca_pem` when it serves HTTPS. Ends on SIGTERM, or when stdin closes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.cluster.agent import IdentityOf
from sandbox.processes import wait_for_stop


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    removal_s = options.node_removal_s if options.node_removal_s >= 0 else None
    nodes = NodeSettings(
        creation_s=options.node_creation_s,
        removal_s=removal_s,
        gpu_quota=options.gpu_quota,
        gpus_in_stock=options.gpus_in_stock,
    )
    server = KubernetesServer(
        options.root or Path(tempfile.mkdtemp(prefix="sandbox-cluster-")),
        port=options.port,
        tls=options.tls,
        token=options.token,
        runners={
            prefix: shlex.split(command) for prefix, _, command in (each.partition("=") for each in options.runner)
        },
        identity_of=_fixed(options.identity) if options.identity else None,
        environment=dict(each.split("=", 1) for each in options.env),
        nodes=nodes,
        image_pull_s=options.image_pull_s,
        backoff_s=options.backoff_s,
    )
    with server:
        if options.kubeconfig:
            server.kubeconfig(options.kubeconfig)
        ready = {"url": server.url} | ({"ca_pem": server.ca_pem} if options.tls else {})
        print(json.dumps(ready), flush=True)
        wait_for_stop()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sandbox.cluster", description=__doc__)
    parser.add_argument("--root", type=Path, help="where logs and keys are kept (default: a new temporary folder)")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--tls", action="store_true", help="serve HTTPS with a certificate authority of its own")
    parser.add_argument("--token", help="the only bearer token that is accepted")
    parser.add_argument("--kubeconfig", type=Path, help="write a kubeconfig here when ready")
    parser.add_argument("--runner", action="append", default=[], metavar="IMAGE_PREFIX=COMMAND")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every container")
    parser.add_argument("--identity", help="the IAM member that every pod is (default: as its service account says)")
    parser.add_argument("--node-creation-s", type=float, default=NodeSettings.creation_s)
    parser.add_argument("--node-removal-s", type=float, default=NodeSettings.removal_s, help="-1 keeps empty nodes")
    parser.add_argument("--gpu-quota", type=int, default=NodeSettings.gpu_quota)
    parser.add_argument("--gpus-in-stock", type=int, default=None)
    parser.add_argument("--image-pull-s", type=float, default=0.5)
    parser.add_argument("--backoff-s", type=float, default=1.0)
    return parser


def _fixed(member: str) -> IdentityOf:
    return lambda namespace, account, annotations: member


if __name__ == "__main__":
    main()
