"""GKE clusters: found, made as the documents say, observed, changed and deleted, with long-running operations followed.

Sources: the vLLM tutorial (`gcloud container clusters create-auto … --release-channel=rapid`) and the GKE Inference
Quickstart (Standard with a GPU node pool; `clusters update` with its observability flags).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.cloud import container_v1
from google.cloud.container_v1 import types

from rollout.clients.compute import Compute
from rollout.clients.google_auth import client_options, credentials_for, google_errors
from rollout.errors import (
    AlreadyExists,
    ApiDisabled,
    BadInput,
    ConcurrentChange,
    DeadlineExceeded,
    NotFound,
    PermissionMissing,
    QuotaExceeded,
    RolloutError,
    TransientError,
)
from rollout.report import Action, Change
from rollout.target import Cluster, ClusterMode, NodePool, Target
from rollout.values import Value

MANAGED_BY = {"managed-by": "llm-rollout"}
"""Resource label of the clusters that we made. (Google's labels take no dots or slashes.)"""

CLUSTER_TIMEOUT_S = 1800.0
"""GKE states 5 to 10 minutes for a new cluster; three times that."""

_FIRST_POLL_S = 0.2
_LONGEST_POLL_S = 5.0

LOGGING_COMPONENTS = ("SYSTEM_COMPONENTS", "WORKLOADS")
MONITORING_COMPONENTS = ("SYSTEM_COMPONENTS", "DEPLOYMENT", "HPA", "POD", "DCGM")
"""The quickstart's `--logging=SYSTEM,WORKLOAD --monitoring=SYSTEM,DEPLOYMENT,HPA,POD,DCGM`."""

DEFAULT_POOL_MACHINE = "e2-standard-4"
"""Standard clusters need a few ordinary cores for the system's pods; GPU nodes are tainted and repel them."""


class Progress(Value):
    """How far a long-running operation is."""

    operation: str
    """E.g. `CREATE_CLUSTER`."""
    status: str
    share: float | None = None
    """0 to 1, where GKE states its stages."""
    elapsed_s: float


OnProgress = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """Follow an operation without showing it."""


class Connection(Value):
    """How to reach a cluster's API server."""

    url: str
    ca_pem: str


class NodePoolInfo(Value):
    """A node pool as it is."""

    name: str
    status: str
    machine_type: str
    accelerator: str = ""
    accelerator_count: int = 0
    is_spot: bool = False
    boot_disk_gib: int = 0
    max_nodes: int = 0
    """Upper bound of its autoscaling; 0 without."""
    version: str = ""
    gpu_driver: str = ""
    """Which driver GKE installs, `default` or `latest`; empty where it installs none."""


class ClusterInfo(Value):
    """A cluster as it is."""

    name: str
    location: str
    status: str
    is_autopilot: bool
    version: str
    node_version: str = ""
    """Of most nodes; each pool has its own."""
    release_channel: str
    workload_pool: str
    """Empty without Workload Identity."""
    node_auto_provisioning: bool = False
    """Whether GKE may create node pools by itself; Autopilot always does."""
    labels: dict[str, str] = {}
    node_pools: tuple[NodePoolInfo, ...] = ()
    logging: tuple[str, ...] = ()
    monitoring: tuple[str, ...] = ()
    managed_prometheus: bool = False
    auto_monitoring: bool = False
    connection: Connection | None = None
    """None until there is a control plane."""

    @property
    def is_ours(self) -> bool:
        return MANAGED_BY.items() <= self.labels.items()

    @property
    def is_observable(self) -> bool:
        """Whether everything of the quickstart's observability is on."""
        return (
            set(LOGGING_COMPONENTS) <= set(self.logging)
            and set(MONITORING_COMPONENTS) <= set(self.monitoring)
            and self.managed_prometheus
            and self.auto_monitoring
        )


class ServerVersions(Value):
    """What GKE offers in a region."""

    default: str
    by_channel: dict[str, tuple[str, ...]]
    """Release channel in lower case (`rapid`) -> versions, its default first."""


class Gke:
    """The target's cluster, through GKE's API."""

    def __init__(self, target: Target) -> None:
        if target.cluster.mode is ClusterMode.KUBECONFIG:
            raise BadInput(
                "the cluster is named by a kubeconfig; GKE's API does not know it.", where=f"target {target.name}"
            )
        self._target = target
        self._wanted = target.cluster
        self._location = f"projects/{target.project}/locations/{target.region}"
        self._name = f"{self._location}/clusters/{target.cluster.name}"
        self._client = container_v1.ClusterManagerClient(
            credentials=credentials_for(target), client_options=client_options(target, "container"), transport="rest"
        )

    def get(self) -> ClusterInfo | None:
        """The cluster as it is, or None."""
        cluster = self._get()
        return None if cluster is None else _cluster_info(cluster)

    def server_versions(self) -> ServerVersions:
        """The versions that GKE offers in the region."""
        with google_errors(self._location):
            config = self._client.get_server_config(name=self._location)
        by_channel = {}
        for channel in config.channels:
            others = [version for version in channel.valid_versions if version != channel.default_version]
            by_channel[channel.channel.name.lower()] = (channel.default_version, *others)
        return ServerVersions(default=config.default_cluster_version, by_channel=by_channel)

    def ensure(
        self,
        labels: Mapping[str, str] | None = None,
        *,
        timeout_s: float = CLUSTER_TIMEOUT_S,
        on_progress: OnProgress = ignore_progress,
    ) -> tuple[ClusterInfo, Change]:
        """The running cluster: created, adopted, or ours already; an operation under way is joined, not refused.

        `NotFound` if it is absent and the target says not to make it; `QuotaExceeded` and `RolloutError` with GKE's
        words if it cannot be made; `DeadlineExceeded` after `timeout_s`, while GKE goes on.
        """
        follow = _Follower(self._client, self._location, timeout_s, on_progress)
        found = self._get()
        created = False
        if found is not None and found.status == types.Cluster.Status.STOPPING:
            follow.running_on(self._name)
            found = None
        if found is None:
            created = self._create(labels or {}, follow)
        elif found.status == types.Cluster.Status.PROVISIONING:
            follow.running_on(self._name)
        # Nothing else is awaited: a cluster serves while GKE upgrades its nodes, which can take hours.
        cluster = self.get()
        if cluster is None or cluster.status not in ("RUNNING", "RECONCILING"):
            state = "absent" if cluster is None else cluster.status
            raise RolloutError(
                f"the cluster is {state}.", where=self._name, resolution="Delete it, or choose another cluster name."
            )
        adopted = Action.UNCHANGED if cluster.is_ours else Action.ADOPTED
        return cluster, self._change(Action.CREATED if created else adopted, f"{self._wanted.mode} {cluster.version}")

    def ensure_node_pool(
        self, *, timeout_s: float = CLUSTER_TIMEOUT_S, on_progress: OnProgress = ignore_progress
    ) -> Change | None:
        """The target's GPU node pool on a Standard cluster; None where none is asked for or it is there.

        One that is being made, e.g. by a run that was killed, is awaited.
        """
        pool = self._wanted.node_pool
        if pool is None or self._wanted.mode is ClusterMode.AUTOPILOT:
            return None
        name = f"{self._name}/nodePools/{pool.name}"
        follow = _Follower(self._client, self._location, timeout_s, on_progress)
        try:
            with google_errors(name):
                wanted = gpu_node_pool(pool, self._zones_of(pool.accelerator))
                operation = self._client.create_node_pool(parent=self._name, node_pool=wanted)
        except AlreadyExists:
            with google_errors(name):
                found = self._client.get_node_pool(name=name)
            if found.status == types.NodePool.Status.PROVISIONING:
                follow.running_on(self._name)
            return None
        follow.until_done(operation)
        return Change(action=Action.CREATED, kind="NodePool", name=f"{self._wanted.name}/{pool.name}")

    def delete_node_pool(
        self, name: str, *, timeout_s: float = CLUSTER_TIMEOUT_S, on_progress: OnProgress = ignore_progress
    ) -> Change | None:
        """Delete a node pool and wait until it is gone; None if it was."""
        try:
            with google_errors(f"{self._name}/nodePools/{name}"):
                operation = self._client.delete_node_pool(name=f"{self._name}/nodePools/{name}")
        except NotFound:
            return None
        _Follower(self._client, self._location, timeout_s, on_progress).until_done(operation)
        return Change(action=Action.DELETED, kind="NodePool", name=f"{self._wanted.name}/{name}")

    def ensure_observability(
        self, *, timeout_s: float = CLUSTER_TIMEOUT_S, on_progress: OnProgress = ignore_progress
    ) -> Change | None:
        """The quickstart's `clusters update`; components that are on beside ours stay on. None if all is on already."""
        cluster = self._require()
        found = _cluster_info(cluster)
        if found.is_observable:
            return None
        update = types.ClusterUpdate(
            desired_logging_config=_logging(found.logging), desired_monitoring_config=_monitoring(found.monitoring)
        )
        with google_errors(self._name):
            operation = self._client.update_cluster(request={"name": self._name, "update": update})
        _Follower(self._client, self._location, timeout_s, on_progress).until_done(operation)
        return self._change(Action.UPDATED, "observability")

    def ensure_labels(
        self,
        labels: Mapping[str, str],
        *,
        timeout_s: float = CLUSTER_TIMEOUT_S,
        on_progress: OnProgress = ignore_progress,
    ) -> Change | None:
        """Add resource labels; others stay. `ConcurrentChange` if somebody else labels it at the same moment."""
        cluster = self._require()
        if labels.items() <= dict(cluster.resource_labels).items():
            return None
        request = types.SetLabelsRequest(
            name=self._name,
            resource_labels=dict(cluster.resource_labels) | dict(labels),
            label_fingerprint=cluster.label_fingerprint,
        )
        try:
            with google_errors(self._name):
                operation = self._client.set_labels(request=request)
        except BadInput as error:
            if "fingerprint" in error.summary:
                raise ConcurrentChange(error.summary, where=self._name, resolution="Run again.") from error
            raise
        _Follower(self._client, self._location, timeout_s, on_progress).until_done(operation)
        return self._change(Action.UPDATED, "labels")

    def delete(
        self, *, timeout_s: float = CLUSTER_TIMEOUT_S, on_progress: OnProgress = ignore_progress
    ) -> Change | None:
        """Delete the cluster and wait until it is gone; None if it was. Operations under way are awaited first."""
        follow = _Follower(self._client, self._location, timeout_s, on_progress)
        try:
            operation = self._start_deletion(follow)
        except NotFound:
            return None
        follow.until_done(operation)
        return self._change(Action.DELETED, "")

    def _start_deletion(self, follow: _Follower) -> types.Operation:
        try:
            with google_errors(self._name):
                return self._client.delete_cluster(name=self._name)
        except TransientError:
            # Busy with an operation, e.g. the creation that a killed run began.
            follow.running_on(self._name)
            with google_errors(self._name):
                return self._client.delete_cluster(name=self._name)

    def _zones_of(self, accelerator: str) -> tuple[str, ...]:
        """The region's zones that offer it; empty where the caller may not ask."""
        try:
            return Compute(self._target).accelerators().get(accelerator, ())
        except (PermissionMissing, ApiDisabled):
            return ()

    def _create(self, labels: Mapping[str, str], follow: _Follower) -> bool:
        """True if it was us who made it."""
        if not self._wanted.create_if_absent:
            raise NotFound(
                "there is no such cluster, and the target says not to make it.",
                where=self._name,
                resolution="Create it, or set cluster.create_if_absent to true.",
            )
        pool = self._wanted.node_pool if self._wanted.mode is ClusterMode.STANDARD else None
        zones = self._zones_of(pool.accelerator) if pool is not None else ()
        cluster = new_cluster(self._target, MANAGED_BY | dict(labels), zones)
        try:
            with google_errors(self._name):
                operation = self._client.create_cluster(parent=self._location, cluster=cluster)
        except AlreadyExists:
            # Somebody was faster; we wait for theirs.
            follow.running_on(self._name)
            return False
        follow.until_done(operation)
        return True

    def _get(self) -> types.Cluster | None:
        try:
            with google_errors(self._name):
                return self._client.get_cluster(name=self._name)
        except NotFound:
            return None

    def _require(self) -> types.Cluster:
        cluster = self._get()
        if cluster is None:
            raise NotFound("there is no such cluster.", where=self._name, resolution="Create it first.")
        return cluster

    def _change(self, action: Action, detail: str) -> Change:
        return Change(action=action, kind="Cluster", name=self._wanted.name, detail=detail)


class _Follower:
    """Follows operations within one deadline; a lost answer is no failure as long as time is left."""

    def __init__(
        self,
        client: container_v1.ClusterManagerClient,
        location: str,
        timeout_s: float,
        on_progress: OnProgress,
    ) -> None:
        self._client = client
        self._location = location
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._started = time.monotonic()

    def running_on(self, cluster: str) -> None:
        """Follow what is under way on a cluster, e.g. started by an earlier run that was killed."""
        name = cluster.rpartition("/")[2]
        with google_errors(cluster):
            operations = self._client.list_operations(parent=self._location).operations
        for operation in operations:
            # The trailing slash tells `llm` from `llm-2`; node pools stand below their cluster.
            on_this = f"/clusters/{name}/" in f"{operation.target_link}/"
            if on_this and operation.status != types.Operation.Status.DONE:
                self.until_done(operation)

    def until_done(self, operation: types.Operation) -> None:
        """Return when the operation is done; raise what it failed with."""
        name = f"{self._location}/operations/{operation.name}"
        pause_s = _FIRST_POLL_S
        while operation.status != types.Operation.Status.DONE:
            elapsed_s = time.monotonic() - self._started
            self._on_progress(_progress(operation, elapsed_s))
            if elapsed_s > self._timeout_s:
                raise DeadlineExceeded(
                    f"{operation.operation_type.name} is {operation.status.name} after {elapsed_s:.0f} s.",
                    where=name,
                    resolution="GKE goes on: run again to wait further.",
                )
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_POLL_S)
            operation = self._refresh(name, operation)
        self._on_progress(_progress(operation, time.monotonic() - self._started))
        if operation.error.code:
            raise _operation_failure(operation, name)

    def _refresh(self, name: str, operation: types.Operation) -> types.Operation:
        try:
            with google_errors(name):
                return self._client.get_operation(name=name)
        except TransientError:
            return operation


def _operation_failure(operation: types.Operation, name: str) -> RolloutError:
    message = operation.error.message or operation.status_message
    lowered = message.lower()
    if "quota" in lowered:
        return QuotaExceeded(message, where=name, resolution="Ask for more quota, or use another machine or region.")
    if "stockout" in lowered or "does not have enough resources" in lowered:
        return RolloutError(
            message, where=name, resolution="The zone has no such machines left: another zone, region, or reservation."
        )
    return RolloutError(message, where=name, resolution="Delete what is half-made, then run again.")


def _progress(operation: types.Operation, elapsed_s: float) -> Progress:
    figures = {metric.name: metric.int_value for metric in operation.progress.metrics}
    totals = {name: value for name, value in figures.items() if name.endswith("_TOTAL")}
    done = sum(value for name, value in figures.items() if name not in totals)
    share: float | None = None
    if operation.status == types.Operation.Status.DONE:
        share = 1.0
    elif sum(totals.values()):
        share = done / sum(totals.values())
    return Progress(
        operation=operation.operation_type.name, status=operation.status.name, share=share, elapsed_s=elapsed_s
    )


def new_cluster(target: Target, labels: Mapping[str, str], zones: Sequence[str] = ()) -> types.Cluster:
    """The cluster to create for a target: Autopilot as in the tutorial, or Standard with the GPU node pool."""
    wanted = target.cluster
    cluster = types.Cluster(
        name=wanted.name,
        resource_labels=dict(labels),
        release_channel=types.ReleaseChannel(channel=wanted.release_channel.upper()),
    )
    if wanted.observability:
        cluster.logging_config = _logging(())
        cluster.monitoring_config = _monitoring(())
    if wanted.mode is ClusterMode.AUTOPILOT:
        cluster.autopilot = types.Autopilot(enabled=True)
        return cluster
    return _as_standard(cluster, wanted, target, zones)


def _as_standard(cluster: types.Cluster, wanted: Cluster, target: Target, zones: Sequence[str]) -> types.Cluster:
    # Autopilot has these two by itself; loading from a bucket needs the first, older vLLM images the second.
    cluster.workload_identity_config = types.WorkloadIdentityConfig(
        workload_pool=target.universe.workload_pool(target.project)
    )
    cluster.addons_config = types.AddonsConfig(gcs_fuse_csi_driver_config=types.GcsFuseCsiDriverConfig(enabled=True))
    cluster.node_pools = [
        types.NodePool(
            name="default-pool",
            initial_node_count=1,
            config=types.NodeConfig(machine_type=DEFAULT_POOL_MACHINE, workload_metadata_config=_GKE_METADATA),
        )
    ]
    if wanted.node_pool is not None:
        cluster.node_pools.append(gpu_node_pool(wanted.node_pool, zones))
    return cluster


_GKE_METADATA = types.WorkloadMetadataConfig(mode=types.WorkloadMetadataConfig.Mode.GKE_METADATA)
"""Without it, pods on the node get the node's identity instead of their own."""


def gpu_node_pool(pool: NodePool, zones: Sequence[str] = ()) -> types.NodePool:
    """A GPU node pool that scales between the target's bounds, with GKE installing the driver.

    `zones` are those that offer the accelerator: GKE refuses a pool in the others; none leaves it to the cluster's. It
    begins empty: `initial_node_count` counts per zone, so one node would be three idle ones in a regional cluster.
    """
    accelerator = types.AcceleratorConfig(
        accelerator_type=pool.accelerator,
        accelerator_count=pool.accelerator_count,
        gpu_driver_installation_config=types.GPUDriverInstallationConfig(
            gpu_driver_version=types.GPUDriverInstallationConfig.GPUDriverVersion.DEFAULT
        ),
    )
    return types.NodePool(
        name=pool.name,
        initial_node_count=0,
        locations=list(zones),
        autoscaling=types.NodePoolAutoscaling(
            enabled=True, total_min_node_count=pool.min_nodes, total_max_node_count=pool.max_nodes
        ),
        config=types.NodeConfig(
            machine_type=pool.machine_type,
            accelerators=[accelerator],
            disk_size_gb=pool.boot_disk_gib,
            spot=pool.spot,
            workload_metadata_config=_GKE_METADATA,
            resource_labels=MANAGED_BY,
        ),
    )


def _logging(present: tuple[str, ...]) -> types.LoggingConfig:
    components: Any = sorted({*present, *LOGGING_COMPONENTS})
    return types.LoggingConfig(component_config=types.LoggingComponentConfig(enable_components=components))


def _monitoring(present: tuple[str, ...]) -> types.MonitoringConfig:
    components: Any = sorted({*present, *MONITORING_COMPONENTS})
    return types.MonitoringConfig(
        component_config=types.MonitoringComponentConfig(enable_components=components),
        managed_prometheus_config=types.ManagedPrometheusConfig(
            enabled=True,
            auto_monitoring_config=types.AutoMonitoringConfig(scope=types.AutoMonitoringConfig.Scope.ALL),
        ),
    )


def _cluster_info(cluster: types.Cluster) -> ClusterInfo:
    prometheus = cluster.monitoring_config.managed_prometheus_config
    connection = None
    if cluster.endpoint:
        ca_pem = base64.b64decode(cluster.master_auth.cluster_ca_certificate).decode()
        connection = Connection(url=f"https://{cluster.endpoint}", ca_pem=ca_pem)
    return ClusterInfo(
        name=cluster.name,
        location=cluster.location,
        status=cluster.status.name,
        is_autopilot=cluster.autopilot.enabled,
        version=cluster.current_master_version,
        node_version=cluster.current_node_version,
        release_channel=cluster.release_channel.channel.name.lower(),
        workload_pool=cluster.workload_identity_config.workload_pool,
        node_auto_provisioning=cluster.autopilot.enabled or cluster.autoscaling.enable_node_autoprovisioning,
        labels=dict(cluster.resource_labels),
        node_pools=tuple(_pool_info(pool) for pool in cluster.node_pools),
        logging=tuple(component.name for component in cluster.logging_config.component_config.enable_components),
        monitoring=tuple(component.name for component in cluster.monitoring_config.component_config.enable_components),
        managed_prometheus=prometheus.enabled,
        auto_monitoring=prometheus.auto_monitoring_config.scope == types.AutoMonitoringConfig.Scope.ALL,
        connection=connection,
    )


def _pool_info(pool: types.NodePool) -> NodePoolInfo:
    accelerator = next(iter(pool.config.accelerators), None)
    return NodePoolInfo(
        name=pool.name,
        status=pool.status.name,
        machine_type=pool.config.machine_type,
        accelerator=accelerator.accelerator_type if accelerator else "",
        accelerator_count=accelerator.accelerator_count if accelerator else 0,
        is_spot=pool.config.spot,
        boot_disk_gib=pool.config.disk_size_gb,
        max_nodes=pool.autoscaling.total_max_node_count or pool.autoscaling.max_node_count * len(pool.locations),
        version=pool.version,
        gpu_driver=_DRIVERS.get(accelerator.gpu_driver_installation_config.gpu_driver_version, "")
        if accelerator
        else "",
    )


_DRIVERS = {
    types.GPUDriverInstallationConfig.GPUDriverVersion.DEFAULT: "default",
    types.GPUDriverInstallationConfig.GPUDriverVersion.LATEST: "latest",
}
