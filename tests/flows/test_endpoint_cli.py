"""`llm-rollout smoke` and `benchmark` against an engine that serves, and against nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from rollout.errors import ExitCode, RolloutError
from tests.engines import simulated_engine


@pytest.fixture
def run() -> CliRunner:
    return CliRunner()


def test_smoke_and_benchmark_of_a_served_model(run: CliRunner, tmp_path: Path) -> None:
    with simulated_engine(tmp_path) as url:
        smoke = run.invoke(app, ["smoke", url])
        assert smoke.exit_code == ExitCode.DONE, smoke.output
        assert "health" in smoke.output
        assert "not-applicable" in smoke.output

        report = tmp_path / "benchmark.json"
        arguments = ["--workload", "chatbot", "--rate", "2", "--stage-seconds", "1", "--report", str(report)]
        measured = run.invoke(app, ["benchmark", url, *arguments])
        assert measured.exit_code == ExitCode.DONE, measured.output
        assert [stage["rate_per_s"] for stage in json.loads(report.read_text())["stages"]] == [2.0]


def test_an_endpoint_where_nothing_listens_is_explained(run: CliRunner) -> None:
    result = run.invoke(app, ["smoke", "http://127.0.0.1:9"])
    assert isinstance(result.exception, RolloutError)
    assert "Connection refused" in str(result.exception)


def test_a_benchmark_answers_keeps_its_curve_and_is_compared(run: CliRunner, tmp_path: Path) -> None:
    """A user's afternoon: own prompts, objectives, pictures; the same again; the two side by side; the trend."""
    dataset, objectives = tmp_path / "prompts.jsonl", tmp_path / "objectives.yaml"
    dataset.write_text('{"prompt": "Why is the sky blue?", "output_tokens": 4}\n{"prompt": "And the sea?"}\n')
    objectives.write_text("latencies: [{metric: ttft, percentile: p90, limit_s: 30}]\n")
    curves = tmp_path / "curves"
    kept = ("--history", str(curves))
    with simulated_engine(tmp_path) as url:
        sweep = ["benchmark", url, *kept, "--report", str(tmp_path / "benchmark.json"), "--dataset", str(dataset)]
        sweep += ["--rate", "4", "--rate", "8", "--stage-seconds", "1", "--arrivals", "constant", "--seed", "7"]
        more = ["--objectives", str(objectives), "--demand", "20", "--pictures", str(tmp_path / "pictures")]
        more += ["--accelerator", "nvidia-l4", "--usd-per-accelerator-hour", "3.6"]
        first = run.invoke(app, [*sweep, *more])
        assert first.exit_code == ExitCode.DONE, first.output
        assert "replicas for 20 requests/s" in first.output
        assert "USD per GPU and hour (stated with the question)" in first.output
        assert "all 2 objectives are met" in first.output
        assert "against the curve" not in first.output
        assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
            *("latency-over-throughput.png", "ttft-over-rate.png", "tokens-over-rate.png")
        }
        written = json.loads((tmp_path / "benchmark.json").read_text())
        assert written["spec"]["workload"]["arrivals"] == "constant"
        assert written["spec"]["workload"]["seed"] == 7
        assert {entry["output_tokens"] for entry in written["spec"]["workload"]["dataset"]} == {4, 256}

        second = run.invoke(app, [*sweep, "--accelerator", "nvidia-l4"])
        assert "against the curve of" in second.output, second.output
        run.invoke(app, [*sweep, "--no-keep"], catch_exceptions=False)

        objectives.write_text("latencies: [{metric: ttft, percentile: p90, limit_s: 0.000001}]\n")
        missed = run.invoke(app, [*sweep, "--no-keep", "--objectives", str(objectives)])
        assert missed.exit_code == ExitCode.OBJECTIVES_MISSED
        assert "TTFT p90 is" in missed.output

        # The yardstick is the last good curve; smoke checks are another command's.
        objectives.write_text("no_worse: {by_share: 0.000001}\nsmoke_checks: [health]\n")
        for path in curves.rglob("*.json"):
            faster = json.loads(path.read_text())
            for stage in faster["report"]["stages"]:
                stage["ttft_s"] |= {name: 1e-6 for name in stage["ttft_s"] if name != "count"}
            path.write_text(json.dumps(faster))
        slower = run.invoke(app, [*sweep, "--no-keep", "--accelerator", "nvidia-l4", "--objectives", str(objectives)])
        assert slower.exit_code == ExitCode.OBJECTIVES_MISSED, slower.output
        assert "TTFT p50 at" in slower.output
        assert "smoke" not in slower.output
        other = run.invoke(app, [*sweep, "--no-keep", "--accelerator", "nvidia-a100", "--objectives", str(objectives)])
        assert other.exit_code == ExitCode.DONE, "another accelerator's curve is no yardstick"

    listed = json.loads(run.invoke(app, ["curves", "list", *kept, "--json"]).output)
    assert [row["accelerator"] for row in listed] == ["1 x nvidia-l4"] * 2
    compared = run.invoke(app, ["curves", "compare", *kept])
    assert compared.exit_code == ExitCode.DONE, compared.output
    assert "output tokens/s at saturation" in compared.output
    trend = run.invoke(app, ["curves", "trend", *kept])
    assert trend.exit_code == ExitCode.DONE, trend.output
    assert "unknown" in trend.output, "two measurements are no trend"
    profiles = run.invoke(app, ["profiles", "list", "--history", str(tmp_path)])
    assert "nvidia-l4" in profiles.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "no-such-file"], "cannot read the dataset"),
        (["--arrivals", "whenever"], "arrivals"),
        (["--endpoint", "embeddings"], "endpoint"),
        (["--objectives", "no-such-file"], "cannot read the objectives"),
        (["--workload", "poetry"], "there is no workload 'poetry'"),
        (["--report", "."], "this is a folder"),
        (["--report", "/proc/none/report.json"], "cannot write there"),
        (["--demand", "inf"], "demand_rate_per_s"),
    ],
)
def test_a_wrong_option_is_named_before_any_load(run: CliRunner, arguments: list[str], message: str) -> None:
    result = run.invoke(app, ["benchmark", "http://127.0.0.1:9", "--model", "m", *arguments])
    assert isinstance(result.exception, RolloutError)
    assert message in str(result.exception)


def test_an_address_with_a_password_is_refused_without_showing_it(run: CliRunner) -> None:
    for command in ("smoke", "benchmark"):
        result = run.invoke(app, [command, "http://user:hunter2@127.0.0.1:9", "--model", "m"])
        assert isinstance(result.exception, RolloutError)
        assert "user name and a password" in str(result.exception)
        assert "hunter2" not in str(result.exception) + result.output


def test_curves_that_cannot_be_compared_are_refused(run: CliRunner, tmp_path: Path) -> None:
    for arguments in (["compare"], ["trend"]):
        result = run.invoke(app, ["curves", *arguments, "--history", str(tmp_path)])
        assert isinstance(result.exception, RolloutError)
        assert "llm-rollout benchmark URL" in str(result.exception)
    assert run.invoke(app, ["curves", "list", "--history", str(tmp_path)]).output == "no curves\n"
