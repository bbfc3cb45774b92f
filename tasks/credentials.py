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

    Raises:
        BadInput: the target names a block, and there is neither the block nor a `$HF_TOKEN` for its hub.
    """
    is_hugging_face = target.hub_endpoint.rstrip("/") == HUGGING_FACE
    from_environment = (os.environ.get("HF_TOKEN") or None) if is_hugging_face else None
    if target.hub_token_secret is None:
        return from_environment
    try:
        return secret_of(target.hub_token_secret, where=f"target {target.name}, hub_token_secret")
    except BadInput as error:
        # A pipeline that calls the command line has no server of its own to keep blocks on.
        if from_environment:
            return from_environment
        other_way = " Or put the token into HF_TOKEN, where the command runs." if is_hugging_face else ""
        raise BadInput(error.summary, where=error.where, resolution=f"{error.resolution}{other_way}") from error


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
