"""The preflight against the embedded cloud, asked directly: what one service cannot tell does not hide the rest."""

from __future__ import annotations

import dataclasses
import socket

from rollout.clients.hub import HubClient
from rollout.clients.observe import observe
from rollout.preflight import Check, CheckState
from rollout.request import resolve
from rollout.revisions import planned_objects
from tests.flows.conftest import Stage


def checks_of(stage: Stage) -> dict[str, Check]:
    spec = resolve(stage.request())
    model = HubClient(spec.target.hub_endpoint, None).pin(spec.model)
    objects = planned_objects(model, spec.serving, spec.target, spec.policy.delivery, rollout_id="r1")
    observed = observe(model, spec.serving, spec.target, objects, policy=spec.policy, hub_token=None)
    return {check.name: check for check in observed.checks}


def nothing_listens() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_billing_service_that_does_not_answer_leaves_billing_unknown(stage: Stage) -> None:
    endpoints = stage.target.endpoints.model_copy(update={"cloudbilling": nothing_listens()})
    stage = dataclasses.replace(stage, target=stage.write_target(endpoints=endpoints.model_dump(mode="json")))
    checks = checks_of(stage)
    assert checks["billing"].state is CheckState.UNKNOWN
    assert checks["APIs"].state is CheckState.OK


def test_the_copy_that_the_tutorials_image_makes_must_fit_on_the_nodes_disk(stage: Stage) -> None:
    assert checks_of(stage)["fits on the boot disk"].state is CheckState.OK
    stage.write_model(resources={"cpu": "1", "memory": "1Gi", "ephemeral_storage": "1Ki"})
    check = checks_of(stage)["fits on the boot disk"]
    assert check.state is CheckState.FAILED
    assert "serving.resources.ephemeral_storage" in check.why
