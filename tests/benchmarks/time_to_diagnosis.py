"""How long it takes from applying a faulty rollout to its diagnosis, for every kind of fault.

    python -m tests.benchmarks.time_to_diagnosis

Runs against the sandbox's cluster, in which nodes, images and containers come at once, so that the time is that of
noticing and not of the cloud. "told" is when the wait first names the fault, which is when the rollout warns and shows
its artifact; "end" is when the wait gives up with no patience at all. A fault that may heal gets the patience of its
category first: in a rollout the end comes about that much later, which is stated and not waited for here.
What our own calls get is measured from the call to its explanation. Prints a markdown table. For comparison: the
tutorial's `kubectl wait --timeout=1800s` says after 1800 s that the condition was not met.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_wait import Progress, ServerDoesNotStart
from rollout.clients.openai_api import OpenAiApi
from rollout.clients.recommender import Recommender
from rollout.diagnosis import PATIENCE_S, Category, diagnose_client_error
from rollout.errors import RolloutError
from rollout.rendering import KubernetesObject
from rollout.target import Cluster, ClusterMode, CredentialSource, Endpoints, Target
from sandbox.cluster import KubernetesServer, NodeSettings
from sandbox.cluster.nodes import Machine
from sandbox.recommender import RecommenderServer

DEADLINE_S = 120.0
PROGRAM = Path(__file__).parents[1] / "clients" / "pod_program.py"
GPU = {"limits": {"nvidia.com/gpu": "1"}}
HEALTH = {"httpGet": {"path": "/health", "port": 8080}, "periodSeconds": 1}
SECRET = {"secretKeyRef": {"name": "hf-token", "key": "hf_api_token"}}
DENIED = "does not have storage.objects.get access to the Google Cloud Storage object."


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a container that logs `log` and exits, or a setting of the cluster, pod or container."""

    category: Category
    log: str = ""
    args: tuple[str, ...] = ("hang",)
    container: dict[str, Any] = field(default_factory=dict)
    image: str = "test/server:1"
    pod: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[KubernetesServer], None] = lambda server: None


def no_quota(server: KubernetesServer) -> None:
    server.nodes.gpu_quota = 0


def no_stock(server: KubernetesServer) -> None:
    server.nodes.gpus_in_stock = 0


def forbidden_registry(server: KubernetesServer) -> None:
    server.fail_pulls("test/", "failed to authorize: failed to fetch oauth token: 403 Forbidden")


def broken_registry(server: KubernetesServer) -> None:
    server.fail_pulls("test/", "dial tcp 203.0.113.1:443: i/o timeout")


def no_quota_in_namespace(server: KubernetesServer) -> None:
    server.deny("pods", "exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4")


def warden(server: KubernetesServer) -> None:
    server.deny("pods", 'admission webhook "warden" denied the request: GKE Warden rejected the request because …')


def no_service_account(server: KubernetesServer) -> None:
    server.deny("pods", 'error looking up service account default/gemma-ksa: serviceaccount "gemma-ksa" not found')


def nodes_of_another_class(server: KubernetesServer) -> None:
    """Its taint keeps the pod away, and nothing makes other nodes."""
    server.nodes.auto_creation = False
    server.add_node(Machine("a3-edgegpu-8g-nolssd", 208, 1872, "nvidia-h100-80gb", 8), "edge")


def nodes_that_die(server: KubernetesServer) -> None:
    """The first node that comes goes silent a moment later."""
    server.agent_settings.node_loss_s = DEADLINE_S
    name = server.add_node(Machine("a3-edgegpu-8g-nolssd", 208, 1872, "nvidia-h100-80gb", 8))
    threading.Timer(2.0, lambda: server.lose_node(name)).start()


FAULTS = (
    Fault(Category.UNKNOWN_ARGUMENT, "api_server.py: error: unrecognized arguments: --max-modle-len=16384"),
    Fault(Category.WRONG_MODEL_PATH, "huggingface_hub.errors.HFValidationError: Repo id must use …: '/data'."),
    Fault(Category.WEIGHTS_INCOMPLETE, "FileNotFoundError: Weight files referenced in index but missing: {'a'}"),
    Fault(Category.UNSUPPORTED_MODEL, "ValueError: Model architectures ['X'] are not supported for now."),
    Fault(Category.GATED_MODEL, "OSError: You are trying to access a gated repo."),
    Fault(Category.BUCKET_MISSING, "google.api_core.exceptions.NotFound: 404 The specified bucket does not exist."),
    Fault(Category.BUCKET_FORBIDDEN, f"Forbidden: 403 gemma-gsa@p.iam.gserviceaccount.com {DENIED}"),
    Fault(Category.IDENTITY_NOT_BOUND, "RefreshError: Permission 'iam.serviceAccounts.getAccessToken' denied"),
    Fault(
        Category.CONTEXT_TOO_LONG,
        "ValueError: User-specified max_model_len (9) is greater than the derived max_model_len"
        " (max_position_embeddings=8.0 or model_max_length=None)",
    ),
    Fault(Category.KV_CACHE_TOO_SMALL, "ValueError: No available memory for the cache blocks."),
    Fault(Category.GPU_OUT_OF_MEMORY, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB."),
    Fault(Category.TOO_FEW_GPUS, "RuntimeError: World size (2) is larger than the number of available GPUs (1)"),
    Fault(Category.GPU_DRIVER, "RuntimeError: CUDA driver version is insufficient for CUDA runtime version"),
    Fault(Category.EXECUTABLE_MISSING, "python: No module named vllm.entrypoints.api_server"),
    Fault(Category.CRASH_LOOP, "ZeroDivisionError: division by zero"),
    Fault(Category.OUT_OF_MEMORY, args=("exit", "137")),
    Fault(
        Category.EPHEMERAL_STORAGE,
        args=("fill", str(90 * 2**30)),
        resources={"limits": {"ephemeral-storage": "80Gi"}},
    ),
    Fault(Category.STARTUP_PROBE, container={"startupProbe": {**HEALTH, "failureThreshold": 1}}),
    Fault(Category.CONTAINER_CONFIG, container={"env": [{"name": "HF_TOKEN", "valueFrom": SECRET}]}),
    Fault(Category.IMAGE_NOT_FOUND, image="nowhere/none:1"),
    Fault(Category.IMAGE_FORBIDDEN, prepare=forbidden_registry),
    Fault(Category.IMAGE_PULL, prepare=broken_registry),
    Fault(Category.QUOTA_EXCEEDED, resources=GPU, prepare=no_quota),
    Fault(Category.STOCK_OUT, resources=GPU, prepare=no_stock),
    Fault(Category.NO_GPU_NODE, resources={"limits": {"nvidia.com/gpu": "64"}}),
    Fault(Category.UNSCHEDULABLE, resources={"requests": {"cpu": "9000"}}),
    Fault(Category.UNTOLERATED_TAINT, resources=GPU, prepare=nodes_of_another_class),
    Fault(Category.NODE_LOST, resources=GPU, prepare=nodes_that_die),
    Fault(Category.AUTOPILOT_LIMIT, prepare=warden),
    Fault(Category.POD_REFUSED, prepare=no_service_account),
    Fault(Category.QUOTA_EXCEEDED, prepare=no_quota_in_namespace),
    Fault(Category.CRASH_LOOP, args=("exit", "0")),
    Fault(Category.COMPUTE_CLASS_MISSING, pod={"nodeSelector": {"cloud.google.com/compute-class": "none"}}),
)


@dataclass(frozen=True)
class Measured:
    category: Category
    found: str
    told_s: float | None
    end_s: float


def main() -> None:
    print("| Fault | diagnosed as | told after s | end after s | patience s |\n|---|---|---:|---:|---:|")
    for row in chain(measure(), our_own_calls()):
        told = "–" if row.told_s is None else f"{row.told_s:.1f}"
        patience = PATIENCE_S.get(row.category, 0.0)
        print(f"| {row.category} | {row.found} | {told} | {row.end_s:.1f} | {patience:.0f} |", flush=True)


def our_own_calls() -> Iterator[Measured]:
    """An endpoint at which nothing listens, one that hangs up, and a recommender without a quota project."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=_hang_up, args=(listener,), daemon=True).start()
        yield measure_call(Category.SERVER_NOT_READY, lambda: OpenAiApi(url).get("/health"))
    yield measure_call(Category.CONNECTION_REFUSED, lambda: OpenAiApi(url).get("/health"))
    with RecommenderServer(requires_quota_project=True) as server:
        target = Target(
            name="benchmark",
            project="my-project",
            region="here",
            bucket="weights",
            credentials=CredentialSource.ANONYMOUS,
            endpoints=Endpoints(gkerecommender=server.url),
        )
        yield measure_call(Category.QUOTA_PROJECT, lambda: Recommender(target).models())


def _hang_up(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.close()


def measure_call(category: Category, call: Callable[[], object]) -> Measured:
    """From the call to its explanation; there is no wait to end."""
    started = time.monotonic()
    found = "nothing"
    try:
        call()
    except RolloutError as error:
        diagnosis = diagnose_client_error(str(error))
        found = diagnosis.category.value if diagnosis else "nothing"
    took_s = time.monotonic() - started
    return Measured(category, found, took_s, took_s)


def measure(faults: Sequence[Fault] = FAULTS) -> Iterator[Measured]:
    for fault in faults:
        with tempfile.TemporaryDirectory() as root:
            server = KubernetesServer(
                Path(root),
                runners={"test/": (sys.executable, str(PROGRAM))},
                image_pull_s=0.0,
                backoff_s=1.0,
                nodes=NodeSettings(creation_s=0.0),
            )
            with server:
                fault.prepare(server)
                yield measure_one(fault, server, Path(root))


def measure_one(fault: Fault, server: KubernetesServer, root: Path) -> Measured:
    cluster = Cluster(mode=ClusterMode.KUBECONFIG, kubeconfig=str(server.kubeconfig(root / "kubeconfig")))
    target = Target(name="benchmark", project="my-project", region="here", bucket="weights", cluster=cluster)
    client = ClusterClient.connect(target)
    started = time.monotonic()
    client.apply([deployment(fault)])
    seen: dict[Category, float] = {}

    def note(progress: Progress) -> None:
        if progress.diagnosis:
            seen.setdefault(progress.diagnosis.category, time.monotonic() - started)

    try:
        client.wait_available("server", deadline_s=DEADLINE_S, on_progress=note, patience_factor=0.0)
        found = "nothing"
    except ServerDoesNotStart as failure:
        found = failure.diagnosis.category.value if failure.diagnosis else "nothing"
    return Measured(fault.category, found, seen.get(fault.category), time.monotonic() - started)


def deployment(fault: Fault) -> KubernetesObject:
    args = ["crash", "Traceback (most recent call last):", fault.log] if fault.log else list(fault.args)
    container = {
        "name": "inference-server",
        "image": fault.image,
        "args": args,
        "resources": fault.resources,
        "readinessProbe": HEALTH,
        **fault.container,
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "server", "namespace": "default"},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"app": "server"}},
            "template": {
                "metadata": {"labels": {"app": "server"}},
                "spec": {"terminationGracePeriodSeconds": 1, "containers": [container], **fault.pod},
            },
        },
    }


if __name__ == "__main__":
    main()
