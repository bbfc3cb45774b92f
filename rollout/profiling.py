"""From a measured curve to an autoscaler, and the test that scaling keeps what the curve promised.

Pure. One replica is swept; its profile gives the threshold of the HorizontalPodAutoscaler. The autoscaler adds replicas
so that each stays at that threshold. Whether it does, and whether the latency targets then hold, is measured with the
load of all replicas at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from rollout.autoscaling import Autoscaling, AutoscalingSpec, autoscaler_object
from rollout.benchmark import BenchmarkSpec, Environment
from rollout.curve import TARGET_UTILISATION, least_follows
from rollout.errors import BadInput
from rollout.history import CurveRecord, last_good
from rollout.model import PinnedModel
from rollout.objects import ownership_labels
from rollout.plan import RolloutPlan
from rollout.policy import RolloutPolicy
from rollout.profiles import Gap, Profile, Targets
from rollout.rendering import KubernetesObject
from rollout.serving import ServingSpec
from rollout.stage import LatencyMetric, Percentile, Stage
from rollout.target import Target
from rollout.values import Value


class ProfilingSpec(Value):
    """What is derived from the curve, and what it is held against."""

    autoscaling: AutoscalingSpec = Field(
        AutoscalingSpec(),
        title="Autoscaler",
        description="What the autoscaler that is derived must hold.",
        json_schema_extra={"position": 0},
    )
    max_shortfall: Annotated[float, Field(ge=0)] | None = Field(
        None,
        title="Largest shortfall",
        description="By which share a figure may be worse than Google forecasts, e.g. 0.2; empty only reports it.",
        json_schema_extra={"position": 1},
    )


class ScalingRow(Value):
    """One figure of the scaling test."""

    figure: str
    limit: str
    measured: str
    met: bool


class ScalingTest(Value):
    """What all replicas did with their share of the load each."""

    replicas: int
    rate_per_s: float
    """Offered requests/s, to all replicas together."""
    rows: tuple[ScalingRow, ...]

    @property
    def held(self) -> bool:
        return all(row.met for row in self.rows)


def environment_of(model: PinnedModel, serving: ServingSpec, target: Target) -> Environment:
    """What is measured: curves are comparable when this agrees."""
    return Environment(
        model=serving.served_model_name,
        commit_sha=model.commit_sha,
        image=serving.image,
        flags=tuple(serving.vllm_args(target.weights_uri(model.repo_id, model.commit_sha))),
        accelerator=serving.accelerator.type,
        accelerator_count=serving.accelerator.count * serving.replicas,
    )


def require_profilable(policy: RolloutPolicy) -> None:
    """Raise BadInput, before anything changes, for a policy that cannot lead to a profile."""
    if policy.benchmark is None:
        raise BadInput("a profile needs a benchmark.", where="policy.benchmark", resolution="Leave its default.")
    if policy.delivery.by_revisions:
        raise BadInput(
            "a profile is measured on a Deployment of its own, not beside a live version.",
            where="policy.delivery.kind",
            resolution="Choose rolling, and a target or namespace where nothing serves.",
        )
    if policy.autoscaling is not None:
        raise BadInput(
            "a profile is measured on a fixed replica; the autoscaler follows from it.",
            where="policy.autoscaling",
            resolution="Say what it must hold under `profiling.autoscaling`.",
        )


def profiled_curve(
    curves: Sequence[CurveRecord], model: PinnedModel, serving: ServingSpec, target: Target
) -> CurveRecord:
    """The newest curve that met its objectives on one replica of exactly this model, image, flags and accelerator.

    Raises BadInput if there is none.
    """
    wanted = environment_of(model, serving.model_copy(update={"replicas": 1}), target)
    found = last_good([curve for curve in curves if curve.environment == wanted])
    if found is None:
        raise BadInput(
            f"no measured profile says at which load another replica of {serving.name} is due.",
            where="policy.autoscaling",
            resolution=f"Measure one with the same policy.benchmark: llm-rollout profile MODEL --target {target.name}."
            " It counts for exactly this commit, image, flags and accelerator.",
        )
    return found


def expected_startup_s(model: PinnedModel, serving: ServingSpec, policy: RolloutPolicy) -> float:
    """How long a new replica takes on a new node: node and image (`warm_up_lead_s`), then its weights."""
    return policy.warm_up_lead_s + serving.loading_s(model.total_bytes)


def autoscaler_of(
    scaling: Autoscaling, spec: AutoscalingSpec, serving: ServingSpec, target: Target, *, rollout_id: str
) -> KubernetesObject:
    """The autoscaler of the Deployment of `serving`; `serving.replicas` is its lower bound."""
    if spec.max_replicas < serving.replicas:
        raise BadInput(
            f"the autoscaler may make {spec.max_replicas} replicas, fewer than the {serving.replicas} to begin with.",
            where="autoscaling.max_replicas",
            resolution="Raise it, or lower the replicas.",
        )
    return autoscaler_object(
        scaling,
        name=serving.name,
        namespace=target.namespace,
        labels=ownership_labels(rollout_id, instance=serving.name),
        min_replicas=serving.replicas,
        max_replicas=spec.max_replicas,
        adapter=spec.adapter,
    )


def autoscaled(plan: RolloutPlan, scaling: Autoscaling, spec: AutoscalingSpec) -> RolloutPlan:
    """The plan with its autoscaler."""
    autoscaler = autoscaler_of(scaling, spec, plan.serving, plan.target, rollout_id=plan.rollout_id)
    return plan.model_copy(update={"objects": (*plan.objects, autoscaler)})


def scaling_rate_per_s(profile: Profile, targets: Targets, replicas: int) -> float:
    """The load at which an autoscaler on this profile keeps `replicas`: each at the threshold, none above it."""
    point = profile.operating_point(targets)
    if point is None or not point.requests_per_s:
        raise BadInput(
            "the profile has no load within the targets.",
            where=profile.source.name,
            resolution=f"Possible are {'; '.join(map(str, profile.ranges))}.",
        )
    return point.requests_per_s * TARGET_UTILISATION * replicas


def scaling_benchmark(spec: BenchmarkSpec, rate_per_s: float) -> BenchmarkSpec:
    """One stage at one rate, with the sweep's workload and patience."""
    return spec.model_copy(update={"rates_per_s": (rate_per_s,), "max_stages": 1, "stages_per_side": 1})


def judge_scaling(stage: Stage, targets: Targets, replicas: int) -> ScalingTest:
    """The stage's medians against the targets, and whether the replicas kept up with what was offered."""
    least = least_follows(stage)
    rows = [
        ScalingRow(
            figure="output tokens/s, share of what was offered",
            limit=f"at least {least:.3g}",
            measured=f"{stage.follows:.3g}",
            met=stage.follows >= least,
        )
    ]
    for name, limit_ms in targets.given().items():
        metric = LatencyMetric(name.removesuffix("_ms"))
        seconds = stage.latency_s(metric, Percentile.P50)
        rows.append(
            ScalingRow(
                figure=f"{metric.value.upper()} p50 (ms)",
                limit=f"at most {limit_ms:g}",
                measured="no answer" if seconds is None else f"{seconds * 1e3:.4g}",
                met=seconds is not None and seconds * 1e3 <= limit_ms,
            )
        )
    return ScalingTest(replicas=replicas, rate_per_s=stage.rate_per_s, rows=tuple(rows))


def worst_shortfall(gaps: tuple[Gap, ...]) -> float:
    """By how much the worst figure is worse than forecast, as a share of the forecast; 0 without a forecast.

    A measurement with another workload than the forecast's says nothing about it.
    """
    return max((gap.shortfall for gap in gaps if gap.same_workload), default=0.0)
