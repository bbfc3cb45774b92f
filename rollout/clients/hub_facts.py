"""Size and shape of a model from the hub's metadata and its config.json; no weights are read."""

from __future__ import annotations

import json

from rollout.clients.hub import HubClient
from rollout.errors import CheckpointInvalid
from rollout.model import ModelRef
from rollout.model_facts import ModelFacts
from rollout.target import HUGGING_FACE, Target

WEIGHTS = (".safetensors", ".bin", ".pt")


def facts_from_hub(repo_id: str, target: Target | None, *, token: str | None = None) -> ModelFacts:
    """Ask the target's hub, or huggingface.co. Raises what `HubClient.pin` raises, and CheckpointInvalid."""
    hub = HubClient(target.hub_endpoint if target else HUGGING_FACE, token)
    pinned = hub.pin(ModelRef(repo_id=repo_id))
    file = next((each for each in pinned.files if each.path == "config.json"), None)
    if file is None:
        raise CheckpointInvalid("config.json is missing.", where=repo_id)
    view = memoryview(bytearray(file.size_bytes))
    with_progress = hub.open(pinned, file).read(0, view)
    for _ in with_progress:
        pass
    return ModelFacts(
        repo_id=repo_id,
        weights_bytes=sum(each.size_bytes for each in pinned.files if each.path.endswith(WEIGHTS)),
        config=json.loads(bytes(view)),
        gated=pinned.gated,
        source=f"{hub.endpoint} at {pinned.short_sha}",
    )
