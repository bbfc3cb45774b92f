"""The bootstrap makes what is missing, keeps what an operator changed, and its notifications arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate, WorkPoolUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import EntrypointType
from prefect.flows import load_flow_from_entrypoint
from prefect.states import Cancelled, Crashed, Failed, State
from pydantic import SecretStr

from flows.bootstrap import CLUSTER_POOL, PLACEHOLDER_TOKEN, bootstrap, cluster_pool_template
from flows.hooks import announce_outcome
from flows.rollout_model import rollout_model
from flows.verify_model import verify_model
from rollout import catalog
from rollout.errors import BadInput, RolledBack
from rollout.report import Action
from rollout.target import Target
from tasks.janitor import FLOWS
from tasks.outcomes import ANNOUNCED_FLOWS
from tests.flows.command_line import DEADLINE_S

EMIT_AGAIN_S = 5.0

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def target() -> Target:
    """A target that no other test has."""
    suffix = uuid4().hex[:8]
    base = catalog.load_target("s3ns-france")
    return base.model_copy(update={"name": f"target-{suffix}", "hub_token_secret": f"token-{suffix}"})


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


class Inbox:
    """A chat tool's webhook on loopback."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._arrived = threading.Condition()
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                with inbox._arrived:
                    inbox.messages.append(body)
                    inbox._arrived.notify_all()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook"

    def wait_for(self, part: str, emit: Callable[[], object]) -> str:
        """The first message with `part`. `emit` is repeated: a new automation may miss the first event."""
        deadline = time.monotonic() + DEADLINE_S
        with self._arrived:
            while time.monotonic() < deadline:
                emit()
                if self._arrived.wait_for(lambda: any(part in m for m in self.messages), EMIT_AGAIN_S):
                    return next(message for message in self.messages if part in message)
        raise AssertionError(self.messages)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    opened = Inbox()
    yield opened
    opened.close()


def notification_block(inbox: Inbox) -> str:
    name = f"inbox-{uuid4().hex[:8]}"
    CustomWebhookNotificationBlock(
        name=name, url=inbox.url, json_data={"subject": "{{subject}}", "body": "{{body}}"}
    ).save(name)
    return f"custom-webhook/{name}"


def test_a_second_run_changes_nothing(target: Target, inbox: Inbox) -> None:
    block = notification_block(inbox)
    first = bootstrap([target], notify=block)
    assert {"WorkPool", "Variable", "ConcurrencyLimit", "Secret", "Automation"} == {change.kind for change in first}
    again = bootstrap([target], notify=block)
    assert {change.action for change in again} == {Action.UNCHANGED}
    assert [change.name for change in again] == [change.name for change in first]


def test_what_an_operator_changed_stays(target: Target, client: SyncPrefectClient) -> None:
    bootstrap([target])
    client.update_global_concurrency_limit(f"gpus-{target.name}", GlobalConcurrencyLimitUpdate(limit=32))
    assert target.hub_token_secret is not None
    Secret(value=SecretStr("hf_real")).save(target.hub_token_secret, overwrite=True)
    bootstrap([target], gpus=4)
    assert client.read_global_concurrency_limit_by_name(f"gpus-{target.name}").limit == 32
    assert Secret.load(target.hub_token_secret).get() == "hf_real"  # type: ignore[union-attr]


def test_the_secret_starts_as_a_placeholder_that_is_no_token(target: Target) -> None:
    bootstrap([target])
    assert target.hub_token_secret is not None
    assert Secret.load(target.hub_token_secret).get() == PLACEHOLDER_TOKEN  # type: ignore[union-attr]


def test_an_unknown_notification_block_is_bad_input(target: Target) -> None:
    with pytest.raises(BadInput, match="there is no notification block 'slack-webhook/nobody'"):
        bootstrap([target], notify="slack-webhook/nobody")


def test_the_cluster_pool_has_our_template(target: Target, client: SyncPrefectClient) -> None:
    bootstrap([target])
    variables = client.read_work_pool(CLUSTER_POOL).base_job_template["variables"]["properties"]
    assert variables["service_account_name"]["default"] == "llm-rollout-job"
    assert variables["pod_watch_timeout_seconds"]["default"] >= 600
    assert variables["env"]["default"]["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "crash"


@pytest.fixture
def pool_template(target: Target, client: SyncPrefectClient) -> Iterator[Callable[[], dict[str, Any]]]:
    """The cluster pool's base job template as it is; afterwards it is again what other tests of the server expect."""

    def read() -> dict[str, Any]:
        return client.read_work_pool(CLUSTER_POOL).base_job_template

    bootstrap([target])
    before = read()
    yield read
    client.update_work_pool(CLUSTER_POOL, WorkPoolUpdate(base_job_template=before))


def test_the_pools_image_is_set_whenever_it_is_given_and_nothing_else_of_the_pool(
    target: Target, client: SyncPrefectClient, pool_template: Callable[[], dict[str, Any]]
) -> None:
    changed = pool_template()
    changed["variables"]["properties"]["image"]["default"] = "registry/worker:1"
    changed["variables"]["properties"]["namespace"]["default"] = "somewhere-else"
    client.update_work_pool(CLUSTER_POOL, WorkPoolUpdate(base_job_template=changed))

    bootstrap([target])
    assert pool_template() == changed
    (updated,) = [change for change in bootstrap([target], image="registry/worker:2") if change.name == CLUSTER_POOL]
    assert (updated.action, updated.detail) == (Action.UPDATED, "image registry/worker:2")
    changed["variables"]["properties"]["image"]["default"] = "registry/worker:2"
    assert pool_template() == changed
    (same,) = [change for change in bootstrap([target], image="registry/worker:2") if change.name == CLUSTER_POOL]
    assert same.action is Action.UNCHANGED


def test_every_placeholder_of_the_template_is_a_variable_and_the_other_way_round() -> None:
    template = cluster_pool_template()
    text = yaml.safe_dump(template["job_configuration"])
    used = {part.split("}}")[0].strip() for part in text.split("{{")[1:]}
    assert used == set(template["variables"]["properties"])
    spec = template["job_configuration"]["job_manifest"]["spec"]
    assert spec["backoffLimit"] == 0, "a Job that Kubernetes repeats would repeat a teardown"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_people_are_told_when_a_rollout_was_rolled_back(target: Target, inbox: Inbox) -> None:
    bootstrap([target], notify=notification_block(inbox))
    request = {"model": "gemma-4-31b-it", "target": target.name}
    run = FlowRun(id=UUID(int=uuid4().int), flow_id=uuid4(), name="gemma → s3ns", parameters={"request": request})
    error = RolledBack("the canary missed its objective.")
    message = inbox.wait_for(
        "rolled back", lambda: announce_outcome(rollout_model, run, Failed(message="failed", data=error))
    )
    assert f"gemma-4-31b-it on {target.name}: the canary missed its objective." in message


def ended(client: SyncPrefectClient, state: State[Any]) -> str:
    """The name of a run of the rollout that somebody outside of it has ended, and whose hook told of it as well."""
    name = f"run-{uuid4().hex[:8]}"
    run = client.create_flow_run(rollout_model, name=name, parameters={"request": {"target": "t"}})
    client.set_flow_run_state(run.id, state, force=True)
    announce_outcome(rollout_model, run, state)
    return name


@pytest.mark.parametrize(
    ("make_state", "subject"),
    [(Crashed, "A run's worker died"), (Cancelled, "A run was cancelled")],
    ids=["crashed", "cancelled"],
)
def test_an_end_from_outside_is_told_once_whether_or_not_a_hook_tells_of_it_too(
    make_state: Callable[..., State[Any]],
    subject: str,
    target: Target,
    inbox: Inbox,
    client: SyncPrefectClient,
) -> None:
    bootstrap([target], notify=notification_block(inbox))
    inbox.wait_for(subject, lambda: ended(client, make_state(message="by somebody")))
    once = ended(client, make_state(message="by the janitor"))
    last = ended(client, make_state(message="the last"))
    inbox.wait_for(last, lambda: None)
    assert sum(once in message for message in inbox.messages) == 1
    assert "by the janitor" in next(message for message in inbox.messages if once in message)


def test_people_are_told_that_nobody_answered(target: Target, inbox: Inbox, client: SyncPrefectClient) -> None:
    bootstrap([target], notify=notification_block(inbox))
    deployment_id = rollout_model.to_deployment(target.name, entrypoint_type=EntrypointType.MODULE_PATH).apply()
    assert isinstance(deployment_id, UUID)

    def expire() -> None:
        run = client.create_flow_run_from_deployment(
            deployment_id, name=f"gemma → {target.name}", parameters={"request": {"target": target.name}}
        )
        never = Failed(message="The flow was paused and never resumed.")
        client.set_flow_run_state(run.id, never, force=True)

    message = inbox.wait_for("Nobody approved", expire)
    assert target.name in message
    assert "A rollout failed" not in "".join(inbox.messages)


def test_people_are_told_that_a_verification_failed(target: Target, inbox: Inbox, client: SyncPrefectClient) -> None:
    bootstrap([target], notify=notification_block(inbox))

    def fail() -> None:
        run = client.create_flow_run(verify_model, parameters={"request": {"target": target.name}})
        client.set_flow_run_state(run.id, Failed(message="it answers no more"), force=True)

    assert "it answers no more" in inbox.wait_for("A run failed", fail)


def test_the_janitor_and_the_notifications_know_every_flow_that_is_deployed() -> None:
    deployed = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    flows = [load_flow_from_entrypoint(each["entrypoint"], use_placeholder_flow=False) for each in deployed]
    assert {flow.name for flow in flows} == set(FLOWS)
    hooked = {flow.name for flow in flows if announce_outcome in (flow.on_failure_hooks or [])}
    assert hooked == set(ANNOUNCED_FLOWS)


def test_people_are_told_that_a_run_waits_for_approval(target: Target, inbox: Inbox, client: SyncPrefectClient) -> None:
    bootstrap([target], notify=notification_block(inbox))

    def emit() -> None:
        flow = {"prefect.resource.id": f"prefect.flow.{uuid4()}", "prefect.resource.role": "flow"}
        event: dict[str, Any] = {
            "id": str(uuid4()),
            "event": "prefect.flow-run.Suspended",
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.resource.name": "gemma → s3ns"},
            "related": [flow | {"prefect.resource.name": "rollout-model"}],
        }
        client.request("POST", "/events", json=[event]).raise_for_status()

    assert "waits for your approval" in inbox.wait_for("approval", emit)
