"""`llm-rollout rehearse`: the main job from end to end, beside others, and stopped in the middle."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import pytest
import yaml

from rollout.errors import ExitCode
from sandbox import models
from sandbox.__main__ import MODEL_CACHE
from tests.flows.command_line import Session, environment, read_record, run, wait_for

pytestmark = [pytest.mark.flow, pytest.mark.timeout(900)]
"""A rehearsal takes about a minute on two idle cores; the first one downloads and converts its model."""

INTERRUPTED = 130
UP = "embedded cloud and Prefect server are up"

Process: TypeAlias = tuple[int, int]
"""Id and start time: ids are used again."""

STEPS = [
    *("pin model", "observe", "plan", "provision bucket", "provision cluster", "publish weights", "check layout"),
    *("workload identity", "apply manifests", "wait until available", "smoke test", "benchmark", "objectives"),
]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A stranger's environment: no Prefect server, a home of its own."""
    settings = environment(PREFECT_HOME=str(tmp_path / "home"))
    settings.pop("PREFECT_API_URL", None)
    return settings


def steps(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in record.get("steps", ())}


def test_the_rehearsal_rolls_out_changes_nothing_the_second_time_and_leaves_nothing(
    tmp_path: Path, env: dict[str, str]
) -> None:
    out = tmp_path / "out"
    with Session("rehearse", "--out", str(out), log=tmp_path / "log", env=env) as rehearsal:
        assert rehearsal.process.wait(900) == ExitCode.DONE, rehearsal.output
    assert str(out / "report.json") in rehearsal.output
    report, rerun = read_record(out / "report.json"), read_record(out / "rerun.json")

    assert report["verdict"] == "done"
    assert steps(report).keys() >= {*STEPS, "teardown"}
    assert all(step["status"] in ("done", "unchanged", "skipped") for step in report["steps"])
    source = models.smollm2(MODEL_CACHE)
    for file in report["weights"]["files"]:
        assert file["sha256"] == hashlib.sha256((source / file["path"]).read_bytes()).hexdigest()
    assert {file["path"] for file in report["weights"]["files"]} >= {"config.json", *models.shard_names(source)}
    outcomes = {check["name"]: check["outcome"] for check in report["smoke"]["results"]}
    assert "failed" not in outcomes.values()
    assert outcomes["chat"] == "passed"
    assert len(report["benchmark"]["stages"]) > 1
    assert all(stage["completed"] > 0 and stage["ttft_s"]["p50"] > 0 for stage in report["benchmark"]["stages"])
    assert {row["outcome"] for row in report["objectives"]["rows"]} == {"met"}
    assert report["teardown"]["left"] == []
    assert {change["kind"] for change in report["teardown"]["removed"]} >= {"Deployment", "Cluster", "ServiceAccount"}

    assert rerun["verdict"] == "done"
    assert rerun["weights"]["bytes_sent"] == 0
    assert steps(rerun)["benchmark"]["data"]["stages_measured"] == 0
    changed = [change for step in rerun["steps"] for change in step["changes"] if change["action"] != "unchanged"]
    assert changed == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_rehearsals_run_side_by_side_and_leave_no_process_when_they_are_stopped(
    tmp_path: Path, env: dict[str, str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with (
        Session("rehearse", "--out", str(one), log=tmp_path / "one.log", env=env) as first,
        Session("rehearse", "--out", str(two), log=tmp_path / "two.log", env=env) as second,
    ):
        first.wait_until(lambda: UP in first.output)
        refused = run("rehearse", "--out", str(one), env=env)
        assert refused.returncode == ExitCode.BAD_INPUT
        assert re.match(f"error: {one}: another rehearsal is running.*--out", refused.stderr)
        second.wait_until(lambda: UP in second.output)
        # In the middle: the first one's model server is starting, or there already.
        first.wait_until(lambda: "apply manifests" in steps(read_record(one / "report.json")))
        assert not ports_of(one) & ports_of(two)

        processes, ports = whole(first, one)
        assert first.signal_group(signal.SIGINT) == INTERRUPTED, first.output
        assert not processes & all_processes()
        assert not any(answers(port) for port in ports)

        processes, ports = whole(second, two)
        second.kill()
        wait_for(lambda: not processes & all_processes())  # Nobody is left to wait for them but the kernel.
        assert not any(answers(port) for port in ports)


def whole(rehearsal: Session, out: Path) -> tuple[set[Process], set[int]]:
    """The processes of a running rehearsal, and the ports that it listens on."""
    processes, ports = family(rehearsal.process.pid), ports_of(out)
    assert len(processes) >= 5  # itself, the cloud with hub and storage, the Prefect server
    assert all(answers(port) for port in ports)
    return processes, ports


def _parents() -> Iterator[tuple[Process, int]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name in parentheses: state, parent, …; the start time is the 22nd field.
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z":
            yield (int(path.parent.name), int(fields[19])), int(fields[1])


def all_processes() -> set[Process]:
    return {process for process, _ in _parents()}


def family(pid: int) -> set[Process]:
    """The process and everything that it started, directly or not."""
    parents = dict(_parents())
    found = {process for process in parents if process[0] == pid}
    while more := {process for process, parent in parents.items() if parent in {p for p, _ in found}} - found:
        found |= more
    return found


def ports_of(out: Path) -> set[int]:
    """Where the rehearsal's cloud listens."""
    endpoints = yaml.safe_load((out / "target.yaml").read_text(encoding="utf-8"))["endpoints"]
    return {port for url in endpoints.values() if url is not None and (port := urlsplit(url).port) is not None}


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(10)
        return probe.connect_ex(("127.0.0.1", port)) == 0
