"""A server is ready when one token has come back; until then it is asked again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.clients.cluster_wait import WaitReport
from rollout.clients.first_token import first_token_s
from rollout.errors import StartupFailed
from rollout.report import utc_now
from rollout.waterfall import Stage, StageTime, Waterfall
from tests.engines import MODEL, free_port, simulated_engine


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulated_engine(tmp_path_factory.mktemp("engine")) as running:
        yield running


def report(*pods: str) -> WaitReport:
    scheduling = StageTime(stage=Stage.SCHEDULING, start_s=0.0, duration_s=1.0)
    waterfalls = tuple(Waterfall(pod=pod, created_at=utc_now(), stages=(scheduling,)) for pod in pods)
    return WaitReport(deployment="web", revision="1", duration_s=60.0, pods=pods, waterfalls=waterfalls)


def test_the_first_token_is_the_last_bar_of_each_pods_own_start() -> None:
    answered = report("pod-1", "pod-2").with_first_tokens(0.5, {"pod-1": 0.5, "pod-2": 2.0})
    assert answered.first_token_s == 0.5
    last = [waterfall.stages[-1] for waterfall in answered.waterfalls]
    assert [(bar.stage, bar.start_s, bar.duration_s) for bar in last] == [
        (Stage.FIRST_TOKEN, 1.0, 0.5),
        (Stage.FIRST_TOKEN, 1.0, 2.0),
    ]


def test_a_server_gives_one_token(url: str) -> None:
    assert first_token_s(url, MODEL) > 0


def test_ready_pods_that_give_no_token_are_not_ready(url: str) -> None:
    with pytest.raises(StartupFailed, match=r"no token.*does not exist"):
        first_token_s(url, "another/model", patience_s=0.0)


def test_an_endpoint_that_refuses_connections_is_explained_as_in_the_tutorial() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StartupFailed, match=r"Connection refused.*port-forward"):
        first_token_s(nowhere, MODEL, patience_s=0.0)
