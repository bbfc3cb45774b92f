"""What a person or a pipeline asks for: the form of the rollout in the Prefect UI, and the options of the command line.

Python validators do not run in the UI, so every rule that can be is a pattern, a bound or an enum.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from rollout import catalog
from rollout.model import ModelRef
from rollout.policy import RolloutPolicy
from rollout.serving import ServingSpec
from rollout.target import Target
from rollout.values import Value

PresetName = Annotated[str, StringConstraints(min_length=1, pattern=r"^\S+$")]


class RolloutRequest(Value):
    """Which model goes where, under which policy."""

    model: PresetName = Field(
        "gemma-4-26b-a4b-it",
        title="Model",
        description="Name of a preset in deployments/models/ (or the path of such a file).",
        json_schema_extra={"position": 0},
    )
    target: PresetName = Field(
        title="Target",
        description="Name of an environment in deployments/targets/ (or the path of such a file).",
        json_schema_extra={"position": 1},
    )
    revision: Annotated[str, StringConstraints(pattern=r"^\S+$")] | None = Field(
        None,
        title="Revision",
        description="Branch, tag or commit on Hugging Face; empty takes the preset's. It is pinned to a commit once.",
        json_schema_extra={"position": 2},
    )
    replicas: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None,
        title="Replicas",
        description="Serving pods, each with the preset's GPUs; empty takes the preset's.",
        json_schema_extra={"position": 3},
    )
    max_model_len: Annotated[int, Field(ge=1)] | None = Field(
        None,
        title="Context window (tokens)",
        description="vLLM's --max-model-len; empty takes the preset's.",
        json_schema_extra={"position": 4},
    )
    image: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]\S*$")] | None = Field(
        None,
        title="Image",
        description="Container image of the model server, best by digest; empty takes the preset's.",
        json_schema_extra={"position": 5},
    )
    policy: RolloutPolicy = Field(
        RolloutPolicy(),
        title="Policy",
        description="Approval, transfer, verification, objectives and teardown.",
        json_schema_extra={"position": 6},
    )

    @property
    def title(self) -> str:
        """`gemma-4-31b-it → s3ns-france`: what the runs of this request are called."""
        return f"{catalog.model_title(self.model)} → {catalog.target_title(self.target)}"


class RolloutSpec(Value):
    """A request with its presets loaded: everything that the plan is made of, but for what exists now."""

    model: ModelRef
    serving: ServingSpec
    target: Target
    policy: RolloutPolicy


def resolve(request: RolloutRequest) -> RolloutSpec:
    """Load the presets that `request` names and lay its own wishes over them. Raises `BadInput`.

    One wish has a floor: a target may ask for more approval than the request, and the stricter of both counts. Where
    the target names the machines for the preset's GPUs, the replicas run on these.
    """
    preset, target = catalog.load_model(request.model), catalog.load_target(request.target)
    wishes = {
        name: value for name in ("replicas", "max_model_len", "image") if (value := getattr(request, name)) is not None
    }
    accelerator = preset.serving.accelerator
    if accelerator.type in target.machines:
        machine = target.machines[accelerator.type]
        wishes["accelerator"] = {**accelerator.model_dump(mode="json"), **machine.model_dump(mode="json")}
    serving = catalog.validated(
        ServingSpec, {**preset.serving.model_dump(mode="json"), **wishes}, where=f"serving spec of {request.model}"
    )
    model = preset.model if request.revision is None else preset.model.model_copy(update={"revision": request.revision})
    policy = request.policy.model_copy(update={"approval": request.policy.approval.or_stricter(target.approval)})
    return RolloutSpec(model=model, serving=serving, target=target, policy=policy)
