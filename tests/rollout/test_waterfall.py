from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rollout.waterfall import Stage, TimedLine, is_milestone, read_waterfall, timed_line

CREATED = datetime(2026, 11, 22, 20, 0, 0, tzinfo=UTC)

LOG = """\
20.0 (APIServer pid=1) INFO 11-22 20:10:31 [api_server.py:140] vLLM API server version 0.32.0
220.0 (EngineCore pid=2) INFO [gpu_model_runner.py:68] Starting to load model gs://b/p...
221.0 Loading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]
260.0 (EngineCore pid=2) INFO [default_loader.py:501] Loading weights took 40.00 seconds
261.0 (EngineCore pid=2) INFO [gpu_model_runner.py:70] Model loading took 48.5 GiB memory and 41.0 seconds
291.0 (EngineCore pid=2) INFO [monitor.py:34] torch.compile takes 30.00 s in total
311.0 (EngineCore pid=2) INFO [gpu_model_runner.py:3480] Graph capturing finished in 15 secs, took 0.31 GiB
312.0 (EngineCore pid=2) INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 51.00 s
315.0 INFO:     Application startup complete."""


def at(seconds: float) -> datetime:
    return CREATED + timedelta(seconds=seconds)


def stamp(seconds: float) -> str:
    return at(seconds).isoformat().replace("+00:00", "Z")


def lines(text: str = LOG) -> list[TimedLine]:
    split = [line.partition(" ") for line in text.splitlines()]
    return [TimedLine(at=at(float(seconds)), text=rest) for seconds, _, rest in split]


def pod(scheduled: float = 120.0, started: float = 200.0) -> dict[str, Any]:
    return {
        "metadata": {"name": "pod-1", "creationTimestamp": stamp(0)},
        "status": {
            "conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp(scheduled)}],
            "containerStatuses": [{"state": {"running": {"startedAt": stamp(started)}}}],
        },
    }


def event(reason: str, seconds: float, message: str = "", name: str = "pod-1") -> dict[str, Any]:
    return {
        "metadata": {"creationTimestamp": stamp(seconds)},
        "reason": reason,
        "message": message,
        "involvedObject": {"name": name},
        "lastTimestamp": stamp(seconds),
    }


EVENTS = [
    event("TriggeredScaleUp", 10.0),
    event("Pulling", 121.0),
    event(
        "Pulled",
        199.0,
        'Successfully pulled image "vllm:1" in 1m17.5s (1m17.5s including waiting). Image size: 9500000000 bytes.',
    ),
    event("Pulled", 5.0, 'Successfully pulled image "x" in 1s', name="another-pod"),
]


def test_the_stages_of_a_start_on_a_new_node() -> None:
    waterfall = read_waterfall(pod(), EVENTS, lines(), weights_bytes=52_000_000_000)
    waterfall = waterfall.with_first_token(1.5)
    assert [(stage.stage, stage.start_s, stage.duration_s) for stage in waterfall.stages] == [
        (Stage.SCHEDULING, 0.0, 10.0),
        (Stage.NODE, 10.0, 110.0),
        (Stage.IMAGE, 121.5, 77.5),
        (Stage.PROCESS, 200.0, 20.0),
        (Stage.WEIGHTS, 220.0, 40.0),
        (Stage.COMPILATION, 261.0, 30.0),
        (Stage.ENGINE, 261.0, 54.0),
        (Stage.GRAPH_CAPTURE, 296.0, 15.0),
        (Stage.FIRST_TOKEN, 315.0, 1.5),
    ]
    assert waterfall.weights_bytes_per_s == pytest.approx(1.3e9)
    assert waterfall.total_s == 316.5


def test_the_artifact_names_the_slowest_stage_and_its_cure() -> None:
    waterfall = read_waterfall(pod(), EVENTS, lines(), weights_bytes=52_000_000_000)
    assert "| weights | 220.0 | 40.0 |" in waterfall.markdown
    assert "52.00 GB at 1.30 GB/s" in waterfall.markdown
    assert "9.50 GB" in waterfall.markdown
    assert "Slowest: **node creation**. Keep a spare node warm" in waterfall.markdown


def test_the_model_streamers_own_figure_is_read_too() -> None:
    log = lines("30.0 [RunAI Streamer] Overall time to stream 59.0 GiB of all files to cpu: 20.0s, 2.9 GiB/s")
    waterfall = read_waterfall(pod(1, 2), [], log, weights_bytes=63_000_000_000)
    assert waterfall.weights_bytes_per_s == pytest.approx(3.15e9)


def test_stages_without_a_trace_are_left_out() -> None:
    waterfall = read_waterfall(pod(2.0, 3.0), [], [])
    assert [stage.stage for stage in waterfall.stages] == [Stage.SCHEDULING]
    assert read_waterfall({"metadata": {"name": "p", "creationTimestamp": stamp(0)}}, [], []).stages == ()


@pytest.mark.parametrize(
    ("line", "tells"),
    [
        (LOG.splitlines()[1], True),
        (LOG.splitlines()[2], True),
        (LOG.splitlines()[-1], True),
        ("Downloading model from gs://b/p to /tmp/model_dir/b/p.", True),
        ("(APIServer pid=2560) INFO 11-22 20:10:31 [launcher.py:195] Route: /docs, Methods: HEAD, GET", False),
    ],
)
def test_the_lines_that_tell_how_far_the_start_is(line: str, tells: bool) -> None:
    assert is_milestone(line) is tells


def test_a_log_line_carries_the_nodes_nanoseconds() -> None:
    line = timed_line("2026-11-22T20:00:01.123456789Z INFO: hello")
    assert line is not None
    assert (line.at.microsecond, line.text) == (123456, "INFO: hello")
    assert timed_line("no time here") is None
