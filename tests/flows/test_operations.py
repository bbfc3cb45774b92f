"""Daily questions: what serves, since when, does it still work, how do we go back."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.requests import rollback_request
from flows.rollout_model import rollout_model
from flows.verify_model import verify_model
from rollout.benchmark import BenchmarkSpec, Engine
from rollout.clients.cluster import ClusterClient
from rollout.errors import BadInput
from rollout.record import RolloutReport, Verdict
from rollout.workload import fixed_workload
from tests.flows.conftest import TINY_REPO, Stage
from tests.flows.versions import strategy

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_status_history_verify_and_rollback_follow_the_records(stage: Stage) -> None:
    target = ("--target", str(stage.target_file))
    assert "nothing serves" in shown("status", *target)
    with pytest.raises(BadInput, match="no record says"):
        verify_model(stage.request())

    first = rollout_model(stage.request())
    assert first.plan is not None
    commit = first.plan.model.commit_sha
    status = shown("status", *target)
    assert f"{TINY_REPO}@{commit}" in status
    assert "drift" not in status
    assert first.run_id in shown("history", *target)

    (deployment,) = stage.live("Deployment")
    cluster = ClusterClient.connect(stage.target)
    by_hand = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 77}}}}
    path, kind = cluster.api.path_of(deployment), "application/merge-patch+json"
    cluster.api.request("PATCH", path, {"fieldManager": "kubectl-edit"}, by_hand, kind)
    changed = shown("status", *target)
    assert "drift" in changed
    assert "terminationGracePeriodSeconds" in changed
    back = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 5}}}}
    cluster.api.request("PATCH", path, {"fieldManager": "kubectl-edit"}, back, kind)
    assert "drift" not in shown("status", *target)

    verified = verify_model(stage.request())
    assert verified.verdict is Verdict.DONE
    assert verified.run_id not in shown("history", *target), "a verification rolls nothing out"

    stage.write_model(max_model_len=512, extra_args=["--enforce-eager"])
    rollout_model(stage.request())
    rollback = ("rollback", str(stage.model_file), *target, "--report", str(stage.report_file))
    shown(*rollback, "--to", first.run_id[:13])
    assert live_args(stage) == first.plan.serving.vllm_args(first.plan.weights_uri)
    preset = stage.folder / "preset.yaml"
    assert rollback_request(stage.request(), commit[:8], preset).model == str(preset)
    with pytest.raises(BadInput, match="begins with 'ffff'"):
        rollback_request(stage.request(), "ffff", preset)
    with pytest.raises(BadInput):
        rollback_request(stage.request(), "", preset)


def live_args(stage: Stage) -> list[str]:
    (deployment,) = stage.live("Deployment")
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


def test_a_rollback_after_a_delivery_by_revisions_moves_the_traffic_the_same_way(stage: Stage) -> None:
    # Quick to decide: how a version is proven is not this test's.
    delivery = strategy(kind="blue_green", gateway=None).model_dump(mode="json")
    policy = {"delivery": delivery, "objectives": {"max_failed_share": None}}
    first = rollout_model(stage.request(**policy))
    assert first.delivery is not None
    stage.write_model(max_model_len=512)
    second = rollout_model(stage.request(**policy))
    assert second.delivery is not None
    assert second.delivery.revision != first.delivery.revision

    arguments = ("--target", str(stage.target_file), "--to", first.run_id, "--report", str(stage.report_file))
    shown("rollback", str(stage.model_file), *arguments)
    again = RolloutReport.model_validate_json(stage.report_file.read_text())
    assert again.delivery is not None
    assert (again.delivery.revision, again.delivery.live_before) == (first.delivery.revision, second.delivery.revision)


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


def test_what_serves_is_measured_anew_and_its_curve_is_kept(stage: Stage) -> None:
    """A nightly check of pods that have served for weeks is a measurement, not yesterday's figures."""
    load = BenchmarkSpec(workload=fixed_workload(16, 4), rates_per_s=(4.0, 8.0), stage_duration_s=1.0)
    policy = {"benchmark": load.model_dump(mode="json"), "objectives": {"max_failed_share": 0.0}}
    first = rollout_model(stage.request(**policy))
    assert first.benchmark is not None

    settings = stage.folder / "policy.yaml"
    settings.write_text(yaml.safe_dump(policy | {"objectives": {"max_failed_share": 0.0, "demand_rate_per_s": 40.0}}))
    place = ("--target", str(stage.target_file))
    arguments = (*place, "--policy", str(settings), "--report", str(stage.report_file))
    text = shown("benchmark-model", str(stage.model_file), *arguments)
    assert "replicas for 40 requests/s" in text
    measured = RolloutReport.model_validate_json(stage.report_file.read_text())
    assert measured.verdict is Verdict.DONE
    assert {step.name for step in measured.steps} == {"wait until available", "benchmark", "objectives"}
    verified = verify_model(stage.request(**policy))
    curves = [report.benchmark.stages for report in (first, measured, verified) if report.benchmark]
    assert len({stages[0].e2e_s for stages in curves}) == 3, "one of them was not measured"

    listed = json.loads(shown("curves", "list", *place, "--json"))
    assert [row["good"] for row in listed] == ["yes"] * 3
    assert "output tokens/s at saturation" in shown("curves", "compare", *place)
