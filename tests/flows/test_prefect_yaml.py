"""prefect.yaml: valid by Prefect's own schema, in step with presets and flows, and deployed for real."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._triggers import DeploymentTriggerAdapter
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from flows.bootstrap import DEFAULT_GPUS, LAPTOP_POOL, bootstrap
from flows.ci import start
from rollout import catalog
from rollout.delivery import surge_gpus
from rollout.policy import RolloutPolicy
from rollout.releases import RELEASE_EVENT, Announcement
from rollout.report import utc_now
from rollout.request import RolloutRequest, resolve
from tasks.releases import event_of
from tests.flows.command_line import DEADLINE_S, run
from tests.flows.conftest import Stage

REPOSITORY = Path(__file__).parents[2]
DOCUMENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS: list[dict[str, Any]] = DOCUMENT["deployments"]


def name_of(deployment: dict[str, Any]) -> str:
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=name_of)


def test_the_file_satisfies_the_schema_of_prefect_and_has_no_field_that_it_would_drop() -> None:
    parsed = PrefectYamlModel.model_validate(DOCUMENT)
    assert set(DOCUMENT) - {"definitions"} <= set(PrefectYamlModel.model_fields)
    for deployment, model in zip(DEPLOYMENTS, parsed.deployments, strict=True):
        assert set(deployment) <= set(type(model).model_fields)


def test_no_two_deployments_share_a_name() -> None:
    names = [name_of(deployment) for deployment in DEPLOYMENTS]
    assert len(names) == len(set(names))


@each_deployment
def test_parameters_are_what_the_flow_takes(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    flow.validate_parameters(deployment["parameters"])


@each_deployment
def test_every_deployment_explains_itself_and_is_tagged_with_its_target(deployment: dict[str, Any]) -> None:
    assert len(deployment["description"]) > 80
    target = deployment["parameters"].get("target") or deployment["parameters"]["request"]["target"]
    assert {"llm-rollout", f"target:{target}"} <= set(deployment["tags"])
    assert target in catalog.known("targets")
    assert deployment["concurrency_limit"]["limit"] >= 1


@each_deployment
def test_schedules_of_what_costs_money_are_inactive(deployment: dict[str, Any]) -> None:
    free = {"watch_releases", "janitor"}
    for schedule in deployment.get("schedules", []):
        assert schedule["active"] is (deployment["entrypoint"].rpartition(".")[2] in free)


@each_deployment
def test_triggers_are_valid_and_ask_for_a_commit_under_approval(deployment: dict[str, Any]) -> None:
    for spec in deployment.get("triggers", []):
        trigger = DeploymentTriggerAdapter.validate_python(dict(spec))
        assert trigger.expect == {RELEASE_EVENT}
        request = spec["parameters"]["request"]
        assert request["revision"] == "{{ event.payload.commit_sha }}"
        assert request["policy"]["approval"] == "always"
        assert request["model"] == deployment["parameters"]["request"]["model"]
        related = trigger.match_related
        assert related["prefect.resource.id"] == [f"llm-rollout.target.{request['target']}"]


@each_deployment
def test_rollouts_go_back_by_themselves_and_all_of_a_model_take_the_same_way(deployment: dict[str, Any]) -> None:
    if not deployment["entrypoint"].endswith("rollout_model"):
        return
    requests = [spec["parameters"]["request"] for spec in (deployment, *deployment.get("triggers", []))]
    policies = [RolloutPolicy.model_validate(request["policy"]) for request in requests]
    assert len({policy.delivery for policy in policies}) == 1
    assert policies[0].delivery.by_revisions
    spec = resolve(RolloutRequest.model_validate(requests[0]))
    needed = spec.serving.replicas * spec.serving.accelerator.count + surge_gpus(spec.policy.delivery, spec.serving)
    assert needed <= DEFAULT_GPUS


def test_every_target_with_a_rollout_has_what_belongs_to_it() -> None:
    per_target: dict[str, set[str]] = {}
    for deployment in DEPLOYMENTS:
        target = next(tag.removeprefix("target:") for tag in deployment["tags"] if tag.startswith("target:"))
        per_target.setdefault(target, set()).add(deployment["entrypoint"].rpartition(".")[2])
    expected = {"plan_model", "publish_model_weights", "verify_model", "teardown_model", "watch_releases", "janitor"}
    incomplete = [target for target, flows in per_target.items() if "rollout_model" in flows and not expected <= flows]
    assert incomplete == []


def test_whatever_is_rolled_out_is_verified_and_measured_and_its_releases_are_watched() -> None:
    def pairs(flow: str) -> set[tuple[str, str]]:
        requests = [each["parameters"]["request"] for each in DEPLOYMENTS if each["entrypoint"].endswith(f".{flow}")]
        return {(request["model"], request["target"]) for request in requests}

    watches = [each["parameters"]["request"] for each in DEPLOYMENTS if each["entrypoint"].endswith(".watch_releases")]
    watched = {(followed["model"], watch["target"]) for watch in watches for followed in watch["follow"]}
    assert pairs("rollout_model") == pairs("verify_model") == pairs("benchmark_model") == watched


def test_the_form_begins_with_what_people_decide_on_and_names_units() -> None:
    flow = load_flow_from_entrypoint("flows.rollout_model.rollout_model", use_placeholder_flow=False)
    definitions = parameter_schema(flow).definitions
    request = definitions["RolloutRequest"]["properties"]
    in_order = sorted(request, key=lambda name: request[name]["position"])
    assert in_order[:3] == ["model", "target", "revision"]
    assert all(field.get("description") for field in request.values())
    policy = definitions["RolloutPolicy"]["properties"]
    assert sorted(policy, key=lambda name: policy[name]["position"])[0] == "approval"
    assert policy["approval_timeout_s"]["title"] == "Approval timeout (seconds)"
    assert definitions["Approval"]["enum"] == ["never", "on_change", "always"]


# --- On a real server, with a real worker -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployed(prefect_server: None) -> None:
    """Everything of prefect.yaml on the test server, by Prefect's own command."""
    bootstrap([catalog.load_target(name) for name in catalog.known("targets")])
    prefect("--no-prompt", "deploy", "--all")


def prefect(*arguments: str) -> None:
    done = run(*arguments, cwd=REPOSITORY, program="prefect")
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_state(client: SyncPrefectClient, run_id: UUID) -> FlowRun:
    """The run in its final state, or suspended."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        run = client.read_flow_run(run_id)
        if run.state is not None and (run.state.is_final() or run.state.is_paused()):
            return run
        assert time.monotonic() < deadline, f"still {run.state}"
        threading.Event().wait(0.3)


@pytest.mark.flow
@pytest.mark.usefixtures("deployed")
def test_all_deployments_are_on_the_server_with_pool_and_limit() -> None:
    with get_client(sync_client=True) as client:
        for deployment in DEPLOYMENTS:
            flow = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
            found = client.read_deployment_by_name(f"{flow.name}/{deployment['name']}")
            assert found.work_pool_name == LAPTOP_POOL
            assert found.pull_steps in (None, [])
            assert found.global_concurrency_limit is not None
            assert found.global_concurrency_limit.limit == deployment["concurrency_limit"]["limit"]


@pytest.mark.flow
@pytest.mark.usefixtures("deployed")
def test_a_worker_runs_a_deployment(stage: Stage) -> None:
    request = {"model": str(stage.model_file), "target": str(stage.target_file), "policy": {"benchmark": None}}
    with get_client(sync_client=True) as client:
        run = start(client, "plan-model/s3ns-france", request, "from-the-test")
        again = start(client, "plan-model/s3ns-france", request, "from-the-test")
        assert again.id == run.id, "the same idempotency key is the same run"
        prefect("worker", "start", "--pool", LAPTOP_POOL, "--run-once", "--name", "test-worker")
        ended = wait_for_state(client, run.id)
        assert ended.state is not None
        assert ended.state.is_completed(), ended.state.message
        assert ended.name == f"plan {stage.model_file.stem} → {stage.target.name}"
        assert "target:s3ns-france" in ended.tags


@pytest.mark.flow
@pytest.mark.usefixtures("deployed")
def test_a_release_event_starts_one_rollout_of_that_commit_however_often_it_is_sent() -> None:
    announcement = Announcement(
        model="gemma-4-31b-it",
        repo_id="google/gemma-4-31B-it",
        revision="main",
        commit_sha="f" * 40,
        target="s3ns-france",
        decided_at=utc_now(),
    )
    with get_client(sync_client=True) as client:
        for _ in range(2):
            client.request("POST", "/events", json=[event_of(announcement)]).raise_for_status()
        deployment = client.read_deployment_by_name("rollout-model/gemma-4-31b-it-s3ns-france")
        deadline = time.monotonic() + DEADLINE_S
        while not (runs := started(client, deployment.id)):
            assert time.monotonic() < deadline, "the trigger did not fire"
            threading.Event().wait(0.3)
        (run,) = runs
        assert run.parameters["request"]["revision"] == announcement.commit_sha
        assert run.parameters["request"]["policy"] == {"approval": "always", "delivery": {"kind": "blue_green"}}
        others = client.read_deployment_by_name("rollout-model/gemma-4-26b-a4b-it-s3ns-france")
        assert started(client, others.id) == []
        client.delete_flow_run(run.id)  # no worker of another test shall start it


def started(client: SyncPrefectClient, deployment_id: UUID) -> list[FlowRun]:
    response = client.request("POST", "/flow_runs/filter", json={"deployments": {"id": {"any_": [str(deployment_id)]}}})
    response.raise_for_status()
    return [FlowRun.model_validate(run) for run in response.json() if not run["auto_scheduled"]]
