"""A cluster for tests: ours, or a real API server where one is configured.

`KUBECONFIG` names a running cluster. `KUBEBUILDER_ASSETS` names a folder with the programs of a control plane, which
are started for the tests (see `tests.real_kubernetes`). Without either, `sandbox.cluster` serves.
"""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from kubernetes import client, config
from kubernetes.client import ApiException

from sandbox.cluster import KubernetesServer, NodeSettings
from tests.real_kubernetes import control_plane, has_controllers

REAL = "KUBECONFIG" in os.environ or "KUBEBUILDER_ASSETS" in os.environ
HAS_CONTROLLERS = "KUBEBUILDER_ASSETS" not in os.environ or has_controllers(Path(os.environ["KUBEBUILDER_ASSETS"]))
DEADLINE_S = 60.0
"""For anything that a loaded machine may take long to do."""

WEB_SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = ("hello from " + os.environ["SANDBOX_POD_NAME"]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, text, *arguments):
        print(text % arguments, flush=True)
print("listening", flush=True)
port = int(os.environ["SANDBOX_HOST_PORT"])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CRASH = "import sys; print('ValueError: no such model'); sys.exit(1)"
RUNNERS = {
    "web:": (sys.executable, "-c", WEB_SERVER),
    "crash:": (sys.executable, "-c", CRASH),
    "oom:": (sys.executable, "-c", "import sys; sys.exit(137)"),
    "lost:": ("/no/such/program",),
    "python:": (sys.executable, "-c"),
    "shell:": ("sh", "-c"),
}
"""Small programs that stand for images: a web server, one that fails, one that is killed, and `-c` of the args."""

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    warning: str | None


class Connection:
    """Raw requests and the official client, both against the same API server."""

    def __init__(self, kubeconfig: Path) -> None:
        self.api_client = config.new_client_from_config(str(kubeconfig))
        self.core = client.CoreV1Api(self.api_client)
        self.apps = client.AppsV1Api(self.api_client)
        self.batch = client.BatchV1Api(self.api_client)
        self.custom = client.CustomObjectsApi(self.api_client)
        document = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        self.url: str = document["clusters"][0]["cluster"]["server"]
        self.token: str | None = document["users"][0]["user"].get("token")

    def request(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> Answer:
        """One request as it stands, e.g. to see what the official client would refuse to send."""
        configuration = self.api_client.configuration
        context = ssl.create_default_context(cafile=configuration.ssl_ca_cert) if configuration.ssl_ca_cert else None
        if context is not None and configuration.cert_file:
            context.load_cert_chain(configuration.cert_file, configuration.key_file)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("User-Agent", "contract/1")
        if data is not None:
            request.add_header("Content-Type", content_type)
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE_S, context=context) as response:
                return _answer(response.status, response.read(), response.headers.get("Warning"))
        except urllib.error.HTTPError as error:
            return _answer(error.code, error.read(), error.headers.get("Warning"))

    @contextlib.contextmanager
    def namespace(self) -> Iterator[str]:
        """A namespace of one's own."""
        name = f"t-{uuid.uuid4().hex[:8]}"
        self.core.create_namespace({"metadata": {"name": name}})
        eventually(lambda: self._has_account(name))
        yield name
        with contextlib.suppress(ApiException):
            self.core.delete_namespace(name)

    def _has_account(self, namespace: str) -> bool:
        if not HAS_CONTROLLERS:
            return True  # nobody makes one
        accounts = self.core.list_namespaced_service_account(namespace).items
        return any(each.metadata.name == "default" for each in accounts)


def _answer(status: int, raw: bytes, warning: str | None) -> Answer:
    try:
        return Answer(status, json.loads(raw), warning)
    except ValueError:
        return Answer(status, raw.decode(), warning)


def eventually(check: Callable[[], T], what: str = "", deadline_s: float = DEADLINE_S) -> T:
    """The first true answer of `check`; fails when there is none in time."""
    end = time.monotonic() + deadline_s
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {deadline_s:.0f} s: {what or check}")
        time.sleep(0.05)


@contextlib.contextmanager
def api_server(root: Path) -> Iterator[Connection]:
    """The API server that the contract is held against."""
    if "KUBECONFIG" in os.environ:
        yield Connection(Path(os.environ["KUBECONFIG"].split(os.pathsep)[0]))
    elif "KUBEBUILDER_ASSETS" in os.environ:
        with control_plane(Path(os.environ["KUBEBUILDER_ASSETS"]), root) as kubeconfig:
            yield Connection(kubeconfig)
    else:
        with KubernetesServer(root, tls=True, nodes=NodeSettings(auto_creation=False)) as server:
            yield Connection(server.kubeconfig(root / "kubeconfig"))


@contextlib.contextmanager
def sandbox(root: Path, **settings: Any) -> Iterator[tuple[KubernetesServer, Connection]]:
    """Our cluster with quick delays and the small programs above as images."""
    nodes = settings.pop("nodes", NodeSettings(creation_s=0.1))
    quick = {"image_pull_s": 0.05, "backoff_s": 0.2, "longest_probe_period_s": 0.2}
    with KubernetesServer(root, runners=RUNNERS, nodes=nodes, **(quick | settings)) as server:
        yield server, Connection(server.kubeconfig(root / "kubeconfig"))


def deployment(name: str = "web", image: str = "web:1", **container: Any) -> dict[str, Any]:
    """A Deployment of one GPU pod."""
    labels = {"app": name}
    main = {"name": "c", "image": image, "ports": [{"containerPort": 8080}]}
    main |= {"resources": {"limits": {"nvidia.com/gpu": "1"}}} | container
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [main]}},
        },
    }
