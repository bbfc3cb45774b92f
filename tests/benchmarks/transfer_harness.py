"""What the transfer benchmarks share: a synthetic model, the hub and the bucket as processes, arms as processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from sandbox.checkpoint import write_json  # noqa: E402
from sandbox.hub_store import HubStore  # noqa: E402
from sandbox.processes import Child  # noqa: E402

REPO = "benchmark/model"
READY_TIMEOUT_S = 120.0
GIB = 2**30


@contextlib.contextmanager
def workspace(held_bytes: int) -> Iterator[Path]:
    """A folder for `held_bytes` of files, removed at the end.

    In memory where that fits with a third to spare, so that no disk is measured: what lies there is the benchmark's own
    memory too, and the kernel kills processes when it runs out.
    """
    shared = Path("/dev/shm")
    fits = shared.is_dir() and min(shutil.disk_usage(shared).free, _available_bytes()) > held_bytes * 4 // 3
    with tempfile.TemporaryDirectory(prefix="transfer-benchmark-", dir=shared if fits else None) as folder:
        yield Path(folder)


def _available_bytes() -> int:
    """Memory that can be had without swapping: man 5 proc."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def publish_model(hub_root: Path, *, total_bytes: int, shards: int, repo: str = REPO) -> None:
    """A repository of `shards` equal files of random bytes, with the small files around them."""
    folder = hub_root.parent / f"files-{repo.replace('/', '-')}"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(7)
    names = [f"model-{number:05d}-of-{shards:05d}.safetensors" for number in range(1, shards + 1)]
    for name in names:
        with (folder / name).open("wb") as file:
            remaining = total_bytes // shards
            while remaining:
                count = min(remaining, 2**26)
                file.write(generator.bytes(count))
                remaining -= count
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "")})
    HubStore(hub_root).publish(repo, folder)
    shutil.rmtree(folder)


class Servers:
    """Hub and bucket, each a process of its own."""

    def __init__(self, root: Path, *, hub: Sequence[str] = (), storage: Sequence[str] = ()) -> None:
        self._children = {
            "hub": _server("sandbox.hub", root / "hub", hub),
            "storage": _server("sandbox.storage", root / "storage", storage),
        }
        self.hub_url, self.storage_url = (child.ready_line(READY_TIMEOUT_S)["url"] for child in self._children.values())

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.stop()

    def stats(self, server: str) -> dict[str, Any]:
        """What `hub` or `storage` counted: `faults` by kind; the hub also its `requests`."""
        url = {"hub": self.hub_url, "storage": self.storage_url}[server]
        with urllib.request.urlopen(f"{url}/_sandbox/stats", timeout=60) as response:
            return dict(json.load(response))

    def cpu_s(self) -> float:
        """What the servers themselves have used."""
        ticks = os.sysconf("SC_CLK_TCK")
        total = 0
        for child in self._children.values():
            fields = Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])  # utime and stime: man 5 proc
        return total / ticks


def _server(module: str, root: Path, options: Sequence[str]) -> Child:
    command = [sys.executable, "-m", module, "--root", str(root), *options]
    return Child(command, log=root.with_suffix(".log"), cwd=CHECKOUT)


def run_arm(arm: str, servers: Servers, root: Path, *more: str, bucket: str, keep: bool = False) -> dict[str, Any]:
    """Run one way of moving the model; `server_cpu_s` is what hub and bucket used meanwhile."""
    scratch = root / "scratch"
    scratch.mkdir(exist_ok=True)
    before = servers.cpu_s()
    command = [
        *(sys.executable, str(Path(__file__).with_name("transfer_arms.py")), arm),
        *("--hub", servers.hub_url, "--storage", servers.storage_url, "--repo", REPO, "--bucket", bucket),
        *("--scratch", str(scratch), *more),
    ]
    environment = os.environ | {
        "HF_HOME": str(root / "hf-home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(CHECKOUT),
    }
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=CHECKOUT, env=environment).stdout
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    figures["server_cpu_s"] = servers.cpu_s() - before
    shutil.rmtree(scratch)
    if not keep:
        for folder in (root / "storage" / "buckets").glob("*"):
            for path in folder.rglob("*"):
                if path.is_file() and path.stat().st_size > 2**20:
                    path.unlink()
    return figures


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
