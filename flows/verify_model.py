"""Ask a live model server whether it still does what its rollout has proven."""

from __future__ import annotations

from prefect import flow

from flows.rollout_model import verify
from rollout.clients.cluster import ClusterClient
from rollout.clients.records import RecordStore
from rollout.clients.traffic import TrafficClient
from rollout.errors import BadInput
from rollout.ledger import applied, in_order, last_applied
from rollout.plan import RolloutPlan
from rollout.record import RolloutReport
from rollout.request import RolloutRequest, resolve
from rollout.revisions import plan_of_live
from tasks.record import recorded


@flow(name="verify-model", flow_run_name="verify {request.title}")
def verify_model(request: RolloutRequest, report_file: str | None = None) -> RolloutReport:
    """Verify what serves: the smoke suite and, if the policy has one, the benchmark against the objectives.

    What should be there is the plan of the target's newest record, not what a rollout would do today; so a new commit
    on the branch, or a changed preset, changes nothing here.

    Args:
        request: Model and target; of the policy, the benchmark and the objectives.
        report_file: Where the machine-readable record goes on this machine. It is not kept in the bucket: nothing was
            rolled out.
    """
    spec = resolve(request)
    served = plan_of_what_serves(request)
    # Whether its replicas come and go is the server's own property.
    policy = spec.policy.model_copy(update={"autoscaling": served.policy.autoscaling})
    plan = served.model_copy(update={"policy": policy, "target": spec.target})
    with recorded(spec.target, report_file) as record:
        record.keep(plan=plan)
        verify(plan, record, occasion=record.report.run_id)
    return record.report


def plan_of_what_serves(request: RolloutRequest) -> RolloutPlan:
    """The newest plan that was applied; of several revisions, that of the one that the cluster says is live.

    Raises BadInput where nothing serves, or where the records do not know what does.
    """
    spec = resolve(request)
    name = spec.serving.name
    records = in_order(RecordStore(spec.target).read_all())
    report = last_applied(records, name)
    if report is None or report.plan is None:
        raise BadInput(
            f"no record says that {name} serves on {spec.target.name}.",
            where=f"target {spec.target.name}",
            resolution=f"Roll it out first: llm-rollout rollout {request.model} --target {request.target}",
        )
    if not report.plan.policy.delivery.by_revisions:
        return report.plan
    live = TrafficClient(ClusterClient.connect(spec.target), report.plan).read().live
    plans = [
        each.plan for each in records if each.plan is not None and each.plan.serving.name == name and applied(each)
    ]
    plan = plan_of_live(plans, live) if live is not None else None
    if plan is None:
        raise BadInput(
            f"no record tells what {live or 'nothing'}, which is live, should be.",
            where=f"{name} on {spec.target.name}",
            resolution="Finish the delivery by rolling it out again; `llm-rollout status` shows what the records know.",
        )
    return plan
