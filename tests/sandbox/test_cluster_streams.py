"""Logs and forwarded ports of the sandbox's pods, read through the official client."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kubernetes.client import ApiClient, ApiException, CoreV1Api
from kubernetes.stream import portforward

from sandbox.cluster import KubernetesServer
from tests.sandbox.cluster_support import Connection, deployment, eventually, sandbox

COUNTING = "import time\nfor i in range(40): print('line', i, flush=True); time.sleep(0.02)\ntime.sleep(600)"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KubernetesServer, Connection]]:
    with sandbox(tmp_path_factory.mktemp("streams")) as both:
        yield both


@pytest.fixture(scope="module")
def api(cluster: tuple[KubernetesServer, Connection]) -> Connection:
    return cluster[1]


@pytest.fixture(scope="module")
def namespace(api: Connection) -> Iterator[str]:
    with api.namespace() as name:
        yield name


def running_pod(api: Connection, namespace: str, body: dict[str, Any]) -> str:
    api.apps.create_namespaced_deployment(namespace, body)
    selector = f"app={body['metadata']['name']}"

    def look() -> Any:
        found = api.core.list_namespaced_pod(namespace, label_selector=selector).items
        ready = [
            pod
            for pod in found
            if any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions or [])
        ]
        return ready[0].metadata.name if ready else None

    return str(eventually(look, "a ready pod"))


@pytest.fixture(scope="module")
def web(api: Connection, namespace: str) -> str:
    probe = {"readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1}}
    return running_pod(api, namespace, deployment(**probe))


@pytest.fixture(scope="module")
def counting(api: Connection, namespace: str) -> str:
    return running_pod(api, namespace, deployment("counting", image="python:1", args=[COUNTING]))


def test_a_followed_log_misses_and_repeats_nothing(api: Connection, namespace: str, counting: str) -> None:
    stream = api.core.read_namespaced_pod_log(counting, namespace, follow=True, _preload_content=False)
    lines = []
    for line in stream:
        lines.append(line.decode().strip())
        if len(lines) == 40:
            break
    assert lines == [f"line {number}" for number in range(40)]


def test_a_log_is_cut_as_asked(api: Connection, namespace: str, counting: str) -> None:
    def log(**options: Any) -> str:
        return str(api.core.read_namespaced_pod_log(counting, namespace, **options))

    eventually(lambda: "line 39" in log(), "all lines")
    assert log(tail_lines=2) == "line 38\nline 39\n"
    assert log(since_seconds=3600).count("\n") == 40
    assert log(limit_bytes=6) == "line 0"
    first = log(timestamps=True).splitlines()[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z line 0", first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"container": "nobody"}, "container nobody is not valid for pod"),
        ({"previous": True}, 'previous terminated container \\\\"c\\\\" in pod'),
    ],
)
def test_a_log_that_is_not_there_is_refused(
    api: Connection, namespace: str, counting: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiException, match=re.escape(message.replace("\\\\", "\\"))) as refused:
        api.core.read_namespaced_pod_log(counting, namespace, **options)
    assert refused.value.status == 400


def forwarded(api: Connection, namespace: str, pod: str, port: int) -> Any:
    """A port forward with a client of its own: `kubernetes.stream` changes the client while it connects."""
    own = CoreV1Api(ApiClient(api.api_client.configuration))
    return portforward(own.connect_get_namespaced_pod_portforward, pod, namespace, ports=str(port))


def get(api: Connection, namespace: str, pod: str, port: int = 8080) -> bytes:
    forward = forwarded(api, namespace, pod, port)
    with contextlib.closing(forward.socket(port)) as connection:
        connection.settimeout(60)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def test_a_forwarded_port_reaches_the_pod(api: Connection, namespace: str, web: str) -> None:
    answer = get(api, namespace, web)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(f"hello from {web}".encode())


def test_forwarded_ports_carry_many_streams_at_once(api: Connection, namespace: str, web: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: get(api, namespace, web), range(16)))
    assert all(answer.endswith(f"hello from {web}".encode()) for answer in answers)


def test_a_forwarded_port_carries_megabytes_both_ways(api: Connection, namespace: str, web: str) -> None:
    body = bytes(range(256)) * 16 * 1024
    forward = forwarded(api, namespace, web, 8080)
    with contextlib.closing(forward.socket(8080)) as connection, ThreadPoolExecutor(1) as pool:
        connection.settimeout(60)
        head = f"POST / HTTP/1.1\r\nHost: web\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        sending = pool.submit(connection.sendall, head.encode() + body)
        answer = read_all(connection)
        sending.result()
    assert answer.partition(b"\r\n\r\n")[2] == body


def test_a_port_that_nobody_listens_on_is_refused(api: Connection, namespace: str, web: str) -> None:
    forward = forwarded(api, namespace, web, 9999)
    with contextlib.closing(forward.socket(9999)) as connection:
        connection.settimeout(60)
        assert read_all(connection) == b""
    error = eventually(lambda: forward.error(9999), "the refusal")
    assert "connect: connection refused" in error


def test_a_forward_without_an_upgrade_is_refused(api: Connection, namespace: str, web: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods/{web}/portforward?ports=8080"
    assert api.request("GET", path).status == 400
