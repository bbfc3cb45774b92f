"""Measure the curve of a live model server: the sweep alone, with a load of one's choice."""

from __future__ import annotations

from prefect import flow

from flows.verify_model import plan_of_what_serves
from rollout.benchmark import BenchmarkSpec
from rollout.errors import BadInput
from rollout.record import RolloutReport
from rollout.request import RolloutRequest, resolve
from tasks.record import recorded
from tasks.serve import wait_until_available
from tasks.verify import benchmark_server, judge_objectives, require_met


@flow(name="benchmark-model", flow_run_name="benchmark {request.title}")
def benchmark_model(request: RolloutRequest, report_file: str | None = None) -> RolloutReport:
    """Sweep the load on what serves until it saturates; keep the curve, answer from it, judge it by the objectives.

    The server takes the load beside its users: choose the hour, or `profile-model`, which starts one of its own.

    Args:
        request: Model and target; of the policy, the benchmark and the objectives (smoke checks are verify-model's).
        report_file: Where the machine-readable record goes on this machine. It is not kept in the bucket: nothing was
            rolled out. The curve is.
    """
    spec = resolve(request)
    served = plan_of_what_serves(request)
    if served.policy.autoscaling is not None:
        raise BadInput(
            f"{served.serving.name} is scaled by its load, and replicas that come and go have no curve.",
            where=f"target {spec.target.name}",
            resolution="Measure one replica with profile-model, on a target or namespace where it does not serve.",
        )
    plan = served.model_copy(update={"policy": spec.policy, "target": spec.target})
    with recorded(spec.target, report_file) as record:
        record.keep(plan=plan)
        story = record.story
        start = story.run(wait_until_available, plan)
        sweep = spec.policy.benchmark or BenchmarkSpec()
        measured = story.run(benchmark_server, plan, start.pods, sweep, record.report.run_id)
        record.keep(benchmark=measured)
        verdict = story.run(judge_objectives, plan, None, measured)
        record.keep(objectives=verdict)
        require_met(verdict)
    return record.report
