"""What Roles let a service account do: the embedded cluster refuses what a real API server would refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.cluster import KubernetesServer
from sandbox.cluster.rbac import service_account
from tests.sandbox.cluster_support import Connection

NAMESPACE = "serving"
WORKER = "system:serviceaccount:jobs:worker"
RBAC = "rbac.authorization.k8s.io"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    root = tmp_path_factory.mktemp("cluster")
    with KubernetesServer(root, token="operator", without_token=service_account("jobs", "worker")) as running:
        yield running


@pytest.fixture
def operator(server: KubernetesServer, tmp_path: Path) -> Connection:
    """The administrator, with a namespace where the worker may do nothing yet."""
    connection = Connection(server.kubeconfig(tmp_path / "operator"))
    connection.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    for kind in ("rolebindings", "roles"):
        connection.request("DELETE", f"/apis/{RBAC}/v1/namespaces/{NAMESPACE}/{kind}")
    for kind in ("clusterrolebindings", "clusterroles"):
        connection.request("DELETE", f"/apis/{RBAC}/v1/{kind}")
    return connection


@pytest.fixture
def worker(server: KubernetesServer, tmp_path: Path) -> Connection:
    token = server.service_account_token("jobs", "worker")
    return Connection(server.kubeconfig(tmp_path / "worker", token=token))


def grant(operator: Connection, *rules: dict[str, Any], cluster: bool = False) -> None:
    """Give the worker `rules`, in the namespace or in the whole cluster."""
    prefix = "Cluster" if cluster else ""
    subject = {"kind": "ServiceAccount", "name": "worker", "namespace": "jobs"}
    where = f"/apis/{RBAC}/v1/" + ("cluster" if cluster else f"namespaces/{NAMESPACE}/")
    reference = {"apiGroup": RBAC, "kind": f"{prefix}Role", "name": "r"}
    for plural, body in (
        ("roles", {"rules": list(rules)}),
        ("rolebindings", {"roleRef": reference, "subjects": [subject]}),
    ):
        assert operator.request("POST", f"{where}{plural}", {"metadata": {"name": "r"}, **body}).status == 201


def rule(resource: str, *verbs: str, group: str = "", **more: Any) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": [resource], "verbs": list(verbs), **more}


def may(caller: Connection, **attributes: str) -> bool:
    review = {"kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
    allowed: bool = caller.request("POST", REVIEWS, review).body["status"]["allowed"]
    return allowed


def test_what_no_role_grants_is_refused_in_the_real_words(operator: Connection, worker: Connection) -> None:
    refused = worker.request("GET", f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/web")
    assert refused.status == 403
    assert refused.body == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f'deployments.apps "web" is forbidden: User "{WORKER}" cannot get resource "deployments" in API '
        f'group "apps" in the namespace "{NAMESPACE}"',
        "reason": "Forbidden",
        "details": {"name": "web", "group": "apps", "kind": "deployments"},
        "code": 403,
    }
    assert worker.request("GET", "/apis").status == 200, "discovery is for whoever is known"


def test_a_role_counts_in_its_namespace_alone_and_the_review_says_the_same(
    operator: Connection, worker: Connection
) -> None:
    grant(operator, rule("configmaps", "list"))
    assert worker.request("GET", CONFIG_MAPS).status == 200
    assert may(worker, verb="list", resource="configmaps", namespace=NAMESPACE)
    for elsewhere in ("default", ""):
        assert not may(worker, verb="list", resource="configmaps", namespace=elsewhere)
    assert worker.request("GET", "/api/v1/configmaps").status == 403
    assert worker.request("GET", f"{CONFIG_MAPS}?watch=1").status == 403, "to watch is a verb of its own"


def test_applying_what_is_not_there_needs_create_as_well(operator: Connection, worker: Connection) -> None:
    grant(operator, rule("configmaps", "patch"))
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}}
    path = f"{CONFIG_MAPS}/m?fieldManager=test"
    refused = worker.request("PATCH", path, body, "application/apply-patch+yaml")
    assert f'"{WORKER}" cannot create resource "configmaps"' in refused.body["message"]
    operator.request("PATCH", path, body, "application/apply-patch+yaml")
    assert worker.request("PATCH", path, body, "application/apply-patch+yaml").status == 200


def test_a_subresource_is_a_right_of_its_own_and_a_forwarded_port_takes_two(
    operator: Connection, worker: Connection
) -> None:
    grant(operator, rule("pods", "*"), rule("pods/portforward", "get"))
    pod = f"/api/v1/namespaces/{NAMESPACE}/pods/web"
    assert 'cannot get resource "pods/log"' in worker.request("GET", f"{pod}/log").body["message"]
    refused = worker.request("GET", f"{pod}/portforward?ports=80")
    assert 'cannot create resource "pods/portforward"' in refused.body["message"]


def test_a_role_may_name_its_own_namespace_and_single_objects(operator: Connection, worker: Connection) -> None:
    grant(operator, rule("namespaces", "get"), rule("secrets", "get", resourceNames=["mine"]))
    assert worker.request("GET", f"/api/v1/namespaces/{NAMESPACE}").status == 200
    assert worker.request("GET", "/api/v1/namespaces/default").status == 403
    secrets = f"/api/v1/namespaces/{NAMESPACE}/secrets"
    assert worker.request("GET", f"{secrets}/mine").status == 404
    assert worker.request("GET", f"{secrets}/other").status == 403
    assert worker.request("GET", secrets).status == 403


def test_a_cluster_role_counts_everywhere(operator: Connection, worker: Connection) -> None:
    grant(operator, rule("nodes", "list"), rule("*", "list", group="*"), cluster=True)
    assert worker.request("GET", "/api/v1/nodes").status == 200
    assert may(worker, verb="list", group="apps", resource="deployments", namespace="default")
    assert not may(worker, verb="delete", group="apps", resource="deployments", namespace="default")


def test_a_caller_without_a_token_is_who_the_cluster_was_told(operator: Connection, worker: Connection) -> None:
    worker.token = None
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    answer = worker.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
    assert answer.body["status"]["userInfo"]["username"] == WORKER
    assert worker.request("GET", CONFIG_MAPS).status == 403


def test_what_passed_and_what_was_refused_can_be_read_afterwards(
    server: KubernetesServer, operator: Connection, worker: Connection
) -> None:
    grant(operator, rule("events", "list"))
    worker.request("GET", f"/api/v1/namespaces/{NAMESPACE}/events")
    worker.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/events/e")
    passed, refused = server.authorizer.passed[WORKER], server.authorizer.refused[WORKER]
    assert {(each.verb, each.namespace) for each in passed if each.resource == "events"} == {("list", NAMESPACE)}
    assert {(each.verb, each.name) for each in refused if each.resource == "events"} == {("delete", "e")}
