from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from rollout.pictures import (
    CurvePrediction,
    data_uri,
    latency_over_throughput,
    predicted_against_measured,
    tokens_over_rate,
    ttft_over_rate,
)
from rollout.stage import LatencyLimit, LatencyMetric, Percentile, Stage
from tests.rollout.curves import QueueServer

RATES = (1, 2, 4, 8, 9.6, 10.6, 16)
LIMITS = (
    LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=0.5),
    LatencyLimit(metric=LatencyMetric.NTPOT, limit_s=0.05),
)
PREDICTIONS = [CurvePrediction(rate_per_s=r, output_tokens_per_s=r * 100, ntpot_s=0.01 + r / 1000) for r in (1, 5, 10)]

SWEEPS = {
    "with-knee": [QueueServer(10).stage(rate) for rate in RATES],
    "without-knee": [QueueServer(1000).stage(rate) for rate in RATES],
    "one-stage": [QueueServer(10).stage(1)],
    "repeated": [QueueServer(10).stage(rate) for rate in (1, 9, 9, 11, 11)],
    "nothing-answered": [QueueServer(10).stage(1).model_copy(update={"ttft_s": None, "itl_s": None, "ntpot_s": None})],
}
PICTURES: dict[str, Callable[[Sequence[Stage]], bytes]] = {
    "latency": lambda stages: latency_over_throughput(stages, title="latency", limits=LIMITS),
    "ttft": lambda stages: ttft_over_rate(stages, title="TTFT", limits=LIMITS),
    "tokens": lambda stages: tokens_over_rate(stages, title="tokens"),
    "predicted": lambda stages: predicted_against_measured(stages, PREDICTIONS, title="predicted"),
}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("picture", PICTURES)
def test_every_sweep_has_a_picture_small_enough_for_an_address(picture: str, sweep: str) -> None:
    png = PICTURES[picture](SWEEPS[sweep])
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width > 800
    assert len(png) < 150_000
    assert base64.b64decode(data_uri(png).partition(",")[2]) == png


def test_the_lines_stay_apart_in_black_and_white() -> None:
    png = PICTURES["latency"](SWEEPS["with-knee"])
    grey = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    # Lines and text are dark on white: no figure depends on a pale colour.
    assert (grey < 120).mean() > 0.01
    assert np.median(grey) > 240
