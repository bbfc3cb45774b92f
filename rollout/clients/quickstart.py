"""What GKE Inference Quickstart does, over its data and ours: for the command line and for flows alike."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout.clients.cluster import ClusterClient
from rollout.clients.gke import Gke
from rollout.clients.iam import BucketPolicy, binding_name, ensure_binding, has_binding
from rollout.clients.profile_sources import BucketSource, benchmark_file, local_history
from rollout.clients.recommender import Recommender
from rollout.cost import Price, PricingModel, find_price
from rollout.errors import BadInput
from rollout.model_facts import ModelFacts
from rollout.objects import GSA_ANNOTATION
from rollout.optimize import (
    HF_SECRET,
    SHARED_LABELS,
    GeneratedManifests,
    ManifestRequest,
    Output,
    ValidatedWith,
    check_hub_secret,
)
from rollout.preflight import CheckState
from rollout.profiles import Profile, ProfileQuery, ProfileSource, ask, best_curve, select, use_case_named
from rollout.recommend import PriceOf, Recommendation, Requirements, recommend
from rollout.rendering import read_manifests, render
from rollout.report import Action, Change
from rollout.sources import SourceName
from rollout.target import ClusterMode, Target


def sources_of(
    target: Target | None,
    names: Sequence[SourceName],
    query: ProfileQuery,
    *,
    files: Sequence[Path] = (),
    history: Path | None = None,
) -> list[ProfileSource]:
    """The sources of those names, files first. Raises BadInput for one that belongs to a target, without a target."""
    sources: list[ProfileSource] = [benchmark_file(path, query) for path in files]
    for name in names:
        if name is SourceName.HISTORY:
            if history is not None:
                sources.append(local_history(history, query, region=target.region if target else None))
        elif target is None:
            raise BadInput(
                f"the source {name.value} belongs to a target.", where="--source", resolution="Give --target."
            )
        else:
            sources.append(BucketSource(target, query) if name is SourceName.BUCKET else Recommender(target))
    return sources


def price_lookup(
    target: Target | None, region: str | None, pricing: PricingModel, stated: Mapping[str, float]
) -> PriceOf:
    """What an accelerator of a profile costs: as stated, as the target says, or by the table."""
    own = target.gpu_usd_per_hour if target else None
    own_model = target.pricing if target else PricingModel.ON_DEMAND

    def price_of(profile: Profile) -> Price | None:
        return find_price(
            profile.accelerator, region, pricing, own_usd_per_gpu_hour=own, own_model=own_model, stated=stated
        )

    return price_of


def recommendation(
    target: Target | None,
    requirements: Requirements,
    sources: Sequence[ProfileSource],
    query: ProfileQuery,
) -> tuple[Recommendation, tuple[str, ...]]:
    """Options and losers, and every note that belongs to them."""
    answer = ask(sources, query)
    stated = query.usd_per_accelerator_hour
    price_of = price_lookup(target, requirements.region, requirements.pricing_model, stated)
    found = recommend(answer.profiles, requirements, price_of)
    return found, (*answer.notes, *found.all_notes)


def curve_of(
    sources: Sequence[ProfileSource], query: ProfileQuery, use_case: str
) -> tuple[Profile | None, tuple[str, ...]]:
    """The youngest measured curve of such a replica, else the catalogue's with the most load points; and the notes."""
    found = select(ask(sources, query, every_point=True), query, every_point=True)
    profiles = [row.profile for row in found.rows]
    named = use_case_named(use_case).name
    return best_curve(profiles, accelerator_count=query.accelerator_count, use_case=named), found.notes


def manifests_by_google(request: ManifestRequest, target: Target | None, version: str, output: Output) -> str:
    """What Google's generator answers; its API has a field for each of these and no others."""
    if target is None:
        raise BadInput("Google's generator belongs to a target.", where="--generator", resolution="Give --target.")
    found = Recommender(target).manifests(
        model=request.model,
        model_server=request.model_server,
        model_server_version=version,
        accelerator=request.accelerator_type,
        namespace=request.namespace,
        targets=request.targets,
        model_bucket_uri=request.model_bucket_uri,
    )
    documents, comments = found.documents_text(), found.comments_text()
    return {Output.MANIFEST: documents, Output.COMMENTS: comments, Output.ALL: documents + comments}[output]


def versions_of(target: Target, accelerator: str) -> ValidatedWith:
    """What the target's cluster runs, by GKE's word: nothing where there is none, or where a kubeconfig names it."""
    cluster = None if target.cluster.mode is ClusterMode.KUBECONFIG else Gke(target).get()
    if cluster is None:
        return ValidatedWith()
    pool = next((pool for pool in cluster.node_pools if pool.accelerator == accelerator), None)
    driver = (pool.gpu_driver if pool else "") or ("default" if cluster.is_autopilot else "")
    return ValidatedWith(
        cluster_version=cluster.version,
        node_version=(pool.version if pool else "") or cluster.node_version or None,
        gpu_driver_version=f"GKE's {driver}" if driver else None,
    )


def missing_grants(cluster: ClusterClient, generated: GeneratedManifests, target: Target) -> tuple[Change, ...]:
    """What `ensure_grants` would make. Changes nothing."""
    return tuple(
        Change(action=Action.CREATED, kind="IamBinding", name=binding_name(store.name, role, member))
        for store, role, member in _grants(cluster, generated, target)
        if not has_binding(store, role, member)
    )


def ensure_grants(cluster: ClusterClient, generated: GeneratedManifests, target: Target) -> tuple[Change, ...]:
    """Let the pods read, and on TPUs write, the bucket of their weights."""
    made = [ensure_binding(store, role, member) for store, role, member in _grants(cluster, generated, target)]
    return tuple(change for change in made if change is not None)


def _grants(
    cluster: ClusterClient, generated: GeneratedManifests, target: Target
) -> list[tuple[BucketPolicy, str, str]]:
    """A Kubernetes service account that already acts as a Google one is known to the bucket by that."""
    name = generated.request.service_account
    account = cluster.find(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": target.namespace}}
    )
    email = ((account or {}).get("metadata", {}).get("annotations") or {}).get(GSA_ANNOTATION)
    return [
        (BucketPolicy(target, each.bucket), each.role, f"serviceAccount:{email}" if email else each.member)
        for each in generated.grants
    ]


def ensure_namespace(cluster: ClusterClient, target: Target) -> tuple[Change, ...]:
    """The target's namespace, made if it is not there."""
    if cluster.namespace_exists(target.namespace):
        return ()
    values = {"namespace": target.namespace, "shared_labels": SHARED_LABELS}
    return cluster.apply(render(read_manifests(["namespace.yaml"]), values))


def ensure_hub_secret(
    cluster: ClusterClient, generated: GeneratedManifests, facts: ModelFacts, token: str | None
) -> tuple[Change, ...]:
    """The Secret that the pods read the hub's token from, where there is a token and nobody has made it.

    Raises BadInput for a gated model that would have none.
    """
    namespace = generated.request.namespace
    values = {
        "hub_token_secret": HF_SECRET,
        "namespace": namespace,
        # The quickstart's one name for the token: every model of the namespace reads it.
        "labels": SHARED_LABELS,
        "hub_token_base64": base64.b64encode((token or "").encode()).decode(),
    }
    secret = render(read_manifests(["hf-token.yaml"]), values)[0]
    exists = cluster.find(secret) is not None
    if token and not exists:
        return cluster.apply((secret,))
    check = check_hub_secret(facts, exists=exists)
    if check.state is CheckState.FAILED:
        resolution = f"Name the token's Secret block in the target (hub_token_secret), or {check.resolution}"
        raise BadInput(f"{check.why}.", where=namespace, resolution=resolution)
    return ()
