"""Nodes that pods make boot are seen in node pools, quota and disks, and end with their cluster."""

from __future__ import annotations

from rollout.accelerators import ACCELERATORS
from rollout.clients.compute import Compute
from rollout.clients.gke import Gke
from rollout.target import Cluster, ClusterMode, NodePool, Target
from sandbox.google_apis import GoogleApisServer

H100 = ACCELERATORS["nvidia-h100-80gb"]
EDGE = {"machine_type": "a3-edgegpu-8g-nolssd", "accelerator": H100.name, "gpus": 8}


def used(target: Target) -> float:
    return Compute(target).quotas()[H100.quota_metric].usage


def pools(target: Target) -> list[str]:
    cluster = Gke(target).get()
    assert cluster is not None
    return [pool.name for pool in cluster.node_pools if pool.accelerator]


def test_a_node_brings_its_pool_and_the_last_one_takes_it_away(
    google_target: Target, google_apis: GoogleApisServer
) -> None:
    Gke(google_target).ensure()
    google_apis.boot_node("node-1", **EDGE)
    google_apis.boot_node("node-2", **EDGE)
    (pool,) = pools(google_target)
    assert pool.startswith("nap-a3-edgegpu-8g")
    assert used(google_target) == 16
    labels = {"goog-k8s-cluster-name": google_target.cluster.name}
    assert [disk.name for disk in Compute(google_target).disks(labels)] == ["node-1", "node-2"]

    google_apis.remove_node("node-1")
    assert pools(google_target) == [pool]
    assert used(google_target) == 8
    google_apis.remove_node("node-2")
    assert pools(google_target) == []
    assert used(google_target) == 0
    assert Compute(google_target).disks(labels) == ()


def test_a_node_of_a_pool_made_by_hand_leaves_the_pool_there(
    google_target: Target, google_apis: GoogleApisServer
) -> None:
    pool = NodePool(name="gpu-pool", machine_type="a3-highgpu-1g", accelerator_count=1, spot=True)
    cluster = Cluster(mode=ClusterMode.STANDARD, node_pool=pool)
    target = google_target.model_copy(update={"cluster": cluster})
    Gke(target).ensure()
    google_apis.boot_node("node-1", machine_type="a3-highgpu-1g", accelerator=H100.name, gpus=1)
    assert pools(target) == ["gpu-pool"]
    assert used(target) == 1
    google_apis.remove_node("node-1")
    assert pools(target) == ["gpu-pool"]


def test_nodes_and_their_disks_end_with_the_cluster(google_target: Target, google_apis: GoogleApisServer) -> None:
    gone: list[str] = []
    google_apis.on_nodes_gone(gone.extend)
    Gke(google_target).ensure()
    google_apis.boot_node("node-1", **EDGE)
    google_apis.register_disk("pvc-1", **{"goog-k8s-cluster-name": google_target.cluster.name})

    Gke(google_target).delete()

    assert gone == ["node-1"]
    assert used(google_target) == 0
    disks = Compute(google_target).disks({"goog-k8s-cluster-name": google_target.cluster.name})
    assert [disk.name for disk in disks] == ["pvc-1"]


def test_without_a_cluster_a_node_is_nobodys(google_apis: GoogleApisServer, google_target: Target) -> None:
    google_apis.boot_node("node-1", **EDGE)
    assert used(google_target) == 0
