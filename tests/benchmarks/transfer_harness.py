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

from sandbox.checkpoint import write_json
from sandbox.hub_store import HubStore
from sandbox.processes import Child

CHECKOUT = Path(__file__).resolve().parents[2]
REPO = "benchmark/model"
READY_TIMEOUT_S = 120.0
GIB = 2**30


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder in memory where there is room, so that no disk is measured; removed at the end."""
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() and shutil.disk_usage(shared).free > 20 * GIB else None
    with tempfile.TemporaryDirectory(prefix="transfer-benchmark-", dir=parent) as folder:
        yield Path(folder)


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
        self._children = [
            Child(
                [sys.executable, "-m", "sandbox.hub", "--root", str(root / "hub"), *hub],
                log=root / "hub.log",
                cwd=CHECKOUT,
            ),
            Child(
                [sys.executable, "-m", "sandbox.storage", "--root", str(root / "storage"), *storage],
                log=root / "storage.log",
                cwd=CHECKOUT,
            ),
        ]
        self.hub_url, self.storage_url = (child.ready_line(READY_TIMEOUT_S)["url"] for child in self._children)

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.stop()

    def requests(self, server: str) -> list[dict[str, Any]]:
        """The request log of `hub` or `storage`."""
        url = self.hub_url if server == "hub" else self.storage_url
        with urllib.request.urlopen(f"{url}/_sandbox/stats", timeout=60) as response:
            return list(json.load(response)["requests"])

    def cpu_s(self) -> float:
        """What the servers themselves have used."""
        ticks = os.sysconf("SC_CLK_TCK")
        fields = [
            Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split() for child in self._children
        ]
        return sum((int(values[11]) + int(values[12])) / ticks for values in fields)


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
