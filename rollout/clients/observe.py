"""What exists now: every read that the plan rests on, and the preflight checks that follow. Only reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rollout import layout, preflight
from rollout.accelerators import AcceleratorKind, accelerator
from rollout.autoscaling import check_metrics_adapter
from rollout.capacity import GpuRoom, check_surge, gpus_per_node
from rollout.clients.cluster import ApplyPreview, ClusterClient, NodeRoom
from rollout.clients.compute import Compute
from rollout.clients.gke import ClusterInfo, Gke
from rollout.clients.hub import HubClient
from rollout.clients.iam import (
    OBJECT_VIEWER,
    WORKLOAD_IDENTITY_USER,
    BucketPolicy,
    ServiceAccountPolicy,
    ServiceAccounts,
    has_binding,
)
from rollout.clients.projects import Projects
from rollout.clients.records import RecordStore
from rollout.clients.retrying import with_retries
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import read_provenance
from rollout.delivery import DeliveryStrategy
from rollout.errors import ApiDisabled, PermissionMissing, RolloutError, TransientError
from rollout.fit import (
    DEFAULT_BOOT_DISK_GIB,
    check_context_window,
    check_ephemeral_request,
    check_ephemeral_storage,
    check_memory,
    weights_copy,
)
from rollout.ledger import standing
from rollout.model import PinnedModel
from rollout.objects import WeightsSource, uses_compute_class
from rollout.plan import LiveVersion, Observation
from rollout.policy import RolloutPolicy, Teardown
from rollout.preflight import Check
from rollout.rendering import KubernetesObject
from rollout.report import Action
from rollout.revisions import revision_of, revisions_in
from rollout.rights import NAME, check_rights, needed_rights
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, IdentityMode, NodePool, Target

WEIGHTS_SOURCE = WeightsSource.BUCKET
"""Where the pods of a rollout load from: what it has put there itself, and proven."""

LOOK_ATTEMPTS = 3
"""Somebody waits for the plan: an API server that does not answer within seconds is a finding, not a reason to wait."""


class _Observer:
    """Collects what is there; a refusal of one API becomes a failed check instead of hiding the others."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.checks: list[Check] = []
        self.found: dict[str, Any] = {}
        self.recorded = False
        """Whether a record says that a rollout made the Deployment."""

    @contextmanager
    def asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except TransientError:
            raise
        except RolloutError as error:
            why = f"{error.where}: {error.summary}" if error.where else error.summary
            self.checks.append(preflight.failed(name, why, error.resolution))

    def optional(self, ask: Callable[[], Any]) -> Any:
        """The answer, or None where the caller may not ask or nobody answers: the check then says unknown."""
        try:
            return with_retries(ask, attempts=LOOK_ATTEMPTS)
        except (PermissionMissing, ApiDisabled, TransientError):
            return None


def observe(
    model: PinnedModel,
    serving: ServingSpec,
    target: Target,
    objects: Sequence[KubernetesObject],
    *,
    policy: RolloutPolicy,
    hub_token: str | None,
) -> Observation:
    """Ask everything once. Raises only for transient failures and an unreachable hub; the rest are failed checks."""
    observer = _Observer(target)
    observer.checks.append(
        preflight.ok("Hugging Face access", f"{model.repo_id}@{model.short_sha}: {len(model.files)} files may be read")
    )
    _check_spec(observer, serving, hub_token)
    _observe_bucket(observer, model)
    _observe_live_version(observer, serving)
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        preview = _observe_objects(observer, objects, policy)
    else:
        _observe_project(observer)
        cluster = _observe_cluster(observer)
        _check_provisioning(observer, serving, cluster)
        _observe_identity(observer)
        preview = _observe_objects(observer, objects, policy) if cluster is not None else None
        _observe_accelerator(observer, serving, objects, policy.delivery, preview)
        _check_permissions(observer, cluster)
    _observe_unrecorded(observer, serving, preview)
    live = observer.found.get("live_before")
    is_trial = policy.teardown is Teardown.ALWAYS
    observer.checks.append(preflight.check_trial(live.model if live else None, removes_itself=is_trial))
    if _autoscaler_among(objects) is not None:
        _check_adapter(observer, there=preview is not None)
    _check_checkpoint(observer, model, serving, hub_token)
    return Observation(**observer.found, checks=tuple(observer.checks))


def _observe_bucket(observer: _Observer, model: PinnedModel) -> None:
    name = "bucket"
    with observer.asking(name):
        storage = StorageClient(observer.target)
        exists = storage.bucket_exists()
        observer.found["bucket_exists"] = exists
        if not exists:
            observer.checks.append(preflight.ok(name, f"gs://{observer.target.bucket} will be made"))
            return
        proven = read_provenance(model, observer.target) is not None
        observer.found["weights_proven"] = proven
        state = "holds the proven weights" if proven else "exists; the weights will be transferred"
        observer.checks.append(preflight.ok(name, f"gs://{observer.target.bucket} {state}"))
        granted = storage.granted_permissions(preflight.bucket_permissions(observer.target))
        observer.checks.append(preflight.check_bucket_permissions(granted, observer.target))


def _observe_live_version(observer: _Observer, serving: ServingSpec) -> None:
    """What the records say serves under this name."""
    with observer.asking("records"):
        records = list(RecordStore(observer.target).read_all())
        live = standing(records, serving.name)
        observer.found["live_before"] = live
        deployment = ("Deployment", f"{observer.target.namespace}/{serving.name}")
        observer.recorded = any(deployment in record.created for record in records)


def _observe_unrecorded(observer: _Observer, serving: ServingSpec, preview: ApplyPreview | None) -> None:
    """A Deployment that no record tells of serves all the same: applied by hand, or older than the records."""
    if preview is None or observer.recorded or observer.found.get("live_before") is not None:
        return
    if any(change.kind == "Deployment" and change.action is not Action.CREATED for change in preview.changes):
        observer.found["live_before"] = LiveVersion(model=f"a {serving.name} that no record tells of")


def _observe_project(observer: _Observer) -> None:
    target = observer.target
    projects = Projects(target)
    with observer.asking("project"):
        observer.found["project_number"] = projects.get().number
    enabled = observer.optional(projects.enabled_services)
    if enabled is None:
        observer.checks.append(
            preflight.unknown("APIs", "the caller may not list services", "Grant serviceusage.services.list.")
        )
    else:
        observer.checks.append(preflight.check_services(preflight.required_services(target), enabled, target))
    observer.checks.append(preflight.check_billing(observer.optional(projects.billing_enabled), target))


def _observe_cluster(observer: _Observer) -> ClusterInfo | None:
    target, name = observer.target, "cluster"
    with observer.asking(name):
        cluster = Gke(target).get()
        observer.found["cluster_exists"] = cluster is not None
        if cluster is not None:
            observer.found["cluster_version"] = cluster.version
            observer.found["node_pool_exists"] = _live_pool(target, cluster) is not None
            observer.checks.append(_check_existing_cluster(cluster, target))
            observer.checks.append(_check_observability(cluster, target))
        elif target.cluster.create_if_absent:
            why = f"{target.cluster.name} will be made ({target.cluster.mode}, {target.cluster.release_channel})"
            observer.checks.append(preflight.ok(name, why))
        else:
            observer.checks.append(
                preflight.failed(
                    name,
                    f"{target.cluster.name} does not exist in {target.region}",
                    "Set cluster.create_if_absent, or correct cluster.name.",
                )
            )
        return cluster
    return None


def _check_existing_cluster(cluster: ClusterInfo, target: Target) -> Check:
    wants_autopilot = target.cluster.mode is ClusterMode.AUTOPILOT
    if cluster.is_autopilot != wants_autopilot:
        found = "Autopilot" if cluster.is_autopilot else "Standard"
        return preflight.failed(
            "cluster",
            f"{cluster.name} is a {found} cluster, the target says {target.cluster.mode}",
            f"Set cluster.mode to {found.lower()}, or name another cluster.",
        )
    if not cluster.workload_pool:
        return preflight.failed(
            "cluster",
            f"{cluster.name} has no Workload Identity",
            f"gcloud container clusters update {cluster.name} --location={target.region}"
            f" --workload-pool={target.universe.workload_pool(target.project)}",
        )
    return preflight.ok("cluster", f"{cluster.name} exists, version {cluster.version}, {cluster.status}")


def _check_observability(cluster: ClusterInfo, target: Target) -> Check:
    """Somebody else's cluster is not changed behind their back: it only says what it lacks."""
    name = "observability"
    if not target.cluster.observability:
        return preflight.not_applicable(name, "not asked for by the target")
    if cluster.is_observable:
        return preflight.ok(name, "logs, metrics and auto-monitoring are on")
    if cluster.is_ours:
        return preflight.ok(name, "logs, metrics and auto-monitoring will be switched on")
    return preflight.warning(
        name,
        f"{cluster.name}, which is not ours, lacks some of the logs and metrics that the dashboards read",
        f"gcloud container clusters update {cluster.name} --location={target.region}"
        " --enable-managed-prometheus --auto-monitoring-scope=ALL --logging=SYSTEM,WORKLOAD"
        " --monitoring=SYSTEM,DEPLOYMENT,HPA,POD,DCGM",
    )


def _observe_identity(observer: _Observer) -> None:
    target = observer.target
    with observer.asking("workload identity"):
        if target.identity is IdentityMode.SERVICE_ACCOUNT:
            exists = ServiceAccounts(target).get(target.gsa_email) is not None
            observer.found["service_account_exists"] = exists
            if exists:
                policy = ServiceAccountPolicy(target, target.gsa_email)
                observer.found["workload_identity_bound"] = has_binding(
                    policy, WORKLOAD_IDENTITY_USER, target.workload_identity_member
                )
        if observer.found.get("bucket_exists"):
            reader = target.reader_member(observer.found.get("project_number", ""))
            bound = has_binding(BucketPolicy(target, target.bucket), OBJECT_VIEWER, reader)
            observer.found["reader_bound"] = bound


def _check_provisioning(observer: _Observer, serving: ServingSpec, cluster: ClusterInfo | None) -> None:
    """What the cluster, or the one that will be made, can do: its version, and who makes the nodes."""
    target = observer.target
    version = cluster.version if cluster else observer.optional(lambda: _version_to_come(target))
    observer.checks.append(preflight.check_cluster_version(version, target))
    observer.checks.append(
        preflight.check_node_provisioning(
            serving,
            target,
            version=version,
            auto_provisioning=cluster is not None and cluster.node_auto_provisioning,
            live_pool=_live_pool(target, cluster),
        )
    )


def _version_to_come(target: Target) -> str | None:
    """What a new cluster of the target's release channel starts with."""
    return next(iter(Gke(target).server_versions().by_channel.get(target.cluster.release_channel, ())), None)


def _live_pool(target: Target, cluster: ClusterInfo | None) -> NodePool | None:
    """The target's node pool as it is: it is adopted, so what the target says of it does not count."""
    wanted = target.cluster.node_pool
    found = (
        next((pool for pool in cluster.node_pools if wanted and pool.name == wanted.name), None) if cluster else None
    )
    if wanted is None or found is None:
        return None
    return wanted.model_copy(
        update={
            "accelerator": found.accelerator,
            "accelerator_count": found.accelerator_count,
            "max_nodes": found.max_nodes or wanted.max_nodes,
        }
    )


def _observe_accelerator(
    observer: _Observer,
    serving: ServingSpec,
    objects: Sequence[KubernetesObject],
    strategy: DeliveryStrategy,
    preview: ApplyPreview | None,
) -> None:
    """Whether the region has the accelerator, and room for the pods: on nodes, in the quota, in the node pool."""
    target, wanted = observer.target, serving.accelerator
    kind = accelerator(wanted.type)
    compute = Compute(target)
    offered = observer.optional(compute.accelerators)
    observer.checks.append(preflight.check_region_accelerator(wanted.type, offered, target.region))
    observer.checks.append(preflight.check_machine(serving, target, on_pool=not uses_compute_class(serving, target)))
    if kind.kind is AcceleratorKind.TPU:
        return
    pool = None if uses_compute_class(serving, target) else target.cluster.node_pool
    metric = f"PREEMPTIBLE_{kind.quota_metric}" if pool is not None and pool.spot else kind.quota_metric
    quota = (observer.optional(compute.quotas) or {}).get(metric)
    deployment = next(manifest for manifest in objects if manifest["kind"] == "Deployment")
    running, there, others = 0, NodeRoom(nodes=0, idle_gpus=0), set[str]()
    if preview is not None:
        client = ClusterClient.connect(target)
        live = client.find(deployment)
        running = live["spec"]["replicas"] if live else 0
        if strategy.by_revisions:
            own = revision_of(deployment, serving)
            others = {each for each in revisions_in(client.inventory(), serving) if each != own}
        selector = deployment["spec"]["template"]["spec"]["nodeSelector"]
        there = observer.optional(lambda: client.gpu_room(selector, wanted.count)) or there
    room = GpuRoom(
        gpus_per_node=gpus_per_node(serving, target),
        idle_gpus=there.idle_gpus,
        free_quota=quota and quota.free,
        more_nodes=max(0, pool.max_nodes - there.nodes) if pool else None,
    )

    def check_quota(replicas: int) -> Check:
        return preflight.check_gpu_quota(
            room.new_nodes(max(0, replicas - running), wanted.count) * room.gpus_per_node,
            quota and quota.limit,
            quota and quota.usage,
            metric=metric,
            region=target.region,
        )

    observer.checks.append(check_quota(serving.replicas))
    autoscaler = _autoscaler_among(objects)
    if autoscaler is not None:
        most = autoscaler["spec"]["maxReplicas"]
        observer.checks.append(preflight.check_scale_out(most, check_quota(most)))
    replaced = any(
        field.path.startswith(".spec.template")
        for diff in (preview.diffs if preview else ())
        if diff.kind == "Deployment"
        for field in diff.fields
    )
    observer.checks.append(
        check_surge(serving, strategy, room, running=running, replaces_pods=replaced or bool(others))
    )


def _autoscaler_among(objects: Sequence[KubernetesObject]) -> KubernetesObject | None:
    return next((item for item in objects if item["kind"] == "HorizontalPodAutoscaler"), None)


def _check_adapter(observer: _Observer, *, there: bool) -> None:
    with observer.asking("metrics adapter"):
        groups = ClusterClient.connect(observer.target, attempts=LOOK_ATTEMPTS).api_groups() if there else None
        observer.checks.append(check_metrics_adapter(groups))


def _check_permissions(observer: _Observer, cluster: ClusterInfo | None) -> None:
    target = observer.target
    wants_pool = target.cluster.node_pool is not None and _live_pool(target, cluster) is None
    wants_observability = target.cluster.observability and cluster is not None and not cluster.is_observable
    required = preflight.required_permissions(
        target,
        creates_bucket=not observer.found.get("bucket_exists", False),
        creates_cluster=cluster is None,
        updates_cluster=wants_pool or wants_observability,
    )
    with observer.asking("permissions"):
        granted = Projects(observer.target).granted_permissions(required)
        observer.checks.append(preflight.check_permissions(required, granted, observer.target))


def _observe_objects(
    observer: _Observer, objects: Sequence[KubernetesObject], policy: RolloutPolicy
) -> ApplyPreview | None:
    """What we may do in the cluster, and the server's dry run of everything; None if it refused."""
    with observer.asking(NAME):
        observer.checks.append(_check_rights(observer, objects, policy))
    with observer.asking("manifests"):
        preview = ClusterClient.connect(observer.target, attempts=LOOK_ATTEMPTS).preview(objects)
        observer.found["object_changes"] = preview.changes
        observer.found["object_diff"] = preview.markdown
        observer.checks.append(preflight.ok("manifests", f"{len(objects)} objects pass a server-side dry run"))
        return preview
    return None


def _check_rights(observer: _Observer, objects: Sequence[KubernetesObject], policy: RolloutPolicy) -> Check:
    """Asked for all at once: a dry run stops at the first right that is missing, and says nothing of the teardown."""
    target = observer.target
    client = ClusterClient.connect(target, attempts=LOOK_ATTEMPTS)
    # None: whoever may not even look will not make it.
    exists = observer.optional(lambda: client.namespace_exists(target.namespace)) is not False
    sends_token = target.hub_token_secret is not None
    rights = needed_rights(objects, policy, namespace_exists=exists, sends_token=sends_token)
    return check_rights(client.denied(rights), client.caller(), target.namespace, namespace_exists=exists)


def _check_spec(observer: _Observer, serving: ServingSpec, hub_token: str | None) -> None:
    """What the serving spec says about itself; nothing is asked."""
    observer.checks += [
        preflight.check_vllm_arguments(serving),
        preflight.check_image(serving.image),
        preflight.check_streamer(serving),
        preflight.check_hub_token(
            from_hub=WEIGHTS_SOURCE is WeightsSource.HUB,
            secret_named=observer.target.hub_token_secret is not None,
            token_found=bool(hub_token),
        ),
    ]


def _check_checkpoint(observer: _Observer, model: PinnedModel, serving: ServingSpec, hub_token: str | None) -> None:
    """Whether the commit is whole and fits on the accelerator: from its small files, before anything is moved."""
    with observer.asking("checkpoint"):
        documents = read_documents(model, observer.target, hub_token)
        where = f"{model.repo_id}@{model.short_sha}"
        config = layout.parse_config(documents.get(layout.CONFIG), where)
        sizes = {file.path: file.size_bytes for file in model.files}
        report = layout.check(where, sizes, documents, {}, vllm_release=serving.vllm_release)
        observer.checks.append(layout.check_checkpoint(report))
        observer.found["checkpoint_config"] = config
        tokenizer_config = documents.get(layout.TOKENIZER_CONFIG)
        observer.found["has_chat_template"] = has_chat_template(serving, sizes, tokenizer_config)
        _check_fit(observer, model, serving, config)


def _check_fit(observer: _Observer, model: PinnedModel, serving: ServingSpec, config: Mapping[str, Any]) -> None:
    weights_bytes = sum(file.size_bytes for file in model.files if file.path.endswith(".safetensors"))
    observer.checks.append(check_memory(weights_bytes, config, serving, accelerator(serving.accelerator.type)))
    observer.checks.append(check_context_window(config, serving))
    copy = weights_copy(serving, from_hub=WEIGHTS_SOURCE is WeightsSource.HUB)
    # What is copied is the whole folder, not the weights alone.
    observer.checks.append(
        check_ephemeral_storage(
            model.total_bytes, serving, copy, boot_disk_gib=_boot_disk_gib(serving, observer.target)
        )
    )
    pool = observer.target.cluster.node_pool
    if pool is not None and not uses_compute_class(serving, observer.target):
        observer.checks.append(check_ephemeral_request(serving, pool))


def _boot_disk_gib(serving: ServingSpec, target: Target) -> int | None:
    """The boot disk of the nodes that the pods get; None for nodes that somebody else made."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return None
    if uses_compute_class(serving, target) or target.cluster.node_pool is None:
        return serving.accelerator.boot_disk_gib or DEFAULT_BOOT_DISK_GIB
    return target.cluster.node_pool.boot_disk_gib


def has_chat_template(serving: ServingSpec, paths: Collection[str], tokenizer_config: bytes | None) -> bool:
    """As vLLM looks for one: a flag, a file of its own, a key of the tokenizer's config."""
    flags = {argument.partition("=")[0].replace("_", "-") for argument in serving.extra_args}
    if "--chat-template" in flags or not set(layout.CHAT_TEMPLATES).isdisjoint(paths):
        return True
    config = None if tokenizer_config is None else layout.json_object(tokenizer_config)
    return bool((config or {}).get("chat_template"))


def read_documents(model: PinnedModel, target: Target, hub_token: str | None) -> dict[str, bytes]:
    """Those of the files that tell of the others (config.json, the index, …) that the commit has, from the hub."""
    hub = HubClient(target.hub_endpoint, hub_token)
    return {file.path: hub.read(model, file) for file in model.files if file.path in layout.DOCUMENTS}
