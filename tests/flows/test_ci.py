"""What CI sees: the documented command lines, exit codes, files, and cancellation that cleans up."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.deployments.runner import EntrypointType
from prefect.states import Cancelled, Completed, Crashed, Failed
from typer.testing import CliRunner

from flows.ci import start, wait
from flows.cli import app
from flows.hooks import announce_outcome
from flows.plan_model import plan_model
from flows.rollout_model import rollout_model
from rollout.clients.gke import Gke
from rollout.errors import BadInput, ExitCode, ObjectivesMissed, RolledBack, RolloutError
from rollout.report import StepStatus
from rollout.summary import github_annotations, junit_xml
from tasks.outcomes import outcome_of
from tests.flows.command_line import DEADLINE_S, HERE, Session, environment, read_record, run
from tests.flows.conftest import Stage

DOCUMENT = Path(__file__).parents[2] / "docs" / "ci.md"
EXAMPLES = re.findall(r"tests/flows/test_ci\.py -->\n```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)


def command_lines(example: str) -> list[list[str]]:
    """The `llm-rollout` lines of a pipeline, as the shell splits them. `exec`: bash hands on no signal to a child."""
    return [shlex.split(line)[1:] for line in scripts(example) if line.startswith("exec llm-rollout")]


def scripts(example: str) -> list[str]:
    document = yaml.safe_load(example)
    job = document["jobs"]["rollout"] if "jobs" in document else document["rollout"]
    found: list[str] = job.get("script") or [step["run"] for step in job["steps"] if "run" in step]
    return found


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
        left = wait(client, flow_run.id, 0.0, said.append)
        state = client.read_flow_run(flow_run.id).state
        assert state is not None
        assert state.is_cancelling() or state.is_cancelled()
    assert said[-1] == f"the run {flow_run.id} was cancelled"
    assert (left.outcome, left.exit_code) == ("cancelled", ExitCode.FAILED)
    assert "raise --wait" in left.summary


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_is_cancelled_cancels_its_run_and_still_writes_its_files(
    number: signal.Signals, stage: Stage
) -> None:
    """The documented step of GitHub, run by the runner's shell; only the shell gets the signal."""
    deployment = f"cancelled-{stage.target.namespace}"
    parameters = {"request": stage.request().model_dump(mode="json")}
    deployed = plan_model.to_deployment(
        deployment, parameters=parameters, entrypoint_type=EntrypointType.MODULE_PATH
    ).apply()
    assert isinstance(deployed, UUID)
    (line,) = (line for line in scripts(EXAMPLES[0]) if "llm-rollout run" in line)
    script, log, summary = (stage.folder / name for name in ("step.sh", "log", "summary.md"))
    replaced = line.replace("rollout-model/gemma-4-26b-a4b-it-s3ns-france", f"plan-model/{deployment}")
    script.write_text(replaced.replace("out/junit.xml", str(stage.folder / "junit.xml")))
    env = environment(
        REVISION="main",
        GITHUB_RUN_ID=deployment,
        GITHUB_STEP_SUMMARY=str(summary),
        GITHUB_ACTIONS="true",
        PATH=f"{HERE}{os.pathsep}{os.environ['PATH']}",
    )
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployed]))
    with get_client(sync_client=True) as client:
        with Session("-e", str(script), log=log, env=env, program="bash") as step:
            step.wait_until(lambda: "Scheduled" in step.output)  # nobody starts it: there is no worker
            code = step.signal_alone(number)
        (run_of_job,) = client.read_flow_runs(deployment_filter=mine)
    assert code == ExitCode.FAILED, step.output
    assert run_of_job.state is not None
    assert run_of_job.state.is_cancelled() or run_of_job.state.is_cancelling()
    assert number.name in summary.read_text()
    suite = ElementTree.parse(stage.folder / "junit.xml").getroot()[0]
    assert suite.get("failures") == "1"
    assert f"cancelled: CI gave up waiting: {number.name}" in step.output
    assert "::error title=failed::" in step.output


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_the_steps_of_a_run_on_the_server_are_cases_for_ci(stage: Stage) -> None:
    with pytest.raises(RolloutError):
        plan_model(stage.request().model_copy(update={"revision": "no-such-branch"}))
    with get_client(sync_client=True) as client:
        named = FlowRunFilter(name=FlowRunFilterName(any_=[f"plan {stage.model_file.stem} → {stage.target.name}"]))
        (flow_run,) = client.read_flow_runs(flow_run_filter=named)
        ended = wait(client, flow_run.id, DEADLINE_S)
    assert [(step.name, step.status) for step in ended.report.steps] == [("pin model", StepStatus.FAILED)]
    assert "no-such-branch" in junit_xml(ended.report)
    assert "no-such-branch" in "".join(github_annotations(ended.report))


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_an_unknown_deployment_is_bad_input() -> None:
    with get_client(sync_client=True) as client, pytest.raises(BadInput, match="no deployment 'rollout-model/nobody'"):
        start(client, "rollout-model/nobody", {}, None)


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_parameters_that_the_deployment_does_not_take_are_bad_input(stage: Stage) -> None:
    name = stage.target.namespace
    plan_model.to_deployment(name, entrypoint_type=EntrypointType.MODULE_PATH).apply()
    with get_client(sync_client=True) as client, pytest.raises(BadInput, match="'target' is a required property"):
        start(client, f"plan-model/{name}", {"revision": "main"}, None)
