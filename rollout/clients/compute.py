"""What Compute Engine knows of a region: accelerators, quota, and the disks that carry our labels. Read only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.clients.google_auth import RestApi
from rollout.target import Target
from rollout.values import Value


class Quota(Value):
    """A regional quota; its metrics are named in `rollout.accelerators`."""

    metric: str
    limit: float
    usage: float

    @property
    def free(self) -> float:
        return self.limit - self.usage


class Disk(Value):
    """A persistent disk."""

    name: str
    zone: str
    size_gib: int
    labels: dict[str, str] = {}


class Compute:
    """The target's region in Compute Engine."""

    def __init__(self, target: Target) -> None:
        self._api = RestApi(target, "compute")
        self._region = target.region
        self._base = f"/compute/v1/projects/{target.project}"

    def accelerators(self) -> dict[str, tuple[str, ...]]:
        """Accelerator type -> the region's zones that offer it. `nvidia-h100-80gb`: as GKE's node label."""
        offered: dict[str, list[str]] = {}
        for zone, kinds in self._aggregated("acceleratorTypes").items():
            for kind in kinds:
                offered.setdefault(kind["name"], []).append(zone)
        return {name: tuple(sorted(zones)) for name, zones in offered.items()}

    def quotas(self) -> dict[str, Quota]:
        """The region's quotas by metric, e.g. `NVIDIA_H100_GPUS`."""
        region = self._api.get(f"{self._base}/regions/{self._region}")
        return {
            quota["metric"]: Quota(metric=quota["metric"], limit=quota["limit"], usage=quota.get("usage", 0.0))
            for quota in region.get("quotas", ())
        }

    def disks(self, labels: Mapping[str, str]) -> tuple[Disk, ...]:
        """The region's disks that carry all `labels`."""
        terms = " AND ".join(f"labels.{key}={value}" for key, value in sorted(labels.items()))
        found = self._aggregated("disks", {"filter": terms})
        return tuple(
            Disk(name=disk["name"], zone=zone, size_gib=int(disk["sizeGb"]), labels=disk.get("labels", {}))
            for zone, disks in sorted(found.items())
            for disk in disks
        )

    def _aggregated(self, collection: str, query: Mapping[str, str] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Zone of the region -> its items, over all pages."""
        items: dict[str, list[dict[str, Any]]] = {}
        page = dict(query or {})
        while True:
            answer = self._api.get(f"{self._base}/aggregated/{collection}", page)
            for scope, found in answer.get("items", {}).items():
                zone = scope.removeprefix("zones/")
                if zone.startswith(f"{self._region}-"):
                    items.setdefault(zone, []).extend(found.get(collection, ()))
            if not answer.get("nextPageToken"):
                return items
            page["pageToken"] = answer["nextPageToken"]
