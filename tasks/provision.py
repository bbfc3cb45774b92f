"""Make what the model needs: bucket, cluster, identity. Each finds what is there and only adds what is missing."""

from __future__ import annotations

from prefect import get_run_logger

from rollout.clients.gke import MANAGED_BY, Gke, Progress
from rollout.clients.iam import (
    OBJECT_VIEWER,
    WORKLOAD_IDENTITY_USER,
    BucketPolicy,
    ServiceAccountPolicy,
    ServiceAccounts,
    ensure_binding,
)
from rollout.clients.storage import StorageClient
from rollout.plan import RolloutPlan
from rollout.report import Action, Change, StepStatus
from rollout.target import ClusterMode, IdentityMode, Target
from tasks.step import Artifact, Outcome, step


def _status(changes: tuple[Change, ...]) -> StepStatus:
    acted = any(change.action in (Action.CREATED, Action.UPDATED, Action.DELETED) for change in changes)
    return StepStatus.DONE if acted else StepStatus.UNCHANGED


def _changes_artifact(key: str, description: str, changes: tuple[Change, ...]) -> Artifact:
    rows = [{"action": c.action.value, "kind": c.kind, "name": c.name, "detail": c.detail} for c in changes]
    return Artifact(key, description, table=rows)


@step("provision bucket")
def provision_bucket(target: Target) -> Outcome[None]:
    """The bucket in the target's region, with uniform access and no public access; adopted when it exists."""
    changes = (StorageClient(target).ensure_bucket(),)
    return Outcome(
        value=None,
        summary=f"gs://{target.bucket} is {changes[0].action.value}",
        status=_status(changes),
        changes=changes,
        artifact=_changes_artifact("bucket", "The bucket of the weights", changes),
    )


@step("provision cluster")
def provision_cluster(plan: RolloutPlan) -> Outcome[None]:
    """The cluster, its GPU node pool (Standard) and its observability; a kubeconfig target brings its own."""
    target, deadline_s = plan.target, plan.deadlines_s["cluster"]
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        changes: tuple[Change, ...] = (
            Change(action=Action.ADOPTED, kind="Cluster", name=target.cluster.name, detail="from the kubeconfig"),
        )
    else:
        logger = get_run_logger()

        def show(progress: Progress) -> None:
            share = "" if progress.share is None else f" {progress.share:.0%}"
            logger.info("%s %s%s after %.0f s", progress.operation, progress.status, share, progress.elapsed_s)

        gke = Gke(target)
        cluster, change = gke.ensure(MANAGED_BY, timeout_s=deadline_s, on_progress=show)
        optional = [gke.ensure_node_pool(timeout_s=deadline_s, on_progress=show)]
        if target.cluster.observability and cluster.is_ours:  # an adopted one is only told of: see the preflight
            optional.append(gke.ensure_observability(timeout_s=deadline_s, on_progress=show))
        changes = (change, *(extra for extra in optional if extra is not None))
    return Outcome(
        value=None,
        summary=f"cluster {target.cluster.name} is {changes[0].action.value}",
        status=_status(changes),
        changes=changes,
        artifact=_changes_artifact("cluster", "The cluster that serves", changes),
    )


@step("service account")
def make_service_account(plan: RolloutPlan) -> Outcome[None]:
    """The Google service account, and its access to the bucket; needs no cluster."""
    target = plan.target
    account, made = ServiceAccounts(target).ensure(target.gsa)
    reader = ensure_binding(BucketPolicy(target, target.bucket), OBJECT_VIEWER, f"serviceAccount:{account.email}")
    changes = tuple(change for change in (made, reader) if change is not None)
    return Outcome(
        value=None,
        summary=f"{account.email} may read gs://{target.bucket}",
        status=_status(changes),
        changes=changes,
        artifact=_changes_artifact("service-account", "Who may read the weights", changes),
    )


@step("workload identity")
def set_up_workload_identity(plan: RolloutPlan) -> Outcome[None]:
    """Let the pods act as the service account, or read the bucket as themselves. Needs the cluster's workload pool."""
    target = plan.target
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return Outcome(value=None, summary="a kubeconfig cluster brings its own identity", status=StepStatus.SKIPPED)
    if target.identity is IdentityMode.SERVICE_ACCOUNT:
        policy = ServiceAccountPolicy(target, target.gsa_email)
        change = ensure_binding(policy, WORKLOAD_IDENTITY_USER, target.workload_identity_member)
        summary = f"{target.workload_identity_member} is {target.gsa_email}"
    else:
        reader = target.reader_member(plan.project_number)
        change = ensure_binding(BucketPolicy(target, target.bucket), OBJECT_VIEWER, reader)
        summary = f"{reader} may read gs://{target.bucket}"
    changes = () if change is None else (change,)
    return Outcome(
        value=None,
        summary=summary,
        status=_status(changes),
        changes=changes,
        artifact=_changes_artifact("workload-identity", "Whose identity the pods have", changes),
    )
