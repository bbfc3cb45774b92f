"""A process that publishes weights, for tests that kill it: `publishing_process.py REQUEST.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rollout.clients.transfer import publish_weights
from rollout.model import PinnedModel
from rollout.target import Target
from rollout.transfer import TransferSpec

if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    publish_weights(
        PinnedModel.model_validate(request["pinned"]),
        Target.model_validate(request["target"]),
        TransferSpec.model_validate(request["spec"]),
    )
