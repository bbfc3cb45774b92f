"""`llm-rollout profiles` as a user types it: without any cloud, with files, and against the recommender's stand-in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from flows.cli import app
from rollout.benchmark import BenchmarkSpec, Environment, benchmark_report
from rollout.catalog import load_target
from rollout.clients.gke import Gke
from rollout.clients.history import FolderHistory
from rollout.errors import BadInput, RolloutError
from rollout.history import CurveRecord, keep
from rollout.workload import WORKLOADS
from sandbox.google_apis import GoogleApisServer
from sandbox.recommender import RecommenderServer
from tests.rollout.curves import QueueServer

MODEL = "google/gemma-2-27b-it"
Profiles = Callable[..., Result]


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profiles:
    """Run `llm-rollout profiles …` in an empty folder; errors are raised as they are."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["profiles", *arguments])
        if isinstance(result.exception, RolloutError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Two sweeps of ours, kept as the product keeps them."""
    folder = tmp_path / "out" / "history"
    kept_curve(folder, "chatbot", "nvidia-l4", 4, capacity_per_s=10.0)
    kept_curve(folder, "chatbot", "nvidia-h100-80gb", 1, capacity_per_s=40.0)
    return folder


def kept_curve(folder: Path, workload: str, accelerator: str, count: int, *, capacity_per_s: float = 10.0) -> None:
    spec = BenchmarkSpec(workload=WORKLOADS[workload])
    report = benchmark_report(
        spec,
        Environment(model=MODEL, image="vllm/vllm-openai:v0.32.0", accelerator=accelerator, accelerator_count=count),
        QueueServer(capacity_per_s=capacity_per_s).sweep(spec),
        started_at=datetime(2026, 11, 20, tzinfo=UTC),
        duration_s=60.0,
    )
    keep(FolderHistory(folder), CurveRecord(report=report))


@pytest.fixture
def google(tmp_path: Path) -> Iterator[GoogleApisServer]:
    """The project's control plane, without a cluster."""
    with GoogleApisServer(root=tmp_path / "google", project="my-project", region="us-central1") as server:
        yield server


@pytest.fixture
def target(tmp_path: Path, google: GoogleApisServer) -> Iterator[str]:
    with RecommenderServer() as server:
        path = tmp_path / "target.yaml"
        fields = {
            "name": "google",
            "project": "my-project",
            "region": "us-central1",
            "credentials": "anonymous",
            "bucket": "my-bucket",
            "namespace": "serving",
            "endpoints": {"gkerecommender": server.url, "container": google.url},
        }
        path.write_text(yaml.safe_dump(fields))
        yield str(path)


def test_with_nothing_measured_yet_the_list_says_so(profiles: Profiles) -> None:
    assert "no profile matches" in profiles("list").output


def test_our_own_measurements_are_listed_without_any_cloud(profiles: Profiles, history: Path) -> None:
    header, first, second = profiles("list").output.splitlines()

    assert header.startswith("Instance Type   Accelerator       Cost/M Input Tokens")
    # The H100 has the lower cost per token: four times the throughput for less than three times the price.
    assert first.split()[:2] == ["a3-highgpu-1g", "nvidia-h100-80gb"]
    assert second.split()[:2] == ["g2-standard-48", "nvidia-l4"]
    assert "2026-11-20" in first


def test_names_are_listed_from_the_history(profiles: Profiles, history: Path) -> None:
    assert profiles("models", "list").output == f"Model\n{MODEL}\n"
    assert json.loads(profiles("model-servers", "list", "--model", MODEL, "--format", "json").stdout) == [
        {"model_server": "vllm"}
    ]
    versions = profiles("model-server-versions", "list", "--model", MODEL, "--model-server", "vllm", "--format=csv")
    assert versions.output == "model_server_version\nv0.32.0\n"


def test_a_latency_target_changes_the_throughput(profiles: Profiles, history: Path) -> None:
    free, bound = (
        json.loads(profiles("list", "--accelerator-type=nvidia-h100-80gb", "--format=json", *more).stdout)[0]
        for more in ((), ("--target-ttft-milliseconds=55",))
    )

    assert bound["ttft_ms"] <= 55
    assert bound["output_tokens_per_s"] < free["output_tokens_per_s"]


def test_an_impossible_target_is_answered_with_the_range(profiles: Profiles, history: Path) -> None:
    assert "no recommendation" in profiles("list", "--target-ttft-milliseconds=1").output


def test_benchmarks_are_csv_and_can_be_a_source_again(profiles: Profiles, history: Path, tmp_path: Path) -> None:
    text = profiles("benchmarks", "list", "--model", MODEL, "--model-server", "vllm").output
    rows = list(csv.DictReader(io.StringIO(text)))
    (tmp_path / "saved.csv").write_text(text)

    again = profiles("benchmarks", "list", "--file", "saved.csv", "--history", "nowhere").output

    assert {row["Accelerator Type"] for row in rows} == {"nvidia-l4", "nvidia-h100-80gb"}
    assert len(rows) > 10
    assert sorted(again.splitlines()) == sorted(text.splitlines())


def test_inference_perfs_folder_is_a_source(profiles: Profiles, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    throughput = {"input_tokens_per_sec": 100, "output_tokens_per_sec": 200, "requests_per_sec": 2}
    stage = {"successes": {"count": 9, "throughput": throughput, "latency": {}}}
    (folder / "stage_0_lifecycle_metrics.json").write_text(json.dumps(stage))
    asked = ("list", "--file", "reports", "--format=json", "--model=a/b")

    (row,) = json.loads(profiles(*asked, "--accelerator-type=nvidia-h100-80gb").stdout)

    assert (row["model"], row["output_tokens_per_s"], row["source"]) == ("a/b", 200, "reports")
    with pytest.raises(BadInput, match="--accelerator-type"):
        profiles(*asked)


def test_inference_perfs_costs_are_those_of_the_question(profiles: Profiles, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    throughput = {"input_tokens_per_sec": 400, "output_tokens_per_sec": 200, "requests_per_sec": 2}
    stage = {"successes": {"count": 9, "throughput": throughput, "latency": {}}}
    (folder / "stage_0_lifecycle_metrics.json").write_text(json.dumps(stage))
    asked = ("list", "--file", "reports", "--format=json", "--model=a/b", "--accelerator-type=nvidia-b200")

    (row,) = json.loads(
        profiles(
            *(*asked, "--accelerator-count=2", "--usd-per-accelerator-hour=nvidia-b200=7.2", "--pricing-model=spot"),
            "--output-input-cost-ratio=2",
        ).stdout
    )

    assert (row["accelerator_count"], row["pricing_model"]) == (2, "spot")
    # 2 x 0.002 USD/s over 400/2 + 200 weighted tokens/s.
    assert row["usd_per_million_output_tokens"] == pytest.approx(0.004 / 400 * 1e6)
    with pytest.raises(BadInput, match="not ACCELERATOR=USD"):
        profiles(*asked, "--usd-per-accelerator-hour=nvidia-b200")


def test_notes_go_to_stderr_in_every_format(profiles: Profiles, history: Path) -> None:
    for form in ("table", "csv", "json", "yaml"):
        result = profiles("list", "--target-ttft-milliseconds=1", "--format", form)
        assert "no recommendation" in result.stderr
        assert "no recommendation" not in result.stdout


def test_the_six_use_cases_and_the_stacks_are_listed(profiles: Profiles) -> None:
    use_cases = json.loads(profiles("use-cases", "list", "--format=json").stdout)

    assert [each["ratio"] for each in use_cases] == ["32:1", "16:1", "8:1", "1:1", "1:4", "1:16"]
    assert profiles("serving-stacks", "list").output.split()[2:] == ["llm-d", "vllm"]


def test_google_is_asked_when_there_is_a_target(profiles: Profiles, target: str) -> None:
    rows = json.loads(profiles("list", "--target", target, "--model", MODEL, "--format=json").stdout)

    assert {row["source"] for row in rows} == {"gkerecommender.googleapis.com"}
    assert {row["model_server_version"] for row in rows} == {"v0.7.2", "v0.11.2"}


def test_googles_prediction_stands_beside_our_measurement(profiles: Profiles, history: Path, target: str) -> None:
    output = profiles("list", "--target", target, "--model", MODEL, "--accelerator-type=nvidia-l4").output

    assert "Predicted  Measured  Difference" in output


def test_googles_range_is_told_where_its_target_is_too_low(profiles: Profiles, target: str) -> None:
    result = profiles("list", "--target", target, "--model", MODEL, "--target-ttft-milliseconds=1")

    assert "no recommendation" in result.stderr
    assert "TTFT 25" in result.stderr


def test_benchmarks_of_ours_are_shown_where_google_wants_more_words(
    profiles: Profiles, history: Path, target: str
) -> None:
    result = profiles("benchmarks", "list", "--target", target)

    assert MODEL in result.stdout
    assert "left out" in result.stderr
    assert "Give --model and --model-server" in result.stderr


def test_use_cases_that_are_listed_are_use_cases_that_are_taken(profiles: Profiles, tmp_path: Path) -> None:
    kept_curve(tmp_path / "out" / "history", "quickstart", "nvidia-l4", 4)

    listed = [row["use_case"] for row in json.loads(profiles("use-cases", "list", "--format=json").stdout)]
    (row,) = json.loads(profiles("list", "--use-case=quickstart", "--format=json").stdout)

    assert listed[-1] == row["use_case"] == "quickstart"


def test_use_cases_of_a_file_are_listed(profiles: Profiles, tmp_path: Path) -> None:
    header = "Accelerator Type,Model Name,Model Server Name,Output Tokens/s,Use Case\n"
    (tmp_path / "saved.csv").write_text(header + "nvidia-l4,a/b,vllm,100,Blog Posts\n")

    assert "Blog Posts" in profiles("use-cases", "list", "--file=saved.csv").stdout


def test_a_source_needs_its_target(profiles: Profiles) -> None:
    with pytest.raises(BadInput, match="Give --target"):
        profiles("list", "--source=google")


def test_recommendations_rank_and_explain(profiles: Profiles, history: Path) -> None:
    output = profiles("recommend", "--model", MODEL, "--requests-per-s=60", "--max-usd-per-hour=25").output

    assert "1 x nvidia-h100-80gb  2         22.12" in output
    assert "Not chosen: google/gemma-2-27b-it on 4 x nvidia-l4" in output
    assert "it costs 36.06 USD/hour, the budget is 25.00" in output


CREATE = ("manifests", "create", "--model", MODEL, "--model-server=vllm", "--accelerator-type=nvidia-l4")


def test_manifests_are_rendered_with_no_cloud_and_no_network(profiles: Profiles) -> None:
    output = profiles(*CREATE, "--model-server-version=v0.7.2").output

    assert [each["kind"] for each in yaml.safe_load_all(output)] == ["Deployment", "Service", "PodMonitoring"]
    assert "kubectl create secret generic hf-secret" in output
    assert "# Model server vllm v0.7.2" in output


def test_output_chooses_the_part_and_output_path_the_file(profiles: Profiles, tmp_path: Path) -> None:
    comments = profiles(*CREATE, "--output=comments").output
    said = profiles(*CREATE, "--output=manifest", "--output-path", "made/manifests.yaml").output

    assert list(yaml.safe_load_all(comments)) == []
    assert said == "Output saved to made/manifests.yaml\n"
    assert "gcloud container clusters update" not in (tmp_path / "made" / "manifests.yaml").read_text()


def test_a_latency_target_takes_its_threshold_from_our_curve(profiles: Profiles, history: Path) -> None:
    output = profiles(*CREATE, "--target-ntpot-milliseconds=25").output

    assert list(yaml.safe_load_all(output))[-1]["kind"] == "HorizontalPodAutoscaler"
    assert "a measurement of 2026-11-20" in output


def test_a_latency_target_takes_its_threshold_from_googles_curve(profiles: Profiles, target: str) -> None:
    output = profiles(*CREATE, "--target-ntpot-milliseconds=150", "--target", target).output

    assert "gkerecommender.googleapis.com, a prediction" in output
    assert yaml.safe_load(output.split("\n---\n")[0])["metadata"]["namespace"] == "serving"


def test_a_threshold_comes_from_a_curve_of_such_a_replica(profiles: Profiles, history: Path) -> None:
    # Two curves are known: of 4 x nvidia-l4, and of one H100, both with the chatbot's requests.
    for other in ("--accelerator-count=8", "--use-case=Text Generation", "--model-server-version=v0.30.0"):
        with pytest.raises(BadInput, match="is known, so a latency target"):
            profiles(*CREATE, "--target-ntpot-milliseconds=25", other)


def test_the_quickstarts_example_for_llm_d_works(profiles: Profiles) -> None:
    output = profiles(
        *("manifests", "create", "--accelerator-type=nvidia-h100-80gb", "--model=openai/gpt-oss-120b"),
        *("--model-server=vllm", "--serving-stack=llm-d", "--use-case", "Multi Agent Large Document Summarization"),
    ).output

    assert "InferencePool" in output
    assert "not stated: sized for 2048 tokens a request" in output


@pytest.mark.parametrize(
    "flag",
    [
        *("--accelerator-count=4", "--service-account=me", "--use-case=Chatbot", "--serving-stack=vllm"),
        *("--max-replicas=10", "--metrics-adapter=stackdriver", "--boot-disk-gib=200", "--gke-version=1.34.1-gke.1"),
        *(
            "--project-number=1",
            "--from-hub",
            "--target-itl-milliseconds=20",
            "--target-input-length=100",
            "--history=out",
        ),
    ],
)
def test_google_is_not_asked_for_what_it_would_ignore(profiles: Profiles, target: str, flag: str) -> None:
    with pytest.raises(BadInput, match=f"takes no {flag.partition('=')[0]}"):
        profiles(*CREATE, "--generator=google", "--target", target, flag)


def test_the_header_names_the_versions_of_the_targets_cluster_and_what_is_stated(
    profiles: Profiles, target: str
) -> None:
    assert "# GKE cluster not validated\n" in profiles(*CREATE, "--target", target).output
    found, _ = Gke(load_target(target)).ensure()

    ours = profiles(*CREATE, "--target", target, "--gpu-driver-version=580.82.07").output
    stated = profiles(*CREATE, "--target", target, "--gke-version=1.34.1-gke.1", "--node-version=1.33.4-gke.2").output

    assert f"# GKE cluster {found.version}\n# 580.82.07 GPU driver for node version {found.node_version}\n" in ours
    assert "# GKE cluster 1.34.1-gke.1\n# GKE's default GPU driver for node version 1.33.4-gke.2\n" in stated


def test_google_generates_where_it_is_asked_to(profiles: Profiles, target: str) -> None:
    output = profiles(*CREATE, "--generator=google", "--target", target).output

    assert "Synthetic" in output
    with pytest.raises(BadInput, match="Give --target"):
        profiles(*CREATE, "--generator=google")
    with pytest.raises(BadInput, match="--serving-stack"):
        profiles(*CREATE, "--generator=google", "--target", target, "--serving-stack=llm-d")


def test_a_model_that_is_not_in_the_table_brings_its_config(profiles: Profiles, tmp_path: Path) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ("manifests", "create", "--model=my/own", "--accelerator-type=nvidia-l4")

    assert "my/own" in profiles(*asked, "--config=config.json", "--weights-gib=1").output
    with pytest.raises(BadInput, match="--weights-gib"):
        profiles(*asked)


def test_wrong_choices_name_the_right_ones(profiles: Profiles) -> None:
    for arguments, known in (
        ((*CREATE, "--output=yaml"), "manifest, comments, all"),
        (("list", "--format=xml"), "csvprofile"),
        (("list", "--pricing-model=free"), "3-years-cud"),
        (("dashboards", "create", "--kind=paper"), "grafana"),
    ):
        with pytest.raises(BadInput, match=known):
            profiles(*arguments)


def test_a_dashboard_carries_the_objective(profiles: Profiles, tmp_path: Path) -> None:
    profiles("dashboards", "create", "--kind=grafana", "--target-ttft-milliseconds=500", "--output-path=d.json")

    assert '"value": 0.5' in (tmp_path / "d.json").read_text()
