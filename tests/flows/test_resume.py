"""`kill -9` in the middle: the next run finishes the job, repeats nothing that was done, and leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from flows.teardown_model import teardown_model
from rollout.clients.benchmarks import STAGES_PREFIX
from rollout.clients.gke import Gke
from rollout.clients.iam import ServiceAccounts
from rollout.clients.raw_http import HttpPool
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import find_leftovers
from rollout.clients.uploads import Uploader
from rollout.errors import BucketNotFound
from rollout.policy import Weights
from rollout.record import Verdict
from rollout.report import Change
from rollout.transfer import MIN_PART_BYTES
from rollout.workload import fixed_workload
from sandbox.faults import FaultPlan, FaultRule, Stall
from sandbox.hub import HubServer
from sandbox.models import synthetic_gemma4
from tests.flows.command_line import Session, read_record, run
from tests.flows.conftest import TINY_REPO, Stage

pytestmark = [pytest.mark.flow, pytest.mark.timeout(600), pytest.mark.usefixtures("prefect_server")]
"""Each test starts two rollouts as processes and two teardowns: about a minute on two idle cores."""

LARGE_REPO = "tests/large-model"
LARGE_BYTES = 8 * MIN_PART_BYTES
"""A shard of several parts, and one of a single part."""

TRANSFER = {"part_bytes": MIN_PART_BYTES, "connections": 4, "claim_ttl_s": 600}
"""A claim that lives long: the next run must see by itself that its holder is dead."""


def arguments(stage: Stage, report: str, **policy: Any) -> list[str]:
    """`llm-rollout rollout` of the stage, with its record in `report`."""
    policy_file = stage.folder / "policy.yaml"
    policy_file.write_text(yaml.safe_dump({"benchmark": None, **policy}), encoding="utf-8")
    return [
        *("rollout", str(stage.model_file), "--target", str(stage.target_file)),
        *("--policy", str(policy_file), "--report", str(stage.folder / report)),
    ]


def kill_when(stage: Stage, happened: Callable[[Session], bool], **policy: Any) -> dict[str, Any]:
    """Start a rollout, kill it as soon as `happened`, and return the record that it leaves."""
    report = stage.folder / "killed.json"
    with Session(*arguments(stage, report.name, **policy), log=stage.folder / "killed.log") as rollout:
        rollout.wait_until(lambda: happened(rollout))
        rollout.kill()
    left = read_record(report)
    assert left["verdict"] == "running", left["error"]
    return left


def finish(stage: Stage, **policy: Any) -> dict[str, Any]:
    """Run the same rollout again, to its end. Returns its record."""
    again = run(*arguments(stage, "finished.json", **policy))
    assert again.returncode == 0, again.stderr
    return read_record(stage.folder / "finished.json")


def tear_down(stage: Stage) -> None:
    """Tear down by the ledger in the bucket alone, and ask every service whether something is left."""
    assert find_leftovers(stage.target) == ()
    removed = forget(stage, Weights.KEEP)
    assert {change.kind for change in removed} >= {"Deployment", "Service", "IamBinding", "Cluster"}
    assert Gke(stage.target).get() is None
    assert ServiceAccounts(stage.target).get(stage.target.gsa_email) is None
    assert find_leftovers(stage.target) == ()
    assert {kind for kind, _ in RecordStore(stage.target).owned()} == {"Bucket", "Weights"}
    forget(stage, Weights.DELETE)
    assert not StorageClient(stage.target).bucket_exists()


def forget(stage: Stage, weights: Weights) -> tuple[Change, ...]:
    """A teardown that knows nothing but the names of target and model. Returns what it removed."""
    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file), weights=weights)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    return ended.teardown.removed


def steps(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in record["steps"]}


# In the transfer


@pytest.fixture
def stalling_hub(stage: Stage) -> Iterator[HubServer]:
    """A hub of the stage's own, with a larger model, half of whose large shard it never sends until told to."""
    stall = FaultRule(fault=Stall(seconds=3600), method="GET", path="model-00001-of", probability=0.5)
    with HubServer(root=stage.folder / "hub", faults=FaultPlan([stall], seed=1)) as hub:
        model = synthetic_gemma4(stage.folder / "models", size="26b-a4b", total_bytes=LARGE_BYTES)
        hub.store.publish(LARGE_REPO, model)
        stage.write_target(endpoints=stage.target.endpoints.model_dump() | {"hub": hub.url})
        stage.model_file.write_text(stage.model_file.read_text().replace(TINY_REPO, LARGE_REPO))
        yield hub


def arrived_bytes(stage: Stage) -> int:
    """Bytes of parts that lie in unfinished uploads."""
    pool = HttpPool(stall_timeout_s=60)
    uploader = Uploader(StorageClient(stage.target), pool)
    try:
        with contextlib.suppress(BucketNotFound):
            return sum(part.size_bytes for upload in uploader.uploads("") for part in uploader.parts(upload))
        return 0
    finally:
        pool.close()


def test_a_kill_in_the_transfer_costs_no_part_that_has_arrived(stage: Stage, stalling_hub: HubServer) -> None:
    killed = kill_when(stage, lambda _: arrived_bytes(stage) >= 2 * MIN_PART_BYTES, transfer=TRANSFER)
    assert "publish weights" not in steps(killed)
    assert find_leftovers(stage.target) != ()
    kept_bytes = arrived_bytes(stage)
    stalling_hub.faults.clear()

    finished = finish(stage, transfer=TRANSFER)
    weights = finished["weights"]
    total_bytes = sum(file["size_bytes"] for file in weights["files"])
    assert 0 < weights["bytes_sent"] <= total_bytes - kept_bytes
    large = next(file for file in weights["files"] if file["path"].startswith("model-00001"))
    assert large["bytes_sent"] <= large["size_bytes"] - kept_bytes
    assert steps(finished)["provision bucket"]["status"] == "unchanged"
    tear_down(stage)


@pytest.mark.usefixtures("stalling_hub")
def test_a_kill_in_the_transfer_leaves_nothing_that_a_teardown_does_not_find(stage: Stage) -> None:
    kill_when(stage, lambda _: arrived_bytes(stage) > 0, transfer=TRANSFER)
    assert find_leftovers(stage.target) != ()
    forget(stage, Weights.KEEP)
    assert Gke(stage.target).get() is None
    assert find_leftovers(stage.target) == ()
    forget(stage, Weights.DELETE)
    assert not StorageClient(stage.target).bucket_exists()


# In the wait


def test_a_kill_in_the_wait_costs_neither_the_weights_nor_the_start(stage: Stage) -> None:
    stage.write_model(env={"SANDBOX_ENGINE_LOAD_BYTES_PER_S": "200"})  # the tiny model has 4.5 KB
    killed = kill_when(stage, lambda rollout: "wait until available" in rollout.output)
    assert "wait until available" not in steps(killed)

    finished = finish(stage)
    assert finished["weights"]["bytes_sent"] == 0
    assert finished["weights"]["status"] == "unchanged"
    for name in ("provision cluster", "workload identity", "apply manifests"):
        assert steps(finished)[name]["status"] == "unchanged"
    assert [record.verdict for record in RecordStore(stage.target).read_all()] == [Verdict.RUNNING, Verdict.DONE]
    tear_down(stage)


# In the benchmark

SWEEP: dict[str, Any] = {
    "workload": fixed_workload(16, 8).model_dump(mode="json"),
    "rates_per_s": [2, 3, 4, 5, 6, 7],
    "stage_duration_s": 2,
    "drain_timeout_s": 10,
}


def measured_stages(stage: Stage) -> int:
    """Stages that the bucket keeps."""
    storage = StorageClient(stage.target)
    with contextlib.suppress(BucketNotFound):
        for stored in storage.list_objects(STAGES_PREFIX):
            found = storage.read_json(stored.name)
            return len(found[0]) if found else 0
    return 0


def test_a_kill_in_the_benchmark_costs_no_finished_stage(stage: Stage) -> None:
    killed = kill_when(stage, lambda _: measured_stages(stage) >= 2, benchmark=SWEEP)
    assert "benchmark" not in steps(killed)
    kept = measured_stages(stage)

    finished = finish(stage, benchmark=SWEEP)
    benchmark = steps(finished)["benchmark"]
    counted = (benchmark["data"]["stages_measured"], benchmark["data"]["stages_kept"])
    assert counted == (len(SWEEP["rates_per_s"]) - kept, kept)
    assert [one["rate_per_s"] for one in finished["benchmark"]["stages"]] == SWEEP["rates_per_s"]
    assert finished["weights"]["bytes_sent"] == 0
    assert steps(finished)["apply manifests"]["status"] == "unchanged"
    tear_down(stage)
