"""The project that every API looks at: names, settings, permissions and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sandbox.google_apis.rest import ApiError, Json, error_info
from sandbox.google_apis.state import Store

_UNIVERSE_PREFIXES = {"googleapis.com": "", "s3nsapis.fr": "s3ns"}
"""What stands between a project and `iam.gserviceaccount.com` or `svc.id.goog` in a universe."""

API_TITLES = {
    "cloudbilling.googleapis.com": "Cloud Billing API",
    "cloudresourcemanager.googleapis.com": "Cloud Resource Manager API",
    "compute.googleapis.com": "Compute Engine API",
    "container.googleapis.com": "Kubernetes Engine API",
    "gkerecommender.googleapis.com": "GKE Recommender API",
    "iam.googleapis.com": "Identity and Access Management (IAM) API",
    "iamcredentials.googleapis.com": "IAM Service Account Credentials API",
    "monitoring.googleapis.com": "Cloud Monitoring API",
    "logging.googleapis.com": "Cloud Logging API",
    "serviceusage.googleapis.com": "Service Usage API",
    "storage.googleapis.com": "Cloud Storage API",
}
"""The services that the project can have; others are unknown to Service Usage."""

ALL_SERVICES = frozenset(API_TITLES)


@dataclass
class Delays:
    """How long the cloud takes, in seconds."""

    cluster_creation_s: float = 2.0
    cluster_change_s: float = 0.5
    """Updates, label changes and deletions."""
    node_pool_s: float = 1.0
    api_enable_s: float = 0.5
    iam_propagation_s: float = 0.5
    """Until a new service account can be read, and until a changed policy is in force for workloads."""


@dataclass
class Cloud:
    """One project in one universe, with its state."""

    store: Store
    project: str
    project_number: str
    universe_domain: str
    region: str
    zones: tuple[str, ...]
    quotas: Mapping[str, float]
    """Regional Compute Engine limits by metric, e.g. `NVIDIA_H100_GPUS`."""
    delays: Delays = field(default_factory=Delays)
    denied_permissions: Collection[str] = ()
    clock: Callable[[], float] = time.time

    @property
    def scoped_project(self) -> str:
        """`proj.example.com` for `example.com:proj`, with the universe's label: the stem of e-mails and pools."""
        domain, _, name = self.project.rpartition(":")
        return ".".join(part for part in (name, domain, _UNIVERSE_PREFIXES[self.universe_domain]) if part)

    @property
    def workload_pool(self) -> str:
        return f"{self.scoped_project}.svc.id.goog"

    def service_account_email(self, name: str) -> str:
        return f"{name}@{self.scoped_project}.iam.gserviceaccount.com"

    def is_own_project(self, project: str) -> bool:
        return project in (self.project, self.project_number)

    def address(self, service: str) -> str:
        """`https://container.s3nsapis.fr`: the real address, which answers quote in their links."""
        return f"https://{service}.{self.universe_domain}"

    def now(self) -> float:
        return self.clock()

    def timestamp(self, seconds: float | None = None) -> str:
        """RFC 3339 with microseconds, as Google writes it."""
        moment = datetime.fromtimestamp(self.now() if seconds is None else seconds, UTC)
        return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")

    def require_enabled(self, service: str, services: Mapping[str, Any]) -> None:
        """403 SERVICE_DISABLED unless `service` is enabled in the project."""
        if services.get(service) == "ENABLED":
            return
        page = f"https://console.developers.google.com/apis/api/{service}/overview?project={self.project_number}"
        message = (
            f"{API_TITLES[service]} has not been used in project {self.project_number} before or it is disabled. "
            f"Enable it by visiting {page} then retry. If you enabled this API recently, wait a few minutes for the "
            "action to propagate to our systems and retry."
        )
        help_link = {
            "@type": "type.googleapis.com/google.rpc.Help",
            "links": [{"description": "Google developers console API activation", "url": page}],
        }
        metadata = {"service": service, "consumer": f"projects/{self.project_number}"}
        info = error_info("SERVICE_DISABLED", "googleapis.com", metadata)
        raise ApiError("PERMISSION_DENIED", message, details=(help_link, info), legacy=False)

    def require_permission(self, service: str, permission: str, resource: str, project: str) -> None:
        """403, in the words of the API that is called, if the caller is denied or the project is not ours."""
        if permission not in self.denied_permissions and (project == "-" or self.is_own_project(project)):
            return
        raise _denial(service, permission, resource)


def _denial(service: str, permission: str, resource: str) -> ApiError:
    metadata = {"permission": permission, "resource": resource}
    if service == "container.googleapis.com":
        # GKE names the permission in the text only; its detail is a RequestInfo.
        request = {"@type": "type.googleapis.com/google.rpc.RequestInfo", "requestId": "0x5c7f9d2b1e3a4f60"}
        return ApiError(
            "PERMISSION_DENIED", f'Required "{permission}" permission(s) for "{resource}".', details=(request,)
        )
    if service == "compute.googleapis.com":
        return ApiError("PERMISSION_DENIED", f"Required '{permission}' permission for '{resource}'")
    if service == "cloudbilling.googleapis.com":
        return ApiError("PERMISSION_DENIED", "The caller does not have permission", legacy=False)
    if service == "serviceusage.googleapis.com":
        verb = permission.rpartition(".")[2]
        name = resource.rpartition("/")[2]
        info = error_info("AUTH_PERMISSION_DENIED", service, metadata | {"service": service})
        return ApiError(
            "PERMISSION_DENIED", f"Permission denied to {verb} service [{name}]", details=(info,), legacy=False
        )
    if service == "iam.googleapis.com":
        info = error_info("IAM_PERMISSION_DENIED", service, {"permission": permission})
        return ApiError(
            "PERMISSION_DENIED", f"Permission '{permission}' denied on resource (or it may not exist).", details=(info,)
        )
    info = error_info("IAM_PERMISSION_DENIED", service, metadata)
    message = f"Permission '{permission}' denied on resource '//{service}/{resource}' (or it may not exist)."
    return ApiError("PERMISSION_DENIED", message, details=(info,), legacy=False)


_VERBS = {
    "container.clusters": "create connect delete get list update getCredentials",
    "container.operations": "get list",
    "container.namespaces": "create delete get list update",
    "container.deployments": "create delete get list update",
    "container.services": "create delete get list update",
    "container.secrets": "create delete get list update",
    "container.serviceAccounts": "create delete get list update",
    "container.pods": "create delete get getLogs list portForward update",
    "container.thirdPartyObjects": "create delete get list update",
    "iam.serviceAccounts": "actAs create delete get getAccessToken getIamPolicy list setIamPolicy update",
    "resourcemanager.projects": "get getIamPolicy setIamPolicy update",
    "serviceusage.services": "disable enable get list use",
    "serviceusage.quotas": "get update",
    "storage.buckets": "create delete get getIamPolicy list setIamPolicy update",
    "storage.objects": "create delete get list update",
    "storage.multipartUploads": "abort create list listParts",
    "compute.regions": "get list",
    "compute.zones": "get list",
    "compute.acceleratorTypes": "get list",
    "compute.machineTypes": "get list",
    "compute.disks": "create delete get list",
    "compute.instances": "create delete get list",
    "gkerecommender.locations": "generateOptimizedManifest",
    "billing.resourceAssociations": "create delete list",
}
KNOWN_PERMISSIONS = frozenset(f"{group}.{verb}" for group, verbs in _VERBS.items() for verb in verbs.split())
"""Enough of IAM's catalogue to refuse a misspelt permission, as testIamPermissions does."""


def tested_permissions(permissions: Collection[str], denied: Collection[str]) -> Json:
    """The answer of testIamPermissions: those of `permissions` that the caller has; 400 for one that does not exist."""
    for permission in permissions:
        if "*" in permission:
            raise ApiError(
                "INVALID_ARGUMENT", "Permission names may not contain wildcards ('*'): " + permission, legacy=False
            )
        if permission not in KNOWN_PERMISSIONS:
            raise ApiError("INVALID_ARGUMENT", f"Permission {permission} is not valid for this resource.", legacy=False)
    granted = [permission for permission in permissions if permission not in denied]
    return {"permissions": granted} if granted else {}
