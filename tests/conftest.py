"""Shared fixtures. The Prefect server starts only for the tests that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before Prefect is imported: no telemetry from tests, and room for a slow start on a loaded machine.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One real Prefect server with a database of its own, shared by all flow tests."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
