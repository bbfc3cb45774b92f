"""Which Kubernetes objects serve a model, and who owns them.

`serving_objects` selects files of `manifests/` and fills them from the central values. Several models live side by side
in one namespace: every name comes from the ServingSpec, and the label `app.kubernetes.io/instance` tells them apart.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from typing import Any

from rollout.model import PinnedModel
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.serving import ServingSpec, UpdateStrategy
from rollout.target import ClusterMode, IdentityMode, Target
from rollout.values import content_digest

MANAGER = "llm-rollout"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
INSTANCE_LABEL = "app.kubernetes.io/instance"
COMPUTE_CLASS_LABEL = "cloud.google.com/compute-class"
ROLLOUT_LABEL = "llm-rollout.dev/rollout"
MODEL_ANNOTATION = "llm-rollout.dev/model"
WEIGHTS_ANNOTATION = "llm-rollout.dev/weights-digest"

GSA_ANNOTATION = "iam.gke.io/gcp-service-account"
"""On a Kubernetes service account: the Google service account that its pods act as."""

SHARED_KINDS = frozenset({"Namespace", "ComputeClass", "ServiceAccount"})
"""Objects that several models of one target use; they carry no instance label."""

INVENTORY_KINDS = (
    ("cloud.google.com/v1", "ComputeClass"),
    ("v1", "Namespace"),
    ("v1", "ServiceAccount"),
    ("rbac.authorization.k8s.io/v1", "Role"),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"),
    ("v1", "Secret"),
    ("v1", "ConfigMap"),
    ("v1", "PersistentVolumeClaim"),
    ("apps/v1", "Deployment"),
    ("batch/v1", "Job"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("policy/v1", "PodDisruptionBudget"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("monitoring.googleapis.com/v1", "PodMonitoring"),
    ("inference.networking.k8s.io/v1", "InferencePool"),
    ("gateway.networking.k8s.io/v1", "Gateway"),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"),
    ("networking.gke.io/v1", "HealthCheckPolicy"),
)
"""What a rollout can leave behind, in the order of application. Kinds that are not installed are passed over."""

BOOT_DISK_CACHE_LIMIT_BYTES = 90 * 2**30
"""GKE's boot disk has 100 GiB, of which it keeps 10 %: a hub cache of 90 GiB evicts its own pod."""

STARTUP_PERIOD_S = 2
"""The startup probe's period in deployment.yaml: what a start loses on average is half of it."""

RAM_CACHE = "/dev/shm/hf_cache"  # the mount of deployment.yaml; the quickstart's own cure


class WeightsSource(StrEnum):
    """Where the pods load from."""

    BUCKET = "bucket"
    HUB = "hub"


def serving_objects(
    model: PinnedModel,
    serving: ServingSpec,
    target: Target,
    *,
    rollout_id: str,
    source: WeightsSource = WeightsSource.BUCKET,
) -> tuple[KubernetesObject, ...]:
    """The objects that serve `model`, in the order of application (delete in reverse).

    The Secret with the hub's token is not among them, because a plan is stored and shown: see `hub_token_object`.
    """
    files: list[str] = []
    values: dict[str, Any] = {
        "shared_labels": ownership_labels(rollout_id),
        "labels": ownership_labels(rollout_id, instance=serving.name),
        "ksa_annotations": _ksa_annotations(target),
    }
    if target.namespace != "default":
        files.append("namespace.yaml")
    if uses_compute_class(serving, target):
        files.append(_compute_class_file(serving))
        values |= _compute_class_values(serving)
    files += ["service-account.yaml", "deployment.yaml", "service.yaml"]
    values |= _deployment_values(model, serving, target, source)
    if serving.replicas > 1:
        files.append("pod-disruption-budget.yaml")
    if target.cluster.observability and target.cluster.mode is not ClusterMode.KUBECONFIG:
        files.append("pod-monitoring.yaml")
    return render(read_manifests(files), values)


def hub_token_object(serving: ServingSpec, target: Target, token: str, *, rollout_id: str) -> KubernetesObject:
    """The Secret with the Hugging Face token, for pods that load from the hub. Apply it just before the Deployment."""
    values = {
        "hub_token_secret": hub_token_secret_name(serving),
        "namespace": target.namespace,
        "labels": ownership_labels(rollout_id, instance=serving.name),
        "hub_token_base64": base64.b64encode(token.encode()).decode(),
    }
    return render(read_manifests(["hf-token.yaml"]), values)[0]


def hub_token_secret_name(serving: ServingSpec) -> str:
    return f"{serving.name[:54]}-hf-token"  # 63 characters in all


def ownership_labels(rollout_id: str, *, instance: str | None = None) -> dict[str, str]:
    """What marks an object as ours."""
    labels = {MANAGED_BY_LABEL: MANAGER, ROLLOUT_LABEL: rollout_id}
    return labels | {INSTANCE_LABEL: instance} if instance else labels


def is_ours(manifest: Mapping[str, Any]) -> bool:
    return (manifest["metadata"].get("labels") or {}).get(MANAGED_BY_LABEL) == MANAGER


def without_ownership(manifest: KubernetesObject) -> KubernetesObject:
    """The object as we apply it when somebody else made it: wanted as planned, but never ours to delete."""
    metadata = dict(manifest["metadata"])
    ours = {MANAGED_BY_LABEL, ROLLOUT_LABEL, INSTANCE_LABEL}
    metadata["labels"] = {key: value for key, value in (metadata.get("labels") or {}).items() if key not in ours}
    return {**manifest, "metadata": metadata}


def scales(autoscaler: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Whether a HorizontalPodAutoscaler of the same namespace sets the replicas of `manifest`."""
    target = autoscaler["spec"]["scaleTargetRef"]
    return (target["kind"], target["name"]) == (manifest["kind"], manifest["metadata"]["name"])


def with_autoscaled_replicas(manifest: KubernetesObject, live: KubernetesObject) -> KubernetesObject:
    """The Deployment as we apply it when an autoscaler sets its replicas: without them.

    While the field is still ours, because the autoscaler has not changed it yet, it keeps its live value: leaving it
    out would give it up, and Kubernetes would set it to 1.
    """
    spec = {key: value for key, value in manifest["spec"].items() if key != "replicas"}
    entries = live["metadata"].get("managedFields") or ()
    if any(e["manager"] == MANAGER and "f:replicas" in (e.get("fieldsV1") or {}).get("f:spec", {}) for e in entries):
        spec["replicas"] = live["spec"]["replicas"]
    return {**manifest, "spec": spec}


def removable(
    manifests: Iterable[KubernetesObject], instance: str, neighbours: Collection[tuple[str, str]] = ()
) -> tuple[KubernetesObject, ...]:
    """What teardown of the Deployment `instance` may delete of everything that is ours in the target.

    Objects of other instances stay. What a namespace shares stays as long as another instance is left in it, and what
    the cluster shares as long as one is left anywhere: `neighbours` are (namespace, instance) of the others.
    """
    ours = [manifest for manifest in manifests if is_ours(manifest)]
    crowded = {namespace for namespace, _ in neighbours} | {
        manifest["metadata"].get("namespace", "") for manifest in ours if _instance(manifest) not in (None, instance)
    }

    def goes(manifest: KubernetesObject) -> bool:
        if _instance(manifest) is not None:
            return _instance(manifest) == instance
        metadata = manifest["metadata"]
        if manifest["kind"] == "Namespace":
            return metadata["name"] not in crowded
        return metadata["namespace"] not in crowded if "namespace" in metadata else not crowded

    return tuple(manifest for manifest in ours if goes(manifest))


def weights_digest(model: PinnedModel) -> str:
    """Sha256 over path, size and hash of every file: equal weights give equal digests, whatever branch named them."""
    files = sorted((file.path, file.size_bytes, file.sha256 or file.git_blob_sha1) for file in model.files)
    return content_digest([list(file) for file in files], 64)


def uses_compute_class(serving: ServingSpec, target: Target) -> bool:
    """Whether GKE creates the nodes from a ComputeClass, rather than a node pool or somebody else's cluster."""
    if serving.accelerator.compute_class is None or target.cluster.mode is ClusterMode.KUBECONFIG:
        return False
    return target.cluster.mode is ClusterMode.AUTOPILOT or target.cluster.node_pool is None


def _instance(manifest: Mapping[str, Any]) -> str | None:
    label: str | None = (manifest["metadata"].get("labels") or {}).get(INSTANCE_LABEL)
    return label


def _ksa_annotations(target: Target) -> dict[str, str]:
    if target.identity is IdentityMode.DIRECT or target.cluster.mode is ClusterMode.KUBECONFIG:
        return {}
    return {GSA_ANNOTATION: target.gsa_email}


def _compute_class_file(serving: ServingSpec) -> str:
    return "compute-class-boot-disk.yaml" if serving.accelerator.boot_disk_gib else "compute-class.yaml"


def _compute_class_values(serving: ServingSpec) -> dict[str, Any]:
    accelerator = serving.accelerator
    values: dict[str, Any] = {
        "compute_class": accelerator.compute_class,
        "machine_type": accelerator.machine_type,
        "machine_gpu_count": accelerator.machine_gpu_count,
        "accelerator_type": accelerator.type,
    }
    return values | {"boot_disk_gib": accelerator.boot_disk_gib} if accelerator.boot_disk_gib else values


def _deployment_values(
    model: PinnedModel, serving: ServingSpec, target: Target, source: WeightsSource
) -> dict[str, Any]:
    command, args = _command_line(model, serving, target, source)
    return {
        "name": serving.name,
        "namespace": target.namespace,
        "service_name": serving.service_name,
        "app": serving.app,
        "model_label": serving.model_label,
        "provenance": {
            MODEL_ANNOTATION: f"{model.repo_id}@{model.commit_sha}",
            WEIGHTS_ANNOTATION: f"sha256:{weights_digest(model)}",
        },
        "replicas": serving.replicas,
        "progress_deadline_s": int(serving.ready_timeout_s),
        "strategy": _strategy(serving),
        "ksa": target.ksa,
        "termination_grace_period_s": serving.termination_grace_period_s,
        "image": serving.image,
        "resources": _resources(serving),
        "command": command,
        "args": args,
        "port": serving.port,
        "env": _environment(model, serving, target, source),
        "startup_failure_threshold": serving.startup_failure_threshold(model.total_bytes, period_s=STARTUP_PERIOD_S),
        "node_selector": _node_selector(serving, target),
    }


def _command_line(
    model: PinnedModel, serving: ServingSpec, target: Target, source: WeightsSource
) -> tuple[list[str], list[str]]:
    if source is WeightsSource.HUB:
        args = [*serving.vllm_args(model.repo_id), f"--revision={model.commit_sha}"]
    else:
        args = serving.vllm_args(target.weights_uri(model.repo_id, model.commit_sha))
    if serving.command:
        return list(serving.command), args
    # vLLM's own images have `vllm serve` as their entry point already: it must be replaced, or it would stand twice.
    count = len(serving.entrypoint)
    return args[:count], args[count:]


def _environment(
    model: PinnedModel, serving: ServingSpec, target: Target, source: WeightsSource
) -> list[dict[str, Any]]:
    env = {
        "GOOGLE_CLOUD_UNIVERSE_DOMAIN": target.universe.domain,
        "CLOUDSDK_CORE_UNIVERSE_DOMAIN": target.universe.domain,
    }
    if serving.command:
        # Read by the entry point of the tutorial's image, which turns `--model=gs://…` into a download.
        env |= {
            "GCS_URI_ARG_KEY": "model",
            "GCS_URI_ENV_KEY": "AIP_STORAGE_URI",
            "LORA_ADAPTER_ARG_KEY": "lora-modules",
            "HF_HUB_ENABLE_HF_TRANSFER": "1",
        }
    if source is WeightsSource.HUB:
        if target.endpoints.hub:
            env["HF_ENDPOINT"] = target.endpoints.hub
        if model.total_bytes >= BOOT_DISK_CACHE_LIMIT_BYTES and not serving.accelerator.boot_disk_gib:
            env["HF_HOME"] = RAM_CACHE
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in {**env, **serving.env}.items()]
    if source is WeightsSource.HUB and target.hub_token_secret:
        reference = {"name": hub_token_secret_name(serving), "key": "hf_api_token"}
        variables.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return variables


def _resources(serving: ServingSpec) -> dict[str, str]:
    return {
        "cpu": serving.resources.cpu,
        "memory": serving.resources.memory,
        "ephemeral-storage": serving.resources.ephemeral_storage,
        "nvidia.com/gpu": str(serving.accelerator.count),
    }


def _strategy(serving: ServingSpec) -> dict[str, Any]:
    if serving.strategy is UpdateStrategy.RECREATE:
        return {"type": "Recreate"}
    # The old pod answers until the new one does; the preflight has made sure of the spare GPU.
    return {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def _node_selector(serving: ServingSpec, target: Target) -> dict[str, str]:
    if uses_compute_class(serving, target):
        return {COMPUTE_CLASS_LABEL: str(serving.accelerator.compute_class)}
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return {}  # the GPU request alone decides: labels of somebody else's nodes are unknown
    return {"cloud.google.com/gke-accelerator": serving.accelerator.type}


def port_forward_line(namespace: str, service_name: str, port: int) -> str:
    """A command that makes a Service reachable as http://127.0.0.1:<port>."""
    return f"kubectl port-forward --namespace {namespace} service/{service_name} {port}:{port}"
