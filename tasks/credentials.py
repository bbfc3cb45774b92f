"""The one place where a secret enters: a Prefect block by name, or the environment; never a parameter."""

from __future__ import annotations

import os
from typing import cast

from prefect.blocks.system import Secret

from rollout.errors import BadInput
from rollout.target import Target


def hub_token(target: Target) -> str | None:
    """The Hugging Face token of `target`: its Secret block, else `$HF_TOKEN`, else None (public models)."""
    if target.hub_token_secret is None:
        return os.environ.get("HF_TOKEN") or None
    try:
        block = cast(Secret[str], Secret.load(target.hub_token_secret))
    except ValueError as error:
        raise BadInput(
            f"there is no Secret block {target.hub_token_secret!r} on the Prefect server.",
            where=f"target {target.name}, hub_token_secret",
            resolution=f"Make it: prefect block create secret (name: {target.hub_token_secret}, value: your token).",
        ) from error
    return block.get()
