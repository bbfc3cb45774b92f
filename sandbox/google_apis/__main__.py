"""`python -m sandbox.google_apis --root DIR`: prints `{"url": …}` when ready; ends on SIGTERM or when stdin closes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sandbox.google_apis.server import GoogleApisServer
from sandbox.processes import wait_for_stop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.google_apis", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of the persistent state")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--project", default="rehearsal-project")
    parser.add_argument("--universe-domain", default="googleapis.com")
    parser.add_argument("--region", default="u-france-east1")
    parser.add_argument("--kubernetes-endpoint", default="", help="host:port that clusters answer as their endpoint")
    parser.add_argument("--kubernetes-ca-file", type=Path, help="PEM of the CA behind that endpoint")
    options = parser.parse_args()
    server = GoogleApisServer(
        root=options.root,
        port=options.port,
        project=options.project,
        universe_domain=options.universe_domain,
        region=options.region,
        kubernetes_endpoint=options.kubernetes_endpoint,
        kubernetes_ca_pem=options.kubernetes_ca_file.read_text() if options.kubernetes_ca_file else "",
    )
    with server:
        print(json.dumps({"url": server.url}), flush=True)
        wait_for_stop()


if __name__ == "__main__":
    main()
