"""The Job controller: completions, parallelism, Indexed mode, back-off limits, deadline, time to live."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

from sandbox.cluster.controllers import (
    MANAGER,
    Controller,
    Object,
    key_of,
    owned_by,
    owner_keys,
    owner_reference,
    pod_active,
    pod_from_template,
    pod_ready,
)
from sandbox.cluster.events import NORMAL, WARNING
from sandbox.cluster.registry import Deletion, Writer
from sandbox.cluster.resources import JOB, POD
from sandbox.cluster.store import Change, Key, seconds_since, timestamp

INDEX = "batch.kubernetes.io/job-completion-index"


class JobController(Controller):
    """Runs a Job's pods until enough of them have succeeded or too many have failed."""

    def keys(self, change: Change) -> Iterable[Key]:
        if change.resource == JOB:
            return [key_of(change.obj)]
        return owner_keys(change.obj, "Job") if change.resource == POD else []

    def reconcile(self, key: Key) -> float | None:
        job = self.store.get(JOB, *key)
        if job is None or "deletionTimestamp" in job["metadata"]:
            return None
        if _finished(job):
            return self._expire(job)
        pods = owned_by(self.store, POD, job)
        succeeded = [pod for pod in pods if pod["status"].get("phase") == "Succeeded"]
        failed = [pod for pod in pods if pod["status"].get("phase") == "Failed"]
        active = [pod for pod in pods if pod_active(pod)]
        failure = self._failure(job, failed, active, succeeded)
        if failure is not None:
            for pod in active:
                self.registry.delete(POD, pod, Deletion())
            self._tell(job, WARNING, *failure)
            self._write_status(job, pods, [_condition("FailureTarget", *failure), _condition("Failed", *failure)])
            return 0.0
        if self._complete(job, succeeded, active):
            reached = "Reached expected number of succeeded pods"
            done = [_condition(kind, "CompletionsReached", reached) for kind in ("SuccessCriteriaMet", "Complete")]
            self._tell(job, NORMAL, "Completed", "Job completed")
            self._write_status(job, pods, done)
            return 0.0
        if not job["spec"]["suspend"]:
            self._start_pods(job, active, succeeded, failed)
        self._write_status(job, owned_by(self.store, POD, job), [])
        deadline_s = job["spec"].get("activeDeadlineSeconds")
        return (
            None if deadline_s is None else max(0.0, deadline_s - seconds_since(job["metadata"]["creationTimestamp"]))
        )

    def _expire(self, job: Object) -> float | None:
        ttl_s = job["spec"].get("ttlSecondsAfterFinished")
        if ttl_s is None:
            return None
        ended = next(each["lastTransitionTime"] for each in job["status"]["conditions"])
        left_s: float = ttl_s - seconds_since(ended)
        if left_s > 0:
            return left_s
        self.registry.delete(JOB, job, Deletion())
        return None

    def _failure(
        self, job: Object, failed: list[Object], active: list[Object], succeeded: list[Object]
    ) -> tuple[str, str] | None:
        spec = job["spec"]
        restarts = sum(
            each.get("restartCount", 0) for pod in active for each in pod["status"].get("containerStatuses") or []
        )
        deadline_s = spec.get("activeDeadlineSeconds")
        if deadline_s is not None and seconds_since(job["metadata"]["creationTimestamp"]) >= deadline_s:
            return "DeadlineExceeded", "Job was active longer than specified deadline"
        if len(failed) + restarts > spec["backoffLimit"]:
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        lost = _failed_indexes(job, failed)
        if len(lost) > spec.get("maxFailedIndexes", spec.get("completions") or 0):
            return "MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number of failed indexes"
        if lost and len(lost | _indexes(succeeded)) >= spec["completions"]:
            return "FailedIndexes", "Job has failed indexes"
        return None

    def _complete(self, job: Object, succeeded: list[Object], active: list[Object]) -> bool:
        completions = job["spec"].get("completions")
        if completions is None:  # a work queue: the first success ends it, when nobody works any more
            return bool(succeeded) and not active
        return len(_indexes(succeeded) if _indexed(job) else succeeded) >= completions

    def _start_pods(self, job: Object, active: list[Object], succeeded: list[Object], failed: list[Object]) -> None:
        spec = job["spec"]
        lost = _failed_indexes(job, failed)
        done = _indexes(succeeded) if _indexed(job) else succeeded
        wanted = spec["parallelism"]
        if spec.get("completions") is not None:
            wanted = min(wanted, spec["completions"] - len(done) - len(lost))
        elif succeeded:
            wanted = len(active)
        taken = _indexes(active) | _indexes(succeeded) | lost
        free = [index for index in range(spec.get("completions") or 0) if index not in taken]
        for number in range(wanted - len(active)):
            self._create_pod(job, free[number] if _indexed(job) else None)

    def _create_pod(self, job: Object, index: int | None) -> None:
        name = job["metadata"]["name"]
        pod = pod_from_template(job["spec"]["template"], f"{name}-" if index is None else f"{name}-{index}-")
        pod["metadata"]["ownerReferences"] = [owner_reference(JOB, job)]
        if index is not None:
            _give_index(pod, index)
        created = self.registry.create(POD, pod, job["metadata"]["namespace"], Writer(MANAGER))
        self._tell(job, NORMAL, "SuccessfulCreate", f"Created pod: {created['metadata']['name']}")

    def _tell(self, job: Object, kind: str, reason: str, message: str) -> None:
        self.recorder.record(JOB, job, kind, reason, message, component="job-controller")

    def _write_status(self, job: Object, pods: list[Object], conditions: list[Object]) -> None:
        before = job.get("status") or {}
        phases = [pod["status"].get("phase") for pod in pods]
        active = [pod for pod in pods if pod_active(pod)]
        status: Object = {"startTime": before.get("startTime", timestamp()), "ready": sum(map(pod_ready, active))}
        status["terminating"] = sum("deletionTimestamp" in pod["metadata"] for pod in pods)
        status["uncountedTerminatedPods"] = {}
        counts = {"active": 0 if conditions else len(active)}
        counts |= {"succeeded": phases.count("Succeeded"), "failed": phases.count("Failed")}
        status |= {name: count for name, count in counts.items() if count}
        if _indexed(job):
            succeeded = [pod for pod in pods if pod["status"].get("phase") == "Succeeded"]
            status["completedIndexes"] = ",".join(str(index) for index in sorted(_indexes(succeeded)))
        if "backoffLimitPerIndex" in job["spec"]:
            lost = _failed_indexes(job, [pod for pod in pods if pod["status"].get("phase") == "Failed"])
            status["failedIndexes"] = ",".join(str(index) for index in sorted(lost))
        if conditions:
            status["conditions"] = conditions
        if any(each["type"] == "Complete" for each in conditions):
            status["completionTime"] = timestamp()
        self.registry.write_status(JOB, job, job | {"status": status}, MANAGER)


def _finished(job: Object) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(each["type"] in ("Complete", "Failed") and each["status"] == "True" for each in conditions)


def _condition(kind: str, reason: str, message: str) -> dict[str, Any]:
    now = timestamp()
    times = {"lastProbeTime": now, "lastTransitionTime": now}
    return {"type": kind, "status": "True", **times, "reason": reason, "message": message}


def _indexed(job: Object) -> bool:
    return bool(job["spec"]["completionMode"] == "Indexed")


def _indexes(pods: list[Object]) -> set[int]:
    annotated = [(pod["metadata"].get("annotations") or {}).get(INDEX) for pod in pods]
    return {int(index) for index in annotated if index is not None}


def _failed_indexes(job: Object, failed: list[Object]) -> set[int]:
    """Indexes whose pods have failed more often than `backoffLimitPerIndex` allows; none without that limit."""
    limit = job["spec"].get("backoffLimitPerIndex")
    if limit is None:
        return set()
    failures = Counter(int(pod["metadata"]["annotations"][INDEX]) for pod in failed)
    return {index for index, count in failures.items() if count > limit}


def _give_index(pod: Object, index: int) -> None:
    """The index as annotation, label, hostname and environment variable, as Indexed Jobs have it."""
    metadata, spec = pod["metadata"], pod["spec"]
    metadata.setdefault("annotations", {})[INDEX] = str(index)
    metadata.setdefault("labels", {})[INDEX] = str(index)
    spec["hostname"] = f"{metadata['generateName'].rsplit('-', 2)[0]}-{index}"
    reference = {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}
    variable = {"name": "JOB_COMPLETION_INDEX", "valueFrom": reference}
    for container in (*spec["containers"], *spec.get("initContainers", [])):
        container.setdefault("env", []).append(copy.deepcopy(variable))
