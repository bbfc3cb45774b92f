"""Preflight: every reason why a rollout could not work, found before anything changes, and shown all at once."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum

from rollout.errors import PreflightFailed
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, IdentityMode, NodePool, Target
from rollout.values import Value
from rollout.vllm_flags import InvalidVllmArguments, parse_arguments

BUCKET_LOADING_SINCE = "1.30.2-gke.1394000"
BUCKET_LOADING_SINCE_1_29 = "1.29.6-gke.1254000"
"""First GKE versions that load models from Cloud Storage (quickstart)."""

COMPUTE_CLASS_SINCE = "1.30.3-gke.1451000"
"""https://docs.cloud.google.com/kubernetes-engine/docs/concepts/about-custom-compute-classes"""

AUTO_CREATION_SINCE = "1.33.3-gke.1136000"
"""From here on a ComputeClass creates node pools in a Standard cluster that has no node auto-provisioning."""

SPOT_ONLY_MACHINES = frozenset({"a3-highgpu-1g", "a3-highgpu-2g", "a3-highgpu-4g"})
"""https://cloud.google.com/compute/docs/accelerator-optimized-machines#a3-high-vms"""

STREAMER_SINCE = (0, 11, 1)
"""vLLM's first release with the Run:ai Model Streamer for Cloud Storage (quickstart)."""


class CheckState(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """Could not be asked, e.g. the caller may not read quotas; says so instead of passing."""
    NOT_APPLICABLE = "not applicable"


class Check(Value):
    """One preflight check with its answer."""

    name: str
    state: CheckState
    why: str
    resolution: str = ""


def ok(name: str, why: str) -> Check:
    return Check(name=name, state=CheckState.OK, why=why)


def failed(name: str, why: str, resolution: str) -> Check:
    return Check(name=name, state=CheckState.FAILED, why=why, resolution=resolution)


def warning(name: str, why: str, resolution: str) -> Check:
    return Check(name=name, state=CheckState.WARNING, why=why, resolution=resolution)


def unknown(name: str, why: str, resolution: str = "") -> Check:
    return Check(name=name, state=CheckState.UNKNOWN, why=why, resolution=resolution)


def not_applicable(name: str, why: str) -> Check:
    return Check(name=name, state=CheckState.NOT_APPLICABLE, why=why)


def required_services(target: Target) -> tuple[str, ...]:
    """The Google APIs that a rollout to `target` calls."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return ("storage",)
    services = ["container", "storage", "cloudresourcemanager"]
    if target.identity is IdentityMode.SERVICE_ACCOUNT:
        services.append("iam")
    return tuple(services)


READER_PERMISSIONS = ("storage.buckets.getIamPolicy", "storage.buckets.setIamPolicy")
"""On the bucket, to let the pods read it and to take that back."""

WEIGHTS_PERMISSIONS = (
    "storage.buckets.get",
    "storage.multipartUploads.abort",
    "storage.multipartUploads.create",
    "storage.multipartUploads.list",
    "storage.multipartUploads.listParts",
    "storage.objects.create",
    "storage.objects.delete",
    "storage.objects.get",
    "storage.objects.list",
    "storage.objects.update",
)
"""On the bucket: weights and records. `roles/storage.objectAdmin` lacks the first."""

OPTIONAL_PERMISSIONS = (
    "compute.acceleratorTypes.list",
    "compute.disks.list",
    "compute.regions.get",
    "serviceusage.services.list",
)
"""Only read, and only for a better answer: without them a check is unknown, and disks are not looked for."""


def bucket_permissions(target: Target) -> tuple[str, ...]:
    """What the caller needs on the bucket; a kubeconfig cluster brings its own readers."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return WEIGHTS_PERMISSIONS
    return (*READER_PERMISSIONS, *WEIGHTS_PERMISSIONS)


def required_permissions(
    target: Target, *, creates_bucket: bool, creates_cluster: bool, updates_cluster: bool
) -> tuple[str, ...]:
    """The project permissions that the plan and its teardown need, least privilege.

    The tutorial asks for `roles/container.admin` and `roles/iam.serviceAccountAdmin`; these are the permissions of
    those roles (and of Storage Admin) that are used. What is done inside of a cluster that exists is asked of the
    cluster (`rollout.rights`); one that is to be made holds no Roles yet, so there two permissions of
    `roles/container.developer` stand for all of it.
    """
    needed: list[str] = []
    if creates_bucket:
        needed += ["storage.buckets.create", "storage.buckets.delete", *bucket_permissions(target)]
    if target.cluster.mode is not ClusterMode.KUBECONFIG:
        needed += ["resourcemanager.projects.get", "container.clusters.get"]
        if creates_cluster:
            needed += ["container.clusters.create", "container.clusters.delete"]
            needed += ["container.deployments.create", "container.services.create"]
        if creates_cluster or updates_cluster:
            needed += ["container.clusters.update", "container.operations.get", "container.operations.list"]
        if target.identity is IdentityMode.SERVICE_ACCOUNT:
            needed += [
                "iam.serviceAccounts.create",
                "iam.serviceAccounts.delete",
                "iam.serviceAccounts.get",
                "iam.serviceAccounts.getIamPolicy",
                "iam.serviceAccounts.setIamPolicy",
            ]
    return tuple(needed)


def check_services(required: Iterable[str], enabled: Iterable[str], target: Target) -> Check:
    missing = sorted(set(required) - {name.split(".")[0] for name in enabled})
    if not missing:
        return ok("APIs", "all required APIs are enabled")
    services = " ".join(f"{name}.googleapis.com" for name in missing)  # service IDs are the same in every universe
    return failed(
        "APIs",
        f"not enabled in {target.project}: {', '.join(missing)}",
        f"gcloud services enable {services} --project={target.project} (needs serviceusage.services.enable)",
    )


def check_permissions(required: Iterable[str], granted: Iterable[str], target: Target) -> Check:
    missing = sorted(set(required) - set(granted))
    if not missing:
        return ok("permissions", "the caller has every permission that the plan needs")
    return failed(
        "permissions",
        f"missing on {target.project}: {', '.join(missing)}",
        "Ask for the custom role of deployments/worker/README.md, or for roles/container.admin,"
        " roles/iam.serviceAccountAdmin and roles/storage.admin.",
    )


def check_bucket_permissions(granted: Iterable[str], target: Target) -> Check:
    """On a bucket that exists, its own policy counts as well as the project's."""
    missing = sorted(set(bucket_permissions(target)) - set(granted))
    if not missing:
        return ok("bucket permissions", f"the caller may use gs://{target.bucket} as the rollout will")
    return failed(
        "bucket permissions",
        f"missing on gs://{target.bucket}: {', '.join(missing)}",
        f"gcloud storage buckets add-iam-policy-binding gs://{target.bucket} --role=roles/storage.admin --member=…,"
        " or the custom role of deployments/worker/README.md.",
    )


def check_billing(enabled: bool | None, target: Target) -> Check:
    if enabled is None:
        return unknown(
            "billing",
            "the billing state could not be read: no permission, or no answer",
            "Grant billing.resourceAssociations.list.",
        )
    if enabled:
        return ok("billing", f"enabled for {target.project}")
    return failed("billing", f"not enabled for {target.project}", "Link a billing account to the project.")


def check_region_accelerator(accelerator: str, offered: Iterable[str] | None, region: str) -> Check:
    if offered is None:
        return unknown(
            "accelerator in region", "the accelerator list could not be read", "Grant compute.acceleratorTypes.list."
        )
    offered = sorted(set(offered))
    if accelerator in offered:
        return ok("accelerator in region", f"{region} offers {accelerator}")
    return failed(
        "accelerator in region",
        f"{region} does not offer {accelerator}",
        f"It offers {', '.join(offered) or 'no accelerators'}; choose one of these, or another region.",
    )


def check_machine(serving: ServingSpec, target: Target, *, on_pool: bool) -> Check:
    """Whether the machine type can be had as the target asks for it."""
    name = "machine type"
    pool = target.cluster.node_pool if on_pool else None
    machine = pool.machine_type if pool else serving.accelerator.machine_type
    if machine in SPOT_ONLY_MACHINES and not (pool is not None and pool.spot):
        return warning(
            name,
            f"Google Cloud offers {machine} as Spot or Flex-start alone, and this asks for on-demand",
            "Take a3-highgpu-8g (`machines` of the target), or a node pool with spot: true.",
        )
    return ok(name, machine)


def check_gpu_quota(needed: int, limit: float | None, usage: float | None, *, metric: str, region: str) -> Check:
    """`needed` GPUs beside the `usage` in force, against the region's `limit`."""
    if limit is None or usage is None:
        return unknown("GPU quota", f"the quota {metric} of {region} could not be read", "Grant compute.regions.get.")
    free = limit - usage
    if needed <= free:
        return ok(
            "GPU quota", f"{needed} of {free:.0f} free GPUs ({metric} in {region}: {usage:.0f} of {limit:.0f} in use)"
        )
    return failed(
        "GPU quota",
        f"the plan needs {needed} GPUs, {free:.0f} are free ({metric} in {region}: {usage:.0f} of {limit:.0f} in use)",
        f"Ask for {needed - free:.0f} more on the Quotas page, or lower replicas.",
    )


def check_scale_out(most: int, quota: Check) -> Check:
    """`quota`, the answer for `most` replicas, as what it means for an autoscaler: a limit that load may meet later."""
    name = f"GPU quota of {most} replicas"
    if quota.state is CheckState.FAILED:
        return warning(name, quota.why, "Ask for more, or lower autoscaling.max_replicas: later pods would wait.")
    return quota.model_copy(update={"name": name})


def check_trial(served: str | None, *, removes_itself: bool) -> Check:
    """A trial, which removes everything at its end, over a model server that serves: `served` names it."""
    name = "what serves now"
    if served is None:
        return ok(name, "nothing: this rollout is the first under its name")
    if not removes_itself:
        return ok(name, f"{served}: it stays, or comes back, if this rollout fails")
    return failed(
        name,
        f"{served} serves, and a trial (teardown: always) would put itself in its place and then be removed",
        "Give the trial a name or a namespace of its own, or choose another policy.teardown.",
    )


def gke_version(text: str) -> tuple[int, ...]:
    """`1.30.2-gke.1394000` -> (1, 30, 2, 1394000): comparable."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def check_cluster_version(version: str | None, target: Target) -> Check:
    """Whether the cluster's version, or the one that a new cluster gets, loads models from Cloud Storage."""
    name = "cluster version"
    if not version:
        return unknown(name, f"the versions that {target.region} offers could not be read")
    needed = BUCKET_LOADING_SINCE_1_29 if gke_version(version) < (1, 30) else BUCKET_LOADING_SINCE
    if gke_version(version) >= gke_version(needed):
        return ok(name, f"{version} loads models from Cloud Storage (since {needed})")
    return failed(
        name,
        f"loading from Cloud Storage needs GKE {needed} or newer; this is {version}",
        f"gcloud container clusters upgrade {target.cluster.name} --location={target.region} --master,"
        " or let the target name another cluster.",
    )


def check_node_provisioning(
    serving: ServingSpec,
    target: Target,
    *,
    version: str | None,
    auto_provisioning: bool,
    live_pool: NodePool | None = None,
) -> Check:
    """Whether somebody will make nodes for the pods: a node pool (Standard), or GKE itself through a ComputeClass.

    `version` is the cluster's; `auto_provisioning` whether the existing cluster has node auto-provisioning;
    `live_pool` the target's node pool as it is, when it exists.
    """
    name, wanted = "nodes for the pods", serving.accelerator
    cluster = target.cluster
    pool = live_pool or cluster.node_pool
    if cluster.mode is ClusterMode.STANDARD and pool is not None:
        return _check_pool(name, pool, serving)
    if wanted.compute_class is None:
        if cluster.mode is ClusterMode.AUTOPILOT:
            return ok(name, f"Autopilot makes nodes with {wanted.type} by label")
        return failed(
            name,
            f"a Standard cluster makes no {wanted.type} nodes by itself",
            "Set cluster.node_pool in the target, or serving.accelerator.compute_class.",
        )
    since = COMPUTE_CLASS_SINCE
    if cluster.mode is ClusterMode.STANDARD and not auto_provisioning:
        since = AUTO_CREATION_SINCE
    if not version:
        return unknown(name, f"node creation by ComputeClass needs GKE {since}; the version could not be read")
    if gke_version(version) < gke_version(since):
        return failed(
            name,
            f"node creation by the ComputeClass {wanted.compute_class} needs GKE {since} or newer; this is {version}",
            "Upgrade the cluster, or use a Standard cluster with cluster.node_pool.",
        )
    return ok(name, f"GKE makes {wanted.machine_type} nodes by the ComputeClass {wanted.compute_class}")


def _check_pool(name: str, pool: NodePool, serving: ServingSpec) -> Check:
    wanted = serving.accelerator
    if pool.accelerator != wanted.type:
        return failed(
            name,
            f"the node pool {pool.name} has {pool.accelerator or 'no accelerators'}, the model needs {wanted.type}",
            "Give cluster.node_pool another name and the model's accelerator, or change serving.accelerator.type.",
        )
    fitting = pool.accelerator_count // wanted.count
    if pool.max_nodes * fitting < serving.replicas:
        return failed(
            name,
            f"{serving.replicas} replicas of {wanted.count} GPUs do not fit on {pool.max_nodes} nodes"
            f" of {pool.accelerator_count}",
            "Raise cluster.node_pool.max_nodes or accelerator_count (with its machine_type), or lower replicas.",
        )
    return ok(name, f"the node pool {pool.name} grows to {pool.max_nodes} × {pool.accelerator_count} {wanted.type}")


def check_image(image: str) -> Check:
    """A tag can move between two pods of one rollout; a digest cannot."""
    name = "image"
    if "@sha256:" in image:
        return ok(name, "pinned by digest")
    digest = "value(image_summary.fully_qualified_digest)"
    return warning(
        name,
        f"{image} is named by a tag, which can move",
        f"Pin it: gcloud artifacts docker images describe {image} --format='{digest}'",
    )


def check_vllm_arguments(serving: ServingSpec) -> Check:
    """Every argument against vLLM's own parser: a wrong flag would cost a node and a crash loop to find."""
    name = "vLLM arguments"
    arguments = serving.vllm_args("gs://bucket")[len(serving.entrypoint) :]
    try:
        parse_arguments(arguments)
    except InvalidVllmArguments as error:
        return failed(name, error.summary, error.resolution)
    return ok(name, f"vLLM's parser accepts all {len(arguments)}")


def check_streamer(serving: ServingSpec) -> Check:
    """`load_format: runai_streamer` against the release in the image's tag."""
    name = "weights loading"
    if serving.load_format != "runai_streamer":
        return not_applicable(name, "the image loads in its own way")
    release = serving.vllm_release
    if release is None:
        return unknown(name, f"{serving.image} does not tell its vLLM release; the streamer needs 0.11.1 or newer")
    if tuple(int(number) for number in release.split(".")) < STREAMER_SINCE:
        return failed(
            name,
            f"{serving.image} is older than vLLM 0.11.1, which brought the model streamer for Cloud Storage",
            "Use a newer image, or leave serving.load_format out.",
        )
    return ok(name, f"vLLM {release} streams from Cloud Storage")


def check_hub_token(*, from_hub: bool, secret_named: bool, token_found: bool) -> Check:
    """The token that pods need when they load from the hub themselves: its Secret is made from the Prefect block."""
    name = "hub token for the pods"
    if not from_hub:
        return not_applicable(name, "the pods load from the bucket")
    if not secret_named:
        return warning(name, "the pods load from the hub without a token", "Set hub_token_secret for gated models.")
    if token_found:
        return ok(name, "the Secret block holds it")
    return failed(
        name,
        "the Secret block that the target names in hub_token_secret is empty or absent",
        "prefect block create secret, with the Hugging Face token as its value.",
    )


def require(checks: Iterable[Check]) -> None:
    """Raise `PreflightFailed` naming every failed check; warnings pass."""
    failures = [check for check in checks if check.state is CheckState.FAILED]
    if failures:
        raise PreflightFailed(
            "; ".join(f"{check.name}: {check.why}" for check in failures),
            where="preflight",
            resolution=" ".join(check.resolution for check in failures),
        )
