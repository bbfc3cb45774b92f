"""Optimised manifests of one model, as GKE Inference Quickstart makes them; shown, or applied as well."""

from __future__ import annotations

from prefect import flow

from rollout.catalog import load_target
from rollout.quickstart import ManifestsRequest
from rollout.sources import Generator
from tasks.limits import target_alone
from tasks.quickstart import apply_generated, grant_access, manifests_of_google, model_facts, render_manifests
from tasks.step import Story


@flow(name="create-manifests", flow_run_name="manifests of {request.model} on {request.target}")
def create_manifests(request: ManifestsRequest) -> str:
    """Render optimised manifests; with `apply`, grant the pods what they need, apply, and wait until one can answer.

    `llm-rollout teardown --instance NAME` takes away again what was applied.

    Args:
        request: Model, accelerator, latency targets, where the weights come from, and whether to apply.
    """
    target = load_target(request.target)
    story = Story(lambda _: None)
    if request.generator is Generator.GOOGLE:
        return story.run(manifests_of_google, request, target)
    facts = story.run(model_facts, request, target)
    generated = story.run(render_manifests, request, target, facts)
    if request.apply:
        with target_alone(target.name):
            story.run(grant_access, generated, target, facts)
            story.run(apply_generated, generated, target, request.replicas)
    return generated.text()
