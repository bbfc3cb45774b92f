"""The horizontal pod autoscaler: Deployments follow a metric of their pods.

Simulated, as https://kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale/ describes it: the
ratio rule with its tolerance, pods that wait or give no metric, the stabilisation windows, `behavior`'s policies, and
the conditions of the status. A pod's value is read from its own `/metrics`, at the port that a PodMonitoring selects,
and called as Google's Custom Metrics Stackdriver Adapter (`prometheus.googleapis.com|NAME|gauge`) or prometheus-adapter
(`NAME`) call it.

Not simulated, and said in the condition ScalingActive: targets other than Deployments, metrics other than gauges of
pods with an average value, metric selectors, `tolerance` per direction, and the minutes that Google's monitoring lags
behind.
"""

from __future__ import annotations

import asyncio
import copy
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from sandbox.cluster.controllers import MANAGER, Object, condition, key_of, set_condition
from sandbox.cluster.events import NORMAL, WARNING, Recorder
from sandbox.cluster.quantity import parse
from sandbox.cluster.registry import Registry, Writer
from sandbox.cluster.resources import BUILT_IN, CUSTOM, DEPLOYMENT, POD
from sandbox.cluster.selectors import matches_label_selector
from sandbox.cluster.store import Change, Key, timestamp

if TYPE_CHECKING:
    from sandbox.cluster.agent import NodeAgents

AUTOSCALER = next(each for each in BUILT_IN if each.kind == "HorizontalPodAutoscaler")
_POD_MONITORING = next(each for each in CUSTOM if each.kind == "PodMonitoring")
COMPONENT = "horizontal-pod-autoscaler"
CUSTOM_METRICS = ("custom.metrics.k8s.io", "v1beta2")
TOLERANCE = 0.1
"""`--horizontal-pod-autoscaler-tolerance`."""
_SCRAPE_TIMEOUT_S = 5.0
_STACKDRIVER_NAME = re.compile(r"^prometheus\.googleapis\.com\|(?P<name>[^|]+)\|gauge$")
_PLAIN_NAME = re.compile(r"^(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)$")
_SCALE_UP: Object = {
    "stabilizationWindowSeconds": 0,
    "selectPolicy": "Max",
    "policies": [
        {"type": "Pods", "value": 4, "periodSeconds": 15},
        {"type": "Percent", "value": 100, "periodSeconds": 15},
    ],
}
_SCALE_DOWN: Object = {
    "stabilizationWindowSeconds": 300,
    "selectPolicy": "Max",
    "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
}


@dataclass(frozen=True)
class AutoscalerSettings:
    """Of the controller manager and of what is installed beside it."""

    sync_period_s: float = 15.0
    """`--horizontal-pod-autoscaler-sync-period`; a rehearsal that has no time says so here."""
    metrics_adapter: bool = True
    """Whether an adapter serves the metrics of pods (the API group custom.metrics.k8s.io)."""


class CannotScale(Exception):
    """Why an autoscaler does nothing, as its condition tells it."""

    def __init__(self, kind: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reason = reason
        self.message = message


def replicas_for(current: int, target: float, values: Sequence[float], *, unready: int, missing: int) -> int:
    """How many replicas the ratio rule asks for.

    `values` are the metric of the pods that give one; `unready` pods still wait for their start, `missing` ones run
    and give no value. Both are assumed to be where they change least: at the target when less is needed, at 0 when
    more is.
    """
    ratio = sum(values) / len(values) / target
    if not missing and not (unready and ratio > 1.0):
        return current if abs(ratio - 1.0) <= TOLERANCE else math.ceil(ratio * len(values))
    assumed = [target] * missing if ratio < 1.0 else [0.0] * (missing + unready)
    rebalanced = [*values, *assumed]
    new_ratio = sum(rebalanced) / len(rebalanced) / target
    if abs(new_ratio - 1.0) <= TOLERANCE or (ratio < 1.0) != (new_ratio < 1.0):
        return current
    wanted = math.ceil(new_ratio * len(rebalanced))
    turns = (new_ratio < 1.0 and wanted > current) or (new_ratio > 1.0 and wanted < current)
    return current if turns else wanted


@dataclass
class Memory:
    """What one autoscaler remembers: (moment in s, replicas) of its recommendations and of its changes."""

    recommendations: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)
    """Signed: how many replicas came or went."""

    def stabilised(self, now: float, current: int, wanted: int, up: Object, down: Object) -> int:
        """The least that was wanted in the window before going up, and the most before going down."""
        windows = (up["stabilizationWindowSeconds"], down["stabilizationWindowSeconds"])
        self.recommendations = [each for each in self.recommendations if now - each[0] < max(*windows, 1)]
        least, most = (
            choose((wanted, *(count for at, count in self.recommendations if now - at < window)))
            for choose, window in zip((min, max), windows, strict=True)
        )
        self.recommendations.append((now, wanted))
        return min(max(current, least), most)

    def limit(self, now: float, current: int, rules: Object, *, sign: int) -> int:
        """How far the policies of one direction (`sign` +1 up, -1 down) let the replicas go at this moment."""
        if rules["selectPolicy"] == "Disabled":
            return current
        proposals = []
        for policy in rules["policies"]:
            start = current - sum(by for at, by in self.changes if now - at < policy["periodSeconds"])
            if policy["type"] == "Pods":
                proposals.append(start + sign * policy["value"])
            else:
                exact = start * (1 + sign * policy["value"] / 100)
                proposals.append(math.ceil(exact) if sign > 0 else math.floor(exact))
        furthest = (rules["selectPolicy"] == "Max") == (sign > 0)
        found = max(proposals) if furthest else min(proposals)
        return max(found, current) if sign > 0 else min(found, current)

    def changed(self, now: float, by: int, *, keep_s: float) -> None:
        self.changes = [each for each in self.changes if now - each[0] < keep_s] + [(now, by)]


def next_replicas(spec: Object, current: int, wanted: int, memory: Memory, now: float) -> int:
    """`wanted` within the windows, the policies and the bounds of an autoscaler's `spec`; remembers what it decides."""
    behavior = spec.get("behavior") or {}
    up, down = (
        rules | {name: value for name, value in (behavior.get(key) or {}).items() if value is not None}
        for key, rules in (("scaleUp", _SCALE_UP), ("scaleDown", _SCALE_DOWN))
    )
    steady = memory.stabilised(now, current, wanted, up, down)
    if steady > current:
        found = min(steady, memory.limit(now, current, up, sign=1))
    elif steady < current:
        found = max(steady, memory.limit(now, current, down, sign=-1))
    else:
        found = current
    found = min(max(found, spec.get("minReplicas", 1)), spec["maxReplicas"])
    if found != current:
        longest_s = max(policy["periodSeconds"] for rules in (up, down) for policy in rules["policies"])
        memory.changed(now, found - current, keep_s=longest_s)
    return found


class HorizontalPodAutoscalers:
    """The controller: one round over all autoscalers in every sync period, and at once over a new one."""

    def __init__(
        self, registry: Registry, recorder: Recorder, agents: NodeAgents, settings: AutoscalerSettings
    ) -> None:
        self._registry = registry
        self._store = registry.store
        self._recorder = recorder
        self._agents = agents
        self._settings = settings
        self._memories: dict[str, Memory] = {}
        self._wake = asyncio.Event()
        self._store.listen(self._on_change)

    def _on_change(self, change: Change) -> None:
        if change.resource == AUTOSCALER:
            if change.type == "ADDED":
                self._wake.set()
            elif change.type == "DELETED":
                self._memories.pop(change.obj["metadata"]["uid"], None)

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=_SCRAPE_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                self._wake.clear()
                for autoscaler in self._store.find(AUTOSCALER):
                    await self._sync(session, key_of(autoscaler))
                try:
                    async with asyncio.timeout(self._settings.sync_period_s):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    async def _sync(self, session: aiohttp.ClientSession, key: Key) -> None:
        autoscaler = self._store.get(AUTOSCALER, *key)
        if autoscaler is None:
            return
        status: Object = copy.deepcopy(autoscaler.get("status") or {})
        conditions: list[Object] = status.get("conditions") or []
        try:
            deployment = self._target(autoscaler)
            status["currentReplicas"] = deployment["status"].get("replicas", 0)
            found = _condition("AbleToScale", True, "SucceededGetScale", "the HPA controller was able to get the scale")
            conditions = set_condition(conditions, found)
            status["desiredReplicas"] = await self._scale(session, autoscaler, deployment, status)
            status["lastScaleTime"] = autoscaler.get("status", {}).get("lastScaleTime")
            if status["desiredReplicas"] != deployment["spec"]["replicas"]:
                status["lastScaleTime"] = timestamp()
            message = "the HPA was able to successfully calculate a replica count from pods metric"
            found = _condition("ScalingActive", True, "ValidMetricFound", message)
        except CannotScale as error:
            found = _condition(error.kind, False, error.reason, error.message)
            self._recorder.record(AUTOSCALER, autoscaler, WARNING, error.reason, error.message, component=COMPONENT)
        status["conditions"] = set_condition(conditions, found)
        status = {name: value for name, value in status.items() if value is not None}
        self._registry.write_status(AUTOSCALER, autoscaler, autoscaler | {"status": status}, MANAGER)

    def _target(self, autoscaler: Object) -> Object:
        target = autoscaler["spec"]["scaleTargetRef"]
        if target["kind"] != "Deployment":
            message = f"this cluster scales Deployments, not {target['kind']}s"
            raise CannotScale("AbleToScale", "FailedGetScale", message)
        deployment = self._store.get(DEPLOYMENT, autoscaler["metadata"]["namespace"], target["name"])
        if deployment is None:
            missing = f'deployments.apps "{target["name"]}" not found'
            message = f"the HPA controller was unable to get the target's current scale: {missing}"
            raise CannotScale("AbleToScale", "FailedGetScale", message)
        return deployment

    async def _scale(
        self, session: aiohttp.ClientSession, autoscaler: Object, deployment: Object, status: Object
    ) -> int:
        """Set the Deployment's replicas, and return them."""
        spec, current = autoscaler["spec"], deployment["spec"]["replicas"]
        if current == 0:
            message = "scaling is disabled since the replica count of the target is zero"
            raise CannotScale("ScalingActive", "ScalingDisabled", message)
        asked = [_gauge_and_target(metric) for metric in spec["metrics"]]
        pods = [
            pod
            for pod in self._store.find(POD, deployment["metadata"]["namespace"])
            if matches_label_selector(deployment["spec"]["selector"], pod["metadata"].get("labels") or {})
            and "deletionTimestamp" not in pod["metadata"]
            and pod["status"].get("phase") in ("Pending", "Running")
        ]
        running = [pod for pod in pods if pod["status"]["phase"] == "Running"]
        scraped = await asyncio.gather(*(self._scrape(session, pod) for pod in running))
        proposals, shown = [], []
        for metric, (gauge, target) in zip(spec["metrics"], asked, strict=True):
            values = [each[gauge] for each in scraped if gauge in each]
            if not values:
                name = metric["pods"]["metric"]["name"]
                message = f"unable to get metric {name}: no metrics returned from custom metrics API"
                raise CannotScale("ScalingActive", "FailedGetPodsMetric", message)
            proposals.append(
                replicas_for(
                    current,
                    target,
                    values,
                    unready=len(pods) - len(running),
                    missing=len(running) - len(values),
                )
            )
            average = f"{round(sum(values) / len(values) * 1000)}m"
            name = metric["pods"]["metric"]["name"]
            shown.append({"type": "Pods", "pods": {"metric": {"name": name}, "current": {"averageValue": average}}})
        status["currentMetrics"] = shown
        memory = self._memories.setdefault(autoscaler["metadata"]["uid"], Memory())
        found = next_replicas(spec, current, max(proposals), memory, time.monotonic())
        if found != current:
            self._write_replicas(autoscaler, deployment, found, rises=found > current)
        return found

    def _write_replicas(self, autoscaler: Object, deployment: Object, replicas: int, *, rises: bool) -> None:
        live = self._store.get(DEPLOYMENT, *key_of(deployment))
        if live is None:
            return
        changed = copy.deepcopy(live)
        changed["spec"]["replicas"] = replicas
        self._registry.update(DEPLOYMENT, live, changed, Writer(MANAGER, "scale"))
        why = "pods metric above target" if rises else "All metrics below target"
        message = f"New size: {replicas}; reason: {why}"
        self._recorder.record(AUTOSCALER, autoscaler, NORMAL, "SuccessfulRescale", message, component=COMPONENT)

    async def _scrape(self, session: aiohttp.ClientSession, pod: Object) -> Mapping[str, float]:
        """The samples of a pod by name, summed over labels; empty where nothing is monitored or nobody answers."""
        if not self._settings.metrics_adapter:
            return {}
        for endpoint in self._endpoints(pod):
            port = self._agents.host_port(pod, self._agents.resolve_port(pod, endpoint["port"]))
            if port is None:
                continue
            try:
                async with session.get(f"http://127.0.0.1:{port}{endpoint.get('path', '/metrics')}") as answer:
                    if answer.status == 200:
                        return _samples(await answer.text())
            except (aiohttp.ClientError, TimeoutError, OSError):
                continue  # it starts, or it ends: a pod without metrics, as the rule knows it
        return {}

    def _endpoints(self, pod: Object) -> list[Object]:
        labels = pod["metadata"].get("labels") or {}
        return [
            endpoint
            for monitoring in self._store.find(_POD_MONITORING, pod["metadata"]["namespace"])
            if matches_label_selector(monitoring["spec"].get("selector") or {}, labels)
            for endpoint in monitoring["spec"].get("endpoints") or []
        ]


def _gauge_and_target(metric: Object) -> tuple[str, float]:
    """A metric's name in `/metrics` and its average value per pod. Raises CannotScale for what is not simulated."""
    kind = metric["type"]
    if kind != "Pods":
        message = f"this cluster has no metrics of the type {kind}: it reads gauges of pods"
        raise CannotScale("ScalingActive", f"FailedGet{kind}Metric", message)
    name, target = metric["pods"]["metric"]["name"], metric["pods"]["target"]
    found = _STACKDRIVER_NAME.match(name) or _PLAIN_NAME.match(name)
    if found is None or target["type"] != "AverageValue" or metric["pods"]["metric"].get("selector"):
        message = f"unable to get metric {name}: this cluster reads gauges of pods, without selector, by average value"
        raise CannotScale("ScalingActive", "FailedGetPodsMetric", message)
    return found["name"], float(parse(target["averageValue"]))


def _samples(text: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            values[name] = values.get(name, 0.0) + float(value)
    return values


def _condition(kind: str, status: bool, reason: str, message: str) -> dict[str, Any]:
    return {name: value for name, value in condition(kind, status, reason, message).items() if name != "lastUpdateTime"}
