"""Versions of a model server that a delivery can tell apart, and the delivery that is quick to do so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rollout.clients.cluster import ClusterClient
from rollout.clients.traffic import Traffic, TrafficClient
from rollout.delivery import DeliveryStrategy
from rollout.record import RolloutReport
from tests.flows.conftest import Stage

FAST = {"base_s": 0.004}
GOOD = {"base_s": 0.005}
SLOW = {"base_s": 0.004, "per_prefill_token_s": 0.01}
"""Slow to the first token by far more than what a busy machine adds."""
BROKEN = "no-such-preset"
"""Ends the engine at its start."""

GATEWAY = {"name": "models", "class_name": "gke-l7-rilb"}


def strategy(**changes: Any) -> DeliveryStrategy:
    """Quick decisions, with margins that forgive a busy machine its noise."""
    settings: dict[str, Any] = {
        "kind": "canary",
        "steps": [
            {"weight_percent": 30, "duration_s": 0, "min_requests": 16},
            {"weight_percent": 60, "duration_s": 0, "min_requests": 16},
        ],
        "min_requests": 16,
        "margins": {"error_share": 0.5, "latency_share": 2.0, "latency_floor_s": 0.1},
        "probes": {"max_rate_per_s": 8, "input_words": 16, "output_tokens": 8},
        "gateway": GATEWAY,
        "rollback_window_s": 1,
    }
    return DeliveryStrategy.model_validate(settings | changes)


def write_version(
    stage: Stage, latency: dict[str, float] | str, *, env: Mapping[str, str] | None = None, **changes: Any
) -> None:
    """The next version of the model server; what it runs differs by its environment."""
    text = latency if isinstance(latency, str) else json.dumps(latency)
    stage.write_model(env={"SANDBOX_ENGINE_LATENCY": text, **(env or {})}, **changes)


def traffic_of(stage: Stage, report: RolloutReport) -> Traffic:
    assert report.plan is not None
    return TrafficClient(ClusterClient.connect(stage.target), report.plan).read()
