"""How a model is served: image, vLLM arguments, resources and probes.

The defaults are the tutorial's for Gemma 4 on one H100 (`vllm-4-26b-a4b-it.yaml`); what it lacks is marked.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from rollout.values import KubernetesName, Value

TUTORIAL_IMAGE = "us-docker.pkg.dev/vertex-ai/vertex-vision-model-garden-dockers/pytorch-vllm-serve:gemma4"

Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
"""A Kubernetes quantity."""

_UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

ENGINE_START_S = 180.0
"""Profiling, compilation and graph capture of a 31B model on one H100, with headroom."""


def quantity_bytes(quantity: str) -> int:
    """The number that a Kubernetes quantity stands for: `80Gi` is 85,899,345,920."""
    number, unit = re.match(r"([0-9.]+)(.*)", quantity).groups()  # type: ignore[union-attr]  # the type's own pattern
    return int(float(number) * _UNITS.get(unit, 1))


_VLLM_TAG = re.compile(r"vllm-openai:v(\d+\.\d+\.\d+)")


class UpdateStrategy(StrEnum):
    ROLLING = "rolling"
    """The new pod first, then the old one goes: needs a spare GPU, which the preflight checks."""
    RECREATE = "recreate"
    """The old pod goes first: no spare GPU, and no answers in between."""


class Accelerator(Value):
    """The GPUs of one replica and the machines that hold them."""

    type: str = "nvidia-h100-80gb"
    count: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs of one replica."""
    machine_type: str = "a3-edgegpu-8g-nolssd"
    machine_gpu_count: Annotated[int, Field(ge=1, le=16)] = 8
    """GPUs of one machine."""
    compute_class: KubernetesName | None = "a3-edgegpu-8g-nolssd"
    """Name of the ComputeClass that creates nodes; None selects nodes by accelerator label (Standard clusters)."""
    boot_disk_gib: Annotated[int, Field(ge=10)] | None = None
    """Larger boot disk for models that are cached on it; None keeps GKE's 100 GiB, of which 90 GiB are usable."""


class Resources(Value):
    """Requests and limits of one replica, equal as in the tutorial."""

    cpu: Quantity = "20"
    memory: Quantity = "80Gi"
    ephemeral_storage: Quantity = "80Gi"


class LoraAdapter(Value):
    name: KubernetesName
    uri: Annotated[str, StringConstraints(pattern=r"^(gs://|/)\S+$")]


class ServingSpec(Value):
    """Everything that decides what the pods run."""

    name: KubernetesName = "vllm-gemma-deployment"
    """Name of the Deployment."""
    service_name: KubernetesName = "llm-service"
    app: KubernetesName = "gemma-server"
    """Value of the label `app`, which Service and Deployment select."""
    model_label: KubernetesName = "model"
    """Value of the label `ai.gke.io/model`; dots are not allowed here."""
    served_model_name: Annotated[str, StringConstraints(min_length=1, pattern=r"^\S+$")]
    """What requests name in `model`. The tutorial sends `google/gemma-4-26B-A4B-it` but never sets this flag."""
    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][^\s]*$")] = TUTORIAL_IMAGE
    """Pin it by digest (`…@sha256:…`) where you know it: a tag can move."""
    command: tuple[str, ...] = ("./entrypoint.sh",)
    entrypoint: tuple[str, ...] = ("python", "-m", "vllm.entrypoints.api_server")
    """What stands before the flags; `("vllm", "serve")` for vLLM's own images, with an empty `command`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    replicas: Annotated[int, Field(ge=1, le=1000)] = 1
    accelerator: Accelerator = Accelerator()
    resources: Resources = Resources()
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_num_seqs: Annotated[int, Field(ge=1)] = 128
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_model_len: Annotated[int, Field(ge=1, le=10_485_760)] | None = 16384
    """Context window in tokens. 16384: the tutorial's example; None leaves it to the model's config."""
    max_images_per_prompt: Annotated[int, Field(ge=0)] | None = 1
    """`--limit_mm_per_prompt.image`; None for models without vision."""
    tool_call_parser: str | None = "gemma4"
    reasoning_parser: str | None = "gemma4"
    load_format: str | None = None
    """`runai_streamer` streams weights from Cloud Storage (vLLM 0.11.1 and newer); None leaves it to the image."""
    lora: tuple[LoraAdapter, ...] = ()
    extra_args: tuple[str, ...] = ()
    """Further vLLM flags, checked against vLLM's own list."""
    env: dict[str, str] = {}
    """Further environment of the container."""
    strategy: UpdateStrategy = UpdateStrategy.ROLLING
    ready_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """1800 s: the tutorial's `kubectl wait --timeout`; scale-up ≈300 s + image ≈200 s + 52 GB twice at 0.2 GB/s ≈520 s
    + engine ≈180 s = 1200 s."""
    weights_bytes_per_s: Annotated[float, Field(gt=0)] = 0.2e9
    """Slowest rate of one pass over the weights. 0.2 GB/s is an assumption, not a measurement: about what a balanced
    persistent disk of 100 GiB carries (https://cloud.google.com/compute/docs/disks/performance: 0.28 MiB/s for each GiB
    above a baseline of 140, 168 MiB/s in all). The start-up waterfall shows the real one."""
    termination_grace_period_s: Annotated[int, Field(ge=1)] = 120
    """How long running answers may take to finish; 120 s: 2048 tokens at 50 ms each ≈102 s."""

    @model_validator(mode="after")
    def _parallelism_fits(self) -> ServingSpec:
        if self.tensor_parallel_size > self.accelerator.count:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} needs as many GPUs per replica, but"
                f" accelerator.count={self.accelerator.count}: raise accelerator.count or lower tensor_parallel_size"
            )
        if self.accelerator.count > self.accelerator.machine_gpu_count:
            raise ValueError(
                f"accelerator.count={self.accelerator.count} does not fit on a {self.accelerator.machine_type}"
                f" with {self.accelerator.machine_gpu_count} GPUs"
            )
        return self

    @property
    def vllm_release(self) -> str | None:
        """`0.32.0`, if the image's tag tells it: vLLM's own images do, others (the tutorial's) do not."""
        tag = _VLLM_TAG.search(self.image)
        return tag[1] if tag else None

    def vllm_args(self, model_uri: str) -> list[str]:
        """The container's arguments for weights at `model_uri`, in the tutorial's order."""
        args = [
            *self.entrypoint,
            "--host=0.0.0.0",
            f"--port={self.port}",
            f"--model={model_uri}",
            f"--served-model-name={self.served_model_name}",
            f"--tensor-parallel-size={self.tensor_parallel_size}",
            f"--max-num-seqs={self.max_num_seqs}",
            f"--gpu-memory-utilization={self.gpu_memory_utilization:g}",
        ]
        if self.max_images_per_prompt is not None:
            args.append(f"--limit_mm_per_prompt.image={self.max_images_per_prompt}")
        if self.tool_call_parser:
            args += ["--enable-auto-tool-choice", f"--tool-call-parser={self.tool_call_parser}"]
        if self.reasoning_parser:
            args.append(f"--reasoning-parser={self.reasoning_parser}")
        if self.max_model_len:
            args.append(f"--max-model-len={self.max_model_len}")
        if self.load_format:
            args.append(f"--load-format={self.load_format}")
        if self.lora:
            args += ["--enable-lora", "--lora-modules", *(f"{adapter.name}={adapter.uri}" for adapter in self.lora)]
        return [*args, *self.extra_args]

    @property
    def copies_weights(self) -> bool:
        """Whether the image copies the bucket's weights to `cache_variable` first, and vLLM then reads the copy.

        The tutorial's image does: its entry point turns `--model=gs://…` into a `gcloud storage cp` to a local folder.
        """
        return bool(self.command)

    @property
    def cache_variable(self) -> str:
        """The environment variable that moves the local copy of the weights, e.g. into /dev/shm.

        LOCAL_MODEL_DIR of the tutorial's entry point defaults to /tmp/model_dir, HF_HOME of the hub's client to the
        home directory: both on the node's boot disk.
        """
        return "LOCAL_MODEL_DIR" if self.copies_weights else "HF_HOME"

    def loading_s(self, weights_bytes: int) -> float:
        """How long loading takes at `weights_bytes_per_s`: one pass over the weights, or two where they are copied."""
        passes = 2 if self.copies_weights else 1
        return passes * weights_bytes / self.weights_bytes_per_s

    def startup_failure_threshold(
        self, weights_bytes: int, *, period_s: int = 10, engine_start_s: float = ENGINE_START_S
    ) -> int:
        """How many startup probes may fail, in probe periods: loading and engine start, but at least the whole wait.

        62 GB in two passes: 2 × 310 s + 180 s = 800 s, so the tutorial's 1800 s decide: the probe must not kill what
        the wait would still wait for. 200 GB: 2 × 1000 s + 180 s = 2180 s, for pods that start outside a rollout.
        """
        budget_s = max(self.loading_s(weights_bytes) + engine_start_s, self.ready_timeout_s)
        return max(3, math.ceil(budget_s / period_s))
