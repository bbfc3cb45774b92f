"""The janitor's look for runs whose worker is gone, at any time."""

from __future__ import annotations

from datetime import datetime

from prefect import flow

from tasks.janitor import find_zombies
from tests.flows.conftest import Stage


def zombies(stage: Stage, now: datetime) -> tuple[str, ...]:
    """Mark what is silent at `now` as crashed. Returns the ids of its runs."""

    @flow
    def look() -> tuple[str, ...]:
        return find_zombies(str(stage.target_file), now).value

    return look()
