"""Compute Engine v1, read only: the region and its quota, accelerators, machine types and disks.

Simulated: `regions.get` with GPU quotas and their use by node pools and nodes, `acceleratorTypes` and `disks` by zone
and aggregated (with `labels.key=value` filters), `machineTypes.get`. Others register the disks that volumes make. Not
simulated: everything that changes something, paging (one page holds all), other filters (400).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sandbox.google_apis.catalogue import ACCELERATORS, MACHINE_TYPES
from sandbox.google_apis.cloud import Cloud
from sandbox.google_apis.container import Container
from sandbox.google_apis.rest import ApiError, Call, Json, Route

SERVICE = "compute.googleapis.com"
_LISTING = frozenset({"filter", "maxResults", "pageToken", "returnPartialSuccess", "includeAllScopes"})
_LABEL_TERM = re.compile(
    r"\(?\s*labels\.(?P<key>[a-z][-_a-z0-9]*)\s*(?P<operator>=|:)\s*\"?(?P<value>[-_a-z0-9]*|\*)\"?\s*\)?"
)


class Compute:
    def __init__(self, cloud: Cloud, container: Container) -> None:
        self._cloud = cloud
        self._container = container

    def routes(self) -> list[Route]:
        project = "projects/{project}"
        region, zone = f"{project}/regions/{{region}}", f"{project}/zones/{{zone}}"
        return [
            Route("GET", f"/compute/v1/{region}", SERVICE, "compute.regions.get", self._region, resource=region),
            Route(
                "GET",
                f"/compute/v1/{project}/aggregated/acceleratorTypes",
                SERVICE,
                "compute.acceleratorTypes.list",
                self._all_accelerators,
                query=_LISTING,
            ),
            Route(
                "GET",
                f"/compute/v1/{zone}/acceleratorTypes",
                SERVICE,
                "compute.acceleratorTypes.list",
                self._zone_accelerators,
                query=_LISTING,
            ),
            Route(
                "GET",
                f"/compute/v1/{zone}/machineTypes/{{machine}}",
                SERVICE,
                "compute.machineTypes.get",
                self._machine,
                resource=f"{zone}/machineTypes/{{machine}}",
            ),
            Route(
                "GET",
                f"/compute/v1/{project}/aggregated/disks",
                SERVICE,
                "compute.disks.list",
                self._all_disks,
                query=_LISTING,
            ),
            Route("GET", f"/compute/v1/{zone}/disks", SERVICE, "compute.disks.list", self._zone_disks, query=_LISTING),
        ]

    def _region(self, call: Call) -> Json:
        name = call.params["region"]
        if name != self._cloud.region:
            raise self._not_found(f"regions/{name}")
        usage = self._container.quota_usage()
        quotas = [
            {"metric": metric, "limit": limit, "usage": usage.get(metric, 0.0)}
            for metric, limit in self._cloud.quotas.items()
        ]
        return {
            "kind": "compute#region",
            "name": name,
            "status": "UP",
            "zones": [self._link(f"zones/{zone}") for zone in self._cloud.zones],
            "quotas": quotas,
            "selfLink": self._link(f"regions/{name}"),
        }

    def _all_accelerators(self, call: Call) -> Json:
        return self._aggregated("acceleratorType", {zone: self._accelerators(zone) for zone in self._cloud.zones}, call)

    def _zone_accelerators(self, call: Call) -> Json:
        self._refuse_filter(call)
        return {"kind": "compute#acceleratorTypeList", "items": self._accelerators(self._zone(call))}

    def _accelerators(self, zone: str) -> list[Json]:
        return [
            {
                "kind": "compute#acceleratorType",
                "name": name,
                "description": description,
                "maximumCardsPerInstance": most,
                "zone": self._link(f"zones/{zone}"),
                "selfLink": self._link(f"zones/{zone}/acceleratorTypes/{name}"),
            }
            for name, (description, most, metric) in ACCELERATORS.items()
            if metric in self._cloud.quotas
        ]

    def _machine(self, call: Call) -> Json:
        zone = self._zone(call)
        machine = MACHINE_TYPES.get(call.params["machine"])
        if machine is None:
            raise self._not_found(f"zones/{zone}/machineTypes/{call.params['machine']}")
        answer: Json = {
            "kind": "compute#machineType",
            "name": machine.name,
            "guestCpus": machine.guest_cpus,
            "memoryMb": machine.memory_mib,
            "zone": zone,
            "selfLink": self._link(f"zones/{zone}/machineTypes/{machine.name}"),
        }
        if machine.accelerator:
            answer["accelerators"] = [
                {"guestAcceleratorType": machine.accelerator, "guestAcceleratorCount": machine.accelerator_count}
            ]
        return answer

    def _all_disks(self, call: Call) -> Json:
        matching = {zone: self._disks(zone, call) for zone in self._cloud.zones}
        return self._aggregated("disk", matching, call)

    def _zone_disks(self, call: Call) -> Json:
        return {"kind": "compute#diskList", "items": self._disks(self._zone(call), call)}

    def _disks(self, zone: str, call: Call) -> list[Json]:
        terms = _label_terms(call.query.get("filter", ""))
        disks = self._cloud.store.data["disks"].values()
        return [disk for disk in disks if disk["zone"] == self._link(f"zones/{zone}") and _matches(disk, terms)]

    def register_disk(self, name: str, zone: str, size_gib: int, labels: dict[str, str]) -> None:
        """A disk appears, as when a volume is claimed or a node boots."""
        self._cloud.store.data["disks"][name] = {
            "kind": "compute#disk",
            "name": name,
            "sizeGb": str(size_gib),
            "labels": dict(labels),
            "status": "READY",
            "zone": self._link(f"zones/{zone}"),
            "selfLink": self._link(f"zones/{zone}/disks/{name}"),
        }

    def _aggregated(self, kind: str, by_zone: dict[str, list[Json]], call: Call) -> Json:
        if kind != "disk":
            self._refuse_filter(call)
        items: Json = {}
        for zone, found in by_zone.items():
            nothing = {
                "code": "NO_RESULTS_ON_PAGE",
                "message": f"There are no results for scope 'zones/{zone}' on this page.",
                "data": [{"key": "scope", "value": f"zones/{zone}"}],
            }
            items[f"zones/{zone}"] = {f"{kind}s": found} if found else {"warning": nothing}
        return {"kind": f"compute#{kind}AggregatedList", "items": items}

    def _refuse_filter(self, call: Call) -> None:
        if call.query.get("filter"):
            raise _bad_filter(call.query["filter"])

    def _zone(self, call: Call) -> str:
        zone = call.params["zone"]
        if zone not in self._cloud.zones:
            raise self._not_found(f"zones/{zone}")
        return zone

    def _not_found(self, path: str) -> ApiError:
        return ApiError("NOT_FOUND", f"The resource 'projects/{self._cloud.project}/{path}' was not found")

    def _link(self, path: str) -> str:
        host = f"https://www.{self._cloud.universe_domain}"
        return f"{host}/compute/v1/projects/{self._cloud.project}/{path}"


def _label_terms(expression: str) -> list[tuple[str, str]]:
    """`labels.a=b AND labels.c:*` -> [("a", "b"), ("c", "*")]."""
    if not expression:
        return []
    terms = []
    for part in re.split(r"\s+AND\s+|(?<=\))\s+(?=\()", expression):
        match = _LABEL_TERM.fullmatch(part.strip())
        if match is None or (match["value"] == "*") != (match["operator"] == ":"):
            raise _bad_filter(expression)
        terms.append((match["key"], match["value"]))
    return terms


def _bad_filter(expression: str) -> ApiError:
    message = f"Invalid value for field 'filter': '{expression}'. Invalid list filter expression."
    return ApiError("INVALID_ARGUMENT", message)


def _matches(disk: Json, terms: Iterable[tuple[str, str]]) -> bool:
    labels = disk["labels"]
    return all(key in labels and value in ("*", labels[key]) for key, value in terms)
