from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from rollout.benchmark import BenchmarkReport, BenchmarkSpec, Environment, benchmark_report, next_rate, next_stage
from rollout.curve import is_sustained
from rollout.stage import (
    FailureKind,
    Percentiles,
    RequestLimits,
    RequestRecord,
    parse_vllm_metrics,
    server_side,
    summarize,
)
from rollout.workload import WORKLOADS
from tests.rollout.curves import QueueServer

SERVER = QueueServer(10)


def record(
    at_s: float, *, ttft_s: float = 0.1, itl_s: float = 0.01, tokens: int = 11, failure: FailureKind | None = None
) -> RequestRecord:
    times = [at_s + ttft_s + i * itl_s for i in range(tokens)]
    return RequestRecord(
        scheduled_s=at_s,
        sent_s=at_s,
        input_tokens=20,
        planned_output_tokens=tokens,
        output_tokens=tokens if failure is None else 0,
        token_times_s=times if failure is None else [],
        ended_s=times[-1],
        failure=failure,
        detail="HTTP 500: broken" if failure is FailureKind.SERVER_ERROR else "",
    )


def test_a_stage_has_the_textbook_latencies() -> None:
    stage = summarize([record(i * 0.1) for i in range(100)], duration_s=10)
    assert stage.rate_per_s == pytest.approx(10)
    assert stage.ttft_s is not None
    assert stage.itl_s is not None
    assert stage.tpot_s is not None
    assert stage.ntpot_s is not None
    assert stage.e2e_s is not None
    assert stage.ttft_s.p99 == pytest.approx(0.1)
    assert stage.itl_s.mean == pytest.approx(0.01)
    assert stage.itl_s.count == 1000
    assert stage.tpot_s.p50 == pytest.approx(0.01)
    assert stage.ntpot_s.p50 == pytest.approx(0.2 / 11)
    assert stage.e2e_s.p95 == pytest.approx(0.2)
    assert stage.output_tokens_per_s == pytest.approx(110, rel=0.02)
    assert stage.offered_output_tokens_per_s == pytest.approx(110)
    assert stage.concurrency_mean == pytest.approx(2, rel=0.05)
    assert stage.failures == {}


def test_several_tokens_in_one_piece_count_as_several() -> None:
    records = [record(i * 0.1) for i in range(100)]
    for each in records:
        each.output_tokens *= 2
        each.planned_output_tokens *= 2
    assert summarize(records, duration_s=10).follows == pytest.approx(1, rel=0.02)


def test_failures_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    records = [record(i * 0.1) for i in range(8)]
    records += [record(0.8, failure=FailureKind.SERVER_ERROR), record(0.9, failure=FailureKind.REFUSED)]
    stage = summarize(records, duration_s=1)
    assert stage.failures == {"connection-refused": 1, "server-error": 1}
    assert stage.failed_share == pytest.approx(0.2)
    assert stage.first_failure == "HTTP 500: broken"
    assert stage.ttft_s is not None
    assert stage.ttft_s.count == 8


def stuck(at_s: float) -> RequestRecord:
    return RequestRecord(
        scheduled_s=at_s, sent_s=at_s, ended_s=at_s + 30, failure=FailureKind.UNFINISHED, detail="still running"
    )


def test_unfinished_requests_keep_their_waiting_time_in_the_ttft() -> None:
    stage = summarize([*(record(i * 0.1) for i in range(9)), stuck(0.9)], duration_s=1)
    assert stage.ttft_s is not None
    assert stage.ttft_s.maximum == pytest.approx(30)
    assert stage.failed_share == pytest.approx(0.1)
    assert stage.error_share == 0
    assert stage.first_failure == "still running"


@pytest.mark.parametrize(("hang_from_s", "sustained"), [(0.0, False), (9.0, True)])
def test_only_requests_that_arrived_late_may_be_unfinished(hang_from_s: float, sustained: bool) -> None:
    """Five of 100 requests hang: a server that loses answers does not keep up, whatever the others wait."""
    records = [record(i * 0.1) for i in range(100)]
    first = round(hang_from_s * 10)
    records[first : first + 10 : 2] = [stuck(i * 0.1) for i in range(first, first + 10, 2)]
    stage = summarize(records, duration_s=10)
    # The median of the late requests waits no longer than the others.
    assert is_sustained(stage, 0.1) is sustained


def test_a_server_that_ends_answers_early_is_not_overloaded() -> None:
    records = [record(i * 0.1) for i in range(100)]
    for each in records:
        each.planned_output_tokens *= 2
    stage = summarize(records, duration_s=10)
    assert stage.follows == pytest.approx(1, rel=0.02)
    assert stage.answer_share == pytest.approx(0.5)
    assert is_sustained(stage, 0.1)
    report = benchmark_report(
        BenchmarkSpec(), Environment(model="m"), [stage], started_at=datetime(2026, 11, 22, tzinfo=UTC), duration_s=10
    )
    assert report.notes == ("Answers ended early, at 50% of the tokens that were asked for: the load was lighter.",)


def test_prompts_that_the_server_counts_otherwise_are_noted() -> None:
    records = [record(i * 0.1) for i in range(100)]
    for each in records:
        each.planned_input_tokens, each.input_tokens = 100, 107
    stage = summarize(records, duration_s=10)
    assert stage.prompt_share == pytest.approx(1.07)
    report = benchmark_report(
        BenchmarkSpec(), Environment(model="m"), [stage], started_at=datetime(2026, 11, 22, tzinfo=UTC), duration_s=10
    )
    assert report.notes == ("The server counted 107% of the prompt tokens that were planned: another load.",)


def test_goodput_counts_requests_within_every_limit() -> None:
    records = [record(i * 0.1, ttft_s=0.1 if i % 2 else 0.5) for i in range(100)]
    stage = summarize(records, duration_s=10, limits=RequestLimits(ttft_s=0.2, itl_s=0.02))
    assert stage.goodput_per_s == pytest.approx(stage.requests_per_s / 2)
    assert stage.goodput_share == pytest.approx(0.5)


def test_a_stage_in_which_nothing_was_answered_still_has_figures() -> None:
    stage = summarize([record(0.1, failure=FailureKind.REFUSED)], duration_s=1)
    assert (stage.completed, stage.ttft_s, stage.itl_s) == (0, None, None)
    assert stage.follows == 0


def test_percentiles_of_nothing_are_none() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of(np.arange(101)) == Percentiles(
        count=101, mean=50, p50=50, p90=90, p95=95, p99=99, maximum=100
    )


METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_running{{engine="1",model_name="m"}} 1.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} 2.0
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.25
vllm:kv_cache_usage_perc{{engine="1",model_name="m"}} 0.2
vllm:prefix_cache_queries_total{{engine="0",model_name="m"}} {queries}
vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} 5.0
vllm:num_preemptions_total{{engine="0",model_name="m"}} 3.0
vllm:iteration_tokens_total_bucket{{engine="0",le="1.0",model_name="m"}} 69.0
vllm:request_success_created{{engine="0"}} 1.7e+09
"""


def test_server_metrics_are_averaged_and_subtracted() -> None:
    samples = [parse_vllm_metrics(METRICS.format(running=r, queries=q)) for r, q in ((2, 10), (4, 60), (9, 110))]
    assert "vllm:iteration_tokens_total_bucket" not in samples[0]
    side = server_side(samples)
    assert side is not None
    assert (side.running_mean, side.running_max, side.waiting_mean) == (4, 5, 2)
    assert (side.preemptions, side.prefix_cache_hit_ratio, side.kv_cache_usage_max) == (0, 0, 0.25)


@pytest.mark.parametrize("texts", [[], ["nothing"], ["up 1\n", "up 1\n"]])
def test_servers_without_vllm_metrics_have_no_server_side(texts: list[str]) -> None:
    assert server_side([parse_vllm_metrics(text) for text in texts]) is None


def test_the_sweep_doubles_refines_and_repeats() -> None:
    stages = SERVER.sweep(BenchmarkSpec())
    rates = [stage.rate_per_s for stage in stages]
    assert rates[:5] == [1, 2, 4, 8, 16]
    assert all(8 < rate < 16 for rate in rates[5:])
    lower, upper = sorted(set(rates[-3:]))[-2:]
    assert upper / lower <= 1 + BenchmarkSpec().resolution * 1.02
    assert rates.count(lower) == rates.count(upper) == 2
    assert len(rates) <= BenchmarkSpec().max_stages


def test_an_interrupted_sweep_continues_as_if_nothing_had_happened() -> None:
    spec = BenchmarkSpec()
    stages = SERVER.sweep(spec)
    for finished in range(len(stages)):
        assert next_rate(spec, stages[:finished]) == pytest.approx(stages[finished].rate_per_s)
    assert next_stage(spec, stages) is None


def test_a_start_above_the_knee_is_halved_until_it_is_sustained() -> None:
    stages = SERVER.sweep(BenchmarkSpec(start_rate_per_s=64))
    assert [stage.rate_per_s for stage in stages[:4]] == [64, 32, 16, 8]


def test_a_server_that_has_died_is_not_asked_for_hours() -> None:
    spec, stages = BenchmarkSpec(), []
    while (planned := next_stage(spec, stages)) is not None:
        dead = record(0.1, failure=FailureKind.REFUSED)
        count = round(planned.rate_per_s * planned.duration_s)
        stages.append(summarize([dead] * count, duration_s=count / planned.rate_per_s))
    assert len(stages) == 2


def test_a_slow_server_is_asked_for_less_until_a_stage_would_be_one_request() -> None:
    spec = BenchmarkSpec(stage_duration_s=5)
    stages = [QueueServer(0.001).stage(1.0).model_copy(update={"completed": 1})]
    for _ in range(spec.max_stages):
        planned = next_stage(spec, stages)
        if planned is None:
            break
        stages.append(QueueServer(0.001).stage(planned.rate_per_s).model_copy(update={"completed": 1}))
    assert len(stages) < spec.max_stages
    assert min(stage.rate_per_s for stage in stages) >= 1 / (5 * 10)


@pytest.mark.parametrize("field", ["stage_duration_s", "start_rate_per_s", "max_rate_per_s"])
def test_endless_is_no_number(field: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        BenchmarkSpec(**{field: float("inf")})


def test_fixed_rates_are_measured_as_given() -> None:
    spec = BenchmarkSpec(rates_per_s=(3, 1, 2))
    assert [stage.rate_per_s for stage in SERVER.sweep(spec)] == [3, 1, 2]


def test_max_stages_and_max_rate_are_kept() -> None:
    assert len(SERVER.sweep(BenchmarkSpec(max_stages=3))) == 3
    assert max(s.rate_per_s for s in SERVER.sweep(BenchmarkSpec(max_rate_per_s=5))) == 5


def test_stages_outlast_the_answers() -> None:
    slow = QueueServer(10, base_itl_s=0.1)
    stages = [slow.stage(1.0)]
    planned = next_stage(BenchmarkSpec(stage_duration_s=5), stages)
    assert planned is not None
    assert stages[0].e2e_s is not None
    assert planned.duration_s == pytest.approx(4 * stages[0].e2e_s.p50)


def test_a_start_rate_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValidationError, match="exceeds"):
        BenchmarkSpec(start_rate_per_s=10, max_rate_per_s=5)


def test_a_report_survives_json_and_says_what_a_reader_must_know() -> None:
    stages = SERVER.sweep(BenchmarkSpec())
    broken = stages[0].model_copy(update={"failures": {"timeout": 2}, "first_failure": "no answer"})
    report = benchmark_report(
        BenchmarkSpec(),
        Environment(model="m"),
        [broken, *stages[1:]],
        started_at=datetime(2026, 11, 22, tzinfo=UTC),
        duration_s=10,
    )
    assert BenchmarkReport.model_validate_json(report.model_dump_json()) == report
    assert report.notes == ("2 requests did not complete. no answer",)
    assert not math.isnan(report.curve.max_output_tokens_per_s)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_use_case_can_be_named_and_the_form_lists_them(name: str) -> None:
    spec = BenchmarkSpec.model_validate({"workload": name})
    assert spec.workload == WORKLOADS[name]
    assert BenchmarkSpec.model_validate(spec.model_dump(mode="json")) == spec
    names, spelled_out = BenchmarkSpec.model_json_schema()["properties"]["workload"]["anyOf"]
    assert name in names["enum"]
    assert spelled_out["$ref"].endswith("/Workload")


def test_an_unknown_use_case_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValidationError, match=r"no workload 'chat'.*chatbot"):
        BenchmarkSpec.model_validate({"workload": "chat"})
