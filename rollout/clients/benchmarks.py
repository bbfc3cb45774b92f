"""Finished stages of a sweep, kept in the bucket while it runs: a killed sweep continues, a finished one is reused."""

from __future__ import annotations

from collections.abc import Sequence

from rollout.benchmark import BenchmarkSpec, Environment
from rollout.clients.storage import StorageClient
from rollout.stage import Stage
from rollout.target import Target
from rollout.values import content_digest

STAGES_PREFIX = ".llm-rollout/stages/"


class StageStore:
    """The stages of one sweep against one set of pods: new pods are a new measurement."""

    def __init__(self, target: Target, environment: Environment, spec: BenchmarkSpec, pods: Sequence[str]) -> None:
        self._storage = StorageClient(target)
        key = content_digest([environment.key, spec.model_dump(mode="json"), sorted(pods)], 20)
        self._name = f"{STAGES_PREFIX}{key}.json"

    def read(self) -> tuple[Stage, ...]:
        found = self._storage.read_json(self._name)
        return tuple(Stage.model_validate(stage) for stage in found[0]) if found else ()

    def write(self, stages: Sequence[Stage]) -> None:
        self._storage.write_json(self._name, [stage.model_dump(mode="json") for stage in stages])
