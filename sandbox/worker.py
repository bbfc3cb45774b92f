"""Plays an image that holds this project, such as the worker's: runs the container's own command on this machine.

The paths of its mounts lie elsewhere here (see `sandbox.cluster.surroundings`): variables that name one are changed.

    python -m sandbox.worker python -m rollout.clients.transfer_job
"""

from __future__ import annotations

import os
import sys

from sandbox.inference_perf import on_this_machine


def main() -> None:
    _, *arguments = sys.argv[1:]  # `python`
    environment = {
        name: str(on_this_machine(value)) if value.startswith("/") else value for name, value in os.environ.items()
    }
    os.execve(sys.executable, [sys.executable, *arguments], environment)


if __name__ == "__main__":
    main()
