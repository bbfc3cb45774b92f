"""What a pod of the transfer's Job runs: `python -m rollout.clients.transfer_job`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from rollout.clients.transfer import publish_shard
from rollout.errors import BadInput, RolloutError
from rollout.transfer import Progress, TransferReport
from rollout.transfer_job import INDEX_VARIABLE, REQUEST_FILE_VARIABLE, TOKEN_VARIABLE, shard_of

_LOG_EVERY = 0.1
"""A line in the pod's log for every tenth of the share."""


def run_shard(environment: Mapping[str, str]) -> TransferReport:
    """Bring this pod's share into the bucket; its report is left there for `finish`."""
    path = environment.get(REQUEST_FILE_VARIABLE)
    if path is None:
        raise BadInput(
            f"{REQUEST_FILE_VARIABLE} is not set.",
            resolution="This runs in the pods of manifests/transfer-job.yaml only.",
        )
    request, index = shard_of(Path(path).read_text(encoding="utf-8"), environment.get(INDEX_VARIABLE))
    logged = 0.0

    def log(progress: Progress) -> None:
        nonlocal logged
        if progress.share >= logged + _LOG_EVERY:
            logged = progress.share
            print(progress.text, flush=True)

    return publish_shard(
        request.pinned,
        request.target,
        request.spec,
        index=index,
        count=request.shards,
        token=environment.get(TOKEN_VARIABLE),
        on_progress=log,
    )


def main() -> int:
    # As process 1 of its container Python would not hear it, and send on until it is killed, its claim still held.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        report = run_shard(os.environ)
    except RolloutError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    print(f"share {report.shard}: {report.total_bytes:,} bytes in {report.seconds:.0f} s, {report.retries} retries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
