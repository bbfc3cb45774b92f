"""Values for people: markdown pages of plans and reports. Pure text, no side effects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rollout.answers import Answers, answers_of
from rollout.benchmark import BenchmarkReport
from rollout.cost import TokenCost
from rollout.critical_path import chain_sentence, timeline
from rollout.dashboards import console_links
from rollout.delivery import DeliveryReport
from rollout.diagnosis import Diagnosis
from rollout.history import Comparison
from rollout.objectives import Verdict
from rollout.plan import RolloutPlan, known_price
from rollout.preflight import CheckState
from rollout.record import RolloutReport, TeardownReport
from rollout.report import StepReport, StepStatus
from rollout.stage import ClientSide, Percentiles, Stage
from rollout.target import Approval
from rollout.waterfall import Waterfall


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table; pipes and line breaks in cells are escaped."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def plan_markdown(plan: RolloutPlan) -> str:
    """What would change, what it moves and costs, and which checks were made."""
    price = known_price(plan.target, plan.serving.accelerator.type)
    facts = [
        ("model", f"`{plan.model.repo_id}` at `{plan.model.commit_sha}`"),
        ("weights", f"`{plan.weights_uri}`"),
        ("transfer", f"{plan.transfer_bytes / 1e9:.2f} GB"),
        ("served as", f"`{plan.serving.served_model_name}` by `{plan.serving.image}`"),
        ("accelerators", f"{plan.serving.replicas} × {plan.serving.accelerator.count} {plan.serving.accelerator.type}"),
        ("cost while running", f"{plan.usd_per_hour:,.2f} USD per hour: {price}" if price else _no_price(plan)),
        ("delivery", plan.policy.delivery.kind.value.replace("_", "/")),
        ("serves now", f"`{plan.live_before.model}`" if plan.live_before else "nothing"),
        ("approval", _approval(plan)),
        ("target", f"{plan.target.project} / {plan.target.region} / {plan.target.cluster.name}"),
    ]
    parts = [
        f"# Plan: {plan.title}",
        "Nothing has changed yet. " + _headline(plan),
        # A list, because the tables of Prefect's UI cut what is longer than its window.
        "\n".join(f"- {name}: {fact}" for name, fact in facts),
        *_where_to_look(plan),
        "## Changes",
        table(("action", "kind", "name", ""), ((c.action.planned, c.kind, c.name, c.detail) for c in plan.changes)),
    ]
    if plan.object_diff:
        parts += ["## Difference to the live objects", plan.object_diff]
    noteworthy = [check for check in plan.checks if check.state not in (CheckState.OK, CheckState.NOT_APPLICABLE)]
    if noteworthy:
        rows = ((check.state.value, check.name, check.why, check.resolution) for check in noteworthy)
        parts += ["## Preflight", table(("state", "check", "why", "what to do"), rows)]
    deadlines = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in plan.deadlines_s.items())
    parts.append(f"Deadlines: {deadlines}.")
    return "\n\n".join(parts) + "\n"


def diagnosis_markdown(diagnosis: Diagnosis) -> str:
    """What is wrong, what to do about it, and the message that shows it."""
    certainty = "Suspected from the log of a container that still runs: " if diagnosis.suspected else ""
    patience = f" It may heal by itself within {diagnosis.patience_s:.0f} s." if diagnosis.patience_s else ""
    return (
        f"## {diagnosis.category.value}: {diagnosis.summary}\n\n{certainty}{diagnosis.resolution}{patience}\n\n"
        f"```\n{diagnosis.detail}\n```\n"
    )


def failed_start_markdown(
    summary: str, diagnosis: Diagnosis | None, waterfalls: Sequence[Waterfall], log_tail: str
) -> str:
    """The diagnosis first, then how far each pod came, then the end of the logs."""
    parts = [diagnosis_markdown(diagnosis) if diagnosis else f"## {summary}\n"]
    parts += [f"### How far {waterfall.pod} came\n\n{waterfall.markdown}" for waterfall in waterfalls]
    parts.append(f"### The end of the log\n\n```\n{log_tail}\n```\n" if log_tail else "No container has logged.\n")
    return "\n".join(parts)


def benchmark_markdown(report: BenchmarkReport, answers: Answers) -> str:
    """The curve's answers, then its stages: latencies, what became of the requests, and what the server said.

    Its pictures are artifacts of their own. No table is wider than the window of Prefect's UI.
    """
    stages = sorted(report.stages, key=lambda stage: stage.rate_per_s)
    parts = [
        f"# Load sweep of {report.environment.model}",
        answers_markdown(answers),
        f"Workload: {report.spec.workload.name}, {report.spec.engine.value} engine.",
        *(f"- {note}" for note in report.notes),
        "## Latencies\n\np50 / p90 / p95 / p99, in milliseconds.",
        table(
            ("requests/s", "TTFT", "ITL", "TPOT", "NTPOT", "end to end"),
            (
                (_rate(s), *(_milliseconds(p) for p in (s.ttft_s, s.itl_s, s.tpot_s, s.ntpot_s, s.e2e_s)))
                for s in stages
            ),
        ),
        "## Requests and tokens\n\nTokens/s in / out; schedule delay: how late requests were sent, p50 / p99.",
        table(
            ("requests/s", "completed", "failures", "goodput", "tokens/s", "in flight", "schedule delay ms"),
            (
                (
                    _rate(s),
                    f"{s.completed}/{s.requests}",
                    ", ".join(f"{count} {kind}" for kind, count in sorted(s.failures.items())) or "–",
                    "–" if s.goodput_share is None else f"{s.goodput_share:.0%}",
                    f"{s.input_tokens_per_s:.0f} / {s.output_tokens_per_s:.0f}",
                    f"{s.concurrency_mean:.1f}",
                    _delay(s.client),
                )
                for s in stages
            ),
        ),
    ]
    served = [(stage, stage.server) for stage in stages if stage.server is not None]
    if served:
        parts += [
            "## On the server\n\nFrom its `/metrics` over the same time; mean / most.",
            table(
                ("requests/s", "running", "waiting", "KV cache", "preemptions", "prefix cache hits"),
                (
                    (
                        _rate(stage),
                        f"{server.running_mean:.1f} / {server.running_max:.0f}",
                        f"{server.waiting_mean:.1f} / {server.waiting_max:.0f}",
                        _share(server.kv_cache_usage_max),
                        "–" if server.preemptions is None else f"{server.preemptions:.0f}",
                        _share(server.prefix_cache_hit_ratio),
                    )
                    for stage, server in served
                ),
            ),
        ]
    return "\n\n".join(parts) + "\n"


def answers_markdown(answers: Answers) -> str:
    """Question and answer."""
    return table(("question", "answer"), answers.rows())


def curve_summary(report: BenchmarkReport) -> str:
    """One line: the knee, or what is known where it was not reached."""
    knee = report.curve.knee
    if knee is None:
        return report.curve.not_reached
    return (
        f"knee at {knee.rate_per_s:.3g} requests/s ({knee.lower_rate_per_s:.3g}–{knee.upper_rate_per_s:.3g}),"
        f" {knee.output_tokens_per_s:.0f} output tokens/s, confidence {knee.confidence.value}"
    )


def verdict_markdown(verdict: Verdict) -> str:
    """The verdict's table: objective, limit, measured, margin."""
    columns = ("objective", "limit", "measured", "margin", "outcome", "")
    rows = ((r.objective, r.limit, r.measured, r.margin, r.outcome.value, r.reason) for r in verdict.rows)
    parts = [verdict.summary(), table(columns, rows)]
    if verdict.cost is not None:
        parts.append(cost_sentence(verdict.cost))
    return "\n\n".join(parts) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """Two curves side by side, and what differs in how they were served."""
    parts = [
        "## Against the last good curve",
        f"Of `{comparison.before}`.",
        table(("figure", "before", "after", "change"), (row.values() for row in comparison.table())),
    ]
    parts += [f"- {name}: `{old or '–'}` → `{new or '–'}`" for name, (old, new) in comparison.changed.items()]
    return "\n\n".join(parts) + "\n"


def cost_sentence(cost: TokenCost) -> str:
    """What a million tokens cost at the knee, and by which price."""
    return (
        f"At the knee a million output tokens costs {cost.usd_per_million_output_tokens:.3g} USD and a million input"
        f" tokens {cost.usd_per_million_input_tokens:.3g} USD, at {cost.output_to_input_ratio:g} to 1:"
        f" {cost.gpus} × {cost.price}."
    )


def _milliseconds(values: Percentiles | None) -> str:
    if values is None:
        return "–"
    return " / ".join(f"{value * 1e3:.3g}" for value in (values.p50, values.p90, values.p95, values.p99))


def _rate(stage: Stage) -> str:
    return f"{stage.rate_per_s:.3g}"


def _delay(client: ClientSide | None) -> str:
    if client is None:
        return "–"
    return f"{client.schedule_delay_s.p50 * 1e3:.1f} / {client.schedule_delay_s.p99 * 1e3:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _no_price(plan: RolloutPlan) -> str:
    return (
        f"unknown: no {plan.target.pricing.value} list price is known for {plan.serving.accelerator.type} in"
        f" {plan.target.region}; state what a GPU costs you in the target's `gpu_usd_per_hour`"
    )


def _headline(plan: RolloutPlan) -> str:
    if plan.changes_anything:
        return "The table below is everything that this rollout would do."
    return "**Everything is already as planned**: this rollout would change nothing."


def _approval(plan: RolloutPlan) -> str:
    asked = plan.policy.approval.value.replace("_", " ")
    least = plan.target.approval
    return (
        asked
        if least is Approval.NEVER
        else f"{asked} (at {plan.target.name}, {least.value.replace('_', ' ')} at least)"
    )


def _where_to_look(plan: RolloutPlan) -> list[str]:
    """A line of links into the console of the target's universe, if it has one."""
    named = (item["metadata"]["name"] for item in plan.objects if item["kind"] == "Deployment")
    links = console_links(plan.target, next(named, plan.serving.name), instance=plan.serving.name)
    return ["In the console: " + " · ".join(f"[{name}]({url})" for name, url in links.items())] if links else []


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


_MARKS = {
    StepStatus.DONE: "✓",
    StepStatus.UNCHANGED: "=",
    StepStatus.SKIPPED: "–",
    StepStatus.FAILED: "✗",
}


def step_table(report: RolloutReport) -> list[tuple[str, str, str, str]]:
    """Rows of (mark, step, seconds, summary) for terminals and tables."""
    return [(_MARKS[step.status], step.name, f"{step.duration_s:.1f}", _what_happened(step)) for step in report.steps]


def _what_happened(step: StepReport) -> str:
    return step.summary if step.attempts == 1 else f"{step.summary} ({step.attempts} attempts)"


def report_markdown(report: RolloutReport) -> str:
    """The report for people, with the verdict first."""
    title = report.plan.title if report.plan else "rollout"
    lines = [f"# {title}", "", f"**{report.verdict.value.capitalize()}** after {report.duration_s:.0f} s."]
    if report.error:
        lines += ["", f"> {report.error}"]
    if report.plan:
        lines += [
            "",
            f"Rollout `{report.plan.rollout_id}` · commit `{report.plan.model.commit_sha}`"
            f" · image `{report.plan.serving.image}`",
        ]
        lines += [part for link in _where_to_look(report.plan) for part in ("", link)]
    lines += ["", table(("", "step", "seconds", "what happened"), step_table(report))]
    if len(report.steps) > 1:
        lines += [
            "",
            "## Timeline",
            "",
            f"{chain_sentence(report.steps)} It has the stars.",
            "",
            timeline(report.steps),
        ]
    if report.benchmark and report.plan:
        answers = answers_of(report.benchmark, report.plan.policy.objectives, replicas=report.plan.serving.replicas)
        lines += ["", "## What the curve answers", "", answers_markdown(answers)]
    if report.objectives:
        lines += ["", "## Objectives", "", verdict_markdown(report.objectives)]
    if report.delivery:
        lines += ["", "## Delivery", "", delivery_markdown(report.delivery)]
    if report.teardown:
        lines += ["", "## Teardown", "", teardown_markdown(report.teardown)]
    return "\n".join(lines) + "\n"


def delivery_markdown(delivery: DeliveryReport) -> str:
    """How the traffic moved, and what the last look of each step found."""
    before = f"`{delivery.live_before}` served before" if delivery.live_before else "nothing served before"
    reason = f": {delivery.reason}" if delivery.reason else ""
    parts = [f"Revision `{delivery.revision}`, {delivery.kind.value}: **{delivery.outcome.value}**{reason}; {before}."]
    rows = [
        (f"{s.weight_percent} %", s.replicas, f"{s.duration_s:.0f}", s.ruling.decision.value, s.ruling.reason)
        for s in delivery.steps
    ]
    parts.append(table(("traffic", "pods", "seconds", "decision", "why"), rows))
    compared = [
        (f"{s.weight_percent} %", row.question, row.baseline, row.canary, row.finding.value)
        for s in delivery.steps
        for row in (s.comparison.rows if s.comparison else ())
    ]
    if compared:
        parts.append(table(("traffic", "question", "live", "new", "finding"), compared))
    return "\n\n".join(parts) + "\n"


def teardown_markdown(teardown: TeardownReport) -> str:
    rows = [
        *(("removed", change) for change in teardown.removed),
        *(("kept", change) for change in teardown.kept),
        *(("**left**", change) for change in teardown.left),
    ]
    table = [f"| {state} | {c.kind} | {_cell(c.name)} | {_cell(c.detail)} |" for state, c in rows]
    verdict = "Nothing of ours is left." if not teardown.left else f"{len(teardown.left)} things of ours are left."
    return "\n".join([verdict, "", "| | kind | name | why |", "|---|---|---|---|", *table])
