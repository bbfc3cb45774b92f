"""Credentials, addresses and errors of Google's APIs for a target: the one place where vendor exceptions become ours.

Most official clients do not compare the credentials' universe with the one they call (storage does), so it is compared
here. Anonymous credentials belong to the embedded cloud and carry no universe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import google.auth
import requests
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import GoogleAPICallError, RetryError
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError
from google.auth.transport.requests import AuthorizedSession, Request

from rollout.clients.retrying import TRANSIENT_STATUSES, transient
from rollout.diagnosis import Category, diagnose_client_error
from rollout.errors import (
    AlreadyExists,
    ApiDisabled,
    BadInput,
    ConcurrentChange,
    NotFound,
    PermissionMissing,
    QuotaExceeded,
    RolloutError,
    TransientError,
    UniverseMismatch,
)
from rollout.target import CredentialSource, Target
from rollout.universe import Universe

CLOUD_PLATFORM_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
REQUEST_TIMEOUT_S = 60.0
"""One control-plane request: Google's own default in google-cloud-storage."""

LOGIN_HINT = "Run `gcloud auth application-default login`, or run where Workload Identity gives credentials."


def credentials_for(target: Target) -> Credentials:
    """The target's credentials; `UniverseMismatch` if they belong elsewhere, `BadInput` if there are none."""
    if target.credentials is CredentialSource.ANONYMOUS:
        anonymous: Credentials = AnonymousCredentials()
        return anonymous
    try:
        credentials, _ = google.auth.default(scopes=[CLOUD_PLATFORM_SCOPE], quota_project_id=target.project)
    except DefaultCredentialsError as error:
        raise BadInput("no Google credentials were found.", where=target.name, resolution=LOGIN_HINT) from error
    found: Credentials = credentials
    if found.universe_domain != target.universe.domain:
        raise UniverseMismatch(
            f"the credentials belong to {found.universe_domain}, the target to {target.universe.domain}.",
            where=target.name,
            resolution=f"Log in to {target.universe.domain} "
            "(`gcloud config set core/universe_domain`), or change the target.",
        )
    return found


def target_of_bucket(bucket: str, universe: Universe) -> Target:
    """A target that is a bucket and nothing else, under the project of the Application Default Credentials: to look.

    Raises:
        BadInput: there are no credentials, or they name no project.
    """
    try:
        credentials, found = google.auth.default(scopes=[CLOUD_PLATFORM_SCOPE])
    except DefaultCredentialsError as error:
        raise BadInput("no Google credentials were found.", where=f"gs://{bucket}", resolution=LOGIN_HINT) from error
    project = credentials.quota_project_id or found
    if not project:
        raise BadInput(
            "the credentials name no project.",
            where=f"gs://{bucket}",
            resolution="Run `gcloud auth application-default set-quota-project PROJECT`, or give --target.",
        )
    return Target(name="bucket-only", project=project, region="none", universe=universe, bucket=bucket)


def client_options(target: Target, service: str) -> ClientOptions:
    """Options of an official client that talks to `service` (`container`, `storage`, …) of the target."""
    if target.credentials is CredentialSource.ANONYMOUS:
        return ClientOptions(api_endpoint=target.endpoint(service))
    return ClientOptions(
        api_endpoint=target.endpoint(service),
        universe_domain=target.universe.domain,
        quota_project_id=target.project,
    )


def access_token(target: Target) -> str | None:
    """A fresh OAuth token, as GKE's API servers accept it; None with anonymous credentials."""
    credentials = credentials_for(target)
    if isinstance(credentials, AnonymousCredentials):
        return None
    with google_errors(target.name):
        credentials.refresh(Request())
    token: str | None = credentials.token
    return token


class RestApi:
    """A Google API without an official REST client, e.g. IAM v1: JSON in, JSON out, our errors."""

    def __init__(self, target: Target, service: str) -> None:
        self._base = target.endpoint(service)
        self._session = AuthorizedSession(credentials_for(target))

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._send("GET", path, query or {}, None)

    def post(
        self, path: str, body: Mapping[str, Any] | None = None, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        return self._send("POST", path, query or {}, body or {})

    def delete(self, path: str) -> dict[str, Any]:
        return self._send("DELETE", path, {}, None)

    def _send(self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None) -> dict[str, Any]:
        with google_errors(path):
            response = self._session.request(
                method, f"{self._base}{path}", params=query, json=body, timeout=REQUEST_TIMEOUT_S
            )
            if not response.ok:
                raise error_of_response(response, path)
            answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def google_errors(where: str) -> Iterator[None]:
    """Turn the exceptions of Google's clients and of requests into ours; `where` names what was asked."""
    try:
        yield
    except GoogleAPICallError as error:
        if isinstance(error.response, requests.Response):
            raise error_of_response(error.response, where) from error
        raise _classify(int(error.code or 0), error.message or str(error), (), where) from error
    except RefreshError as error:
        problem = f"the Google credentials are not accepted: {error}"
        if error.retryable:
            raise TransientError(problem, where=where, resolution="It is worth another try.") from error
        raise BadInput(problem, where=where, resolution=LOGIN_HINT) from error
    except (TransportError, RetryError, requests.ConnectionError, requests.Timeout) as error:
        raise TransientError(
            f"no answer: {error}", where=where, resolution="Check the network and the endpoint."
        ) from error
    except (GoogleAuthError, requests.RequestException) as error:
        raise RolloutError(str(error), where=where) from error


def error_of_response(response: requests.Response, where: str) -> RolloutError:
    """The error that a refused request stands for."""
    message, details = response.text[:500], ()
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        message = body["error"].get("message", message)
        details = tuple(body["error"].get("details", ()))
    return _classify(response.status_code, message, details, where, response.headers.get("Retry-After"))


_UNKNOWN_MEMBER = re.compile(r"[Ss]ervice account \S+ does not exist")
"""How setIamPolicy refuses a member that IAM's own read already shows."""


def _classify(
    status: int, message: str, details: tuple[Mapping[str, Any], ...], where: str, retry_after: str | None = None
) -> RolloutError:
    info = next((detail for detail in details if detail.get("@type", "").endswith("ErrorInfo")), {})
    reason = info.get("reason", "")
    if status in TRANSIENT_STATUSES:
        return transient(
            f"{status}: {message}", where=where, resolution="It is worth another try.", retry_after=retry_after
        )
    if status == 412 or (status == 409 and "concurrent" in message.lower()):
        return ConcurrentChange(message, where=where, resolution="Read it again, then write it again.")
    if reason == "CLUSTER_ALREADY_HAS_OPERATION" or "try again once it is done" in message:
        return TransientError(message, where=where, resolution="Another operation on the cluster is still running.")
    if "Identity Pool does not exist" in message:
        return TransientError(
            message,
            where=where,
            resolution="GKE makes the project's workload pool with its first cluster: wait until a cluster runs.",
        )
    if _UNKNOWN_MEMBER.search(message):
        return TransientError(
            message, where=where, resolution="A new service account is known everywhere only after a minute or so."
        )
    if status == 409:
        return AlreadyExists(message, where=where)
    if status == 404:
        return NotFound(message, where=where)
    if status == 401:
        return BadInput(message, where=where, resolution=LOGIN_HINT)
    if status == 403:
        return _classify_denial(message, info, where)
    return BadInput(message, where=where, resolution="The request cannot work as it is.")


_PERMISSION = re.compile(r"['\"](?P<permission>[a-zA-Z]+\.[a-zA-Z]+\.[a-zA-Z]+)['\"]|(?P<bare>\w+\.\w+\.\w+) access to")


def _classify_denial(message: str, info: Mapping[str, Any], where: str) -> RolloutError:
    metadata = info.get("metadata", {})
    # First: Google gives a missing quota project the reason SERVICE_DISABLED too, and names a project of its own.
    known = diagnose_client_error(f"PERMISSION_DENIED: {message}")
    if known and known.category is Category.QUOTA_PROJECT:
        return PermissionMissing(message, where=where, resolution=known.resolution)
    if info.get("reason") == "SERVICE_DISABLED":
        service = metadata.get("service", "the API")
        project = metadata.get("consumer", "projects/PROJECT").rpartition("/")[2]
        return ApiDisabled(
            f"{service} is not enabled in project {project}.",
            where=where,
            resolution=f"gcloud services enable {service} --project={project}",
        )
    if "nsufficient regional quota" in message or "uota exceeded" in message:
        return QuotaExceeded(
            message, where=where, resolution="Ask for more quota, or use a smaller or another machine."
        )
    match = _PERMISSION.search(message)
    named = (match["permission"] or match["bare"]) if match else None
    permission = metadata.get("permission") or named
    if permission is None:
        return PermissionMissing(message, where=where, resolution="Ask the project's owner for the missing role.")
    return PermissionMissing(
        f"the permission {permission} is missing: {message}",
        where=where,
        resolution=f"Ask for a role that holds {permission}.",
    )
