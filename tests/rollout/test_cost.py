from __future__ import annotations

import pytest

from rollout.cost import Price, PricingModel, cost_at_knee, find_price, list_price, token_cost
from rollout.errors import BadInput
from tests.rollout.curves import QueueServer

TEN_DOLLARS = Price(usd_per_gpu_hour=36.0, source="test")  # one cent a second


def test_the_quickstarts_two_equations() -> None:
    cost = token_cost(TEN_DOLLARS, gpus=1, input_tokens_per_s=400, output_tokens_per_s=100)
    # 0.01 / (400 / 4 + 100) = 50 micro-dollars
    assert cost.usd_per_million_output_tokens == pytest.approx(50)
    assert cost.usd_per_million_input_tokens == pytest.approx(12.5)


def test_input_and_output_together_pay_the_gpus() -> None:
    cost = token_cost(TEN_DOLLARS, gpus=8, input_tokens_per_s=300, output_tokens_per_s=70, output_to_input_ratio=3)
    paid = cost.usd_per_million_input_tokens * 300e-6 + cost.usd_per_million_output_tokens * 70e-6
    assert paid == pytest.approx(8 * 0.01)


def test_the_quickstarts_example_of_one_h100_is_of_this_size() -> None:
    # gpt-oss-20b on a3-highgpu-1g: 13335 output tokens/s at $0.035 per million, with spot prices as default.
    price = list_price("nvidia-h100-80gb", "us-central1", PricingModel.SPOT)
    assert price is not None
    cost = token_cost(price, gpus=1, input_tokens_per_s=13335 * 226 / 195, output_tokens_per_s=13335)
    assert cost.usd_per_million_output_tokens == pytest.approx(0.07, abs=0.04)


@pytest.mark.parametrize(("tokens", "ratio"), [(0.0, 4.0), (10.0, 0.0), (10.0, -1.0)])
def test_what_has_no_price_is_refused(tokens: float, ratio: float) -> None:
    with pytest.raises(BadInput):
        token_cost(
            TEN_DOLLARS, gpus=1, input_tokens_per_s=tokens, output_tokens_per_s=tokens, output_to_input_ratio=ratio
        )


def test_list_prices_say_date_and_source_and_commitments_are_cheaper() -> None:
    prices = [list_price("nvidia-h100-80gb", "europe-west4", model) for model in PricingModel]
    amounts = [price.usd_per_gpu_hour for price in prices if price]
    assert len(amounts) == 4
    assert amounts[0] == max(amounts)
    assert amounts[3] < amounts[2] < amounts[0]
    assert all(price and price.as_of and price.source.startswith("https://") for price in prices)


def test_the_targets_own_price_comes_first_for_its_own_pricing_model() -> None:
    price = find_price("nvidia-h100-80gb", "us-central1", own_usd_per_gpu_hour=2.5)
    assert price is not None
    assert (price.usd_per_gpu_hour, price.as_of, price.pricing_model) == (2.5, None, PricingModel.ON_DEMAND)
    spot = find_price("nvidia-h100-80gb", "us-central1", PricingModel.SPOT, own_usd_per_gpu_hour=2.5)
    assert spot == list_price("nvidia-h100-80gb", "us-central1", PricingModel.SPOT)
    assert find_price("nvidia-b200", "us-central1", PricingModel.SPOT, own_usd_per_gpu_hour=2.5) is None
    own = find_price("nvidia-b200", None, PricingModel.SPOT, own_usd_per_gpu_hour=2.5, own_model=PricingModel.SPOT)
    assert own is not None
    assert own.pricing_model is PricingModel.SPOT


def test_a_price_says_its_currency_its_terms_and_its_date() -> None:
    text = str(list_price("nvidia-h100-80gb", "europe-west4", PricingModel.SPOT))
    assert text.startswith("3.97 USD per GPU and hour (spot, https://")
    assert text.endswith(", 2025-03-06)")


def test_what_the_asker_pays_comes_before_everything() -> None:
    for model in PricingModel:
        price = find_price("nvidia-b200", None, model, own_usd_per_gpu_hour=2.5, stated={"nvidia-b200": 7.0})
        assert price is not None
        assert price.usd_per_gpu_hour == 7.0


@pytest.mark.parametrize("accelerator", ["nvidia-h100-80gb", "nvidia-a100-80gb", "nvidia-tesla-a100", "nvidia-l4"])
def test_a_listed_accelerator_has_a_price_where_the_quickstart_takes_its_own(accelerator: str) -> None:
    assert find_price(accelerator) is not None


@pytest.mark.parametrize(
    ("accelerator", "region", "model"),
    [
        ("nvidia-h100-80gb", "u-france-east1", PricingModel.ON_DEMAND),
        ("nvidia-b200", "us-central1", PricingModel.ON_DEMAND),
        ("nvidia-a100-80gb", "us-central1", PricingModel.COMMITMENT_1Y),
    ],
)
def test_an_unknown_price_is_never_invented(accelerator: str, region: str, model: PricingModel) -> None:
    assert list_price(accelerator, region, model) is None
    assert find_price(accelerator, region, model) is None


def test_the_cost_of_a_sweep_is_that_at_its_knee() -> None:
    stages = [QueueServer(10).stage(rate) for rate in (1, 9.8, 10.8, 20)]
    cost = cost_at_knee(stages, TEN_DOLLARS, gpus=1)
    assert cost is not None
    assert (cost.input_tokens_per_s, cost.output_tokens_per_s) == (pytest.approx(500), pytest.approx(1000))
    assert cost_at_knee([], TEN_DOLLARS, gpus=1) is None
