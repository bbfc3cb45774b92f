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
from rollout.stage import LatencyLimit, LatencyMetric, Percentile, Stage
from rollout.values import Value

# Blue, red and green of equal prominence that stay apart for the colour-blind, and different shades of grey in print.
BLUE, RED, GREEN, GREY = "#2b6cb0", "#b83232", "#2f7d4f", "#6b7280"

ZONE_FILLS = {Zone.RISING: "#e8f0fa", Zone.KNEE: "#fdf3d6", Zone.PAST: "#f9e1e1"}

WIDTH_IN, HEIGHT_IN, DPI = 7.2, 4.6, 130
"""936 x 598 pixels: two thirds of a laptop's width, and text of 3 mm on a phone."""

_STYLE: dict[LatencyMetric, tuple[str, str, str]] = {
    LatencyMetric.TTFT: (BLUE, "o", "-"),
    LatencyMetric.NTPOT: (RED, "s", "--"),
    LatencyMetric.ITL: (GREEN, "^", ":"),
}


class CurvePrediction(Value):
    """What the plan expected at one rate."""

    rate_per_s: float
    output_tokens_per_s: float
    ttft_s: float | None = None
    ntpot_s: float | None = None


def latency_over_throughput(stages: Sequence[Stage], *, title: str, limits: Sequence[LatencyLimit] = ()) -> bytes:
    """The quickstart's latency profile: median TTFT and NTPOT over output tokens/s, with knee and limits."""
    figure, axes = _figure(title, "output tokens/s", "median latency, ms (log)")
    throughput = dict(_by_rate(stages, lambda stage: stage.output_tokens_per_s))
    curve = build_curve(stages)
    for metric in (LatencyMetric.TTFT, LatencyMetric.NTPOT, LatencyMetric.ITL):
        latencies = _by_rate(stages, partial(Stage.latency_s, metric=metric, percentile=Percentile.P50), scale=1e3)
        pairs = [(throughput[rate], latency) for rate, latency in latencies]
        _line(axes, pairs, metric.value.upper(), *_STYLE[metric])
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    _limit_lines(axes, limits)
    if curve.knee is not None:
        knee = curve.knee
        axes.axvline(knee.output_tokens_per_s, color="black", linewidth=1, linestyle=(0, (6, 3)))
        label = f"knee: {knee.output_tokens_per_s:,.0f} tokens/s\nat {knee.rate_per_s:.3g} requests/s"
        _corner_note(axes, label)
    elif curve.not_reached:
        _corner_note(axes, _wrapped(curve.not_reached))
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


def predicted_against_measured(stages: Sequence[Stage], predictions: Sequence[CurvePrediction], *, title: str) -> bytes:
    """Median NTPOT over output tokens/s: the plan's expectation beside what was measured."""
    figure, axes = _figure(title, "output tokens/s", "median NTPOT, ms")
    throughput = dict(_by_rate(stages, lambda stage: stage.output_tokens_per_s))
    latencies = _by_rate(stages, lambda stage: stage.ntpot_s.p50 if stage.ntpot_s else None, scale=1e3)
    measured = [(throughput[rate], latency) for rate, latency in latencies]
    expected = [(p.output_tokens_per_s, p.ntpot_s * 1e3) for p in predictions if p.ntpot_s is not None]
    _line(axes, measured, "measured", BLUE, "o", "-")
    _line(axes, sorted(expected), "predicted", GREY, "D", "--")
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
            (0, limit.limit_s * 1e3),
            xycoords=("axes fraction", "data"),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=10,
            color=colour,
        )


def _zones(axes: Axes, curve: Curve) -> None:
    """Shade and name the zones along the rates; hatching keeps the overload apart in black and white."""
    left, right = axes.get_xlim()
    if curve.knee is None:
        if curve.not_reached:
            _corner_note(axes, _wrapped(curve.not_reached))
        return
    edges = [left, curve.knee.lower_rate_per_s or left, curve.knee.upper_rate_per_s, right]
    for zone, (start, end) in zip(Zone, pairwise(edges), strict=True):
        if end <= start:
            continue
        hatch, label = ("///", "past the knee") if zone is Zone.PAST else (None, None)
        axes.axvspan(
            start, end, facecolor=ZONE_FILLS[zone], edgecolor="#e3b5b5", linewidth=0, hatch=hatch, label=label, zorder=0
        )
    axes.axvline(curve.knee.rate_per_s, color="black", linewidth=1, linestyle=(0, (6, 3)))
    axes.annotate(
        f"knee {curve.knee.rate_per_s:.3g}/s",
        (curve.knee.rate_per_s, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=11,
        fontweight="bold",
    )
    axes.set_xlim(left, right)


def _corner_note(axes: Axes, text: str) -> None:
    axes.text(0.02, 0.97, text, transform=axes.transAxes, fontsize=11, fontweight="bold", ha="left", va="top")


def _wrapped(text: str, width: int = 60) -> str:
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _png(figure: Figure, axes: Axes) -> bytes:
    plain: Any = FuncFormatter(lambda value, _: f"{value:,.4g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, fontsize=11, frameon=False, handlelength=3.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
