"""What serves before a rollout comes back when the rollout fails, and is never torn down with it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Crashed, Scheduled

from flows.hooks import clean_up_killed
from flows.janitor import janitor
from flows.rollout_model import rollout_model
from rollout.benchmark import BenchmarkSpec
from rollout.clients.cluster import ClusterClient
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.errors import PreflightFailed, RolledBack
from rollout.ledger import drift, serving_now
from rollout.objects import ROLLOUT_LABEL
from rollout.policy import Teardown
from rollout.record import RECORDS_PREFIX, RolloutReport, Verdict
from rollout.report import StepStatus
from rollout.workload import fixed_workload
from tests.flows.conftest import Stage
from tests.flows.versions import FAST, GOOD, write_version

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]

ONE_STAGE = BenchmarkSpec(workload=fixed_workload(16, 4), rates_per_s=(4.0,), max_stages=1, stage_duration_s=2)


def live_rollout(stage: Stage) -> str:
    """The rollout that the one live Deployment says it belongs to."""
    (deployment,) = stage.live("Deployment")
    return str(deployment["metadata"]["labels"][ROLLOUT_LABEL])


def rollout_of(report: RolloutReport) -> str:
    assert report.plan is not None
    return report.plan.rollout_id


def records(stage: Stage) -> list[RolloutReport]:
    return list(RecordStore(stage.target).read_all())


def steps(stage: Stage) -> dict[str, StepStatus]:
    report = RolloutReport.model_validate_json(stage.report_file.read_text())
    return {step.name: step.status for step in report.steps}


def test_an_update_that_misses_its_objectives_goes_back_to_what_served(stage: Stage) -> None:
    write_version(stage, FAST)
    first = rollout_model(stage.request())
    write_version(stage, GOOD)
    impossible = {"latencies": [{"metric": "ttft", "percentile": "p50", "limit_s": 1e-6}], "max_failed_share": None}
    policy: dict[str, Any] = {
        "benchmark": ONE_STAGE.model_dump(mode="json"),
        "objectives": impossible,
        "teardown": Teardown.ON_FAILURE,
    }
    with pytest.raises(RolledBack, match=r"TTFT.*The previous revision serves"):
        rollout_model(stage.request(**policy), report_file=str(stage.report_file))
    assert steps(stage)["undo update"] is StepStatus.DONE
    assert "teardown" not in steps(stage) or steps(stage)["teardown"] is StepStatus.SKIPPED
    assert live_rollout(stage) == rollout_of(first)
    serving = serving_now(records(stage))
    assert [each.rollout_id for each in serving.values()] == [rollout_of(first)]
    assert drift(serving, ClusterClient.connect(stage.target).inventory()) == ()
    assert rollout_model(stage.request().model_copy(update={"model": write_back(stage)})).changed_nothing


def write_back(stage: Stage) -> str:
    write_version(stage, FAST)
    return str(stage.model_file)


def test_a_trial_in_the_place_of_what_serves_is_refused_before_anything_changes(stage: Stage) -> None:
    write_version(stage, FAST)
    first = rollout_model(stage.request())
    write_version(stage, GOOD)
    with pytest.raises(PreflightFailed, match=r"serves, and a trial .* a name or a namespace of its own"):
        rollout_model(stage.request(teardown=Teardown.ALWAYS))
    assert live_rollout(stage) == rollout_of(first)


def test_the_janitor_takes_back_what_a_dead_run_left_over_a_live_version(stage: Stage) -> None:
    write_version(stage, FAST)
    first = rollout_model(stage.request())
    write_version(stage, GOOD)
    second = rollout_model(stage.request(teardown=Teardown.ON_FAILURE))
    assert second.plan is not None
    assert second.plan.live_before is not None
    assert second.plan.live_before.run_id == first.run_id
    made_older(stage, first, hours=2)
    killed = made_older(stage, second, hours=1, verdict=Verdict.RUNNING)
    assert live_rollout(stage) == rollout_of(second)

    assert janitor(str(stage.target_file), remove=False) == ()
    assert live_rollout(stage) == rollout_of(second), "looking changes nothing"
    assert janitor(str(stage.target_file)) == (), "nothing is torn down"
    assert live_rollout(stage) == rollout_of(first)
    (noted,) = [each for each in records(stage) if each.run_id == killed.run_id]
    assert noted.verdict is Verdict.ROLLED_BACK
    assert [each.run_id for each in serving_now(records(stage)).values()] == [first.run_id]


def test_a_run_that_died_after_its_verdict_is_not_undone_and_one_before_it_is(stage: Stage) -> None:
    write_version(stage, FAST)
    first = rollout_model(stage.request())
    write_version(stage, GOOD)
    second = rollout_model(stage.request())
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(second.run_id))
    run = run.model_copy(update={"parameters": {"request": stage.request().model_dump(mode="json")}})

    clean_up_killed(rollout_model, run, Crashed())
    assert live_rollout(stage) == rollout_of(second), "the record says that it is done"

    RecordStore(stage.target).write(second.model_copy(update={"verdict": Verdict.RUNNING}))
    clean_up_killed(rollout_model, run, Crashed())
    assert live_rollout(stage) == rollout_of(first)
    (noted,) = [each for each in records(stage) if each.run_id == second.run_id]
    assert noted.verdict is Verdict.ROLLED_BACK


def test_a_run_that_is_started_again_continues_its_own_record(stage: Stage) -> None:
    """As *Retry* in the UI does: the record says what the first attempt has made, and so may be removed."""
    write_version(stage, FAST)
    first = rollout_model(stage.request())
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(UUID(first.run_id), Scheduled(), force=True)
        run = client.read_flow_run(UUID(first.run_id))
    again = run_flow(rollout_model, flow_run=run, parameters={"request": stage.request()})
    assert again.run_id == first.run_id
    (kept,) = [each for each in records(stage) if each.run_id == first.run_id]
    assert kept.verdict is Verdict.DONE
    assert set(first.created) <= set(kept.created)
    assert len(kept.steps) > len(first.steps)


def made_older(stage: Stage, report: RolloutReport, *, hours: int, **changes: Any) -> RolloutReport:
    """The record as if it were from an earlier time, and what else a kill would have left of it."""
    storage = StorageClient(stage.target)
    for stored in storage.list_objects(RECORDS_PREFIX):
        if report.run_id in stored.name:
            storage.delete(stored)
    older = report.model_copy(update={"started_at": report.started_at - timedelta(hours=hours), **changes})
    RecordStore(stage.target).write(older)
    return older
