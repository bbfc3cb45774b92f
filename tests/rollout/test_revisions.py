from __future__ import annotations

from rollout.delivery import IN_PLACE, DeliveryKind, DeliveryStrategy
from rollout.model import ModelFile, PinnedModel
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy
from rollout.revisions import plan_of_live, planned_objects, revision_of_plan
from rollout.serving import ServingSpec
from rollout.target import Target

MODEL = PinnedModel(
    repo_id="tests/model",
    revision="main",
    commit_sha="0" * 40,
    files=(ModelFile(path="config.json", size_bytes=2, git_blob_sha1="1" * 40),),
)
TARGET = Target(name="t", project="my-project", region="u-france-east1", bucket="weights")
CANARY = DeliveryStrategy(kind=DeliveryKind.CANARY)


def plan(version: str, strategy: DeliveryStrategy) -> RolloutPlan:
    serving = ServingSpec(
        name="server", service_name="llm", served_model_name="m", image="vllm/vllm-openai:v1", env={"VERSION": version}
    )
    objects = planned_objects(MODEL, serving, TARGET, strategy, rollout_id=version)
    return make_plan(MODEL, serving, TARGET, RolloutPolicy(delivery=strategy), Observation(), objects)


def test_what_serves_is_the_newest_plan_of_the_live_revision() -> None:
    in_place, old, candidate = plan("1", DeliveryStrategy()), plan("2", CANARY), plan("3", CANARY)
    plans = [in_place, old, candidate]
    live = plan_of_live(plans, revision_of_plan(old))
    assert live is not None
    assert (live.serving.name, live.serving.env) == (f"server-{revision_of_plan(old)}", {"VERSION": "2"})
    assert plan_of_live(plans, IN_PLACE) == in_place
    assert plan_of_live(plans, "ffffffff") is None
