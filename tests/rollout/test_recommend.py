"""From requirements to ranked options, and why the others lost."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.cost import Price
from rollout.profile_formats import Format, render_recommendation
from rollout.profiles import Evidence, LoadPoint, Profile, Source, Targets
from rollout.recommend import Recommendation, Requirements, recommend

PRICES = {"nvidia-h100-80gb": 10.0, "nvidia-l4": 1.0}


def price_of(profile: Profile) -> Price | None:
    usd = PRICES.get(profile.accelerator)
    return Price(usd_per_gpu_hour=usd, source="test") if usd else None


def profile(accelerator: str, capacity_per_s: float, ttft_ms: float, **fields: Any) -> Profile:
    """100 tokens in and out per request; latencies double from idle to saturation."""
    points = tuple(
        LoadPoint(
            requests_per_s=capacity_per_s * share,
            output_tokens_per_s=100 * capacity_per_s * share,
            input_tokens_per_s=100 * capacity_per_s * share,
            ttft_ms=ttft_ms * (1 + share),
            ntpot_ms=ttft_ms / 10 * (1 + share),
        )
        for share in (0.1, 1.0)
    )
    source = Source(name=f"{accelerator} sweep", evidence=Evidence.MEASUREMENT)
    return Profile(model="org/model", accelerator=accelerator, points=points, source=source, **fields)


FAST, CHEAP = profile("nvidia-h100-80gb", 20, 50), profile("nvidia-l4", 1, 200)


def advised(*profiles: Profile, **requirements: Any) -> Recommendation:
    return recommend(profiles or (FAST, CHEAP), Requirements(**requirements), price_of)


def test_the_cheapest_way_to_carry_the_demand_is_the_best() -> None:
    found = advised(requests_per_s=4)

    # At 80 % an L4 carries 0.8 requests/s: five of them for 5 USD/hour; one H100 costs 10.
    assert [(each.profile, each.replicas, each.usd_per_hour) for each in found.options] == [
        (CHEAP, 5, 5.0),
        (FAST, 1, 10.0),
    ]
    assert found.best is not None
    assert found.best.headroom == pytest.approx(0.2)
    assert found.losers[0].reason == "it meets everything, and costs 10.00 USD/hour, 100% more than the best"


def test_with_more_demand_the_larger_accelerator_wins() -> None:
    assert advised(requests_per_s=16).options[0].profile == FAST
    assert advised(output_tokens_per_s=1600).options[0].profile == FAST


def test_a_latency_target_rules_the_slow_one_out_and_says_by_how_much() -> None:
    found = advised(requests_per_s=4, targets=Targets(ttft_ms=100))

    assert [each.profile for each in found.options] == [FAST]
    assert found.losers[0].reason == "TTFT is at least 220 ms, the target is 100 ms"


def test_an_impossible_target_says_the_possible_range() -> None:
    found = advised(targets=Targets(ttft_ms=10))

    assert found.best is None
    assert "TTFT 55 to 400 ms" in found.notes[0]


def test_an_empty_answer_is_not_a_silent_one() -> None:
    assert "the sources know no profile" in recommend([], Requirements(), price_of).notes[0]


def test_a_target_above_every_latency_is_maximum_throughput() -> None:
    found = advised(FAST, targets=Targets(ntpot_ms=1000))

    assert found.best is not None
    assert found.best.point == FAST.saturation
    assert "above every observed latency: maximum throughput" in found.best.notes[0]


@pytest.mark.parametrize(
    ("requirements", "reason"),
    [
        ({"max_usd_per_hour": 4.0, "requests_per_s": 4}, "it costs 5.00 USD/hour, the budget is 4.00"),
        (
            {"max_usd_per_million_output_tokens": 1.0},
            "it costs 2.222 USD per million output tokens, the limit is 1.000",
        ),
        ({"accelerators": ("nvidia-h100-80gb",)}, "it runs on nvidia-l4"),
        ({"model": "org/other"}, "it serves org/model"),
        ({"use_case": "chatbot"}, "its source does not state the use case"),
        ({"targets": Targets(itl_ms=10)}, "its source does not state ITL"),
    ],
)
def test_every_loser_says_why(requirements: dict[str, Any], reason: str) -> None:
    losers = {each.profile: each.reason for each in advised(**requirements).losers}

    assert losers[CHEAP] == reason


def test_a_profile_of_another_use_case_loses() -> None:
    other = profile("nvidia-l4", 1, 200, use_case="Deep Research")

    assert advised(other, use_case="chatbot").losers[0].reason == "it was measured with Deep Research"


def test_tokens_cost_what_the_quickstarts_equation_says_at_the_operating_point() -> None:
    found = advised(FAST).best
    assert found is not None

    # 10 USD/hour over 2000/4 + 2000 weighted tokens/s.
    assert found.usd_per_million_output_tokens == pytest.approx(10 / 3600 / 2500 * 1e6)
    assert found.usd_per_million_input_tokens == pytest.approx(10 / 3600 / 2500 / 4 * 1e6)


def test_without_a_price_an_option_stands_last_and_no_budget_can_hold_it() -> None:
    unpriced = profile("nvidia-b200", 50, 10)

    assert [each.profile for each in advised(unpriced, CHEAP).options] == [CHEAP, unpriced]
    assert "budget cannot be checked" in advised(unpriced, max_usd_per_hour=100).losers[0].reason


def test_a_ranking_says_where_a_price_is_missing() -> None:
    unpriced = profile("nvidia-b200", 50, 10)
    found = advised(unpriced, CHEAP)

    assert "no price" in render_recommendation(found, Format.TABLE)
    assert any("--usd-per-accelerator-hour nvidia-b200=USD" in note for note in found.all_notes)


CATALOGUED = FAST.model_copy(
    update={
        "points": tuple(
            point.model_copy(update={"input_tokens_per_s": None, "usd_per_million_output_tokens": 0.5})
            for point in FAST.points
        )
    }
)
"""As Google's: costs, and no input tokens/s to work them out from."""


def list_price_of(profile: Profile) -> Price | None:
    return Price(usd_per_gpu_hour=11.0, source="list", as_of=date(2025, 3, 6))


def test_a_catalogues_token_costs_stand_beside_its_own_price_only() -> None:
    at_home = recommend([CATALOGUED], Requirements(), list_price_of).best
    elsewhere = recommend([CATALOGUED], Requirements(region="europe-west4"), list_price_of).best
    own = recommend([CATALOGUED], Requirements(), price_of).best

    assert at_home is not None
    assert (at_home.usd_per_million_output_tokens, at_home.notes) == (0.5, ())
    for found in (elsewhere, own):
        assert found is not None
        assert found.usd_per_million_output_tokens is None
        assert "at its own price it is 0.500 USD" in found.notes[0]


def test_losers_are_rows_of_json_with_their_reason() -> None:
    rows = json.loads(render_recommendation(advised(requests_per_s=4, targets=Targets(ttft_ms=100)), Format.JSON))

    assert [(row["rank"], row["accelerator"], row["reason"]) for row in rows] == [
        (1, "1 x nvidia-h100-80gb", None),
        (None, "1 x nvidia-l4", "TTFT is at least 220 ms, the target is 100 ms"),
    ]
    assert list(rows[0]) == list(rows[1])


def test_demand_is_stated_once() -> None:
    with pytest.raises(ValidationError, match="state the demand once"):
        Requirements(requests_per_s=1, output_tokens_per_s=1)


@given(demand=st.floats(min_value=0.01, max_value=1000))
def test_no_replica_is_ever_used_beyond_the_utilisation(demand: float) -> None:
    for option in advised(requests_per_s=demand).options:
        assert option.point.requests_per_s is not None
        assert demand <= 0.8 * option.replicas * option.point.requests_per_s * (1 + 1e-6)
        assert option.headroom >= 0.2 - 1e-6


@given(one=st.floats(min_value=0.1, max_value=100), other=st.floats(min_value=0.1, max_value=100))
def test_more_demand_never_costs_less(one: float, other: float) -> None:
    low, high = (advised(requests_per_s=demand).best for demand in sorted((one, other)))

    assert low is not None
    assert high is not None
    assert (low.usd_per_hour or 0) <= (high.usd_per_hour or 0)


def test_the_table_ranks_and_names_the_losers() -> None:
    text = render_recommendation(advised(requests_per_s=4, targets=Targets(ttft_ms=100)), Format.TABLE)

    assert "1 x nvidia-h100-80gb" in text
    assert "Not chosen: org/model on 1 x nvidia-l4 (nvidia-l4 sweep): TTFT is at least 220 ms" in text
