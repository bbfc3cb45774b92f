"""The plan is data: what would change, what it moves, costs and waits for. Nothing in here has side effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from rollout.cost import Price, find_price
from rollout.model import PinnedModel
from rollout.policy import RolloutPolicy
from rollout.preflight import Check
from rollout.report import Action, Change
from rollout.serving import ServingSpec
from rollout.target import ClusterMode, IdentityMode, Target
from rollout.values import Value, content_digest


class LiveVersion(Value):
    """What serves under the same name before a rollout, and is not its to remove."""

    model: str
    """`repository@commit`, or what is known of it."""
    rollout_id: str = ""
    run_id: str = ""
    """Of the rollout whose record holds its plan; empty when no record tells of it."""
    answered: bool = False
    """Its rollout ended with answers: it is worth going back to."""


class Observation(Value):
    """What exists before anything changes. Made by reads alone."""

    project_number: str = ""
    bucket_exists: bool = False
    weights_proven: bool = False
    """The ready marker of exactly this commit is in place."""
    cluster_exists: bool = False
    cluster_version: str = ""
    node_pool_exists: bool = False
    """The target's GPU node pool, on a Standard cluster that is there already."""
    service_account_exists: bool = False
    workload_identity_bound: bool = False
    reader_bound: bool = False
    object_changes: tuple[Change, ...] = ()
    """Per Kubernetes object: created, updated or unchanged, from a server-side dry run; empty without a cluster."""
    object_diff: str = ""
    live_before: LiveVersion | None = None
    checkpoint_config: dict[str, Any] = {}
    """The model's config.json."""
    has_chat_template: bool = True
    checks: tuple[Check, ...] = ()


class RolloutPlan(Value):
    """Everything that `apply` will do, complete and replayable."""

    rollout_id: str
    """Digest of commit, serving spec and target: the same rollout gets the same id in every run."""
    model: PinnedModel
    serving: ServingSpec
    target: Target
    policy: RolloutPolicy
    project_number: str
    weights_uri: str
    objects: tuple[dict[str, Any], ...]
    """Kubernetes objects in the order of application."""
    changes: tuple[Change, ...]
    """What will be created or updated, and what is already as wanted. Teardown removes only what is created here."""
    object_diff: str = ""
    live_before: LiveVersion | None = None
    """What this rollout updates or stands beside: never torn down with it, and gone back to when it fails."""
    transfer_bytes: Annotated[int, Field(ge=0)]
    usd_per_hour: float | None
    """Cost of the replicas' GPUs while they run; None when no price is known."""
    deadlines_s: dict[str, float]
    checks: tuple[Check, ...]
    checkpoint_config: dict[str, Any] = {}
    """The model's config.json: what it can do follows from it."""
    has_chat_template: bool = True
    """Of the checkpoint, or named by a flag. A base model has none: it completes text and cannot chat."""

    @property
    def changes_anything(self) -> bool:
        return any(change.action in (Action.CREATED, Action.UPDATED, Action.DELETED) for change in self.changes)

    @property
    def title(self) -> str:
        """`google/gemma-4-31B-it@0123456789ab → s3ns-france`"""
        return f"{self.model.repo_id}@{self.model.short_sha} → {self.target.name}"


_NOT_SERVED = {
    *("approval", "endpoints", "hub_token_secret"),
    *("gpu_usd_per_hour", "pricing_model", "output_to_input_ratio"),
}


def rollout_id(model: PinnedModel, serving: ServingSpec, target: Target) -> str:
    """Ten hex digits; what does not change what is served is left out: endpoints, prices, who is asked."""
    return content_digest(
        {
            "model": [model.repo_id, model.commit_sha],
            "serving": serving.model_dump(mode="json"),
            "target": target.model_dump(mode="json", exclude=_NOT_SERVED),
        },
        10,
    )


def known_price(target: Target, accelerator: str) -> Price | None:
    """The target's own price of one GPU, else its region's list price by the target's pricing model; None: unknown."""
    return find_price(
        accelerator,
        target.region,
        target.pricing,
        own_usd_per_gpu_hour=target.gpu_usd_per_hour,
        own_model=target.pricing,
    )


def make_plan(
    model: PinnedModel,
    serving: ServingSpec,
    target: Target,
    policy: RolloutPolicy,
    observed: Observation,
    objects: Sequence[dict[str, Any]],
) -> RolloutPlan:
    """Turn an observation and a spec into the plan. Pure: equal arguments give equal plans."""
    transfer_bytes = 0 if observed.weights_proven else model.total_bytes
    gpus = serving.replicas * serving.accelerator.count
    price = known_price(target, serving.accelerator.type)
    return RolloutPlan(
        rollout_id=rollout_id(model, serving, target),
        model=model,
        serving=serving,
        target=target,
        policy=policy,
        project_number=observed.project_number,
        weights_uri=target.weights_uri(model.repo_id, model.commit_sha),
        objects=tuple(objects),
        changes=_planned_changes(model, target, observed, objects),
        object_diff=observed.object_diff,
        live_before=observed.live_before,
        transfer_bytes=transfer_bytes,
        usd_per_hour=None if price is None else price.usd_per_gpu_hour * gpus,
        checkpoint_config=observed.checkpoint_config,
        has_chat_template=observed.has_chat_template,
        deadlines_s=_deadlines(transfer_bytes, serving),
        checks=observed.checks,
    )


def _planned_changes(
    model: PinnedModel, target: Target, observed: Observation, objects: Sequence[dict[str, Any]]
) -> tuple[Change, ...]:
    def wanted(exists: bool, kind: str, name: str, detail: str = "") -> Change:
        return Change(action=Action.UNCHANGED if exists else Action.CREATED, kind=kind, name=name, detail=detail)

    changes = [wanted(observed.bucket_exists, "Bucket", f"gs://{target.bucket}", f"in {target.region}")]
    changes.append(
        wanted(
            observed.weights_proven,
            "Weights",
            target.weights_uri(model.repo_id, model.commit_sha),
            f"{len(model.files)} files, {model.total_bytes:,} bytes",
        )
    )
    if target.cluster.mode is not ClusterMode.KUBECONFIG:
        changes.append(
            wanted(observed.cluster_exists, "Cluster", target.cluster.name, f"{target.cluster.mode} in {target.region}")
        )
        pool = target.cluster.node_pool
        if pool is not None and observed.cluster_exists and target.cluster.mode is ClusterMode.STANDARD:
            # A new cluster brings its pool, and takes it away again.
            name = f"{target.cluster.name}/{pool.name}"
            changes.append(wanted(observed.node_pool_exists, "NodePool", name, f"up to {pool.max_nodes} nodes"))
        if target.identity is IdentityMode.SERVICE_ACCOUNT:
            changes.append(wanted(observed.service_account_exists, "ServiceAccount", target.gsa_email))
            changes.append(
                wanted(
                    observed.workload_identity_bound,
                    "IamBinding",
                    f"{target.gsa_email} roles/iam.workloadIdentityUser {target.workload_identity_member}",
                )
            )
        reader = target.reader_member(observed.project_number)
        changes.append(
            wanted(observed.reader_bound, "IamBinding", f"gs://{target.bucket} roles/storage.objectViewer {reader}")
        )
    known = {(change.kind, change.name): change for change in observed.object_changes}
    for manifest in objects:
        key = (manifest["kind"], object_name(manifest))
        changes.append(known.get(key) or Change(action=Action.CREATED, kind=key[0], name=key[1]))
    return tuple(changes)


def object_name(manifest: dict[str, Any]) -> str:
    """`namespace/name`, or the name of a cluster-scoped object."""
    metadata = manifest["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if "namespace" in metadata else metadata["name"]


def _deadlines(transfer_bytes: int, serving: ServingSpec) -> dict[str, float]:
    """Seconds each long step may take.

    cluster: GKE states 5–10 minutes for a new Autopilot cluster; three times that.
    weights: 50 MB/s, a twentieth of what one machine's link gives, plus ten minutes.
    available: the document's `kubectl wait --timeout=1800s`, from the serving spec.
    """
    return {
        "cluster": 1800.0,
        "weights": transfer_bytes / 50e6 + 600.0,
        "available": serving.ready_timeout_s,
        "teardown": 1800.0,
    }
