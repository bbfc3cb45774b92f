"""The forms of the quickstart's flows: which profile fits a demand, and the optimised manifests of one model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from rollout.autoscaling import Adapter
from rollout.cost import PricingModel
from rollout.optimize import LATEST_VERSION, BucketUri, ManifestRequest, ServingStack, ValidatedWith
from rollout.profiles import CHATBOT, ProfileQuery, Targets
from rollout.recommend import Requirements
from rollout.request import PresetName
from rollout.sources import Generator, SourceName
from rollout.target import Target
from rollout.values import RepoId, Value


class RecommendRequest(Value):
    """What a model must do, and where."""

    model: RepoId | None = Field(
        None,
        title="Model",
        description="Repository, e.g. google/gemma-4-26B-A4B-it; empty: any model that has a profile.",
        json_schema_extra={"position": 0},
    )
    target: PresetName = Field(
        title="Target",
        description="Environment in deployments/targets/: whose bucket and Google project are asked, and whose prices"
        " count.",
        json_schema_extra={"position": 1},
    )
    targets: Targets = Field(
        Targets(),
        title="Latency targets",
        description="Median TTFT, NTPOT and ITL in milliseconds; empty: none.",
        json_schema_extra={"position": 2},
    )
    requests_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        title="Demand (requests/s)",
        description="Of all users together; empty: one replica, fully used.",
        json_schema_extra={"position": 3},
    )
    use_case: str | None = Field(
        None,
        title="Use case",
        description="E.g. Chatbot or Code Completion; empty: any.",
        json_schema_extra={"position": 4},
    )
    accelerators: tuple[str, ...] = Field(
        (),
        title="Accelerators",
        description="Only these, e.g. nvidia-h100-80gb; empty: any.",
        json_schema_extra={"position": 5},
    )
    pricing_model: PricingModel = Field(
        PricingModel.ON_DEMAND,
        title="Pricing model",
        description="On-demand, Spot, or a commitment of one or three years.",
        json_schema_extra={"position": 6},
    )
    max_usd_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        None, title="Budget (USD per hour)", description="Of all replicas.", json_schema_extra={"position": 7}
    )
    sources: tuple[SourceName, ...] = Field(
        (SourceName.BUCKET, SourceName.GOOGLE),
        title="Sources",
        description="Measured profiles in the target's bucket, and GKE Inference Quickstart's own.",
        json_schema_extra={"position": 8},
    )

    def requirements(self, target: Target) -> Requirements:
        return Requirements(
            model=self.model,
            targets=self.targets,
            requests_per_s=self.requests_per_s,
            use_case=self.use_case,
            accelerators=self.accelerators,
            pricing_model=self.pricing_model,
            region=target.region,
            max_usd_per_hour=self.max_usd_per_hour,
        )

    @property
    def query(self) -> ProfileQuery:
        return ProfileQuery(model=self.model, pricing_model=self.pricing_model)


class ManifestsRequest(Value):
    """What `gcloud container ai profiles manifests create` is asked for, and whether it is applied."""

    model: RepoId = Field(
        title="Model", description="Repository, e.g. google/gemma-4-26B-A4B-it.", json_schema_extra={"position": 0}
    )
    target: PresetName = Field(
        title="Target",
        description="Environment in deployments/targets/: namespace, identity and universe of the manifests.",
        json_schema_extra={"position": 1},
    )
    accelerator_type: str = Field(
        "nvidia-h100-80gb", title="Accelerator", description="E.g. nvidia-l4.", json_schema_extra={"position": 2}
    )
    accelerator_count: Annotated[int, Field(ge=1, le=16)] | None = Field(
        None,
        title="Accelerators of one replica",
        description="Empty: as few as hold the model.",
        json_schema_extra={"position": 3},
    )
    use_case: str = Field(
        CHATBOT,
        title="Use case",
        description="What the flags are chosen for, e.g. Chatbot.",
        json_schema_extra={"position": 4},
    )
    targets: Targets = Field(
        Targets(),
        title="Latency targets",
        description="Median TTFT, NTPOT and ITL in milliseconds for the autoscaler; empty: no autoscaler.",
        json_schema_extra={"position": 5},
    )
    model_bucket_uri: BucketUri | None = Field(
        None,
        title="Weights",
        description="gs://BUCKET/PATH with config.json and weights; empty: the pods load from Hugging Face.",
        json_schema_extra={"position": 6},
    )
    serving_stack: ServingStack = Field(
        ServingStack.VLLM,
        title="Serving stack",
        description="vllm alone, or llm-d: routing by queue, KV cache and prefixes.",
        json_schema_extra={"position": 7},
    )
    model_server_version: Annotated[str, StringConstraints(min_length=1)] = Field(
        LATEST_VERSION, title="vLLM version", description="The image's tag.", json_schema_extra={"position": 8}
    )
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = Field(
        10, title="Most replicas", description="The autoscaler's upper limit.", json_schema_extra={"position": 9}
    )
    adapter: Adapter = Field(
        Adapter.STACKDRIVER,
        title="Metrics adapter",
        description="Who brings vLLM's metrics to the autoscaler.",
        json_schema_extra={"position": 10},
    )
    generator: Generator = Field(
        Generator.LOCAL,
        title="Generator",
        description="Rendered here, or by Google (not in every universe; shown, never applied).",
        json_schema_extra={"position": 11},
    )
    apply: bool = Field(
        False,
        title="Apply",
        description="Off only shows the manifests. On grants the bucket to the pods, applies, and waits until one pod"
        " can answer; accelerators cost money from then on.",
        json_schema_extra={"position": 12},
    )

    boot_disk_gib: Annotated[int, Field(ge=10)] | None = Field(
        None,
        title="Boot disk (GiB)",
        description="A larger disk for weights from Hugging Face; empty: 90 GiB and more are cached in memory.",
        json_schema_extra={"position": 14},
    )
    replicas: Annotated[int, Field(ge=1, le=1000)] = Field(
        1,
        title="Replicas",
        description="When applied without an autoscaler. On TPUs the first one compiles for the others.",
        json_schema_extra={"position": 13},
    )

    gpu_driver_version: str | None = Field(
        None,
        title="GPU driver",
        description="E.g. 580.82.07, for the manifests' header: GKE does not tell its number. Empty: as GKE states it.",
        json_schema_extra={"position": 15},
    )

    def manifests(
        self,
        target: Target,
        *,
        versions: ValidatedWith | None = None,
        project_number: str = "",
        gke_version: str | None = None,
    ) -> ManifestRequest:
        """The generator's request. Raises pydantic's ValidationError for what the form cannot check."""
        return ManifestRequest(
            model=self.model,
            model_server_version=self.model_server_version,
            accelerator_type=self.accelerator_type,
            accelerator_count=self.accelerator_count,
            namespace=target.namespace,
            service_account=target.ksa,
            targets=self.targets,
            use_case=self.use_case,
            model_bucket_uri=self.model_bucket_uri,
            serving_stack=self.serving_stack,
            max_replicas=self.max_replicas,
            adapter=self.adapter,
            boot_disk_gib=self.boot_disk_gib,
            gke_version=gke_version,
            project=target.project,
            project_number=project_number or None,
            universe=target.universe,
            validated=ValidatedWith(gpu_driver_version=self.gpu_driver_version).or_else(versions or ValidatedWith()),
        )
