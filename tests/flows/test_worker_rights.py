"""The worker's rights suffice for everything that it does, and are no wider than that.

Everything runs as the worker's service account, in a cluster that holds exactly the manifests of
`deployments/worker/serving/`, with no Google permission but those that the preflight asks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.system import Secret
from pydantic import SecretStr
from typer.testing import CliRunner

from flows.cli import app
from flows.janitor import janitor
from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from flows.verify_model import verify_model
from rollout.autoscaling import Adapter, Autoscaling, autoscaler_object
from rollout.benchmark import BenchmarkSpec, Engine
from rollout.clients.cluster import ClusterClient
from rollout.clients.gke import Gke
from rollout.errors import PreflightFailed
from rollout.objects import INSTANCE_LABEL, ownership_labels
from rollout.preflight import OPTIONAL_PERMISSIONS, required_permissions
from rollout.record import Verdict
from rollout.workload import fixed_workload
from sandbox.cloud import EmbeddedCloud
from sandbox.cluster.rbac import service_account
from sandbox.gateway import GatewayServer
from sandbox.google_apis.cloud import KNOWN_PERMISSIONS
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from tests.flows.conftest import TINY_REPO, Stage
from tests.flows.versions import FAST, GOOD, strategy, write_version
from tests.sandbox.cluster_support import Connection

# Two rollouts, a verification and a teardown take two minutes on two busy cores.
pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

SERVING = Path(__file__).parents[2] / "deployments" / "worker" / "serving"
RBAC = "rbac.authorization.k8s.io"
JOB = service_account("llm-rollout", "llm-rollout-job")
HUB_TOKEN = "hf_of_the_worker"

Grant = tuple[bool, str, str, str]
"""Whether it counts in the namespace alone, API group, resource, verb."""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCloud]:
    """A cloud whose cluster knows whoever brings no token as the worker's service account."""
    root = tmp_path_factory.mktemp("cloud")
    tokens = root / "tokens.json"
    tokens.write_text(json.dumps({HUB_TOKEN: {"user": "rollout"}}), encoding="utf-8")
    embedded = EmbeddedCloud(root, hub_options=("--tokens", str(tokens)), token="operator", without_token=JOB)
    HubStore(embedded.hub_root).publish(TINY_REPO, tiny_model(root / "tiny"))
    with embedded:
        yield embedded


class Operator:
    """Who prepares a cluster for the worker, as deployments/worker/README.md says."""

    def __init__(self, stage: Stage) -> None:
        self._namespace = stage.target.namespace
        self._api = Connection(stage.cloud.kubernetes.kubeconfig(stage.folder / "operator"))
        # Under somebody else's label: the worker adopts it.
        Gke(stage.target).ensure({"managed-by": "operator"}, timeout_s=60)
        self._api.request("POST", "/api/v1/namespaces", {"metadata": {"name": self._namespace}})

    def grant(self) -> None:
        for manifest in manifests():
            scope = "" if manifest["kind"].startswith("Cluster") else f"namespaces/{self._namespace}/"
            answer = self._api.request("POST", f"/apis/{RBAC}/v1/{scope}{manifest['kind'].lower()}s", manifest)
            assert answer.status in (201, 409), answer

    def leave_something(self, labels: dict[str, str]) -> None:
        """What generated manifests and lost owners leave behind under our label."""
        meta = {"metadata": {"name": "left", "labels": labels}}
        reference = {"apiGroup": RBAC, "kind": "Role", "name": "left"}
        claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        pool = {
            "selector": {"matchLabels": {"app": "left"}},
            "targetPorts": [{"number": 8000}],
            "endpointPickerRef": {"name": "left", "port": {"number": 9002}},
        }
        pod = {"containers": [{"name": "c", "image": "nowhere/image"}], "nodeSelector": {"no": "such-node"}}
        for path, more in (
            (f"apis/{RBAC}/v1", {"roles": {"rules": []}, "rolebindings": {"roleRef": reference}}),
            ("api/v1", {"persistentvolumeclaims": {"spec": claim}, "pods": {"spec": pod}}),
            ("apis/inference.networking.k8s.io/v1", {"inferencepools": {"spec": pool}}),
        ):
            for plural, body in more.items():
                answer = self._api.request("POST", f"/{path}/namespaces/{self._namespace}/{plural}", {**meta, **body})
                assert answer.status == 201, answer


def manifests() -> list[dict[str, Any]]:
    return [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(SERVING.glob("*.yaml"))]


def granted() -> set[Grant]:
    return {
        (manifest["kind"] == "Role", group, resource, verb)
        for manifest in manifests()
        for rule in manifest.get("rules", ())
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


EXCUSED = {(*kind, "watch") for *kind, verb in granted() if verb == "delete"} | {(False, "", "nodes", "get")}
"""Granted, and not asked for in this test: whoever deletes an object watches it until it is gone, and here most of
them go at once; and a pod's node is asked for when the pod is not ready at a look, which here is a matter of moments.
Nothing else is excused."""


def allow_only(cloud: EmbeddedCloud, *permissions: str) -> None:
    cloud.google.deny(*(KNOWN_PERMISSIONS - set(permissions)))


def test_what_the_worker_is_granted_suffices_and_nothing_is_granted_that_it_never_asks_for(stage: Stage) -> None:
    operator = Operator(stage)
    with pytest.raises(PreflightFailed, match=f"{JOB.name} may not .*create.* deployments.apps") as refused:
        rollout_model(stage.request())
    assert f"kubectl apply -n {stage.target.namespace} -f deployments/worker/serving/" in refused.value.resolution
    stage.cloud.kubernetes.authorizer.refused.clear()

    operator.grant()
    permissions = required_permissions(stage.target, creates_bucket=True, creates_cluster=False, updates_cluster=True)
    allow_only(stage.cloud, *permissions, *OPTIONAL_PERMISSIONS)
    Secret(value=SecretStr(HUB_TOKEN)).save("worker-rights", overwrite=True)
    target = stage.write_target(hub_token_secret="worker-rights")
    live_through_everything(stage)

    cluster = ClusterClient.connect(target)
    labels = ownership_labels("by-hand")
    operator.leave_something(labels)
    scaling = Autoscaling(threshold=1, scale_down_window_s=300, expected_output_tokens_per_s=1.0, reasons=())
    autoscaler = autoscaler_object(
        scaling,
        name=target.namespace,
        namespace=target.namespace,
        labels=labels | {INSTANCE_LABEL: target.namespace},
        min_replicas=1,
        max_replicas=2,
        adapter=Adapter.STACKDRIVER,
    )
    cluster.apply([autoscaler])
    ended = teardown_model(target=str(stage.target_file), report_file=str(stage.report_file), weights="delete")
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert cluster.inventory() == ()

    authorizer = stage.cloud.kubernetes.authorizer
    assert authorizer.refused == {}
    used = {(bool(each.namespace), each.group, each.resource, each.verb) for each in authorizer.passed[JOB.name]}
    assert used <= granted()
    assert granted() - used <= EXCUSED


def live_through_everything(stage: Stage) -> None:
    """A rolling rollout, a canary through a Gateway, a load from inside the cluster, and what is asked every day."""
    write_version(stage, FAST, replicas=2)
    rolling = rollout_model(stage.request(warm_up="fast"), report_file=str(stage.report_file))
    assert rolling.verdict is Verdict.DONE
    write_version(stage, GOOD)
    load = BenchmarkSpec(
        workload=fixed_workload(16, 4), engine=Engine.INFERENCE_PERF, rates_per_s=(4.0,), stage_duration_s=2.0
    )
    settings = {"objectives": {"max_failed_share": None}, "delivery": strategy().model_dump(mode="json")}
    with GatewayServer(stage.cloud.kubernetes, namespace=stage.target.namespace, gateway="models"):
        assert rollout_model(stage.request(**settings)).verdict is Verdict.DONE
        verified = verify_model(stage.request(**settings, benchmark=load.model_dump(mode="json")))
    assert verified.verdict is Verdict.DONE, verified.error
    status = CliRunner().invoke(app, ["status", "--target", str(stage.target_file)], catch_exceptions=False)
    assert TINY_REPO in status.output
    assert janitor(str(stage.target_file)) == ()
