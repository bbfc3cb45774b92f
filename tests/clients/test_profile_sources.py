"""Profiles from records, kept curves and files, in a folder and in a bucket."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rollout.benchmark import BenchmarkReport, BenchmarkSpec, Environment, benchmark_report
from rollout.clients.history import BucketHistory, FolderHistory
from rollout.clients.profile_sources import BucketSource, benchmark_file, local_history
from rollout.clients.records import RecordStore, write_local
from rollout.clients.storage import StorageClient
from rollout.cost import PricingModel
from rollout.errors import BadInput
from rollout.history import CurveRecord, keep
from rollout.model import ModelFile, PinnedModel
from rollout.plan import Observation, make_plan
from rollout.policy import RolloutPolicy
from rollout.profiles import ProfileQuery, ask
from rollout.record import RolloutReport
from rollout.serving import ServingSpec
from rollout.target import CredentialSource, Endpoints, Target
from rollout.workload import WORKLOADS
from sandbox.storage import StorageServer
from tests.rollout.curves import QueueServer

EVERYTHING = ProfileQuery()
STARTED = datetime(2026, 11, 20, 12, tzinfo=UTC)


def benchmark(accelerator: str = "nvidia-h100-80gb") -> BenchmarkReport:
    spec = BenchmarkSpec(workload=WORKLOADS["chatbot"])
    environment = Environment(model="served-name", image="vllm/vllm-openai:v0.32.0", accelerator=accelerator)
    stages = QueueServer().sweep(spec)
    return benchmark_report(spec, environment, stages, started_at=STARTED, duration_s=60.0)


def record(target: Target, run_id: str = "run-1") -> RolloutReport:
    file = ModelFile(path="config.json", size_bytes=100)
    model = PinnedModel(repo_id="org/model", revision="main", commit_sha="0" * 40, files=(file,))
    serving = ServingSpec(served_model_name="served-name")
    plan = make_plan(model, serving, target, RolloutPolicy(), Observation(), [])
    return RolloutReport(run_id=run_id, started_at=STARTED, plan=plan, benchmark=benchmark())


def target(storage: str | None = None) -> Target:
    return Target(
        name="test",
        project="my-project",
        region="europe-west4",
        credentials=CredentialSource.ANONYMOUS,
        bucket="profiles-of-ours",
        gpu_usd_per_hour=7.2,
        endpoints=Endpoints(storage=storage),
    )


def test_a_rollouts_record_is_a_profile_with_its_machine_and_its_targets_price(tmp_path: Path) -> None:
    write_local(record(target()), tmp_path / "rehearsal" / "report.json")

    (found,) = local_history(tmp_path, EVERYTHING).profiles(EVERYTHING).profiles

    assert (found.model, found.instance_type) == ("org/model", "a3-edgegpu-8g-nolssd")
    point = found.saturation
    assert point.input_tokens_per_s is not None
    # 7.2 USD/hour are 0.002 USD/s.
    expected = 0.002 / (point.input_tokens_per_s / 4 + point.output_tokens_per_s) * 1e6
    assert point.usd_per_million_output_tokens == pytest.approx(expected)


def test_a_rerun_that_repeats_the_stages_is_shown_once(tmp_path: Path) -> None:
    for name in ("report", "rerun"):
        write_local(record(target(), run_id=name), tmp_path / f"{name}.json")

    assert len(local_history(tmp_path, EVERYTHING).profiles(EVERYTHING).profiles) == 1


def test_kept_curves_take_the_list_price_of_the_quickstarts_region(tmp_path: Path) -> None:
    keep(FolderHistory(tmp_path / "history"), CurveRecord(report=benchmark()))

    costs = [
        local_history(tmp_path, query).profiles(query).profiles[0].saturation.usd_per_million_output_tokens
        for query in (EVERYTHING, ProfileQuery(pricing_model=PricingModel.SPOT))
    ]

    assert costs[0] is not None
    assert costs[1] == pytest.approx(costs[0] * 4.42446871232877 / 11.0612499878219)


def test_other_files_are_passed_over_and_broken_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "old.json").write_text(json.dumps({"run_id": "x", "benchmark": 7}))

    answer = local_history(tmp_path, EVERYTHING).profiles(EVERYTHING)

    assert answer.profiles == ()
    assert len(answer.notes) == 1
    assert "old.json was left out" in answer.notes[0]


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    assert local_history(tmp_path / "none", EVERYTHING).models() == []


def test_the_targets_bucket_is_a_source(tmp_path: Path) -> None:
    with StorageServer(root=tmp_path / "storage", project="my-project") as server:
        place = target(server.url)
        assert BucketSource(place, EVERYTHING).models() == []
        StorageClient(place).ensure_bucket()
        RecordStore(place).write(record(place))
        keep(BucketHistory(place), CurveRecord(report=benchmark("nvidia-l4")))

        source = BucketSource(place, EVERYTHING)

        assert source.models() == ["org/model", "served-name"]
        assert all(
            each.source.name.startswith("gs://profiles-of-ours") for each in source.profiles(EVERYTHING).profiles
        )


def test_a_bucket_that_cannot_be_read_hides_no_other_source(tmp_path: Path) -> None:
    write_local(record(target()), tmp_path / "report.json")
    here = local_history(tmp_path, EVERYTHING)

    with StorageServer(root=tmp_path / "storage", project="my-project", foreign_buckets=["profiles-of-ours"]) as server:
        answer = ask([BucketSource(target(server.url), EVERYTHING), here], EVERYTHING)

    assert len(answer.profiles) == 1
    assert "left out" in answer.notes[0]


def test_a_single_benchmark_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(benchmark().model_dump_json())

    assert benchmark_file(path, EVERYTHING).models() == ["served-name"]


GCLOUD_CSV = (
    "Instance Type,Accelerator Type,Model Name,Model Server Name,Output Tokens/s,Cost/M Input Tokens,"
    "Cost/M Output Tokens\na3-highgpu-1g,nvidia-h100-80gb,a/b,vllm,1000,0.300,1.200\n"
)


def test_a_files_costs_are_neither_relabelled_nor_taken_for_those_of_another_ratio(tmp_path: Path) -> None:
    path = tmp_path / "saved.csv"
    path.write_text(GCLOUD_CSV)
    spot = ProfileQuery(pricing_model=PricingModel.SPOT)

    (found,) = benchmark_file(path, spot).profiles(spot).profiles
    other = benchmark_file(path, ProfileQuery(output_to_input_ratio=8)).profiles(EVERYTHING)

    assert (found.pricing_model, found.saturation.usd_per_million_output_tokens) == (None, 1.2)
    assert "does not state the pricing model" in benchmark_file(path, spot).profiles(spot).notes[0]
    assert other.profiles[0].saturation.usd_per_million_output_tokens is None
    assert "ratio of about 4" in other.notes[0]


def test_what_the_asker_pays_is_what_our_tokens_cost(tmp_path: Path) -> None:
    keep(FolderHistory(tmp_path / "history"), CurveRecord(report=benchmark("nvidia-b200")))
    query = ProfileQuery(usd_per_accelerator_hour={"nvidia-b200": 7.2})

    unpriced, priced = (local_history(tmp_path, each).profiles(each).profiles[0] for each in (EVERYTHING, query))

    assert not unpriced.has_costs
    assert priced.has_costs


@pytest.mark.parametrize(("name", "text"), [("x.json", "{"), ("x.json", '{"a": 1}'), ("x.csv", "a,b\n")])
def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(BadInput, match=name):
        benchmark_file(tmp_path / name, EVERYTHING)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        benchmark_file(tmp_path / "none.csv", EVERYTHING)
