"""What a measured curve is good for: a profile, the autoscaler that follows from it, and the gap to the forecast."""

from __future__ import annotations

import math
import time

import yaml
from prefect import get_run_logger

from rollout.autoscaling import Autoscaling, AutoscalingSpec, autoscaling_for, check_metrics_adapter
from rollout.benchmark import BenchmarkReport, BenchmarkSpec
from rollout.clients.cluster import ClusterClient
from rollout.clients.history import BucketHistory
from rollout.clients.recommender import Recommender
from rollout.clients.records import RecordStore
from rollout.errors import BadInput, DeadlineExceeded, ObjectivesMissed, RolloutError, TransientError
from rollout.history import records_of
from rollout.ledger import last_applied
from rollout.model import PinnedModel
from rollout.pictures import predicted_against_measured
from rollout.plan import RolloutPlan, known_price, rollout_id
from rollout.policy import Teardown
from rollout.preflight import CheckState
from rollout.profiles import Gap, MeasuredOn, Profile, ProfileQuery, gaps, measured_profile
from rollout.profiling import (
    ProfilingSpec,
    ScalingTest,
    autoscaler_of,
    expected_startup_s,
    judge_scaling,
    profiled_curve,
    worst_shortfall,
)
from rollout.rendering import KubernetesObject
from rollout.report import StepStatus, utc_now
from rollout.request import RolloutSpec
from rollout.show import table
from rollout.target import Target
from tasks.step import Artifact, Outcome, step
from tasks.verify import measure


def require_unserved(plan: RolloutPlan) -> None:
    """Raise BadInput, before anything changes, where a version serves that is to stay.

    A profile takes its place, and the teardown afterwards would remove it, since both have the same name.
    """
    served = last_applied(RecordStore(plan.target).read_all(), plan.serving.name)
    stays = served is not None and served.plan is not None and served.plan.policy.teardown is not Teardown.ALWAYS
    if stays and plan.policy.teardown is not Teardown.NEVER:
        raise BadInput(
            f"{plan.serving.name} serves there, and the teardown after the profile would remove it.",
            where=f"target {plan.target.name}",
            resolution="Profile on a target or namespace where it does not serve, or tear it down first.",
        )


@step("profile")
def profile_of(plan: RolloutPlan, benchmark: BenchmarkReport) -> Outcome[Profile]:
    """The sweep as a profile of one replica, in the quickstart's terms. The curve itself is kept in the bucket."""
    on = MeasuredOn(
        name=f"gs://{plan.target.bucket}",
        replicas=plan.serving.replicas,
        price=known_price(plan.target, plan.serving.accelerator.type),
        pricing_model=plan.target.pricing,
    )
    # Catalogues know models by their repository.
    ratio = plan.target.output_to_input_ratio
    profile = measured_profile(benchmark, on, output_to_input_ratio=ratio).model_copy(
        update={"model": plan.model.repo_id}
    )
    rows = [
        (
            _figure(point.requests_per_s),
            _figure(point.output_tokens_per_s),
            *(_figure(each) for each in (point.ttft_ms, point.ntpot_ms, point.itl_ms)),
            _figure(point.usd_per_million_output_tokens),
        )
        for point in profile.points
    ]
    columns = ("requests/s", "output tokens/s", "TTFT (ms)", "NTPOT (ms)", "ITL (ms)", "USD/M output tokens")
    ranges = "; ".join(map(str, profile.ranges))
    return Outcome(
        value=profile,
        summary=f"{profile.saturation.output_tokens_per_s:.0f} output tokens/s at saturation; {ranges}",
        data={"profile": profile.model_dump(mode="json")},
        artifact=Artifact(
            "profile",
            f"{profile.model} on {profile.accelerator_count} x {profile.accelerator}",
            markdown=f"Possible below saturation: {ranges}\n\n{table(columns, rows)}",
        ),
    )


@step("forecast")
def compare_with_forecast(plan: RolloutPlan, profile: Profile) -> Outcome[tuple[Gap, ...]]:
    """Beside what GKE Inference Quickstart forecasts for the same model, server and accelerator."""
    query = ProfileQuery(model=profile.model, model_server=profile.model_server)
    try:
        forecast = Recommender(plan.target).benchmarks(query).profiles
    except TransientError:
        raise
    except RolloutError as error:  # a project without the API, a model that Google does not know
        get_run_logger().warning("no forecast: %s", error)
        return Outcome(value=(), summary=f"no forecast: {error.summary}", status=StepStatus.SKIPPED)
    found = gaps((*forecast, profile))
    comparable = tuple(gap for gap in found if gap.same_workload)
    rows = [
        (
            gap.prediction.model_server_version,
            label,
            f"{predicted:.4g}",
            f"{measured:.4g}",
            f"{share:+.0%}",
            gap.workload,
        )
        for gap in found
        for label, predicted, measured, share in gap.differences()
    ]
    return Outcome(
        value=found,
        summary=f"at worst {worst_shortfall(found):.0%} short of the forecast"
        if comparable
        else "Google has no forecast" + (" for this workload" if found else ""),
        status=StepStatus.DONE if comparable else StepStatus.SKIPPED,
        data={"shortfall": worst_shortfall(found) if comparable else None},
        artifact=Artifact(
            "forecast",
            "Forecast and measurement, both at saturation",
            markdown=table(("server version", "figure", "forecast", "measured", "difference", "workload"), rows),
        ),
        pictures=tuple(_forecast_picture(gap, number) for number, gap in enumerate(comparable, 1)),
    )


def _forecast_picture(gap: Gap, number: int) -> Artifact:
    server = f"{gap.prediction.model_server} {gap.prediction.model_server_version}".strip()
    title = f"{gap.measurement.model}: forecast for {server}, and measurement"
    png = predicted_against_measured(gap.prediction, gap.measurement, title=title)
    return Artifact(f"forecast-{number}", title, png=png)


def require_forecast(found: tuple[Gap, ...], spec: ProfilingSpec) -> None:
    """Raise `ObjectivesMissed` if the measurement falls further short of the forecast than the spec allows."""
    shortfall = worst_shortfall(found)
    if spec.max_shortfall is not None and shortfall > spec.max_shortfall:
        raise ObjectivesMissed(
            f"a figure is {shortfall:.0%} worse than forecast, more than {spec.max_shortfall:.0%}.",
            where="forecast",
            resolution="The forecast artifact shows every figure.",
        )


@step("metrics adapter")
def require_metrics_adapter(target: Target) -> Outcome[None]:
    """The cluster can bring vLLM's metrics to an autoscaler; asked before a GPU is paid for."""
    check = check_metrics_adapter(ClusterClient.connect(target).api_groups())
    if check.state is not CheckState.OK:
        raise BadInput(f"{check.why}.", where=target.cluster.name, resolution=check.resolution)
    return Outcome(value=None, summary=check.why, status=StepStatus.UNCHANGED)


@step("autoscaler")
def derive_autoscaler(plan: RolloutPlan, profile: Profile, spec: AutoscalingSpec) -> Outcome[Autoscaling]:
    """The HorizontalPodAutoscaler that keeps median latencies within the targets; a rollout with this policy has it."""
    startup_s = expected_startup_s(plan.model, plan.serving, plan.policy)
    scaling = autoscaling_for(profile, spec.targets, startup_s=startup_s)
    single = plan.serving.model_copy(update={"replicas": 1})
    manifest = autoscaler_of(scaling, spec, single, plan.target, rollout_id=plan.rollout_id)
    return _derived(scaling, manifest)


@step("autoscaler")
def autoscale_as_profiled(spec: RolloutSpec, model: PinnedModel) -> Outcome[Autoscaling]:
    """The autoscaler that follows from the newest good profile of exactly what is rolled out."""
    serving, target, policy = spec.serving, spec.target, spec.policy
    assert policy.autoscaling is not None, "asked for by the policy"
    workload = (policy.benchmark or BenchmarkSpec()).workload
    if serving.max_model_len is not None:
        workload = workload.with_limit(serving.max_model_len)
    curves = records_of(BucketHistory(target), workload.key, model=serving.served_model_name)
    curve = profiled_curve(curves, model, serving, target)
    profile = measured_profile(curve.report, MeasuredOn(name=f"gs://{target.bucket}"))
    scaling = autoscaling_for(profile, policy.autoscaling.targets, startup_s=expected_startup_s(model, serving, policy))
    identity = rollout_id(model, serving, target)
    return _derived(scaling, autoscaler_of(scaling, policy.autoscaling, serving, target, rollout_id=identity))


def _derived(scaling: Autoscaling, manifest: KubernetesObject) -> Outcome[Autoscaling]:
    bounds = manifest["spec"]
    reasons = "\n".join(f"- {line}" for line in scaling.reasons)
    text = yaml.safe_dump(manifest, sort_keys=False)
    return Outcome(
        value=scaling,
        summary=f"{scaling.threshold} requests in flight a replica, {bounds['minReplicas']} to {bounds['maxReplicas']}"
        " replicas",
        data={"threshold": scaling.threshold, "manifest": manifest},
        artifact=Artifact(
            "autoscaler", "HorizontalPodAutoscaler from the curve", markdown=f"{reasons}\n\n```yaml\n{text}```"
        ),
    )


@step("scale out", retries=1)
def scale_out(plan: RolloutPlan, spec: BenchmarkSpec, replicas: int) -> Outcome[BenchmarkReport]:
    """Keep the load of `spec` on until the autoscaler has brought `replicas` pods, then measure them.

    Raises DeadlineExceeded with the autoscaler's own words if they are not there by the plan's deadline for a start,
    once for each doubling that it takes.
    """
    name = plan.serving.name
    cluster = ClusterClient.connect(plan.target)
    started = time.monotonic()
    deadline_s = plan.deadlines_s["available"] * max(1, math.ceil(math.log2(replicas)))
    history: list[tuple[float, int]] = []
    with cluster.endpoint(plan.serving.service_name) as base_url:
        while True:
            elapsed_s, ready = time.monotonic() - started, cluster.ready_replicas(name)
            history.append((elapsed_s, ready))
            get_run_logger().info("%.0f s: %d of %d replicas are ready", elapsed_s, ready, replicas)
            if ready < replicas and elapsed_s > deadline_s:
                raise DeadlineExceeded(
                    f"{ready} of {replicas} replicas are ready after {elapsed_s:.0f} s of load.",
                    where=f"HorizontalPodAutoscaler {name}",
                    resolution=f"It says: {cluster.autoscaler_says(name)}",
                )
            # An in-cluster measurement is known by its pods: each of these is one of its own.
            report = measure(plan, spec, cluster, base_url, pods=(f"scale out at {utc_now().isoformat()}",))
            if ready >= replicas:
                break
    rows = [(f"{at:.0f}", count) for at, count in history]
    return Outcome(
        value=report,
        summary=f"{replicas} replicas were ready within {history[-1][0]:.0f} s of load",
        data={"ready_replicas": [[round(at, 1), count] for at, count in history]},
        artifact=Artifact(
            "scale-out",
            f"Replicas of {name} under the load of {replicas}",
            markdown=table(("seconds of load", "ready replicas"), rows),
        ),
    )


@step("scaling")
def judge_replicas(benchmark: BenchmarkReport, spec: ProfilingSpec, replicas: int) -> Outcome[ScalingTest]:
    """Whether all replicas hold the targets at the load at which the autoscaler would keep so many."""
    test = judge_scaling(benchmark.stages[-1], spec.autoscaling.targets, replicas)
    rows = [(row.figure, row.limit, row.measured, "met" if row.met else "missed") for row in test.rows]
    return Outcome(
        value=test,
        summary=f"{replicas} replicas at {test.rate_per_s:.3g} requests/s: {'held' if test.held else 'missed'}",
        status=StepStatus.DONE if test.held else StepStatus.FAILED,
        data=test.model_dump(mode="json"),
        artifact=Artifact(
            "scaling",
            f"{replicas} replicas at {test.rate_per_s:.3g} requests/s",
            markdown=table(("figure", "limit", "measured", ""), rows),
        ),
    )


def require_held(test: ScalingTest) -> None:
    """Raise `ObjectivesMissed` if scaling does not keep what the curve of one replica promised."""
    if not test.held:
        missed = "; ".join(f"{row.figure} {row.measured}, {row.limit}" for row in test.rows if not row.met)
        raise ObjectivesMissed(f"{test.replicas} replicas do not hold the targets: {missed}.", where="scaling")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
