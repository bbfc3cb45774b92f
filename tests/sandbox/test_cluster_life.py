"""The life of workloads in the sandbox: roll-outs and how they fail, in the order and words of a real cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, watch

from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.cluster.nodes import MACHINES
from sandbox.processes import Child
from tests.sandbox.cluster_support import Connection, deployment, eventually, sandbox

H100_NODE = next(each for each in MACHINES if each.name == "a3-edgegpu-8g-nolssd")
READINESS = {"readinessProbe": {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 1}}
EVICTION = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 10120387530, available: 303108Ki. "
    "Container c was using 92343412Ki, request is 0, has larger consumption of ephemeral-storage."
)
REPORT_DISK = (
    "import os, time; "
    "open(os.environ['SANDBOX_EPHEMERAL_STORAGE_FILE'], 'w').write(str(92343412 * 1024)); "
    "time.sleep(600)"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KubernetesServer, Connection]]:
    nodes = NodeSettings(creation_s=0.1, gpu_quota=64, ephemeral_storage="80Gi")
    with sandbox(tmp_path_factory.mktemp("life"), nodes=nodes) as both:
        yield both


@pytest.fixture
def server(cluster: tuple[KubernetesServer, Connection]) -> KubernetesServer:
    return cluster[0]


@pytest.fixture
def api(cluster: tuple[KubernetesServer, Connection]) -> Connection:
    return cluster[1]


@pytest.fixture
def namespace(api: Connection) -> Iterator[str]:
    with api.namespace() as name:
        yield name


def pods(api: Connection, namespace: str) -> list[Any]:
    return api.core.list_namespaced_pod(namespace).items


def state(pod: Any) -> Any:
    statuses = pod.status.container_statuses
    return statuses[0].state if statuses else client.V1ContainerState()


def first_pod(api: Connection, namespace: str, check: Callable[[Any], object], what: str) -> Any:
    def look() -> Any:
        return next((pod for pod in pods(api, namespace) if check(pod)), None)

    return eventually(look, what)


def waiting_for(api: Connection, namespace: str, reason: str) -> Any:
    """The pod whose container waits for `reason`."""

    def check(pod: Any) -> bool:
        return state(pod).waiting is not None and state(pod).waiting.reason == reason

    return first_pod(api, namespace, check, reason)


def available(api: Connection, namespace: str, name: str = "web") -> Any:
    def look() -> Any:
        found = api.apps.read_namespaced_deployment(name, namespace)
        status = found.status
        fresh = status.observed_generation == found.metadata.generation
        counts = {status.replicas, status.updated_replicas, status.available_replicas}
        return found if fresh and counts == {found.spec.replicas} else None

    return eventually(look, f"{name} is available")


def messages(api: Connection, namespace: str, reason: str) -> list[str]:
    return [each.message for each in api.core.list_namespaced_event(namespace).items if each.reason == reason]


def told(api: Connection, namespace: str, reason: str) -> str:
    """The message of the first event with a reason, once it is there."""
    return str(eventually(lambda: messages(api, namespace, reason), reason)[0])


class Recording:
    """The watch events of a namespace, as they come."""

    def __init__(self, api: Connection, namespace: str) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        lists = {
            "deployment": api.apps.list_namespaced_deployment,
            "replicaset": api.apps.list_namespaced_replica_set,
            "pod": api.core.list_namespaced_pod,
        }
        for kind, listing in lists.items():
            threading.Thread(target=self._read, args=(kind, listing, namespace), daemon=True).start()

    def _read(self, kind: str, listing: Any, namespace: str) -> None:
        for event in watch.Watch().stream(listing, namespace, timeout_seconds=120):
            self.seen.append((kind, event["type"], event["object"]))

    def of(self, kind: str) -> list[tuple[str, Any]]:
        return [(change, obj) for seen, change, obj in self.seen if seen == kind]


def distinct(values: list[Any]) -> list[Any]:
    """Without repetitions in a row."""
    return [value for at, value in enumerate(values) if at == 0 or values[at - 1] != value]


def test_a_rollout_goes_through_the_phases_of_a_real_one(api: Connection, namespace: str) -> None:
    recording = Recording(api, namespace)
    api.apps.create_namespaced_deployment(namespace, deployment(**READINESS))
    available(api, namespace)

    def progress() -> list[str]:
        conditions = [obj.status.conditions or [] for _, obj in recording.of("deployment")]
        return distinct([each.reason for found in conditions for each in found if each.type == "Progressing"])

    done = ["NewReplicaSetCreated", "ReplicaSetUpdated", "NewReplicaSetAvailable"]
    eventually(lambda: progress() == done, "the whole rollout was watched")
    assert next(change for change, _ in recording.of("pod")) == "ADDED"
    phases = distinct([obj.status.phase for _, obj in recording.of("pod")])
    assert phases == ["Pending", "Running"]
    reasons = [each.reason for each in api.core.list_namespaced_event(namespace).items]
    order = ["ScalingReplicaSet", "SuccessfulCreate", "Scheduled", "Pulling", "Pulled", "Created", "Started"]
    events = sorted(
        api.core.list_namespaced_event(namespace).items, key=lambda each: int(each.metadata.resource_version)
    )
    assert [each.reason for each in events if each.reason in order] == order
    assert set(order) <= set(reasons)
    rolled = api.apps.list_namespaced_replica_set(namespace).items[0]
    assert rolled.metadata.annotations == {
        "deployment.kubernetes.io/desired-replicas": "1",
        "deployment.kubernetes.io/max-replicas": "2",
        "deployment.kubernetes.io/revision": "1",
    }


def test_a_changed_image_rolls_and_the_old_pod_serves_until_the_new_one_does(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment(**READINESS))
    available(api, namespace)
    recording = Recording(api, namespace)
    change = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "web:2"}]}}}}
    api.apps.patch_namespaced_deployment("web", namespace, change)
    after = available(api, namespace)
    assert after.metadata.annotations["deployment.kubernetes.io/revision"] == "2"
    assert min(obj.status.available_replicas or 0 for _, obj in recording.of("deployment")) == 1
    images = [pod.spec.containers[0].image for pod in pods(api, namespace) if not pod.metadata.deletion_timestamp]
    assert images == ["web:2"]
    scaled = messages(api, namespace, "ScalingReplicaSet")
    assert [text.split()[1] for text in scaled] == ["up", "up", "down"]


def test_a_rollback_returns_to_the_old_replica_set(api: Connection, namespace: str) -> None:
    for image in ("web:1", "web:2", "web:1"):
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments/web?fieldManager=t&force=true"
        api.request("PATCH", path, deployment(image=image, **READINESS), "application/apply-patch+yaml")
        after = available(api, namespace)
    assert after.metadata.annotations["deployment.kubernetes.io/revision"] == "3"
    sets = {
        each.spec.template.spec.containers[0].image: each
        for each in api.apps.list_namespaced_replica_set(namespace).items
    }
    assert {image: each.spec.replicas for image, each in sets.items()} == {"web:1": 1, "web:2": 0}
    assert sets["web:1"].metadata.annotations["deployment.kubernetes.io/revision-history"] == "1"


def test_recreate_ends_the_old_pod_before_it_starts_the_new_one(api: Connection, namespace: str) -> None:
    body = deployment()
    body["spec"]["strategy"] = {"type": "Recreate"}
    api.apps.create_namespaced_deployment(namespace, body)
    available(api, namespace)
    recording = Recording(api, namespace)
    change = {"spec": {"template": {"spec": {"containers": [{"name": "c", "image": "web:2"}]}}}}
    api.apps.patch_namespaced_deployment("web", namespace, change)
    available(api, namespace)

    def order() -> list[tuple[str, str]]:
        steps = [(change, obj.spec.containers[0].image) for change, obj in recording.of("pod")]
        return [step for step in steps if step in (("DELETED", "web:1"), ("ADDED", "web:2"))]

    assert eventually(lambda: len(order()) == 2 and order()) == [("DELETED", "web:1"), ("ADDED", "web:2")]


def test_deleting_a_deployment_takes_its_replica_sets_and_pods_along(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment())
    available(api, namespace)
    api.apps.delete_namespaced_deployment("web", namespace, propagation_policy="Foreground")
    eventually(lambda: not pods(api, namespace), "the pods are gone")
    eventually(lambda: not api.apps.list_namespaced_deployment(namespace).items, "the deployment is gone")
    assert api.apps.list_namespaced_replica_set(namespace).items == []


def test_a_deleted_namespace_takes_everything_along(server: KubernetesServer, api: Connection) -> None:
    with api.namespace() as name:
        api.apps.create_namespaced_deployment(name, deployment())
        available(api, name)
        api.core.delete_namespace(name)
        eventually(lambda: api.request("GET", f"/api/v1/namespaces/{name}").status == 404, "the namespace is gone")
    assert api.core.list_namespaced_pod(name).items == []


def test_a_crash_loop_backs_off_and_the_deadline_says_so(api: Connection, namespace: str) -> None:
    body = deployment(image="crash:1", terminationMessagePolicy="FallbackToLogsOnError", **READINESS)
    body["spec"]["progressDeadlineSeconds"] = 1
    api.apps.create_namespaced_deployment(namespace, body)
    pod = waiting_for(api, namespace, "CrashLoopBackOff")
    status = pod.status.container_statuses[0]
    assert pod.status.phase == "Running"
    assert status.restart_count >= 1
    assert (status.last_state.terminated.exit_code, status.last_state.terminated.reason) == (1, "Error")
    assert status.last_state.terminated.message == "ValueError: no such model"
    where = f"{pod.metadata.name}_{namespace}({pod.metadata.uid})"
    assert told(api, namespace, "BackOff") == f"Back-off restarting failed container c in pod {where}"

    def timed_out() -> Any:
        conditions = api.apps.read_namespaced_deployment("web", namespace).status.conditions or []
        return next((each for each in conditions if each.reason == "ProgressDeadlineExceeded"), None)

    condition = eventually(timed_out, "the deadline has passed")
    owner = pod.metadata.owner_references[0].name
    assert (condition.status, condition.message) == ("False", f'ReplicaSet "{owner}" has timed out progressing.')
    log = api.core.read_namespaced_pod_log(pod.metadata.name, namespace, previous=True)
    assert log == "ValueError: no such model\n"


def test_an_image_that_does_not_exist_cannot_be_pulled(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment(image="nobody/knows:1"))
    pod = waiting_for(api, namespace, "ImagePullBackOff")
    assert state(pod).waiting.message.startswith('Back-off pulling image "nobody/knows:1"')
    assert messages(api, namespace, "Failed")[0].startswith('Failed to pull image "nobody/knows:1": rpc error')
    with pytest.raises(client.ApiException, match="is waiting to start: trying and failing to pull image"):
        api.core.read_namespaced_pod_log(pod.metadata.name, namespace)


def test_a_registry_that_refuses_is_named_and_forgiven(
    server: KubernetesServer, api: Connection, namespace: str
) -> None:
    server.fail_pulls("web:private", "failed to authorize: 403 Forbidden")
    api.apps.create_namespaced_deployment(namespace, deployment(image="web:private"))
    pod = waiting_for(api, namespace, "ImagePullBackOff")
    assert "403 Forbidden" in state(pod).waiting.message
    server.allow_pulls("web:private")
    available(api, namespace)


def test_a_missing_secret_stops_the_container_until_it_is_there(api: Connection, namespace: str) -> None:
    reference = {"secretKeyRef": {"name": "hf-secret", "key": "token"}}
    code = "import os, time; print(*map(os.environ.get, ('HF_TOKEN', 'ME', 'BOTH')), flush=True); time.sleep(600)"
    variables = [
        {"name": "HF_TOKEN", "valueFrom": reference},
        {"name": "ME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": "BOTH", "value": "$(HF_TOKEN)-$$"},
    ]
    body = deployment(image="python:1", args=[code], env=variables)
    api.apps.create_namespaced_deployment(namespace, body)
    pod = waiting_for(api, namespace, "CreateContainerConfigError")
    assert state(pod).waiting.message == 'secret "hf-secret" not found'
    api.core.create_namespaced_secret(namespace, {"metadata": {"name": "hf-secret"}, "stringData": {"token": "hf_x"}})
    available(api, namespace)
    log = eventually(lambda: api.core.read_namespaced_pod_log(pod.metadata.name, namespace))
    assert log == f"hf_x {namespace} hf_x-$\n"


def test_an_out_of_memory_kill_has_its_reason(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment(image="oom:1"))
    pod = waiting_for(api, namespace, "CrashLoopBackOff")
    ended = pod.status.container_statuses[0].last_state.terminated
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")


def test_an_entry_point_that_is_not_there_is_a_start_error(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment(image="lost:1"))
    pod = waiting_for(api, namespace, "CrashLoopBackOff")
    ended = pod.status.container_statuses[0].last_state.terminated
    assert (ended.exit_code, ended.reason) == (128, "StartError")
    assert 'exec: "/no/such/program": No such file or directory' in ended.message


def test_too_much_local_disk_evicts_the_pod_and_another_one_comes(api: Connection, namespace: str) -> None:
    api.apps.create_namespaced_deployment(namespace, deployment(image="python:1", args=[REPORT_DISK]))
    pod = first_pod(api, namespace, lambda each: each.status.reason == "Evicted", "an evicted pod")
    assert (pod.status.phase, pod.status.message) == ("Failed", EVICTION)
    assert told(api, namespace, "Evicted") == EVICTION
    eventually(lambda: len(pods(api, namespace)) >= 2, "the replacement")


def test_a_startup_probe_that_never_passes_restarts_the_container(api: Connection, namespace: str) -> None:
    probe = {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1}
    slow = "import time; time.sleep(600)"
    api.apps.create_namespaced_deployment(namespace, deployment(image="python:1", args=[slow], startupProbe=probe))
    failed = told(api, namespace, "Unhealthy")
    assert failed.startswith('Startup probe failed: Get "http://10.')
    assert failed.endswith(":8080: connect: connection refused")
    assert told(api, namespace, "Killing") == "Container c failed startup probe, will be restarted"
    restarted = first_pod(
        api, namespace, lambda each: (each.status.container_statuses or [None])[0].restart_count > 0, "a restart"
    )
    assert restarted.status.container_statuses[0].ready is False


def test_a_liveness_probe_restarts_what_hangs(api: Connection, namespace: str) -> None:
    code = "import time; print('hanging', flush=True); time.sleep(600)"
    probe = {"exec": {"command": ["sh", "-c", "echo stuck; exit 1"]}, "periodSeconds": 1, "failureThreshold": 1}
    body = deployment(image="python:1", args=[code], livenessProbe=probe)
    body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    api.apps.create_namespaced_deployment(namespace, body)
    assert told(api, namespace, "Unhealthy") == "Liveness probe failed: stuck\n"
    assert told(api, namespace, "Killing") == "Container c failed liveness probe, will be restarted"
    first_pod(api, namespace, lambda each: each.status.container_statuses[0].restart_count > 0, "a restart")


def test_the_grace_period_lets_running_answers_finish(api: Connection, namespace: str) -> None:
    code = (
        "import signal, sys, time\n"
        "def stop(*_): print('finishing', flush=True); time.sleep(0.2); print('done', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); print('serving', flush=True)\n"
        "while True: time.sleep(1)"
    )
    hook = {"preStop": {"sleep": {"seconds": 1}}}
    api.apps.create_namespaced_deployment(namespace, deployment(image="python:1", args=[code], lifecycle=hook))
    available(api, namespace)
    name = pods(api, namespace)[0].metadata.name
    eventually(lambda: "serving" in api.core.read_namespaced_pod_log(name, namespace), "it serves")
    lines: list[str] = []

    def follow() -> None:
        stream = api.core.read_namespaced_pod_log(name, namespace, follow=True, _preload_content=False)
        lines.extend(line.decode().strip() for line in stream)

    reader = threading.Thread(target=follow)
    reader.start()
    api.apps.delete_namespaced_deployment("web", namespace)
    reader.join(60)
    assert lines == ["serving", "finishing", "done"]


def test_a_pod_that_no_node_can_take_says_why(api: Connection, namespace: str) -> None:
    body = deployment()
    body["spec"]["template"]["spec"]["nodeSelector"] = {"cloud.google.com/compute-class": "no-such-class"}
    api.apps.create_namespaced_deployment(namespace, body)
    message = told(api, namespace, "FailedScheduling")
    assert message == "no nodes available to schedule pods" or "didn't match Pod's node affinity/selector" in message
    assert told(api, namespace, "NotTriggerScaleUp").startswith("pod didn't trigger scale-up")
    condition = pods(api, namespace)[0].status.conditions[0]
    assert (condition.type, condition.status, condition.reason) == ("PodScheduled", "False", "Unschedulable")


@pytest.mark.parametrize(
    ("limits", "cause"), [({"gpu_quota": 0}, "GCE quota exceeded"), ({"gpus_in_stock": 0}, "GCE out of resources")]
)
def test_a_node_that_the_cloud_refuses_is_named(tmp_path: Path, limits: dict[str, int], cause: str) -> None:
    nodes = NodeSettings(creation_s=0.1, **limits)  # type: ignore[arg-type]
    with sandbox(tmp_path, nodes=nodes) as (server, api), api.namespace() as namespace:
        api.apps.create_namespaced_deployment(namespace, deployment())
        message = told(api, namespace, "FailedScaleUp")
        assert message == (
            f"Node scale up in zones u-france-east1-b associated with this pod failed: {cause}. "
            "Pod is at risk of not being scheduled."
        )
        server.nodes.gpu_quota, server.nodes.gpus_in_stock = 16, None
        available(api, namespace)


def test_a_compute_class_brings_its_machine_and_an_empty_one_goes(tmp_path: Path) -> None:
    nodes = NodeSettings(creation_s=0.1, removal_s=0.5)
    with sandbox(tmp_path, nodes=nodes) as (_, api), api.namespace() as namespace:
        priorities = [{"machineType": H100_NODE.name, "gpu": {"count": 8, "type": "nvidia-h100-80gb"}}]
        spec = {"priorities": priorities, "nodePoolAutoCreation": {"enabled": True}}
        compute_class = {"apiVersion": "cloud.google.com/v1", "kind": "ComputeClass", "metadata": {"name": "h100"}}
        api.custom.create_cluster_custom_object(
            "cloud.google.com", "v1", "computeclasses", compute_class | {"spec": spec}
        )
        body = deployment()
        body["spec"]["replicas"] = 2
        body["spec"]["template"]["spec"]["nodeSelector"] = {"cloud.google.com/compute-class": "h100"}
        api.apps.create_namespaced_deployment(namespace, body)
        available(api, namespace)
        node = api.core.list_node().items
        assert [each.metadata.labels["cloud.google.com/gke-accelerator"] for each in node] == ["nvidia-h100-80gb"]
        assert node[0].status.allocatable["nvidia.com/gpu"] == "8"
        assert told(api, namespace, "TriggeredScaleUp").startswith("pod triggered scale-up: [{https://")
        api.apps.delete_namespaced_deployment("web", namespace)
        eventually(lambda: not api.core.list_node().items, "the empty node is gone")


def test_a_lost_node_takes_its_pods_and_they_come_back_elsewhere(tmp_path: Path) -> None:
    with sandbox(tmp_path) as (server, api), api.namespace() as namespace:
        first = server.add_node(H100_NODE)
        api.apps.create_namespaced_deployment(namespace, deployment())
        available(api, namespace)
        assert pods(api, namespace)[0].spec.node_name == first
        server.lose_node(first)
        moved = first_pod(api, namespace, lambda pod: pod.spec.node_name not in (None, first), "a pod on another node")
        assert moved.spec.node_name != first
        available(api, namespace)


def test_services_point_at_ready_pods_only(api: Connection, namespace: str) -> None:
    service = {"metadata": {"name": "svc"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 8080}]}}
    api.core.create_namespaced_service(namespace, service)
    api.apps.create_namespaced_deployment(namespace, deployment(**READINESS))
    available(api, namespace)
    slices = client.DiscoveryV1Api(api.api_client)

    def ready() -> Any:
        found = slices.list_namespaced_endpoint_slice(namespace, label_selector="kubernetes.io/service-name=svc").items
        return [each for one in found for each in one.endpoints or [] if each.conditions.ready]

    endpoint = eventually(ready, "a ready endpoint")[0]
    assert endpoint.addresses == [pods(api, namespace)[0].status.pod_ip]
    answer = api.request("GET", f"/api/v1/namespaces/{namespace}/services/svc:8080/proxy/health")
    assert answer.body.startswith("hello from web-")


def job(image: str, args: list[str], **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": image, "args": args}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"metadata": {"name": "j"}, "spec": {"template": template, **spec}}


def finished(api: Connection, namespace: str) -> Any:
    def look() -> Any:
        found = api.batch.read_namespaced_job("j", namespace)
        kinds = {each.type for each in found.status.conditions or []}
        return found if kinds & {"Complete", "Failed"} else None

    return eventually(look, "the job has ended")


def test_an_indexed_job_gives_every_pod_its_index(api: Connection, namespace: str) -> None:
    code = "import os; print('index', os.environ['JOB_COMPLETION_INDEX'])"
    body = job("python:1", [code], completions=3, parallelism=2, completionMode="Indexed")
    api.batch.create_namespaced_job(namespace, body)
    done = finished(api, namespace)
    assert (done.status.succeeded, done.status.completed_indexes) == (3, "0,1,2")
    logs = {api.core.read_namespaced_pod_log(pod.metadata.name, namespace) for pod in pods(api, namespace)}
    assert logs == {"index 0\n", "index 1\n", "index 2\n"}


def test_a_job_gives_up_at_its_back_off_limit(api: Connection, namespace: str) -> None:
    api.batch.create_namespaced_job(namespace, job("crash:1", [], backoffLimit=1))
    failed = finished(api, namespace)
    condition = next(each for each in failed.status.conditions if each.type == "Failed")
    assert (condition.reason, condition.message) == (
        "BackoffLimitExceeded",
        "Job has reached the specified backoff limit",
    )
    assert failed.status.failed == 2


def test_an_index_that_fails_too_often_fails_the_job_when_none_may_fail(api: Connection, namespace: str) -> None:
    code = "import os, sys, time; sys.exit(3) if os.environ['JOB_COMPLETION_INDEX'] == '1' else time.sleep(600)"
    limits = {"backoffLimitPerIndex": 1, "maxFailedIndexes": 0}
    body = job("python:1", [code], completions=3, parallelism=3, completionMode="Indexed", **limits)
    api.batch.create_namespaced_job(namespace, body)
    status = finished(api, namespace).status
    assert status.conditions[-1].reason == "MaxFailedIndexesExceeded"
    assert status.failed_indexes == "1"
    assert status.failed == 2, "one try more than the limit"


def test_the_other_indexes_go_on_when_some_may_fail(api: Connection, namespace: str) -> None:
    code = "import os, sys; sys.exit(3) if os.environ['JOB_COMPLETION_INDEX'] == '0' else None"
    limits = {"backoffLimitPerIndex": 0}
    body = job("python:1", [code], completions=3, parallelism=1, completionMode="Indexed", **limits)
    api.batch.create_namespaced_job(namespace, body)
    status = finished(api, namespace).status
    assert status.conditions[-1].reason == "FailedIndexes"
    assert (status.failed_indexes, status.completed_indexes) == ("0", "1,2")


@pytest.mark.parametrize(
    "spec",
    [
        {"backoffLimitPerIndex": 1},
        {"completionMode": "Indexed", "completions": 2, "maxFailedIndexes": 1},
    ],
)
def test_limits_for_each_index_need_indexes(api: Connection, namespace: str, spec: dict[str, Any]) -> None:
    with pytest.raises(client.ApiException, match="backoffLimitPerIndex"):
        api.batch.create_namespaced_job(namespace, job("python:1", ["pass"], **spec))


def test_a_finished_job_goes_after_its_time_to_live(api: Connection, namespace: str) -> None:
    api.batch.create_namespaced_job(namespace, job("python:1", ["pass"], ttlSecondsAfterFinished=0))
    eventually(lambda: not api.batch.list_namespaced_job(namespace).items, "the job is gone")
    eventually(lambda: not pods(api, namespace), "its pod is gone")


def test_init_containers_run_first(api: Connection, namespace: str) -> None:
    body = deployment()
    init = {"name": "prepare", "image": "python:1", "args": ["print('prepared')"]}
    body["spec"]["template"]["spec"]["initContainers"] = [init]
    api.apps.create_namespaced_deployment(namespace, body)
    available(api, namespace)
    name = pods(api, namespace)[0].metadata.name
    assert api.core.read_namespaced_pod_log(name, namespace, container="prepare") == "prepared\n"


def test_pods_know_who_and_where_they_are(api: Connection, namespace: str) -> None:
    account = {"metadata": {"name": "ksa", "annotations": {"iam.gke.io/gcp-service-account": "g@p.iam"}}}
    api.core.create_namespaced_service_account(namespace, account)
    code = "import os; print(*(os.environ['SANDBOX_' + n] for n in ('IDENTITY', 'GPU', 'GPU_COUNT')), flush=True); "
    body = deployment(image="python:1", args=[code + "import time; time.sleep(600)"])
    spec = body["spec"]["template"]["spec"]
    spec["serviceAccountName"] = "ksa"
    spec["nodeSelector"] = {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    api.apps.create_namespaced_deployment(namespace, body)
    available(api, namespace)
    name = pods(api, namespace)[0].metadata.name
    log = eventually(lambda: api.core.read_namespaced_pod_log(name, namespace))
    assert log == "serviceAccount:g@p.iam nvidia-h100-80gb 1\n"


def test_a_pod_that_asks_for_tpus_gets_a_slice_of_one_host_and_sees_its_mounted_bucket(
    api: Connection, namespace: str
) -> None:
    code = "import os; print(*(os.environ['SANDBOX_' + n] for n in ('GPU', 'GPU_COUNT', 'MOUNTS')), flush=True); "
    code += "import socket; s = socket.create_server(('127.0.0.1', int(os.environ['SANDBOX_HOST_PORT']))); "
    body = deployment(
        image="python:1",
        args=[code + "import time; time.sleep(600)"],
        resources={"limits": {"google.com/tpu": "4"}, "requests": {"google.com/tpu": "4"}},
        readinessProbe={"grpc": {"port": 8080}, "periodSeconds": 1},
        volumeMounts=[{"name": "model", "mountPath": "/data"}],
    )
    attributes = {"bucketName": "models", "mountOptions": "implicit-dirs,only-dir:org/llama"}
    spec = body["spec"]["template"]["spec"]
    spec["volumes"] = [
        {"name": "model", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    ]
    spec["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x2",
    }
    api.apps.create_namespaced_deployment(namespace, body)
    available(api, namespace)
    (pod,) = pods(api, namespace)
    node = api.core.read_node(pod.spec.node_name)
    assert node.metadata.labels["node.kubernetes.io/instance-type"] == "ct6e-standard-4t"
    assert {taint.key for taint in node.spec.taints} == {"google.com/tpu"}
    log = api.core.read_namespaced_pod_log(pod.metadata.name, namespace)
    assert log == 'tpu-v6e-slice 4 {"/data": "gs://models/org/llama"}\n'


def test_no_container_outlives_the_cluster_process(tmp_path: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    command = [sys.executable, "-m", "sandbox.cluster", "--root", str(tmp_path), "--image-pull-s", "0"]
    command += ["--node-creation-s", "0", "--kubeconfig", str(tmp_path / "kubeconfig")]
    command += ["--runner", f"python:={sys.executable} -c"]
    with Child(command, log=tmp_path / "cluster.log") as process:
        process.ready_line(60)
        api = Connection(tmp_path / "kubeconfig")
        eventually(lambda: api.core.list_namespaced_service_account("default").items, "the default account")
        api.apps.create_namespaced_deployment("default", deployment(image="python:1", args=[code]))
        available(api, "default")
        name = pods(api, "default")[0].metadata.name
        pid = int(eventually(lambda: api.core.read_namespaced_pod_log(name, "default")))
        process.process.kill()
        process.process.wait()
    eventually(lambda: not _runs(pid), "the container has ended")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not shown.strip().startswith("Z")
