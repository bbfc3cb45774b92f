"""A bar of text on a scale of time: it shows in a terminal, in Prefect's UI and on GitHub alike, as no chart does."""

from __future__ import annotations

WIDTH = 40
"""Characters: fits beside a name and two figures on a line of 100."""


def bar(start_s: float, duration_s: float, total_s: float) -> str:
    """`····████····`: when something ran, of `total_s` in all; the shortest is one block."""
    scale = WIDTH / total_s if total_s else 0.0
    before = min(round(start_s * scale), WIDTH - 1)
    length = min(max(1, round(duration_s * scale)), WIDTH - before)
    return ("·" * before + "█" * length).ljust(WIDTH, "·")
