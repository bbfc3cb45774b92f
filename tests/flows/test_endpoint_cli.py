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
