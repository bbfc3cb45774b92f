"""What a rollout may do and must reach: approval, transfer, verification, objectives, teardown."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from rollout.benchmark import BenchmarkSpec
from rollout.objectives import Objectives
from rollout.transfer import TransferSpec
from rollout.values import Value


class Approval(StrEnum):
    NEVER = "never"
    ON_CHANGE = "on_change"
    """Ask when the plan changes anything outside of the bucket."""
    ALWAYS = "always"


class Teardown(StrEnum):
    ALWAYS = "always"
    """A trial: everything that this rollout made goes again."""
    ON_FAILURE = "on_failure"
    NEVER = "never"


class Weights(StrEnum):
    """What teardown does with the weights and a bucket of ours."""

    KEEP = "keep"
    DELETE = "delete"


class RolloutPolicy(Value):
    approval: Approval = Approval.NEVER
    approval_timeout_s: Annotated[float, Field(gt=0)] = 86_400.0
    """One working day for a person to answer."""
    transfer: TransferSpec = TransferSpec()
    benchmark: BenchmarkSpec | None = BenchmarkSpec()
    """None verifies by the smoke suite alone."""
    objectives: Objectives = Objectives()
    teardown: Teardown = Teardown.NEVER
    weights: Weights = Weights.KEEP
