"""A week of one target: a schedule, a release, people, an accident and the janitor, one after the other, under load.

Everything goes through the server and a worker, as in production; the days are shorter.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.cli.deploy._triggers import DeploymentTriggerAdapter
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import EntrypointType
from prefect.schedules import Interval
from prefect.states import Cancelling

from flows.bootstrap import bootstrap
from flows.ci import start, wait
from flows.janitor import janitor
from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from flows.watch_releases import watch_releases
from rollout.clients.cluster import ClusterClient
from rollout.clients.gke import Gke
from rollout.clients.hub import HubClient
from rollout.clients.records import RecordStore
from rollout.clients.storage import StorageClient
from rollout.errors import ExitCode
from rollout.ledger import EXPIRY_ANNOTATION, Serving, drift, serving_now
from rollout.model import ModelRef
from rollout.policy import Weights
from rollout.record import RolloutReport, Verdict
from rollout.releases import RELEASE_EVENT, Followed, WatchRequest
from rollout.report import utc_now
from sandbox.gateway import GatewayServer
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from tasks.limits import gpu_limit, target_limit
from tests.flows.command_line import DEADLINE_S, Session, environment, run, wait_for
from tests.flows.conftest import Stage
from tests.flows.steady_load import SteadyLoad
from tests.flows.versions import FAST, GOOD, SLOW, strategy, traffic_of, write_version
from tests.flows.zombies import zombies

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(900)]
"""Six rollouts by a worker, one of which waits a minute for the lease of a dead one: four minutes on two cores."""
SATURDAY_S = 600.0
"""The lease of the dead run and the rollout take a minute each when the machine is idle."""


class Week:
    """One target with a followed model, its deployment on the server, and what came of its runs."""

    def __init__(self, stage: Stage, client: SyncPrefectClient) -> None:
        self.stage = stage
        self.client = client
        self.name = stage.target.name
        self.repo_id = f"tests/{self.name}"
        self.deployment_id: UUID | None = None
        self._releases = 0

    def release(self) -> str:
        """A new commit of the model. Returns its id."""
        self._releases += 1
        folder = tiny_model(self.stage.folder / f"release-{self._releases}", seed=self._releases)
        HubStore(self.stage.cloud.hub_root).publish(self.repo_id, folder)
        return HubClient(self.stage.target.hub_endpoint, None).pin(ModelRef(repo_id=self.repo_id)).commit_sha

    def write_version(self, latency: dict[str, float], **env: str) -> None:
        write_version(self.stage, latency, repo_id=self.repo_id, env=env)

    def request(
        self, *, approval: str = "never", objectives: dict[str, Any] | None = None, **delivery: Any
    ) -> dict[str, Any]:
        policy = {
            "approval": approval,
            "objectives": {"max_failed_share": None} | (objectives or {}),
            "delivery": strategy(**delivery).model_dump(mode="json"),
        }
        return self.stage.request(**policy).model_dump(mode="json")

    def deploy(self) -> None:
        """As prefect.yaml does, with a schedule that is due soon and a pool that no other test's worker serves."""
        created = run("work-pool", "create", self.name, "--type", "process", env=environment(), program="prefect")
        assert created.returncode == 0, created.stderr
        bootstrap([self.stage.target])
        trigger = {
            "type": "event",
            "name": f"new release for {self.name}",
            "expect": [RELEASE_EVENT],
            "match": {"prefect.resource.id": f"llm-rollout.model.{self.stage.model_file}"},
            "for_each": ["prefect.resource.id", "llm-rollout.commit"],
            "parameters": {
                "request": {**self.request(approval="always"), "revision": "{{ event.payload.commit_sha }}"}
            },
        }
        deployed = rollout_model.to_deployment(  # type: ignore[union-attr]
            self.name,
            parameters={"request": self.request()},
            schedule=Interval(timedelta(days=7), anchor_date=utc_now() + timedelta(seconds=5)),
            triggers=[DeploymentTriggerAdapter.validate_python(trigger)],
            work_pool_name=self.name,
            entrypoint_type=EntrypointType.MODULE_PATH,
        ).apply()
        assert isinstance(deployed, UUID)
        self.deployment_id = deployed
        # What the scheduler of a server does every minute; the test server has none.
        self.client.request("POST", f"/deployments/{deployed}/schedule", json={}).raise_for_status()

    def worker(self, day: str) -> Session:
        return Session(
            *("worker", "start", "--pool", self.name, "--name", f"{self.name}-{day}"),
            log=self.stage.folder / f"{day}.log",
            env=environment(PREFECT_WORKER_QUERY_SECONDS="1"),
            program="prefect",
        )

    def start(self, **delivery: Any) -> UUID:
        """As an engineer or CI starts the deployment."""
        return start(self.client, f"rollout-model/{self.name}", self.request(**delivery), None).id

    def begun(self, known: set[UUID]) -> UUID:
        """The run that somebody else than this test starts."""
        found: set[UUID] = set()

        def is_there() -> bool:
            assert self.deployment_id is not None
            mine = DeploymentFilter(id=DeploymentFilterId(any_=[self.deployment_id]))
            runs = self.client.read_flow_runs(deployment_filter=mine)
            found.update(one.id for one in runs if one.start_time is not None and one.id not in known)
            return bool(found)

        wait_for(is_there)
        (run_id,) = found
        return run_id

    def state(self, run_id: UUID) -> FlowRun:
        return self.client.read_flow_run(run_id)

    def outcome(self, run_id: UUID) -> str:
        return wait(self.client, run_id, DEADLINE_S).outcome

    def record(self, run_id: UUID) -> RolloutReport | None:
        """The record of a run in the bucket; None as long as it has none."""
        found = [one for one in RecordStore(self.stage.target).read_all() if one.run_id == str(run_id)]
        return found[-1] if found else None

    def has_applied(self, run_id: UUID) -> bool:
        record = self.record(run_id)
        return record is not None and any(step.name == "apply manifests" for step in record.steps)

    def shares_traffic(self, run_id: UUID) -> bool:
        record = self.record(run_id)
        return record is not None and len(traffic_of(self.stage, record).weights) > 1

    def why_back(self, run_id: UUID) -> str:
        """Why the delivery of a run went back."""
        record = self.record(run_id)
        assert record is not None
        assert record.delivery is not None
        return record.delivery.reason

    @property
    def serving(self) -> Serving:
        (only,) = serving_now(RecordStore(self.stage.target).read_all()).values()
        return only


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


@pytest.fixture
def week(stage: Stage, client: SyncPrefectClient) -> Week:
    return Week(stage, client)


@pytest.fixture
def gateway(stage: Stage) -> Iterator[GatewayServer]:
    with GatewayServer(stage.cloud.kubernetes, namespace=stage.target.namespace, gateway="models") as server:
        yield server


def test_a_week_ends_with_the_right_version_live_and_no_client_ever_noticed(week: Week, gateway: GatewayServer) -> None:
    stage, client = week.stage, week.client
    first = week.release()
    week.write_version(FAST)
    week.deploy()
    with week.worker("monday") as worker:
        # Monday: the schedule is due.
        scheduled = week.begun(set())
        assert client.read_flow_run(scheduled).auto_scheduled
        assert week.outcome(scheduled) == "done", worker.output
        assert week.serving.commit_sha == first

        with SteadyLoad(gateway.url, week.repo_id) as load:
            # Tuesday: a new release is noticed, and waits for a person's word before it changes anything.
            watch = WatchRequest(target=str(stage.target_file), follow=(Followed(model=str(stage.model_file)),))
            assert watch_releases(watch) == ()
            second = week.release()
            (announced,) = watch_releases(watch)
            assert announced.commit_sha == second
            released = week.begun({scheduled})
            wait_for(lambda: week.state(released).state.is_paused())  # type: ignore[union-attr]
            assert week.serving.commit_sha == first
            answer = {"run_input": {"decision": "approve", "reason": "as announced"}}
            client.request("POST", f"/flow_runs/{released}/resume", json=answer).raise_for_status()
            assert week.outcome(released) == "done", worker.output
            assert week.serving.commit_sha == second

            # Wednesday: an engineer's canary misses its objective, and goes back.
            before = week.serving
            week.write_version(SLOW)
            prompt = {"metric": "ttft", "percentile": "p90", "limit_s": 0.5}
            missed = week.start(objectives={"latencies": [prompt]})
            assert week.outcome(missed) == "rolled-back", worker.output
            assert week.why_back(missed).startswith("objective missed: TTFT p90"), week.why_back(missed)
            assert week.serving == before

            # Thursday: CI gives up on a canary that has half of the traffic.
            week.write_version(GOOD)
            half = [{"weight_percent": 50, "duration_s": 600, "min_requests": 16}]
            cancelled = week.start(steps=half)
            wait_for(lambda: week.shares_traffic(cancelled))
            client.set_flow_run_state(cancelled, Cancelling(message="CI gave up waiting"))
            assert week.outcome(cancelled) == "cancelled", worker.output
            wait_for(lambda: len(stage.live("Deployment")) == 1)
            assert week.serving == before

            # Friday: the machine of the worker dies in the middle of a rollout.
            week.write_version(GOOD, SANDBOX_ENGINE_LOAD_BYTES_PER_S="400")
            killed = week.start()
            worker.wait_until(lambda: week.has_applied(killed))
            worker.signal_group(signal.SIGKILL)
            assert load.failures == []
            assert week.serving == before
            later = utc_now() + timedelta(hours=1)
            assert zombies(stage, later) == (str(killed),)
            assert janitor(str(stage.target_file)) == (), "the live version is nobody's leftover"
            # What the dead run left beside the live version is gone.
            assert len(stage.live("Deployment")) == 1
            assert week.serving == before

            # Saturday: CI starts the same rollout; on a new worker it goes on where the dead one stopped.
            line = ("run", f"rollout-model/{week.name}", "--key", "saturday")
            with week.worker("saturday") as next_worker, Session(*line, log=stage.folder / "ci.log") as ci:
                assert ci.process.wait(SATURDAY_S) == ExitCode.DONE, ci.output + next_worker.output
        assert load.failures == []
        assert load.completed > 100

    # Sunday: somebody's demonstration has expired, and the janitor removes it and nothing else.
    demonstration = stage.folder / "demonstration.yaml"
    preset = yaml.safe_load(stage.model_file.read_text())
    named = dict.fromkeys(("name", "service_name", "app"), "demonstration")
    demonstration.write_text(yaml.safe_dump(preset | {"serving": preset["serving"] | named}))
    rollout_model(stage.request().model_copy(update={"model": str(demonstration)}))
    (shown,) = [one for one in stage.live("Deployment") if one["metadata"]["name"] == "demonstration"]
    over = {"metadata": {"annotations": {EXPIRY_ANNOTATION: (utc_now() - timedelta(days=1)).isoformat()}}}
    api = ClusterClient.connect(stage.target).api
    api.request("PATCH", api.path_of(shown), {"fieldManager": "sales"}, over, "application/merge-patch+json")
    (swept,) = janitor(str(stage.target_file))
    assert ("Deployment", f"{stage.target.namespace}/demonstration") in {(one.kind, one.name) for one in swept.removed}
    assert swept.left == ()

    # The right version is live, alone, with all of the traffic, and the books say so.
    record = week.record(UUID(week.serving.run_id))
    assert record is not None
    assert record.verdict is Verdict.DONE
    assert record.delivery is not None
    assert record.run_id not in {str(one) for one in (scheduled, released, cancelled, killed)}
    assert week.serving.commit_sha == second
    traffic = traffic_of(stage, record)
    assert traffic.live == record.delivery.revision
    assert traffic.revisions == (record.delivery.revision,)
    live = {week.serving.instance: week.serving}
    assert drift(live, stage.live("Deployment")) == ()
    verdicts = [one.verdict for one in RecordStore(stage.target).read_all()]
    assert verdicts.count(Verdict.ROLLED_BACK) == 1
    for limit in (target_limit(stage.target.name), gpu_limit(stage.target.name)):
        assert client.read_global_concurrency_limit_by_name(limit).active_slots == 0
    ended = teardown_model(target=str(stage.target_file), model=str(stage.model_file), weights=Weights.DELETE)
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert Gke(stage.target).get() is None
    assert not StorageClient(stage.target).bucket_exists()
