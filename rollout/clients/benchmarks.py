"""Finished stages of a sweep, kept in the bucket while it runs: a killed sweep continues, a finished one is reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rollout.benchmark import BenchmarkSpec, Environment
from rollout.clients.storage import StorageClient
from rollout.stage import RequestLimits, Stage
from rollout.target import Target
from rollout.values import content_digest

STAGES_PREFIX = ".llm-rollout/stages/"


class StageStore:
    """The stages of one sweep against one set of pods: new pods are a new measurement."""

    def __init__(
        self,
        target: Target,
        environment: Environment,
        spec: BenchmarkSpec,
        pods: Sequence[str],
        limits: RequestLimits,
    ) -> None:
        """`limits`: goodput was counted with them, so stages measured under others are of no use."""
        self._storage = StorageClient(target)
        facts = [environment.key, spec.model_dump(mode="json"), sorted(pods), asdict(limits)]
        key = content_digest(facts, 20)
        self._name = f"{STAGES_PREFIX}{key}.json"

    def read(self) -> tuple[Stage, ...]:
        found = self._storage.read_json(self._name)
        return tuple(Stage.model_validate(stage) for stage in found[0]) if found else ()

    def write(self, stages: Sequence[Stage]) -> None:
        self._storage.write_json(self._name, [stage.model_dump(mode="json") for stage in stages])
