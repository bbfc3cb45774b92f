"""The node is there before the model server, and belongs to it when it comes."""

from __future__ import annotations

import pytest
from prefect import flow

from flows.plan_model import make_plan
from rollout.clients.cluster import ClusterClient
from rollout.policy import RolloutPolicy, WarmUp
from rollout.report import Action
from rollout.request import resolve
from rollout.warm_up import warm_up_job
from tasks.provision import provision_bucket, provision_cluster
from tasks.step import Story
from tasks.warm_up import release_node, warm_up_node
from tests.flows.conftest import Stage
from tests.sandbox.cluster_support import eventually

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


def test_a_job_holds_the_node_until_it_is_released_and_the_node_stays(stage: Stage) -> None:
    request = stage.request().model_copy(update={"policy": RolloutPolicy(benchmark=None, warm_up=WarmUp.FAST)})

    @flow
    def tell() -> None:
        story = Story(lambda _: None)
        plan = make_plan(resolve(request), story)
        story.run(provision_bucket, plan.target)
        story.run(provision_cluster, plan)
        assert story.run(warm_up_node, plan)

        client = ClusterClient.connect(plan.target)
        job = warm_up_job(plan)
        assert client.find(job) is not None
        assert job["kind"] in {item["kind"] for item in client.inventory()}
        selector = job["spec"]["template"]["spec"]["nodeSelector"]
        eventually(lambda: client.gpu_room(selector, 1).nodes, "a node")

        story.run(release_node, plan)
        assert client.find(job) is None
        assert client.gpu_room(selector, 1).idle_gpus > 0
        assert story.reports[-1].changes[0].action is Action.DELETED

    tell()
