"""GKE Inference Quickstart as steps: recommend, render, grant, apply, wait."""

from __future__ import annotations

from pydantic import ValidationError

from rollout.catalog import explain
from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_wait import WaitReport
from rollout.clients.hub_facts import facts_from_hub
from rollout.clients.projects import Projects
from rollout.clients.quickstart import (
    curve_of,
    ensure_grants,
    ensure_hub_secret,
    ensure_namespace,
    manifests_by_google,
    missing_grants,
    recommendation,
    sources_of,
    versions_of,
)
from rollout.clients.records import RecordStore
from rollout.diagnosis import StartupObservation
from rollout.errors import BadInput
from rollout.ledger import APPLY_STEP, validated_with
from rollout.model_facts import MODELS, ModelFacts
from rollout.optimize import (
    LATEST_VERSION,
    GeneratedManifests,
    Output,
    apply_stages,
    generate_manifests,
    request_sizing,
)
from rollout.profile_formats import Format, render_recommendation
from rollout.profiles import Profile, ProfileQuery
from rollout.quickstart import ManifestsRequest, RecommendRequest
from rollout.recommend import Recommendation
from rollout.rendering import KubernetesObject
from rollout.report import Action, Change, StepStatus, utc_now
from rollout.show import table
from rollout.sources import SourceName
from rollout.target import ClusterMode, Target
from tasks.credentials import hub_token
from tasks.serve import watch_start
from tasks.step import Artifact, Outcome, step


@step("recommend")
def recommend_options(request: RecommendRequest, target: Target) -> Outcome[Recommendation]:
    """Rank what meets the requirements, with replicas, cost and headroom; say why the others lost."""
    query = request.query
    sources = sources_of(target, request.sources, query)
    found, notes = recommendation(target, request.requirements(target), sources, query)
    listed = "\n".join(f"- {note}" for note in notes)
    text = render_recommendation(found, Format.TABLE) or "Nothing meets the requirements.\n"
    best = found.best
    return Outcome(
        value=found,
        summary=f"{len(found.options)} options, {len(found.losers)} profiles not chosen"
        + (f"; best: {best.replicas} x {best.profile.accelerator_count} {best.profile.accelerator}" if best else ""),
        data={"options": [option.model_dump(mode="json") for option in found.options], "notes": list(notes)},
        artifact=Artifact("recommendation", "Options, best first", markdown=f"```\n{text}```\n\n{listed}"),
    )


@step("model facts")
def model_facts(request: ManifestsRequest, target: Target) -> Outcome[ModelFacts]:
    """Size and shape of the model: from the table of known ones, else from the hub."""
    facts = MODELS.get(request.model) or facts_from_hub(request.model, target, token=hub_token(target))
    return Outcome(value=facts, summary=f"{facts.weights_bytes / 1e9:.1f} GB of weights, by {facts.source}")


@step("render manifests")
def render_manifests(request: ManifestsRequest, target: Target, facts: ModelFacts) -> Outcome[GeneratedManifests]:
    """Optimised manifests, with what whoever applies them must know."""
    now = versions_of(target, request.accelerator_type)
    served = (request.model, request.model_server_version, request.accelerator_type)
    try:
        wanted = request.manifests(
            target,
            project_number=_project_number(target),
            gke_version=now.cluster_version,
            versions=validated_with(RecordStore(target).read_all(), *served).or_else(now),
        )
    except ValidationError as error:
        raise BadInput(explain(error), where="manifests", resolution="Correct the field and run again.") from error
    profile: Profile | None = None
    notes: tuple[str, ...] = ()
    if request.targets.given():
        count = request_sizing(wanted, facts).accelerator_count
        query = ProfileQuery(
            model=request.model,
            model_server=wanted.model_server,
            accelerator=request.accelerator_type,
            accelerator_count=count,
        )
        sources = sources_of(target, (SourceName.BUCKET, SourceName.GOOGLE), query)
        profile, notes = curve_of(sources, query, request.use_case)
    generated = generate_manifests(wanted, facts, on=utc_now().date(), profile=profile)
    listed = "".join(f"- {note}\n" for note in notes)
    return Outcome(
        value=generated,
        summary=f"{len(generated.objects)} objects of {generated.serving.name}, weights by {generated.storage.value}",
        artifact=Artifact(
            "optimised-manifests",
            f"{request.model} on {request.accelerator_type}",
            markdown=f"{listed}\n```yaml\n{generated.text(Output.ALL)}```",
        ),
    )


@step("manifests by Google")
def manifests_of_google(request: ManifestsRequest, target: Target) -> Outcome[str]:
    """The same by GKE Inference Quickstart's own generator, with its own latest version unless another is asked for."""
    version = "" if request.model_server_version == LATEST_VERSION else request.model_server_version
    text = manifests_by_google(request.manifests(target), target, version, Output.ALL)
    return Outcome(
        value=text,
        summary=f"{text.count('kind: ')} objects",
        artifact=Artifact("optimised-manifests", f"{request.model}, by Google", markdown=f"```yaml\n{text}```"),
    )


@step("plan grants")
def plan_grants(generated: GeneratedManifests, target: Target) -> Outcome[tuple[Change, ...]]:
    """Which bindings are still to be made: written down before they are, so that a teardown knows of them."""
    if not generated.grants or target.cluster.mode is ClusterMode.KUBECONFIG:
        return Outcome(value=(), summary="none", status=StepStatus.UNCHANGED)
    missing = missing_grants(ClusterClient.connect(target), generated, target)
    return Outcome(value=missing, summary=f"{len(missing)} to be made", status=StepStatus.UNCHANGED)


@step("grant access")
def grant_access(generated: GeneratedManifests, target: Target, facts: ModelFacts) -> Outcome[None]:
    """The bucket's binding, or the Secret with the hub's token: without them no pod would become available."""
    cluster = ClusterClient.connect(target)
    changes = ensure_namespace(cluster, target)
    if not generated.grants:
        changes += ensure_hub_secret(cluster, generated, facts, hub_token(target))
    elif target.cluster.mode is not ClusterMode.KUBECONFIG:  # such a cluster brings its own identity
        changes += ensure_grants(cluster, generated, target)
    return Outcome(
        value=None,
        summary=f"{len(changes)} grants made",
        status=StepStatus.DONE if changes else StepStatus.UNCHANGED,
        changes=changes,
    )


@step("stages")
def plan_stages(
    generated: GeneratedManifests, target: Target, replicas: int
) -> Outcome[tuple[tuple[KubernetesObject, ...], ...]]:
    """What to apply one after the other, by what is ready already: on TPUs one pod writes the XLA cache first."""
    cluster = ClusterClient.connect(target)
    server = next(each for each in generated.objects if _is_server(each, generated))
    ready = cluster.ready_replicas(generated.serving.name) if cluster.find(server) else 0
    # The target's own service account is other models' too: it stays as it is.
    account = generated.request.service_account
    kept = [each for each in generated.objects if _is_account(each, account) and cluster.find(each)]
    stages = apply_stages(generated, replicas, ready=ready)
    return Outcome(
        value=tuple(tuple(each for each in stage if each not in kept) for stage in stages),
        summary=f"{ready} pods are ready; {len(stages)} stages",
        status=StepStatus.UNCHANGED,
    )


@step(APPLY_STEP)
def apply_generated(
    generated: GeneratedManifests, target: Target, objects: tuple[KubernetesObject, ...]
) -> Outcome[None]:
    """Server-side apply in dependency order, after a server-side dry run; prune what earlier manifests had more."""
    cluster = ClusterClient.connect(target)
    changes = cluster.apply(objects) + cluster.prune(generated.objects, generated.serving.name)
    acted = [change for change in changes if change.action in (Action.CREATED, Action.UPDATED, Action.DELETED)]
    rows = [(change.action.value, change.kind, change.name, change.detail) for change in changes]
    return Outcome(
        value=None,
        summary=f"{len(acted)} of {len(changes)} objects changed",
        status=StepStatus.DONE if acted else StepStatus.UNCHANGED,
        changes=changes,
        artifact=Artifact("manifests", "Kubernetes objects", markdown=table(("action", "kind", "name", ""), rows)),
    )


@step("wait until available", retries=1)
def wait_until_generated(generated: GeneratedManifests, target: Target, facts: ModelFacts) -> Outcome[WaitReport]:
    """Watch the start until one token has come back, and until what routes to the server is there as well."""
    serving, request = generated.serving, generated.request
    context = StartupObservation(
        serving=serving,
        target=target,
        repo_id=request.model,
        weights_uri=request.model_bucket_uri or "",
        weights_bytes=facts.weights_bytes,
    )
    started = watch_start(target, serving, context, serving.ready_timeout_s)
    cluster = ClusterClient.connect(target)
    for each in generated.objects:
        if each["kind"] == "Deployment" and not _is_server(each, generated):
            cluster.wait_available(each["metadata"]["name"], deadline_s=serving.ready_timeout_s)
    return started


def _is_server(manifest: KubernetesObject, generated: GeneratedManifests) -> bool:
    return (manifest["kind"], manifest["metadata"]["name"]) == ("Deployment", generated.serving.name)


def _is_account(manifest: KubernetesObject, name: str) -> bool:
    return (manifest["kind"], manifest["metadata"]["name"]) == ("ServiceAccount", name)


def _project_number(target: Target) -> str:
    return "" if target.cluster.mode is ClusterMode.KUBECONFIG else Projects(target).get().number
