"""The plan is pure: equal observations give equal plans, and what exists already is not planned again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from rollout.cost import PricingModel, list_price
from rollout.model import ModelFile, PinnedModel
from rollout.plan import Observation, RolloutPlan, known_price, make_plan, rollout_id
from rollout.policy import RolloutPolicy
from rollout.record import RolloutReport
from rollout.report import Action, Change
from rollout.serving import ServingSpec
from rollout.show import plan_markdown, report_markdown
from rollout.target import Approval, Cluster, ClusterMode, IdentityMode, NodePool, Target

MODEL = PinnedModel(
    repo_id="google/gemma-4-31B-it",
    revision="main",
    commit_sha="0123456789abcdef0123456789abcdef01234567",
    files=(ModelFile(path="config.json", size_bytes=100), ModelFile(path="model.safetensors", size_bytes=5_000)),
)
SERVING = ServingSpec(served_model_name="google/gemma-4-31B-it")
TARGET = Target.model_validate(
    {
        "name": "s3ns",
        "project": "my-project",
        "region": "u-france-east1",
        "bucket": "my-bucket",
        "universe": {"domain": "s3nsapis.fr"},
        "gpu_usd_per_hour": 11.0,
    }
)
DEPLOYMENT = {"kind": "Deployment", "apiVersion": "apps/v1", "metadata": {"name": "d", "namespace": "default"}}


def plan_for(observed: Observation, target: Target = TARGET, serving: ServingSpec = SERVING) -> RolloutPlan:
    return make_plan(MODEL, serving, target, RolloutPolicy(), observed, [DEPLOYMENT])


def actions(plan: RolloutPlan) -> dict[str, Action]:
    return {f"{change.kind} {change.name}": change.action for change in plan.changes}


def test_plan_and_report_lead_to_the_consoles_pages() -> None:
    plan = plan_for(Observation())
    report = RolloutReport(run_id="r", started_at=datetime(2026, 11, 27, tzinfo=UTC), plan=plan)
    for page in (plan_markdown(plan), report_markdown(report)):
        assert "[workload](https://console.cloud.s3nscloud.fr/kubernetes/deployment/u-france-east1/" in page
        assert "[bucket](https://console.cloud.s3nscloud.fr/storage/browser/my-bucket?project=my-project)" in page


def test_the_plan_says_who_is_asked_and_what_the_target_wants_at_least() -> None:
    assert "- approval: never\n" in plan_markdown(plan_for(Observation()))
    strict = TARGET.model_copy(update={"approval": Approval.ON_CHANGE})
    assert "- approval: never (at s3ns, on change at least)" in plan_markdown(plan_for(Observation(), strict))
    assert rollout_id(MODEL, SERVING, strict) == rollout_id(MODEL, SERVING, TARGET)


def test_an_empty_project_gets_everything_created() -> None:
    plan = plan_for(Observation(project_number="123"))
    assert {change.kind for change in plan.changes} == {
        "Bucket",
        "Weights",
        "Cluster",
        "ServiceAccount",
        "IamBinding",
        "Deployment",
    }
    assert {change.action for change in plan.changes} == {Action.CREATED}
    assert plan.transfer_bytes == 5_100


def test_a_finished_rollout_plans_no_change_and_no_transfer() -> None:
    plan = plan_for(
        Observation(
            bucket_exists=True,
            weights_proven=True,
            cluster_exists=True,
            service_account_exists=True,
            workload_identity_bound=True,
            reader_bound=True,
            object_changes=(Change(action=Action.UNCHANGED, kind="Deployment", name="default/d"),),
        )
    )
    assert not plan.changes_anything
    assert plan.transfer_bytes == 0


def test_a_changed_object_alone_is_planned_as_update() -> None:
    changed = Change(action=Action.UPDATED, kind="Deployment", name="default/d")
    plan = plan_for(Observation(bucket_exists=True, weights_proven=True, object_changes=(changed,)))
    assert actions(plan)["Deployment default/d"] is Action.UPDATED
    assert actions(plan)["Bucket gs://my-bucket"] is Action.UNCHANGED


def test_direct_identity_plans_the_principal_and_no_service_account() -> None:
    target = TARGET.model_copy(update={"identity": IdentityMode.DIRECT})
    kinds = [change.kind for change in plan_for(Observation(project_number="123"), target).changes]
    assert "ServiceAccount" not in kinds
    binding = next(c for c in plan_for(Observation(project_number="123"), target).changes if c.kind == "IamBinding")
    assert "principal://iam.googleapis.com/projects/123/" in binding.name


def test_a_kubeconfig_cluster_is_nobodys_to_create() -> None:
    target = TARGET.model_copy(update={"cluster": Cluster(mode=ClusterMode.KUBECONFIG)})
    kinds = {change.kind for change in plan_for(Observation(), target).changes}
    assert kinds == {"Bucket", "Weights", "Deployment"}


def test_cost_is_gpus_times_price() -> None:
    serving = SERVING.model_copy(update={"replicas": 3})
    assert plan_for(Observation(), serving=serving).usd_per_hour == pytest.approx(33.0)


def test_cost_is_unknown_where_no_price_is_and_the_plan_says_where_to_state_it() -> None:
    target = TARGET.model_copy(update={"gpu_usd_per_hour": None})
    plan = plan_for(Observation(), target)
    assert plan.usd_per_hour is None
    assert "cost while running: unknown: no on-demand list price is known for nvidia-h100-80gb" in plan_markdown(plan)


def test_the_plan_shows_the_price_by_the_targets_pricing_model() -> None:
    own = TARGET.model_copy(update={"pricing_model": PricingModel.COMMITMENT_3Y})
    shown = "cost while running: 11.00 USD per hour: 11.00 USD per GPU and hour (3-year-commitment, the target's"
    assert shown in plan_markdown(plan_for(Observation(), own))
    assert rollout_id(MODEL, SERVING, own) == rollout_id(MODEL, SERVING, TARGET), "how it is paid for changes no pod"


def test_nodes_on_spot_cost_the_spot_price_unless_the_target_says_otherwise() -> None:
    pool = NodePool(spot=True, machine_type="a3-highgpu-1g", accelerator_count=1)
    cluster = Cluster(mode=ClusterMode.STANDARD, node_pool=pool)
    listed = {"gpu_usd_per_hour": None, "region": "europe-west4", "cluster": cluster}
    spot = known_price(TARGET.model_copy(update=listed), "nvidia-h100-80gb")
    assert spot == list_price("nvidia-h100-80gb", "europe-west4", PricingModel.SPOT)
    committed = TARGET.model_copy(update=listed | {"pricing_model": PricingModel.COMMITMENT_1Y})
    price = known_price(committed, "nvidia-h100-80gb")
    assert price == list_price("nvidia-h100-80gb", "europe-west4", PricingModel.COMMITMENT_1Y)


def test_the_rollout_id_follows_what_is_served_and_not_how_it_is_reached() -> None:
    base = rollout_id(MODEL, SERVING, TARGET)
    assert base == rollout_id(MODEL, SERVING, TARGET.model_copy(update={"gpu_usd_per_hour": 1.0}))
    assert base != rollout_id(MODEL, SERVING.model_copy(update={"max_num_seqs": 64}), TARGET)
    assert base != rollout_id(MODEL.model_copy(update={"commit_sha": "f" * 40}), SERVING, TARGET)


def test_equal_observations_give_equal_plans() -> None:
    assert plan_for(Observation()) == plan_for(Observation())
