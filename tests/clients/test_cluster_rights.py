"""The preflight asks the cluster what the caller may do, before a refusal is met half-way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.clients.cluster import ClusterClient
from rollout.rights import Denied, Right
from rollout.target import Target
from sandbox.cluster import KubernetesServer

ACCOUNT = "system:serviceaccount:llm-rollout:llm-rollout-job"
RULES = [
    {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["create"]},
    {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get"]},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesServer]:
    with KubernetesServer(tmp_path_factory.mktemp("cluster"), tls=True, token="operator") as running:
        yield running


def client(server: KubernetesServer, folder: Path, token: str | None = None) -> ClusterClient:
    """Whoever has `token`, at the namespace `serving`."""
    kubeconfig = server.kubeconfig(folder / "kubeconfig", token=token)
    cluster = {"mode": "kubeconfig", "kubeconfig": str(kubeconfig)}
    fields = {"name": "t", "project": "my-project", "region": "r", "bucket": "models", "namespace": "serving"}
    return ClusterClient.connect(Target.model_validate({**fields, "cluster": cluster}))


def test_what_no_role_grants_is_named_and_what_is_not_installed_is_passed_over(
    server: KubernetesServer, tmp_path: Path
) -> None:
    operator = client(server, tmp_path)
    group = "rbac.authorization.k8s.io"
    meta = {"name": "r", "namespace": "serving"}
    subject = {"kind": "ServiceAccount", "name": "llm-rollout-job", "namespace": "llm-rollout"}
    reference = {"apiGroup": group, "kind": "Role", "name": "r"}
    operator.apply(
        [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "serving"}},
            {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": RULES},
            {
                "apiVersion": f"{group}/v1",
                "kind": "RoleBinding",
                "metadata": meta,
                "roleRef": reference,
                "subjects": [subject],
            },
        ]
    )
    asked = [
        Right(api_version="apps/v1", kind="Deployment", verb="create"),
        Right(api_version="apps/v1", kind="Deployment", verb="delete"),
        Right(api_version="v1", kind="Pod", verb="get", subresource="log"),
        Right(api_version="v1", kind="Namespace", verb="get"),
        Right(api_version="v1", kind="Namespace", verb="list"),
        Right(api_version="example.com/v1", kind="Widget", verb="list"),
    ]
    worker = client(server, tmp_path, server.service_account_token("llm-rollout", "llm-rollout-job"))
    assert worker.caller() == ACCOUNT
    assert worker.denied(asked) == (
        Denied(resource="deployments.apps", verb="delete", namespace="serving"),
        Denied(resource="pods/log", verb="get", namespace="serving"),
        Denied(resource="namespaces", verb="list", namespace=""),
    )
    assert operator.denied(asked) == ()
