from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from rollout.errors import BadInput
from rollout.workload import (
    QUICKSTART,
    WORKLOADS,
    Arrivals,
    PrefixSharing,
    TokenLengths,
    Workload,
    dataset_workload,
    fixed_workload,
    workload_named,
)

SUMMARIES = [  # minimum, median, mean, p90, p99, maximum, as the quickstart prints them
    (QUICKSTART.input_lengths, (4, 108, 226, 635, 887, 1024)),
    (QUICKSTART.output_lengths, (1, 132, 195, 488, 778, 1024)),
]


@pytest.mark.parametrize(("lengths", "summary"), SUMMARIES, ids=["input", "output"])
def test_quickstart_distribution_has_the_six_published_figures(
    lengths: TokenLengths, summary: tuple[float, ...]
) -> None:
    minimum, median, mean, p90, p99, maximum = summary
    assert lengths.mean == pytest.approx(mean)
    assert [lengths.quantile(s) for s in (0, 0.5, 0.9, 0.99, 1)] == pytest.approx([minimum, median, p90, p99, maximum])


@pytest.mark.parametrize(("lengths", "summary"), SUMMARIES, ids=["input", "output"])
@pytest.mark.parametrize("count", [20, 1000])
def test_even_a_short_stage_has_the_published_mean(
    lengths: TokenLengths, summary: tuple[float, ...], count: int
) -> None:
    sample = lengths.sample(count, np.random.default_rng(1))
    assert len(sample) == count
    assert sample.min() >= 1
    assert sample.max() <= summary[-1]
    assert sample.mean() == pytest.approx(summary[2], rel=0.6 / count**0.5)


def test_a_mean_that_no_monotone_curve_has_is_refused() -> None:
    with pytest.raises(BadInput, match="no length distribution"):
        TokenLengths.from_summary(minimum=4, median=108, mean=400, p90=635, p99=887, maximum=1024)


@pytest.mark.parametrize(
    ("name", "input_tokens", "output_tokens"),
    [
        ("customer-support", 8192, 256),
        ("code-completion", 512, 32),
        ("text-summarization", 1024, 128),
        ("chatbot", 128, 128),
        ("text-generation", 512, 2048),
        ("deep-research", 256, 4096),
    ],
)
def test_use_cases_have_the_published_lengths(name: str, input_tokens: int, output_tokens: int) -> None:
    request = workload_named(name).schedule(1, 1)[0]
    assert (request.input_tokens, request.output_tokens) == (input_tokens, output_tokens)


def test_an_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(BadInput, match="quickstart, customer-support"):
        workload_named("quick")


def test_the_same_seed_repeats_a_stage_and_another_does_not() -> None:
    assert QUICKSTART.schedule(5, 10) == QUICKSTART.schedule(5, 10)
    assert QUICKSTART.schedule(5, 10) != QUICKSTART.model_copy(update={"seed": 1}).schedule(5, 10)
    assert QUICKSTART.schedule(5, 10) != QUICKSTART.schedule(5, 10, repeat=1)
    assert QUICKSTART.key == QUICKSTART.model_copy(update={"description": "other words"}).key


@pytest.mark.parametrize("arrivals", list(Arrivals))
def test_a_stage_offers_exactly_its_rate(arrivals: Arrivals) -> None:
    requests = fixed_workload(10, 10, arrivals=arrivals).schedule(7.3, 20)
    times = [request.at_s for request in requests]
    assert len(requests) == 146
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 20


def test_poisson_gaps_are_those_of_independent_users() -> None:
    times = np.array([request.at_s for request in fixed_workload(1, 1).schedule(100, 100)])
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)


def test_constant_gaps_are_equal() -> None:
    times = [r.at_s for r in fixed_workload(1, 1, arrivals=Arrivals.CONSTANT).schedule(4, 2)]
    assert times == pytest.approx([0.25 * i for i in range(8)])


def test_prefix_groups_are_drawn_only_when_asked_for() -> None:
    assert all(request.prefix_group is None for request in QUICKSTART.schedule(10, 5))
    shared = fixed_workload(64, 8, shared_prefix=PrefixSharing(tokens=32, groups=3)).schedule(50, 2)
    assert {request.prefix_group for request in shared} == {0, 1, 2}


def test_a_dataset_is_used_in_turn_and_again_from_the_start() -> None:
    lines = ['{"prompt": "a", "output_tokens": 3}', "", '{"prompt": "b"}']
    requests = dataset_workload("own", lines, output_tokens=9).schedule(2, 3)
    assert sorted(r.prompt or "" for r in requests) == ["a", "a", "a", "b", "b", "b"]
    assert {(r.prompt, r.output_tokens) for r in requests} == {("a", 3), ("b", 9)}


@pytest.mark.parametrize("line", ["nonsense", '{"text": "a"}', '{"prompt": ""}', '["a"]'])
def test_a_bad_dataset_line_is_named(line: str) -> None:
    with pytest.raises(BadInput, match="line 2 is not a prompt"):
        dataset_workload("own", ['{"prompt": "a"}', line])


def test_a_small_context_window_scales_the_lengths_and_changes_the_name() -> None:
    small = QUICKSTART.with_limit(512)
    assert small.name == "quickstart-within-512"
    assert small.max_total_tokens is not None
    assert small.max_total_tokens <= 512
    assert small.key != QUICKSTART.key
    assert QUICKSTART.with_limit(16384) is QUICKSTART


def test_lengths_and_dataset_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="not both"):
        Workload(name="none")
    assert set(WORKLOADS) >= {"quickstart", "chatbot"}
