"""From nothing to the first token: one step after the other, ours, and what physics asks.

    python tests/benchmarks/critical_path.py

The embedded cloud with times of its own, about a twentieth of the real ones: a cluster takes 15 s, a node 10 s, its
image 5 s, and the hub's link carries 20 MB/s, so that 800 MB of weights take 40 s. Every arm has a cluster, nodes and a
bucket of its own. Prints a markdown table; about five minutes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.plan_model import make_plan
from flows.rollout_model import provision
from rollout.catalog import load_model
from rollout.clients.cluster import ClusterClient
from rollout.critical_path import chain_sentence
from rollout.plan import RolloutPlan
from rollout.policy import RolloutPolicy, WarmUp, Weights
from rollout.request import RolloutSpec
from rollout.target import Target
from sandbox.cloud import EmbeddedCloud
from sandbox.cluster.nodes import NodeSettings
from sandbox.google_apis import Delays
from sandbox.hub_store import HubStore
from sandbox.models import synthetic_gemma4
from tasks.provision import (
    make_service_account,
    provision_bucket,
    provision_cluster,
    set_up_workload_identity,
)
from tasks.record import Record, recorded
from tasks.serve import apply_manifests, wait_until_available
from tasks.teardown import tear_down_rollout
from tasks.weights import check_weights_layout, publish_weights

CLUSTER_S, NODE_S, IMAGE_S = 15.0, 10.0, 5.0
LINK_BYTES_PER_S, WEIGHTS_BYTES = 20e6, 800_000_000
LOAD_BYTES_PER_S = 270e6
"""What the simulated engine loads; see sandbox/engine/startup.py."""
TRANSFER_S, LOAD_S = WEIGHTS_BYTES / LINK_BYTES_PER_S, WEIGHTS_BYTES / LOAD_BYTES_PER_S
PRESET = "gemma-4-26b-a4b-it"


def in_sequence(plan: RolloutPlan, record: Record) -> None:
    """The tutorial's order: each step when the one before it is done."""
    story = record.story
    story.run(provision_cluster, plan)
    story.run(provision_bucket, plan.target)
    story.run(publish_weights, plan.model, plan.target, plan.policy.transfer)
    story.run(check_weights_layout, plan.target, plan.weights_uri, plan.serving.vllm_release)
    story.run(make_service_account, plan)
    story.run(set_up_workload_identity, plan)


ARMS: dict[str, tuple[Callable[[RolloutPlan, Record], None], WarmUp]] = {
    "one after the other": (in_sequence, WarmUp.OFF),
    "ours, no warm-up": (provision, WarmUp.OFF),
    "ours, warm_up: cheap": (provision, WarmUp.CHEAP),
    "ours, warm_up: fast": (provision, WarmUp.FAST),
}


@flow
def measure(spec: RolloutSpec, arm: str) -> tuple[float, float, str]:
    """(seconds from the first change to the first token, seconds that a GPU node was idle, the longest chain)"""
    with recorded(spec.target, None) as record:
        plan = make_plan(spec, record.story)
        planned = len(record.story.reports)
        started = time.monotonic()
        ARMS[arm][0](plan, record)
        node = _first_node(plan.target)
        idle_s = max(0.0, time.time() - node.timestamp()) if node else 0.0
        record.story.run(apply_manifests, plan)
        record.story.run(wait_until_available, plan)
        seconds = time.monotonic() - started
        chain = chain_sentence(record.story.reports[planned:])
        record.story.run(
            tear_down_rollout, plan.target, plan.serving.name, Weights.DELETE, record.report.created, 600.0
        )
    return seconds, idle_s, chain


def _first_node(target: Target) -> datetime | None:
    nodes = ClusterClient.connect(target).api.get("/api/v1/nodes", {})["items"]
    times = [datetime.fromisoformat(node["metadata"]["creationTimestamp"]) for node in nodes]
    return min(times, default=None)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, prefect_test_harness(server_startup_timeout=120):
        root = Path(folder)
        cloud = EmbeddedCloud(
            root / "cloud",
            hub_options=("--shape", f"total={LINK_BYTES_PER_S / 1e6:g}MB/s,latency=10ms"),
            nodes=NodeSettings(creation_s=NODE_S),
            image_pull_s=IMAGE_S,
        )
        preset = load_model(PRESET)
        weights = synthetic_gemma4(root, size="26b-a4b", total_bytes=WEIGHTS_BYTES)
        HubStore(cloud.hub_root).publish(preset.model.repo_id, weights)
        with cloud:
            cloud.google.cloud.delays = Delays(cluster_creation_s=CLUSTER_S)
            figures = {}
            for number, (arm, (_, warm_up)) in enumerate(ARMS.items()):
                target = cloud.target(
                    bucket=f"arm-{number}", namespace=f"arm-{number}", cluster={"name": f"arm-{number}"}
                )
                policy = RolloutPolicy(benchmark=None, warm_up=warm_up, warm_up_lead_s=NODE_S + IMAGE_S)
                spec = RolloutSpec(model=preset.model, serving=preset.serving, target=target, policy=policy)
                figures[arm] = measure(spec, arm)
    _print(figures)


def _print(figures: dict[str, tuple[float, float, str]]) -> None:
    parts = {"transfer": TRANSFER_S, "cluster": CLUSTER_S, "node": NODE_S, "image": IMAGE_S, "load": LOAD_S}
    floor_s = max(TRANSFER_S, CLUSTER_S + NODE_S + IMAGE_S) + LOAD_S
    print("Physics: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()) + ".\n")
    print("| Way | seconds | over the floor | GPU idle s | Longest chain |\n|---|---:|---:|---:|---|")
    for arm, (seconds, idle_s, chain) in figures.items():
        print(f"| {arm} | {seconds:.1f} | {seconds / floor_s - 1:+.0%} | {idle_s:.0f} | {chain} |")
    print(f"| floor: weights ‖ (cluster → node → image), then load | {floor_s:.1f} | | 0 | |")
    print(f"| sum of the parts | {sum(parts.values()):.1f} | | | |")


if __name__ == "__main__":
    main()
