"""What CI sees: the documented command lines, exit codes, files, and cancellation that cleans up."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Completed, Crashed, Failed
from typer.testing import CliRunner

from flows.ci import start, wait
from flows.cli import app
from flows.hooks import announce_outcome, outcome_of
from flows.plan_model import plan_model
from flows.rollout_model import rollout_model
from rollout.clients.gke import Gke
from rollout.errors import BadInput, DeadlineExceeded, ExitCode, ObjectivesMissed, RolledBack
from tests.flows.command_line import DEADLINE_S, Session, environment, read_record, run
from tests.flows.conftest import Stage

DOCUMENT = Path(__file__).parents[2] / "docs" / "ci.md"
EXAMPLES = re.findall(r"tests/flows/test_ci\.py -->\n```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)


def command_lines(example: str) -> list[list[str]]:
    """The `llm-rollout` lines of a pipeline, as the shell splits them."""
    document = yaml.safe_load(example)
    job = document["jobs"]["rollout"] if "jobs" in document else document["rollout"]
    scripts = job.get("script") or [step["run"] for step in job["steps"] if "run" in step]
    return [shlex.split(line) for line in scripts if line.startswith("llm-rollout")]


def policy_file(stage: Stage, **policy: Any) -> str:
    path = stage.folder / "policy.yaml"
    path.write_text(yaml.safe_dump({"benchmark": None, **policy}))
    return str(path)


# --- The documentation ------------------------------------------------------------------------------------------------


def test_both_examples_are_valid_yaml_with_one_rollout_each() -> None:
    assert [len(command_lines(example)) for example in EXAMPLES] == [1, 1]


@pytest.mark.parametrize("example", EXAMPLES, ids=["github", "gitlab"])
def test_every_option_of_the_examples_exists(example: str) -> None:
    for _, command, *words in command_lines(example):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in (word for word in words if word.startswith("--")):
            assert option in shown


def test_the_table_of_exit_codes_is_complete() -> None:
    rows = re.findall(r"^\| (\d) \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert [int(row) for row in rows] == [code.value for code in ExitCode]


# --- In the CI job itself ---------------------------------------------------------------------------------------------


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_the_gitlab_line_rolls_out_and_writes_what_ci_shows(stage: Stage) -> None:
    (words,) = command_lines(EXAMPLES[1])
    replaced = {
        "gemma-4-26b-a4b-it": str(stage.model_file),
        "s3ns-france": str(stage.target_file),
        "$REVISION": "main",
    }
    line = [replaced.get(word, word) for word in words[1:]]
    done = run(*line, "--policy", policy_file(stage, teardown="always"), cwd=stage.folder)
    assert done.returncode == ExitCode.DONE, done.stdout + done.stderr
    suite = ElementTree.parse(stage.folder / "out" / "junit.xml").getroot()[0]
    assert {case.get("name") for case in suite} >= {"plan", "publish weights", "smoke test", "teardown"}
    assert suite.get("failures") == "0"
    assert "**Done**" in (stage.folder / "out" / "summary.md").read_text()


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_a_job_that_is_cancelled_tears_down_and_still_writes_its_files(stage: Stage) -> None:
    report, junit = stage.folder / "report.json", stage.folder / "junit.xml"
    line = [
        *("rollout", str(stage.model_file), "--target", str(stage.target_file), "--junit", str(junit)),
        *("--report", str(report), "--policy", policy_file(stage, teardown="on_failure")),
    ]

    def cluster_is_there() -> bool:
        return any(step["name"] == "provision cluster" for step in read_record(report).get("steps", []))

    with Session(*line, log=stage.folder / "log", env=environment(GITHUB_ACTIONS="true")) as rollout:
        rollout.wait_until(cluster_is_there)
        code = rollout.signal_group(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, rollout.output
    assert Gke(stage.target).get() is None, rollout.output
    record = read_record(report)
    assert record["verdict"] == "failed"
    assert record["teardown"]["left"] == []
    assert ElementTree.parse(junit).getroot()[0].get("failures") != "0"
    assert "::error title=" in rollout.output


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_bad_input_has_its_own_code_and_changes_nothing(stage: Stage) -> None:
    done = run("rollout", "no-such-model", "--target", str(stage.target_file), cwd=stage.folder)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "there is no preset 'no-such-model'" in done.stderr


# --- On the Prefect server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (Completed(), "done"),
        (Failed(data=RolledBack("back.")), "rolled-back"),
        (Failed(data=ObjectivesMissed("slow.")), "objectives-missed"),
        (Failed(data=ValueError("x")), "failed"),
        (Crashed(message="gone"), "crashed"),
        (Cancelled(), "cancelled"),
    ],
)
def test_every_end_has_a_name(state: Any, outcome: str) -> None:
    assert outcome_of(state)[0] == outcome


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("state", "code"),
    [
        (Completed(), ExitCode.DONE),
        (Failed(data=RolledBack("back.")), ExitCode.ROLLED_BACK),
        (Failed(data=ObjectivesMissed("slow.")), ExitCode.OBJECTIVES_MISSED),
    ],
)
def test_waiting_for_a_run_ends_with_our_codes(state: Any, code: ExitCode) -> None:
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(rollout_model, parameters={"request": {"target": "t"}})
        announce_outcome(rollout_model, flow_run, state)
        client.set_flow_run_state(flow_run.id, state.model_copy(update={"data": None}), force=True)
        assert wait(client, flow_run.id, DEADLINE_S).exit_code is code


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_whoever_stops_waiting_cancels_the_run() -> None:
    said: list[str] = []
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(plan_model, parameters={"request": {"target": "t"}})
        with pytest.raises(DeadlineExceeded):
            wait(client, flow_run.id, 0.0, said.append)
        state = client.read_flow_run(flow_run.id).state
        assert state is not None
        assert state.is_cancelling() or state.is_cancelled()
    assert said[-1] == f"the run {flow_run.id} was cancelled"


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_an_unknown_deployment_is_bad_input() -> None:
    with get_client(sync_client=True) as client, pytest.raises(BadInput, match="no deployment 'rollout-model/nobody'"):
        start(client, "rollout-model/nobody", {}, None)
