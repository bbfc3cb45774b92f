"""A rollout is proven by its answers and by its curve."""

from __future__ import annotations

from collections.abc import Callable

from prefect import get_run_logger

from rollout.answers import answers_of
from rollout.benchmark import BenchmarkReport, BenchmarkSpec
from rollout.clients.benchmarks import StageStore
from rollout.clients.cluster import ClusterClient
from rollout.clients.history import BucketHistory
from rollout.clients.load_job import LoadJobs
from rollout.clients.loadgen import run_benchmark
from rollout.clients.openai_api import run_smoke_suite
from rollout.clients.records import RecordStore
from rollout.cost import TokenCost, cost_at_knee
from rollout.errors import ObjectivesMissed, SmokeFailed
from rollout.history import CurveRecord, compare, keep, record_to_keep, records_of, yardstick
from rollout.objectives import Verdict, judge
from rollout.objects import port_forward_line
from rollout.pictures import curve_pictures
from rollout.plan import RolloutPlan, known_price
from rollout.profiling import environment_of
from rollout.report import StepStatus
from rollout.show import benchmark_markdown, comparison_markdown, curve_summary, verdict_markdown
from rollout.smoke import CANARIES, Capabilities, SmokeReport, with_expectations
from rollout.stage import Stage
from tasks.credentials import hub_token
from tasks.step import Artifact, Outcome, ProgressBar, step


@step("smoke test", retries=1)
def smoke_test(plan: RolloutPlan) -> Outcome[SmokeReport]:
    """The document's request and everything else that the model should be able to do."""
    capabilities = Capabilities.of(plan.checkpoint_config, plan.serving, has_chat_template=plan.has_chat_template)
    good = RecordStore(plan.target).last_good(plan.serving.name, plan.model.repo_id)
    answers = good.smoke.canary_answers if good and good.smoke else {}
    serving = plan.serving
    with ClusterClient.connect(plan.target).endpoint(serving.service_name) as base_url:
        report = run_smoke_suite(
            base_url,
            serving.served_model_name,
            capabilities,
            canaries=with_expectations(CANARIES, answers),
            # Where this run reaches the Service, whoever repeats a check does not.
            curl_url=f"http://127.0.0.1:{serving.port}",
            reach_with=port_forward_line(plan.target.namespace, serving.service_name, serving.port),
        )
    return Outcome(
        value=report,
        summary=report.summary(),
        status=StepStatus.DONE,
        data=report.model_dump(mode="json"),
        artifact=Artifact(
            "smoke-test",
            f"Smoke test of {serving.served_model_name}. Before a curl line: `{report.reach_with}`",
            table=report.table(),
        ),
    )


def require_passed(report: SmokeReport) -> None:
    """Raise `SmokeFailed` naming the checks that failed."""
    if not report.passed:
        raise SmokeFailed(
            report.summary(),
            where=report.model,
            resolution="Each row of the smoke-test artifact has the curl line that repeats its check, after"
            f" `{report.reach_with}`.",
        )


@step("benchmark", retries=1)
def benchmark_server(
    plan: RolloutPlan, pods: tuple[str, ...], spec: BenchmarkSpec, occasion: str = ""
) -> Outcome[BenchmarkReport]:
    """Load sweep to saturation. Finished stages of the same pods are not measured again on the same occasion.

    A rollout needs no occasion: new pods are one, and pods that it left alone have been measured. Whoever wants to know
    how pods do that have served for weeks names one.
    """
    pods = (*pods, *([occasion] if occasion else []))
    logger = get_run_logger()
    environment = environment_of(plan.model, plan.serving, plan.target)
    store = StageStore(plan.target, environment, spec, pods, plan.policy.objectives.request_limits)
    completed = store.read()
    stages = list(completed)
    cluster = ClusterClient.connect(plan.target)
    with (
        ProgressBar("benchmark-progress", "Load sweep") as bar,
        cluster.endpoint(plan.serving.service_name) as base_url,
    ):

        def keep_stage(stage: Stage) -> None:
            stages.append(stage)
            store.write(stages)
            bar.update(min(99.0, 100.0 * len(stages) / spec.max_stages), f"{len(stages)} stages")

        report = measure(plan, spec, cluster, base_url, pods=pods, completed=completed, on_stage=keep_stage)
        bar.update(100.0, f"{len(stages)} stages")
    measured = len(report.stages) - len(completed)
    answers = answers_of(report, plan.policy.objectives, replicas=plan.serving.replicas)
    if completed:
        logger.info("%d stages were measured by an earlier run against the same pods", len(completed))
    return Outcome(
        value=report,
        summary=f"{curve_summary(report)}; {measured} stages measured, {len(completed)} kept",
        status=StepStatus.DONE if measured else StepStatus.UNCHANGED,
        data={
            "stages_measured": measured,
            "stages_kept": len(completed),
            "answers": answers.model_dump(mode="json"),
        },
        artifact=Artifact(
            "benchmark", f"Load sweep of {environment.model}", markdown=benchmark_markdown(report, answers)
        ),
        pictures=tuple(
            Artifact(f"benchmark-{name}", f"Load sweep of {environment.model}: {name}", png=png)
            for name, png in curve_pictures(
                report.stages, title=plan.serving.served_model_name, limits=plan.policy.objectives.latencies
            ).items()
        ),
    )


def measure(
    plan: RolloutPlan,
    spec: BenchmarkSpec,
    cluster: ClusterClient,
    base_url: str,
    *,
    pods: tuple[str, ...] = (),
    completed: tuple[Stage, ...] = (),
    on_stage: Callable[[Stage], None] | None = None,
) -> BenchmarkReport:
    """Sweep the plan's model server with the engine of `spec`; `pods` tell one in-cluster sweep from another."""
    objectives = plan.policy.objectives

    def in_cluster(as_measured: BenchmarkSpec) -> LoadJobs:
        return LoadJobs(
            cluster,
            plan,
            as_measured,
            pods=pods,
            metrics_url=base_url,
            limits=objectives.request_limits,
            # Only the token that the target names: one of this machine's environment is not for the cluster.
            hub_token=hub_token(plan.target) if plan.target.hub_token_secret else None,
            on_progress=get_run_logger().info,
        )

    return run_benchmark(
        base_url,
        spec,
        model=plan.serving.served_model_name,
        on_stage=on_stage,
        objectives=objectives,
        completed=completed,
        environment=environment_of(plan.model, plan.serving, plan.target),
        in_cluster=in_cluster,
    )


@step("objectives")
def judge_objectives(plan: RolloutPlan, smoke: SmokeReport | None, benchmark: BenchmarkReport) -> Outcome[Verdict]:
    """Hold what was measured against the policy's objectives and the last good curve; keep the curve for the next.

    Without a smoke suite its checks are not judged.
    """
    objectives = plan.policy.objectives
    if smoke is None:
        objectives = objectives.model_copy(update={"smoke_checks": ()})
    store = BucketHistory(plan.target)
    curves = records_of(store, benchmark.spec.workload.key, model=benchmark.environment.model)
    baseline = yardstick(curves, benchmark)
    cost = _cost(plan, benchmark)
    verdict = judge(
        objectives,
        benchmark.stages,
        cost=cost,
        passed_checks=smoke.passed_checks if smoke else frozenset(),
        baseline=baseline.report.stages if baseline else (),
    )
    record = record_to_keep(curves, benchmark, good=verdict.met, run_name=plan.title)
    if record is not None:
        keep(store, record)
    page = verdict_markdown(verdict)
    if baseline is not None:
        page += "\n" + comparison_markdown(compare(baseline, CurveRecord(report=benchmark)))
    return Outcome(
        value=verdict,
        summary=verdict.summary() + (f"; {cost.usd_per_million_output_tokens:.3g} USD/M output tokens" if cost else ""),
        status=StepStatus.DONE if verdict.met else StepStatus.FAILED,
        data={"cost": cost.model_dump(mode="json") if cost else None},
        artifact=Artifact("objectives", "Objectives: limit, measured, margin", markdown=page),
    )


def require_met(verdict: Verdict) -> None:
    """Raise `ObjectivesMissed` with the reason of every miss."""
    if not verdict.met:
        raise ObjectivesMissed(verdict.summary(), where="objectives")


def _cost(plan: RolloutPlan, benchmark: BenchmarkReport) -> TokenCost | None:
    price = known_price(plan.target, plan.serving.accelerator.type)
    gpus = plan.serving.accelerator.count * plan.serving.replicas
    return (
        None
        if price is None
        else cost_at_knee(benchmark.stages, price, gpus=gpus, output_to_input_ratio=plan.target.output_to_input_ratio)
    )
