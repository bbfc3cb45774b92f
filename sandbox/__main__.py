"""`python -m sandbox`: the embedded cloud with the rehearsal's model, as one process that says when it is ready."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sandbox import models
from sandbox.cloud import CHECKOUT, EmbeddedCloud
from sandbox.cluster.server import VLLM_IMAGES
from sandbox.engine.real_vllm import ensure_venv
from sandbox.hub_store import HubStore
from sandbox.processes import wait_for_stop

MODEL_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_CACHE = CHECKOUT / "out" / "cache" / "models"
VLLM_VENV = CHECKOUT / ".venv-vllm"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="directory of all state")
    parser.add_argument("--target", type=Path, required=True, help="where to write the cloud as a target file")
    parser.add_argument("--engine", choices=("simulated", "vllm"), default="simulated")
    options = parser.parse_args()
    cloud = EmbeddedCloud(options.root, runners=_real_vllm() if options.engine == "vllm" else {})
    HubStore(cloud.hub_root).publish(MODEL_REPO, models.smollm2(MODEL_CACHE))
    with cloud:
        cloud.write_target(options.target)
        print(json.dumps({"target": str(options.target)}), flush=True)
        wait_for_stop()


def _real_vllm() -> dict[str, tuple[str, ...]]:
    """The runner of every vLLM image: real vLLM of a venv that is made on first use."""
    command = ("{python}", "-m", "sandbox.engine", "serve", "--real-vllm-python", str(ensure_venv(VLLM_VENV)), "--")
    return dict.fromkeys(VLLM_IMAGES, tuple(word.format(python=sys.executable) for word in command))


if __name__ == "__main__":
    main()
