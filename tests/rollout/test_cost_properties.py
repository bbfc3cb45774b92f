"""The quickstart's equations hold for all prices, loads and ratios."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.cost import Price, TokenCost, token_cost

usd = st.floats(min_value=0.01, max_value=1000)
tokens = st.floats(min_value=1, max_value=1e6)
ratio = st.floats(min_value=0.1, max_value=100)


def cost(usd_per_hour: float, inputs: float, outputs: float, output_to_input: float, gpus: int = 1) -> TokenCost:
    return token_cost(
        Price(usd_per_gpu_hour=usd_per_hour, source="test"),
        gpus=gpus,
        input_tokens_per_s=inputs,
        output_tokens_per_s=outputs,
        output_to_input_ratio=output_to_input,
    )


@given(usd, tokens, tokens, ratio, st.integers(min_value=1, max_value=16))
def test_what_tokens_cost_together_is_what_the_gpus_cost(
    price: float, inputs: float, outputs: float, output_to_input: float, gpus: int
) -> None:
    found = cost(price, inputs, outputs, output_to_input, gpus)
    per_s = (found.usd_per_million_input_tokens * inputs + found.usd_per_million_output_tokens * outputs) / 1e6

    assert per_s == pytest.approx(gpus * price / 3600, rel=1e-9)


@given(usd, usd, tokens, tokens, ratio)
def test_a_dearer_gpu_makes_dearer_tokens(one: float, other: float, inputs: float, outputs: float, r: float) -> None:
    low, high = sorted((one, other))

    assert (
        cost(low, inputs, outputs, r).usd_per_million_output_tokens
        <= cost(high, inputs, outputs, r).usd_per_million_output_tokens
    )


@given(usd, tokens, tokens, tokens, ratio)
def test_more_throughput_makes_cheaper_tokens(price: float, inputs: float, one: float, other: float, r: float) -> None:
    slow, fast = sorted((one, other))

    assert (
        cost(price, inputs, fast, r).usd_per_million_output_tokens
        <= cost(price, inputs, slow, r).usd_per_million_output_tokens
    )


@given(usd, tokens, tokens, ratio)
def test_an_output_token_costs_the_ratio_of_an_input_token(
    price: float, inputs: float, outputs: float, r: float
) -> None:
    found = cost(price, inputs, outputs, r)

    assert found.usd_per_million_output_tokens == pytest.approx(r * found.usd_per_million_input_tokens, rel=1e-9)


@given(usd, tokens, tokens, ratio, ratio)
def test_a_higher_ratio_moves_the_cost_from_input_to_output(
    price: float, inputs: float, outputs: float, one: float, other: float
) -> None:
    low, high = (cost(price, inputs, outputs, r) for r in sorted((one, other)))

    assert low.usd_per_million_output_tokens <= high.usd_per_million_output_tokens * (1 + 1e-12)
    assert low.usd_per_million_input_tokens >= high.usd_per_million_input_tokens * (1 - 1e-12)
