"""Verification of what serves, as it serves: the live revision, under load from inside its own cluster."""

from __future__ import annotations

import pytest

from flows.rollout_model import rollout_model
from flows.verify_model import verify_model
from rollout.benchmark import BenchmarkSpec, Engine
from rollout.clients.cluster import ClusterClient
from rollout.record import Verdict
from rollout.workload import fixed_workload
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def test_the_live_revision_is_asked_and_measured_from_inside_the_cluster(stage: Stage) -> None:
    delivery = {"kind": "blue_green", "rollback_window_s": 0}
    delivered = rollout_model(stage.request(delivery=delivery))
    assert delivered.delivery is not None
    assert delivered.plan is not None

    sweep = BenchmarkSpec(
        workload=fixed_workload(16, 4), engine=Engine.INFERENCE_PERF, rates_per_s=(4.0,), stage_duration_s=2.0
    )
    request = stage.request(benchmark=sweep.model_dump(mode="json"), objectives={"max_failed_share": 0.0})
    verified = verify_model(request, report_file=str(stage.report_file))
    assert verified.verdict is Verdict.DONE, verified.error
    assert verified.plan is not None
    assert verified.plan.serving.name == f"{delivered.plan.serving.name}-{delivered.delivery.revision}"
    assert verified.benchmark is not None
    assert [(each.rate_per_s, each.completed) for each in verified.benchmark.stages] == [(4.0, 8)]
    kinds = {each["kind"] for each in ClusterClient.connect(stage.target).inventory()}
    assert not kinds & {"Job", "ConfigMap"}
