"""Optimised manifests of one model, as GKE Inference Quickstart makes them; shown, or applied as well."""

from __future__ import annotations

from prefect import flow

from rollout.catalog import load_target
from rollout.errors import BadInput
from rollout.model_facts import ModelFacts
from rollout.optimize import GeneratedManifests
from rollout.quickstart import ManifestsRequest
from rollout.sources import Generator
from rollout.target import Target
from tasks.limits import accelerators_of
from tasks.profiling import require_metrics_adapter
from tasks.provision import provision_bucket
from tasks.quickstart import (
    apply_generated,
    grant_access,
    manifests_of_google,
    model_facts,
    plan_grants,
    plan_stages,
    render_manifests,
    wait_until_generated,
)
from tasks.record import Record, recorded
from tasks.step import Story
from tasks.weights import check_weights_layout


@flow(name="create-manifests", flow_run_name="manifests of {request.model} on {request.target}")
def create_manifests(request: ManifestsRequest, report_file: str | None = None) -> str:
    """Render optimised manifests; with `apply`, grant the pods what they need, apply, and wait until one can answer.

    `llm-rollout teardown --instance NAME` takes away again what was applied.

    Args:
        request: Model, accelerator, latency targets, where the weights come from, and whether to apply.
        report_file: Where the record of what was applied goes on this machine; it is kept in the bucket in any case.
    """
    target = load_target(request.target)
    if request.generator is Generator.GOOGLE:
        return by_google(request, target)
    if not request.apply:
        return rendered(request, target, Story(lambda _: None))[1].text()
    with recorded(target, report_file) as record:
        facts, generated = rendered(request, target, record.story)
        record.keep(generated=generated)
        count = generated.serving.accelerator.count * request.replicas
        with accelerators_of(target.name, count):
            serve(generated, facts, target, request.replicas, record)
        record.milestone()
    return generated.text()


def by_google(request: ManifestsRequest, target: Target) -> str:
    """Google's own generator: what it answers carries none of our labels, so no teardown would find it."""
    if request.apply:
        raise BadInput(
            "manifests by Google are shown, never applied.",
            where="generator",
            resolution="Choose the generator local, or switch apply off.",
        )
    return Story(lambda _: None).run(manifests_of_google, request, target)


def rendered(request: ManifestsRequest, target: Target, story: Story) -> tuple[ModelFacts, GeneratedManifests]:
    """Size and shape of the model, and what follows from them. Changes nothing."""
    facts = story.run(model_facts, request, target)
    return facts, story.run(render_manifests, request, target, facts)


def serve(generated: GeneratedManifests, facts: ModelFacts, target: Target, replicas: int, record: Record) -> None:
    """Everything that is to be there before a GPU is paid for, then the objects, stage by stage."""
    story, weights = record.story, generated.request.model_bucket_uri
    if generated.autoscaling is not None:
        story.run(require_metrics_adapter, target)
    if weights is not None:
        story.run(check_weights_layout, target, weights, generated.serving.vllm_release)
        story.run(provision_bucket, target)  # of the record, which is how a teardown knows what was granted
    record.keep(intended=story.run(plan_grants, generated, target))
    record.milestone()
    story.run(grant_access, generated, target, facts)
    record.milestone()
    for objects in story.run(plan_stages, generated, target, replicas):
        story.run(apply_generated, generated, target, objects)
        record.milestone()
        start = story.run(wait_until_generated, generated, target, facts)
        record.keep(startup=start.model_dump(mode="json"))
