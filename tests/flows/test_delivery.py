"""New versions under steady load: good ones take over, bad ones go back, and no client ever notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flows.rollout_model import rollout_model
from flows.teardown_model import teardown_model
from rollout.clients.cluster import ClusterClient
from rollout.clients.traffic import Traffic
from rollout.delivery import IN_PLACE, ORDER_ANNOTATION, Decision, Outcome
from rollout.errors import BadInput, ExitCode, RolledBack, RolloutError
from rollout.policy import Teardown
from rollout.record import RolloutReport, Verdict
from rollout.report import StepStatus
from sandbox.gateway import GatewayServer, ServiceProxy
from tests.flows.conftest import TINY_REPO, Stage
from tests.flows.steady_load import SteadyLoad
from tests.flows.versions import BROKEN, FAST, GOOD, SLOW, strategy, traffic_of, write_version

# Three rollouts in one test take two minutes on two busy cores.
pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server"), pytest.mark.timeout(600)]


def deliver(stage: Stage, **changes: Any) -> RolloutReport:
    settings = {"objectives": {"max_failed_share": None}, "delivery": strategy(**changes).model_dump(mode="json")}
    return rollout_model(stage.request(**settings), report_file=str(stage.report_file))


def record(stage: Stage) -> RolloutReport:
    return RolloutReport.model_validate_json(stage.report_file.read_text())


@pytest.fixture
def gateway(stage: Stage) -> Iterator[GatewayServer]:
    with GatewayServer(stage.cloud.kubernetes, namespace=stage.target.namespace, gateway="models") as server:
        yield server


@pytest.fixture
def service(stage: Stage) -> Iterator[ServiceProxy]:
    name = f"{stage.target.namespace}-svc"
    with ServiceProxy(stage.cloud.kubernetes, namespace=stage.target.namespace, service=name) as server:
        yield server


def test_a_good_canary_takes_over_and_no_client_notices(stage: Stage, gateway: GatewayServer) -> None:
    write_version(stage, FAST)
    first = deliver(stage)
    assert first.delivery is not None
    assert (first.delivery.live_before, first.delivery.outcome) == (None, Outcome.PROMOTED)

    write_version(stage, GOOD)
    with SteadyLoad(gateway.url, TINY_REPO) as load:
        second = deliver(stage)
    assert load.failures == []
    assert load.completed > 20
    assert second.verdict is Verdict.DONE
    assert second.delivery is not None
    assert second.delivery.live_before == first.delivery.revision
    assert [step.weight_percent for step in second.delivery.steps] == [30, 60, 100]
    assert [step.ruling.decision for step in second.delivery.steps][-1] is Decision.FINISH
    assert traffic_of(stage, second) == Traffic(
        live=second.delivery.revision,
        weights={second.delivery.revision: 100},
        revisions=(second.delivery.revision,),
    )

    rerun = deliver(stage)
    assert rerun.changed_nothing
    assert rerun.delivery is not None
    assert rerun.delivery.outcome is Outcome.ALREADY_LIVE

    ended = teardown_model(target=str(stage.target_file), report_file=str(stage.report_file))
    assert ended.teardown is not None
    assert ended.teardown.left == ()
    assert {"HTTPRoute", "Gateway", "Deployment"} <= {change.kind for change in ended.teardown.removed}


@pytest.mark.parametrize(
    ("latency", "why"),
    [(SLOW, "worse than the live version"), (BROKEN, "no-such-preset|crash|exit")],
    ids=["slow", "crashing"],
)
def test_a_bad_canary_goes_back_and_no_client_notices(
    stage: Stage, gateway: GatewayServer, latency: dict[str, float] | str, why: str
) -> None:
    write_version(stage, FAST)
    first = deliver(stage)
    assert first.delivery is not None
    write_version(stage, latency)
    with SteadyLoad(gateway.url, TINY_REPO) as load, pytest.raises(RolledBack, match=why) as caught:
        deliver(stage)
    assert load.failures == []
    assert caught.value.exit_code is ExitCode.ROLLED_BACK
    ended = record(stage)
    assert ended.verdict is Verdict.ROLLED_BACK
    assert ended.delivery is not None
    assert ended.delivery.outcome is Outcome.ROLLED_BACK
    live = first.delivery.revision
    assert traffic_of(stage, first) == Traffic(live=live, weights={live: 100}, revisions=(live,))


def test_the_service_moves_where_there_is_no_gateway_and_a_rolling_update_may_go_before(
    stage: Stage, service: ServiceProxy
) -> None:
    write_version(stage, FAST)
    in_place = rollout_model(stage.request())
    write_version(stage, GOOD)
    with SteadyLoad(service.url, TINY_REPO) as load:
        report = deliver(stage, kind="blue_green", gateway=None)
    assert load.failures == []
    assert report.delivery is not None
    assert report.delivery.live_before == IN_PLACE
    assert [step.weight_percent for step in report.delivery.steps] == [0, 100]
    assert traffic_of(stage, report).revisions == (report.delivery.revision,)

    # A rolling update would take the revision's pods out of the Service before its own are ready.
    with pytest.raises(BadInput, match="rolling update knows one Deployment"):
        rollout_model(stage.request(teardown=Teardown.NEVER))
    assert in_place.verdict is Verdict.DONE


def test_the_operators_word_leads_back(stage: Stage, service: ServiceProxy) -> None:
    write_version(stage, FAST)
    first = deliver(stage, gateway=None)
    assert first.delivery is not None
    write_version(stage, GOOD)
    slow_steps = [{"weight_percent": 50, "duration_s": 600, "min_requests": 16}]
    with (
        SteadyLoad(service.url, TINY_REPO) as load,
        operator_says(stage, "roll-back"),
        pytest.raises(RolledBack, match="the operator said so"),
    ):
        deliver(stage, gateway=None, steps=slow_steps)
    assert load.failures == []
    assert traffic_of(stage, first).revisions == (first.delivery.revision,)


def test_a_rolling_update_that_cannot_start_is_undone_and_the_old_pod_serves(
    stage: Stage, service: ServiceProxy
) -> None:
    write_version(stage, FAST)
    rollout_model(stage.request())
    with SteadyLoad(service.url, TINY_REPO) as load:
        write_version(stage, GOOD)
        changed = rollout_model(stage.request())
        write_version(stage, BROKEN)
        with pytest.raises(RolledBack, match="The previous revision serves"):
            rollout_model(stage.request(teardown=Teardown.ON_FAILURE), report_file=str(stage.report_file))
    assert load.failures == []
    assert changed.verdict is Verdict.DONE
    assert {step.name: step.status for step in record(stage).steps}["undo update"] is StepStatus.DONE
    again = ClusterClient.connect(stage.target).wait_available(stage.target.namespace, deadline_s=120)
    assert len(again.pods) == 1


@contextmanager
def operator_says(stage: Stage, word: str) -> Iterator[None]:
    """`kubectl annotate` on the Deployment of the revision that gets traffic beside another one."""
    stopping = threading.Event()

    def annotate() -> None:
        while not stopping.wait(0.5):
            try:
                cluster = ClusterClient.connect(stage.target)
                deployments = [item for item in cluster.inventory() if item["kind"] == "Deployment"]
            except RolloutError:
                continue
            if len(deployments) < 2:
                continue
            newest = max(deployments, key=lambda item: str(item["metadata"]["creationTimestamp"]))
            body = {"metadata": {"annotations": {ORDER_ANNOTATION: word}}}
            path = cluster.api.path_of(newest)
            cluster.api.request("PATCH", path, None, body, "application/merge-patch+json")
            return

    thread = threading.Thread(target=annotate, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
