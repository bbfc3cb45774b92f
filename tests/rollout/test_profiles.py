"""Profiles: operating points, filters, sources, predictions beside measurements, and every output format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rollout.benchmark import BenchmarkSpec, Environment, benchmark_report
from rollout.cost import Price, PricingModel
from rollout.errors import BadInput, NotFound
from rollout.profile_formats import (
    BENCHMARK_LIST_COLUMNS,
    LIST_COLUMNS,
    Format,
    format_named,
    pricing_named,
    read_benchmarks_csv,
    read_inference_perf,
    render_gaps,
    render_list,
    render_notes,
    render_rows,
    render_use_cases,
)
from rollout.profiles import (
    BENCHMARK_COLUMNS,
    PROFILE_COLUMNS,
    USE_CASES,
    Evidence,
    LatencyRange,
    LoadPoint,
    MeasuredOn,
    Profile,
    ProfileAnswer,
    ProfileQuery,
    Row,
    Source,
    StaticSource,
    Targets,
    ask,
    ask_names,
    at_ratio,
    best_curve,
    gaps,
    image_version,
    measured_profile,
    possible_ranges,
    select,
    use_case_named,
    use_case_of,
    use_cases,
    usual_instance,
)
from rollout.profiling import worst_shortfall
from rollout.workload import WORKLOADS
from tests.rollout.curves import QueueServer

H100 = "nvidia-h100-80gb"
GPT_OSS = "openai/gpt-oss-20b"
DOCUMENTED = LoadPoint(
    output_tokens_per_s=13335,
    ntpot_ms=67,
    ttft_ms=297,
    usd_per_million_input_tokens=0.009,
    usd_per_million_output_tokens=0.035,
)
"""The quickstart's example."""


def point(rate: float, **fields: Any) -> LoadPoint:
    """100 output tokens a request; TTFT 10 ms, NTPOT 5 ms, ITL 4 ms per request/s; a dollar per 1000 tokens/s."""
    values = {
        "requests_per_s": rate,
        "output_tokens_per_s": 100 * rate,
        "input_tokens_per_s": 50 * rate,
        "ttft_ms": 10 * rate,
        "ntpot_ms": 5 * rate,
        "itl_ms": 4 * rate,
        "usd_per_million_output_tokens": 10 / rate,
        "usd_per_million_input_tokens": 2.5 / rate,
    }
    return LoadPoint.model_validate(values | fields)


def profile(*points: LoadPoint, **fields: Any) -> Profile:
    values: dict[str, Any] = {
        "model": GPT_OSS,
        "model_server_version": "v0.11.2",
        "accelerator": H100,
        "instance_type": "a3-highgpu-1g",
        "points": points or (point(1), point(4), point(10)),
        "source": Source(name="catalogue", evidence=Evidence.PREDICTION, as_of=date(2026, 11, 1)),
    }
    return Profile.model_validate(values | fields)


def chosen(query: ProfileQuery, *profiles: Profile) -> list[Profile]:
    return [row.profile for row in select(ProfileAnswer(profiles=profiles), query).rows]


# --- Operating points -------------------------------------------------------------------------------------------------


def test_without_targets_a_profile_stands_at_its_saturation() -> None:
    past = point(20, output_tokens_per_s=1010, ttft_ms=5000)

    assert profile(point(1), point(10), past).operating_point() == point(10)


def test_the_measured_knee_decides_over_the_throughput() -> None:
    assert profile(point(1), point(4), point(10), knee_requests_per_s=5.0).saturation == point(4)


def test_between_load_points_throughput_and_latency_are_linear() -> None:
    found = profile().operating_point(Targets(ttft_ms=70))

    assert found is not None
    assert (found.requests_per_s, found.output_tokens_per_s, found.ntpot_ms) == pytest.approx((7, 700, 35))


def test_between_load_points_a_token_costs_what_the_throughput_makes_of_the_price() -> None:
    found = profile().operating_point(Targets(ttft_ms=70))

    assert found is not None
    assert found.usd_per_million_output_tokens == pytest.approx(10 / 7)


@pytest.mark.parametrize(
    ("targets", "rate"),
    [
        (Targets(ttft_ms=10), 1),
        (Targets(ntpot_ms=20), 4),
        (Targets(ttft_ms=70, itl_ms=20), 5),
        (Targets(ttft_ms=10_000), 10),
        (Targets(ttft_ms=9), None),
    ],
)
def test_the_highest_load_within_all_targets_is_chosen(targets: Targets, rate: float | None) -> None:
    found = profile().operating_point(targets)

    assert (found.requests_per_s if found else None) == (pytest.approx(rate) if rate else None)


@given(limit=st.floats(min_value=1, max_value=500))
def test_an_operating_point_never_exceeds_its_target(limit: float) -> None:
    found = profile().operating_point(Targets(ttft_ms=limit))

    assert found is None or (found.ttft_ms or 0) <= limit * (1 + 1e-9)


@given(first=st.floats(min_value=10, max_value=200), second=st.floats(min_value=10, max_value=200))
def test_a_looser_target_never_yields_less(first: float, second: float) -> None:
    low, high = sorted((first, second))
    strict, loose = (profile().operating_point(Targets(ttft_ms=limit)) for limit in (low, high))

    assert strict is not None
    assert loose is not None
    assert strict.output_tokens_per_s <= loose.output_tokens_per_s + 1e-6


def test_an_unstated_metric_meets_no_target() -> None:
    silent = profile(point(1, itl_ms=None), point(10, itl_ms=None))

    assert silent.operating_point(Targets(itl_ms=1000)) is None


def test_littles_law_gives_the_requests_in_flight() -> None:
    assert point(10).concurrency == pytest.approx(1000 * 0.050)
    assert point(10, running_requests=33).concurrency == 33


# --- Measured profiles ------------------------------------------------------------------------------------------------


def measured(workload: str = "chatbot", **on: Any) -> Profile:
    server = QueueServer()
    spec = BenchmarkSpec(workload=WORKLOADS[workload])
    environment = Environment(
        model=GPT_OSS, image="vllm/vllm-openai:v0.32.0@sha256:00", accelerator=H100, accelerator_count=2
    )
    report = benchmark_report(
        spec, environment, server.sweep(spec), started_at=datetime(2026, 11, 20, tzinfo=UTC), duration_s=1
    )
    price = Price(usd_per_gpu_hour=18.0, source="test")
    return measured_profile(report, MeasuredOn.model_validate({"name": "out/report.json", "price": price} | on))


def test_every_sweep_of_ours_is_a_profile() -> None:
    found = measured()

    assert found.source == Source(name="out/report.json", evidence=Evidence.MEASUREMENT, as_of=date(2026, 11, 20))
    assert (found.model_server, found.model_server_version) == ("vllm", "v0.32.0")
    assert (found.instance_type, found.accelerator_count) == ("a3-highgpu-2g", 2)
    assert found.use_case == "Chatbot (ShareGPT)"
    # The server's capacity is 10 requests/s of 100 tokens.
    assert found.saturation.output_tokens_per_s == pytest.approx(1000, rel=0.1)


def test_measured_tokens_cost_what_the_quickstarts_equation_says() -> None:
    at = measured().saturation

    # 2 GPUs x 18 USD/hour = 0.01 USD/s over input/4 + output tokens/s.
    assert at.input_tokens_per_s is not None
    expected = 0.01 / (at.input_tokens_per_s / 4 + at.output_tokens_per_s) * 1e6
    assert at.usd_per_million_output_tokens == pytest.approx(expected)
    assert at.usd_per_million_input_tokens == pytest.approx(expected / 4)


def test_a_profile_is_that_of_one_replica() -> None:
    one, half = measured(), measured(replicas=2)

    assert half.accelerator_count == 1
    assert half.saturation.output_tokens_per_s == pytest.approx(one.saturation.output_tokens_per_s / 2)
    assert half.saturation.usd_per_million_output_tokens == pytest.approx(one.saturation.usd_per_million_output_tokens)


def test_an_unknown_price_leaves_the_cost_out() -> None:
    assert measured(price=None).saturation.usd_per_million_output_tokens is None


@pytest.mark.parametrize(
    ("image", "version"),
    [("vllm/vllm-openai:v0.11.2", "v0.11.2"), ("host:5000/vllm", ""), ("a/b:c@sha256:0", "c"), ("", "")],
)
def test_the_servers_version_is_the_images_tag(image: str, version: str) -> None:
    assert image_version(image) == version


def test_an_instance_type_is_only_named_where_it_is_known() -> None:
    assert usual_instance("nvidia-l4", 4) == "g2-standard-48"
    assert usual_instance("nvidia-l4", 3) == ""
    assert usual_instance("unheard-of", 1) == ""


# --- Use cases --------------------------------------------------------------------------------------------------------


def test_the_six_use_cases_are_the_quickstarts() -> None:
    assert [(each.name, each.input_tokens, each.output_tokens, each.ratio) for each in USE_CASES] == [
        ("Advanced Customer Support", 8192, 256, "32:1"),
        ("Code Completion", 512, 32, "16:1"),
        ("Text Summarization", 1024, 128, "8:1"),
        ("Chatbot (ShareGPT)", 128, 128, "1:1"),
        ("Text Generation", 512, 2048, "1:4"),
        ("Deep Research", 256, 4096, "1:16"),
    ]
    for each in USE_CASES:
        workload = WORKLOADS[each.workload]
        assert workload.input_lengths is not None
        assert (workload.input_lengths.mean, workload.mean_output_tokens) == (each.input_tokens, each.output_tokens)


def test_use_cases_are_found_by_any_spelling() -> None:
    assert use_case_named("chatbot").name == use_case_named("Chatbot (ShareGPT)").name
    assert use_case_named("customer-support").name == "Advanced Customer Support"
    with pytest.raises(BadInput, match="Known are Advanced Customer Support"):
        use_case_named("poetry")


def test_a_profiles_own_use_case_is_a_use_case() -> None:
    own = profile(use_case="my-dataset")

    assert chosen(ProfileQuery(use_case="quickstart"), profile(use_case="quickstart"), own)[0].use_case == "quickstart"
    assert chosen(ProfileQuery(use_case="My-Dataset"), own) == [own]
    with pytest.raises(BadInput, match="quickstart, my-dataset"):
        chosen(ProfileQuery(use_case="poetry"), own)


def test_the_quickstarts_example_for_llm_d_is_a_use_case_without_lengths() -> None:
    found = use_case_named("Multi Agent Large Document Summarization")

    assert (found.input_tokens, found.output_tokens, found.ratio) == (None, None, "")


def test_what_our_measurements_used_is_listed_too() -> None:
    names = [each.name for each in use_cases([measured("quickstart"), measured()])]

    assert names == [*(each.name for each in USE_CASES), "quickstart"]
    assert "inference-perf" in render_use_cases(use_cases([measured("quickstart")]), Format.TABLE)


# --- Queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ({"model": GPT_OSS}, {"model": "other/model"}),
        ({"model_server": "vllm"}, {"model_server": "tgi"}),
        ({"model_server_version": "v0.11.2"}, {"model_server_version": "v0.9.0"}),
        ({"accelerator": H100}, {"accelerator": "nvidia-l4"}),
        ({"instance_type": "a3-highgpu-1g"}, {"instance_type": "a3-highgpu-8g"}),
        ({"pricing_model": PricingModel.SPOT}, {"pricing_model": PricingModel.ON_DEMAND}),
        ({"use_case": "deep research"}, {"use_case": "Code Completion"}),
        ({"serving_stack": "llm-d"}, {"serving_stack": "vllm"}),
        ({"serving_stack_version": "v0.3"}, {"serving_stack_version": "v0.4"}),
        ({"input_length": 55, "output_length": 110}, {"points": (point(10, input_tokens_per_s=5000),)}),
        ({"targets": Targets(itl_ms=20)}, {"points": (point(10),)}),
        ({"max_usd_per_million_output_tokens": 2.0}, {"points": (point(1),)}),
        ({"max_usd_per_million_input_tokens": 1.0}, {"points": (point(1),)}),
    ],
)
def test_every_filter_keeps_what_matches_and_drops_what_does_not(query: dict[str, Any], fields: dict[str, Any]) -> None:
    fitting = profile(
        use_case="Deep Research",
        serving_stack="llm-d",
        serving_stack_version="v0.3",
        pricing_model=query.get("pricing_model", PricingModel.ON_DEMAND),
    )
    other = fitting.model_copy(update=fields)

    assert chosen(ProfileQuery(**query), fitting, other) == [fitting]


def test_a_source_that_does_not_state_what_is_filtered_says_so() -> None:
    found = select(ProfileAnswer(profiles=(profile(),)), ProfileQuery(use_case="Chatbot"))

    assert found.rows == ()
    assert "catalogue does not state the use case" in " ".join(found.notes)


def test_prices_of_another_model_are_left_out_with_a_note() -> None:
    found = select(ProfileAnswer(profiles=(profile(pricing_model=PricingModel.SPOT),)), ProfileQuery())

    assert found.rows == ()
    assert "states spot costs" in found.notes[0]


def test_all_means_every_version() -> None:
    assert len(chosen(ProfileQuery(model_server_version="all"), profile(), profile(model_server_version="v1"))) == 2


def test_an_unreachable_target_says_which_latencies_are_possible() -> None:
    found = select(ProfileAnswer(profiles=(profile(),)), ProfileQuery(targets=Targets(ttft_ms=1)))

    assert found.rows == ()
    assert "no recommendation" in found.notes[0]
    assert "TTFT 10 to 100 ms" in found.notes[0]


def test_a_source_that_answers_with_the_range_alone_is_heard() -> None:
    stated = (LatencyRange(metric="TTFT", lowest_ms=75, highest_ms=280),)
    too_low = select(ProfileAnswer(ranges=stated), ProfileQuery(targets=Targets(ttft_ms=1)))
    within = select(ProfileAnswer(ranges=stated), ProfileQuery(targets=Targets(ttft_ms=100)))

    assert "Choose one within what was observed: TTFT 75 to 280 ms" in too_low.notes[0]
    assert within.notes == ("no profile matches; the sources know no model",)


def test_the_range_is_that_of_everything_that_was_observed() -> None:
    stated = (LatencyRange(metric="TTFT", lowest_ms=5, highest_ms=280),)
    found = select(ProfileAnswer(profiles=(profile(),), ranges=stated), ProfileQuery(targets=Targets(ttft_ms=1)))

    assert "TTFT 5 to 280 ms" in found.notes[0]


def test_a_missing_price_is_asked_for() -> None:
    free = {"usd_per_million_output_tokens": None, "usd_per_million_input_tokens": None}
    found = select(ProfileAnswer(profiles=(profile(point(1, **free), accelerator="nvidia-b200"),)), ProfileQuery())

    assert "--usd-per-accelerator-hour nvidia-b200=USD" in found.notes[0]


def test_an_unreachable_cost_says_the_lowest() -> None:
    found = select(ProfileAnswer(profiles=(profile(),)), ProfileQuery(max_usd_per_million_output_tokens=0.5))

    assert "the lowest cost is 1.000 USD" in found.notes[0]


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    found = select(ProfileAnswer(profiles=(profile(),)), ProfileQuery(model="nobody/nothing"))

    assert f"the sources know {GPT_OSS}" in found.notes[0]


def test_rows_are_sorted_by_any_column_and_unknown_values_come_last() -> None:
    cheap, dear, unknown = (
        profile(point(10, usd_per_million_output_tokens=usd), model=name)
        for usd, name in ((1.0, "a/cheap"), (2.0, "a/dear"), (None, "a/unknown"))
    )
    everything = (dear, unknown, cheap)

    assert chosen(ProfileQuery(), *everything) == [cheap, dear, unknown]
    assert chosen(ProfileQuery(sort_by=("~usd_per_million_output_tokens",)), *everything) == [dear, cheap, unknown]
    assert chosen(ProfileQuery(sort_by=("~model",)), *everything) == [unknown, dear, cheap]
    assert chosen(ProfileQuery(limit=1), *everything) == [cheap]
    with pytest.raises(BadInput, match="there is no column 'price'"):
        chosen(ProfileQuery(sort_by=("price",)), *everything)


def test_ranges_are_those_of_all_profiles_together() -> None:
    other = profile(point(0.5), point(5))

    assert [str(each) for each in possible_ranges([profile(), other])] == [
        "TTFT 5 to 100 ms",
        "NTPOT 2.5 to 50 ms",
        "ITL 2 to 40 ms",
    ]


# --- Several sources --------------------------------------------------------------------------------------------------


def test_a_prediction_stands_beside_the_measurement_of_the_same_thing() -> None:
    ours = profile(
        point(1), point(8), source=Source(name="ours", evidence=Evidence.MEASUREMENT, as_of=date(2026, 11, 20))
    )
    older = ours.model_copy(update={"source": ours.source.model_copy(update={"as_of": date(2026, 1, 1)})})
    elsewhere = ours.model_copy(update={"accelerator": "nvidia-l4"})
    answer = ask([StaticSource("a", [profile()]), StaticSource("b", [older, ours, elsewhere])], ProfileQuery())

    (gap,) = select(answer, ProfileQuery()).gaps

    assert gap.measurement == ours
    differences = {label: share for label, _, _, share in gap.differences()}
    assert differences["output tokens/s"] == pytest.approx(-0.2)
    assert differences["TTFT ms"] == pytest.approx(-0.2)
    assert gap.shortfall == pytest.approx(0.25)  # a token costs 1.25 USD instead of 1.00
    text = render_list(select(answer, ProfileQuery()), Format.TABLE)
    assert "-20%" in text
    assert "Predicted  Measured  Difference" in text


@pytest.mark.parametrize(
    ("workload", "named", "shortfall"),
    [
        ("chatbot", "the same", 0.5),
        ("quickstart", "the same", 0.5),
        ("deep-research", "another: Deep Research", 0.0),
    ],
)
def test_a_prediction_without_a_use_case_is_held_against_googles_default_workloads_only(
    workload: str, named: str, shortfall: float
) -> None:
    ours = profile(source=Source(name="ours", evidence=Evidence.MEASUREMENT), use_case=use_case_of(workload))
    twice = tuple(each.model_copy(update={"output_tokens_per_s": each.output_tokens_per_s * 2}) for each in ours.points)
    predicted = profile(*twice)

    (gap,) = gaps([predicted, ours])

    assert gap.workload == named
    assert worst_shortfall((gap,)) == pytest.approx(shortfall)
    assert named in render_gaps([gap])


def test_what_was_measured_with_googles_default_stands_before_younger_measurements_with_others() -> None:
    def ours(workload: str, day: int) -> Profile:
        source = Source(name="ours", evidence=Evidence.MEASUREMENT, as_of=date(2026, 11, day))
        return profile(source=source, use_case=use_case_of(workload))

    chatbot, younger = ours("chatbot", 1), ours("text-generation", 20)

    (gap,) = gaps([profile(), younger, chatbot])

    assert gap.measurement == chatbot


def test_different_use_cases_are_not_compared() -> None:
    ours = measured().model_copy(update={"accelerator_count": 1})
    predicted = profile(use_case="Deep Research")

    assert select(ProfileAnswer(profiles=(predicted, ours)), ProfileQuery()).gaps == ()


def test_the_same_profile_from_two_sources_is_shown_once() -> None:
    answer = ask([StaticSource("a", [profile()]), StaticSource("b", [profile()])], ProfileQuery())

    assert len(answer.profiles) == 1


def test_a_measurement_is_the_better_curve() -> None:
    assert best_curve([profile(), measured(), profile()]) == measured()
    assert best_curve([]) is None


def test_a_curve_is_that_of_such_a_replica_and_such_requests() -> None:
    two, research = profile(accelerator_count=2), profile(use_case="Deep Research")
    chatbot, unstated = profile(use_case="Chatbot (ShareGPT)"), profile()

    assert best_curve([two], accelerator_count=1) is None
    assert best_curve([research, unstated], accelerator_count=1, use_case="Chatbot (ShareGPT)") == unstated
    assert best_curve([unstated, chatbot], accelerator_count=1, use_case="Chatbot (ShareGPT)") == chatbot


class FailingSource(StaticSource):
    """A source that cannot be asked."""

    def models(self) -> Sequence[str]:
        raise NotFound("it is away.", where=self.name)

    def profiles(self, query: ProfileQuery) -> ProfileAnswer:
        raise NotFound("it is away.", where=self.name)

    benchmarks = profiles


def test_a_source_that_fails_does_not_hide_the_others() -> None:
    away, here = FailingSource("far", []), StaticSource("near", [profile()])

    for every_point in (False, True):
        answer = ask([away, here], ProfileQuery(), every_point=every_point)
        assert (answer.profiles, answer.notes) == ((profile(),), ("left out: far: it is away.",))
    assert ask_names([away, here], lambda each: each.models()) == ((GPT_OSS,), ("left out: far: it is away.",))


def test_where_nobody_knows_a_profile_the_failure_is_the_answer() -> None:
    away, empty = FailingSource("far", []), StaticSource("near", [])

    with pytest.raises(NotFound, match="it is away"):
        ask([empty, away], ProfileQuery())
    with pytest.raises(NotFound, match="it is away"):
        ask_names([empty, away], lambda each: each.models())


def test_costs_of_another_ratio_are_worked_out_or_left_out() -> None:
    # 1 USD per 1000 s over 500/4 + 1000 tokens/s.
    usd_output = 1e-3 / 1125 * 1e6
    costs = {"usd_per_million_output_tokens": usd_output, "usd_per_million_input_tokens": usd_output / 4}
    known, unknown = profile(point(10, **costs)), profile(point(10, **costs, input_tokens_per_s=None))

    same, no_note = at_ratio(known, 4.0)
    other, _ = at_ratio(known, 2.0)
    lost, note = at_ratio(unknown, 2.0)

    assert (same, no_note) == (known, None)
    assert other.saturation.usd_per_million_output_tokens == pytest.approx(1e-3 / (500 / 2 + 1000) * 1e6)
    assert other.saturation.usd_per_million_input_tokens == pytest.approx(1e-3 / (500 / 2 + 1000) / 2 * 1e6)
    assert not lost.has_costs
    assert note is not None
    assert "of about 4" in note
    # Three decimals: 0.035 and 0.009 are a ratio of four as well as of 3.9.
    assert at_ratio(profile(DOCUMENTED), 4.0) == (profile(DOCUMENTED), None)


def test_a_source_lists_what_it_knows() -> None:
    source = StaticSource("a", [profile(), profile(model_server_version="v0.9.0"), profile(model="b/b")])

    assert source.models() == ["b/b", GPT_OSS]
    assert source.model_servers(GPT_OSS) == ["vllm"]
    assert source.model_server_versions(GPT_OSS, "vllm") == ["v0.11.2", "v0.9.0"]


# --- Formats ----------------------------------------------------------------------------------------------------------


def test_the_table_has_the_documented_columns_and_the_documented_row() -> None:
    row = Row(profile=profile(DOCUMENTED, model_server_version="gptoss"), point=DOCUMENTED)

    header, line = render_rows([row], PROFILE_COLUMNS, Format.TABLE).splitlines()

    assert " ".join(header.split()) == (
        "Instance Type Accelerator Cost/M Input Tokens Cost/M Output Tokens Output Tokens/s NTPOT(ms) TTFT(ms)"
        " Model Server Model Server Version Model"
    )
    assert line.split() == (
        [
            "a3-highgpu-1g",
            "nvidia-h100-80gb",
            "0.009",
            "0.035",
            "13335",
            "67",
            "297",
            "vllm",
            "gptoss",
            "openai/gpt-oss-20b",
        ]
    )


def test_the_csv_has_gclouds_columns_first_and_reads_back() -> None:
    original = profile(use_case="Chatbot (ShareGPT)", serving_stack="vllm", pricing_model=PricingModel.SPOT)
    rows = [Row(profile=original, point=each) for each in original.points]

    text = render_rows(rows, BENCHMARK_LIST_COLUMNS, Format.CSV)
    (read,) = read_benchmarks_csv(text, name="file.csv")

    assert next(csv.reader(io.StringIO(text)))[: len(BENCHMARK_COLUMNS)] == [
        *("Instance Type", "Accelerator Type", "Model Name", "Model Server Name", "Model Server Version"),
        *("Output Tokens/s", "NTPOT (ms)", "TTFT (ms)", "QPS", "Cost/M Input Tokens", "Cost/M Output Tokens"),
    ]
    assert read.model_copy(update={"points": original.points}) == original
    assert [each.output_tokens_per_s for each in read.points] == [100, 400, 1000]


def test_gclouds_own_csv_is_read_as_a_prediction() -> None:
    text = (
        "Instance Type,Accelerator Type,Model Name,Model Server Name,Model Server Version,Output Tokens/s,NTPOT (ms),"
        "TTFT (ms),QPS,Cost/M Input Tokens,Cost/M Output Tokens\n"
        "g2-standard-48,nvidia-l4,google/gemma-2-27b-it,vllm,v0.7.2,100,60,300,0.5,N/A,N/A\n"
        "g2-standard-48,nvidia-l4,google/gemma-2-27b-it,vllm,v0.7.2,700,200,900,3.5,0.300,1.200\n"
    )
    (read,) = read_benchmarks_csv(text, name="profiles.csv")

    assert read.accelerator_count == 4  # a g2-standard-48 has four
    assert read.pricing_model is None  # the file does not say, so nobody does
    assert read.source == Source(name="profiles.csv", evidence=Evidence.PREDICTION)
    assert read.points[0].usd_per_million_output_tokens is None
    assert read.saturation.ntpot_ms == 200


HEADER = "Accelerator Type,Model Name,Model Server Name,Output Tokens/s\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n", "no column 'Accelerator Type'"),
        (
            "Accelerator Type,Model Name,Model Server Name,Output Tokens/s\nx,y,z,fast\n",
            "line 2: Output Tokens/s is 'fast'",
        ),
        ("Accelerator Type,Model Name,Model Server Name,Output Tokens/s\nx,y,z\n", "line 2 does not have"),
        (
            "Accelerator Type,Model Name,Model Server Name,Output Tokens/s\nx,y,z,N/A\n",
            "line 2: Output Tokens/s is missing",
        ),
    ],
)
def test_a_broken_csv_is_refused_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        read_benchmarks_csv(text, name="file.csv")


def test_json_and_yaml_hold_numbers_source_and_date() -> None:
    found = select(ProfileAnswer(profiles=(profile(),)), ProfileQuery())

    (from_json,) = json.loads(render_list(found, Format.JSON))
    (from_yaml,) = yaml.safe_load(render_list(found, Format.YAML))

    assert from_json == from_yaml
    assert list(from_json) == [*(column.key for column in LIST_COLUMNS), "gaps"]
    assert (from_json["output_tokens_per_s"], from_json["source"], from_json["as_of"]) == (
        1000,
        "catalogue",
        "2026-11-01",
    )


def test_json_holds_what_was_predicted_and_what_was_measured() -> None:
    ours = profile(point(1), point(8), source=Source(name="ours", evidence=Evidence.MEASUREMENT))
    found = select(ProfileAnswer(profiles=(profile(), ours)), ProfileQuery())

    rows = {row["source"]: row for row in json.loads(render_list(found, Format.JSON))}
    by_figure = {each["figure"]: each for each in rows["catalogue"]["gaps"]}

    assert (by_figure["output tokens/s"]["predicted"], by_figure["output tokens/s"]["measured"]) == (1000, 800)
    assert by_figure["output tokens/s"]["difference"] == pytest.approx(-0.2)
    assert rows["ours"]["gaps"] == []


def test_notes_belong_to_no_format() -> None:
    found = select(ProfileAnswer(), ProfileQuery())

    assert [render_list(found, form) for form in (Format.TABLE, Format.JSON, Format.YAML)] == ["", "[]\n", "[]\n"]
    assert render_notes(found.notes) == "Note: no profile matches; the sources know no model\n"


def test_gclouds_names_of_formats_and_prices_are_understood() -> None:
    assert [format_named(name) for name in ("profile", "csvprofile", "yaml")] == [Format.TABLE, Format.CSV, Format.YAML]
    assert pricing_named("3-years-cud") is PricingModel.COMMITMENT_3Y
    assert pricing_named("on-demand") is PricingModel.ON_DEMAND
    for wrong in (format_named, pricing_named):
        with pytest.raises(BadInput, match="Known are"):
            wrong("xml")


def stage_report(rate: float) -> dict[str, Any]:
    """One of inference-perf's stage reports, as far as it is read."""
    latency = {
        "time_to_first_token": {"mean": 0.3, "median": 0.1 * rate},
        "normalized_time_per_output_token": {"p50": 0.02 * rate},
        "inter_token_latency": {"median": 0.015},
    }
    throughput = {"input_tokens_per_sec": 200 * rate, "output_tokens_per_sec": 100 * rate, "requests_per_sec": rate}
    return {"successes": {"count": 10, "latency": latency, "throughput": throughput}, "failures": {"count": 0}}


def test_inference_perfs_stage_reports_are_a_profile() -> None:
    reports = {f"stage_{i}_lifecycle_metrics.json": stage_report(rate) for i, rate in enumerate((1.0, 2.0))}
    price = Price(usd_per_gpu_hour=36.0, source="test")

    found = read_inference_perf(reports, name="reports", model=GPT_OSS, accelerator=H100, price=price)

    assert found.source.evidence is Evidence.MEASUREMENT
    assert found.pricing_model is PricingModel.ON_DEMAND
    at = found.saturation
    assert (at.ttft_ms, at.ntpot_ms, at.itl_ms) == pytest.approx((200, 40, 15))
    # 0.01 USD/s over 400/4 + 200 weighted tokens/s.
    assert at.usd_per_million_output_tokens == pytest.approx(0.01 / 300 * 1e6)


def test_inference_perfs_costs_are_those_that_were_asked_for() -> None:
    found = read_inference_perf(
        {"stage_0_lifecycle_metrics.json": stage_report(1.0)},
        name="reports",
        model=GPT_OSS,
        accelerator=H100,
        accelerator_count=2,
        price=Price(usd_per_gpu_hour=36.0, source="test"),
        pricing_model=PricingModel.SPOT,
        output_to_input_ratio=2.0,
    )

    assert (found.pricing_model, found.accelerator_count) == (PricingModel.SPOT, 2)
    # 2 GPUs: 0.02 USD/s over 200/2 + 100 weighted tokens/s.
    assert found.saturation.usd_per_million_output_tokens == pytest.approx(0.02 / 200 * 1e6)
    assert found.saturation.usd_per_million_input_tokens == pytest.approx(0.02 / 200 / 2 * 1e6)


def test_a_stage_without_answers_is_no_load_point() -> None:
    with pytest.raises(BadInput, match="no successful request"):
        read_inference_perf({"s": {"successes": {"count": 0}}}, name="r", model=GPT_OSS, accelerator=H100)
