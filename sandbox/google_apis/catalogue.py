"""Machines, accelerators, versions and quota of the embedded region.

Sources: https://cloud.google.com/compute/docs/gpus and /docs/accelerator-optimized-machines; the tutorial's
`a3-edgegpu-8g-nolssd` (eight H100, no local SSD) stands as it names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class MachineType:
    name: str
    guest_cpus: int
    memory_mib: int
    accelerator: str | None = None
    accelerator_count: int = 0
    local_ssds: int = 0


MACHINE_TYPES: Mapping[str, MachineType] = {
    machine.name: machine
    for machine in (
        MachineType("e2-medium", 2, 4_096),
        MachineType("e2-standard-4", 4, 16_384),
        MachineType("n2-standard-16", 16, 65_536),
        MachineType("g2-standard-8", 8, 32_768, "nvidia-l4", 1),
        MachineType("g2-standard-24", 24, 98_304, "nvidia-l4", 2),
        MachineType("a2-ultragpu-1g", 12, 174_080, "nvidia-a100-80gb", 1, 1),
        MachineType("a3-highgpu-1g", 26, 239_616, "nvidia-h100-80gb", 1, 2),
        MachineType("a3-highgpu-2g", 52, 479_232, "nvidia-h100-80gb", 2, 4),
        MachineType("a3-highgpu-4g", 104, 958_464, "nvidia-h100-80gb", 4, 8),
        MachineType("a3-highgpu-8g", 208, 1_916_928, "nvidia-h100-80gb", 8, 16),
        MachineType("a3-edgegpu-8g-nolssd", 208, 1_916_928, "nvidia-h100-80gb", 8),
    )
}

ACCELERATORS: Mapping[str, tuple[str, int, str]] = {
    "nvidia-h100-80gb": ("NVIDIA H100 80GB", 8, "NVIDIA_H100_GPUS"),
    "nvidia-a100-80gb": ("NVIDIA A100 80GB", 8, "NVIDIA_A100_80GB_GPUS"),
    "nvidia-l4": ("NVIDIA L4", 8, "NVIDIA_L4_GPUS"),
}
"""Accelerator -> description, most per instance, quota metric (a preemptible one has `PREEMPTIBLE_` before it)."""

DEFAULT_QUOTAS: Mapping[str, float] = {
    "CPUS": 1500.0,
    "SSD_TOTAL_GB": 40_960.0,
    "DISKS_TOTAL_GB": 40_960.0,
    "LOCAL_SSD_TOTAL_GB": 24_000.0,
    "INSTANCES": 1000.0,
    "IN_USE_ADDRESSES": 64.0,
    "NVIDIA_H100_GPUS": 16.0,
    "PREEMPTIBLE_NVIDIA_H100_GPUS": 16.0,
    "NVIDIA_A100_80GB_GPUS": 0.0,
    "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS": 0.0,
    "NVIDIA_L4_GPUS": 8.0,
    "PREEMPTIBLE_NVIDIA_L4_GPUS": 8.0,
}

CHANNEL_VERSIONS: Mapping[str, tuple[str, ...]] = {
    "RAPID": ("1.36.1-gke.1182000", "1.35.4-gke.1310000"),
    "REGULAR": ("1.35.3-gke.1389000", "1.34.7-gke.1090000"),
    "STABLE": ("1.34.6-gke.1153000", "1.33.11-gke.1044000"),
}
"""Release channel -> valid versions, the default first."""
