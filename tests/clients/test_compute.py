"""What a region has: accelerators, quota, disks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout.accelerators import ACCELERATORS
from rollout.clients.compute import Compute, Disk, Quota
from rollout.clients.gke import Gke
from rollout.errors import NotFound, PermissionMissing
from rollout.target import Target
from sandbox.google_apis import GoogleApisServer

H100 = ACCELERATORS["nvidia-h100-80gb"]
ZONES = ("u-france-east1-a", "u-france-east1-b", "u-france-east1-c")


def test_the_region_offers_its_accelerators_by_zone(google_target: Target) -> None:
    assert Compute(google_target).accelerators()[H100.name] == ZONES


def test_quota_counts_the_gpus_in_use(google_target: Target, google_apis: GoogleApisServer) -> None:
    Gke(google_target).ensure()
    gpus = [{"acceleratorType": H100.name, "acceleratorCount": "8"}]
    pool = {"name": "nap-a3", "initialNodeCount": 1, "config": {"machineType": "a3-highgpu-8g", "accelerators": gpus}}
    google_apis.register_node_pool("llm-serving", pool)

    quota = Compute(google_target).quotas()[H100.quota_metric]

    assert quota == Quota(metric="NVIDIA_H100_GPUS", limit=16, usage=8)
    assert quota.free == 8


def test_disks_are_found_by_all_their_labels(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.register_disk("pvc-1", size_gib=200, owner="llm-rollout", run="r1")
    google_apis.register_disk("pvc-2", zone=ZONES[1], owner="llm-rollout", run="r2")
    google_apis.register_disk("boot", owner="somebody")
    compute = Compute(google_target)

    assert compute.disks({"owner": "llm-rollout", "run": "r1"}) == (
        Disk(name="pvc-1", zone=ZONES[0], size_gib=200, labels={"owner": "llm-rollout", "run": "r1"}),
    )
    assert [disk.name for disk in compute.disks({"owner": "llm-rollout"})] == ["pvc-1", "pvc-2"]
    google_apis.remove_disk("pvc-1")
    assert compute.disks({"run": "r1"}) == ()


def test_an_unknown_region_is_not_found(google_apis: GoogleApisServer, target_for: Callable[..., Target]) -> None:
    with pytest.raises(NotFound, match="mars-north1"):
        Compute(target_for(google_apis, region="mars-north1")).quotas()


def test_a_missing_permission_is_named(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.deny("compute.regions.get")

    with pytest.raises(PermissionMissing, match=r"compute\.regions\.get"):
        Compute(google_target).quotas()
