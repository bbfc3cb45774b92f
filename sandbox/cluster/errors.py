"""The API server's error answers: a `Status` object with the reason, the message and the details of a real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """One entry of a Status' `details.causes`."""

    reason: str
    message: str
    field: str

    def as_dict(self) -> dict[str, str]:
        return {"reason": self.reason, "message": self.message, "field": self.field}


class ApiError(Exception):
    """An answer that is not a success; `status()` is its body."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def status(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
        }
        if self.reason:
            body["reason"] = self.reason
        if self.details is not None:
            body["details"] = self.details
        return body | {"code": self.code}


def _target(group: str, resource: str, name: str) -> dict[str, Any]:
    return {"name": name} | ({"group": group} if group else {}) | {"kind": resource}


def qualified(group: str, resource: str) -> str:
    """`deployments.apps`, and plain `pods` for the core group."""
    return f"{resource}.{group}" if group else resource


def not_found(group: str, resource: str, name: str) -> ApiError:
    message = f'{qualified(group, resource)} "{name}" not found'
    return ApiError(404, "NotFound", message, _target(group, resource, name))


def already_exists(group: str, resource: str, name: str) -> ApiError:
    message = f'{qualified(group, resource)} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, _target(group, resource, name))


def conflict(group: str, resource: str, name: str, why: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {qualified(group, resource)} "{name}": {why}'
    return ApiError(409, "Conflict", message, _target(group, resource, name))


def stale(group: str, resource: str, name: str) -> ApiError:
    """An update whose resourceVersion is not the newest."""
    why = "the object has been modified; please apply your changes to the latest version and try again"
    return conflict(group, resource, name, why)


def invalid(group: str, kind: str, name: str, causes: list[Cause]) -> ApiError:
    """422: every broken rule as a cause, and all of them in the message."""
    rules = [f"{cause.field}: {cause.message}" for cause in causes]
    listed = rules[0] if len(rules) == 1 else f"[{', '.join(rules)}]"
    full_kind = f"{kind}.{group}" if group else kind
    details: dict[str, Any] = ({"name": name} if name else {}) | ({"group": group} if group else {}) | {"kind": kind}
    details["causes"] = [cause.as_dict() for cause in causes]
    return ApiError(422, "Invalid", f'{full_kind} "{name}" is invalid: {listed}', details)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})


def unsupported_media_type(offered: str, supported: tuple[str, ...]) -> ApiError:
    message = f"the body of the request was in an unknown format - accepted media types include: {', '.join(supported)}"
    if offered == "":
        message = "the body of the request had no content type"
    return ApiError(415, "UnsupportedMediaType", message, {})


def gone(message: str) -> ApiError:
    """410: the history before this resourceVersion has been compacted away."""
    return ApiError(410, "Expired", message)


def namespace_terminating(group: str, resource: str, name: str, namespace: str) -> ApiError:
    message = (
        f'{qualified(group, resource)} "{name}" is forbidden: unable to create new content in namespace '
        f"{namespace} because it is being terminated"
    )
    cause = Cause("NamespaceTerminating", f"namespace {namespace} is being terminated", "metadata.namespace")
    return ApiError(403, "Forbidden", message, _target(group, resource, name) | {"causes": [cause.as_dict()]})


def denied(group: str, resource: str, name: str, why: str) -> ApiError:
    """403 by admission: a webhook speaks for itself, the API server's own plugins say what is forbidden."""
    own_words = why.startswith("admission webhook")
    message = why if own_words else f'{qualified(group, resource)} "{name}" is forbidden: {why}'
    return ApiError(403, "Forbidden", message, _target(group, resource, name))


def apply_conflict(message: str, causes: list[Cause]) -> ApiError:
    return ApiError(409, "Conflict", message, {"causes": [cause.as_dict() for cause in causes]})


def required(field: str, note: str = "") -> Cause:
    return Cause("FieldValueRequired", f"Required value: {note}" if note else "Required value", field)


def invalid_value(field: str, shown: str, why: str) -> Cause:
    """`shown` is the offending value as Go prints it: strings quoted, objects as JSON."""
    return Cause("FieldValueInvalid", f"Invalid value: {shown}: {why}", field)


def not_supported(field: str, value: str, supported: tuple[str, ...]) -> Cause:
    listed = ", ".join(f'"{each}"' for each in supported)
    return Cause("FieldValueNotSupported", f'Unsupported value: "{value}": supported values: {listed}', field)
