from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image

from rollout.pictures import (
    data_uri,
    latency_over_throughput,
    predicted_against_measured,
    tokens_over_rate,
    ttft_over_rate,
)
from rollout.profiles import Evidence, LoadPoint, Profile, Source
from rollout.stage import LatencyLimit, LatencyMetric, Percentile, Stage
from tests.rollout.curves import QueueServer

RATES = (1, 2, 4, 8, 9.6, 10.6, 16)
LIMITS = (
    LatencyLimit(metric=LatencyMetric.TTFT, percentile=Percentile.P90, limit_s=0.5),
    LatencyLimit(metric=LatencyMetric.NTPOT, limit_s=0.05),
)
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
    assert np.median(grey) > 230


def test_a_forecast_and_a_measurement_are_two_lines() -> None:
    source = Source(name="test", evidence=Evidence.MEASUREMENT)

    def profile(ntpot_ms: float) -> Profile:
        points = tuple(LoadPoint(output_tokens_per_s=tokens, ntpot_ms=ntpot_ms) for tokens in (100, 900))
        return Profile(model="m", accelerator="nvidia-l4", points=points, source=source)

    pictures = [predicted_against_measured(profile(20), profile(ms), title="forecast") for ms in (20, 40)]
    same, other = (np.asarray(Image.open(io.BytesIO(png)).convert("L")) for png in pictures)
    assert (other < 120).sum() > (same < 120).sum()  # lines that lie on one another take less ink


def test_the_zones_are_hatched() -> None:
    """In black and white the fills of the zones are nearly one grey."""
    rising = np.asarray(Image.open(io.BytesIO(PICTURES["latency"](SWEEPS["without-knee"]))).convert("L"))
    saturated = np.asarray(Image.open(io.BytesIO(PICTURES["latency"](SWEEPS["with-knee"]))).convert("L"))
    hatching = [((grey > 150) & (grey < 225)).mean() for grey in (rising, saturated)]
    assert hatching[1] > 1.5 * hatching[0]
