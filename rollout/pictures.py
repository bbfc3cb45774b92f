"""Pictures of a load sweep as PNG: for the Prefect UI, for files beside the report, for a phone and for paper.

Told apart by markers, line styles and direct labels, not by colour alone; every picture stays below 150 KB, so that it
also fits into a `data:` address.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rollout.curve import Curve, Zone, build_curve
from rollout.profiles import Profile
from rollout.stage import LatencyLimit, LatencyMetric, Percentile, Stage

# Blue, red and green of equal prominence that stay apart for the colour-blind, and different shades of grey in print.
BLUE, RED, GREEN, GREY = "#2b6cb0", "#b83232", "#2f7d4f", "#6b7280"

ZONES: dict[Zone, tuple[str, str | None, str, str]] = {
    Zone.RISING: ("#e8f0fa", None, "rising", "full"),
    Zone.KNEE: ("#fdf3d6", "..", "knee", "bottom"),
    Zone.PAST: ("#f9e1e1", "///", "past the knee", "none"),
}
"""Fill, hatch, name, and how far markers are filled: in black and white, hatch and markers tell the zones apart."""

NARROW = 0.25
"""A zone that takes less of the width has its name upright."""

WIDTH_IN, HEIGHT_IN, DPI = 7.2, 4.6, 130
"""936 x 598 pixels: two thirds of a laptop's width, and text of 3 mm on a phone."""

_STYLE: dict[LatencyMetric, tuple[str, str, str]] = {
    LatencyMetric.TTFT: (BLUE, "o", "-"),
    LatencyMetric.NTPOT: (RED, "s", "--"),
    LatencyMetric.ITL: (GREEN, "^", ":"),
}


_PAPER: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}
"""Behind text, so that lines and hatches do not run through it."""


def curve_pictures(stages: Sequence[Stage], *, title: str, limits: Sequence[LatencyLimit] = ()) -> dict[str, bytes]:
    """The three pictures of a sweep, by name."""
    return {
        "latency-over-throughput": latency_over_throughput(stages, title=title, limits=limits),
        "ttft-over-rate": ttft_over_rate(stages, title=title, limits=limits),
        "tokens-over-rate": tokens_over_rate(stages, title=title),
    }


def latency_over_throughput(stages: Sequence[Stage], *, title: str, limits: Sequence[LatencyLimit] = ()) -> bytes:
    """The quickstart's latency profile in its three zones: median TTFT, NTPOT and ITL over output tokens/s.

    Past the knee throughput stops rising, so the points of that zone lie above one another: their markers are hollow.
    """
    figure, axes = _figure(title, "output tokens/s", "median latency, ms (log)")
    throughput = dict(_by_rate(stages, lambda stage: stage.output_tokens_per_s))
    curve = build_curve(stages)
    zones = {round(point.rate_per_s, 6): point.zone for point in curve.points}
    for metric in (LatencyMetric.TTFT, LatencyMetric.NTPOT, LatencyMetric.ITL):
        latencies = _by_rate(stages, partial(Stage.latency_s, metric=metric, percentile=Percentile.P50), scale=1e3)
        pairs = [(throughput[rate], latency) for rate, latency in latencies]
        colour, marker, line_style = _STYLE[metric]
        _line(axes, pairs, metric.value.upper(), colour, marker, line_style)
        for (rate, _), (x, y) in zip(latencies, pairs, strict=True):
            fill: Any = ZONES[zones[rate]][3]
            axes.plot(x, y, color=colour, marker=marker, markersize=8, fillstyle=fill, markerfacecoloralt="white")
            if fill == "none":
                axes.plot(x, y, color="white", marker=marker, markersize=5, zorder=3)
    axes.set_yscale("log")
    highest = max(throughput.values(), default=1.0)
    axes.set_xlim(0, highest * 1.15)
    if curve.knee is not None:
        knee = curve.knee
        tokens_per_request = knee.output_tokens_per_s / knee.rate_per_s
        # The bend has some width also where both bounds of the knee agree.
        begins = min(knee.lower_rate_per_s * tokens_per_request, 0.95 * knee.output_tokens_per_s)
        _shade(axes, [0, begins, max(knee.output_tokens_per_s, highest) * 1.02, highest * 1.15])
        axes.axvline(knee.output_tokens_per_s, color="black", linewidth=1, linestyle=(0, (6, 3)))
    _say(axes, curve, hollow=True)
    _limit_lines(axes, limits)
    return _png(figure, axes)


def ttft_over_rate(stages: Sequence[Stage], *, title: str, limits: Sequence[LatencyLimit] = ()) -> bytes:
    """TTFT percentiles over the offered rate, on the zones of the curve."""
    figure, axes = _figure(title, "offered requests/s (log)", "time to first token, ms (log)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for percentile, style in (
        (Percentile.P50, (BLUE, "o", "-")),
        (Percentile.P90, (GREEN, "^", "--")),
        (Percentile.P99, (RED, "s", ":")),
    ):
        pairs = _by_rate(stages, partial(Stage.latency_s, metric=LatencyMetric.TTFT, percentile=percentile), scale=1e3)
        _line(axes, pairs, percentile.value, *style)
    _zones(axes, build_curve(stages))
    _limit_lines(axes, [limit for limit in limits if limit.metric is LatencyMetric.TTFT])
    return _png(figure, axes)


def tokens_over_rate(stages: Sequence[Stage], *, title: str) -> bytes:
    """Output tokens/s over the offered rate, beside the line of a server without limits."""
    figure, axes = _figure(title, "offered requests/s", "output tokens/s")
    _line(axes, _by_rate(stages, lambda s: s.output_tokens_per_s), "measured", BLUE, "o", "-")
    offered = _by_rate(stages, lambda s: s.offered_output_tokens_per_s)
    axes.plot(*zip(*offered, strict=True), color=GREY, linewidth=1.2, linestyle=(0, (2, 2)), label="offered")
    highest = max((value for _, value in _by_rate(stages, lambda s: s.output_tokens_per_s)), default=1.0)
    axes.set_ylim(0, highest * 1.35)
    axes.set_xlim(left=0)
    _zones(axes, build_curve(stages))
    return _png(figure, axes)


def predicted_against_measured(predicted: Profile, measured: Profile, *, title: str) -> bytes:
    """Median NTPOT over output tokens/s of one replica: the forecast beside the measurement."""
    figure, axes = _figure(title, "output tokens/s", "median NTPOT, ms")
    for profile, label, style in ((measured, "measured", (BLUE, "o", "-")), (predicted, "forecast", (GREY, "D", "--"))):
        pairs = [(each.output_tokens_per_s, each.ntpot_ms) for each in profile.points if each.ntpot_ms is not None]
        _line(axes, pairs, label, *style)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return _png(figure, axes)


def data_uri(png: bytes) -> str:
    """An address that holds the picture itself, for image artifacts."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    # Figure and canvas by hand: pyplot would keep global state, and a backend per process.
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(visible=True, which="major", color="#d1d5db", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _line(
    axes: Axes, pairs: Sequence[tuple[float, float]], label: str, colour: str, marker: str, line_style: str
) -> None:
    if not pairs:
        return
    x, y = zip(*pairs, strict=True)
    axes.plot(x, y, color=colour, marker=marker, linestyle=line_style, linewidth=2, markersize=6, label=label)


def _by_rate(
    stages: Sequence[Stage], value_of: Callable[[Stage], float | None], *, scale: float = 1.0
) -> list[tuple[float, float]]:
    """(rate, median over the stages of that rate) by rising rate."""
    values: dict[float, list[float]] = {}
    for stage in stages:
        value = value_of(stage)
        if value is not None:
            values.setdefault(round(stage.rate_per_s, 6), []).append(value * scale)
    return [(rate, sorted(values[rate])[len(values[rate]) // 2]) for rate in sorted(values)]


def _limit_lines(axes: Axes, limits: Sequence[LatencyLimit]) -> None:
    for limit in limits:
        colour = _STYLE.get(limit.metric, (GREY, "", ""))[0]
        axes.axhline(limit.limit_s * 1e3, color=colour, linewidth=1.2, linestyle=(0, (1, 1)))
        axes.annotate(
            f"{limit.name} ≤ {limit.limit_s * 1e3:.4g} ms",
            (1, limit.limit_s * 1e3),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            fontsize=10,
            color=colour,
            ha="right",
            bbox=_PAPER,
        )


def _shade(axes: Axes, edges: Sequence[float]) -> None:
    """The three zones between four places on the x axis, each with its fill, hatch and name."""
    for zone, (start, end) in zip(Zone, pairwise(edges), strict=True):
        if end <= start:
            continue
        fill, hatch, name, _ = ZONES[zone]
        axes.axvspan(start, end, facecolor=fill, edgecolor="#c9a9a9", linewidth=0, hatch=hatch, zorder=0)
        left, right = (axes.transLimits.transform(axes.transScale.transform((x, 1.0)))[0] for x in (start, end))
        narrow = right - left < NARROW
        axes.text(
            (left + right) / 2,
            0.03,
            name,
            transform=axes.transAxes,
            fontsize=10,
            fontstyle="italic",
            ha="center",
            va="bottom",
            rotation=90 if narrow else 0,
            bbox=_PAPER,
        )


def _zones(axes: Axes, curve: Curve) -> None:
    """Shade and name the zones along the rates."""
    left, right = axes.get_xlim()
    _say(axes, curve)
    if curve.knee is None:
        return
    _shade(axes, [left, curve.knee.lower_rate_per_s or left, curve.knee.upper_rate_per_s, right])
    axes.axvline(curve.knee.rate_per_s, color="black", linewidth=1, linestyle=(0, (6, 3)))
    axes.set_xlim(left, right)


def _say(axes: Axes, curve: Curve, *, hollow: bool = False) -> None:
    """Where the knee is, or what is known without one: below the title, where it covers nothing."""
    text = _wrapped(curve.not_reached)
    if curve.knee is not None:
        text = f"knee at {curve.knee.rate_per_s:.3g} requests/s, {curve.knee.output_tokens_per_s:,.0f} tokens/s"
        text += "; hollow: past it" if hollow else ""
    if text:
        axes.set_title(
            axes.get_title(loc="left"), fontsize=12, loc="left", fontweight="bold", pad=10 + 14 * len(text.splitlines())
        )
        axes.text(0, 1.02, text, transform=axes.transAxes, fontsize=11, ha="left", va="bottom")


def _wrapped(text: str, width: int = 72) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _png(figure: Figure, axes: Axes) -> bytes:
    plain: Any = FuncFormatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, fontsize=11, frameon=False, handlelength=3.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
