"""Google's REST conventions: routes, error bodies, strict JSON, and enums by name or by number.

Requests are parsed with the official protobuf schemas where the project's dependencies carry them, so an unknown field
is refused with the very message that Google gives, and answers are serialised from the same schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn

from google.protobuf import json_format
from google.protobuf.message import Message

Json = dict[str, Any]

JSON_CONTENT_TYPE = "application/json; charset=UTF-8"
SERVER_HEADERS = {
    "Server": "ESF",
    "Vary": "Origin, X-Origin, Referer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Xss-Protection": "0",
}

SYSTEM_PARAMETERS = frozenset({"alt", "$alt", "prettyPrint", "$prettyPrint", "key", "quotaUser", "$.xgafv"})
"""Query parameters that every Google API takes; `fields` (partial answers) is not simulated and refused."""

_CANONICAL = {
    "INVALID_ARGUMENT": HTTPStatus.BAD_REQUEST,
    "FAILED_PRECONDITION": HTTPStatus.BAD_REQUEST,
    "PERMISSION_DENIED": HTTPStatus.FORBIDDEN,
    "NOT_FOUND": HTTPStatus.NOT_FOUND,
    "ALREADY_EXISTS": HTTPStatus.CONFLICT,
    "ABORTED": HTTPStatus.CONFLICT,
    "RESOURCE_EXHAUSTED": HTTPStatus.TOO_MANY_REQUESTS,
    "INTERNAL": HTTPStatus.INTERNAL_SERVER_ERROR,
    "UNIMPLEMENTED": HTTPStatus.NOT_IMPLEMENTED,
    "UNAVAILABLE": HTTPStatus.SERVICE_UNAVAILABLE,
    "DEADLINE_EXCEEDED": HTTPStatus.GATEWAY_TIMEOUT,
}
_OUTAGES = {
    429: ("RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Requests' and limit 'Requests per minute'."),
    500: ("INTERNAL", "Internal error encountered."),
    503: ("UNAVAILABLE", "The service is currently unavailable."),
    504: ("DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
}

_LEGACY_REASONS = {
    "INVALID_ARGUMENT": "badRequest",
    "FAILED_PRECONDITION": "failedPrecondition",
    "PERMISSION_DENIED": "forbidden",
    "NOT_FOUND": "notFound",
    "ALREADY_EXISTS": "alreadyExists",
    "ABORTED": "aborted",
}


class ApiError(Exception):
    """An answer that is an error, in Google's shape: `{"error": {code, message, status, details[], errors[]}}`."""

    def __init__(self, status: str, message: str, *, details: tuple[Json, ...] = (), legacy: bool = True) -> None:
        """`legacy` adds the older `errors[]` list, which IAM, GKE and Compute send and Resource Manager does not."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.details = details
        self.legacy = legacy

    @property
    def code(self) -> int:
        return int(_CANONICAL[self.status])

    def body(self) -> Json:
        error: Json = {"code": self.code, "message": self.message, "status": self.status}
        if self.legacy and self.status in _LEGACY_REASONS:
            reason = _LEGACY_REASONS[self.status]
            error["errors"] = [{"message": self.message, "domain": "global", "reason": reason}]
        if self.details:
            error["details"] = list(self.details)
        return {"error": error}


def outage(http_status: int) -> ApiError:
    """What Google answers when it cannot answer: 429, 500, 503 or 504 (any other status becomes 503)."""
    status, message = _OUTAGES.get(http_status, _OUTAGES[503])
    return ApiError(status, message, legacy=False)


def error_info(reason: str, domain: str, metadata: Mapping[str, str]) -> Json:
    """A google.rpc.ErrorInfo detail."""
    return {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": domain,
        "metadata": dict(metadata),
    }


def bad_request(field_path: str, description: str, *, message: str | None = None) -> ApiError:
    """400 with a google.rpc.BadRequest detail that names the field."""
    violation = {"description": description}
    if field_path:
        violation["field"] = field_path
    detail = {"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [violation]}
    return ApiError("INVALID_ARGUMENT", message or description, details=(detail,), legacy=False)


def not_simulated(what: str) -> ApiError:
    """501: the real API does this, the stand-in does not, and it says so instead of pretending."""
    return ApiError("UNIMPLEMENTED", f"The embedded cloud does not simulate {what}.")


@dataclass(frozen=True)
class Call:
    """One request that passed routing: path parameters, query and the JSON body."""

    params: Mapping[str, str]
    query: Mapping[str, str] = field(default_factory=dict)
    body: Json = field(default_factory=dict)

    def parse(self, message: Any) -> Any:
        """The body as the protobuf `message`, which is filled and returned; 400 for what its schema does not hold."""
        return parse_message(self.body, message)


Handler = Callable[[Call], Json | Message]


@dataclass(frozen=True)
class Route:
    """`POST /v1/projects/{project}/serviceAccounts` and what must hold before its handler runs."""

    method: str
    template: str
    service: str
    """The API that must be enabled, e.g. `iam.googleapis.com`."""
    permission: str | None
    """What the caller needs; None for calls that need none (e.g. testIamPermissions)."""
    handler: Handler
    query: frozenset[str] = frozenset()
    resource: str = "projects/{project}"
    """What the permission is checked on."""

    def pattern(self) -> re.Pattern[str]:
        return re.compile(_PARAMETER.sub(_parameter_pattern, self.template))


_PARAMETER = re.compile(r"\{(\w+)\}")


def _parameter_pattern(match: re.Match[str]) -> str:
    # Only a project ID may hold a colon (`example.com:proj`); elsewhere the colon starts a custom verb.
    inner = r"(?:[^/:]+\.[^/:]+:)?[^/:]+" if match[1] == "project" else r"[^/:]+"
    return f"(?P<{match[1]}>{inner})"


_UNKNOWN_FIELD = re.compile(r'has no field named "(?P<name>[^"]*)" at "(?P<path>[^"]*)"')
_BAD_ENUM = re.compile(r"Invalid enum value (?P<value>\S+) for enum type (?P<type>\S+) at (?P<path>\S+?)\.*$")


def parse_message(body: object, message: Message) -> Any:
    """`body` as `message` (which is filled and returned); refused like Google's JSON parser refuses."""
    if not isinstance(body, dict):
        raise bad_request("", "Invalid JSON payload received. Root element must be a message.")
    try:
        return json_format.ParseDict(body, message)
    except json_format.ParseError as error:
        _refuse_json(str(error))


def _refuse_json(problem: str) -> NoReturn:
    if unknown := _UNKNOWN_FIELD.search(problem):
        path = _field_path(unknown["path"])
        raise unknown_field(unknown["name"], path)
    if enum := _BAD_ENUM.search(problem):
        path = _field_path(enum["path"])
        text = f"Invalid value at '{path}' (type.googleapis.com/{enum['type']}), \"{enum['value']}\""
        raise bad_request(path, text)
    raise bad_request("", f"Invalid JSON payload received. {problem}")


def unknown_field(name: str, path: str = "") -> ApiError:
    """The 400 that Google answers to a field that the method does not have."""
    at = f" at '{path}'" if path else ""
    return bad_request(path, f'Invalid JSON payload received. Unknown name "{name}"{at}: Cannot find field.')


def _field_path(path: str) -> str:
    """`CreateClusterRequest.cluster.nodePools[0]` -> `cluster.node_pools[0]`: Google names the proto's fields."""
    _, _, below_root = path.partition(".")
    return re.sub(r"(?<=[a-z0-9])[A-Z]", lambda match: f"_{match[0].lower()}", below_root)


def only_fields(body: Mapping[str, Any], allowed: set[str], path: str = "") -> None:
    """Refuse unknown fields where no official schema is at hand."""
    for name in body:
        if name not in allowed:
            raise unknown_field(name, path)


def encode(answer: Json | Message, *, enums_as_numbers: bool) -> bytes:
    """JSON bytes of an answer; `$alt=json;enum-encoding=int` asks for numbers."""
    if isinstance(answer, Message):
        answer = json_format.MessageToDict(answer, use_integers_for_enums=enums_as_numbers)
    return json.dumps(answer, indent=2, ensure_ascii=False).encode() + b"\n"


def not_found_page(path: str) -> str:
    """What Google's front end answers to a path or method that no API has: HTML, not JSON."""
    return (
        "<!DOCTYPE html>\n<html lang=en>\n  <meta charset=utf-8>\n  <title>Error 404 (Not Found)!!1</title>\n"
        "  <p><b>404.</b> <ins>That’s an error.</ins>\n"
        f"  <p>The requested URL <code>{path}</code> was not found on this server.  <ins>That’s all we know.</ins>\n"
    )
