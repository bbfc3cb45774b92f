"""GKE v1: clusters, node pools, long-running operations and the server's versions.

Simulated: Autopilot and Standard clusters (create, get, list, delete), updates of logging, monitoring, add-ons,
release channel and Workload Identity, labels with fingerprints, node pools (create, get, list, delete) with GPU quota,
operations with progress that run in real time and end also across a restart, refusal of a second operation on a busy
cluster, and failing operations on request. The first cluster with Workload Identity creates the project's workload
pool, as in reality. Not simulated: the old `/zones/` paths, upgrades, resizing, networks, other kinds of update (501).
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Callable
from typing import Any

from google.cloud import container_v1
from google.protobuf import json_format

from sandbox.google_apis.catalogue import ACCELERATORS, CHANNEL_VERSIONS, MACHINE_TYPES
from sandbox.google_apis.cloud import Cloud
from sandbox.google_apis.rest import ApiError, Call, Json, Route, bad_request, error_info, not_simulated

SERVICE = "container.googleapis.com"

_CLUSTER_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_CREATE_STAGES = (("CLUSTER_CONFIGURING", 8), ("CLUSTER_DEPLOYING", 12), ("CLUSTER_HEALTHCHECKING", 2))
"""Progress metrics of a cluster's creation, each with its total; the last one stops one short, as the real one does."""

_VERSIONS = tuple(version for channel in CHANNEL_VERSIONS.values() for version in channel)

_UPDATES = {
    "desiredLoggingConfig": "loggingConfig",
    "desiredMonitoringConfig": "monitoringConfig",
    "desiredAddonsConfig": "addonsConfig",
    "desiredReleaseChannel": "releaseChannel",
    "desiredWorkloadIdentityConfig": "workloadIdentityConfig",
}
_ONE_UPDATE = frozenset({"desiredLoggingConfig", "desiredMonitoringConfig"})
"""What may come in one request; everything else comes alone."""

_AUTO_CREATED = "nap-"
"""How GKE begins the names of node pools that it creates by itself."""

_CANCELLED, _RESOURCE_EXHAUSTED = 1, 8
"""Codes of google.rpc.Code that operations end with."""

_BUSY = {
    "CREATE_CLUSTER": "creating",
    "DELETE_CLUSTER": "deleting",
    "CREATE_NODE_POOL": "creating a node pool of",
    "DELETE_NODE_POOL": "deleting a node pool of",
}
_MONITORING = [
    "SYSTEM_COMPONENTS",
    "DAEMONSET",
    "DEPLOYMENT",
    "STATEFULSET",
    "JOBSET",
    "STORAGE",
    "HPA",
    "POD",
    "CADVISOR",
    "KUBELET",
    "DCGM",
]


class Container:
    def __init__(self, cloud: Cloud, *, kubernetes_endpoint: str, kubernetes_ca_pem: str) -> None:
        self._cloud = cloud
        self.kubernetes_endpoint = kubernetes_endpoint
        self.kubernetes_ca_pem = kubernetes_ca_pem
        self.next_failure: str | None = None
        self.on_nodes_gone: Callable[[list[str]], None] = lambda _: None
        """Told the names of the nodes that ended with their cluster. Must not block."""

    def routes(self) -> list[Route]:
        location = "projects/{project}/locations/{location}"
        cluster = location + "/clusters/{cluster}"
        pool = cluster + "/nodePools/{pool}"
        operation = location + "/operations/{operation}"

        def route(method: str, path: str, verb: str, handler: Any, resource: str) -> Route:
            return Route(method, f"/v1/{path}", SERVICE, f"container.{verb}", handler, resource=resource)

        return [
            route("GET", location + "/serverConfig", "clusters.list", self._server_config, location),
            route("POST", location + "/clusters", "clusters.create", self._create, "projects/{project}"),
            route("GET", location + "/clusters", "clusters.list", self._list, "projects/{project}"),
            route("GET", cluster, "clusters.get", self._get, cluster),
            route("PUT", cluster, "clusters.update", self._update, cluster),
            route("DELETE", cluster, "clusters.delete", self._delete, cluster),
            route("POST", cluster + ":setResourceLabels", "clusters.update", self._set_labels, cluster),
            route("POST", cluster + "/nodePools", "clusters.update", self._create_pool, cluster),
            route("GET", cluster + "/nodePools", "clusters.get", self._list_pools, cluster),
            route("GET", pool, "clusters.get", self._get_pool, cluster),
            route("DELETE", pool, "clusters.update", self._delete_pool, cluster),
            route("GET", location + "/operations", "operations.list", self._list_operations, location),
            route("GET", operation, "operations.get", self._get_operation, operation),
            route("POST", operation + ":cancel", "clusters.update", self._cancel_operation, operation),
        ]

    # --- what time does -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish the operations whose time has come."""
        operations = self._cloud.store.data["container_operations"]
        for operation in sorted(operations.values(), key=lambda one: float(one["due"])):
            if operation["status"] != "DONE" and operation["due"] <= self._cloud.now():
                self._finish(operation)

    def _finish(self, operation: Json) -> None:
        data = self._cloud.store.data
        clusters = data["clusters"]
        operation["status"] = "DONE"
        operation["ended"] = operation["due"]
        key, pool = operation["cluster"], operation.get("pool")
        if operation["failure"]:
            operation["error"] = {"code": operation["failure_code"], "message": operation["failure"]}
            self._mark_failed(operation)
        elif operation["type"] == "DELETE_CLUSTER":
            clusters.pop(key, None)
            self._forget_nodes(key)
        elif operation["type"] == "DELETE_NODE_POOL":
            self._forget_nodes(key, pool)
            clusters[key]["nodePools"] = [one for one in clusters[key]["nodePools"] if one["name"] != pool]
        elif operation["type"] == "CREATE_NODE_POOL":
            for one in clusters[key]["nodePools"]:
                one["status"] = "RUNNING" if one["name"] == pool else one["status"]
        else:
            clusters[key].update(operation["changes"])
        cluster = clusters.get(key)
        if cluster and not operation["failure"]:
            cluster["status"] = "RUNNING"
        if cluster and cluster.get("workloadIdentityConfig") and cluster["status"] == "RUNNING":
            data["workload_pool_exists"] = True

    def _mark_failed(self, operation: Json) -> None:
        cluster = self._cloud.store.data["clusters"][operation["cluster"]]
        if operation["type"] == "CREATE_CLUSTER":
            cluster |= {"status": "ERROR", "statusMessage": operation["failure"]}
            return
        cluster["status"] = "RUNNING"
        for pool in cluster["nodePools"]:
            if pool["name"] == operation.get("pool"):
                pool |= {"status": "ERROR", "statusMessage": operation["failure"]}

    # --- clusters -------------------------------------------------------------------------------------------------

    def _create(self, call: Call) -> Any:
        request = container_v1.CreateClusterRequest.pb(container_v1.CreateClusterRequest())
        asked = json_format.MessageToDict(call.parse(request).cluster)
        location = self._location(call)
        name = asked.get("name", "")
        if not _CLUSTER_NAME.fullmatch(name):
            raise bad_request(
                "cluster.name",
                f'Invalid value for field "cluster.name": "{name}". Must be a match of regex '
                "(?:[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?).",
            )
        key = f"{location}/{name}"
        clusters = self._cloud.store.data["clusters"]
        if key in clusters:
            raise ApiError("ALREADY_EXISTS", f"Already exists: {self._name(key)}.")
        self._validate(asked, location)
        clusters[key] = self._new_cluster(asked, location)
        return self._start("CREATE_CLUSTER", key, self._cloud.delays.cluster_creation_s)

    def _validate(self, asked: Json, location: str) -> None:
        pool = asked.get("workloadIdentityConfig", {}).get("workloadPool", self._cloud.workload_pool)
        if pool != self._cloud.workload_pool:
            raise ApiError(
                "INVALID_ARGUMENT",
                f'Invalid value for workload_pool: "{pool}". The only valid value is "{self._cloud.workload_pool}".',
            )
        wanted_version = asked.get("initialClusterVersion")
        if wanted_version and wanted_version not in _VERSIONS:
            raise ApiError("INVALID_ARGUMENT", f'No valid versions with the prefix "{wanted_version}" found.')
        if asked.get("autopilot", {}).get("enabled"):
            if location != self._cloud.region:
                raise ApiError("INVALID_ARGUMENT", "Autopilot clusters must be regional clusters.")
            if asked.get("nodePools"):
                raise ApiError("INVALID_ARGUMENT", "Node pools cannot be specified for Autopilot clusters.")
            return
        pools = asked.get("nodePools", [])
        if not pools and asked.get("initialNodeCount", 0) < 1:
            raise ApiError("INVALID_ARGUMENT", "Cluster.initial_node_count must be greater than zero.")
        for one in pools:
            self._validate_pool(one, {"locations": asked.get("locations") or self._zones_of(location)})

    def _new_cluster(self, asked: Json, location: str) -> Json:
        autopilot = bool(asked.get("autopilot", {}).get("enabled"))
        channel = asked.get("releaseChannel", {}).get("channel", "REGULAR")
        newest = CHANNEL_VERSIONS.get(channel, CHANNEL_VERSIONS["REGULAR"])[0]
        version = asked.get("initialClusterVersion", newest)
        default_pool = {"name": "default-pool", "initialNodeCount": asked.get("initialNodeCount", 1)}
        pools = asked.get("nodePools") or [default_pool]
        enabled_when_autopilot = {"enabled": True} if autopilot else {}
        cluster: Json = {
            "addonsConfig": {
                "gcePersistentDiskCsiDriverConfig": {"enabled": True},
                "gcsFuseCsiDriverConfig": enabled_when_autopilot,
                "kubernetesDashboard": {"disabled": True},
                "networkPolicyConfig": {"disabled": True},
            },
            "autopilot": enabled_when_autopilot,
            "loggingConfig": {"componentConfig": {"enableComponents": ["SYSTEM_COMPONENTS", "WORKLOADS"]}},
            "monitoringConfig": {
                "componentConfig": {"enableComponents": list(_MONITORING)},
                "managedPrometheusConfig": {"enabled": True},
            },
            "network": "default",
            "releaseChannel": {"channel": channel},
            "resourceLabels": {},
            "subnetwork": "default",
        }
        if autopilot:
            cluster["workloadIdentityConfig"] = {"workloadPool": self._cloud.workload_pool}
        cluster |= {field: value for field, value in asked.items() if field != "nodePools"}
        return cluster | {
            "createTime": self._cloud.timestamp(),
            "currentMasterVersion": version,
            "currentNodeVersion": version,
            "id": secrets.token_hex(32),
            "initialClusterVersion": version,
            "labelFingerprint": _fingerprint(cluster["resourceLabels"]),
            "location": location,
            "locations": asked.get("locations") or self._zones_of(location),
            "nodePools": [self._new_pool(pool, version) | {"status": "RUNNING"} for pool in pools],
            "status": "PROVISIONING",
            "zone": location,
        }

    def _get(self, call: Call) -> Any:
        return self._shown(self._key(call))

    def _list(self, call: Call) -> Any:
        if call.params["location"] != "-":
            self._location(call)
        clusters = self._cloud.store.data["clusters"]
        wanted = [key for key in clusters if call.params["location"] in ("-", key.partition("/")[0])]
        answer = container_v1.ListClustersResponse.pb(container_v1.ListClustersResponse())
        for key in wanted:
            answer.clusters.append(self._shown(key))
        return answer

    def _delete(self, call: Call) -> Any:
        key = self._key(call)
        self._require_idle(key)
        self._cloud.store.data["clusters"][key]["status"] = "STOPPING"
        return self._start("DELETE_CLUSTER", key, self._cloud.delays.cluster_change_s)

    def _update(self, call: Call) -> Any:
        request = container_v1.UpdateClusterRequest.pb(container_v1.UpdateClusterRequest())
        update = json_format.MessageToDict(call.parse(request).update)
        key = self._key(call)
        if not update:
            raise ApiError("INVALID_ARGUMENT", "Must specify a field to update.")
        if len(update) > 1 and not update.keys() <= _ONE_UPDATE:
            raise ApiError("INVALID_ARGUMENT", "Exactly one update can be applied to a cluster with each request.")
        if unknown := [field for field in update if field not in _UPDATES]:
            raise not_simulated(f"the update of clusters by {unknown[0]}")
        self._require_running(key)
        cluster = self._cloud.store.data["clusters"][key]
        changes = {}
        for field, value in update.items():
            before = cluster.get(_UPDATES[field], {})
            # Add-ons and monitoring take what is given and keep the rest.
            changes[_UPDATES[field]] = before | value
        cluster["status"] = "RECONCILING"
        return self._start("UPDATE_CLUSTER", key, self._cloud.delays.cluster_change_s, changes=changes)

    def _set_labels(self, call: Call) -> Any:
        request = call.parse(container_v1.SetLabelsRequest.pb(container_v1.SetLabelsRequest()))
        key = self._key(call)
        cluster = self._cloud.store.data["clusters"][key]
        if request.label_fingerprint != cluster["labelFingerprint"]:
            raise ApiError("FAILED_PRECONDITION", "Labels could not be set due to fingerprint mismatch.")
        self._require_running(key)
        labels = dict(request.resource_labels)
        changes = {"resourceLabels": labels, "labelFingerprint": _fingerprint(labels)}
        return self._start("UPDATE_CLUSTER", key, self._cloud.delays.cluster_change_s, changes=changes)

    def _shown(self, key: str) -> Any:
        """The cluster as the API shows it: the endpoint and the CA appear with the control plane."""
        stored = self._cloud.store.data["clusters"][key]
        nodes = sum(_node_count(pool, stored) for pool in stored["nodePools"]) + len(self._nodes_of(key))
        shown = stored | {"currentNodeCount": nodes, "selfLink": self._link(key)}
        if stored["status"] != "PROVISIONING" and self.kubernetes_endpoint:
            # A bare host, as GKE answers; a port may follow because loopback has but one 443.
            certificate = base64.b64encode(self.kubernetes_ca_pem.encode()).decode()
            shown["endpoint"] = self.kubernetes_endpoint.removeprefix("https://")
            shown["masterAuth"] = {"clientCertificateConfig": {}, "clusterCaCertificate": certificate}
        return json_format.ParseDict(shown, container_v1.Cluster.pb(container_v1.Cluster()))

    # --- node pools -----------------------------------------------------------------------------------------------

    def register_node_pool(self, key: str, pool: Json) -> None:
        """Add a running pool, as node auto-creation does; one of that name is replaced."""
        cluster = self._cloud.store.data["clusters"][key]
        # An auto-created pool stands in one zone, where the pod can run.
        pool = {"locations": [self._cloud.zones[0]]} | pool
        made = self._new_pool(pool, cluster["currentNodeVersion"]) | {"status": "RUNNING"}
        cluster["nodePools"] = [one for one in cluster["nodePools"] if one["name"] != pool["name"]] + [made]

    def unregister_node_pool(self, key: str, name: str) -> None:
        """Remove a pool, as scale-down of an auto-created pool does."""
        cluster = self._cloud.store.data["clusters"].get(key)
        if cluster:
            cluster["nodePools"] = [one for one in cluster["nodePools"] if one["name"] != name]

    def add_node(self, name: str, *, machine_type: str, accelerator: str, gpus: int) -> str | None:
        """A node boots for a pod: in the cluster's pool of that machine, or in one that auto-creation makes.

        One Kubernetes server plays all clusters of the embedded cloud, so the node belongs to the one made last.
        Returns that cluster's name; None without one.
        """
        clusters = self._cloud.store.data["clusters"]
        running = [key for key, one in clusters.items() if one["status"] in ("RUNNING", "RECONCILING")]
        if not running:
            return None
        key = max(running, key=lambda one: str(clusters[one]["createTime"]))
        pools = clusters[key]["nodePools"]
        pool = next((one["name"] for one in pools if one["config"]["machineType"] == machine_type), None)
        if pool is None:
            pool = f"{_AUTO_CREATED}{machine_type[:24]}-{secrets.token_hex(4)}"
            config: Json = {"machineType": machine_type}
            if gpus:
                config["accelerators"] = [{"acceleratorType": accelerator, "acceleratorCount": str(gpus)}]
            self.register_node_pool(key, {"name": pool, "initialNodeCount": 0, "config": config})
        node = {"cluster": key, "pool": pool, "accelerator": accelerator, "gpus": gpus}
        self._cloud.store.data["nodes"][name] = node
        return key.partition("/")[2]

    def remove_node(self, name: str) -> None:
        """A node is gone; an auto-created pool goes with its last one."""
        nodes = self._cloud.store.data["nodes"]
        node = nodes.pop(name, None)
        if node is None or not node["pool"].startswith(_AUTO_CREATED):
            return
        if all((one["cluster"], one["pool"]) != (node["cluster"], node["pool"]) for one in nodes.values()):
            self.unregister_node_pool(node["cluster"], node["pool"])

    def _forget_nodes(self, key: str, pool: str | None = None) -> None:
        """The nodes of a cluster, or of one of its pools, end with it, and so do their boot disks."""
        data = self._cloud.store.data
        gone = [name for name, node in self._nodes_of(key).items() if pool in (None, node["pool"])]
        for name in gone:
            del data["nodes"][name]
            data["disks"].pop(name, None)
        if gone:
            self.on_nodes_gone(gone)

    def _nodes_of(self, key: str) -> dict[str, Json]:
        return {name: node for name, node in self._cloud.store.data["nodes"].items() if node["cluster"] == key}

    def _create_pool(self, call: Call) -> Any:
        request = container_v1.CreateNodePoolRequest.pb(container_v1.CreateNodePoolRequest())
        pool = json_format.MessageToDict(call.parse(request).node_pool)
        key = self._key(call)
        cluster = self._cloud.store.data["clusters"][key]
        if cluster["autopilot"].get("enabled"):
            raise ApiError("INVALID_ARGUMENT", "Autopilot node pools cannot be accessed or modified.")
        if any(one["name"] == pool.get("name") for one in cluster["nodePools"]):
            raise ApiError("ALREADY_EXISTS", f"Already exists: {self._name(key)}/nodePools/{pool['name']}.")
        self._validate_pool(pool, cluster)
        self._require_running(key)
        made = self._new_pool(pool, cluster["currentNodeVersion"]) | {"status": "PROVISIONING"}
        cluster["nodePools"].append(made)
        return self._start("CREATE_NODE_POOL", key, self._cloud.delays.node_pool_s, pool=pool["name"])

    def _validate_pool(self, pool: Json, cluster: Json) -> None:
        if not _CLUSTER_NAME.fullmatch(pool.get("name", "")):
            raise bad_request("node_pool.name", f'Invalid value for field "node_pool.name": "{pool.get("name", "")}".')
        config = pool.get("config", {})
        machine = MACHINE_TYPES.get(config.get("machineType", "e2-medium"))
        if machine is None:
            raise ApiError(
                "INVALID_ARGUMENT", f'Machine type with name "{config["machineType"]}" does not exist in zone.'
            )
        for accelerator in config.get("accelerators", []):
            kind, count = accelerator.get("acceleratorType", ""), int(accelerator.get("acceleratorCount", 0))
            if kind not in ACCELERATORS:
                raise ApiError(
                    "INVALID_ARGUMENT", f'Accelerator type "{kind}" does not exist in zone {self._cloud.zones[0]}.'
                )
            if (kind, count) != (machine.accelerator, machine.accelerator_count):
                raise ApiError(
                    "INVALID_ARGUMENT",
                    f"[{machine.name}] is not compatible with guest accelerators {count} x {kind}.",
                )
            self._require_quota(kind, count * _node_count(pool, cluster), spot=bool(config.get("spot")))

    def _require_quota(self, accelerator: str, wanted: int, *, spot: bool) -> None:
        metric = ("PREEMPTIBLE_" if spot else "") + ACCELERATORS[accelerator][2]
        limit = self._cloud.quotas.get(metric, 0.0)
        available = limit - self.quota_usage().get(metric, 0.0)
        if wanted > available:
            raise ApiError(
                "PERMISSION_DENIED",
                f'Insufficient regional quota to satisfy request: resource "{metric}": '
                f"request requires '{wanted:.1f}' and "
                f"is short '{wanted - available:.1f}'. project has a quota of '{limit:.1f}' with '{available:.1f}' "
                f"available. View and manage quotas at https://console.cloud.google.com/iam-admin/quotas?usage=USED"
                f"&project={self._cloud.project}.",
            )

    def quota_usage(self) -> dict[str, float]:
        """GPUs in use by quota metric: of the pools' initial nodes, and of those that pods made boot."""
        usage: dict[str, float] = {}
        for cluster in self._cloud.store.data["clusters"].values():
            for pool in cluster["nodePools"]:
                for accelerator in pool["config"].get("accelerators", []):
                    prefix = "PREEMPTIBLE_" if pool["config"].get("spot") else ""
                    metric = prefix + ACCELERATORS[accelerator["acceleratorType"]][2]
                    gpus = int(accelerator["acceleratorCount"]) * _node_count(pool, cluster)
                    usage[metric] = usage.get(metric, 0.0) + gpus
        for node in self._cloud.store.data["nodes"].values():
            if node["accelerator"] in ACCELERATORS:
                metric = ACCELERATORS[node["accelerator"]][2]
                usage[metric] = usage.get(metric, 0.0) + node["gpus"]
        return usage

    def _new_pool(self, pool: Json, version: str) -> Json:
        config = {
            "diskSizeGb": 100,
            "diskType": "pd-balanced",
            "imageType": "COS_CONTAINERD",
            "machineType": "e2-medium",
            "metadata": {"disable-legacy-endpoints": "true"},
            "serviceAccount": "default",
        }
        return pool | {
            "config": config | pool.get("config", {}),
            "management": {"autoRepair": True, "autoUpgrade": True} | pool.get("management", {}),
            "version": version,
        }

    def _get_pool(self, call: Call) -> Any:
        return self._shown_pool(self._pool(call))

    def _list_pools(self, call: Call) -> Any:
        answer = container_v1.ListNodePoolsResponse.pb(container_v1.ListNodePoolsResponse())
        for pool in self._cloud.store.data["clusters"][self._key(call)]["nodePools"]:
            answer.node_pools.append(self._shown_pool(pool))
        return answer

    def _delete_pool(self, call: Call) -> Any:
        pool = self._pool(call)
        key = self._key(call)
        if self._cloud.store.data["clusters"][key]["autopilot"].get("enabled"):
            raise ApiError("INVALID_ARGUMENT", "Autopilot node pools cannot be accessed or modified.")
        self._require_running(key)
        pool["status"] = "STOPPING"
        return self._start("DELETE_NODE_POOL", key, self._cloud.delays.node_pool_s, pool=pool["name"])

    def _pool(self, call: Call) -> Json:
        key = self._key(call)
        for pool in self._cloud.store.data["clusters"][key]["nodePools"]:
            if pool["name"] == call.params["pool"]:
                found: Json = pool
                return found
        raise ApiError("NOT_FOUND", f'nodePool "{self._name(key)}/nodePools/{call.params["pool"]}" not found')

    def _shown_pool(self, pool: Json) -> Any:
        return json_format.ParseDict(pool, container_v1.NodePool.pb(container_v1.NodePool()))

    # --- operations -----------------------------------------------------------------------------------------------

    def _start(self, kind: str, key: str, seconds: float, *, pool: str = "", changes: Json | None = None) -> Any:
        now = self._cloud.now()
        name = f"operation-{int(now * 1000)}-{secrets.token_hex(4)}-{secrets.token_hex(4)}"
        operation = {
            "name": name,
            "type": kind,
            "cluster": key,
            "pool": pool,
            "started": now,
            "due": now + seconds,
            "status": "RUNNING",
            "changes": changes or {},
            "failure": self.next_failure,
            "failure_code": _RESOURCE_EXHAUSTED,
        }
        self.next_failure = None
        self._cloud.store.data["container_operations"][name] = operation
        return self._shown_operation(operation)

    def _get_operation(self, call: Call) -> Any:
        return self._shown_operation(self._operation(call))

    def _list_operations(self, call: Call) -> Any:
        answer = container_v1.ListOperationsResponse.pb(container_v1.ListOperationsResponse())
        for operation in self._cloud.store.data["container_operations"].values():
            if call.params["location"] in ("-", operation["cluster"].partition("/")[0]):
                answer.operations.append(self._shown_operation(operation))
        return answer

    def _cancel_operation(self, call: Call) -> Json:
        operation = self._operation(call)
        if operation["status"] == "DONE":
            raise ApiError("FAILED_PRECONDITION", f"Operation {operation['name']} is already done.")
        operation |= {"status": "ABORTING", "failure": "Operation was cancelled.", "failure_code": _CANCELLED}
        operation["due"] = self._cloud.now()
        return {}

    def _operation(self, call: Call) -> Json:
        name = call.params["operation"]
        operation: Json | None = self._cloud.store.data["container_operations"].get(name)
        if operation is None or operation["cluster"].partition("/")[0] != call.params["location"]:
            where = self._scope(call.params["location"])
            raise ApiError("NOT_FOUND", f"Not found: projects/{self._cloud.project}/{where}/operations/{name}.")
        return operation

    def _shown_operation(self, operation: Json) -> Any:
        location = operation["cluster"].partition("/")[0]
        scope = f"{self._cloud.address('container')}/v1/projects/{self._cloud.project_number}/{self._scope(location)}"
        shown: Json = {
            "name": operation["name"],
            "operationType": operation["type"],
            "selfLink": f"{scope}/operations/{operation['name']}",
            "startTime": self._cloud.timestamp(operation["started"]),
            "status": operation["status"],
            "targetLink": self._link(operation["cluster"], by_number=True)
            + (f"/nodePools/{operation['pool']}" if operation["pool"] else ""),
            "zone": location,
        }
        if operation["type"] == "CREATE_CLUSTER":
            shown["progress"] = {"metrics": self._progress(operation)}
        if operation["status"] == "DONE":
            shown["endTime"] = self._cloud.timestamp(operation["ended"])
        if "error" in operation:
            shown |= {"error": operation["error"], "statusMessage": operation["error"]["message"]}
        return json_format.ParseDict(shown, container_v1.Operation.pb(container_v1.Operation()))

    def _progress(self, operation: Json) -> list[Json]:
        length = max(operation["due"] - operation["started"], 1e-9)
        share = 1.0 if operation["status"] == "DONE" else (self._cloud.now() - operation["started"]) / length
        total = sum(steps for _, steps in _CREATE_STAGES)
        done = min(int(share * total), total - 1)
        metrics = []
        for name, steps in _CREATE_STAGES:
            reached = min(done, steps)
            done -= reached
            metrics += [{"name": name, "intValue": reached}, {"name": f"{name}_TOTAL", "intValue": steps}]
        return metrics

    # --- names and state ------------------------------------------------------------------------------------------

    def _server_config(self, call: Call) -> Any:
        self._location(call)
        channels = [
            {"channel": name, "defaultVersion": valid[0], "validVersions": list(valid)}
            for name, valid in CHANNEL_VERSIONS.items()
        ]
        config = {
            "channels": channels,
            "defaultClusterVersion": CHANNEL_VERSIONS["REGULAR"][0],
            "defaultImageType": "COS_CONTAINERD",
            "validImageTypes": ["COS_CONTAINERD", "UBUNTU_CONTAINERD"],
            "validMasterVersions": list(_VERSIONS),
            "validNodeVersions": list(_VERSIONS),
        }
        return json_format.ParseDict(config, container_v1.ServerConfig.pb(container_v1.ServerConfig()))

    def _location(self, call: Call) -> str:
        location = call.params["location"]
        if location != self._cloud.region and location not in self._cloud.zones:
            raise ApiError("PERMISSION_DENIED", f"Permission denied on 'locations/{location}' (or it may not exist).")
        return location

    def _key(self, call: Call) -> str:
        key = f"{self._location(call)}/{call.params['cluster']}"
        if key not in self._cloud.store.data["clusters"]:
            raise ApiError("NOT_FOUND", f"Not found: {self._name(key)}.")
        return key

    def _require_idle(self, key: str) -> None:
        for operation in self._cloud.store.data["container_operations"].values():
            if operation["cluster"] == key and operation["status"] != "DONE":
                doing = _BUSY.get(operation["type"], "updating")
                name = key.partition("/")[2]
                raise ApiError(
                    "FAILED_PRECONDITION",
                    f"Operation {operation['name']} is currently {doing} cluster {name}. "
                    "Please wait and try again once it is done.",
                    details=(error_info("CLUSTER_ALREADY_HAS_OPERATION", SERVICE, {}),),
                )

    def _require_running(self, key: str) -> None:
        self._require_idle(key)
        status = self._cloud.store.data["clusters"][key]["status"]
        if status != "RUNNING":
            raise ApiError("FAILED_PRECONDITION", f"Cluster {key.partition('/')[2]} is not running: {status}.")

    def _zones_of(self, location: str) -> list[str]:
        return list(self._cloud.zones) if location == self._cloud.region else [location]

    def _scope(self, location: str) -> str:
        return f"locations/{location}" if location == self._cloud.region else f"zones/{location}"

    def _name(self, key: str) -> str:
        location, _, name = key.partition("/")
        return f"projects/{self._cloud.project}/{self._scope(location)}/clusters/{name}"

    def _link(self, key: str, *, by_number: bool = False) -> str:
        below_project = self._name(key).removeprefix(f"projects/{self._cloud.project}")
        project = self._cloud.project_number if by_number else self._cloud.project
        return f"{self._cloud.address('container')}/v1/projects/{project}{below_project}"


def _node_count(pool: Json, cluster: Json) -> int:
    """Nodes of a pool: GKE counts `initialNodeCount` per zone."""
    zones = pool.get("locations") or cluster["locations"]
    return int(pool.get("initialNodeCount", 0)) * len(zones)


def _fingerprint(labels: Json) -> str:
    return hashlib.sha256(repr(sorted(labels.items())).encode()).hexdigest()[:8]
