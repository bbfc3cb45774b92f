"""What a rollout may do and must reach: approval, transfer, verification, objectives, teardown."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from rollout.autoscaling import AutoscalingSpec
from rollout.benchmark import BenchmarkSpec
from rollout.delivery import DeliveryStrategy
from rollout.objectives import Objectives
from rollout.target import Approval
from rollout.transfer import TransferSpec
from rollout.values import Value


class Teardown(StrEnum):
    ALWAYS = "always"
    """A trial: everything that this rollout made goes again."""
    ON_FAILURE = "on_failure"
    NEVER = "never"


class Weights(StrEnum):
    """What teardown does with the weights and a bucket of ours."""

    KEEP = "keep"
    DELETE = "delete"


def _yaml_off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


class WarmUp(StrEnum):
    """When the GPU node of a first rollout is started, while its weights travel."""

    OFF = "off"
    """With the model server, after the weights."""
    CHEAP = "cheap"
    """Just in time: when the rest of the transfer takes as long as the node, so that it is not paid for idle."""
    FAST = "fast"
    """With the transfer: never waited for, and paid for while the weights travel."""


class RolloutPolicy(Value):
    approval: Approval = Field(
        Approval.NEVER,
        description="Whether a person is asked before anything changes: never, on_change (only if the plan changes"
        " something) or always. The target may ask for more than you choose here. The run waits without holding a GPU.",
        json_schema_extra={"position": 0},
    )
    approval_timeout_s: Annotated[float, Field(gt=0)] = Field(
        86_400.0,
        description="How long the run waits for the answer; one day by default. Then it ends, and nothing has changed.",
        json_schema_extra={"position": 1},
    )
    teardown: Teardown = Field(
        Teardown.NEVER,
        description="When everything that this rollout made is removed again: always (a trial), on_failure or never.",
        json_schema_extra={"position": 2},
    )
    weights: Weights = Field(
        Weights.KEEP,
        title="Weights at teardown",
        description="Keep them for the next rollout, or delete them and our bucket.",
        json_schema_extra={"position": 3},
    )
    objectives: Objectives = Field(
        Objectives(),
        description="What the measured figures must reach; a miss fails the rollout.",
        json_schema_extra={"position": 4},
    )
    benchmark: BenchmarkSpec | None = Field(
        BenchmarkSpec(),
        description="Load sweep up to saturation; None verifies by the smoke suite alone.",
        json_schema_extra={"position": 5},
    )
    delivery: DeliveryStrategy = Field(
        DeliveryStrategy(),
        description="How the new version takes over from the live one: rolling (in place), blue_green or canary.",
        json_schema_extra={"position": 6},
    )
    transfer: TransferSpec = Field(
        TransferSpec(),
        description="How weights move from Hugging Face to the bucket. The defaults suit every model.",
        json_schema_extra={"position": 7},
    )
    warm_up: Annotated[WarmUp, BeforeValidator(_yaml_off)] = Field(
        WarmUp.CHEAP,
        title="Warm-up of the GPU node",
        description="When the node of a first rollout is started: off (after the weights), cheap (so that it is there"
        " when they are) or fast (with the transfer; the idle GPU is paid for).",
        json_schema_extra={"position": 8},
    )
    warm_up_lead_s: Annotated[float, Field(gt=0)] = Field(
        500.0,
        title="Lead of the warm-up (s)",
        description="How long a node takes to be ready with the image: scale-up ≈300 s + image ≈200 s.",
        json_schema_extra={"position": 9},
    )
    autoscaling: AutoscalingSpec | None = Field(
        None,
        description="Replicas follow the requests in flight, by a HorizontalPodAutoscaler from the measured profile of"
        " exactly this model, image and flags (profile-model makes one). Empty: the replicas are fixed.",
        json_schema_extra={"position": 10},
    )

    expires_after_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        title="Expires after (s)",
        description="The janitor tears the model server down so long after its newest rollout began; empty: it stays."
        " For demonstrations and experiments that somebody forgets.",
        json_schema_extra={"position": 11},
    )

    @model_validator(mode="after")
    def _autoscaling_in_place(self) -> RolloutPolicy:
        if self.autoscaling is not None and self.delivery.by_revisions:
            raise ValueError(
                "autoscaling goes with delivery.kind rolling: canary and blue_green set the replicas of each revision"
                " themselves"
            )
        return self
