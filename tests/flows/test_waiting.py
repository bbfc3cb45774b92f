"""A rollout that waits for its target plans again when its turn comes: others have changed it meanwhile."""

from __future__ import annotations

import threading

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency

from flows.plan_model import PLAN_FRESH_S
from flows.rollout_model import rollout_model
from rollout.record import RolloutReport
from tasks.limits import LEASE_S, target_limit
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def test_a_rollout_that_waited_sees_what_the_one_before_it_made(stage: Stage) -> None:
    limit = target_limit(stage.target.name)
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit, limit=1))
    waiting: list[RolloutReport] = []
    run = threading.Thread(target=lambda: waiting.append(rollout_model(stage.request())))
    with concurrency(limit, occupy=1, lease_duration=LEASE_S, strict=True):
        run.start()
        run.join(timeout=PLAN_FRESH_S * 2)
        assert run.is_alive(), "it waits for the target"
        assert stage.live("Deployment") == []
    run.join()
    (report,) = waiting
    assert [step.name for step in report.steps].count("plan") == 2
