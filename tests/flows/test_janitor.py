"""What died is found and finished; what lives, or only looks unused, is left alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

import google_crc32c
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Pending, Running

from flows.bootstrap import bootstrap
from flows.ci import wait
from flows.hooks import clean_up_killed
from flows.janitor import janitor
from flows.rollout_model import rollout_model
from flows.watch_releases import watch_releases
from rollout.clients.cluster import APPLY_PATCH, ClusterClient
from rollout.clients.raw_http import HttpPool
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import find_leftovers
from rollout.clients.uploads import Uploader
from rollout.errors import BadInput, DeadlineExceeded, ExitCode
from rollout.ledger import EXPIRY_ANNOTATION, serving_now
from rollout.policy import Teardown
from rollout.record import RECORDS_PREFIX, RolloutReport, Verdict
from rollout.report import utc_now
from rollout.transfer import MIN_PART_BYTES, WORK_FOLDER
from tasks import limits
from tasks.janitor import PAGE, SILENCE, START_PATIENCE
from tasks.limits import target_alone_after
from tasks.outcomes import OUTCOME_EVENT_PREFIX
from tests.clients.weights_place import renewed_elsewhere
from tests.flows.command_line import DEADLINE_S, wait_for
from tests.flows.conftest import Stage
from tests.flows.zombies import zombies

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


def rolled_out(stage: Stage) -> RolloutReport:
    return rollout_model(stage.request())


def forget_the_end(stage: Stage, report: RolloutReport, client: SyncPrefectClient, **changes: Any) -> RolloutReport:
    """Turn a finished rollout's record into what a killed trial, a day ago, leaves behind."""
    assert report.plan is not None
    policy = report.plan.policy.model_copy(update={"teardown": Teardown.ALWAYS})
    plan = report.plan.model_copy(update={"policy": policy})
    store = RecordStore(stage.target)
    old = {"plan": plan, "verdict": Verdict.RUNNING, "started_at": report.started_at - timedelta(hours=1), **changes}
    killed = report.model_copy(update=old)
    store.write(killed)
    remove_record(stage, report)
    return killed


def remove_record(stage: Stage, report: RolloutReport) -> None:
    stamp = f"{report.started_at:%Y%m%dT%H%M%S}"
    storage = StorageClient(stage.target)
    for stored in storage.list_objects(f"{RECORDS_PREFIX}{stage.target.name}/{stamp}"):
        storage.delete(stored)


def test_a_live_version_is_left_alone_and_a_dead_trial_is_torn_down(stage: Stage, client: SyncPrefectClient) -> None:
    report = rolled_out(stage)
    assert janitor(str(stage.target_file)) == ()
    assert stage.live("Deployment")

    killed = forget_the_end(stage, report, client)
    assert janitor(str(stage.target_file), remove=False) == ()
    assert stage.live("Deployment"), "looking removes nothing"
    (swept,) = janitor(str(stage.target_file))
    assert swept.left == ()
    assert stage.live("Deployment") == []
    records = list(RecordStore(stage.target).read_all())
    (noted,) = [record for record in records if record.run_id == killed.run_id]
    assert noted.verdict is Verdict.FAILED
    assert noted.teardown is not None
    assert serving_now(records) == {}
    assert janitor(str(stage.target_file)) == ()


def test_a_server_past_its_expiry_goes(stage: Stage) -> None:
    report = rolled_out(stage)
    assert report.plan is not None
    cluster = ClusterClient.connect(stage.target)
    (live,) = stage.live("Deployment")
    patch = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": live["metadata"]["name"],
            "namespace": live["metadata"]["namespace"],
            "annotations": {EXPIRY_ANNOTATION: "2020-01-01T00:00:00+00:00"},
        },
    }
    cluster.api.request("PATCH", cluster.api.path_of(live), {"fieldManager": "somebody"}, patch, APPLY_PATCH)
    (swept,) = janitor(str(stage.target_file))
    assert swept.left == ()
    assert stage.live("Deployment") == []


def test_what_a_dead_transfer_left_goes_once_nobody_will_continue_it(stage: Stage) -> None:
    storage = StorageClient(stage.target)
    storage.ensure_bucket()
    pool = HttpPool(stall_timeout_s=60)
    uploader = Uploader(storage, pool)
    work = f"org/model/0123/{WORK_FOLDER}"
    upload = uploader.begin(f"{work}incoming/{'0' * 32}.{MIN_PART_BYTES}", {})
    uploader.send(upload, 1, b"bytes", google_crc32c.value(b"bytes"))
    uploader.put(f"{work}incoming/{'1' * 32}.{MIN_PART_BYTES}", b"more", google_crc32c.value(b"more"), {})
    pool.close()
    storage.write_json("org/model/0123/config.json", {"somebody": "put it there"})
    target = str(stage.target_file)

    janitor(target)
    assert len(find_leftovers(stage.target)) == 2, "a rerun would continue it"
    janitor(target, remove=False, transfers_after_days=0)
    assert len(find_leftovers(stage.target)) == 2, "looking removes nothing"
    janitor(target, transfers_after_days=0)
    assert find_leftovers(stage.target) == ()
    assert [stored.name for stored in storage.list_objects("org/")] == ["org/model/0123/config.json"]
    storage.delete_prefix("org/")


def test_a_transfer_that_is_going_on_is_left_alone(stage: Stage) -> None:
    storage = StorageClient(stage.target)
    storage.ensure_bucket()
    claim = f"org/model/0123/{WORK_FOLDER}writer.json"
    with renewed_elsewhere(storage, claim):
        janitor(str(stage.target_file), transfers_after_days=0)
    assert [change.name for change in find_leftovers(stage.target)] == [f"gs://{stage.target.bucket}/{claim}"]
    storage.delete_prefix("org/")


def test_a_cancelled_trial_is_torn_down_by_its_hook_in_another_process(stage: Stage, client: SyncPrefectClient) -> None:
    report = rolled_out(stage)
    forget_the_end(stage, report, client)
    request = stage.request(teardown="always").model_dump(mode="json")
    run = client.read_flow_run(UUID(report.run_id)).model_copy(update={"parameters": {"request": request}})
    clean_up_killed(flow=rollout_model, flow_run=run, state=Cancelled())
    assert stage.live("Deployment") == []


def test_the_hook_waits_for_whoever_has_the_target(stage: Stage, client: SyncPrefectClient) -> None:
    report = rolled_out(stage)
    forget_the_end(stage, report, client)
    bootstrap([stage.target])
    request = stage.request(teardown="always").model_dump(mode="json")
    run = client.read_flow_run(UUID(report.run_id)).model_copy(update={"parameters": {"request": request}})
    hook = threading.Thread(
        target=clean_up_killed, kwargs={"flow": rollout_model, "flow_run": run, "state": Cancelled()}
    )
    waiting = Heard("waiting for 1 of the limit")
    with target_alone_after(stage.target.name, from_deployment=True, patience_s=1), waiting:
        hook.start()
        waiting.wait()
        assert stage.live("Deployment"), "a queued run may be delivering it"
    hook.join(DEADLINE_S)
    assert stage.live("Deployment") == []


def test_a_target_that_stays_taken_is_left_to_the_janitor(stage: Stage) -> None:
    bootstrap([stage.target])
    name = stage.target.name
    with (
        target_alone_after(name, from_deployment=True, patience_s=1),
        pytest.raises(DeadlineExceeded, match="others hold it for longer than 1 s"),
        target_alone_after(name, from_deployment=True, patience_s=1),
    ):
        pass


def test_a_missing_limit_is_an_error_for_a_deployment_and_nothing_for_a_laptop() -> None:
    with target_alone_after("nobodys-target", from_deployment=False, patience_s=1):
        pass
    with (
        pytest.raises(BadInput, match="llm-rollout bootstrap"),
        target_alone_after("nobodys-target", from_deployment=True, patience_s=1),
    ):
        pass


def test_a_run_that_died_before_it_changed_anything_needs_no_clean_up(stage: Stage, client: SyncPrefectClient) -> None:
    request = stage.request(teardown="always").model_dump(mode="json")
    run = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), parameters={"request": request})
    clean_up_killed(flow=rollout_model, flow_run=run, state=Cancelled())


def test_a_run_without_sign_of_life_is_marked_as_crashed(stage: Stage, client: SyncPrefectClient) -> None:
    request = stage.request().model_dump(mode="json")
    elsewhere = {**request, "target": "another"}
    silent, foreign = (
        client.create_flow_run(rollout_model, parameters={"request": parameters}, state=Running())
        for parameters in (request, elsewhere)
    )
    now = utc_now()
    assert zombies(stage, now) == ()
    assert zombies(stage, now + SILENCE * 2) == (str(silent.id),)
    outcome = wait(client, silent.id, DEADLINE_S)
    assert (outcome.outcome, outcome.exit_code) == ("crashed", ExitCode.FAILED)
    assert "no sign of life" in outcome.detail
    wait_for(lambda: announced(client, silent.id) == ["crashed"])
    left = client.read_flow_run(foreign.id).state
    assert left is not None
    assert left.is_running()


def test_runs_that_never_began_are_found_on_every_page(stage: Stage, client: SyncPrefectClient) -> None:
    request = {"target": str(stage.target_file), "follow": [{"model": str(stage.model_file)}]}
    pending = {
        str(client.create_flow_run(watch_releases, parameters={"request": request}, state=Pending()).id)
        for _ in range(PAGE + 1)
    }
    now = utc_now()
    assert zombies(stage, now + SILENCE) == (), "a pod may take that long to start"
    assert set(zombies(stage, now + START_PATIENCE)) == pending
    assert announced(client, UUID(min(pending))) == [], "only rollouts have outcomes"


def announced(client: SyncPrefectClient, run_id: UUID) -> list[str]:
    """The outcomes of a run that everybody could hear of."""
    wanted = {"event": {"prefix": [OUTCOME_EVENT_PREFIX]}, "resource": {"id": [f"llm-rollout.run.{run_id}"]}}
    response = client.request("POST", "/events/filter", json={"filter": wanted})
    response.raise_for_status()
    return [event["event"].removeprefix(OUTCOME_EVENT_PREFIX) for event in response.json()["events"]]


class Heard(logging.Handler):
    """Waits for a line of the limits' log."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part
        self._heard = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._part in record.getMessage():
            self._heard.set()

    def wait(self) -> None:
        assert self._heard.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        limits.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        limits.logger.removeHandler(self)
