"""Probes reach both revisions as pairs: the comparison relies on their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.clients.probing import Probed, Prober
from rollout.comparison import COMPARED, Sample
from rollout.delivery import ProbeSpec
from tests.engines import MODEL, free_port, simulated_engine

SPEC = ProbeSpec(max_rate_per_s=50, input_words=4, output_tokens=4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("engine")
    with simulated_engine(folder, latency={"base_s": 0.001}) as url:
        yield url


def test_every_probe_is_a_pair(engine: str) -> None:
    live, new = Sample(), Sample()
    prober = Prober([Probed(engine, live), Probed(engine, new)], MODEL, SPEC)
    prober.probe(3, 50)
    prober.probe(2, 50)
    assert (live.requests, new.requests) == (5, 5), "the warm-up is not counted"
    for metric in COMPARED:
        old_s, new_s = live.pairs_s(new, metric)
        assert list(old_s) == list(live.latencies_s(metric))
        assert list(new_s) == list(new.latencies_s(metric))
        assert len(old_s) == 5


def test_a_version_that_does_not_answer_fails_its_half_of_every_pair(engine: str) -> None:
    live, new = Sample(), Sample()
    prober = Prober([Probed(engine, live), Probed(f"http://127.0.0.1:{free_port()}", new)], MODEL, SPEC)
    prober.probe(3, 50)
    assert (live.failures, new.failures) == (0, 3)
    assert live.requests == new.requests
    for metric in COMPARED:
        assert [len(side) for side in live.pairs_s(new, metric)] == [0, 0]
