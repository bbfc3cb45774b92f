"""The rehearsal's front door: deployments for the embedded cloud in the Prefect UI, and a worker that runs them.

A process of its own, which becomes the worker: `flows.rehearsal` starts it when the UI stays open.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.deployments.runner import EntrypointType, RunnerDeployment

from flows.bootstrap import LAPTOP_POOL, bootstrap
from flows.plan_model import plan_model
from flows.rehearsal_acts import MODEL, POLICIES
from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from rollout.catalog import load_target
from rollout.request import RolloutRequest
from rollout.target import Approval


def deploy(target_file: str, engine: str) -> None:
    """Pool, limits, and a deployment each of plan, rollout and teardown, as prefect.yaml has them for real targets."""
    target = load_target(target_file)
    bootstrap([target], pool=LAPTOP_POOL)
    policy = POLICIES[engine].model_copy(update={"approval": Approval.ON_CHANGE})
    request = RolloutRequest(model=MODEL, target=target_file, policy=policy).model_dump(mode="json")
    removal = {"target": target_file, "model": MODEL}
    forms: tuple[tuple[Flow[..., Any], str, str, dict[str, Any]], ...] = (
        (
            rollout_model,
            f"{MODEL}-{target.name}",
            "Rolls out **SmolLM2 135M** and asks you first.",
            {"request": request},
        ),
        (plan_model, target.name, "**Changes nothing.** Shows what a rollout would do.", {"request": request}),
        (teardown_model, target.name, "**Removes the model server**, and proves that nothing is left.", removal),
    )
    for flow, name, description, parameters in forms:
        deployment = flow.to_deployment(
            name,
            parameters=parameters,
            description=f"{description} On the embedded cloud of this rehearsal.",
            tags=["llm-rollout", f"target:{target.name}"],
            work_pool_name=LAPTOP_POOL,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        assert isinstance(deployment, RunnerDeployment)
        deployment.apply()


if __name__ == "__main__":
    deploy(sys.argv[1], sys.argv[2])
    prefect = str(Path(sys.executable).with_name("prefect"))
    os.execv(prefect, [prefect, "worker", "start", "--pool", LAPTOP_POOL])
