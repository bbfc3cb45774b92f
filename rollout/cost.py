"""What tokens cost: the quickstart's two equations, and list prices that say their date and source.

    $/output token = (GPU $/s) / (input tokens/s / ratio + output tokens/s)
    $/input token  = ($/output token) / ratio

with `ratio` the output-to-input cost ratio (4 by default: an output token costs as much as four input tokens).
Source: https://cloud.google.com/kubernetes-engine/docs/how-to/machine-learning/inference/inference-quickstart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rollout.curve import build_curve
from rollout.errors import BadInput
from rollout.stage import Stage
from rollout.values import Value

DEFAULT_OUTPUT_TO_INPUT_RATIO = 4.0
"""The quickstart's own example."""

HOURS_PER_MONTH = 730
"""Google's month of committed-use prices."""


class PricingModel(StrEnum):
    ON_DEMAND = "on-demand"
    SPOT = "spot"
    COMMITMENT_1Y = "1-year-commitment"
    COMMITMENT_3Y = "3-year-commitment"


class Price(Value):
    """What one GPU costs together with its share of the machine (CPU, memory, bundled SSD), before tax."""

    usd_per_gpu_hour: Annotated[float, Field(gt=0)]
    source: str
    as_of: date | None = None
    """None: stated by the target's owner."""
    pricing_model: PricingModel | None = None
    """None: whatever the asker had in mind."""

    @property
    def usd_per_gpu_s(self) -> float:
        return self.usd_per_gpu_hour / 3600

    def __str__(self) -> str:
        terms = [
            *([self.pricing_model.value] if self.pricing_model else []),
            f"{self.source.partition(' (')[0]}{f', {self.as_of}' if self.as_of else ''}",
        ]
        return f"{self.usd_per_gpu_hour:,.2f} USD per GPU and hour ({', '.join(terms)})"


class TokenCost(Value):
    """Cost in US dollars per million tokens, and what it was computed from."""

    usd_per_million_input_tokens: float
    usd_per_million_output_tokens: float
    gpus: int
    price: Price
    input_tokens_per_s: float
    output_tokens_per_s: float
    output_to_input_ratio: float


def token_cost(
    price: Price,
    *,
    gpus: int,
    input_tokens_per_s: float,
    output_tokens_per_s: float,
    output_to_input_ratio: float = DEFAULT_OUTPUT_TO_INPUT_RATIO,
) -> TokenCost:
    """The quickstart's equations for `gpus` GPUs that together process these tokens.

    Raises BadInput when nothing was processed: there is no price for no tokens.
    """
    if output_to_input_ratio <= 0:
        raise BadInput(f"an output-to-input cost ratio of {output_to_input_ratio:g} has no meaning.", where="cost")
    weighted_tokens_per_s = input_tokens_per_s / output_to_input_ratio + output_tokens_per_s
    if weighted_tokens_per_s <= 0:
        raise BadInput("no tokens were processed, so they have no price.", where="cost")
    usd_per_output_token = gpus * price.usd_per_gpu_s / weighted_tokens_per_s
    return TokenCost(
        usd_per_million_input_tokens=usd_per_output_token / output_to_input_ratio * 1e6,
        usd_per_million_output_tokens=usd_per_output_token * 1e6,
        gpus=gpus,
        price=price,
        input_tokens_per_s=input_tokens_per_s,
        output_tokens_per_s=output_tokens_per_s,
        output_to_input_ratio=output_to_input_ratio,
    )


def cost_at_knee(
    stages: Sequence[Stage],
    price: Price,
    *,
    gpus: int,
    output_to_input_ratio: float = DEFAULT_OUTPUT_TO_INPUT_RATIO,
) -> TokenCost | None:
    """The cost at the measured knee (or at the highest sustained rate), as the quickstart states it for its profiles.

    Tokens per request come from what was sent, so input and output belong to the same rate. None if nothing was
    completed or nothing sustained.
    """
    curve = build_curve(stages)
    rate = curve.knee.rate_per_s if curve.knee else curve.highest_sustained_per_s
    completed = [stage for stage in stages if stage.completed]
    if rate <= 0 or not completed:
        return None
    requests = sum(stage.completed for stage in completed)
    input_tokens = sum(stage.completed * stage.input_tokens_per_s / stage.requests_per_s for stage in completed)
    offered = completed[0].offered_output_tokens_per_s / completed[0].rate_per_s
    return token_cost(
        price,
        gpus=gpus,
        input_tokens_per_s=rate * input_tokens / requests,
        output_tokens_per_s=rate * offered,
        output_to_input_ratio=output_to_input_ratio,
    )


_CALCULATOR = (
    "https://github.com/Cyclenerd/google-cloud-pricing-cost-calculator/blob/"
    "0166a59ebba7c36f2cc8c931d9f258dcebc44776/pricing.yml (from Google's Cloud Billing Catalog API)"
)
_CALCULATOR_DATE = date(2025, 3, 6)

_MONTHLY_COLUMNS = (PricingModel.COMMITMENT_1Y, PricingModel.COMMITMENT_3Y)

_LIST_PRICES: dict[tuple[str, str], tuple[float, float, float | None, float | None]] = {
    # (accelerator, region): USD/hour on demand, USD/hour spot, USD/month with 1-year and 3-year commitments, for one
    # GPU: a3-highgpu-1g, a2-ultragpu-8g / 8, a2-highgpu-1g and g2-standard-12. The source lists no commitments for
    # a2-ultragpu; H200, B200, RTX PRO 6000 and TPUs are not in it.
    ("nvidia-h100-80gb", "us-central1"): (11.0612499878219, 4.42446871232877, 5601.26008308, 3546.37477674),
    ("nvidia-h100-80gb", "us-east1"): (11.0612499878219, 4.42446871232877, 5601.26008308, 3546.37477674),
    ("nvidia-h100-80gb", "us-east4"): (11.0694695189041, 4.45487967123288, 5605.04064372, 3549.07518846),
    ("nvidia-h100-80gb", "europe-west1"): (12.1712308248219, 4.86850871232877, 6163.72598974, 3902.18335112),
    ("nvidia-h100-80gb", "europe-west2"): (12.6147588489863, 8.89644708243836, 6387.70469806, 4044.48707224),
    ("nvidia-h100-80gb", "europe-west3"): (13.0539190109863, 9.18800201093151, 6610.24304018, 4185.2620695),
    ("nvidia-h100-80gb", "europe-west4"): (14.0675598969041, 3.96990063013699, 7123.99568024, 4509.77509264),
    ("nvidia-h100-80gb", "europe-west9"): (12.8310511417534, 9.02059820435616, 6497.46186912, 4113.79465628),
    ("nvidia-h100-80gb", "asia-east1"): (12.7948475088219, 8.99909709232877, 6479.73014466, 4102.08452318),
    ("nvidia-h100-80gb", "asia-northeast1"): (15.8304238290685, 11.1325598580274, 8016.62232112, 5075.11520222),
    ("nvidia-h100-80gb", "asia-southeast1"): (14.2847866209041, 4.03772567123288, 7234.27638896, 4579.66359028),
    ("nvidia-a100-80gb", "us-central1"): (40.5503831232877 / 8, 16.2197468493151 / 8, None, None),
    ("nvidia-a100-80gb", "us-east4"): (45.6618598356164 / 8, 18.3726706849315 / 8, None, None),
    ("nvidia-a100-80gb", "us-east5"): (44.5193191232877 / 8, 14.0775868493151 / 8, None, None),
    ("nvidia-a100-80gb", "europe-west4"): (44.6473478356164 / 8, 14.4884425205479 / 8, None, None),
    ("nvidia-a100-80gb", "asia-southeast1"): (49.9814838356164 / 8, 20.1003506849315 / 8, None, None),
    ("nvidia-tesla-a100", "us-central1"): (3.673385, 1.293355, 1689.3711392, 938.56707798),
    ("nvidia-tesla-a100", "us-east1"): (3.673385, 1.293355, 1689.3711392, 938.56707798),
    ("nvidia-tesla-a100", "us-east5"): (3.673385, 1.17533, 1689.37111, 938.5672415),
    ("nvidia-tesla-a100", "us-west1"): (3.673385, 1.293355, 1689.3711392, 938.56707798),
    ("nvidia-tesla-a100", "us-west4"): (3.934354926, 1.57366, 1793.61866583, 1009.26738745),
    ("nvidia-tesla-a100", "europe-west4"): (3.747972, 1.44587, 1723.6728172, 957.62681807),
    ("nvidia-tesla-a100", "asia-northeast1"): (4.049590926, 1.271375, 1846.61330783, 1038.71536699),
    ("nvidia-tesla-a100", "asia-southeast1"): (4.013757926, 1.60545, 1830.13370383, 1029.5572739),
    ("nvidia-l4", "us-central1"): (1.000416287, 0.393596, 460.09144542, 328.63672535),
    ("nvidia-l4", "us-east1"): (1.000416287, 0.393596, 460.09144542, 328.63672535),
    ("nvidia-l4", "us-east4"): (0.997140504, 0.398836, 458.58497216, 327.56067688),
    ("nvidia-l4", "us-east5"): (1.12676882, 0.338030644, 518.20102368, 370.14356832),
    ("nvidia-l4", "us-west1"): (1.000416287, 0.393596, 460.09144542, 328.63672535),
    ("nvidia-l4", "us-west4"): (1.12676882, 0.352152, 518.20102368, 370.14356832),
    ("nvidia-l4", "europe-west1"): (1.101558412, 0.386796, 506.60674904, 361.86186724),
    ("nvidia-l4", "europe-west2"): (1.139059982, 0.34284, 523.85372393, 374.18122606),
    ("nvidia-l4", "europe-west3"): (1.179027018, 0.423336, 542.23454139, 387.31040162),
    ("nvidia-l4", "europe-west4"): (1.051487566, 0.376708, 483.5791633, 345.41357951),
    ("nvidia-l4", "asia-east1"): (1.158382064, 0.319276, 532.73994604, 380.52851328),
    ("nvidia-l4", "asia-northeast1"): (1.284734612, 0.389124, 590.84943524, 422.03537012),
    ("nvidia-l4", "asia-southeast1"): (1.234213584, 0.45572, 567.61479376, 405.43913548),
}
"""Only regions that sell the accelerator, and us-east5, where the quickstart takes its prices. For Cloud de Confiance
by S3NS no list price is known."""


def default_region(accelerator: str) -> str:
    """The quickstart's region of prices: us-east5, and us-central1 for A3 machines."""
    return "us-central1" if accelerator.startswith(("nvidia-h100", "nvidia-h200")) else "us-east5"


def list_price(accelerator: str, region: str, model: PricingModel = PricingModel.ON_DEMAND) -> Price | None:
    """The public list price of one GPU; None where none is known to us. Spot prices move daily: check the date."""
    row = _LIST_PRICES.get((accelerator, region))
    if row is None:
        return None
    amount = dict(zip(PricingModel, row, strict=True))[model]
    if amount is None:
        return None
    per_hour = amount / HOURS_PER_MONTH if model in _MONTHLY_COLUMNS else amount
    return Price(usd_per_gpu_hour=per_hour, source=_CALCULATOR, as_of=_CALCULATOR_DATE, pricing_model=model)


def find_price(
    accelerator: str,
    region: str | None = None,
    model: PricingModel = PricingModel.ON_DEMAND,
    *,
    own_usd_per_gpu_hour: float | None = None,
    own_model: PricingModel = PricingModel.ON_DEMAND,
    stated: Mapping[str, float] | None = None,
) -> Price | None:
    """What the asker states, else the target's own price, else the list price; None where none is known.

    `stated` is by accelerator, and counts for whatever pricing model is asked. The target's own price is of
    `own_model`: it says nothing about the others. Without a `region`, the quickstart's.
    """
    if stated and accelerator in stated:
        return Price(usd_per_gpu_hour=stated[accelerator], source="stated with the question")
    if own_usd_per_gpu_hour is not None and model is own_model:
        return Price(usd_per_gpu_hour=own_usd_per_gpu_hour, source="the target's gpu_usd_per_hour", pricing_model=model)
    return list_price(accelerator, region or default_region(accelerator), model)
