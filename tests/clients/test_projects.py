"""The project: number, permissions, APIs, billing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rollout.clients.projects import Project, Projects
from rollout.errors import ApiDisabled, BadInput, PermissionMissing
from rollout.preflight import required_permissions
from rollout.report import Action
from rollout.target import Target
from sandbox.google_apis import GoogleApisServer


def test_a_project_has_a_number(google_target: Target) -> None:
    assert Projects(google_target).get() == Project(
        project_id="rehearsal-project", number="123456789012", is_active=True
    )


def test_a_domain_scoped_project_is_found_too(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target]
) -> None:
    server = serve_google_apis(project="example.com:my-project")

    assert Projects(target_for(server, project="example.com:my-project")).get().number == "123456789012"


def test_somebody_elses_project_is_a_missing_permission(
    google_apis: GoogleApisServer, target_for: Callable[..., Target]
) -> None:
    with pytest.raises(PermissionMissing, match=r"resourcemanager\.projects\.get"):
        Projects(target_for(google_apis, project="somebody-elses")).get()


def test_only_the_permissions_that_the_caller_has_are_granted(
    google_target: Target, google_apis: GoogleApisServer
) -> None:
    wanted = set(required_permissions(google_target, creates_bucket=True, creates_cluster=True, updates_cluster=True))
    google_apis.deny("container.clusters.create")

    assert Projects(google_target).granted_permissions(wanted) == wanted - {"container.clusters.create"}


def test_more_permissions_than_one_request_takes_are_asked_in_turns(
    google_target: Target, google_apis: GoogleApisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollout.clients.projects.PERMISSIONS_PER_REQUEST", 2)
    wanted = {f"storage.buckets.{verb}" for verb in ("create", "delete", "get", "list", "update")}

    assert Projects(google_target).granted_permissions(wanted) == wanted
    asked = [record for record in google_apis.requests.snapshot() if record.path.endswith(":testIamPermissions")]
    assert len(asked) == 3


def test_a_misspelt_permission_is_bad_input(google_target: Target) -> None:
    with pytest.raises(BadInput, match=r"container\.cluster\.get is not valid"):
        Projects(google_target).granted_permissions(["container.cluster.get"])


def test_missing_apis_are_enabled_and_named_once(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target]
) -> None:
    projects = Projects(target_for(serve_google_apis(enabled_services=["serviceusage.googleapis.com"])))
    wanted = ["container.googleapis.com", "serviceusage.googleapis.com", "storage.googleapis.com"]

    enabled, again = projects.enable_services(wanted), projects.enable_services(wanted)

    assert [(change.action, change.name) for change in enabled] == [
        (Action.CREATED, "container.googleapis.com"),
        (Action.CREATED, "storage.googleapis.com"),
    ]
    assert again == ()
    assert projects.enabled_services() == set(wanted)


def test_an_api_that_is_not_enabled_comes_with_the_command_that_enables_it(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target]
) -> None:
    projects = Projects(target_for(serve_google_apis(enabled_services=[])))

    with pytest.raises(ApiDisabled, match=r"gcloud services enable cloudresourcemanager\.googleapis\.com"):
        projects.get()


@pytest.mark.parametrize("enabled", [True, False])
def test_billing_is_on_or_off(
    serve_google_apis: Callable[..., GoogleApisServer], target_for: Callable[..., Target], *, enabled: bool
) -> None:
    assert Projects(target_for(serve_google_apis(billing_enabled=enabled))).billing_enabled() is enabled
