"""The GPU node is started when it pays, held for a bounded time, and asked for with the model server's own shape."""

from __future__ import annotations

from typing import Any

import pytest

from rollout.model import ModelFile, PinnedModel
from rollout.objects import INSTANCE_LABEL, is_ours, serving_objects
from rollout.plan import Observation, RolloutPlan, make_plan
from rollout.policy import RolloutPolicy, WarmUp
from rollout.report import Action, Change
from rollout.serving import ServingSpec
from rollout.target import Cluster, ClusterMode, Target
from rollout.warm_up import hold_s, is_due, warm_up_objects, why_not

MODEL = PinnedModel(
    repo_id="org/model",
    revision="main",
    commit_sha="a" * 40,
    files=(ModelFile(path="model.safetensors", size_bytes=50_000_000_000),),
)
SERVING = ServingSpec(name="vllm-a", served_model_name="a")
TARGET = Target(name="t", project="my-project", region="r", bucket="my-bucket", namespace="llm")


def plan_for(warm_up: WarmUp = WarmUp.CHEAP, target: Target = TARGET, **observed: Any) -> RolloutPlan:
    objects = serving_objects(MODEL, SERVING, target, rollout_id="r1")
    policy = RolloutPolicy(warm_up=warm_up, warm_up_lead_s=300)
    return make_plan(MODEL, SERVING, target, policy, Observation(**observed), objects)


RUNNING = Change(action=Action.UPDATED, kind="Deployment", name="llm/vllm-a")


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (plan_for(), ""),
        (plan_for(WarmUp.FAST), ""),
        (plan_for(WarmUp.OFF), "policy"),
        (plan_for(weights_proven=True), "weights are there"),
        (plan_for(object_changes=(RUNNING,)), "Deployment is there"),
        (
            plan_for(target=TARGET.model_copy(update={"cluster": Cluster(mode=ClusterMode.KUBECONFIG)})),
            "kubeconfig",
        ),
    ],
)
def test_only_a_first_rollout_that_waits_for_weights_warms_a_node_up(plan: RolloutPlan, reason: str) -> None:
    assert reason in why_not(plan)
    assert bool(why_not(plan)) == bool(reason)


@pytest.mark.parametrize(
    ("warm_up", "seconds_left", "due"),
    [
        (WarmUp.CHEAP, None, False),
        (WarmUp.CHEAP, 301.0, False),
        (WarmUp.CHEAP, 300.0, True),
        (WarmUp.FAST, None, True),
    ],
)
def test_cheap_waits_until_the_transfer_takes_as_long_as_the_node(
    warm_up: WarmUp, seconds_left: float | None, due: bool
) -> None:
    assert is_due(plan_for(warm_up), seconds_left) is due


def test_a_killed_rollout_holds_the_node_for_a_bounded_time() -> None:
    assert hold_s(plan_for()) == 600
    assert hold_s(plan_for(WarmUp.FAST)) == 50e9 / 50e6 + 600


def test_the_job_asks_for_what_the_model_server_will_ask_for() -> None:
    *needed, job = warm_up_objects(plan_for())
    assert [item["kind"] for item in needed] == ["Namespace", "ComputeClass"]
    pod = job["spec"]["template"]["spec"]
    deployment = next(item for item in plan_for().objects if item["kind"] == "Deployment")
    serving = deployment["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == serving["nodeSelector"]
    assert pod["containers"][0]["image"] == serving["containers"][0]["image"]
    assert pod["containers"][0]["resources"] == serving["containers"][0]["resources"]
    assert pod["containers"][0]["command"] == ["sleep", "600s"]
    assert job["spec"]["activeDeadlineSeconds"] == 600
    assert is_ours(job)
    assert job["metadata"]["labels"][INSTANCE_LABEL] == "vllm-a"


def test_the_services_pods_are_not_the_placeholders() -> None:
    *_, job = warm_up_objects(plan_for())
    assert "app" not in job["spec"]["template"]["metadata"]["labels"]
