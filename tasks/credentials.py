"""The one place where a secret enters: a Prefect block by name, or the environment; never a parameter."""

from __future__ import annotations

import os
from typing import cast

from prefect.blocks.system import Secret

from rollout.errors import BadInput
from rollout.target import HUGGING_FACE, Target


def hub_token(target: Target) -> str | None:
    """The Hugging Face token of `target`: its Secret block, else `$HF_TOKEN`, else None (public models).

    `$HF_TOKEN` lies about on machines for other purposes: it goes to huggingface.co only. Who wants to send a token to
    a mirror names it in the target.
    """
    if target.hub_token_secret is None:
        return (os.environ.get("HF_TOKEN") or None) if target.hub_endpoint.rstrip("/") == HUGGING_FACE else None
    return secret_of(target.hub_token_secret, where=f"target {target.name}, hub_token_secret")


def secret_of(name: str, *, where: str = "") -> str:
    """The value of the Secret block `name`. Raises `BadInput` if there is none."""
    try:
        block = cast(Secret[str], Secret.load(name))
    except ValueError as error:
        raise BadInput(
            f"there is no Secret block {name!r} on the Prefect server.",
            where=where,
            resolution=f"Make it: prefect block create secret (name: {name}, value: your token).",
        ) from error
    return block.get()
