"""Google's control plane on loopback, and the target that points at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.target import CredentialSource, Endpoints, Target
from rollout.universe import Universe
from sandbox.google_apis import Delays, GoogleApisServer

GoogleApisMaker = Callable[..., GoogleApisServer]


@pytest.fixture
def serve_google_apis(tmp_path: Path) -> Iterator[GoogleApisMaker]:
    """Start a server in which everything happens at once, unless `delays` says otherwise."""
    started: list[GoogleApisServer] = []

    def make(**options: Any) -> GoogleApisServer:
        at_once = Delays(
            cluster_creation_s=0.0, cluster_change_s=0.0, node_pool_s=0.0, api_enable_s=0.0, iam_propagation_s=0.0
        )
        settings: dict[str, Any] = {"universe_domain": "s3nsapis.fr", "delays": at_once} | options
        started.append(GoogleApisServer(root=tmp_path / "google", **settings).start())
        return started[-1]

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def google_apis(serve_google_apis: GoogleApisMaker) -> GoogleApisServer:
    return serve_google_apis()


@pytest.fixture
def target_for() -> Callable[..., Target]:
    """A target on S3NS whose control plane is `server`; keyword arguments replace fields."""

    def make(server: GoogleApisServer, **fields: Any) -> Target:
        services = ("container", "iam", "cloudresourcemanager", "serviceusage", "cloudbilling", "compute")
        endpoints = Endpoints(**dict.fromkeys(services, server.url), storage=fields.pop("storage", None))
        defaults: dict[str, Any] = {
            "name": "test",
            "project": "rehearsal-project",
            "region": "u-france-east1",
            "universe": Universe(domain="s3nsapis.fr"),
            "credentials": CredentialSource.ANONYMOUS,
            "bucket": "gemma-4-26b-it",
            "endpoints": endpoints,
            "gsa": "gemma-gsa",
            "ksa": "gemma-ksa",
        }
        return Target(**(defaults | fields))

    return make


@pytest.fixture
def google_target(google_apis: GoogleApisServer, target_for: Callable[..., Target]) -> Target:
    return target_for(google_apis)
