"""Back to nothing: delete what a rollout made, in reverse order, and ask everywhere whether something is left.

What was adopted stays. What several models share (cluster, identity, bucket) stays while another model uses it.
A cluster, bucket or service account is ours if it carries our label; an IAM binding, which has none, if a record says
that we made it or if it belongs to an account that is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from rollout.clients.cluster import ClusterClient
from rollout.clients.compute import Compute
from rollout.clients.gke import ClusterInfo, Gke
from rollout.clients.iam import (
    OBJECT_VIEWER,
    WORKLOAD_IDENTITY_USER,
    BucketPolicy,
    PolicyStore,
    ServiceAccountPolicy,
    ServiceAccounts,
    binding_name,
    has_binding,
    remove_binding,
)
from rollout.clients.projects import Projects
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.clients.transfer import remove_dead_leftovers, unfinished_transfers
from rollout.errors import AnotherWriter, ApiDisabled, BucketNotFound, NotFound, PermissionMissing
from rollout.objects import INSTANCE_LABEL, removable
from rollout.plan import object_name
from rollout.policy import Weights
from rollout.record import TeardownReport
from rollout.report import Action, Change
from rollout.selection import RESERVED_FOLDER
from rollout.target import ClusterMode, IdentityMode, Target

_DISK_LABEL = "goog-k8s-cluster-name"
"""GKE puts it on every disk that it makes for a cluster's volumes."""


@dataclass
class _Teardown:
    target: Target
    instance: str
    weights: Weights
    owned: Collection[tuple[str, str]]
    deadline_s: float
    removed: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    left: list[Change] = field(default_factory=list)

    def note(self, change: Change | None) -> None:
        """Sort what a client did into removed and kept; what was not there is neither."""
        if change is None:
            return
        if change.action is Action.DELETED:
            self.removed.append(change)
        elif change.action is Action.ADOPTED:
            self.kept.append(change)

    def keep(self, kind: str, name: str, why: str) -> None:
        self.kept.append(Change(action=Action.UNCHANGED, kind=kind, name=name, detail=why))

    def found(self, kind: str, name: str, why: str) -> None:
        self.left.append(Change(action=Action.UNCHANGED, kind=kind, name=name, detail=why))


def tear_down(
    target: Target,
    instance: str,
    *,
    weights: Weights,
    owned: Collection[tuple[str, str]],
    deadline_s: float = 1800.0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> TeardownReport:
    """Remove the model server `instance` from `target`, and prove it by an inventory.

    `owned` are (kind, name) of what the records of this target's rollouts say was created. Idempotent: what is gone
    already is not an error. The report's `left` names what should be gone and is not; it is the caller's to fail on.
    """
    report = _tear_down(_Teardown(target, instance, weights, owned, deadline_s), on_progress)
    if not report.left:
        return report
    # IAM answers with what it knew a minute ago: what a run made just before it was killed comes into view only now.
    on_progress("what came into view meanwhile")
    again = _tear_down(_Teardown(target, instance, weights, owned, deadline_s), on_progress)
    return again.model_copy(update={"removed": report.removed + again.removed})


def _tear_down(work: _Teardown, on_progress: Callable[[str], None]) -> TeardownReport:
    target = work.target
    gke = Gke(target) if target.cluster.mode is not ClusterMode.KUBECONFIG else None
    cluster = gke.get() if gke else None
    shared_by = ""
    # A cluster without an address is one that a killed run has just begun to make: it holds nothing yet.
    if gke is None or (cluster is not None and cluster.connection is not None):
        on_progress("Kubernetes objects")
        shared_by = _remove_objects(work)
    if gke is not None:
        on_progress("identity")
        _remove_identity(work, shared_by)
        on_progress("cluster")
        _remove_cluster(work, gke, cluster, shared_by)
    on_progress("weights")
    _remove_weights(work, shared_by)
    on_progress("inventory")
    _take_inventory(work, shared_by)
    return TeardownReport(removed=tuple(work.removed), kept=tuple(work.kept), left=tuple(work.left))


def _remove_objects(work: _Teardown) -> str:
    """Delete the instance's objects, and the shared ones that nobody else uses. Returns who else uses the target."""
    client = ClusterClient.connect(work.target)
    ours = client.inventory()
    here = work.target.namespace
    labels = [manifest["metadata"].get("labels") or {} for manifest in ours]
    known = {(here, label[INSTANCE_LABEL]) for label in labels if INSTANCE_LABEL in label} | _instances(client)
    neighbours = sorted(known - {(here, work.instance)})
    for change in client.delete(removable(ours, work.instance, neighbours), deadline_s=work.deadline_s):
        work.note(change)
    if not neighbours:
        return ""
    names = (name if namespace == here else f"{namespace}/{name}" for namespace, name in neighbours)
    return f"still serves {', '.join(names)}"


def _instances(client: ClusterClient) -> frozenset[tuple[str, str]]:
    """(namespace, instance) of all model servers in the cluster; who may not ask must suppose that there are others."""
    try:
        return client.instances()
    except PermissionMissing:
        return frozenset({("other namespaces", "whatever the caller may not list")})


def _remove_identity(work: _Teardown, shared_by: str) -> None:
    target = work.target
    accounts = ServiceAccounts(target)
    account = accounts.get(target.gsa_email) if target.identity is IdentityMode.SERVICE_ACCOUNT else None
    for store, role, member in _bindings(work):
        name = binding_name(store.name, role, member)
        if shared_by:
            work.keep("IamBinding", name, shared_by)
        elif (account is not None and account.is_ours) or ("IamBinding", name) in work.owned:
            work.note(remove_binding(store, role, member))
        elif has_binding(store, role, member):
            work.keep("IamBinding", name, "was there before")
    if account is None:
        return
    if not account.is_ours:
        work.keep("ServiceAccount", account.email, "made by somebody else")
    elif shared_by:
        work.keep("ServiceAccount", account.email, shared_by)
    else:
        work.note(accounts.delete(account.email))


def _bindings(work: _Teardown) -> list[tuple[PolicyStore, str, str]]:
    """The bindings that a rollout to this target makes, where their resource exists."""
    target = work.target
    bindings: list[tuple[PolicyStore, str, str]] = []
    if target.identity is IdentityMode.SERVICE_ACCOUNT and ServiceAccounts(target).get(target.gsa_email) is not None:
        policy = ServiceAccountPolicy(target, target.gsa_email)
        bindings.append((policy, WORKLOAD_IDENTITY_USER, target.workload_identity_member))
    if StorageClient(target).bucket_exists():
        number = Projects(target).get().number if target.identity is IdentityMode.DIRECT else ""
        bucket = BucketPolicy(target, target.bucket)
        bindings.append((bucket, OBJECT_VIEWER, target.reader_member(number)))
    known = {binding_name(store.name, role, member) for store, role, member in bindings}
    return bindings + [each for each in _granted(work) if binding_name(each[0].name, *each[1:]) not in known]


def _granted(work: _Teardown) -> list[tuple[PolicyStore, str, str]]:
    """The bindings on buckets of which a record says that we made them: for generated manifests, for transfers by pods.

    They name their bucket, which need not be the target's own.
    """
    granted: list[tuple[PolicyStore, str, str]] = []
    for kind, name in sorted(work.owned):
        if kind != "IamBinding" or not name.startswith("gs://"):
            continue
        uri, role, member = name.split(" ", 2)
        store = BucketPolicy(work.target, uri.removeprefix("gs://"))
        try:
            store.read()
        except BucketNotFound:
            continue  # and its bindings with it
        granted.append((store, role, member))
    return granted


def _remove_cluster(work: _Teardown, gke: Gke, cluster: ClusterInfo | None, shared_by: str) -> None:
    if cluster is None:
        return
    if not cluster.is_ours:
        work.keep("Cluster", cluster.name, "made by somebody else")
        pool = work.target.cluster.node_pool
        if pool is not None and ("NodePool", f"{cluster.name}/{pool.name}") in work.owned and not shared_by:
            work.note(gke.delete_node_pool(pool.name, timeout_s=work.deadline_s))
    elif shared_by or (shared_by := _used_by_others(work, cluster)):
        work.keep("Cluster", cluster.name, shared_by)
    else:
        work.note(gke.delete(timeout_s=work.deadline_s))


def _used_by_others(work: _Teardown, cluster: ClusterInfo) -> str:
    """What somebody else runs in a cluster of ours: it would go with it."""
    if cluster.connection is None:
        return ""
    try:
        foreign = ClusterClient.connect(work.target).foreign_pods()
    except PermissionMissing:
        return "may run pods that the caller may not list"
    return f"runs {', '.join(foreign[:3])}, which is not ours" if foreign else ""


def _remove_weights(work: _Teardown, shared_by: str) -> None:
    if work.weights is Weights.DELETE and not shared_by:
        elsewhere = RecordStore(work.target).served_elsewhere()
        shared_by = f"still serves {', '.join(elsewhere)}" if elsewhere else ""
    storage = StorageClient(work.target)
    bucket = f"gs://{work.target.bucket}"
    if not storage.bucket_exists():
        return
    for uri in sorted(name for kind, name in work.owned if kind == "Weights"):
        path = uri.removeprefix(bucket).strip("/")
        _remove_model_path(work, storage, uri, f"{path}/" if path else "", shared_by)
    for unfinished in unfinished_transfers(work.target):
        _remove_leftovers(work, f"{bucket}/{unfinished.prefix}".rstrip("/"), unfinished.prefix)
    if work.weights is Weights.KEEP:
        work.keep("Bucket", bucket, "weights are kept by policy")
        return
    foreign = [stored.name for stored in storage.list_objects() if not stored.name.startswith(RESERVED_FOLDER)]
    if foreign or shared_by:
        work.keep("Bucket", bucket, shared_by or f"still holds {len(foreign)} objects, e.g. {foreign[0]}")
        return
    storage.delete_prefix(RESERVED_FOLDER)  # records and measured stages
    work.note(storage.delete_bucket())


def _remove_model_path(work: _Teardown, storage: StorageClient, uri: str, prefix: str, shared_by: str) -> None:
    """What killed transfers left goes in any case; the weights if the policy says so and no other model serves."""
    if not _remove_leftovers(work, uri, prefix) or work.weights is Weights.KEEP:
        return
    if shared_by:
        work.keep("Weights", uri, shared_by)
        return
    for change in storage.delete_prefix(prefix):
        work.note(change)


def _remove_leftovers(work: _Teardown, uri: str, prefix: str) -> bool:
    """Remove what killed transfers left below a model path; False if somebody is writing there."""
    try:
        for change in remove_dead_leftovers(work.target, prefix):
            work.note(change)
    except AnotherWriter as error:
        work.keep("Weights", uri, error.summary)
        return False
    return True


def _take_inventory(work: _Teardown, shared_by: str) -> None:
    """Ask every service once more, as if nothing had been deleted."""
    target = work.target
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        _inventory_of_weights(work, shared_by)
        _inventory_of_objects(work)
        return
    _inventory_of_weights(work, shared_by)
    cluster = Gke(target).get()
    if cluster is not None:
        _inventory_of_objects(work)
        kept = any(change.kind == "Cluster" for change in work.kept)
        if cluster.is_ours and not kept:
            work.found("Cluster", cluster.name, cluster.status)
        for pool in cluster.node_pools:
            name = f"{cluster.name}/{pool.name}"
            if ("NodePool", name) in work.owned and not shared_by:
                work.found("NodePool", name, pool.status)
    if not shared_by:
        account = ServiceAccounts(target).get(target.gsa_email)
        if account is not None and account.is_ours:
            work.found("ServiceAccount", account.email, "still there")
        for store, role, member in _bindings(work):
            name = binding_name(store.name, role, member)
            if ("IamBinding", name) in work.owned and has_binding(store, role, member):
                work.found("IamBinding", name, "still granted")
    if cluster is None:
        _inventory_of_disks(work)


def _inventory_of_objects(work: _Teardown) -> None:
    try:
        client = ClusterClient.connect(work.target)
    except NotFound:
        return
    neighbours = _instances(client) - {(work.target.namespace, work.instance)}
    kept = {(change.kind, change.name) for change in work.kept}
    for manifest in removable(client.inventory(), work.instance, neighbours):
        if (manifest["kind"], object_name(manifest)) not in kept:
            work.found(manifest["kind"], object_name(manifest), "still there")


def _inventory_of_weights(work: _Teardown, shared_by: str) -> None:
    """What should have gone by the policy and is still in the bucket."""
    storage = StorageClient(work.target)
    kept = {change.name for change in work.kept if change.kind == "Weights"}
    if work.weights is Weights.KEEP or shared_by or not storage.bucket_exists():
        return
    for uri in sorted(name for kind, name in work.owned if kind == "Weights"):
        path = uri.removeprefix(f"gs://{work.target.bucket}").strip("/")
        if path and uri not in kept and (left := list(storage.list_objects(f"{path}/"))):
            work.found("Weights", uri, f"{len(left)} objects")


def _inventory_of_disks(work: _Teardown) -> None:
    try:
        disks = Compute(work.target).disks({_DISK_LABEL: work.target.cluster.name})
    except (PermissionMissing, ApiDisabled) as error:
        work.keep("Disk", "unknown", f"disks could not be listed: {error.summary}")
        return
    for disk in disks:
        work.found("Disk", f"{disk.zone}/{disk.name}", f"{disk.size_gib} GiB of a volume of {work.target.cluster.name}")
