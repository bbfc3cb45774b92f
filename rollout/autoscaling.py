"""A HorizontalPodAutoscaler from a latency target: which metric, which threshold, and a pace that does not flap.

The threshold is read off the profile's curve: the requests in flight of one replica at the target, or at saturation,
times a buffer for the time that a new replica takes to start. vLLM's own `vllm:num_requests_running` is scaled on: it
does not depend on how long requests are, as requests/s do; GPU utilisation is 100 % from the first request on; and a
queue rises only when users wait already.
https://cloud.google.com/kubernetes-engine/docs/best-practices/machine-learning/inference/autoscaling
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rollout.curve import TARGET_UTILISATION
from rollout.errors import BadInput
from rollout.preflight import Check, failed, ok, warning
from rollout.profiles import Profile, Targets
from rollout.rendering import KubernetesObject, read_manifests, render
from rollout.values import Value

METRIC = "vllm:num_requests_running"

CUSTOM_METRICS_API = "custom.metrics.k8s.io"
"""The API group that a metrics adapter registers; without it an HPA on pod metrics never acts."""

ADAPTER_MANIFEST = (
    "https://raw.githubusercontent.com/GoogleCloudPlatform/k8s-stackdriver/master/custom-metrics-stackdriver-adapter/"
    "deploy/production/adapter_new_resource_model.yaml"
)
ADAPTER_DOCS = "https://github.com/GoogleCloudPlatform/k8s-stackdriver/tree/master/custom-metrics-stackdriver-adapter"
ADAPTER_NAMESPACE = "custom-metrics"
ADAPTER_SERVICE_ACCOUNT = "custom-metrics-stackdriver-adapter"
ADAPTER_ROLE = "roles/monitoring.viewer"
"""Without it the adapter runs and may read nothing. The README at `ADAPTER_DOCS` asks for it where Workload Identity is
used; the principal is that of https://cloud.google.com/kubernetes-engine/docs/tutorials/serve-vllm-tpu#set-up-ca."""

LEAST_SCALE_DOWN_WINDOW_S = 300
"""Kubernetes' own default."""
MOST_SCALE_DOWN_WINDOW_S = 3600
"""Kubernetes' own limit."""


class Adapter(StrEnum):
    """Who brings pod metrics to the HPA; it decides how the metric is called."""

    STACKDRIVER = "stackdriver"
    """Google's Custom Metrics Stackdriver Adapter, over Managed Service for Prometheus."""
    PROMETHEUS = "prometheus"
    """prometheus-adapter over a Prometheus of the cluster's own."""

    def metric(self, name: str) -> str:
        return f"prometheus.googleapis.com|{name}|gauge" if self is Adapter.STACKDRIVER else name


class AutoscalingSpec(Value):
    """What the replicas follow, and how far."""

    targets: Targets = Field(
        Targets(),
        title="Latency targets",
        description="Median TTFT, NTPOT and ITL in milliseconds that the autoscaler must hold; empty: most throughput.",
        json_schema_extra={"position": 0},
    )
    max_replicas: Annotated[int, Field(ge=1, le=1000)] = Field(
        8,
        title="Most replicas",
        description="Upper bound of the autoscaler; the preset's replicas are the lower one.",
        json_schema_extra={"position": 1},
    )
    adapter: Adapter = Field(
        Adapter.STACKDRIVER,
        title="Metrics adapter",
        description="Who brings vLLM's metrics to the autoscaler: Google's stackdriver or the cluster's prometheus.",
        json_schema_extra={"position": 2},
    )


class TargetUnreachable(BadInput):
    """The latency target is below what the accelerator does at its lowest load."""


class Autoscaling(Value):
    """What the HPA holds."""

    threshold: int
    """Mean of `METRIC` per replica."""
    scale_down_window_s: int
    expected_output_tokens_per_s: float
    """Of one replica at the threshold."""
    reasons: tuple[str, ...]
    """Lines for the manifest's comments."""


def autoscaling_for(
    profile: Profile, targets: Targets, *, startup_s: float, utilisation: float = TARGET_UTILISATION
) -> Autoscaling:
    """The threshold that keeps median latencies within the targets.

    A target above the highest observed latency means maximum throughput. `startup_s` is how long a new replica takes
    until it serves. Raises TargetUnreachable for a target below the lowest observed latency, with the range.
    """
    stated = {each.metric for each in profile.ranges}
    unstated = [name[:-3].upper() for name in targets.given() if name[:-3].upper() not in stated]
    if unstated:
        raise BadInput(
            f"{profile.source.name} does not state {' and '.join(unstated)} of {profile.model} on"
            f" {profile.accelerator}, so no threshold can hold such a target.",
            where="autoscaling",
            resolution=f"Set a target for {' or '.join(sorted(stated))}, or measure it: our own benchmarks state all.",
        )
    point = profile.operating_point(targets)
    if point is None:
        ranges = "; ".join(map(str, profile.ranges))
        wanted = ", ".join(f"{name[:-3].upper()} {limit:g} ms" for name, limit in targets.given().items())
        raise TargetUnreachable(
            f"{wanted} cannot be held by {profile.model} on {profile.accelerator}.",
            where="autoscaling",
            resolution=f"Choose a target within what was observed: {ranges}.",
        )
    running = point.concurrency
    if running is None:
        raise BadInput(
            "the profile states neither requests in flight nor NTPOT, so there is no threshold to derive.",
            where=profile.source.name,
        )
    threshold = max(1, math.floor(running * utilisation))
    return Autoscaling(
        threshold=threshold,
        scale_down_window_s=scale_down_window_s(startup_s),
        expected_output_tokens_per_s=point.output_tokens_per_s * threshold / running,
        reasons=(
            *_about_targets(profile, targets),
            f"At that point one replica has {running:.3g} requests in flight"
            f" ({'measured' if point.running_requests is not None else 'output tokens/s x NTPOT'})"
            f" and yields {point.output_tokens_per_s:.0f} output tokens/s.",
            f"Threshold: {running:.3g} x {utilisation:g} = {threshold}; the rest is the buffer while a replica starts"
            f" (about {startup_s:.0f} s).",
            f"From {profile.source.name}, a {profile.source.evidence.value}"
            f"{f' of {profile.source.as_of}' if profile.source.as_of else ''}"
            f"{f', with {profile.model_server} {profile.model_server_version}' if profile.model_server_version else ''}"
            f"{f', {profile.use_case}' if profile.use_case else ''}.",
        ),
    )


def _about_targets(profile: Profile, targets: Targets) -> list[str]:
    observed = {each.metric: each for each in profile.ranges}
    lines = []
    for name, limit in targets.given().items():
        metric = name[:-3].upper()
        highest = observed[metric].highest_ms
        beyond = limit > highest
        lines.append(
            f"P50 {metric} at most {limit:g} ms"
            + (f", above the highest observed ({highest:.4g} ms): maximum throughput." if beyond else ".")
        )
    return lines or ["No latency target: maximum throughput."]


def scale_down_window_s(startup_s: float) -> int:
    """How long the load must stay low before a replica goes: two starts, so that a dip costs less than it saves."""
    return int(min(MOST_SCALE_DOWN_WINDOW_S, max(LEAST_SCALE_DOWN_WINDOW_S, 2 * startup_s)))


def autoscaler_object(
    autoscaling: Autoscaling,
    *,
    name: str,
    namespace: str,
    labels: Mapping[str, str],
    max_replicas: int,
    min_replicas: int = 1,
    adapter: Adapter = Adapter.STACKDRIVER,
) -> KubernetesObject:
    """The HorizontalPodAutoscaler of the Deployment `name`. The Deployment must not state `replicas` any more."""
    values = {
        "name": name,
        "namespace": namespace,
        "labels": dict(labels),
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "hpa_metric": adapter.metric(METRIC),
        "hpa_average_value": str(autoscaling.threshold),
        "hpa_scale_down_window_s": autoscaling.scale_down_window_s,
    }
    return render(read_manifests(["horizontal-pod-autoscaler.yaml"]), values)[0]


def check_metrics_adapter(api_groups: Iterable[str] | None) -> Check:
    """Whether the cluster has the adapter that an HPA on vLLM's metrics needs.

    `api_groups` are those that its discovery names; None for a cluster that is still to be made, and has none yet.
    """
    name = "metrics adapter"
    install = f"kubectl apply -f {ADAPTER_MANIFEST} (see {ADAPTER_DOCS})."
    if api_groups is None:
        return warning(name, "a new cluster has none: the autoscaler acts once it is installed", install)
    if CUSTOM_METRICS_API in set(api_groups):
        return ok(name, f"{CUSTOM_METRICS_API} is served")
    return failed(name, f"{CUSTOM_METRICS_API} is not served: the HorizontalPodAutoscaler would never act", install)
