from __future__ import annotations

from pathlib import Path

from rollout.benchmark import BenchmarkSpec, Environment
from rollout.clients.benchmarks import StageStore
from rollout.clients.storage import StorageClient
from rollout.stage import RequestLimits
from rollout.target import CredentialSource, Endpoints, Target
from sandbox.storage import StorageServer
from tests.rollout.curves import QueueServer


def test_stages_are_reused_for_the_same_pods_and_the_same_request_limits_alone(tmp_path: Path) -> None:
    """Their goodput was counted with those limits."""
    spec, environment = BenchmarkSpec(), Environment(model="m")
    limits = RequestLimits(ttft_s=0.5)
    with StorageServer(root=tmp_path / "storage", project="my-project") as server:
        target = Target(
            name="test",
            project="my-project",
            region="europe-west1",
            credentials=CredentialSource.ANONYMOUS,
            bucket="stages-of-ours",
            endpoints=Endpoints(storage=server.url),
        )
        StorageClient(target).ensure_bucket()
        stages = (QueueServer().stage(1.0),)
        StageStore(target, environment, spec, ["b", "a"], limits).write(stages)
        assert StageStore(target, environment, spec, ["a", "b"], RequestLimits(ttft_s=0.5)).read() == stages
        assert StageStore(target, environment, spec, ["a", "b"], RequestLimits(ttft_s=0.2)).read() == ()
        assert StageStore(target, environment, spec, ["a"], limits).read() == ()
