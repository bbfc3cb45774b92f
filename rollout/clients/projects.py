"""The project itself: its number, what the caller may do in it, which APIs are enabled, whether billing is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from google.cloud import resourcemanager_v3, service_usage_v1

from rollout.clients.google_auth import RestApi, client_options, credentials_for, google_errors
from rollout.errors import DeadlineExceeded
from rollout.report import Action, Change
from rollout.target import Target
from rollout.values import Value

PERMISSIONS_PER_REQUEST = 100
"""The limit of testIamPermissions."""
SERVICES_PER_REQUEST = 20
"""The limit of services:batchEnable."""
ENABLE_TIMEOUT_S = 300.0
"""Enabling takes seconds to a minute; five times that."""


class Project(Value):
    """A Google Cloud project."""

    project_id: str
    number: str
    is_active: bool


class Projects:
    """What a target's project is, has and allows."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._credentials = credentials_for(target)
        self._resource = f"projects/{target.project}"

    def get(self) -> Project:
        """The project; `PermissionMissing` also if it does not exist, because Google does not tell."""
        with google_errors(self._resource):
            found = self._resource_manager().get_project(name=self._resource)
        return Project(
            project_id=found.project_id,
            number=found.name.rpartition("/")[2],
            is_active=found.state == resourcemanager_v3.Project.State.ACTIVE,
        )

    def granted_permissions(self, permissions: Iterable[str]) -> frozenset[str]:
        """Those of `permissions` that the caller has on the project; `BadInput` if one does not exist."""
        client = self._resource_manager()
        granted: set[str] = set()
        for batch in _batches(sorted(set(permissions)), PERMISSIONS_PER_REQUEST):
            with google_errors(self._resource):
                answer = client.test_iam_permissions(resource=self._resource, permissions=batch)
            granted.update(answer.permissions)
        return frozenset(granted)

    def enabled_services(self) -> frozenset[str]:
        """The enabled APIs, e.g. `container.googleapis.com`."""
        request = {"parent": self._resource, "filter": "state:ENABLED", "page_size": 200}
        with google_errors(self._resource):
            services = list(self._service_usage().list_services(request=request))
        return frozenset(service.name.rpartition("/")[2] for service in services)

    def enable_services(self, services: Iterable[str], *, timeout_s: float = ENABLE_TIMEOUT_S) -> tuple[Change, ...]:
        """Enable what is not enabled yet, and wait until it is; the answer names what was enabled."""
        missing = sorted(set(services) - self.enabled_services())
        client = self._service_usage()
        for batch in _batches(missing, SERVICES_PER_REQUEST):
            request = {"parent": self._resource, "service_ids": batch}
            with google_errors(self._resource):
                operation = client.batch_enable_services(request=request)
                try:
                    operation.result(timeout=timeout_s)
                except TimeoutError as error:
                    raise DeadlineExceeded(
                        f"{', '.join(batch)} not enabled after {timeout_s:.0f} s.",
                        where=self._resource,
                        resolution="Run again: enabling goes on by itself.",
                    ) from error
        return tuple(Change(action=Action.CREATED, kind="EnabledService", name=name) for name in missing)

    def billing_enabled(self) -> bool:
        """Whether the project pays; `PermissionMissing` if the caller may not know."""
        answer = RestApi(self._target, "cloudbilling").get(f"/v1/{self._resource}/billingInfo")
        return bool(answer.get("billingEnabled", False))

    def _resource_manager(self) -> resourcemanager_v3.ProjectsClient:
        return resourcemanager_v3.ProjectsClient(
            credentials=self._credentials,
            client_options=client_options(self._target, "cloudresourcemanager"),
            transport="rest",
        )

    def _service_usage(self) -> service_usage_v1.ServiceUsageClient:
        return service_usage_v1.ServiceUsageClient(
            credentials=self._credentials,
            client_options=client_options(self._target, "serviceusage"),
            transport="rest",
        )


def _batches(items: list[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
