"""The loop: measure one replica, derive its autoscaler, see it hold under load, and roll out with it."""

from __future__ import annotations

from typing import Any

import pytest

from flows.profile_model import profile_model
from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from flows.verify_model import verify_model
from rollout.autoscaling import AutoscalingSpec
from rollout.benchmark import BenchmarkSpec
from rollout.errors import BadInput
from rollout.profiles import Targets
from rollout.profiling import ProfilingSpec
from rollout.record import RolloutReport, Verdict
from rollout.report import Action, StepReport, StepStatus
from rollout.request import RolloutRequest
from rollout.workload import fixed_workload
from tests.flows.conftest import Stage
from tests.flows.versions import write_version

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]

SMALL = {"base_s": 0.02, "per_sequence_s": 0.005}
"""Saturates at about 8 requests/s of 16 tokens with 8 running: two cores can load two of them."""

SWEEP = BenchmarkSpec(
    workload=fixed_workload(32, 16),
    start_rate_per_s=2,
    stage_duration_s=3,
    max_stages=4,
    resolution=0.3,
    stages_per_side=1,
    drain_timeout_s=10,
)


def steps(report: RolloutReport) -> dict[str, StepReport]:
    return {step.name: step for step in report.steps}


def request(stage: Stage, replicas: int, **policy: Any) -> RolloutRequest:
    settings = {"benchmark": SWEEP.model_dump(mode="json"), "objectives": {"max_failed_share": 0.5}, **policy}
    return stage.request(**settings).model_copy(update={"replicas": replicas})


def test_a_profile_becomes_an_autoscaler_that_brings_the_replicas_and_a_later_rollout_uses(stage: Stage) -> None:
    write_version(stage, SMALL, max_num_seqs=8)
    wanted = ProfilingSpec(autoscaling=AutoscalingSpec(targets=Targets(ttft_ms=5000), max_replicas=6))
    report = profile_model(request(stage, 2, teardown="always"), profiling=wanted, report_file=str(stage.report_file))
    assert report.verdict is Verdict.DONE
    done = steps(report)
    assert done["forecast"].status is StepStatus.SKIPPED  # nobody forecasts a model that only this test knows
    autoscaler = done["autoscaler"].data["manifest"]["spec"]
    assert autoscaler["maxReplicas"] == 6
    assert 1 <= done["autoscaler"].data["threshold"] <= 8
    replicas = [count for _, count in done["scale out"].data["ready_replicas"]]
    assert replicas[0] == 1
    assert replicas[-1] == 2
    assert done["scaling"].status is StepStatus.DONE
    assert report.teardown is not None
    assert report.teardown.left == ()
    assert stage.live("HorizontalPodAutoscaler") == []

    # The bucket keeps the profile, so a rollout can have the autoscaler; it is part of the plan, and of the rerun.
    autoscaling = wanted.autoscaling.model_dump(mode="json")
    first = rollout_model(request(stage, 1, autoscaling=autoscaling))
    assert steps(first)["benchmark"].status is StepStatus.SKIPPED
    (live,) = stage.live("HorizontalPodAutoscaler")
    assert live["spec"]["metrics"] == autoscaler["metrics"]
    assert first.plan is not None
    assert any(check.name == "metrics adapter" for check in first.plan.checks)
    assert rollout_model(request(stage, 1, autoscaling=autoscaling)).changed_nothing

    verified = verify_model(request(stage, 1))
    assert steps(verified)["benchmark"].status is StepStatus.SKIPPED, "its replicas come and go, whatever is asked now"

    fixed = rollout_model(request(stage, 1, benchmark=None))
    assert stage.live("HorizontalPodAutoscaler") == []
    assert any(
        (c.kind, c.action) == ("HorizontalPodAutoscaler", Action.DELETED)
        for c in steps(fixed)["apply manifests"].changes
    )
    teardown_model(target=str(stage.target_file), model=str(stage.model_file))


@pytest.mark.parametrize("kind", ["rolling", "blue_green"])
def test_what_serves_is_not_taken_down_for_a_profile(kind: str, stage: Stage) -> None:
    rollout_model(request(stage, 1, benchmark=None, delivery={"kind": kind}))
    before = stage.live("Deployment")
    with pytest.raises(BadInput, match="would put itself in its place"):
        profile_model(request(stage, 1, teardown="always"))
    assert stage.live("Deployment") == before


def test_without_a_profile_an_autoscaled_rollout_ends_before_it_changes_anything(stage: Stage) -> None:
    with pytest.raises(BadInput, match="no measured profile") as refused:
        rollout_model(request(stage, 1, autoscaling={}))
    assert "llm-rollout profile" in refused.value.resolution
    assert stage.live("Deployment") == []


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        ({"benchmark": None}, "policy.benchmark"),
        ({"delivery": {"kind": "blue_green"}}, "policy.delivery.kind"),
        ({"autoscaling": {}}, "policy.autoscaling"),
    ],
)
def test_a_policy_that_cannot_lead_to_a_profile_is_refused_first(
    stage: Stage, policy: dict[str, Any], where: str
) -> None:
    with pytest.raises(BadInput) as refused:
        profile_model(request(stage, 1, **policy))
    assert refused.value.where == where
