"""An embedded cloud for the flow tests, and targets of their own for each of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rollout.clients.cluster import ClusterClient
from rollout.clients.gke import Gke
from rollout.policy import RolloutPolicy
from rollout.rendering import KubernetesObject
from rollout.request import RolloutRequest
from rollout.target import Target
from sandbox.cloud import EmbeddedCloud
from sandbox.cluster import AutoscalerSettings
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model

TINY_REPO = "tests/tiny-model"


@dataclass(frozen=True)
class Stage:
    """What one test needs to roll a model out: presets as files, and nobody else's resources."""

    cloud: EmbeddedCloud
    folder: Path
    target: Target
    target_file: Path
    model_file: Path

    @property
    def report_file(self) -> Path:
        return self.folder / "report.json"

    def request(self, **policy: Any) -> RolloutRequest:
        return RolloutRequest(
            model=str(self.model_file),
            target=str(self.target_file),
            policy=RolloutPolicy.model_validate({"benchmark": None, **policy}),
        )

    def write_model(self, *, repo_id: str = TINY_REPO, **changes: Any) -> None:
        """The preset of a tiny model, with other fields of its serving spec."""
        serving: dict[str, Any] = {
            "name": self.target.namespace,
            "service_name": f"{self.target.namespace}-svc",
            "app": self.target.namespace,
            "served_model_name": repo_id,
            "resources": {"cpu": "1", "memory": "1Gi", "ephemeral_storage": "1Gi"},
            "max_model_len": 1024,
            "max_images_per_prompt": None,
            "tool_call_parser": None,
            "reasoning_parser": None,
            "ready_timeout_s": 120,
            "termination_grace_period_s": 5,
        }
        preset = {"model": {"repo_id": repo_id}, "serving": serving | changes}
        self.model_file.write_text(yaml.safe_dump(preset), encoding="utf-8")

    def live(self, kind: str) -> list[KubernetesObject]:
        """Objects of ours in the cluster."""
        if Gke(self.target).get() is None:
            return []
        return [item for item in ClusterClient.connect(self.target).inventory() if item["kind"] == kind]

    def write_target(self, **changes: Any) -> Target:
        """The target with other fields, as file and as value."""
        target = Target.model_validate(self.target.model_dump(mode="json") | changes)
        self.target_file.write_text(yaml.safe_dump(target.model_dump(mode="json")), encoding="utf-8")
        return target


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCloud]:
    """An embedded cloud for the tests of a file, with the tiny model on its hub: nodes are for all, as in a region."""
    root = tmp_path_factory.mktemp("cloud")
    worker = {"worker/": (sys.executable, "-m", "sandbox.worker")}
    embedded = EmbeddedCloud(root, autoscaler=AutoscalerSettings(sync_period_s=1.0), runners=worker)
    HubStore(embedded.hub_root).publish(TINY_REPO, tiny_model(root / "tiny"))
    with embedded:
        yield embedded


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def make_stage(cloud: EmbeddedCloud, tmp_path: Path, _numbers: Iterator[int]) -> Callable[[], Stage]:
    """Stages with bucket, namespace, cluster and identity of their own."""

    def make() -> Stage:
        name = f"stage-{next(_numbers)}"
        folder = tmp_path / name
        folder.mkdir()
        target = cloud.target(
            name=name,  # the server's limits are per target: one test never waits for another one's
            bucket=f"models-{name}",
            namespace=name,
            cluster={"name": name},
            gsa=f"{name}-gsa",
            ksa=f"{name}-ksa",
        )
        stage = Stage(cloud, folder, target, folder / "target.yaml", folder / "model.yaml")
        stage.write_target()
        stage.write_model()
        return stage

    return make


@pytest.fixture
def stage(make_stage: Callable[[], Stage]) -> Stage:
    return make_stage()
