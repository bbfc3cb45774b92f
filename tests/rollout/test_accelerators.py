"""The table of accelerators."""

from __future__ import annotations

import pytest

from rollout.accelerators import ACCELERATORS


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_row_says_where_its_figures_come_from(name: str) -> None:
    assert ACCELERATORS[name].source.startswith("https://cloud.google.com/")
