"""What the approver sees, and what ties the answer to it."""

from __future__ import annotations

from rollout.approval import approval_markdown, shown_digest
from rollout.objectives import Objectives
from rollout.plan import Observation
from rollout.preflight import Check, CheckState
from rollout.stage import LatencyLimit, LatencyMetric, Percentile
from tests.rollout.test_plan import TARGET, plan_for


def test_the_page_has_cost_transfer_changes_and_objectives() -> None:
    plan = plan_for(Observation(project_number="1"))
    limit = LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=2)
    policy = plan.policy.model_copy(update={"objectives": Objectives(latencies=(limit,))})
    page = approval_markdown(plan.model_copy(update={"policy": policy, "transfer_bytes": 52_000_000_000}))
    for part in ("**11.00 USD per hour**", "**52.00 GB**", "create Bucket `gs://my-bucket`", "TTFT p90 ≤ 2 s"):
        assert part in page
    assert "|" not in page, "the dialog is too narrow for tables"


def test_a_price_that_nobody_knows_is_said_to_be_unknown() -> None:
    target = TARGET.model_copy(update={"gpu_usd_per_hour": None, "region": "mars-north1"})
    assert "no price is known" in approval_markdown(plan_for(Observation(), target))


def test_warnings_are_shown_and_do_not_change_the_digest() -> None:
    check = Check(name="quota", state=CheckState.WARNING, why="7 of 8 GPUs are in use.")
    plan = plan_for(Observation())
    warned = plan.model_copy(update={"checks": (check,)})
    assert "7 of 8 GPUs are in use." in approval_markdown(warned)
    assert shown_digest(warned) == shown_digest(plan)


def test_another_change_or_another_price_needs_another_answer() -> None:
    plan = plan_for(Observation())
    assert shown_digest(plan.model_copy(update={"usd_per_hour": 99.0})) != shown_digest(plan)
    assert shown_digest(plan.model_copy(update={"changes": ()})) != shown_digest(plan)
