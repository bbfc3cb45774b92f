"""Many rollouts at once on one Prefect server: what they cost, and what gives in first.

    python tests/benchmarks/many_rollouts.py --at-once 1 10 25 50 --database postgres

Every rollout is a process of its own, as a worker starts it, with a target of its own on one embedded cloud: bucket,
cluster, identity, a tiny model, the smoke suite, and a teardown that leaves nothing. Postgres is Debian's package
(`apt-get install postgresql`), on a socket of its own with a database of its own. Prints a markdown table; fifty
rollouts take about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transfer_harness import GIB, table, workspace

from rollout.target import Target
from sandbox.cloud import EmbeddedCloud
from sandbox.cluster import NodeSettings
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from sandbox.processes import Child

REPO = "benchmark/tiny"
GPUS = 4096
"""More than all rollouts together hold: they must not wait for each other's nodes."""
PROBE_EVERY_S = 0.5
READY_TIMEOUT_S = 180.0
ROLLOUT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Ended:
    """What one rollout took."""

    duration_s: float
    cpu_s: float
    peak_mb: float
    done: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 10, 25, 50])
    parser.add_argument("--database", choices=("postgres", "sqlite"), default="postgres")
    options = parser.parse_args()
    rows = []
    with workspace(GIB) as root:
        cloud = EmbeddedCloud(
            root / "cloud",
            quotas={"NVIDIA_H100_GPUS": GPUS, "INSTANCES": GPUS},
            nodes=NodeSettings(gpu_quota=GPUS),
        )
        HubStore(cloud.hub_root).publish(REPO, tiny_model(root / "model"))
        with cloud, database(options.database, root) as (url, database_pid), prefect_server(root, url) as (api, server):
            for count in options.at_once:
                rows.append(measure(cloud, root, api, count, {"server": server, "database": database_pid}))
                print(rows[-1], file=sys.stderr, flush=True)
    headers = (
        *("at once", "done", "load before", "wall (s)", "rollouts/min", "median (s)", "longest (s)"),
        *("CPU-s a rollout: ours", "Prefect server", "database", "MB a rollout", "API p50 (ms)", "API p99 (ms)"),
    )
    print(table(headers, rows))


def measure(cloud: EmbeddedCloud, root: Path, api: str, count: int, pids: dict[str, int]) -> tuple[object, ...]:
    """One row: `count` rollouts at once, from the first start to the last end."""
    folder = root / f"at-once-{count}"
    folder.mkdir()
    commands = [prepare(cloud, folder, f"r{count}-{number}") for number in range(count)]
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    load_before = os.getloadavg()[0]
    started = time.monotonic()
    with probing(api) as latencies, ThreadPoolExecutor(count) as pool:
        ended = list(pool.map(lambda command: roll_out(command, folder, api), commands))
    wall_s = time.monotonic() - started
    used = {name: (cpu_s(pid) - before[name]) / count for name, pid in pids.items()}
    done = sum(one.done for one in ended)
    durations = sorted(one.duration_s for one in ended)
    return (
        count,
        done,
        f"{load_before:.1f}",
        f"{wall_s:.0f}",
        f"{done / wall_s * 60:.1f}",
        f"{statistics.median(durations):.1f}",
        f"{durations[-1]:.1f}",
        f"{statistics.mean(one.cpu_s for one in ended):.1f}",
        f"{used['server']:.2f}",
        f"{used['database']:.2f}",
        f"{statistics.mean(one.peak_mb for one in ended):.0f}",
        f"{percentile(latencies, 0.5) * 1e3:.0f}",
        f"{percentile(latencies, 0.99) * 1e3:.0f}",
    )


def prepare(cloud: EmbeddedCloud, folder: Path, name: str) -> list[str]:
    """Files and command line of one rollout."""
    target: Target = cloud.target(
        name=name, bucket=f"models-{name}", namespace=name, cluster={"name": name}, gsa=f"{name}-gsa", ksa=f"{name}-ksa"
    )
    serving = {
        "name": name,
        "service_name": f"{name}-svc",
        "app": name,
        "served_model_name": REPO,
        "resources": {"cpu": "1", "memory": "1Gi", "ephemeral_storage": "1Gi"},
        "max_model_len": 1024,
        "max_images_per_prompt": None,
        "tool_call_parser": None,
        "reasoning_parser": None,
        "ready_timeout_s": 1200,
        "termination_grace_period_s": 5,
    }
    documents: dict[str, Any] = {
        "target": target.model_dump(mode="json"),
        "model": {"model": {"repo_id": REPO}, "serving": serving},
        "policy": {"benchmark": None, "teardown": "always", "weights": "delete"},
    }
    for kind, document in documents.items():
        (folder / f"{name}-{kind}.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    paths = {kind: str(folder / f"{name}-{kind}.yaml") for kind in documents}
    program = str(Path(sys.executable).with_name("llm-rollout"))
    return [
        *(program, "rollout", paths["model"], "--target", paths["target"], "--policy", paths["policy"]),
        *("--report", str(folder / f"{name}.json")),
    ]


def roll_out(command: list[str], folder: Path, api: str) -> Ended:
    """Run one rollout to its end; one that does not end well is shown, and counts as such."""
    report = Path(command[-1])
    started = time.monotonic()
    with report.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PREFECT_API_URL": api},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        # Not Popen.wait: the use of this child alone, beside the cloud's own children.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    done = process.returncode == 0 and json.loads(report.read_text())["teardown"]["left"] == []
    if not done:
        text = report.with_suffix(".log").read_text()
        print(f"{report.stem} ended with {process.returncode}:\n{text}", file=sys.stderr, flush=True)
    return Ended(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, done)


@contextlib.contextmanager
def probing(api: str) -> Iterator[list[float]]:
    """Ask the server what its UI asks all the time, and note how long the answers take (s)."""
    latencies: list[float] = []
    stopping = threading.Event()

    def probe() -> None:
        while not stopping.wait(PROBE_EVERY_S):
            started = time.monotonic()
            request = urllib.request.Request(
                f"{api}/flow_runs/filter", b'{"limit": 50}', {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
            latencies.append(time.monotonic() - started)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield latencies
    finally:
        stopping.set()
        thread.join()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def cpu_s(pid: int) -> float:
    """User and system time of a process, its living children, and those that it has waited for; 0 for no process."""
    if not pid:
        return 0.0
    ticks, total = os.sysconf("SC_CLK_TCK"), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(path.parent.name) == pid:
                total += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime: man 5 proc
            elif int(fields[1]) == pid:
                total += sum(int(field) for field in fields[11:13])
    return total / ticks


@contextlib.contextmanager
def prefect_server(root: Path, database_url: str) -> Iterator[tuple[str, int]]:
    """(API address, process id) of a server with its own home."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = f"http://127.0.0.1:{port}/api"
    os.environ |= {
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url,
    }
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with Child(command, log=root / "prefect.log") as server:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{api}/health", timeout=5).read()
                break
            if time.monotonic() > deadline or server.process.poll() is not None:
                raise SystemExit(f"the Prefect server did not start:\n{server.log_tail()}")
            time.sleep(0.2)
        yield api, server.process.pid


@contextlib.contextmanager
def database(kind: str, root: Path) -> Iterator[tuple[str, int]]:
    """(URL, process id) of the server's database; sqlite is part of the server."""
    if kind == "sqlite":
        yield f"sqlite+aiosqlite:///{root / 'prefect.db'}", 0
        return
    data, user = root / "postgres", "nobody" if os.geteuid() == 0 else None  # Postgres refuses to run as root
    data.mkdir()
    if user:
        shutil.chown(data, user)
        root.chmod(0o755)
    subprocess.run(
        [postgres_program("initdb"), "--pgdata", data, "--username", "prefect", "--auth", "trust", "--no-sync"],
        user=user,
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=data,
    )
    options = ("-c", "listen_addresses=", "-c", f"unix_socket_directories={data}", "-c", "max_connections=200")
    with (data.parent / "postgres.log").open("wb") as log:
        process = subprocess.Popen(
            [postgres_program("postgres"), "-D", data, *options], user=user, stdout=log, stderr=log, cwd=data
        )
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not (data / ".s.PGSQL.5432").exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit(f"Postgres did not start:\n{(data.parent / 'postgres.log').read_text()}")
            time.sleep(0.1)
        yield f"postgresql+asyncpg://prefect@/postgres?host={data}", process.pid
    finally:
        process.terminate()
        process.wait()


def postgres_program(name: str) -> str:
    """Debian keeps the server's programs out of PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(debian[-1]) if debian else None)
    if found is None:
        raise SystemExit(f"there is no {name}: apt-get install postgresql, or --database sqlite")
    return found


if __name__ == "__main__":
    main()
