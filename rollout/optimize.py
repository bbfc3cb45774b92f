"""`manifests create`: optimised Kubernetes manifests for one model on one accelerator, rendered here.

What Google's generator does, for universes that do not have it and for profiles that only we have measured: Deployment,
Service and PodMonitoring of one replica; weights from Cloud Storage by the fastest way that the server's version knows;
a HorizontalPodAutoscaler from a latency target; the llm-d serving stack. Pure: the same request gives the same objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Annotated, Any

import yaml
from pydantic import Field, StringConstraints, model_validator

from rollout.accelerators import AcceleratorKind, AcceleratorType, accelerator
from rollout.autoscaling import (
    ADAPTER_DOCS,
    ADAPTER_MANIFEST,
    ADAPTER_NAMESPACE,
    ADAPTER_ROLE,
    ADAPTER_SERVICE_ACCOUNT,
    METRIC,
    Adapter,
    Autoscaling,
    autoscaler_object,
    autoscaling_for,
)
from rollout.curve import TARGET_UTILISATION
from rollout.errors import BadInput
from rollout.fit import DEFAULT_BOOT_DISK_GIB, WeightsCopy, check_ephemeral_storage
from rollout.model_facts import ModelFacts
from rollout.objects import (
    BOOT_DISK_CACHE_LIMIT_BYTES,
    COMPUTE_CLASS_LABEL,
    INSTANCE_LABEL,
    MANAGED_BY_LABEL,
    MANAGER,
    RAM_CACHE,
    STARTUP_PERIOD_S,
    port_forward_line,
)
from rollout.preflight import Check, CheckState, failed, ok
from rollout.profiles import CHATBOT, Profile, Targets, use_case_named
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.serving import ENGINE_START_S, Accelerator, Resources, ServingSpec
from rollout.sizing import Sizing, size_serving
from rollout.universe import Universe
from rollout.values import KubernetesName, RepoId, Value
from rollout.vllm_flags import VLLM_VERSION

VERSION_ANNOTATION = "recommender.ai.gke.io/version"

SHARED_LABELS = {MANAGED_BY_LABEL: MANAGER}
"""Of what several models of a namespace use: ours, and no one instance's."""

PORT = 8000
"""The quickstart's: `http://SERVICE_NAME:8000`."""

HF_SECRET, HF_SECRET_KEY = "hf-secret", "hf_api_token"
"""The Secret that the quickstart tells users to create."""

STREAMER_SINCE = {AcceleratorKind.GPU: (0, 11, 1), AcceleratorKind.TPU: (0, 14, 0)}
"""The first vLLM that streams from Cloud Storage with the Run:ai Model Streamer (quickstart)."""

LEAST_GKE = ("1.29.6-gke.1254000", "1.30.2-gke.1394000")
"""From which GKE versions on Cloud Storage can be loaded from (quickstart): of 1.29, and of 1.30 and later."""

MODEL_MOUNT = "/data"

XLA_MOUNT = "/xla"
XLA_FOLDER = "xla-cache"
"""Compiled graphs are kept at `xla-cache/<path of the weights>` of the bucket: beside the weights, because a folder
among them breaks the model streamer."""

TPU_ENGINE_START_S = 1800.0
"""vLLM's TPU guide: "the compilation time may take 20~30 minutes in the first run" (one XLA graph per shape)."""
TPU_CACHED_START_S = 300.0
"""The same guide: "reduces to ~5 minutes afterwards", from the cache in `VLLM_XLA_CACHE_PATH`.
vllm-project/vllm, docs/getting_started/installation/google_tpu.md"""

INFERENCE_EXTENSION_VERSION = "v1.4.0"
"""Of the endpoint picker and of the definitions together. v1.5.0's picker calls a vLLM without LoRA unhealthy, because
it misses the metric `vllm:lora_requests_info`."""
ENDPOINT_PICKER_IMAGE = f"registry.k8s.io/gateway-api-inference-extension/epp:{INFERENCE_EXTENSION_VERSION}"
INFERENCE_EXTENSION_MANIFEST = (
    "https://github.com/kubernetes-sigs/gateway-api-inference-extension/releases/download/"
    f"{INFERENCE_EXTENSION_VERSION}/manifests.yaml"
)

FUSE_MOUNT_OPTIONS = (
    "implicit-dirs",
    "metadata-cache:ttl-secs:-1",
    "metadata-cache:stat-cache-max-size-mb:-1",
    "metadata-cache:type-cache-max-size-mb:-1",
    "file-cache:max-size-mb:-1",
    "file-cache:cache-file-for-range-read:true",
    "file-cache:enable-parallel-downloads:true",
    "file-system:kernel-list-cache-ttl-secs:-1",
    "read_ahead_kb=1024",
)
"""Serving's settings of https://cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-perf."""

LATEST_VERSION = f"v{VLLM_VERSION}"


class ServingStack(StrEnum):
    VLLM = "vllm"
    """The server alone, behind a Service."""
    LLM_D = "llm-d"
    """Routing by queue, KV cache and prefixes: InferencePool, endpoint picker, Gateway and HTTPRoute."""


class StorageBackend(StrEnum):
    HUB = "hugging-face"
    STREAMER = "run:ai-model-streamer"
    FUSE = "cloud-storage-fuse"


class Output(StrEnum):
    """What `manifests create --output` prints."""

    MANIFEST = "manifest"
    COMMENTS = "comments"
    ALL = "all"


class ValidatedWith(Value):
    """On what these manifests were seen to work, or are to run; None where nobody knows."""

    cluster_version: str | None = None
    node_version: str | None = None
    gpu_driver_version: str | None = None
    """Its number, or `GKE's default`: GKE's API names the choice, not the number."""

    def or_else(self, other: ValidatedWith) -> ValidatedWith:
        """These versions, and those of `other` where they say nothing."""
        stated = {name: value for name, value in self.model_dump().items() if value is not None}
        return other.model_copy(update=stated)


BucketUri = Annotated[str, StringConstraints(pattern=r"^gs://[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9](/[^\s/]+)*/?$")]


class ManifestRequest(Value):
    """What is to be rendered; fields are named after gcloud's flags."""

    model: RepoId
    model_server: str = "vllm"
    model_server_version: str = LATEST_VERSION
    accelerator_type: str
    accelerator_count: Annotated[int, Field(ge=1)] | None = None
    """None: as few as hold the model."""
    namespace: KubernetesName = "default"
    service_account: KubernetesName = "default"
    """Kubernetes service account of the pods; the bucket must trust it."""
    targets: Targets = Targets()
    use_case: str = CHATBOT
    input_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of a prompt; None: the use case's."""
    output_length: Annotated[int, Field(ge=1)] | None = None
    """Tokens of an answer, likewise."""
    model_bucket_uri: BucketUri | None = None
    serving_stack: ServingStack = ServingStack.VLLM
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """The autoscaler's lower limit: what stays when a burst comes before its replica does."""
    max_replicas: Annotated[int, Field(ge=1)] = 10
    utilisation: Annotated[float, Field(gt=0, le=1)] = TARGET_UTILISATION
    """The threshold's share of the requests in flight at the target; the rest is the buffer for bursts."""
    adapter: Adapter = Adapter.STACKDRIVER
    boot_disk_gib: Annotated[int, Field(ge=10)] | None = None
    """A larger boot disk for weights from the hub; None caches models of 90 GiB and more in memory."""
    gke_version: str | None = None
    """Of the cluster, when it exists: it must be able to load from Cloud Storage."""
    project: str | None = None
    project_number: str | None = None
    universe: Universe = Universe()
    validated: ValidatedWith = ValidatedWith()

    @model_validator(mode="after")
    def _has_room(self) -> ManifestRequest:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is more than max_replicas={self.max_replicas}")
        return self


class BucketGrant(Value):
    """An IAM binding that the pods need before they can load."""

    bucket: str
    role: str
    member: str

    @property
    def command(self) -> str:
        return (
            f"gcloud storage buckets add-iam-policy-binding gs://{self.bucket} --role={self.role}"
            f' --member="{self.member}" --condition=None'
        )


class GeneratedManifests(Value):
    """Objects, and what whoever applies them must know."""

    request: ManifestRequest
    serving: ServingSpec
    objects: tuple[dict[str, Any], ...]
    """In the order of application."""
    header: tuple[str, ...]
    comments: tuple[str, ...]
    storage: StorageBackend
    autoscaling: Autoscaling | None = None
    grants: tuple[BucketGrant, ...] = ()
    """To be executed before the objects are applied."""
    checks: tuple[Check, ...] = ()
    scale_first_to: int | None = None
    """TPUs with an XLA cache: let this many replicas become ready before there are more."""

    def text(self, output: Output = Output.ALL) -> str:
        """YAML documents with the header, the comments, or both."""
        documents = "---\n".join(_yaml(each) for each in self.objects)
        header = "".join(f"# {line}\n" for line in self.header)
        comments = "".join(f"# {line}".rstrip() + "\n" for line in self.comments)
        if output is Output.MANIFEST:
            return header + documents
        if output is Output.COMMENTS:
            return header + comments
        return f"{header}#\n{comments}{documents}"


def generate_manifests(
    request: ManifestRequest, facts: ModelFacts, *, on: date, profile: Profile | None = None
) -> GeneratedManifests:
    """Render the manifests. `profile` is the curve that an autoscaler's threshold comes from.

    Raises BadInput for another server than vLLM, for a model that does not fit, for a cluster that is too old, and
    when a latency target has no profile; TargetUnreachable for a target that cannot be held.
    """
    if request.model_server != "vllm":
        raise BadInput(
            f"manifests of {request.model_server} are not rendered here.",
            where="--model-server",
            resolution="Use --generator=google for it, or vllm.",
        )
    chip = accelerator(request.accelerator_type)
    sizing = request_sizing(request, facts)
    storage = storage_backend(request, chip)
    serving = _serving(request, facts, chip, sizing, storage)
    checks = _checks(request, facts, serving, storage)
    refusals = [check for check in checks if check.state is CheckState.FAILED]
    if refusals:
        raise BadInput(refusals[0].why, where=refusals[0].name, resolution=refusals[0].resolution)
    autoscaling = _autoscaling(request, facts, chip, serving, profile)
    writes_cache = xla_cache_path(request, chip) is not None
    grants = _grants(request, writes_cache=writes_cache)
    header = version_header(request, chip, on)
    return GeneratedManifests(
        request=request,
        serving=serving,
        objects=_objects(request, facts, chip, serving, storage, autoscaling, header),
        header=header,
        comments=_comments(request, facts, chip, serving, sizing, storage, autoscaling, grants),
        storage=storage,
        autoscaling=autoscaling,
        grants=grants,
        checks=checks,
        scale_first_to=1 if writes_cache else None,
    )


LEAST_TOKENS_PER_REQUEST = 2048
"""Sizing never assumes shorter requests: the quickstart's own benchmark has prompts and answers of up to 1024 each."""


def request_sizing(request: ManifestRequest, facts: ModelFacts) -> Sizing:
    """How many accelerators a replica takes, and which flags fit: known before any curve is looked for.

    Raises what `size_serving` raises, and BadInput for a use case that nobody knows.
    """
    inputs, outputs = _lengths(request)
    tokens = max(LEAST_TOKENS_PER_REQUEST, (inputs or 0) + (outputs or 0))
    chip = accelerator(request.accelerator_type)
    return size_serving(facts, chip, tokens_per_request=tokens, count=request.accelerator_count)


def _lengths(request: ManifestRequest) -> tuple[int | None, int | None]:
    use_case = use_case_named(request.use_case)
    return request.input_length or use_case.input_tokens, request.output_length or use_case.output_tokens


def _about_lengths(request: ManifestRequest) -> list[str]:
    if None not in _lengths(request):
        return []
    return [
        f"The lengths of its requests are not stated: sized for {LEAST_TOKENS_PER_REQUEST} tokens a request. State them"
        " with --target-input-length and --target-output-length."
    ]


# --- Choices ---------------------------------------------------------------------------------------------------------


def server_version(text: str) -> tuple[int, ...]:
    """`v0.11.2` -> (0, 11, 2). Raises BadInput for a tag that is no version: which features it has is not known."""
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[.\-+].*)?", text)
    if match is None:
        raise BadInput(
            f"{text!r} is not a version of vLLM, so what it can load is not known.",
            where="--model-server-version",
            resolution=f"Give a version such as {LATEST_VERSION}, or use --generator=google.",
        )
    return tuple(int(part or 0) for part in match.groups())


def storage_backend(request: ManifestRequest, chip: AcceleratorType) -> StorageBackend:
    """The fastest way to the weights that the server's version knows."""
    version = server_version(request.model_server_version)
    if request.model_bucket_uri is None:
        return StorageBackend.HUB
    return StorageBackend.STREAMER if version >= STREAMER_SINCE[chip.kind] else StorageBackend.FUSE


def check_gke_version(version: str) -> Check:
    """Whether a cluster of that version can load from Cloud Storage."""
    name = "GKE version for Cloud Storage"
    found = _gke_version(version)
    least = next((v for v in map(_gke_version, LEAST_GKE) if v[:2] == found[:2]), None)
    if found[:2] > (1, 30) or (least is not None and found >= least):
        return ok(name, version)
    return failed(
        name,
        f"{version} cannot load models from Cloud Storage",
        f"Upgrade to {LEAST_GKE[0]}, {LEAST_GKE[1]} or later.",
    )


def _gke_version(text: str) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", text)
    if len(numbers) < 2:
        raise BadInput(f"{text!r} is not a GKE version.", where="--gke-version", resolution=f"E.g. {LEAST_GKE[1]}.")
    return tuple(int(number) for number in (*numbers, *"00")[:4])


def check_hub_secret(facts: ModelFacts, *, exists: bool) -> Check:
    """A gated model without its Secret ends as "Does not have minimum availability"."""
    name = "Hugging Face secret"
    if exists or not facts.gated:
        return ok(name, "present" if exists else f"{facts.repo_id} is public")
    return failed(
        name,
        f"{facts.repo_id} is gated and the Secret {HF_SECRET} is missing: no pod would become available",
        f"kubectl create secret generic {HF_SECRET} --from-literal={HF_SECRET_KEY}=HUGGING_FACE_TOKEN",
    )


def scale_steps(generated: GeneratedManifests, replicas: int, *, ready: int = 0) -> tuple[int, ...]:
    """To how many replicas to scale, each step after the one before is ready: XLA caches are written by one only.

    `ready` are there already, and stay: what they need of the cache is written.
    """
    first = generated.scale_first_to
    if first is None or replicas <= max(first, ready):
        return (replicas,)
    return max(first, ready), replicas


def apply_stages(
    generated: GeneratedManifests, replicas: int, *, ready: int = 0
) -> tuple[tuple[KubernetesObject, ...], ...]:
    """What to apply, each stage after the pods of the one before are ready. `replicas` count without an autoscaler.

    An autoscaler comes last where one pod must write the XLA cache first: it may ask for several at once.
    """
    if generated.autoscaling is None:
        steps = scale_steps(generated, replicas, ready=ready)
        return tuple(tuple(_with_replicas(each, generated, count) for each in generated.objects) for count in steps)
    if generated.scale_first_to is None or ready:
        return (generated.objects,)
    single = tuple(each for each in generated.objects if each["kind"] != "HorizontalPodAutoscaler")
    return single, generated.objects


def _with_replicas(manifest: KubernetesObject, generated: GeneratedManifests, replicas: int) -> KubernetesObject:
    if (manifest["kind"], manifest["metadata"]["name"]) != ("Deployment", generated.serving.name):
        return manifest
    return {**manifest, "spec": {**manifest["spec"], "replicas": replicas}}


def _checks(
    request: ManifestRequest, facts: ModelFacts, serving: ServingSpec, storage: StorageBackend
) -> tuple[Check, ...]:
    checks = []
    if storage is StorageBackend.HUB:
        copy = WeightsCopy.MEMORY if _caches_in_memory(request, facts) else WeightsCopy.DISK
        disk_gib = request.boot_disk_gib or DEFAULT_BOOT_DISK_GIB
        checks.append(check_ephemeral_storage(facts.weights_bytes, serving, copy, boot_disk_gib=disk_gib))
    elif request.gke_version is not None:
        checks.append(check_gke_version(request.gke_version))
    return tuple(checks)


def _caches_in_memory(request: ManifestRequest, facts: ModelFacts) -> bool:
    if request.model_bucket_uri is not None or request.boot_disk_gib is not None:
        return False
    return facts.weights_bytes >= BOOT_DISK_CACHE_LIMIT_BYTES


def _autoscaling(
    request: ManifestRequest, facts: ModelFacts, chip: AcceleratorType, serving: ServingSpec, profile: Profile | None
) -> Autoscaling | None:
    if not request.targets.given():
        return None
    if profile is None:
        raise BadInput(
            f"no measured or catalogued curve of {request.model} on {serving.accelerator.count} x"
            f" {request.accelerator_type} for {use_case_named(request.use_case).name} is known, so a latency target"
            " cannot be turned into a threshold.",
            where="autoscaling",
            resolution="Run the benchmark first, or name another source: --source=google, --file=BENCHMARKS.csv.",
        )
    # Replicas that the autoscaler adds find the cache that the first one has written.
    engine_start_s = TPU_CACHED_START_S if xla_cache_path(request, chip) else _first_engine_start_s(chip)
    return autoscaling_for(
        profile,
        request.targets,
        startup_s=startup_s(facts, serving, engine_start_s),
        utilisation=request.utilisation,
    )


def startup_s(facts: ModelFacts, serving: ServingSpec, engine_start_s: float = ENGINE_START_S) -> float:
    """About how long a new replica takes until it serves: its node, its weights, the engine.

    300 s for a node: the middle of what GKE's documentation and users report for GPU machines.
    """
    return 300.0 + serving.loading_s(facts.weights_bytes) + engine_start_s


def _first_engine_start_s(chip: AcceleratorType) -> float:
    return TPU_ENGINE_START_S if chip.kind is AcceleratorKind.TPU else ENGINE_START_S


def xla_cache_path(request: ManifestRequest, chip: AcceleratorType) -> str | None:
    """Where in the bucket the replicas on TPUs keep their compiled graphs.

    None for GPUs, for weights from the hub, and for weights at the root of a bucket: nothing there is beside them.
    """
    if chip.kind is not AcceleratorKind.TPU or request.model_bucket_uri is None:
        return None
    path = _bucket_of(request.model_bucket_uri)[1]
    return f"{XLA_FOLDER}/{path}" if path else None


def _grants(request: ManifestRequest, *, writes_cache: bool) -> tuple[BucketGrant, ...]:
    if request.model_bucket_uri is None:
        return ()
    member = request.universe.workload_identity_principal(
        request.project or "PROJECT_ID",
        request.project_number or "PROJECT_NUMBER",
        request.namespace,
        request.service_account,
    )
    role = "roles/storage.objectUser" if writes_cache else "roles/storage.objectViewer"
    return (BucketGrant(bucket=_bucket_of(request.model_bucket_uri)[0], role=role, member=member),)


def _bucket_of(uri: str) -> tuple[str, str]:
    bucket, _, path = uri.removeprefix("gs://").partition("/")
    return bucket, path.rstrip("/")


# --- Objects ---------------------------------------------------------------------------------------------------------


def deployment_name(model: str, model_server: str = "vllm") -> str:
    """The Deployment's and the Service's name: server and model, as a DNS label."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.rpartition("/")[2].lower()).strip("-")
    return f"{model_server}-{slug}"[:52].rstrip("-")


def _serving(
    request: ManifestRequest, facts: ModelFacts, chip: AcceleratorType, sizing: Sizing, storage: StorageBackend
) -> ServingSpec:
    name = deployment_name(request.model, request.model_server)
    count = sizing.accelerator_count
    machine = chip.machine_for(count)
    version = request.model_server_version
    tag = version if version.startswith("v") else f"v{version}"
    repository = "vllm/vllm-tpu" if chip.kind is AcceleratorKind.TPU else "vllm/vllm-openai"
    extra = list(sizing.extra_args)
    if storage is StorageBackend.STREAMER and count > 1 and chip.kind is AcceleratorKind.GPU:
        # Each rank reads its share once, instead of every rank reading everything. vLLM: "currently only possible on
        # CUDA and ROCM devices" (docs/models/extensions/runai_model_streamer.md).
        extra.append('--model-loader-extra-config={"distributed": true}')
    parser = "gemma4" if facts.config.get("model_type") == "gemma4" else None
    disk = request.boot_disk_gib
    ready_timeout_s: float = ServingSpec.model_fields["ready_timeout_s"].default
    return ServingSpec(
        name=name,
        service_name=name,
        app=name,
        model_label=re.sub(r"[^a-z0-9]+", "-", request.model.rpartition("/")[2].lower()).strip("-")[:63],
        served_model_name=request.model,
        image=f"{repository}:{tag}",
        command=(),
        entrypoint=("python3", "-m", "vllm.entrypoints.openai.api_server"),
        port=PORT,
        accelerator=Accelerator(
            type=chip.name,
            count=count,
            machine_type=machine.type,
            machine_gpu_count=machine.accelerators,
            compute_class=f"{name}-nodes" if disk else None,
            boot_disk_gib=disk,
        ),
        resources=_resources(request, facts, chip, count, storage),
        tensor_parallel_size=count,
        max_num_seqs=sizing.max_num_seqs,
        max_model_len=sizing.max_model_len,
        max_images_per_prompt=1 if parser else None,
        tool_call_parser=parser,
        reasoning_parser=parser,
        load_format="runai_streamer" if storage is StorageBackend.STREAMER else None,
        # The usual wait is for a GPU's engine.
        ready_timeout_s=ready_timeout_s + _first_engine_start_s(chip) - ENGINE_START_S,
        extra_args=tuple(extra),
    )


def _resources(
    request: ManifestRequest, facts: ModelFacts, chip: AcceleratorType, count: int, storage: StorageBackend
) -> Resources:
    """Three quarters of the machine's share: the rest is the node's own and its agents'."""
    cpus = max(1, int(0.75 * chip.host_vcpus * count))
    host_gib = 0.75 * chip.host_memory_gib * count
    weights_gib = facts.weights_bytes / 2**30
    if _caches_in_memory(request, facts) and weights_gib + 16 > host_gib:
        raise BadInput(
            f"a cache of {weights_gib:.0f} GiB in memory does not fit beside the server in {host_gib:.0f} GiB.",
            where="HF_HOME",
            resolution=f"Give --boot-disk-gib={int(weights_gib / 0.9) + 20}, or load from Cloud Storage.",
        )
    on_disk = storage is StorageBackend.HUB and not _caches_in_memory(request, facts)
    usable_gib = 0.9 * (request.boot_disk_gib or DEFAULT_BOOT_DISK_GIB)
    ephemeral = min(usable_gib - 5, weights_gib * 1.1 + 10) if on_disk else 10
    return Resources(cpu=str(cpus), memory=f"{int(host_gib)}Gi", ephemeral_storage=f"{max(10, int(ephemeral))}Gi")


def _objects(
    request: ManifestRequest,
    facts: ModelFacts,
    chip: AcceleratorType,
    serving: ServingSpec,
    storage: StorageBackend,
    autoscaling: Autoscaling | None,
    header: Sequence[str],
) -> tuple[KubernetesObject, ...]:
    files = ["deployment.yaml", "service.yaml", "pod-monitoring.yaml"]
    values = _values(request, facts, chip, serving, storage)
    if request.service_account != "default":
        files.insert(0, "service-account.yaml")
        # Other models' pods may have the same identity: it goes with the last of them.
        values |= {"shared_labels": SHARED_LABELS, "ksa_annotations": {}}
    if request.serving_stack is ServingStack.LLM_D:
        files += _LLM_D_FILES
        values |= {
            "endpoint_picker": f"{serving.name}-epp",
            "endpoint_picker_image": ENDPOINT_PICKER_IMAGE,
            "gateway": f"{serving.name}-gateway",
        }
    objects = render(read_manifests(files), values)
    if request.boot_disk_gib:
        objects = (*_compute_class(request, chip, serving, values["labels"]), *objects)
    if autoscaling is not None:
        scaler = autoscaler_object(
            autoscaling,
            name=serving.name,
            namespace=request.namespace,
            labels=values["labels"],
            min_replicas=request.min_replicas,
            max_replicas=request.max_replicas,
            adapter=request.adapter,
        )
        objects = (*objects, scaler)
    for each in objects:
        each["metadata"].setdefault("annotations", {})[VERSION_ANNOTATION] = "\n".join(header)
        if each["kind"] == "Deployment" and each["metadata"]["name"] == serving.name:
            if autoscaling is not None:
                # No replicas: the autoscaler owns that field.
                del each["spec"]["replicas"]
            if request.model_bucket_uri and storage is StorageBackend.FUSE:
                _mount_weights(each, request.model_bucket_uri)
            if request.model_bucket_uri and xla_cache_path(request, chip):
                _mount_xla_cache(each, request.model_bucket_uri)
    return objects


def _compute_class(
    request: ManifestRequest, chip: AcceleratorType, serving: ServingSpec, labels: Mapping[str, str]
) -> tuple[KubernetesObject, ...]:
    """The instance's own, with its name and its disk: it has the instance's labels where a target's has shared ones."""
    values = {
        "shared_labels": labels,
        "compute_class": serving.accelerator.compute_class,
        "machine_type": serving.accelerator.machine_type,
        "machine_gpu_count": serving.accelerator.machine_gpu_count,
        "accelerator_type": chip.name,
        "boot_disk_gib": request.boot_disk_gib,
    }
    return render(read_manifests(["compute-class-boot-disk.yaml"]), values)


_LLM_D_FILES = [
    "endpoint-picker-service-account.yaml",
    "endpoint-picker-role.yaml",
    "endpoint-picker-role-binding.yaml",
    "endpoint-picker-config.yaml",
    "endpoint-picker-deployment.yaml",
    "endpoint-picker-service.yaml",
    "inference-pool.yaml",
    "inference-pool-health-check.yaml",
    "gateway.yaml",
    "http-route.yaml",
]


def _values(
    request: ManifestRequest, facts: ModelFacts, chip: AcceleratorType, serving: ServingSpec, storage: StorageBackend
) -> dict[str, Any]:
    args = serving.vllm_args(_model_path(request, storage))
    entry = len(serving.entrypoint)
    return {
        "name": serving.name,
        "namespace": request.namespace,
        "service_name": serving.service_name,
        "labels": {"app": serving.app, MANAGED_BY_LABEL: MANAGER, INSTANCE_LABEL: serving.name},
        "app": serving.app,
        "model_label": serving.model_label,
        "provenance": {"llm-rollout.dev/model": request.model},
        "replicas": 1,
        "progress_deadline_s": int(serving.ready_timeout_s),
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "ksa": request.service_account,
        "termination_grace_period_s": serving.termination_grace_period_s,
        "image": serving.image,
        "resources": {
            "cpu": serving.resources.cpu,
            "memory": serving.resources.memory,
            "ephemeral-storage": serving.resources.ephemeral_storage,
            chip.resource: str(serving.accelerator.count),
        },
        "command": args[:entry],
        "args": args[entry:],
        "port": serving.port,
        "env": _environment(request, facts, chip, storage),
        "startup_failure_threshold": serving.startup_failure_threshold(
            facts.weights_bytes, period_s=STARTUP_PERIOD_S, engine_start_s=_first_engine_start_s(chip)
        ),
        "node_selector": _node_selector(chip, serving),
    }


def _model_path(request: ManifestRequest, storage: StorageBackend) -> str:
    if storage is StorageBackend.HUB:
        return request.model
    return MODEL_MOUNT if storage is StorageBackend.FUSE else str(request.model_bucket_uri).rstrip("/")


def _environment(
    request: ManifestRequest, facts: ModelFacts, chip: AcceleratorType, storage: StorageBackend
) -> list[dict[str, Any]]:
    if storage is not StorageBackend.HUB:
        # The streamer and the mount authenticate to the universe's storage.
        variables: list[dict[str, Any]] = []
        if not request.universe.is_default:
            variables.append({"name": "GOOGLE_CLOUD_UNIVERSE_DOMAIN", "value": request.universe.domain})
        if cache := xla_cache_path(request, chip):
            variables.append({"name": "VLLM_XLA_CACHE_PATH", "value": f"{XLA_MOUNT}/{cache}"})
        return variables
    # A public model starts without the Secret; a gated one must not start half-way and fail at its first download.
    reference = {"name": HF_SECRET, "key": HF_SECRET_KEY, "optional": not facts.gated}
    variables = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}}]
    if _caches_in_memory(request, facts):
        variables.append({"name": "HF_HOME", "value": RAM_CACHE})
    return variables


def _node_selector(chip: AcceleratorType, serving: ServingSpec) -> dict[str, str]:
    if serving.accelerator.compute_class:
        return {COMPUTE_CLASS_LABEL: serving.accelerator.compute_class}
    if chip.kind is AcceleratorKind.TPU:
        return {
            "cloud.google.com/gke-tpu-accelerator": chip.name,
            "cloud.google.com/gke-tpu-topology": chip.topologies[serving.accelerator.count],
        }
    return {"cloud.google.com/gke-accelerator": chip.name}


def _mount_weights(deployment: KubernetesObject, uri: str) -> None:
    """Add the tuned Cloud Storage FUSE volume to a rendered Deployment."""
    bucket, path = _bucket_of(uri)
    options = [*FUSE_MOUNT_OPTIONS, *([f"only-dir:{path}"] if path else [])]
    _mount(deployment, "model", MODEL_MOUNT, bucket, options, writable=False)
    # The sidecar's file cache goes where it is fastest.
    deployment["spec"]["template"]["spec"]["volumes"].append(
        {"name": "gke-gcsfuse-cache", "emptyDir": {"medium": "Memory"}}
    )


def _mount_xla_cache(deployment: KubernetesObject, uri: str) -> None:
    """Add the volume of compiled graphs: the whole bucket, because a folder can only be mounted once it exists."""
    _mount(deployment, "xla-cache", XLA_MOUNT, _bucket_of(uri)[0], ["implicit-dirs"], writable=True)


def _mount(
    deployment: KubernetesObject, name: str, path: str, bucket: str, options: Sequence[str], *, writable: bool
) -> None:
    template = deployment["spec"]["template"]
    # "0" lifts the sidecar's limits: a throttled sidecar loads at a fraction of the machine's speed.
    limits = {f"gke-gcsfuse/{each}-limit": "0" for each in ("cpu", "memory", "ephemeral-storage")}
    template["metadata"]["annotations"] = {
        **template["metadata"]["annotations"],
        "gke-gcsfuse/volumes": "true",
        **limits,
    }
    attributes = {"bucketName": bucket, "mountOptions": ",".join(options), "skipCSIBucketAccessCheck": "true"}
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": not writable, "volumeAttributes": attributes}
    spec = template["spec"]
    spec["containers"][0]["volumeMounts"].append({"name": name, "mountPath": path, "readOnly": not writable})
    spec["volumes"].append({"name": name, "csi": csi})


# --- Comments --------------------------------------------------------------------------------------------------------


def version_header(request: ManifestRequest, chip: AcceleratorType, on: date) -> tuple[str, ...]:
    """The quickstart's header: date, cluster, driver and server; what nobody has tried says so."""
    tried = request.validated
    lines = [f"Generated on {on.isoformat()} using:", f"GKE cluster {tried.cluster_version or 'not validated'}"]
    if chip.kind is AcceleratorKind.GPU:
        driver, node = tried.gpu_driver_version or "not validated", tried.node_version or "not validated"
        lines.append(f"{driver} GPU driver for node version {node}")
    lines.append(f"Model server {request.model_server} {request.model_server_version}")
    return tuple(lines)


def _comments(
    request: ManifestRequest,
    facts: ModelFacts,
    chip: AcceleratorType,
    serving: ServingSpec,
    sizing: Sizing,
    storage: StorageBackend,
    autoscaling: Autoscaling | None,
    grants: Sequence[BucketGrant],
) -> tuple[str, ...]:
    name = deployment_name(request.model, request.model_server)
    sections = [
        [
            f"{request.model}, optimised for {use_case_named(request.use_case).name}.",
            *_about_lengths(request),
            *sizing.arithmetic,
        ],
        _storage_comments(request, facts, storage, grants),
        _xla_comments(request, chip, serving, storage),
        _autoscaling_comments(request, autoscaling) if autoscaling else [],
        _llm_d_comments(name) if request.serving_stack is ServingStack.LLM_D else [],
        [
            "Recommended observability:",
            "gcloud container clusters update $CLUSTER_NAME --project=$PROJECT_ID --location=$LOCATION \\",
            "  --enable-managed-prometheus --logging=SYSTEM,WORKLOAD \\",
            "  --monitoring=SYSTEM,DEPLOYMENT,HPA,POD,DCGM --auto-monitoring-scope=ALL",
        ],
        [
            "Apply, then test:",
            "kubectl apply -f ./manifests.yaml",
            f"kubectl get services --namespace {request.namespace}",
            port_forward_line(request.namespace, name, PORT),
            f"curl http://localhost:{PORT}/v1/models",
        ],
    ]
    lines: list[str] = []
    for section in filter(None, sections):
        lines += [*section, ""]
    return tuple(lines)


def _storage_comments(
    request: ManifestRequest, facts: ModelFacts, storage: StorageBackend, grants: Sequence[BucketGrant]
) -> list[str]:
    if storage is StorageBackend.HUB:
        why = "is gated and needs a token" if facts.gated else "is public; a token only lifts rate limits"
        lines = [
            f"Weights from Hugging Face. {request.model} {why}. The token is read from the Secret {HF_SECRET}:",
            f"kubectl create secret generic {HF_SECRET} --from-literal={HF_SECRET_KEY}=HUGGING_FACE_TOKEN"
            f" --namespace={request.namespace}",
        ]
        if facts.gated:
            lines.append('Without it the Deployment stays at "Does not have minimum availability".')
        if _caches_in_memory(request, facts):
            lines.append(f"HF_HOME={RAM_CACHE}: 90 GiB and more would evict the pod from a default boot disk.")
        return lines
    how = {
        StorageBackend.STREAMER: "the Run:ai Model Streamer",
        StorageBackend.FUSE: f"Cloud Storage FUSE (this vLLM is older than {_dotted(STREAMER_SINCE)})",
    }[storage]
    return [
        f"Weights from {request.model_bucket_uri} by {how}. GKE {LEAST_GKE[0]}, {LEAST_GKE[1]} or later.",
        "Before applying, let the pods read the bucket (Workload Identity Federation for GKE):",
        *(grant.command for grant in grants),
        "The path must hold config.json and the weights themselves, else vLLM takes it for a repository's name and",
        f"crashes with HFValidationError: llm-rollout check-layout {request.model_bucket_uri} --target TARGET",
    ]


def _dotted(versions: dict[AcceleratorKind, tuple[int, int, int]]) -> str:
    return ", ".join(f"v{'.'.join(map(str, version))} on {kind.value.upper()}s" for kind, version in versions.items())


def _xla_comments(
    request: ManifestRequest, chip: AcceleratorType, serving: ServingSpec, storage: StorageBackend
) -> list[str]:
    if chip.kind is not AcceleratorKind.TPU:
        return []
    first_min = TPU_ENGINE_START_S / 60
    lines = [f"The first start on a TPU compiles one XLA graph for each shape: up to {first_min:.0f} minutes."]
    cache = xla_cache_path(request, chip)
    if cache is None and storage is not StorageBackend.HUB:
        return [
            *lines,
            "The weights are at the root of their bucket, where nothing is beside them: every replica compiles for",
            "itself. With --model-bucket-uri=gs://BUCKET/PATH replicas share a cache, and start in 5 minutes.",
        ]
    if cache is None:
        return [*lines, "Every replica compiles for itself: with --model-bucket-uri they share a cache."]
    name = serving.name
    return [
        *lines,
        f"Replicas share its cache, gs://{_bucket_of(str(request.model_bucket_uri))[0]}/{cache}, and must not write it"
        " at the same time. Either let one",
        "replica become ready, and then add the others:",
        f"kubectl wait --for=condition=Available --timeout={serving.ready_timeout_s:.0f}s"
        f" --namespace={request.namespace} deployment/{name}",
        f"kubectl scale --replicas=N --namespace={request.namespace} deployment/{name}",
        "or remove VLLM_XLA_CACHE_PATH: simpler, and every replica compiles for itself.",
    ]


def _autoscaling_comments(request: ManifestRequest, autoscaling: Autoscaling) -> list[str]:
    lines = [f"Autoscaling on {request.adapter.metric(METRIC)}:", *autoscaling.reasons]
    if request.adapter is Adapter.STACKDRIVER:
        lines += [
            f"The autoscaler reads it through the Custom Metrics Stackdriver Adapter ({ADAPTER_DOCS}):",
            f"kubectl apply -f {ADAPTER_MANIFEST}",
            "The adapter's own service account must be allowed to read metrics (the same page, Workload Identity):",
            _adapter_grant(request),
        ]
    else:
        lines.append("The autoscaler reads it through prometheus-adapter, which must export this metric for pods.")
    return [*lines, "kubectl get apiservice v1beta1.custom.metrics.k8s.io    # must be True"]


def _adapter_grant(request: ManifestRequest) -> str:
    project = request.project or "PROJECT_ID"
    member = request.universe.workload_identity_principal(
        project, request.project_number or "PROJECT_NUMBER", ADAPTER_NAMESPACE, ADAPTER_SERVICE_ACCOUNT
    )
    return (
        f'gcloud projects add-iam-policy-binding {project} --role={ADAPTER_ROLE} --member="{member}" --condition=None'
    )


def _llm_d_comments(name: str) -> list[str]:
    return [
        "llm-d: requests go through the Gateway to the pod that the endpoint picker chooses. The cluster needs the",
        "Gateway API (gcloud container clusters update $CLUSTER_NAME --gateway-api=standard), a proxy-only subnet in",
        "its region, and the inference extension's definitions:",
        f"kubectl apply -f {INFERENCE_EXTENSION_MANIFEST}",
        f"kubectl get gateway {name}-gateway -o jsonpath='{{.status.addresses[0].value}}'    # the endpoint's address",
    ]


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors: people edit these files."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _yaml(each: KubernetesObject) -> str:
    return yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
