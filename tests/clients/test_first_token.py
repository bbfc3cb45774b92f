"""A server is ready when one token has come back; until then it is asked again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rollout.clients.cluster_wait import WaitReport
from rollout.clients.first_token import with_first_token
from rollout.errors import StartupFailed
from rollout.report import utc_now
from rollout.waterfall import Stage, StageTime, Waterfall
from tests.engines import MODEL, free_port, simulated_engine


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with simulated_engine(tmp_path_factory.mktemp("engine")) as running:
        yield running


def report() -> WaitReport:
    scheduling = StageTime(stage=Stage.SCHEDULING, start_s=0.0, duration_s=1.0)
    waterfall = Waterfall(pod="pod-1", created_at=utc_now(), stages=(scheduling,))
    return WaitReport(deployment="web", revision="1", duration_s=60.0, pods=("pod-1",), waterfalls=(waterfall,))


def test_the_first_token_is_the_last_bar_of_the_start(url: str) -> None:
    answered = with_first_token(report(), url, MODEL)
    assert answered.first_token_s is not None
    last = answered.waterfalls[0].stages[-1]
    assert last.stage is Stage.FIRST_TOKEN
    assert (last.start_s, last.duration_s) == (1.0, answered.first_token_s)


def test_ready_pods_that_give_no_token_are_not_ready(url: str) -> None:
    with pytest.raises(StartupFailed, match=r"no token.*does not exist"):
        with_first_token(report(), url, "another/model", patience_s=0.0)


def test_an_endpoint_that_refuses_connections_is_explained_as_in_the_tutorial() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StartupFailed, match=r"Connection refused.*port-forward"):
        with_first_token(report(), nowhere, MODEL, patience_s=0.0)
