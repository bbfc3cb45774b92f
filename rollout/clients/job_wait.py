"""Waiting for a Job: what its pods do now, why they do not start, and what they said last."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.clients.cluster import ClusterClient
from rollout.diagnosis import Category, Diagnosis, StartupObservation, container_statuses, diagnose
from rollout.errors import RolloutError
from rollout.rendering import KubernetesObject

POLL_S = 1.0
LOG_LINES = 30


class JobWait:
    """Looks at one Job and its pods, which carry the label `app` with the Job's name."""

    failure: type[RolloutError]
    """What is raised when the Job cannot succeed."""
    what: str
    """How messages call the Job's work, e.g. `the load`."""
    rerun: str
    """What to do next when nothing better is known."""

    def __init__(self, cluster: ClusterClient, name: str, on_progress: Callable[[str], None]) -> None:
        self._api = cluster.api
        self._target = cluster.target
        self._name = name
        self._on_progress = on_progress
        self._shown: dict[str, str] = {}
        self._fault: tuple[Category, float] | None = None
        """The fault that is there, and since when; one that went away begins anew when it returns."""
        self.where = f"Job {cluster.target.namespace}/{name}"

    @property
    def last_seen(self) -> str:
        return next(reversed(self._shown.values()), "no pod")

    def look(self) -> tuple[KubernetesObject, list[KubernetesObject]]:
        """The Job and its pods, told to `on_progress` where something has changed."""
        job = self._api.find(self._path("batch/v1", "Job", self._name))
        if job is None:
            raise self.failure(
                f"the Job was deleted while {self.what} was waited for.", where=self.where, resolution=self.rerun
            )
        pods = self._api.get(self._path("v1", "Pod"), {"labelSelector": f"app={self._name}"})["items"]
        for pod in pods:
            self._show(pod)
        return job, pods

    def judge_start(self, pods: Sequence[KubernetesObject]) -> None:
        """Raise the diagnosis of pods that do not start, once it has lasted."""
        names = {pod["metadata"]["name"] for pod in pods}
        running = any((each.get("state") or {}).get("running") for pod in pods for each in container_statuses(pod))
        if running:
            self._fault = None
            return
        listed = self._api.get(self._path("v1", "Event"))["items"]
        events = [each for each in listed if (each.get("involvedObject") or {}).get("name") in {*names, self._name}]
        diagnosis = diagnose(StartupObservation(pods=pods, events=events, target=self._target))
        if diagnosis is None:
            self._fault = None
        elif self._has_lasted(diagnosis):
            raise self.failure(
                f"{self.what} does not start: {diagnosis.summary}",
                where=self.where,
                resolution=f"{diagnosis.resolution}\n{diagnosis.detail}",
            )

    def last_words(self, pod: KubernetesObject, container: str) -> str:
        path = f"{self._path('v1', 'Pod', pod['metadata']['name'])}/log"
        try:
            text = self._api.text(path, {"container": container, "tailLines": LOG_LINES})
        except RolloutError as error:
            return f"its log cannot be read, {error}"
        return text.strip() or "it said nothing"

    def _has_lasted(self, diagnosis: Diagnosis) -> bool:
        now = time.monotonic()
        if self._fault is None or self._fault[0] is not diagnosis.category:
            self._fault = (diagnosis.category, now)
        return now - self._fault[1] >= max(POLL_S, diagnosis.patience_s)

    def _show(self, pod: Mapping[str, Any]) -> None:
        name = pod["metadata"]["name"]
        states = [f"{container['name']} {_word(container.get('state') or {})}" for container in container_statuses(pod)]
        shown = f"{name}: {', '.join(states) or 'waits for a node'}"
        if shown != self._shown.get(name):
            self._shown.pop(name, None)
            self._shown[name] = shown
            self._on_progress(shown)

    def _path(self, api_version: str, kind: str, name: str | None = None) -> str:
        return self._api.resource(api_version, kind).path(self._target.namespace, name)


def condition_of(job: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    """The Job's condition of that kind (`Complete`, `Failed`), if it is true."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == kind and each["status"] == "True"), None)


def _word(state: Mapping[str, Any]) -> str:
    if state.get("running"):
        return "runs"
    if state.get("terminated"):
        return f"ended with {state['terminated'].get('exitCode')}"
    return str((state.get("waiting") or {}).get("reason") or "waits")
