"""The stand-ins for Gateway and Service, against a cluster with real pods."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.gateway import GatewayServer, ServiceProxy

PROGRAM = (sys.executable, str(Path(__file__).parents[1] / "clients" / "pod_program.py"))
DEADLINE_S = 60.0
NAMESPACE = "default"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    """Two Deployments, `blue` and `green`, each behind a Service of its name."""
    server = KubernetesServer(
        tmp_path_factory.mktemp("cluster"),
        tls=True,
        runners={"test/": PROGRAM},
        nodes=NodeSettings(creation_s=0.0),
        image_pull_s=0.0,
        longest_probe_period_s=0.1,
    )
    with server:
        server.kubeconfig(server.root / "kubeconfig")  # also writes the certificate that `call` trusts
        for name in ("blue", "green"):
            post(server, "/apis/apps/v1/namespaces/default/deployments", deployment(name))
            post(server, "/api/v1/namespaces/default/services", service(name))
        post(server, "/api/v1/namespaces/default/services", service("nobody"))
        yield server


def call(server: KubernetesServer, method: str, path: str, body: Any = None, **headers: str) -> Any:
    ca_file = str(server.root / "tls" / "ca.crt")
    answer = requests.request(method, server.url + path, json=body, headers=headers, verify=ca_file, timeout=30)
    assert answer.ok, answer.text
    return answer.json()


def post(server: KubernetesServer, path: str, body: Any) -> None:
    call(server, "POST", path, body)


def deployment(name: str) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    container = {
        "name": "server",
        "image": "test/server",
        "args": ["serve"],
        "ports": [{"containerPort": 8080}],
        "readinessProbe": probe,
    }
    template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"app": name}}, "template": template},
    }


def service(name: str) -> dict[str, Any]:
    spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def put_route(server: KubernetesServer, name: str, weights: dict[str, int], **spec: Any) -> None:
    """Apply a route; hosts keep the tests of this file apart."""
    backends = [{"name": backend, "port": 80, "weight": weight} for backend, weight in weights.items()]
    rules = spec.pop("rules", [{"backendRefs": backends}])
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": name},
        "spec": {"parentRefs": [{"name": "models"}], "hostnames": [f"{name}.test"], "rules": rules} | spec,
    }
    path = f"{ROUTES}/{name}?fieldManager=test&force=true"
    call(server, "PATCH", path, route, **{"Content-Type": "application/apply-patch+yaml"})


ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes"


@pytest.fixture(scope="module")
def gateway(cluster: KubernetesServer) -> Iterator[GatewayServer]:
    with GatewayServer(cluster, namespace=NAMESPACE, gateway="models") as server:
        yield server


def get(server: GatewayServer | ServiceProxy, host: str, path: str = "/name") -> requests.Response:
    return requests.get(server.url + path, headers={"Host": f"{host}.test"}, timeout=30)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def color(answer: requests.Response) -> str:
    return answer.text.split("-")[0] if answer.ok else str(answer.status_code)


def test_requests_are_split_by_weight(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    put_route(cluster, "split", {"blue": 80, "green": 20})
    until(lambda: get(gateway, "split").ok and bool(get(gateway, "split").text))
    until(lambda: {color(get(gateway, "split")) for _ in range(40)} == {"blue", "green"})
    counted = Counter(color(get(gateway, "split")) for _ in range(200))
    assert set(counted) == {"blue", "green"}
    # 40 of 200 are expected; beyond 5 standard deviations (28) it is no chance.
    assert abs(counted["green"] - 40) < 29


def test_a_changed_weight_is_followed_and_reported(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    put_route(cluster, "moving", {"blue": 1, "green": 0})
    until(lambda: color(get(gateway, "moving")) == "blue")
    put_route(cluster, "moving", {"blue": 0, "green": 1})

    def is_taken_up() -> bool:
        route = call(cluster, "GET", f"{ROUTES}/moving")
        parents = (route.get("status") or {}).get("parents") or []
        conditions = [each for parent in parents for each in parent["conditions"]]
        return bool(conditions) and all(
            each["status"] == "True" and each["observedGeneration"] == route["metadata"]["generation"]
            for each in conditions
        )

    until(is_taken_up)
    assert {color(get(gateway, "moving")) for _ in range(10)} == {"green"}


def test_a_stream_comes_through_piece_by_piece(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    put_route(cluster, "stream", {"blue": 1})
    until(lambda: get(gateway, "stream").ok)
    with requests.get(f"{gateway.url}/stream", headers={"Host": "stream.test"}, stream=True, timeout=30) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert events == [f"data: {number}".encode() for number in range(50)]


def test_a_body_is_passed_on(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    put_route(cluster, "body", {"blue": 1})
    until(lambda: get(gateway, "body").ok)
    answer = requests.post(gateway.url, data=b"x" * 100_000, headers={"Host": "body.test"}, timeout=30)
    assert answer.text == "100000"


def test_what_no_route_or_endpoint_serves_is_said_so(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    assert get(gateway, "unknown").status_code == 404
    put_route(cluster, "empty", {"nobody": 1})
    until(lambda: get(gateway, "empty").status_code == 503)


def test_a_match_that_it_does_not_know_is_refused_in_the_status(
    cluster: KubernetesServer, gateway: GatewayServer
) -> None:
    rule = {"matches": [{"headers": [{"name": "x", "value": "y"}]}], "backendRefs": [{"name": "blue", "port": 80}]}
    put_route(cluster, "fancy", {}, rules=[rule])

    def is_refused() -> bool:
        parents = (call(cluster, "GET", f"{ROUTES}/fancy").get("status") or {}).get("parents") or []
        return any(each["status"] == "False" for parent in parents for each in parent["conditions"])

    until(is_refused)
    assert get(gateway, "fancy").status_code == 404


def test_it_goes_on_after_its_watches_were_dropped(cluster: KubernetesServer, gateway: GatewayServer) -> None:
    put_route(cluster, "dropped", {"blue": 1, "green": 0})
    until(lambda: color(get(gateway, "dropped")) == "blue")
    cluster.drop_watches()
    put_route(cluster, "dropped", {"blue": 0, "green": 1})
    until(lambda: color(get(gateway, "dropped")) == "green")


def test_a_service_leads_to_its_pods(cluster: KubernetesServer) -> None:
    with ServiceProxy(cluster, namespace=NAMESPACE, service="green") as proxy:
        until(lambda: color(get(proxy, "any")) == "green")
