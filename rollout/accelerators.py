"""The accelerators that we know: memory, GKE labels, machines and quota names, each with its source.

`AcceleratorType.source` is where a row's memory, machines, vCPUs and host memory come from. The rest has one page for
all rows: labels https://cloud.google.com/kubernetes-engine/docs/concepts/gpus, quota metrics
https://cloud.google.com/compute/resource-usage#gpu_quota, FP8
https://docs.vllm.ai/en/latest/features/quantization/#supported-hardware. Read 2026-11.
"""

from __future__ import annotations

import difflib
from enum import StrEnum

from rollout.errors import BadInput
from rollout.values import Value

GIB = 2**30

_MACHINES = "https://cloud.google.com/compute/docs/accelerator-optimized-machines"
_TPUS = "https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"


class AcceleratorKind(StrEnum):
    GPU = "gpu"
    TPU = "tpu"


class Machine(Value):
    """A machine type and how many accelerators it has."""

    type: str
    accelerators: int


class AcceleratorType(Value):
    """One GPU model or TPU generation as GKE names it."""

    name: str
    """Value of the node label `cloud.google.com/gke-accelerator` (GPU) or `…/gke-tpu-accelerator` (TPU)."""
    kind: AcceleratorKind = AcceleratorKind.GPU
    memory_gib: float
    """Memory of one GPU or chip as the vendor states it."""
    source: str
    """Where memory, machines, vCPUs and host memory come from."""
    quota_metric: str
    """Region quota of Compute Engine for on-demand use; the preemptible one is prefixed `PREEMPTIBLE_`."""
    machines: tuple[Machine, ...]
    """The first of several with the same number of accelerators is the usual one."""
    host_vcpus: float
    """vCPUs of the machine per accelerator, of the leanest machine that is usual for serving."""
    host_memory_gib: float
    """Memory of the machine per accelerator, likewise."""
    has_fp8: bool = False
    """Whether vLLM computes in FP8 on it: weights and KV cache of half the size."""
    topologies: dict[int, str] = {}
    """TPU chips of one replica -> `cloud.google.com/gke-tpu-topology`, for slices of one machine."""

    @property
    def resource(self) -> str:
        """What a pod requests."""
        return "google.com/tpu" if self.kind is AcceleratorKind.TPU else "nvidia.com/gpu"

    @property
    def counts(self) -> tuple[int, ...]:
        """How many accelerators one replica can have on one machine, rising."""
        return tuple(sorted({machine.accelerators for machine in self.machines}))

    def machine_for(self, count: int) -> Machine:
        """The usual machine with `count` accelerators, else the smallest with more. Raises `BadInput`."""
        fitting = [machine for machine in self.machines if machine.accelerators >= count]
        if not fitting:
            raise BadInput(
                f"no machine has {count} {self.name}.",
                where="serving.accelerator.count",
                resolution=f"At most {self.counts[-1]} are on one machine.",
            )
        return min(fitting, key=lambda machine: machine.accelerators)


def _machines(**counts: int) -> tuple[Machine, ...]:
    return tuple(Machine(type=name.replace("_", "-"), accelerators=count) for name, count in counts.items())


ACCELERATORS: dict[str, AcceleratorType] = {
    accelerator.name: accelerator
    for accelerator in (
        AcceleratorType(
            name="nvidia-h100-80gb",
            source=f"{_MACHINES} (A3 High)",
            memory_gib=80,
            host_vcpus=26,
            host_memory_gib=234,
            has_fp8=True,
            quota_metric="NVIDIA_H100_GPUS",
            machines=_machines(
                a3_highgpu_1g=1, a3_highgpu_2g=2, a3_highgpu_4g=4, a3_highgpu_8g=8, a3_edgegpu_8g_nolssd=8
            ),
        ),
        AcceleratorType(
            name="nvidia-h100-mega-80gb",
            source=f"{_MACHINES} (A3 Mega)",
            memory_gib=80,
            host_vcpus=26,
            host_memory_gib=234,
            has_fp8=True,
            quota_metric="NVIDIA_H100_MEGA_GPUS",
            machines=_machines(a3_megagpu_8g=8),
        ),
        AcceleratorType(
            name="nvidia-h200-141gb",
            source=f"{_MACHINES} (A3 Ultra)",
            memory_gib=141,
            host_vcpus=28,
            host_memory_gib=369,
            has_fp8=True,
            quota_metric="NVIDIA_H200_GPUS",
            machines=_machines(a3_ultragpu_8g=8),
        ),
        AcceleratorType(
            name="nvidia-b200",
            source=f"{_MACHINES} (A4)",
            memory_gib=180,
            host_vcpus=28,
            host_memory_gib=496,
            has_fp8=True,
            quota_metric="NVIDIA_B200_GPUS",
            machines=_machines(a4_highgpu_8g=8),
        ),
        AcceleratorType(
            name="nvidia-tesla-a100",
            source=f"{_MACHINES} (A2 Standard)",
            memory_gib=40,
            host_vcpus=12,
            host_memory_gib=85,
            quota_metric="NVIDIA_A100_GPUS",
            machines=_machines(a2_highgpu_1g=1, a2_highgpu_2g=2, a2_highgpu_4g=4, a2_highgpu_8g=8, a2_megagpu_16g=16),
        ),
        AcceleratorType(
            name="nvidia-a100-80gb",
            source=f"{_MACHINES} (A2 Ultra)",
            memory_gib=80,
            host_vcpus=12,
            host_memory_gib=170,
            quota_metric="NVIDIA_A100_80GB_GPUS",
            machines=_machines(a2_ultragpu_1g=1, a2_ultragpu_2g=2, a2_ultragpu_4g=4, a2_ultragpu_8g=8),
        ),
        AcceleratorType(
            name="nvidia-l4",
            source=f"{_MACHINES} (G2)",
            memory_gib=24,
            host_vcpus=12,
            host_memory_gib=48,
            has_fp8=True,
            quota_metric="NVIDIA_L4_GPUS",
            machines=_machines(
                g2_standard_12=1,
                g2_standard_4=1,
                g2_standard_8=1,
                g2_standard_16=1,
                g2_standard_32=1,
                g2_standard_24=2,
                g2_standard_48=4,
                g2_standard_96=8,
            ),
        ),
        AcceleratorType(
            name="nvidia-rtx-pro-6000",
            source=f"{_MACHINES} (G4)",
            memory_gib=96,
            host_vcpus=48,
            host_memory_gib=180,
            has_fp8=True,
            quota_metric="NVIDIA_RTX_PRO_6000_GPUS",
            machines=_machines(g4_standard_48=1, g4_standard_96=2, g4_standard_192=4, g4_standard_384=8),
        ),
        AcceleratorType(
            name="tpu-v5-lite-podslice",
            source=f"{_TPUS}; HBM: https://cloud.google.com/tpu/docs/v5e",
            kind=AcceleratorKind.TPU,
            memory_gib=16,
            host_vcpus=24,
            host_memory_gib=48,
            topologies={1: "1x1", 4: "2x2", 8: "2x4"},
            quota_metric="TPU_LITE_PODSLICE_V5",
            machines=_machines(ct5lp_hightpu_1t=1, ct5lp_hightpu_4t=4, ct5lp_hightpu_8t=8),
        ),
        AcceleratorType(
            name="tpu-v6e-slice",
            source=f"{_TPUS}; HBM: https://cloud.google.com/tpu/docs/v6e",
            kind=AcceleratorKind.TPU,
            memory_gib=32,
            host_vcpus=22,
            host_memory_gib=180,
            topologies={1: "1x1", 4: "2x2", 8: "2x4"},
            quota_metric="TPUS_PER_TPU_FAMILY",
            machines=_machines(ct6e_standard_1t=1, ct6e_standard_4t=4, ct6e_standard_8t=8),
        ),
    )
}


def accelerator(name: str) -> AcceleratorType:
    """The accelerator of that GKE label. Raises `BadInput` naming the nearest known one."""
    try:
        return ACCELERATORS[name]
    except KeyError:
        nearest = difflib.get_close_matches(name, ACCELERATORS, n=1)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise BadInput(
            f"the accelerator {name!r} is not known.",
            where="serving.accelerator.type",
            resolution=f"{hint}Known are {', '.join(sorted(ACCELERATORS))}.",
        ) from None
