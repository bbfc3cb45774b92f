"""Stages that inference-perf measures inside the cluster: start the Job, wait for its reports, fetch them, remove it.

The Job's name follows from what it measures. A run that was killed meanwhile leaves it behind, and the next run goes on
with it; a Job that nobody comes back for ends by its own deadline.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests

from rollout import inference_perf
from rollout.benchmark import BenchmarkSpec, PlannedStage
from rollout.clients.cluster import ClusterClient
from rollout.clients.job_wait import POLL_S, JobWait, condition_of
from rollout.clients.loadgen import METRICS_SAMPLES, MetricsScraper
from rollout.clients.retrying import transient, with_retries
from rollout.diagnosis import container_statuses
from rollout.errors import DeadlineExceeded, LoadFailed, RolloutError
from rollout.objects import INSTANCE_LABEL, hub_token_object, ownership_labels
from rollout.plan import RolloutPlan
from rollout.rendering import KubernetesObject
from rollout.revisions import REVISION_LABEL
from rollout.stage import RequestLimits, Stage, parse_vllm_metrics, server_side
from rollout.values import content_digest
from rollout.workload import PlannedRequest, planned_duration_s

log = logging.getLogger(__name__)

START_S = 900.0
"""A node of its own ≈300 s, the image of 1 GB ≈60 s, the tokenizer from the hub; with headroom."""
REPORT_S = 300.0
"""The tool counts and writes for about a minute per million tokens."""
FETCH_S = 600.0
"""How long finished reports wait for whoever asked for them: as long as a rerun takes to come back."""
FETCH_ATTEMPTS = 5
FETCH_TIMEOUT_S = 120.0


class LoadJobs:
    """Measures the stages of one sweep against the model that `plan` serves."""

    def __init__(
        self,
        cluster: ClusterClient,
        plan: RolloutPlan,
        spec: BenchmarkSpec,
        *,
        pods: Sequence[str],
        metrics_url: str,
        limits: RequestLimits | None = None,
        hub_token: str | None = None,
        on_progress: Callable[[str], None] = log.info,
    ) -> None:
        """`pods` are the ones that serve: new pods are a new measurement. `metrics_url` is their endpoint from here."""
        self._cluster = cluster
        self._plan = plan
        self._spec = spec
        self._pods = sorted(pods)
        self._metrics_url = metrics_url
        self._limits = limits
        self._hub_token = hub_token
        self._image = spec.load_image or inference_perf.IMAGE
        self._on_progress = on_progress

    def measure(self, planned: PlannedStage, *, repeat: int = 0) -> Stage:
        """Offer `planned` from inside the cluster, and read what the tool reports.

        Raises LoadFailed with the pod's reason, or DeadlineExceeded. Afterwards the Job is gone.
        """
        duration_s = planned_duration_s(planned.rate_per_s, planned.duration_s)
        load_s = duration_s + inference_perf.request_timeout_s(self._spec, planned)
        deadline_s = START_S + load_s + REPORT_S
        manifests = self.manifests(planned, repeat, deadline_s + FETCH_S)
        name = manifests[-1]["metadata"]["name"]
        self._remove_failed(manifests)
        self._cluster.apply(manifests)
        try:
            interval_s = max(0.25, duration_s / METRICS_SAMPLES)
            with MetricsScraper(self._metrics_url, interval_s=interval_s) as scraper:
                _Wait(self._cluster, name, self._on_progress).until_reported(deadline_s)
            with self._cluster.endpoint(name) as url:
                each = _fetch(f"{url}/{inference_perf.PER_REQUEST_REPORT}")
                summary = _fetch(f"{url}/{inference_perf.STAGE_REPORT}")
        finally:
            self._remove(manifests)
        samples = [parse_vllm_metrics(text) for text in scraper.samples]
        return inference_perf.read_stage(
            each,
            summary,
            planned,
            self._schedule(planned, repeat),
            self._spec,
            limits=self._limits,
            server=server_side(inference_perf.under_load(samples)),
        )

    def manifests(self, planned: PlannedStage, repeat: int, deadline_s: float) -> tuple[KubernetesObject, ...]:
        """What a stage needs in the cluster, the Job last."""
        plan, serving, target = self._plan, self._plan.serving, self._plan.target
        facts = [self._spec.model_dump(mode="json"), planned.model_dump(mode="json"), self._pods, repeat, self._image]
        digest = content_digest(facts, 10)
        name = f"{serving.name[:47]}-load-{digest}"  # 63 characters in all
        configuration = inference_perf.config(
            self._spec,
            planned,
            base_url=f"http://{serving.service_name}.{target.namespace}.svc.cluster.local:{serving.port}",
            model=serving.served_model_name,
            tokenizer=plan.model.repo_id,
            seed=int(digest[:8], 16),
        )
        objects = inference_perf.objects(
            configuration,
            self._schedule(planned, repeat),
            name=name,
            namespace=target.namespace,
            labels=self._labels(),
            deadline_s=deadline_s,
            env=self._environment(name),
            image=self._image,
        )
        return (*self._secrets(name), *objects)

    def _schedule(self, planned: PlannedStage, repeat: int) -> list[PlannedRequest]:
        return self._spec.workload.schedule(planned.rate_per_s, planned.duration_s, repeat=repeat)

    def _labels(self) -> dict[str, str]:
        """Those of the Deployment that is measured: whoever removes a revision, or the model, removes its load too."""
        deployment = next(manifest for manifest in self._plan.objects if manifest["kind"] == "Deployment")
        own = deployment["metadata"]["labels"]
        labels = ownership_labels(self._plan.rollout_id, instance=own[INSTANCE_LABEL])
        return labels | ({REVISION_LABEL: own[REVISION_LABEL]} if REVISION_LABEL in own else {})

    def _environment(self, name: str) -> list[dict[str, Any]]:
        variables: list[dict[str, Any]] = []
        if self._plan.target.endpoints.hub:
            variables.append({"name": "HF_ENDPOINT", "value": self._plan.target.endpoints.hub})
        if self._hub_token:
            reference = {"name": name, "key": "hf_api_token"}
            variables.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
        return variables

    def _secrets(self, name: str) -> tuple[KubernetesObject, ...]:
        if not self._hub_token:
            return ()
        secret = hub_token_object(
            self._plan.serving, self._plan.target, self._hub_token, rollout_id=self._plan.rollout_id
        )
        return ({**secret, "metadata": {**secret["metadata"], "name": name, "labels": self._labels()}},)

    def _remove_failed(self, manifests: Sequence[KubernetesObject]) -> None:
        live = self._cluster.find(manifests[-1])
        if live is not None and condition_of(live, "Failed") is not None:
            self._cluster.delete(manifests)

    def _remove(self, manifests: Sequence[KubernetesObject]) -> None:
        try:
            self._cluster.delete(manifests)
        except RolloutError as error:
            # What was measured, or why it was not, matters more; its deadline and the teardown still end the Job.
            log.warning("the load's objects are left behind: %s", error)


class _Wait(JobWait):
    """Waits for one Job's reports, and tells early why there will be none."""

    failure = LoadFailed
    what = "the load"
    rerun = "Run again; the finished stages are kept."

    def until_reported(self, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while not self._is_reported():
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"no reports after {deadline_s:.0f} s; last seen: {self.last_seen}.",
                    where=self.where,
                    resolution="Shorten benchmark.stage_duration_s, or see what keeps the pod from starting.",
                )
            time.sleep(POLL_S)

    def _is_reported(self) -> bool:
        job, pods = self.look()
        for pod in pods:
            if _is_ready(pod):
                return True
            self._judge_exit(pod)
        self.judge_start(pods)
        failed = condition_of(job, "Failed")
        if failed is not None:
            raise LoadFailed(
                f"the load ended without reports: {failed.get('reason')}, {failed.get('message')}.",
                where=self.where,
                resolution=self.rerun,
            )
        return False

    def _judge_exit(self, pod: KubernetesObject) -> None:
        for container in container_statuses(pod):
            ended = (container.get("state") or {}).get("terminated")
            if ended and ended.get("exitCode"):
                words = self.last_words(pod, container["name"])
                raise LoadFailed(
                    f"{container['name']} ended with exit code {ended['exitCode']} ({ended.get('reason')}): {words}",
                    where=f"{self.where}, pod {pod['metadata']['name']}",
                    resolution=_advice(str(ended.get("reason")), words),
                )


def _fetch(url: str) -> Any:
    """A JSON report of whatever size. An answer that was cut is asked for again."""

    def get() -> Any:
        try:
            answer = requests.get(url, timeout=FETCH_TIMEOUT_S)
            if answer.status_code == 404:
                raise LoadFailed(
                    "inference-perf ended well and wrote no such report.",
                    where=url,
                    resolution=f"Use the release that this version reads: {inference_perf.IMAGE}.",
                )
            answer.raise_for_status()
            return answer.json()
        except requests.RequestException as error:
            raise transient(f"the report did not arrive: {error}", where=url) from error

    return with_retries(get, attempts=FETCH_ATTEMPTS)


def _advice(reason: str, words: str) -> str:
    if reason == "OOMKilled":
        return "Shorten benchmark.stage_duration_s: the tool keeps every request in memory until its end."
    if re.search(r"\b40[134]\b|gated|tokenizer", words, re.IGNORECASE):
        return "The load needs the model's tokenizer from the hub: name a token that may read it in hub_token_secret."
    return "The message says what inference-perf did not accept."


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)
