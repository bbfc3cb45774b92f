"""Credentials of a target, and the one table of what Google's refusals mean to us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from google.auth.credentials import AnonymousCredentials

from rollout import errors
from rollout.clients.google_auth import access_token, credentials_for, error_of_response, target_of_bucket
from rollout.clients.projects import Projects
from rollout.target import CredentialSource, Target
from rollout.universe import Universe
from sandbox.faults import FaultRule, Reply
from sandbox.google_apis import GoogleApisServer

SERVICE_DISABLED = {
    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
    "reason": "SERVICE_DISABLED",
    "domain": "googleapis.com",
    "metadata": {"service": "container.googleapis.com", "consumer": "projects/123"},
}
DENIED = {
    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
    "reason": "IAM_PERMISSION_DENIED",
    "domain": "iam.googleapis.com",
    "metadata": {"permission": "iam.serviceAccounts.create"},
}
REFUSALS = [
    (429, "Quota exceeded for requests", (), errors.TransientError, "worth another try"),
    (503, "The service is currently unavailable.", (), errors.TransientError, "503"),
    (409, "There were concurrent policy changes. Please retry…", (), errors.ConcurrentChange, "Read it again"),
    (412, "At least one of the pre-conditions you specified did not hold.", (), errors.ConcurrentChange, "conditions"),
    (409, "Already exists: projects/p/locations/l/clusters/c.", (), errors.AlreadyExists, "Already exists"),
    (404, "Unknown service account", (), errors.NotFound, "Unknown service account"),
    (401, "Request had invalid authentication credentials.", (), errors.BadInput, "gcloud auth"),
    (400, "Identity Pool does not exist (p.svc.id.goog).", (), errors.TransientError, "first cluster"),
    (400, "Service account new@p.iam.gserviceaccount.com does not exist.", (), errors.TransientError, "after a minute"),
    (400, "Operation o is currently creating cluster c. Please wait and try again once it is done.", (),
     errors.TransientError, "still running"),
    (400, "Invalid JSON payload received.", (), errors.BadInput, "Invalid JSON"),
    (403, "Kubernetes Engine API has not been used in project 123 before", (SERVICE_DISABLED,), errors.ApiDisabled,
     "gcloud services enable container.googleapis.com --project=123"),
    (403, "Permission 'iam.serviceAccounts.create' denied on resource (or it may not exist).", (DENIED,),
     errors.PermissionMissing, "holds iam.serviceAccounts.create"),
    (403, 'Required "container.clusters.create" permission(s) for "projects/p".', (), errors.PermissionMissing,
     "holds container.clusters.create"),
    (403, "me@x.com does not have storage.objects.get access to the Google Cloud Storage object.", (),
     errors.PermissionMissing, "holds storage.objects.get"),
    (403, "The caller does not have permission", (), errors.PermissionMissing, "owner"),
    (403, "The recommender API requires a quota project, which is not set by default.", (), errors.PermissionMissing,
     "billing/quota_project"),
    (403, 'Insufficient regional quota to satisfy request: resource "NVIDIA_H100_GPUS"', (), errors.QuotaExceeded,
     "NVIDIA_H100_GPUS"),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "details", "kind", "said"), REFUSALS)
def test_a_refusal_becomes_our_error_with_what_to_do(
    status: int, message: str, details: tuple[object, ...], kind: type[errors.RolloutError], said: str
) -> None:
    response = requests.Response()
    response.status_code = status
    response._content = json.dumps({"error": {"code": status, "message": message, "details": details}}).encode()

    error = error_of_response(response, "somewhere")

    assert (type(error), error.where) == (kind, "somewhere")
    assert said in str(error)


def test_a_refusal_that_is_not_json_is_told_as_it_is() -> None:
    response = requests.Response()
    response.status_code = 404
    response._content = b"<html>That is an error.</html>"

    assert "That is an error." in str(error_of_response(response, "somewhere"))


def test_the_servers_wish_to_wait_is_kept() -> None:
    response = requests.Response()
    response.status_code = 429
    response.headers["Retry-After"] = "7"
    response._content = b"{}"

    error = error_of_response(response, "somewhere")

    assert isinstance(error, errors.TransientError)
    assert error.retry_after_s == 7.0


def test_the_embedded_cloud_needs_no_credentials(google_target: Target) -> None:
    assert isinstance(credentials_for(google_target), AnonymousCredentials)
    assert access_token(google_target) is None


def test_credentials_of_another_universe_are_refused_before_any_request(
    google_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    (tmp_path / "adc.json").write_text(json.dumps(user))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))
    target = google_target.model_copy(update={"credentials": CredentialSource.APPLICATION_DEFAULT})

    with pytest.raises(errors.UniverseMismatch, match=r"belong to googleapis\.com, the target to s3nsapis\.fr"):
        credentials_for(target)


def test_credentials_of_the_targets_universe_carry_the_quota_project(
    google_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    (tmp_path / "adc.json").write_text(json.dumps(user | {"universe_domain": "s3nsapis.fr"}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))
    target = google_target.model_copy(update={"credentials": CredentialSource.APPLICATION_DEFAULT})

    assert credentials_for(target).quota_project_id == "rehearsal-project"


def test_missing_credentials_say_how_to_log_in(
    google_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    target = google_target.model_copy(update={"credentials": CredentialSource.APPLICATION_DEFAULT})

    with pytest.raises(errors.BadInput, match="gcloud auth application-default login"):
        credentials_for(target)


def test_a_bucket_alone_is_looked_at_under_the_project_of_the_default_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    user |= {"universe_domain": "s3nsapis.fr", "quota_project_id": "my-project"}
    (tmp_path / "adc.json").write_text(json.dumps(user))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))

    target = target_of_bucket("weights", Universe(domain="s3nsapis.fr"))

    assert (target.bucket, target.project, target.endpoint("storage")) == (
        "weights",
        "my-project",
        "https://storage.s3nsapis.fr",
    )
    assert credentials_for(target).quota_project_id == "my-project"
    with pytest.raises(errors.UniverseMismatch, match=r"belong to s3nsapis\.fr, the target to googleapis\.com"):
        credentials_for(target_of_bucket("weights", Universe()))


def test_a_bucket_alone_needs_credentials_that_name_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    user = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    (tmp_path / "adc.json").write_text(json.dumps(user))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "adc.json"))
    with pytest.raises(errors.BadInput, match="set-quota-project"):
        target_of_bucket("weights", Universe())
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(errors.BadInput, match="gcloud auth application-default login"):
        target_of_bucket("weights", Universe())


def test_an_unreachable_api_is_transient(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.stop()

    with pytest.raises(errors.TransientError):
        Projects(google_target).billing_enabled()


def test_an_outage_is_transient(google_target: Target, google_apis: GoogleApisServer) -> None:
    google_apis.faults.add(FaultRule(fault=Reply(status=503, retry_after_s=3), path="billingInfo"))

    with pytest.raises(errors.TransientError) as caught:
        Projects(google_target).billing_enabled()

    assert caught.value.retry_after_s == 3


def test_no_vendor_exception_leaks(google_apis: GoogleApisServer, target_for: Callable[..., Target]) -> None:
    google_apis.deny("resourcemanager.projects.get")

    with pytest.raises(errors.PermissionMissing, match=r"resourcemanager\.projects\.get"):
        Projects(target_for(google_apis)).get()
