"""The cluster client against an API server: the sandbox's, or the real one that KUBECONFIG or KUBEBUILDER_ASSETS gives.

Tests of the API run everywhere. With KUBECONFIG, those that wait, diagnose, reach and delete run too: their pods run
the test program in `TEST_CLUSTER_IMAGE` (any image with Python 3.11 or newer; `python:3.12-slim` by default), on nodes
that can pull it. With KUBEBUILDER_ASSETS they run where the folder also holds controller manager and scheduler.
Only the sandbox can do what the tests with the fixtures `server` and `breakable` ask for: API servers that fail on
demand, nodes that die, admission that denies, GPUs and taints as wanted. They take it whatever is configured.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from kubernetes.client import ApiClient, Configuration

from rollout.clients.cluster import ClusterClient, NodeRoom
from rollout.clients.cluster_api import ClusterApi
from rollout.clients.cluster_wait import LogLine, Progress, ServerDoesNotStart, StartTakesTooLong
from rollout.clients.gke import Gke
from rollout.diagnosis import Category, StartupObservation
from rollout.errors import (
    BadInput,
    ClusterUnreachable,
    DeadlineExceeded,
    FieldConflict,
    ManifestRejected,
    NotFound,
    PermissionMissing,
    QuotaExceeded,
)
from rollout.model import ModelFile, PinnedModel
from rollout.objects import INSTANCE_LABEL, ownership_labels, serving_objects
from rollout.rendering import KubernetesObject
from rollout.report import Action, Change
from rollout.serving import ServingSpec
from rollout.target import Cluster, ClusterMode, Target
from rollout.waterfall import Stage
from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.cluster.nodes import Machine
from tests.engines import free_port
from tests.real_kubernetes import control_plane, has_controllers
from tests.real_nodes import node
from tests.sandbox.cluster_support import eventually

POD_PROGRAM = Path(__file__).with_name("pod_program.py")
PROGRAM = (sys.executable, str(POD_PROGRAM))
REAL_IMAGE = os.environ.get("TEST_CLUSTER_IMAGE", "python:3.12-slim")
NO_SUCH_IMAGE = "registry.k8s.io/pause:no-such-tag"
"""A registry that says so to everybody; others ask for a login first."""
STATE = Path("/state")
"""Where a real pod keeps what outlives its container: the sandbox's write to this machine's files."""
REAL = "real"
"""Name of the target whose cluster is not the sandbox's."""
DEADLINE_S = 120.0
"""Generous: the machine may be busy."""


@dataclass
class Environment:
    """A cluster to test against."""

    kubeconfig: str
    server: KubernetesServer | None
    has_controllers: bool = True
    has_nodes: bool = True
    plays_images: bool = True
    """Whether its pods are processes of this machine, as the sandbox's are."""

    def client(self, namespace: str | None = None) -> ClusterClient:
        cluster = Cluster(mode=ClusterMode.KUBECONFIG, kubeconfig=self.kubeconfig)
        name = namespace or f"test-{uuid.uuid4().hex[:8]}"
        return ClusterClient.connect(
            Target(
                name="sandbox" if self.plays_images else REAL,
                project="my-project",
                region="u-france-east1",
                cluster=cluster,
                namespace=name,
                bucket="weights",
            )
        )


def start_sandbox(root: Path, **settings: Any) -> KubernetesServer:
    nodes = settings.pop("nodes", NodeSettings(creation_s=0.0))
    defaults = {"image_pull_s": 0.0, "backoff_s": 0.1, "longest_probe_period_s": 0.1, "nodes": nodes}
    return KubernetesServer(root, runners={"test/": PROGRAM}, **{**defaults, **settings}).start()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """One API server for all tests that do not break it; each has a namespace of its own."""
    if os.environ.get("KUBECONFIG"):
        yield Environment(os.environ["KUBECONFIG"], None, plays_images=False)
        return
    if os.environ.get("KUBEBUILDER_ASSETS"):
        assets = Path(os.environ["KUBEBUILDER_ASSETS"])
        complete = has_controllers(assets)
        with contextlib.ExitStack() as running:
            kubeconfig = running.enter_context(control_plane(assets, tmp_path_factory.mktemp("envtest")))
            if complete:
                running.enter_context(node(kubeconfig, tmp_path_factory.mktemp("node"), {"test/": PROGRAM}))
            yield Environment(
                str(kubeconfig), None, has_controllers=complete, has_nodes=complete, plays_images=complete
            )
        return
    root = tmp_path_factory.mktemp("cluster")
    with start_sandbox(root, tls=True, token="secret") as server:
        yield Environment(str(server.kubeconfig(root / "kubeconfig")), server)


@pytest.fixture
def client(environment: Environment) -> Iterator[ClusterClient]:
    """A client with a namespace of its own, which goes with the test."""
    made = environment.client()
    yield made
    with contextlib.suppress(NotFound):
        made.api.request("DELETE", made.api.path_of(namespace_of(made)))


@pytest.fixture
def controlled(environment: Environment, client: ClusterClient) -> ClusterClient:
    """A client of a cluster that has controllers."""
    if not environment.has_controllers:
        pytest.skip("needs a controller manager")
    return client


@pytest.fixture
def running(environment: Environment, client: ClusterClient) -> ClusterClient:
    """A client of a cluster that runs our test program."""
    if not environment.has_nodes:
        pytest.skip("needs nodes")
    return client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KubernetesServer]:
    """A sandbox of one's own, to break."""
    with start_sandbox(tmp_path) as server:
        yield server


@pytest.fixture
def breakable(server: KubernetesServer, tmp_path: Path) -> ClusterClient:
    return Environment(str(server.kubeconfig(tmp_path / "kubeconfig")), server).client()


# --- Objects ----------------------------------------------------------------------------------------------------------


def plan(client: ClusterClient, **changes: Any) -> tuple[KubernetesObject, ...]:
    """The objects of a small rollout, as the product makes them."""
    fields: dict[str, Any] = {"name": "vllm-a", "service_name": "service-a", "app": "app-a", "served_model_name": "a"}
    fields["image"] = "test/vllm:1"
    rollout_id = changes.pop("rollout_id", "r1")
    model = PinnedModel(
        repo_id="org/model",
        revision="main",
        commit_sha="a" * 40,
        files=(ModelFile(path="model.safetensors", size_bytes=10, sha256="b" * 64),),
    )
    return serving_objects(model, ServingSpec(**{**fields, **changes}), client.target, rollout_id=rollout_id)


def namespace_of(client: ClusterClient) -> KubernetesObject:
    metadata = {"name": client.target.namespace, "labels": ownership_labels("r1")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}


def runnable(client: ClusterClient, image: str) -> dict[str, Any]:
    """The test program as a container: an image of the sandbox, or its source for a real image with Python."""
    if client.target.name != REAL or not image.startswith("test/"):
        return {"image": image}
    command = ["python", "-u", "-c", POD_PROGRAM.read_text(encoding="utf-8")]
    state = [{"name": "state", "mountPath": str(STATE)}]
    return {"image": REAL_IMAGE, "command": command, "volumeMounts": state}


def program(
    client: ClusterClient, *args: str, name: str = "web", replicas: int = 1, image: str = "test/web:1", **pod: Any
) -> KubernetesObject:
    """A Deployment that runs the test program."""
    container: dict[str, Any] = {
        "name": "inference-server",
        **runnable(client, image),
        "args": list(args),
        "ports": [{"containerPort": 8080, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 1},
        "resources": pod.pop("resources", {}),
        **pod.pop("container", {}),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": client.target.namespace,
            "labels": ownership_labels("r1", instance=name),
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "progressDeadlineSeconds": 600,
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [container],
                    "volumes": [{"name": "state", "emptyDir": {}}],
                    **pod,
                },
            },
        },
    }


def service(client: ClusterClient, app: str = "web") -> KubernetesObject:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": app,
            "namespace": client.target.namespace,
            "labels": ownership_labels("r1", instance=app),
        },
        "spec": {"selector": {"app": app}, "ports": [{"protocol": "TCP", "port": 8080, "targetPort": 8080}]},
    }


def actions(changes: tuple[Change, ...]) -> dict[str, Action]:
    return {change.kind: change.action for change in changes}


def live(client: ClusterClient, manifest: KubernetesObject) -> KubernetesObject:
    found = client.find(manifest)
    assert found is not None
    return found


def deployment_in(manifests: tuple[KubernetesObject, ...]) -> KubernetesObject:
    return next(manifest for manifest in manifests if manifest["kind"] == "Deployment")


# --- Preview and apply ------------------------------------------------------------------------------------------------


def test_a_preview_of_a_new_namespace_validates_everything_and_changes_nothing(client: ClusterClient) -> None:
    preview = client.preview(plan(client))
    assert {diff.action for diff in preview.diffs} == {Action.CREATED}
    assert "- **created** Deployment" in preview.markdown
    assert client.find(namespace_of(client)) is None


def test_a_second_apply_changes_nothing(client: ClusterClient) -> None:
    manifests = plan(client)
    first = client.apply(manifests)
    before = live(client, deployment_in(manifests))["metadata"]
    second = client.apply(manifests)
    after = live(client, deployment_in(manifests))["metadata"]
    assert set(actions(first).values()) == {Action.CREATED}
    assert set(actions(second).values()) == {Action.UNCHANGED}
    assert after["generation"] == before["generation"]


def test_a_changed_flag_is_previewed_by_its_path_and_then_applied(client: ClusterClient) -> None:
    client.apply(plan(client))
    changed = plan(client, max_model_len=8192)
    (diff,) = [diff for diff in client.preview(changed).diffs if diff.kind == "Deployment"]
    assert [(field.path[-7:], field.before, field.after) for field in diff.fields] == [
        (".args[]", '"--max-model-len=16384"', ""),
        (".args[]", "", '"--max-model-len=8192"'),
    ]
    assert live(client, deployment_in(changed))["metadata"]["generation"] == 1
    assert actions(client.apply(changed))["Deployment"] is Action.UPDATED
    assert live(client, deployment_in(changed))["metadata"]["generation"] == 2


def test_another_rollout_id_changes_labels_and_starts_no_new_generation(client: ClusterClient) -> None:
    client.apply(plan(client))
    again = plan(client, rollout_id="r2")
    client.apply(again)
    metadata = live(client, deployment_in(again))["metadata"]
    assert metadata["labels"]["llm-rollout.dev/rollout"] == "r2"
    assert metadata["generation"] == 1


def test_a_field_that_the_plan_drops_goes(client: ClusterClient) -> None:
    client.apply(plan(client, env={"EXTRA": "1"}))
    without = plan(client)
    client.apply(without)
    (container,) = live(client, deployment_in(without))["spec"]["template"]["spec"]["containers"]
    assert "EXTRA" not in {variable["name"] for variable in container["env"]}


def test_a_field_of_another_manager_is_a_conflict_that_names_both(client: ClusterClient) -> None:
    client.apply([namespace_of(client), program(client, "serve")])
    other = program(client, "serve", image="example.com/web:other")
    query = {"fieldManager": "somebody", "force": True}
    client.api.request("PATCH", client.api.path_of(other), query, other, "application/apply-patch+yaml")
    with pytest.raises(FieldConflict, match=r'containers\[name="inference-server"\]\.image.*"somebody"'):
        client.apply([program(client, "serve", image="example.com/web:2")])


def test_an_apply_leaves_an_autoscalers_replicas_alone(client: ClusterClient) -> None:
    manifests = plan(client)
    client.apply(manifests)
    deployment = deployment_in(manifests)
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    autoscaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "scaler", "namespace": client.target.namespace},
        "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 3},
    }
    client.apply([autoscaler])
    assert actions(client.apply(manifests))["Deployment"] is Action.UNCHANGED

    path, scaled = client.api.path_of(deployment), {"spec": {"replicas": 2}}
    query = {"fieldManager": "kube-controller-manager"}
    client.api.request("PATCH", path, query, scaled, "application/merge-patch+json")
    assert actions(client.apply(manifests))["Deployment"] is Action.UNCHANGED
    assert actions(client.apply(plan(client, max_model_len=8192)))["Deployment"] is Action.UPDATED
    assert live(client, deployment)["spec"]["replicas"] == 2


def test_replicas_stay_when_an_autoscaler_takes_them_over(client: ClusterClient) -> None:
    """Its manifest stands after the Deployment's, which no longer says how many: for a moment nobody would."""
    manifests = plan(client, replicas=2)
    client.apply(manifests)
    deployment = deployment_in(manifests)
    autoscaled = {**deployment, "spec": {k: v for k, v in deployment["spec"].items() if k != "replicas"}}
    client.apply([autoscaled])
    assert live(client, deployment)["spec"]["replicas"] == 2


def test_a_namespace_with_something_of_others_is_not_deleted_with_it(client: ClusterClient) -> None:
    ours = plan(client)
    client.apply(ours)
    namespace = namespace_of(client)
    ingress = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": "of-a-colleague", "namespace": client.target.namespace},
        "spec": {"defaultBackend": {"service": {"name": "theirs", "port": {"number": 80}}}},
    }
    path = client.api.resource("networking.k8s.io/v1", "Ingress").path(client.target.namespace)
    client.api.request("POST", path, {}, ingress)
    (change,) = client.delete([namespace])
    assert change.action is Action.ADOPTED
    assert "Ingress of-a-colleague" in change.detail


def test_free_gpus_are_counted_where_pods_may_go(tmp_path: Path) -> None:
    machine = Machine("a3-edgegpu-8g-nolssd", 208, 1872, "nvidia-h100-80gb", 8)
    by_class = {"cloud.google.com/compute-class": "edge"}
    by_label = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    with start_sandbox(tmp_path) as server:
        environment = Environment(str(server.kubeconfig(tmp_path / "kubeconfig")), server)
        client = environment.client()
        server.add_node(machine, "edge")
        assert client.gpu_room(by_class, 3) == NodeRoom(nodes=1, idle_gpus=6)
        # Its taint keeps other pods away, although the node has the accelerator's label.
        assert client.gpu_room(by_label, 1) == NodeRoom(nodes=0, idle_gpus=0)
        server.add_node(machine)
        assert client.gpu_room(by_label, 1) == NodeRoom(nodes=1, idle_gpus=8)
        holder = program(client, "serve")
        requests = {"requests": {"nvidia.com/gpu": "3"}, "limits": {"nvidia.com/gpu": "3"}}
        holder["spec"]["template"]["spec"]["containers"][0]["resources"] = requests
        client.apply([namespace_of(client), holder])
        client.wait_available("web", deadline_s=DEADLINE_S)
        assert client.gpu_room(by_label, 1).idle_gpus == 5


def test_a_refused_object_stops_everything_before_anything_changes(client: ClusterClient) -> None:
    good, wrong = namespace_of(client), program(client, "serve")
    wrong["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(ManifestRejected, match=r"Deployment .*/web: .*imagee"):
        client.apply([good, wrong])
    assert client.find(good) is None


def test_all_refusals_are_named_at_once(client: ClusterClient) -> None:
    client.apply([namespace_of(client)])
    one, other = program(client, "serve", name="one"), program(client, "serve", name="other")
    one["spec"]["selector"]["matchLabels"] = {"app": "x"}
    other["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(ManifestRejected, match=r"(?s)/one: .*selector.*/other: .*imagee"):
        client.preview([one, other])


WARDEN = (
    'admission webhook "warden-validating.common-webhooks.networking.gke.io" denied the request: GKE Warden rejected'
    " the request because it violates one or more constraints."
)
QUOTA = "exceeded quota: models, requested: count/services=1, used: count/services=2, limited: count/services=2"


@pytest.mark.parametrize(
    ("why", "error", "resolution"),
    [
        (QUOTA, QuotaExceeded, "tear down a model there"),
        (WARDEN, ManifestRejected, "serving.resources within the limits"),
        ('violates PodSecurity "restricted:latest": runAsNonRoot != true', ManifestRejected, "admission policy"),
    ],
)
def test_a_quota_and_an_admission_policy_are_no_missing_permission(
    server: KubernetesServer, breakable: ClusterClient, why: str, error: type[Exception], resolution: str
) -> None:
    server.deny("services", why)
    breakable.apply([namespace_of(breakable)])
    with pytest.raises(error, match=resolution) as caught:
        breakable.preview([service(breakable)])
    assert not isinstance(caught.value, PermissionMissing)
    assert "Service" in str(caught.value)


def test_the_preview_names_a_quota_beside_the_other_refusals(
    server: KubernetesServer, breakable: ClusterClient
) -> None:
    server.deny("services", QUOTA)
    breakable.apply([namespace_of(breakable)])
    wrong = program(breakable, "serve")
    wrong["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(ManifestRejected, match=r"(?s)imagee.*exceeded quota: models"):
        breakable.preview([wrong, service(breakable)])


def test_credentials_that_the_cluster_does_not_accept_are_not_a_missing_role(tmp_path: Path) -> None:
    with start_sandbox(tmp_path, token="secret") as server:
        wrong = Configuration(host=server.url, api_key={"authorization": "Bearer wrong"})
        api = ClusterApi(ApiClient(wrong), attempts=1)
        with pytest.raises(PermissionMissing, match="log in again"):
            api.get("/api/v1/namespaces")


@pytest.mark.parametrize(("why", "category"), [(QUOTA, Category.QUOTA_EXCEEDED), (WARDEN, Category.AUTOPILOT_LIMIT)])
def test_pods_that_admission_refuses_end_the_wait(
    server: KubernetesServer, breakable: ClusterClient, why: str, category: Category
) -> None:
    server.deny("pods", why)
    start(breakable, "serve")
    with pytest.raises(ServerDoesNotStart) as caught:
        breakable.wait_available("web", deadline_s=DEADLINE_S, patience_factor=0.0)
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.category is category


def test_a_kind_that_the_cluster_does_not_know_is_named(client: ClusterClient) -> None:
    unknown = {"apiVersion": "example.com/v1", "kind": "Thing", "metadata": {"name": "x"}}
    with pytest.raises(NotFound, match=r"knows no Thing \(example\.com/v1\)"):
        client.preview([unknown])


def test_what_somebody_else_made_is_adopted_and_never_becomes_ours(client: ClusterClient) -> None:
    manifests = plan(client)
    theirs = {key: manifests[0][key] for key in ("apiVersion", "kind")} | {
        "metadata": {"name": client.target.namespace, "labels": {"team": "them"}}
    }
    client.api.request("POST", "/api/v1/namespaces", None, theirs)
    assert actions(client.apply(manifests))["Namespace"] is Action.ADOPTED
    assert "app.kubernetes.io/managed-by" not in live(client, theirs)["metadata"]["labels"]
    assert actions(client.delete([manifests[0]])) == {"Namespace": Action.ADOPTED}
    assert "deletionTimestamp" not in live(client, theirs)["metadata"]


# --- Inventory, prune, delete -----------------------------------------------------------------------------------------


def test_the_inventory_lists_what_is_ours_by_label(client: ClusterClient) -> None:
    client.apply(plan(client))
    client.apply(plan(client, name="vllm-b", service_name="service-b", app="app-b"))
    kinds = [item["kind"] for item in client.inventory() if item["kind"] != "Pod"]
    assert kinds == ["Namespace", "ServiceAccount", "Deployment", "Deployment", "Service", "Service"]
    of_b = [item["metadata"]["name"] for item in client.inventory({INSTANCE_LABEL: "vllm-b"}) if item["kind"] != "Pod"]
    assert of_b == ["vllm-b", "service-b"]


def test_prune_deletes_what_the_plan_no_longer_holds_and_only_of_this_instance(controlled: ClusterClient) -> None:
    controlled.apply(plan(controlled, replicas=2))
    controlled.apply(plan(controlled, name="vllm-b", service_name="service-b", app="app-b", replicas=2))
    now = plan(controlled)
    assert actions(controlled.prune(now, "vllm-a")) == {"PodDisruptionBudget": Action.DELETED}
    left = [item["metadata"]["name"] for item in controlled.inventory() if item["kind"] == "PodDisruptionBudget"]
    assert left == ["vllm-b"]
    assert controlled.prune(now, "vllm-a") == ()


def test_what_no_pod_uses_any_more_is_pruned_at_the_end(running: ClusterClient) -> None:
    def account(name: str) -> KubernetesObject:
        metadata = {"name": name, "namespace": running.target.namespace, "labels": ownership_labels("r1")}
        return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata}

    old = [namespace_of(running), account("old"), program(running, "serve", serviceAccountName="old"), service(running)]
    running.apply(old)
    running.wait_available("web", deadline_s=DEADLINE_S)
    new = [namespace_of(running), account("new"), program(running, "serve", serviceAccountName="new"), service(running)]
    assert running.prune_shared(new) == (), "the old pod still needs it"
    running.apply(new)
    running.wait_available("web", deadline_s=DEADLINE_S)
    # The old pod may still be on its way out.
    changes = eventually(lambda: running.prune_shared(new), "the old account is pruned")
    assert actions(changes) == {"ServiceAccount": Action.DELETED}
    assert [item["metadata"]["name"] for item in running.inventory() if item["kind"] == "ServiceAccount"] == ["new"]
    assert running.prune_shared(new) == ()


def test_delete_goes_in_reverse_and_waits_until_everything_is_gone(running: ClusterClient) -> None:
    manifests = [namespace_of(running), program(running, "serve"), service(running)]
    running.apply(manifests)
    running.wait_available("web", deadline_s=DEADLINE_S)
    changes = running.delete(manifests, deadline_s=DEADLINE_S)
    assert [change.kind for change in changes] == ["Service", "Deployment", "Namespace"]
    assert all(running.find(manifest) is None for manifest in manifests)
    assert running.inventory() == ()
    assert actions(running.delete(manifests))["Service"] is Action.UNCHANGED


def test_a_namespace_of_ours_that_holds_something_of_others_stays(controlled: ClusterClient) -> None:
    controlled.apply([namespace_of(controlled)])
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "theirs"}}
    controlled.api.request("POST", f"/api/v1/namespaces/{controlled.target.namespace}/configmaps", None, theirs)
    (change,) = controlled.delete([namespace_of(controlled)])
    assert change.action is Action.ADOPTED
    assert "ConfigMap theirs" in change.detail


def test_what_does_not_go_is_named_at_the_deadline(client: ClusterClient) -> None:
    held = service(client) | {"metadata": service(client)["metadata"] | {"finalizers": ["example.com/held"]}}
    client.apply([namespace_of(client), held])
    with pytest.raises(DeadlineExceeded, match=r"Service .*/web"):
        client.delete([held], deadline_s=0.5)


# --- Waiting ----------------------------------------------------------------------------------------------------------


SLOW = [{"name": "LOADING_S", "value": "3600"}]
"""Lets the test program's `warn` load for an hour."""


def start(client: ClusterClient, *args: str, **options: Any) -> None:
    client.apply([namespace_of(client), program(client, *args, **options)])


def test_a_good_start_reports_progress_logs_and_a_waterfall(running: ClusterClient) -> None:
    start(running, "serve", "0.5")
    progress: list[Progress] = []
    lines: list[LogLine] = []
    report = running.wait_available(
        "web",
        deadline_s=DEADLINE_S,
        context=StartupObservation(weights_bytes=1000),
        on_progress=progress.append,
        on_log=lines.append,
    )
    assert len(report.pods) == 1
    assert report.healed == ()
    assert {0.0, 0.5, 1.0} >= {step.fraction_loaded for step in progress if step.fraction_loaded is not None}
    assert [line.text for line in lines][-1] == "INFO:     Application startup complete."
    stages = {stage.stage for stage in report.waterfalls[0].stages}
    assert {Stage.SCHEDULING, Stage.WEIGHTS} <= stages
    assert report.waterfalls[0].weights_bytes_per_s == pytest.approx(2000)


def test_waiting_for_what_is_available_already_returns_at_once(running: ClusterClient) -> None:
    start(running, "serve")
    running.wait_available("web", deadline_s=DEADLINE_S)
    assert running.wait_available("web", deadline_s=DEADLINE_S).pods


def test_a_crash_ends_the_wait_with_its_cause_from_the_log(running: ClusterClient) -> None:
    start(running, "crash", "Traceback", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB.")
    with pytest.raises(ServerDoesNotStart) as caught:
        running.wait_available("web", deadline_s=DEADLINE_S)
    diagnosis = caught.value.diagnosis
    assert diagnosis is not None
    assert diagnosis.category is Category.GPU_OUT_OF_MEMORY
    assert "CUDA out of memory" in str(caught.value)
    assert "torch.OutOfMemoryError" in caught.value.log_tail


def test_the_failure_survives_being_stored(running: ClusterClient) -> None:
    start(running, "crash", "error: unrecognized arguments: --bad")
    with pytest.raises(ServerDoesNotStart) as caught:
        running.wait_available("web", deadline_s=DEADLINE_S)
    restored = pickle.loads(pickle.dumps(caught.value))
    assert (str(restored), restored.diagnosis) == (str(caught.value), caught.value.diagnosis)
    assert [waterfall.pod for waterfall in restored.waterfalls] == [
        waterfall.pod for waterfall in caught.value.waterfalls
    ]
    assert restored.waterfalls


def test_a_crash_that_nobody_knows_ends_the_wait_after_some_restarts(running: ClusterClient) -> None:
    start(running, "crash", "ZeroDivisionError: division by zero")
    with pytest.raises(ServerDoesNotStart, match="ZeroDivisionError") as caught:
        running.wait_available("web", deadline_s=DEADLINE_S)
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.category is Category.CRASH_LOOP


def test_a_server_that_ends_without_an_error_ends_the_wait_after_some_restarts(running: ClusterClient) -> None:
    start(running, "exit", "0")
    with pytest.raises(ServerDoesNotStart, match="exit code 0"):
        running.wait_available("web", deadline_s=DEADLINE_S)


def test_a_hanging_container_with_a_suspicious_log_ends_at_the_deadline_with_the_line(running: ClusterClient) -> None:
    start(running, "warn", "WARNING: CUDA driver version is insufficient, RuntimeError", container={"env": SLOW})
    with pytest.raises(StartTakesTooLong, match="CUDA driver version is insufficient") as caught:
        running.wait_available("web", deadline_s=10.0)
    assert caught.value.diagnosis is not None
    assert caught.value.diagnosis.suspected


def test_a_warning_that_reads_like_a_failure_is_told_and_does_not_end_the_wait(running: ClusterClient) -> None:
    start(running, "warn", "WARNING: CUDA driver version is insufficient, RuntimeError ignored")
    progress: list[Progress] = []
    report = running.wait_available("web", deadline_s=DEADLINE_S, on_progress=progress.append)
    assert report.pods
    assert {step.diagnosis.suspected for step in progress if step.diagnosis} == {True}
    assert report.healed == ()


def test_a_fault_that_heals_in_time_is_reported_and_forgiven(running: ClusterClient, tmp_path: Path) -> None:
    denied = "does not have storage.objects.get access to the Google Cloud Storage object."
    state = STATE if running.target.name == REAL else tmp_path
    start(running, "crash-once", str(state / "crashed"), f"a@b.iam.gserviceaccount.com {denied}")
    progress: list[Progress] = []
    report = running.wait_available("web", deadline_s=DEADLINE_S, on_progress=progress.append)
    assert Category.BUCKET_FORBIDDEN in {diagnosis.category for diagnosis in report.healed}
    assert any(step.diagnosis and step.diagnosis.category is Category.BUCKET_FORBIDDEN for step in progress)


def test_a_fault_that_could_heal_ends_the_wait_when_its_patience_is_over(running: ClusterClient) -> None:
    start(running, "crash", "x@y.iam does not have storage.objects.get access to the Google Cloud Storage object.")
    with pytest.raises(ServerDoesNotStart, match=r"storage\.objects\.get"):
        running.wait_available("web", deadline_s=DEADLINE_S, patience_factor=0.0)


def test_an_image_that_does_not_exist_ends_the_wait(running: ClusterClient) -> None:
    start(running, image=NO_SUCH_IMAGE)
    with pytest.raises(ServerDoesNotStart, match="image does not exist"):
        running.wait_available("web", deadline_s=DEADLINE_S)


def test_a_pod_without_a_gpu_ends_the_wait_when_its_patience_is_over(running: ClusterClient) -> None:
    start(running, "serve", resources={"limits": {"nvidia.com/gpu": "64"}})
    with pytest.raises(ServerDoesNotStart, match="GPU"):
        running.wait_available("web", deadline_s=DEADLINE_S, patience_factor=0.0)


def test_a_compute_class_that_does_not_exist_is_named(running: ClusterClient) -> None:
    start(running, "serve", nodeSelector={"cloud.google.com/compute-class": "nothing-like-it"})
    with pytest.raises(ServerDoesNotStart, match="compute class that the pod selects does not exist") as caught:
        running.wait_available("web", deadline_s=DEADLINE_S, patience_factor=0.0)
    assert "nothing-like-it" in str(caught.value)


def test_a_node_that_dies_under_the_start_is_named(server: KubernetesServer, breakable: ClusterClient) -> None:
    start(breakable, "hang")
    lost = threading.Event()

    def lose_the_node(step: Progress) -> None:
        if "starting" in step.message and not lost.is_set():
            lost.set()
            pods = breakable.api.get(f"/api/v1/namespaces/{breakable.target.namespace}/pods")["items"]
            server.agent_settings.node_loss_s = DEADLINE_S
            server.lose_node(pods[0]["spec"]["nodeName"])

    with pytest.raises(ServerDoesNotStart, match="node does not answer"):
        breakable.wait_available("web", deadline_s=DEADLINE_S, on_progress=lose_the_node, patience_factor=0.0)


def test_a_start_that_takes_too_long_ends_at_the_deadline_and_says_what_was_seen(running: ClusterClient) -> None:
    start(running, "hang")
    with pytest.raises(DeadlineExceeded, match="starting") as caught:
        running.wait_available("web", deadline_s=5.0)
    slow = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(slow, StartTakesTooLong)
    assert Stage.SCHEDULING in {stage.stage for waterfall in slow.waterfalls for stage in waterfall.stages}


def test_a_failed_update_leaves_the_old_pod_serving_and_says_so(running: ClusterClient) -> None:
    start(running, "serve")
    report = running.wait_available("web", deadline_s=DEADLINE_S)
    start(running, "crash", "error: unrecognized arguments: --bad")
    with pytest.raises(ServerDoesNotStart, match="previous revision still serves") as caught:
        running.wait_available("web", deadline_s=DEADLINE_S)
    assert caught.value.old_pods_serving == report.pods
    change = running.rollback("web")
    assert change.detail == "back to revision 1 from 2"
    assert running.wait_available("web", deadline_s=DEADLINE_S).pods == report.pods
    assert next(revision.args for revision in running.revisions("web")) == ("serve",)


def test_there_is_nothing_to_roll_back_to_after_a_first_apply(controlled: ClusterClient) -> None:
    start(controlled, "serve")
    with pytest.raises(NotFound, match="no earlier revision"):
        controlled.rollback("web")


def test_waiting_for_what_is_not_there_fails_at_once(client: ClusterClient) -> None:
    with pytest.raises(NotFound):
        client.wait_available("nothing", deadline_s=DEADLINE_S)


def test_a_deployment_that_is_deleted_meanwhile_ends_the_wait(running: ClusterClient) -> None:
    start(running, "hang")
    timer = threading.Timer(1.0, lambda: running.delete([program(running, "hang")]))
    timer.start()
    with pytest.raises(NotFound, match="deleted while we waited"):
        running.wait_available("web", deadline_s=DEADLINE_S)
    timer.join()


Breakage = Callable[[KubernetesServer], None]


@pytest.mark.parametrize(
    "breakage",
    [
        pytest.param(lambda server: server.drop_watches(), id="dropped watches"),
        pytest.param(lambda server: server.expire_watches(), id="410 Gone in the stream"),
        pytest.param(lambda server: (server.faults.answer_gone(3), server.drop_watches()), id="410 Gone"),
        pytest.param(
            lambda server: (server.faults.answer_too_large_resource_version(3), server.drop_watches()),
            id="504 Too large resource version",
        ),
        pytest.param(lambda server: server.faults.answer_unavailable(5), id="503"),
        pytest.param(lambda server: server.go_away(1.0), id="API server away"),
    ],
)
def test_the_wait_survives_a_troubled_api_server(
    server: KubernetesServer, breakable: ClusterClient, breakage: Breakage
) -> None:
    start(breakable, "serve", "1.5")
    lines: list[LogLine] = []
    troubled = threading.Event()

    def once(line: LogLine) -> None:
        lines.append(line)
        if not troubled.is_set():
            troubled.set()
            breakage(server)

    report = breakable.wait_available("web", deadline_s=DEADLINE_S, on_log=once)
    assert report.pods
    assert troubled.is_set()


def test_the_log_goes_on_where_a_dropped_connection_cut_it(server: KubernetesServer, breakable: ClusterClient) -> None:
    start(breakable, "serve", "2.0")
    lines: list[str] = []
    done, stop = threading.Event(), threading.Event()

    def collect(line: LogLine) -> None:
        lines.append(line.text)
        if "0% Completed" in line.text:
            server.go_away(0.5)
        if "startup complete" in line.text:
            done.set()

    thread = threading.Thread(target=breakable.follow_logs, args=("web", collect, stop), daemon=True)
    thread.start()
    assert done.wait(DEADLINE_S)
    stop.set()
    assert len(lines) == len(set(lines)) == 6


# --- Endpoint ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(running: ClusterClient) -> ClusterClient:
    running.apply([namespace_of(running), program(running, "serve"), service(running)])
    running.wait_available("web", deadline_s=DEADLINE_S)
    return running


def test_the_endpoint_carries_requests_both_ways(served: ClusterClient) -> None:
    with served.endpoint("web") as url, requests.Session() as session:
        assert session.get(f"{url}/bytes/3000000", timeout=60).content == bytes(3_000_000)
        assert session.post(f"{url}/", data=bytes(2_000_000), timeout=60).text == "2000000"


def test_the_endpoint_carries_many_streams_at_once(served: ClusterClient) -> None:
    def stream(url: str) -> int:
        with requests.get(f"{url}/stream", stream=True, timeout=120) as response:
            return sum(1 for line in response.iter_lines() if line.startswith(b"data:"))

    with served.endpoint("web") as url, ThreadPoolExecutor(40) as pool:
        assert set(pool.map(stream, [url] * 80)) == {50}


def test_the_endpoint_outlives_the_pod_behind_it(served: ClusterClient) -> None:
    with served.endpoint("web") as url:
        first = requests.get(f"{url}/name", timeout=60).text
        served.api.request("DELETE", f"/api/v1/namespaces/{served.target.namespace}/pods/{first}")
        gives_up = time.monotonic() + DEADLINE_S
        second = first
        while second in (first, "") and time.monotonic() < gives_up:
            try:
                second = requests.get(f"{url}/name", timeout=60).text
            except requests.ConnectionError:
                continue
        assert second not in (first, "")


def test_the_endpoint_outlives_a_dropped_connection(server: KubernetesServer, breakable: ClusterClient) -> None:
    breakable.apply([namespace_of(breakable), program(breakable, "serve"), service(breakable)])
    breakable.wait_available("web", deadline_s=DEADLINE_S)
    with breakable.endpoint("web") as url:
        assert requests.get(f"{url}/health", timeout=60).status_code == 200
        server.go_away(1.0)
        assert requests.get(f"{url}/health", timeout=60).status_code == 200


def test_requests_go_to_all_ready_pods(running: ClusterClient) -> None:
    running.apply([namespace_of(running), program(running, "serve", replicas=2), service(running)])
    running.wait_available("web", deadline_s=DEADLINE_S)
    with running.endpoint("web") as url:
        names = {requests.get(f"{url}/name", timeout=60).text for _ in range(30)}
    assert len(names) == 2


def test_each_pod_behind_a_service_can_be_asked_alone(running: ClusterClient) -> None:
    running.apply([namespace_of(running), program(running, "serve", replicas=2), service(running)])
    report = running.wait_available("web", deadline_s=DEADLINE_S)
    for pod in report.pods:
        with running.endpoint("web", pod=pod) as url:
            assert {requests.get(f"{url}/name", timeout=60).text for _ in range(5)} == {pod}
    with pytest.raises(NotFound), running.endpoint("web", pod="nobody"):
        pass


def test_an_endpoint_needs_its_service(client: ClusterClient) -> None:
    with pytest.raises(NotFound), client.endpoint("nothing"):
        pass


# --- Connections ------------------------------------------------------------------------------------------------------


def test_a_kubeconfig_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"target\.cluster\.kubeconfig"):
        Environment(str(tmp_path / "none"), None).client()


def test_a_context_that_is_not_there_is_explained(environment: Environment) -> None:
    target = environment.client().target
    cluster = target.cluster.model_copy(update={"context": "nowhere"})
    with pytest.raises(BadInput, match="nowhere"):
        ClusterClient.connect(target.model_copy(update={"cluster": cluster}))


def test_a_gke_cluster_is_reached_by_the_address_and_certificate_that_its_api_gives(
    tmp_path: Path, serve_google_apis: Callable[..., Any], target_for: Callable[..., Target]
) -> None:
    google = serve_google_apis()
    target = target_for(google)
    with pytest.raises(NotFound, match="there is no cluster llm-serving"):
        ClusterClient.connect(target)
    with start_sandbox(tmp_path / "cluster", tls=True) as server:
        google.connect_cluster(endpoint=f"127.0.0.1:{server.port}", ca_pem=server.ca_pem)
        Gke(target).ensure()
        assert ClusterClient.connect(target).api.get("/version")["major"] == "1"


def test_an_api_server_that_stays_away_is_reported_without_the_vendors_exceptions() -> None:
    api = ClusterApi(ApiClient(Configuration(host=f"http://127.0.0.1:{free_port()}")), attempts=2)
    with pytest.raises(ClusterUnreachable, match="does not answer"):
        api.get("/version")
    with pytest.raises(ClusterUnreachable):
        next(api.follow("/api/v1/pods"))


def test_inside_another_cluster_the_endpoint_is_forwarded_all_the_same(
    served: ClusterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with served.endpoint("web") as url:
        assert url.startswith("http://127.0.0.1:")
