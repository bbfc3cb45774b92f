"""The node agents: what kubelet and container runtime do, with a process for every container.

Simulated: image pulls, init containers, environment from Secrets, ConfigMaps and the pod's own fields, startup,
readiness and liveness probes (HTTP, TCP, gRPC, exec) against the real port, restarts with back-off, preStop and the
grace period, OOM kills, eviction for local disk, logs. Not simulated: namespaces and cgroups (limits are not enforced),
volumes (see `surroundings`; Secret and ConfigMap volumes must exist), the health service that a gRPC probe asks,
postStart, sidecars.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from sandbox.cluster.containers import Container
from sandbox.cluster.controllers import Object, pod_ready
from sandbox.cluster.events import NORMAL, WARNING, Recorder
from sandbox.cluster.logs import ContainerLog
from sandbox.cluster.nodes import node_conditions
from sandbox.cluster.registry import Deletion, Registry
from sandbox.cluster.resources import CONFIG_MAP, NODE, POD, SECRET
from sandbox.cluster.store import Change, Store, timestamp

KUBELET = "kubelet"
logger = logging.getLogger(__name__)
IdentityOf: TypeAlias = Callable[[str, str, dict[str, str]], str]
"""(namespace, service account, its annotations) -> the IAM member that its pods are."""


@dataclass
class AgentSettings:
    """Delays and surroundings of the pods; tests change some of them while the cluster runs."""

    root: Path
    """Logs and small files of the pods."""

    runners: Mapping[str, Sequence[str]]
    """Image prefix -> the command that plays the image's entry point; the container's command and args follow it."""

    identity_of: IdentityOf
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to every container, e.g. STORAGE_EMULATOR_HOST and HF_ENDPOINT."""

    working_directory: Path = field(default_factory=Path.cwd)
    image_pull_s: float = 0.5
    """Once per image and node: a vLLM image of 10 GB takes one to three minutes on GKE."""

    start_s: float = 0.0
    """From the pulled image to the started process."""

    backoff_s: float = 1.0
    """The second restart waits so long, and each one after it twice as long (kubelet: 10 s)."""

    longest_backoff_s: float = 30.0
    """kubelet: 300 s."""

    longest_probe_period_s: float = 1.0
    """Probes with a longer period run this often; their thresholds grow alike, so that the budget in seconds stays."""

    failing_pulls: dict[str, str] = field(default_factory=dict)
    """Image prefix -> the registry's error, e.g. `... 403 Forbidden`; an image without a runner is not found."""

    node_loss_s: float = 1.0
    """From a lost node to its removal with its pods (GKE: minutes)."""

    usage_poll_s: float = 0.2


class NodeAgents:
    """The kubelets of all nodes; also knows the pods' logs and ports for the API server."""

    def __init__(self, registry: Registry, recorder: Recorder, settings: AgentSettings) -> None:
        self.registry = registry
        self.store: Store = registry.store
        self.recorder = recorder
        self.settings = settings
        self._workers: dict[str, PodWorker] = {}
        self._pulled: set[tuple[str, str]] = set()
        self._addresses = itertools.count(10)
        self._stopped = False
        self.store.listen(self._on_change)

    def _on_change(self, change: Change) -> None:
        if change.resource != POD or self._stopped:
            return
        pod, uid = change.obj, change.obj["metadata"]["uid"]
        worker = self._workers.get(uid)
        if change.type == "DELETED":
            if worker is not None:
                worker.abandon()
        elif worker is not None and "deletionTimestamp" in pod["metadata"]:
            worker.stop_gracefully(pod)
        elif worker is None and pod["spec"].get("nodeName") and pod["status"].get("phase") == "Pending":
            self._workers[uid] = PodWorker(self, pod)

    async def stop(self) -> None:
        """Kill every container at once: the cluster goes away."""
        self._stopped = True  # a killed pod that was still Pending would be started anew
        await asyncio.gather(*(worker.kill() for worker in self._workers.values()))

    def lose_node(self, name: str) -> None:
        """A machine dies: its containers stop at once, nobody reports it, and later node and pods are removed."""
        node = self.store.get(NODE, "", name)
        if node is None:
            raise KeyError(name)
        unreachable = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": timestamp()}
        spec = node["spec"] | {"taints": [*(node["spec"].get("taints") or []), unreachable], "unschedulable": True}
        status = node["status"] | {"conditions": node_conditions(ready=False)}
        metadata = dict(node["metadata"])
        lost = self.store.commit(NODE, node | {"metadata": metadata, "spec": spec, "status": status})
        message = f"Node {name} status is now: NodeNotReady"
        self.recorder.record(NODE, lost, NORMAL, "NodeNotReady", message, component="node-controller")
        workers = [worker for worker in self._workers.values() if worker.node == name]
        for worker in workers:
            worker.vanish()
        asyncio.get_running_loop().call_later(self.settings.node_loss_s, self.remove_node, name)

    def remove_node(self, name: str) -> None:
        """A node and its pods go at once."""
        node = self.store.get(NODE, "", name)
        if node is not None:
            self.registry.delete(NODE, node, Deletion())
        for pod in self.store.find(POD):
            if pod["spec"].get("nodeName") == name:
                message = "PodGC: node no longer exists"
                self.recorder.record(POD, pod, NORMAL, "DeletingNodeLost", message, component="pod-garbage-collector")
                self.registry.delete(POD, pod, Deletion(grace_s=0))

    def forget(self, uid: str) -> None:
        self._workers.pop(uid, None)

    async def pull(self, node: str, image: str) -> bool:
        """Wait for an image unless the node has it; whether it had to be pulled."""
        if (node, image) in self._pulled:
            return False
        await asyncio.sleep(self.settings.image_pull_s)
        self._pulled.add((node, image))
        return True

    def has_image(self, node: str, image: str) -> bool:
        return (node, image) in self._pulled

    def runner_of(self, image: str) -> Sequence[str] | None:
        """The command of the longest image prefix that fits."""
        fitting = [prefix for prefix in self.settings.runners if image.startswith(prefix)]
        return self.settings.runners[max(fitting, key=len)] if fitting else None

    def pull_error(self, image: str) -> str | None:
        for prefix, message in self.settings.failing_pulls.items():
            if image.startswith(prefix):
                return message
        if self.runner_of(image) is None:
            reference = image if "/" in image else f"docker.io/library/{image}"
            return (
                f'rpc error: code = NotFound desc = failed to pull and unpack image "{reference}": '
                f'failed to resolve reference "{reference}": {reference}: not found'
            )
        return None

    def new_address(self) -> str:
        number = next(self._addresses)
        return f"10.244.{number // 250}.{number % 250 + 1}"

    # What the API server asks (`PodConnections`)

    def log(self, pod: Object, container: str, *, previous: bool) -> ContainerLog | None:
        worker = self._workers.get(pod["metadata"]["uid"])
        found = worker.container(container) if worker is not None else None
        if found is None:
            return None
        return found.previous_log if previous else found.log

    def host_port(self, pod: Object, port: int) -> int | None:
        worker = self._workers.get(pod["metadata"]["uid"])
        return worker.host_port(port) if worker is not None else None

    def ready(self, pod: Object) -> bool:
        return pod_ready(pod) and "deletionTimestamp" not in pod["metadata"]

    def resolve_port(self, pod: Object, port: int | str) -> int:
        if isinstance(port, int) or port.isdigit():
            return int(port)
        ports = [each for container in pod["spec"]["containers"] for each in container.get("ports", [])]
        return next((each["containerPort"] for each in ports if each.get("name") == port), 0)


class PodWorker:
    """One pod on its node, from the binding to its end."""

    def __init__(self, agents: NodeAgents, pod: Object) -> None:
        self.agents = agents
        self.settings = agents.settings
        self.pod = pod
        self.uid: str = pod["metadata"]["uid"]
        self.node: str = pod["spec"]["nodeName"]
        self.address = ""
        self.started_at = timestamp()
        self._evicted = ""
        self._vanished = False
        self._initialized = not pod["spec"].get("initContainers")
        self._init = [Container(self, each, init=True) for each in pod["spec"].get("initContainers", [])]
        self._containers = [Container(self, each, init=False) for each in pod["spec"]["containers"]]
        self._ending: asyncio.Task[None] | None = None
        self._evicting: asyncio.Task[None] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._report_failure)

    @property
    def directory(self) -> Path:
        metadata = self.pod["metadata"]
        return self.settings.root / "pods" / f"{metadata['namespace']}_{metadata['name']}_{self.uid}"

    @property
    def restart_policy(self) -> str:
        policy: str = self.pod["spec"]["restartPolicy"]
        return policy

    def container(self, name: str) -> Container | None:
        return next((each for each in (*self._containers, *self._init) if each.name == name), None)

    def host_port(self, port: int) -> int | None:
        if self._vanished:
            return None
        return next((each.host_port for each in self._containers if each.listens_on(port)), None)

    def record(self, kind: str, reason: str, message: str, container: str = "") -> None:
        path = f"spec.containers{{{container}}}" if container else ""
        recorder = self.agents.recorder
        recorder.record(POD, self.pod, kind, reason, message, component=KUBELET, host=self.node, field_path=path)

    # Life

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("pod %s: the node agent failed", self.pod["metadata"]["name"], exc_info=error)

    async def _run(self) -> None:
        self.write_status()
        await self._await_volumes()
        self.address = self.agents.new_address()
        for each in self._init:
            await each.run_once_to_success()
        self._initialized = True
        if self._init:
            self.write_status()
        watching = asyncio.create_task(self._watch_disk())
        try:
            await asyncio.gather(*(each.run() for each in self._containers))
        finally:
            watching.cancel()
        self.write_status()

    async def _await_volumes(self) -> None:
        """Secret and ConfigMap volumes must exist before a container starts."""
        while (missing := self._missing_volume()) is not None:
            self.record(WARNING, "FailedMount", missing)
            await asyncio.sleep(self.settings.backoff_s)

    def _missing_volume(self) -> str | None:
        namespace = self.pod["metadata"]["namespace"]
        for volume in self.pod["spec"].get("volumes", []):
            for source, key, kind in (("secret", "secretName", SECRET), ("configMap", "name", CONFIG_MAP)):
                wanted = volume.get(source)
                if wanted and not wanted.get("optional") and not self.agents.store.get(kind, namespace, wanted[key]):
                    what = f'{kind.singular} "{wanted[key]}" not found'
                    return f'MountVolume.SetUp failed for volume "{volume["name"]}" : {what}'
        return None

    async def _watch_disk(self) -> None:
        """Evict the pod when a container reports more local disk than its limit, or than the node has."""
        while True:
            await asyncio.sleep(self.settings.usage_poll_s)
            for each in self._containers:
                message = each.disk_excess()
                if message is not None:
                    self._evicting = asyncio.get_running_loop().create_task(self._evict(message))
                    return

    async def _evict(self, message: str) -> None:
        self.record(WARNING, "Evicted", message)
        self._evicted = message
        self.record(NORMAL, "Killing", f"Stopping container {self._containers[0].name}", self._containers[0].name)
        self._task.cancel()
        await asyncio.gather(*(each.kill() for each in self._containers))
        self.write_status()

    def stop_gracefully(self, pod: Object) -> None:
        self.pod = pod
        if self._ending is None and not self._vanished:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        grace_s = float(self.pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await asyncio.gather(*(each.stop(grace_s) for each in (*self._containers, *self._init)))
        current = self.agents.store.get(POD, self.pod["metadata"]["namespace"], self.pod["metadata"]["name"])
        if current is not None and current["metadata"]["uid"] == self.uid:
            self.agents.registry.delete(POD, current, Deletion(grace_s=0))
        self.agents.forget(self.uid)

    def abandon(self) -> None:
        """The pod is gone from the API: whatever still runs is killed."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self.kill())

    async def kill(self) -> None:
        self._task.cancel()
        if self._ending is not None and self._ending is not asyncio.current_task():
            self._ending.cancel()  # no preStop hook outlives its cluster
            await asyncio.wait([self._ending])
        await asyncio.gather(*(each.kill() for each in (*self._containers, *self._init)))
        self.agents.forget(self.uid)

    def vanish(self) -> None:
        """The node died: the processes end, and nobody writes a status any more."""
        self._mark_unready()
        self._vanished = True
        self._task.cancel()
        self._ending = asyncio.get_running_loop().create_task(self._kill_silently())

    async def _kill_silently(self) -> None:
        await asyncio.gather(*(each.kill() for each in self._containers))

    def _mark_unready(self) -> None:
        """What the node controller does to the pods of a node that stopped answering."""
        metadata = self.pod["metadata"]
        current = self.agents.store.get(POD, metadata["namespace"], metadata["name"])
        if current is None:
            return
        conditions = [
            each | {"status": "False", "lastTransitionTime": timestamp()} if each["type"] == "Ready" else each
            for each in current["status"].get("conditions") or []
        ]
        status = current["status"] | {"conditions": conditions}
        self.agents.registry.write_status(POD, current, current | {"status": status}, "kube-controller-manager")

    # Status

    def write_status(self) -> None:
        if self._vanished:
            return
        metadata = self.pod["metadata"]
        current = self.agents.store.get(POD, metadata["namespace"], metadata["name"])
        if current is None or current["metadata"]["uid"] != self.uid:
            return
        status = self._status(current["status"])
        self.pod = self.agents.registry.write_status(POD, current, current | {"status": status}, KUBELET)

    def _status(self, before: Object) -> Object:
        node = self.agents.store.get(NODE, "", self.node)
        addresses = node["status"].get("addresses", []) if node is not None else []
        host = next((each["address"] for each in addresses if each["type"] == "InternalIP"), "")
        status: Object = {
            "phase": self._phase(),
            "conditions": self._conditions(before.get("conditions") or []),
            "hostIP": host,
            "hostIPs": [{"ip": host}],
            "startTime": self.started_at,
            "containerStatuses": [each.status() for each in self._containers],
            "qosClass": before.get("qosClass", "BestEffort"),
        }
        if self._init:
            status["initContainerStatuses"] = [each.status() for each in self._init]
        if self.address and not self._evicted:
            status |= {"podIP": self.address, "podIPs": [{"ip": self.address}]}
        if self._evicted:
            status |= {"reason": "Evicted", "message": self._evicted}
        return status

    def _phase(self) -> str:
        if self._evicted:
            return "Failed"
        if self._init and any(each.gave_up for each in self._init):
            return "Failed"
        if not all(each.ever_started for each in self._containers):
            return "Pending"
        if all(each.finished for each in self._containers):
            return "Succeeded" if all(each.exit_code == 0 for each in self._containers) else "Failed"
        return "Running"

    def _conditions(self, before: list[Object]) -> list[Object]:
        unready = [each.name for each in self._containers if not each.ready]
        phase = self._phase()
        finished = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase)
        lacking = (
            {"reason": finished}
            if finished
            else {
                "reason": "ContainersNotReady",
                "message": f"containers with unready status: [{' '.join(unready)}]",
            }
        )
        not_initialized = {
            "reason": "ContainersNotInitialized",
            "message": f"containers with incomplete status: [{' '.join(each.name for each in self._init)}]",
        }
        ready = not unready and not self._evicted
        running = phase == "Running"
        wanted = [
            ("PodReadyToStartContainers", bool(self.address) and not finished, {}),
            ("Initialized", self._initialized, not_initialized),
            ("Ready", ready and running, lacking),
            ("ContainersReady", ready and running, lacking),
            ("PodScheduled", True, {}),
        ]
        old = {each["type"]: each for each in before}
        return [_condition(kind, holds, why, old.get(kind)) for kind, holds, why in wanted]


def _condition(kind: str, holds: bool, why: Object, before: Object | None) -> Object:
    now = timestamp()
    since = before["lastTransitionTime"] if before is not None and before["status"] == str(holds) else now
    times = {"lastProbeTime": None, "lastTransitionTime": since}
    return {"type": kind, "status": str(holds), **times, **({} if holds else why)}
