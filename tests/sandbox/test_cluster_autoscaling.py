"""The autoscaler of the sandbox: Kubernetes' documented rule as a table, and a Deployment that follows its pods."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.cluster import AutoscalerSettings, KubernetesServer, NodeSettings
from sandbox.cluster.autoscaling import Memory, next_replicas, replicas_for
from tests.sandbox.cluster_support import Connection, deployment, eventually, sandbox

POLICY = {"minReplicas": 1, "maxReplicas": 10}

GAUGE = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'vllm:num_requests_running{engine="0"} ' + open(os.environ["GAUGE_FILE"], "rb").read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["SANDBOX_HOST_PORT"])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("current", "target", "values", "unready", "missing", "wanted"),
    [
        (1, 10, [20], 0, 0, 2),
        (2, 10, [20, 20], 0, 0, 4),
        (2, 10, [10.9, 10.9], 0, 0, 2),  # within the tolerance of 10 %
        (2, 10, [11.2, 11.2], 0, 0, 3),
        (4, 10, [2, 2, 2, 2], 0, 0, 1),
        (2, 10, [25], 1, 0, 3),  # a pod that waits counts as idle: (25 + 0) / 2 is still too much
        (2, 10, [18], 1, 0, 2),  # …and here it is enough
        (2, 10, [4], 0, 1, 2),  # a pod without a value counts as just right when less would be needed
        (3, 10, [30, 30], 0, 1, 6),  # …and as idle when more would be
    ],
)
def test_ratio_rule(current: int, target: float, values: list[float], unready: int, missing: int, wanted: int) -> None:
    assert replicas_for(current, target, values, unready=unready, missing=missing) == wanted


def test_policies_bound_how_fast_it_grows() -> None:
    behaviour = {"scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}}
    memory = Memory()
    assert next_replicas(POLICY | {"behavior": behaviour}, 1, 9, memory, now=0.0) == 3
    assert next_replicas(POLICY | {"behavior": behaviour}, 3, 9, memory, now=30.0) == 3
    assert next_replicas(POLICY | {"behavior": behaviour}, 3, 9, memory, now=61.0) == 5


def test_it_shrinks_only_after_the_stabilisation_window() -> None:
    memory = Memory()
    assert next_replicas(POLICY, 4, 4, memory, now=0.0) == 4
    assert next_replicas(POLICY, 4, 1, memory, now=100.0) == 4
    assert next_replicas(POLICY, 4, 1, memory, now=299.0) == 4
    assert next_replicas(POLICY, 4, 1, memory, now=301.0) == 1


def test_bounds_hold_whatever_is_wanted() -> None:
    assert next_replicas(POLICY, 9, 500, Memory(), now=0.0) == 10
    assert next_replicas({"minReplicas": 2, "maxReplicas": 3}, 2, 1, Memory(), now=0.0) == 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KubernetesServer, Connection]]:
    root = tmp_path_factory.mktemp("autoscaling")
    gauge = root / "gauge"
    gauge.write_text("30\n", encoding="ascii")
    with sandbox(
        root,
        nodes=NodeSettings(creation_s=0.1, gpu_quota=64),
        autoscaler=AutoscalerSettings(sync_period_s=0.2),
        environment={"GAUGE_FILE": str(gauge)},
    ) as both:
        yield both


@pytest.fixture
def namespace(cluster: tuple[KubernetesServer, Connection]) -> Iterator[str]:
    with cluster[1].namespace() as name:
        yield name


def gauged(api: Connection, namespace: str, *, monitored: bool = True) -> None:
    """A Deployment whose pods report 30 requests in flight each, and who scrapes them."""
    api.apps.create_namespaced_deployment(namespace, deployment("web", "python:1", args=[GAUGE]))
    if monitored:
        monitoring = {
            "apiVersion": "monitoring.googleapis.com/v1",
            "kind": "PodMonitoring",
            "metadata": {"name": "web"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "endpoints": [{"port": 8080, "interval": "15s"}]},
        }
        api.custom.create_namespaced_custom_object(
            "monitoring.googleapis.com", "v1", namespace, "podmonitorings", monitoring
        )


def autoscaler(metric: str, target: str = "10", most: int = 3) -> dict[str, Any]:
    value = {"type": "AverageValue", "averageValue": target}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web"},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "minReplicas": 1,
            "maxReplicas": most,
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": metric}, "target": value}}],
        },
    }


def create(api: Connection, namespace: str, body: dict[str, Any]) -> None:
    path = f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers"
    assert api.request("POST", path, body).status == 201


def condition(api: Connection, namespace: str, kind: str) -> dict[str, Any] | None:
    path = f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers/web"
    conditions = (api.request("GET", path).body.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind), None)


@pytest.mark.parametrize(
    "metric", ["prometheus.googleapis.com|vllm:num_requests_running|gauge", "vllm:num_requests_running"]
)
def test_a_deployment_follows_the_gauge_of_its_pods(
    cluster: tuple[KubernetesServer, Connection], namespace: str, metric: str
) -> None:
    api = cluster[1]
    gauged(api, namespace)
    create(api, namespace, autoscaler(metric))
    found = eventually(
        lambda: api.apps.read_namespaced_deployment("web", namespace).status.ready_replicas == 3, "three replicas"
    )
    assert found
    events = api.core.list_namespaced_event(namespace).items
    assert any(each.reason == "SuccessfulRescale" and "New size: " in each.message for each in events)
    active = condition(api, namespace, "ScalingActive")
    assert active is not None
    assert (active["status"], active["reason"]) == ("True", "ValidMetricFound")


@pytest.mark.parametrize(
    ("metric", "monitored", "reason"),
    [
        ("vllm:num_requests_running", False, "FailedGetPodsMetric"),
        ("vllm:no_such_gauge", True, "FailedGetPodsMetric"),
        ("prometheus.googleapis.com|vllm:x|histogram", True, "FailedGetPodsMetric"),
    ],
)
def test_without_a_metric_it_says_so_and_leaves_the_replicas(
    cluster: tuple[KubernetesServer, Connection], namespace: str, metric: str, monitored: bool, reason: str
) -> None:
    api = cluster[1]
    gauged(api, namespace, monitored=monitored)
    create(api, namespace, autoscaler(metric))

    def refused() -> bool:
        found = condition(api, namespace, "ScalingActive")
        return found is not None and (found["status"], found["reason"]) == ("False", reason)

    eventually(refused, reason)
    assert api.apps.read_namespaced_deployment("web", namespace).spec.replicas == 1


def test_a_cluster_without_the_adapter_does_not_name_its_api(tmp_path: Path) -> None:
    with sandbox(tmp_path, autoscaler=AutoscalerSettings(metrics_adapter=False)) as (_, api):
        groups = {group["name"] for group in api.request("GET", "/apis").body["groups"]}
    assert "custom.metrics.k8s.io" not in groups
