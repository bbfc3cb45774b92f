"""Where a model is rolled out: project, region, universe, cluster, identities, bucket and endpoints."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from rollout.cost import DEFAULT_OUTPUT_TO_INPUT_RATIO, PricingModel
from rollout.universe import Universe
from rollout.values import BucketName, KubernetesName, ServiceAccountId, Value

HUGGING_FACE = "https://huggingface.co"


class ClusterMode(StrEnum):
    AUTOPILOT = "autopilot"
    STANDARD = "standard"
    KUBECONFIG = "kubeconfig"
    """Any cluster that a kubeconfig context names; GKE's API is not asked."""


class CredentialSource(StrEnum):
    APPLICATION_DEFAULT = "application-default"
    """Application Default Credentials: gcloud's login, Workload Identity, or a credentials file."""
    ANONYMOUS = "anonymous"
    """No credentials: the embedded cloud, and nothing else."""


class IdentityMode(StrEnum):
    SERVICE_ACCOUNT = "service-account"
    """The tutorial's way: the Kubernetes service account impersonates a Google service account."""
    DIRECT = "direct"
    """Workload Identity Federation's way: the bucket trusts the Kubernetes service account itself."""


class WeightsLayout(StrEnum):
    ROOT = "root"
    """The tutorial's: one bucket per model, `gs://bucket/config.json`. A new commit's names replace the old one's one
    by one: a pod that starts within these seconds can read files of both."""
    CONTENT_ADDRESSED = "content-addressed"
    """`gs://bucket/<organisation>/<name>/<commit>/`: revisions side by side, a live prefix is never overwritten."""


class Approval(StrEnum):
    """Whether a person is asked before anything changes."""

    NEVER = "never"
    ON_CHANGE = "on_change"
    """Ask when the plan changes anything outside of the bucket."""
    ALWAYS = "always"

    def or_stricter(self, other: Approval) -> Approval:
        """The one of both that asks more often; the members stand in that order."""
        return max(self, other, key=list(Approval).index)


class NodePool(Value):
    """A GPU node pool of a Standard cluster."""

    name: KubernetesName = "gpu-pool"
    machine_type: str = "a3-highgpu-8g"
    """On demand, H100s come in machines of eight; a3-highgpu-1g, 2g and 4g need `spot`."""
    accelerator: str = "nvidia-h100-80gb"
    accelerator_count: Annotated[int, Field(ge=1, le=16)] = 8
    min_nodes: Annotated[int, Field(ge=0)] = 0
    max_nodes: Annotated[int, Field(ge=1)] = 2
    spot: bool = False
    boot_disk_gib: Annotated[int, Field(ge=10)] = 100
    """100 GiB: GKE's default; 90 % of it is usable."""


class GpuMachine(Value):
    """The machines that hold one type of GPU in an environment."""

    machine_type: str
    machine_gpu_count: Annotated[int, Field(ge=1, le=16)]
    """GPUs of one machine."""
    compute_class: KubernetesName | None = None
    """Name of the ComputeClass that creates them; None selects nodes by accelerator label (Standard clusters)."""


class Cluster(Value):
    """The cluster that serves: created when absent, adopted when present."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$")] = "llm-serving"
    mode: ClusterMode = ClusterMode.AUTOPILOT
    release_channel: str = "rapid"
    """`rapid`: the tutorial's choice; the newest accelerators arrive there first."""
    create_if_absent: bool = True
    node_pool: NodePool | None = None
    """Only for a Standard cluster."""
    observability: bool = True
    """Managed Prometheus, workload logs, DCGM and auto-monitoring, as the quickstart recommends."""
    kubeconfig: str | None = None
    """Path of a kubeconfig file (default: `$KUBECONFIG`, then `~/.kube/config`); only in mode `kubeconfig`."""
    context: str | None = None


class Endpoints(Value):
    """Addresses that replace the universe's own (the embedded cloud, a private endpoint, a mirror); None keeps it."""

    hub: str | None = None
    storage: str | None = None
    container: str | None = None
    iam: str | None = None
    cloudresourcemanager: str | None = None
    serviceusage: str | None = None
    cloudbilling: str | None = None
    compute: str | None = None
    gkerecommender: str | None = None


class Target(Value):
    """One environment: a file in `deployments/targets/`."""

    name: KubernetesName
    project: Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$")]
    """Project ID; a domain-scoped one is written `example.com:my-project`."""
    region: Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
    universe: Universe = Universe()
    credentials: CredentialSource = CredentialSource.APPLICATION_DEFAULT
    cluster: Cluster = Cluster()
    machines: dict[str, GpuMachine] = {}
    """By type of accelerator, e.g. `nvidia-h100-80gb`. Counts over `serving.accelerator` of a model's preset, which
    knows how many GPUs the model needs, and not what machines a region has."""
    namespace: KubernetesName = "default"
    ksa: KubernetesName = "llm-server"
    """Kubernetes service account of the serving pods."""
    gsa: ServiceAccountId = "llm-server"
    """Google service account that the pods act as; unused when `identity` is `direct`."""
    identity: IdentityMode = IdentityMode.SERVICE_ACCOUNT
    bucket: BucketName
    weights_layout: WeightsLayout = WeightsLayout.CONTENT_ADDRESSED
    hub_token_secret: str | None = None
    """Name of the Prefect Secret block that holds the Hugging Face token; None for public models."""
    approval: Approval = Approval.NEVER
    """The least that every rollout to this target asks for, whatever its own policy says."""
    gpu_usd_per_hour: Annotated[float, Field(gt=0)] | None = None
    """Price of one GPU with its share of the machine by `pricing`; before the price table's, which may have no row."""
    pricing_model: PricingModel | None = None
    """How the GPUs are paid for; None: spot where the node pool is, on demand otherwise."""
    output_to_input_ratio: Annotated[float, Field(gt=0)] = DEFAULT_OUTPUT_TO_INPUT_RATIO
    """What an output token costs in input tokens; 4 is the quickstart's."""
    endpoints: Endpoints = Endpoints()

    @property
    def pricing(self) -> PricingModel:
        if self.pricing_model is not None:
            return self.pricing_model
        pool = self.cluster.node_pool if self.cluster.mode is ClusterMode.STANDARD else None
        return PricingModel.SPOT if pool is not None and pool.spot else PricingModel.ON_DEMAND

    @property
    def hub_endpoint(self) -> str:
        return self.endpoints.hub or HUGGING_FACE

    def endpoint(self, service: str) -> str:
        """Base address (no trailing slash) of a Google API for this target, e.g. `endpoint("storage")`."""
        override: str | None = getattr(self.endpoints, service)
        return (override or self.universe.endpoint(service)).rstrip("/")

    @property
    def has_service_account(self) -> bool:
        """Whether the pods act as a Google service account of ours."""
        return self.identity is IdentityMode.SERVICE_ACCOUNT and self.cluster.mode is not ClusterMode.KUBECONFIG

    @property
    def gsa_email(self) -> str:
        return self.universe.service_account_email(self.gsa, self.project)

    @property
    def workload_identity_member(self) -> str:
        return self.universe.workload_identity_member(self.project, self.namespace, self.ksa)

    def reader_member(self, project_number: str) -> str:
        """The IAM member that must read the bucket for the pods to load their weights."""
        if self.identity is IdentityMode.DIRECT:
            return self.universe.workload_identity_principal(self.project, project_number, self.namespace, self.ksa)
        return f"serviceAccount:{self.gsa_email}"

    def weights_prefix(self, repo_id: str, commit_sha: str) -> str:
        """Object prefix of the weights, without leading slash and with a trailing one unless it is the root."""
        return "" if self.weights_layout is WeightsLayout.ROOT else f"{repo_id}/{commit_sha}/"

    def weights_uri(self, repo_id: str, commit_sha: str) -> str:
        """`gs://bucket` or `gs://bucket/<organisation>/<name>/<commit>`: what `--model` takes."""
        prefix = self.weights_prefix(repo_id, commit_sha).rstrip("/")
        return f"gs://{self.bucket}/{prefix}".rstrip("/")
