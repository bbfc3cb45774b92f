"""Size and shape of a model from the hub's metadata and its config.json; no weights are read."""

from __future__ import annotations

from rollout.clients.hub import HubClient
from rollout.layout import CONFIG, parse_config
from rollout.model import ModelRef
from rollout.model_facts import ModelFacts
from rollout.target import HUGGING_FACE, Target

WEIGHTS = (".safetensors", ".bin", ".pt")


def facts_from_hub(repo_id: str, target: Target | None, *, token: str | None = None) -> ModelFacts:
    """Ask the target's hub, or huggingface.co. Raises what `HubClient.pin` raises, and CheckpointInvalid."""
    hub = HubClient(target.hub_endpoint if target else HUGGING_FACE, token)
    pinned = hub.pin(ModelRef(repo_id=repo_id))
    where = f"{repo_id}@{pinned.short_sha}"
    file = next((each for each in pinned.files if each.path == CONFIG), None)
    return ModelFacts(
        repo_id=repo_id,
        weights_bytes=sum(each.size_bytes for each in pinned.files if each.path.endswith(WEIGHTS)),
        config=parse_config(hub.read(pinned, file) if file else None, where),
        gated=pinned.gated,
        source=f"{hub.endpoint} at {pinned.short_sha}",
    )
