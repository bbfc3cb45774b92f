"""Where profiles and manifests may come from. Apart from the rest, because command line and forms name them first."""

from __future__ import annotations

from enum import StrEnum


class SourceName(StrEnum):
    """Where profiles may come from."""

    HISTORY = "history"
    """Records and curves in a local folder."""
    BUCKET = "bucket"
    """Records and curves in the target's bucket."""
    GOOGLE = "google"
    """GKE Inference Quickstart."""


class Generator(StrEnum):
    """Who renders manifests."""

    LOCAL = "local"
    GOOGLE = "google"
