"""Wait for a Deployment by watching it, and tell early why it cannot succeed.

Four watches (the Deployment, its replica sets, its pods, the namespace's events) and one log reader for each running
container feed one queue; a single thread turns what comes out of it into progress, a diagnosis and the decision.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from rollout.clients.cluster_api import QUIET_S, ClusterApi, Silence, Snapshot, Update
from rollout.diagnosis import (
    Category,
    Diagnosis,
    FaultHistory,
    StartupObservation,
    container_statuses,
    diagnose,
    restarts,
)
from rollout.errors import DeadlineExceeded, NotFound, PermissionMissing, RolloutError, StartupFailed, TransientError
from rollout.objects import COMPUTE_CLASS_LABEL
from rollout.optimize import ValidatedWith
from rollout.rendering import KubernetesObject
from rollout.values import Value
from rollout.waterfall import TimedLine, Waterfall, read_waterfall, timed_line

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 400
"""A traceback of vLLM has about 200 lines, and each of its processes prints one."""
MAX_RESTARTS = 3
"""A container that ended four times by the same fault is not going to start."""
RECHECK_S = 5.0
"""How often to ask for what is not watched: whether a ComputeClass has appeared, and how the pods' nodes are."""
SETTLE_S = 1.0
"""A log line comes on another connection than the exit it explains: look again after this time before giving up."""
START_LOG_BYTES = 1_000_000
"""How much of a log's beginning is read for the waterfall: vLLM is up after about 30 kB."""

_EXPLAINED_LATER = frozenset({Category.UNSCHEDULABLE, Category.NO_GPU_NODE, Category.CRASH_LOOP})
"""Every pod is unschedulable until the autoscaler has answered; a crash is seen before the log that explains it."""


class LogLine(Value):
    """One line of a container's log."""

    pod: str
    at: datetime
    text: str


class Progress(Value):
    """How far the start is. `diagnosis` is a fault that may still heal."""

    elapsed_s: float
    message: str
    fraction_loaded: float | None = None
    """Share of the weights that is loaded, by the log."""
    diagnosis: Diagnosis | None = None


class WaitReport(Value):
    """A start that succeeded."""

    deployment: str
    revision: str
    duration_s: float
    pods: tuple[str, ...]
    waterfalls: tuple[Waterfall, ...]
    """One for each pod."""
    healed: tuple[Diagnosis, ...] = ()
    """Faults that were seen on the way and went away."""
    first_token_s: float | None = None
    """How long the first request to the Service took; None as long as nobody has asked."""
    ran_on: ValidatedWith = ValidatedWith()
    """Versions of cluster, nodes and driver, where GKE says them."""

    def with_first_tokens(self, service_s: float, by_pod: Mapping[str, float]) -> WaitReport:
        """The report with the last bar of each waterfall: ready is what has answered."""
        waterfalls = tuple(
            waterfall.with_first_token(by_pod[waterfall.pod]) if waterfall.pod in by_pod else waterfall
            for waterfall in self.waterfalls
        )
        return self.model_copy(update={"waterfalls": waterfalls, "first_token_s": service_s})


class FailedStart(RolloutError):
    """A start that did not become one, with what was seen of it."""

    diagnosis: Diagnosis | None = None
    log_tail: str = ""
    """The end of each pod's log."""
    waterfalls: tuple[Waterfall, ...] = ()
    """How far each pod came."""
    old_pods_serving: tuple[str, ...] = ()
    """Pods of the previous revision that still answer."""

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect keeps failures by pickle.
        return (_restored, (type(self), self.summary, self.where, self.resolution, self.__dict__))


class ServerDoesNotStart(FailedStart, StartupFailed):
    """The model server cannot become available; the summary is the diagnosis."""


class StartTakesTooLong(FailedStart, DeadlineExceeded):
    """The time is over, and nothing that could be seen was wrong."""


def _restored(kind: type[FailedStart], summary: str, where: str, resolution: str, facts: dict[str, Any]) -> FailedStart:
    error = kind(summary, where=where, resolution=resolution)
    error.__dict__.update(facts)
    return error


@dataclass
class _Seen:
    """Everything known about the Deployment at this moment."""

    deployment: KubernetesObject | None = None
    collections: dict[str, dict[str, KubernetesObject]] = field(
        default_factory=lambda: {"replica_set": {}, "pod": {}, "event": {}}
    )
    """Topic of a watch -> its objects by uid."""
    lines: dict[str, deque[TimedLine]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    """A log line that came in, and of which run of the container."""

    pod: str
    run: str
    line: TimedLine


_Message = tuple[str, Snapshot | Update] | _Line | RolloutError


class StartupWait:
    """One wait for one Deployment; `run` once."""

    def __init__(
        self,
        api: ClusterApi,
        namespace: str,
        name: str,
        *,
        context: StartupObservation,
        on_progress: Callable[[Progress], None] | None = None,
        on_log: Callable[[LogLine], None] | None = None,
        patience_factor: float = 1.0,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._context = context
        self._on_progress = on_progress
        self._on_log = on_log
        self._patience_factor = patience_factor
        self._queue: queue.Queue[_Message] = queue.Queue()
        self._listed: set[str] = set()
        self._stop = threading.Event()
        self._seen = _Seen()
        self._read_runs: dict[str, str] = {}
        self._shown_runs: dict[str, str] = {}
        self._history = FaultHistory()
        self._lasted_s = 0.0
        self._faults: dict[Category, Diagnosis] = {}
        self._last_message = ""
        self._last_fault: tuple[Category, bool] | None = None
        self._compute_class_asked_at = float("-inf")
        self._compute_class_exists = True
        self._nodes_asked_at = float("-inf")
        self._nodes: list[KubernetesObject] = []
        self._started = 0.0
        self._where = f"Deployment {namespace}/{name}"

    def run(self, deadline_s: float) -> WaitReport:
        """Wait. See `ClusterClient.wait_available`."""
        self._started = time.monotonic()
        path = self._api.resource("apps/v1", "Deployment").path(self._namespace, self._name)
        deployment = self._api.get(path)
        selector = deployment["spec"]["selector"]["matchLabels"]
        labels = ",".join(f"{key}={value}" for key, value in selector.items())
        self._watch("deployment", "apps/v1", "Deployment", {"fieldSelector": f"metadata.name={self._name}"})
        self._watch("replica_set", "apps/v1", "ReplicaSet", {"labelSelector": labels})
        self._watch("pod", "v1", "Pod", {"labelSelector": labels})
        self._watch("event", "v1", "Event", {})
        try:
            return self._decide(self._started + deadline_s)
        finally:
            self._stop.set()

    # --- The decision -------------------------------------------------------------------------------------------------

    def _decide(self, deadline: float) -> WaitReport:
        while True:
            self._take(min(SETTLE_S, max(0.0, deadline - time.monotonic())))
            if self._is_available():
                return self._report()
            diagnosis = self._confirmed(diagnose(self._observation()))
            self._tell(diagnosis)
            if diagnosis:
                self._judge(diagnosis)
            if time.monotonic() >= deadline:
                raise self._too_late(deadline - self._started, diagnosis)

    def _take(self, wait_s: float) -> None:
        """Take in everything that has come, waiting at most `wait_s` for the first message."""
        try:
            self._absorb(self._queue.get(timeout=wait_s))
            while True:
                self._absorb(self._queue.get_nowait())
        except queue.Empty:
            return

    def _is_available(self) -> bool:
        """Kubernetes' own criterion: all pods are of the new revision and available, and the old ones are gone."""
        deployment = self._seen.deployment
        if deployment is None or not {"pod", "replica_set"} <= self._listed:
            return False
        status, spec = deployment.get("status") or {}, deployment["spec"]
        wanted = int(spec.get("replicas", 1))
        return (
            int(status.get("observedGeneration") or 0) >= int(deployment["metadata"].get("generation") or 0)
            and int(status.get("updatedReplicas") or 0) == wanted
            and int(status.get("replicas") or 0) == wanted
            and int(status.get("availableReplicas") or 0) == wanted
            # The pods come on another watch: the report is about them.
            and len(self._ready_pods()) == wanted
        )

    def _confirmed(self, diagnosis: Diagnosis | None) -> Diagnosis | None:
        """The diagnosis, unless it is of a kind that the next message may explain away and has just appeared."""
        if diagnosis is None:
            return None
        self._lasted_s = self._history.note(diagnosis.category, time.monotonic())
        if diagnosis.category in _EXPLAINED_LATER and self._lasted_s < SETTLE_S:
            return None
        if not diagnosis.suspected:
            self._faults[diagnosis.category] = diagnosis
        return diagnosis

    def _judge(self, diagnosis: Diagnosis) -> None:
        """Raise if the fault will not heal, or has not healed for as long as its kind may take."""
        if diagnosis.suspected:
            return  # the startup probe ends a container that hangs; then the log is proof
        patience_s = diagnosis.patience_s * self._patience_factor
        if diagnosis.category is Category.CRASH_LOOP and self._most_restarts() >= MAX_RESTARTS:
            patience_s = 0.0
        if self._lasted_s >= max(SETTLE_S, patience_s):
            raise self._failure(diagnosis)

    def _failure(self, diagnosis: Diagnosis) -> FailedStart:
        pods = self._old_pods()
        serving = f" The previous revision still serves: {', '.join(pods)}." if pods else ""
        resolution = f"{diagnosis.resolution}\n{diagnosis.detail}{serving}"
        error = ServerDoesNotStart(diagnosis.summary, where=self._where, resolution=resolution)
        error.diagnosis = diagnosis
        return self._with_evidence(error)

    def _with_evidence(self, error: FailedStart) -> FailedStart:
        events, weights_bytes = self._events(), self._context.weights_bytes
        error.log_tail, error.old_pods_serving = self._log_tail(), tuple(self._old_pods())
        error.waterfalls = tuple(
            read_waterfall(pod, events, self._lines_of(pod), weights_bytes=weights_bytes) for pod in self._new_pods()
        )
        return error

    def _lines_of(self, pod: KubernetesObject) -> list[TimedLine]:
        return list(self._seen.lines.get(pod["metadata"]["name"], ()))

    def _most_restarts(self) -> int:
        return max((restarts(pod) for pod in self._new_pods()), default=0)

    def _too_late(self, deadline_s: float, diagnosis: Diagnosis | None) -> RolloutError:
        if diagnosis and not diagnosis.suspected:
            return self._failure(diagnosis)
        seen = "Nothing is wrong that could be seen:"
        if diagnosis:
            seen = f"Suspicious is the {diagnosis.detail}. {diagnosis.resolution} If that is not it,"
        slow = StartTakesTooLong(
            f"not available after {deadline_s:.0f} s; last seen: {self._last_message or 'nothing'}.",
            where=self._where,
            resolution=f"{seen} give it longer with serving.ready_timeout_s; the waterfall shows the slow stage.",
        )
        slow.diagnosis = diagnosis
        return self._with_evidence(slow)

    def _observation(self) -> StartupObservation:
        pods = self._new_pods()
        names = {item["metadata"]["name"] for item in [*pods, *self._current_replica_sets()]}
        events = [event for event in self._events() if (event.get("involvedObject") or {}).get("name") in names]
        logs = {name: "\n".join(line.text for line in self._seen.lines.get(name, ())) for name in names}
        missing = self._missing_compute_class(pods)
        nodes = self._nodes_of(pods)
        return replace(self._context, pods=pods, events=events, nodes=nodes, logs=logs, missing_compute_class=missing)

    def _nodes_of(self, pods: Iterable[KubernetesObject]) -> list[KubernetesObject]:
        """The nodes of pods that are not ready. Asked at most every RECHECK_S."""
        if time.monotonic() - self._nodes_asked_at > RECHECK_S:
            self._nodes_asked_at = time.monotonic()
            names = {pod["spec"].get("nodeName") for pod in pods if not _condition(pod, "Ready")} - {None}
            self._nodes = [node for name in sorted(names) if (node := self._find_node(name))]
        return self._nodes

    def _find_node(self, name: str) -> KubernetesObject | None:
        try:
            return self._api.find(self._api.resource("v1", "Node").path(None, name))
        except PermissionMissing:
            return None  # who may not look does not know

    def _missing_compute_class(self, pods: Iterable[KubernetesObject]) -> str:
        """The ComputeClass that unplaced pods select, if there is none of that name. Asked at most every RECHECK_S."""
        for pod in pods:
            name = (pod["spec"].get("nodeSelector") or {}).get(COMPUTE_CLASS_LABEL)
            if not name or _condition(pod, "PodScheduled"):
                continue
            if time.monotonic() - self._compute_class_asked_at > RECHECK_S:
                self._compute_class_asked_at = time.monotonic()
                self._compute_class_exists = self._find_compute_class(name)
            return "" if self._compute_class_exists else name
        return ""

    def _find_compute_class(self, name: str) -> bool:
        try:
            path = self._api.resource("cloud.google.com/v1", "ComputeClass").path(None, name)
            return self._api.find(path) is not None
        except NotFound:
            return False
        except PermissionMissing:
            return True  # who may not look does not know

    def _report(self) -> WaitReport:
        pods = self._ready_pods()
        events = self._events()
        waterfalls = tuple(
            read_waterfall(
                pod,
                events,
                self._start_log(pod["metadata"]["name"]),
                weights_bytes=self._context.weights_bytes,
            )
            for pod in pods
        )
        deployment = self._seen.deployment
        assert deployment is not None
        return WaitReport(
            deployment=self._name,
            revision=(deployment["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision", ""),
            duration_s=time.monotonic() - self._started,
            pods=tuple(pod["metadata"]["name"] for pod in pods),
            waterfalls=waterfalls,
            healed=tuple(self._faults.values()),
        )

    def _start_log(self, pod: str) -> list[TimedLine]:
        """The beginning of a pod's log: what was followed may have begun late, and only its tail is kept."""
        path = f"{self._api.resource('v1', 'Pod').path(self._namespace, pod)}/log"
        try:
            text = self._api.text(path, {"timestamps": True, "limitBytes": START_LOG_BYTES})
        except RolloutError as error:
            log.warning("no log of %s for its waterfall: %s", pod, error)
            return []
        return [line for raw in text.splitlines() for line in _parts(raw)]

    # --- Progress -----------------------------------------------------------------------------------------------------

    def _tell(self, diagnosis: Diagnosis | None) -> None:
        message = "; ".join(_pod_progress(pod, self._events()) for pod in self._new_pods()) or "no pod yet"
        fraction = self._fraction_loaded()
        shown = f"{message} {fraction:.0%}" if fraction is not None else message
        fault = (diagnosis.category, diagnosis.suspected) if diagnosis else None
        if (shown, fault) != (self._last_message, self._last_fault):
            self._last_message, self._last_fault = shown, fault
            elapsed_s = time.monotonic() - self._started
            if self._on_progress:
                self._on_progress(
                    Progress(elapsed_s=elapsed_s, message=message, fraction_loaded=fraction, diagnosis=diagnosis)
                )

    def _fraction_loaded(self) -> float | None:
        shares = [share for lines in self._seen.lines.values() if (share := _share_loaded(lines)) is not None]
        return min(shares, default=None)

    def _log_tail(self) -> str:
        blocks = [
            f"--- {name}\n" + "\n".join(line.text for line in list(lines)[-40:])
            for name, lines in self._seen.lines.items()
        ]
        return "\n".join(blocks)

    # --- What belongs to the new revision -----------------------------------------------------------------------------

    def _current_replica_sets(self) -> list[KubernetesObject]:
        """The replica set of the Deployment's present revision: none until the controller has seen the change."""
        deployment = self._seen.deployment
        if deployment is None:
            return []
        status = deployment.get("status") or {}
        if int(status.get("observedGeneration") or 0) < int(deployment["metadata"].get("generation") or 0):
            return []
        owned = [
            item
            for item in self._seen.collections["replica_set"].values()
            if any(owner["uid"] == deployment["metadata"]["uid"] for owner in _owners(item))
        ]
        return sorted(owned, key=_revision, reverse=True)[:1]

    def _new_pods(self) -> list[KubernetesObject]:
        uids = {item["metadata"]["uid"] for item in self._current_replica_sets()}
        pods = [
            pod
            for pod in self._seen.collections["pod"].values()
            if any(owner["uid"] in uids for owner in _owners(pod)) and not pod["metadata"].get("deletionTimestamp")
        ]
        return sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def _ready_pods(self) -> list[KubernetesObject]:
        """Without evicted pods, which stay in the list until somebody deletes them."""
        return [pod for pod in self._new_pods() if _condition(pod, "Ready")]

    def _old_pods(self) -> list[str]:
        new = {pod["metadata"]["uid"] for pod in self._new_pods()}
        return [
            pod["metadata"]["name"]
            for uid, pod in self._seen.collections["pod"].items()
            if uid not in new and _condition(pod, "Ready")
        ]

    def _events(self) -> list[KubernetesObject]:
        return sorted(self._seen.collections["event"].values(), key=_event_order)

    # --- Taking in ----------------------------------------------------------------------------------------------------

    def _watch(self, topic: str, api_version: str, kind: str, query: Mapping[str, str]) -> None:
        path = self._api.resource(api_version, kind).path(self._namespace)

        def follow() -> None:
            try:
                for event in self._api.follow(path, query, stop=self._stop):
                    self._queue.put((topic, event))
            except RolloutError as error:
                self._queue.put(error)

        threading.Thread(target=follow, name=f"watch {topic}s of {self._name}", daemon=True).start()

    def _absorb(self, message: _Message) -> None:
        if isinstance(message, RolloutError):
            raise message
        if isinstance(message, _Line):
            self._absorb_line(message)
            return
        topic, event = message
        self._listed.add(topic)
        if topic == "deployment":
            self._absorb_deployment(event)
        else:
            _fold(self._seen.collections[topic], event)
            self._read_new_logs()

    def _absorb_deployment(self, event: Snapshot | Update) -> None:
        gone = event.type == "DELETED" if isinstance(event, Update) else not event.items
        if gone:
            raise NotFound(
                "the Deployment was deleted while we waited for it.",
                where=self._where,
                resolution="Somebody else tore it down; run the rollout again if that was not meant.",
            )
        item = event.item if isinstance(event, Update) else event.items[0]
        if item["metadata"]["name"] == self._name:
            self._seen.deployment = item

    def _absorb_line(self, message: _Line) -> None:
        lines = self._seen.lines.setdefault(message.pod, deque(maxlen=LOG_TAIL_LINES))
        if self._shown_runs.get(message.pod) != message.run:
            # A new run of the container: what the last one died of is history once this one speaks.
            lines.clear()
            self._shown_runs[message.pod] = message.run
        lines.append(message.line)
        if self._on_log:
            self._on_log(LogLine(pod=message.pod, at=message.line.at, text=message.line.text))

    def _read_new_logs(self) -> None:
        for pod in self._new_pods():
            run = container_run(pod)
            name = pod["metadata"]["name"]
            if run and self._read_runs.get(name) != run:
                self._read_runs[name] = run

                def deliver(line: TimedLine, name: str = name, run: str = run) -> None:
                    self._queue.put(_Line(name, run, line))

                read_log_in_thread(self._api, self._namespace, name, deliver, self._stop)


# --- Logs -------------------------------------------------------------------------------------------------------------


def container_run(pod: Mapping[str, Any]) -> str:
    """Identifies the run of a pod's serving container that has a log; empty before the first."""
    for container in container_statuses(pod)[-1:]:
        state, last = container.get("state") or {}, container.get("lastState") or {}
        if state.get("running") or state.get("terminated") or last.get("terminated"):
            return f"{pod['metadata']['uid']}/{container.get('restartCount') or 0}"
    return ""


def read_log_in_thread(
    api: ClusterApi, namespace: str, pod: str, deliver: Callable[[TimedLine], None], stop: threading.Event
) -> threading.Thread:
    thread = threading.Thread(
        target=_read_log, args=(api, namespace, pod, deliver, stop), name=f"log of {pod}", daemon=True
    )
    thread.start()
    return thread


def _read_log(
    api: ClusterApi, namespace: str, pod: str, deliver: Callable[[TimedLine], None], stop: threading.Event
) -> None:
    """Follow the present run of a pod's container to its end; resumes after a dropped connection without repeating."""
    path = f"{api.resource('v1', 'Pod').path(namespace, pod)}/log"
    last: datetime | None = None
    while not stop.is_set():
        query: dict[str, str | bool] = {"follow": True, "timestamps": True}
        if last:
            query["sinceTime"] = last.isoformat().replace("+00:00", "Z")
        try:
            for raw in api.lines(path, query, quiet_s=QUIET_S):
                for line in _parts(raw):
                    if last is None or line.at > last:
                        last = line.at
                        deliver(line)
                if stop.is_set():
                    return
            return
        except Silence:
            continue
        except TransientError as error:
            log.debug("log of %s is read again: %s", pod, error)
            stop.wait(1.0)
        except RolloutError as error:
            # The pod is gone, or its log is: nothing to follow, and the watch of the pods tells the rest.
            log.debug("log of %s ends: %s", pod, error)
            return


def _parts(raw: str) -> list[TimedLine]:
    """The lines in one line of the log: progress bars overwrite themselves with carriage returns."""
    line = timed_line(raw)
    if line is None:
        return []
    texts = [text for text in line.text.split("\r") if text.strip()]
    return [TimedLine(at=line.at, text=texts[-1])] if texts else []


def follow_deployment_logs(
    api: ClusterApi, namespace: str, name: str, on_line: Callable[[LogLine], None], stop: threading.Event
) -> None:
    """See `ClusterClient.follow_logs`."""
    deployment = api.get(api.resource("apps/v1", "Deployment").path(namespace, name))
    selector = deployment["spec"]["selector"]["matchLabels"]
    labels = ",".join(f"{key}={value}" for key, value in selector.items())
    runs: set[str] = set()
    for event in api.follow(api.resource("v1", "Pod").path(namespace), {"labelSelector": labels}, stop=stop):
        for pod in event.items if isinstance(event, Snapshot) else (event.item,):
            run, pod_name = container_run(pod), pod["metadata"]["name"]
            if run and run not in runs:
                runs.add(run)

                def deliver(line: TimedLine, pod_name: str = pod_name) -> None:
                    on_line(LogLine(pod=pod_name, at=line.at, text=line.text))

                read_log_in_thread(api, namespace, pod_name, deliver, stop)


# --- Reading objects --------------------------------------------------------------------------------------------------


def _fold(known: dict[str, KubernetesObject], event: Snapshot | Update) -> None:
    if isinstance(event, Snapshot):
        known.clear()
        known.update({item["metadata"]["uid"]: item for item in event.items})
    elif event.type == "DELETED":
        known.pop(event.item["metadata"]["uid"], None)
    else:
        known[event.item["metadata"]["uid"]] = event.item


def _owners(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    owners: list[Mapping[str, Any]] = item["metadata"].get("ownerReferences") or []
    return owners


def _revision(replica_set: Mapping[str, Any]) -> int:
    return int((replica_set["metadata"].get("annotations") or {}).get("deployment.kubernetes.io/revision", 0))


def _condition(pod: Mapping[str, Any], kind: str) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)


def _event_order(event: Mapping[str, Any]) -> tuple[str, int]:
    """Oldest first. Stamps are whole seconds: the order of creation decides between equals."""
    metadata = event["metadata"]
    repeated = (event.get("series") or {}).get("lastObservedTime")
    stamp = repeated or event.get("eventTime") or event.get("lastTimestamp") or metadata.get("creationTimestamp") or ""
    version = str(metadata.get("resourceVersion") or "0")
    return str(stamp)[:19], int(version) if version.isdigit() else 0


def _pod_progress(pod: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> str:
    """What a pod is doing, in words."""
    name = pod["metadata"]["name"]
    reasons = [event.get("reason") for event in events if (event.get("involvedObject") or {}).get("name") == name]
    if _condition(pod, "Ready"):
        return f"{name}: ready"
    if not _condition(pod, "PodScheduled"):
        return f"{name}: waiting for a {'new node' if 'TriggeredScaleUp' in reasons else 'node'}"
    containers = container_statuses(pod)
    for container in containers:
        state = container.get("state") or {}
        if state.get("running"):
            tries = f" (restart {container['restartCount']})" if container.get("restartCount") else ""
            return f"{name}: starting{tries}"
        waiting = (state.get("waiting") or {}).get("reason")
        if state.get("terminated"):
            return f"{name}: exited with code {state['terminated'].get('exitCode')}"
        if waiting and waiting not in ("ContainerCreating", "PodInitializing"):
            return f"{name}: {waiting}"
    return f"{name}: {'pulling the image' if 'Pulling' in reasons and 'Pulled' not in reasons else 'preparing'}"


_SHARDS = re.compile(r"(?:Loading safetensors|Loading \S+ checkpoint)[^:]*:\s+(?P<percent>\d+)% Completed")


def _share_loaded(lines: Iterable[TimedLine]) -> float | None:
    share = None
    for line in lines:
        match = _SHARDS.search(line.text)
        if match:
            share = int(match["percent"]) / 100
    return share
