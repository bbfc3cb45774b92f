"""Which names, locations and settings a bucket may have, and which names an object may have.

Rules: https://cloud.google.com/storage/docs/buckets#naming and https://cloud.google.com/storage/docs/objects#naming.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from sandbox.storage.blobs import WRITABLE_PROPERTIES, now_rfc3339
from sandbox.storage.errors import StorageError, invalid, reading_document, unsupported

STORAGE_CLASSES = frozenset({"STANDARD", "NEARLINE", "COLDLINE", "ARCHIVE"})

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_MULTI_REGIONS = frozenset({"US", "EU", "ASIA"})
# europe-west4, and Cloud de Confiance's u-france-east1.
_REGION = re.compile(r"(U-)?[A-Z]+-[A-Z]+\d+")
_LABEL_KEY = re.compile(r"[\w-]{1,63}")
_LABEL_VALUE = re.compile(r"[\w-]{0,63}")
_LIFECYCLE_ACTIONS = frozenset({"Delete", "SetStorageClass", "AbortIncompleteMultipartUpload"})

_BUCKET_FIELDS = frozenset(
    {"location", "storageClass", "labels", "iamConfiguration", "softDeletePolicy", "lifecycle", "versioning", "rpo"}
)
_SERVICE_FIELDS = frozenset({"name", "kind", "id"})
SOFT_DELETE_DEFAULT_S = 604_800
"""7 days, which a new bucket has unless it says otherwise."""


def check_bucket_name(name: str) -> None:
    parts = name.split(".")
    wrong = (
        not _BUCKET_NAME.fullmatch(name)
        or any(not 1 <= len(part) <= 63 for part in parts)
        or any(part.startswith("-") or part.endswith("-") for part in parts)
        or name.startswith("goog")
        or "google" in name
        or _is_address(name)
    )
    if wrong:
        raise invalid(f"Invalid bucket name: '{name}'", code="InvalidBucketName")
    if len(parts) > 1:
        raise StorageError(
            403,
            "forbidden",
            f"Another user owns the domain {name} or a parent domain. You can either verify domain ownership at"
            f" https://search.google.com/search-console/welcome?new_domain_name={name} or find the current owner and"
            " ask that person to create the bucket for you",
            "AccessDenied",
        )


def check_object_name(name: str) -> None:
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise invalid("The specified object name is not valid UTF-8.", code="InvalidObjectName") from error
    if "\r" in name or "\n" in name:
        raise invalid(f"Disallowed unicode characters present in object name '{name}'", code="InvalidObjectName")
    if not 1 <= size <= 1024 or name in {".", ".."} or name.startswith(".well-known/acme-challenge/"):
        raise invalid("The specified object name is not valid.", code="InvalidObjectName")


@reading_document()
def new_bucket_resource(body: Mapping[str, Any], allowed_locations: frozenset[str] | None) -> dict[str, Any]:
    """The resource of a bucket to be made from `body`, with the service's defaults."""
    resource = {
        "location": "US",
        "storageClass": "STANDARD",
        "rpo": "DEFAULT",
        "iamConfiguration": {
            "bucketPolicyOnly": {"enabled": False},
            "uniformBucketLevelAccess": {"enabled": False},
            "publicAccessPrevention": "inherited",
        },
        "softDeletePolicy": {
            "retentionDurationSeconds": str(SOFT_DELETE_DEFAULT_S),
            "effectiveTime": now_rfc3339(),
        },
    }
    resource["location"] = _location(body.get("location", "US"), allowed_locations)
    resource["locationType"] = "multi-region" if resource["location"] in _MULTI_REGIONS else "region"
    return patched_bucket_resource(resource, {key: value for key, value in body.items() if key != "location"})


@reading_document()
def patched_bucket_resource(resource: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`resource` after a JSON merge patch, every part of which must be a setting that is kept here."""
    if unknown := set(patch) - _BUCKET_FIELDS - _SERVICE_FIELDS:
        raise unsupported(f"the bucket field {sorted(unknown)[0]!r}")
    result = dict(resource)
    for key, value in patch.items():
        match key:
            case "labels":
                result[key] = _labels(resource.get(key, {}), value)
            case "storageClass":
                result[key] = checked_storage_class(value)
            case "iamConfiguration":
                result[key] = _iam_configuration(resource[key], value)
            case "softDeletePolicy":
                result[key] = _soft_delete(value)
            case "lifecycle":
                result[key] = _lifecycle(value)
            case "versioning" if value and value.get("enabled"):
                raise unsupported("object versioning")
            case "versioning":
                result[key] = value
            case "rpo" if value != "DEFAULT":
                raise unsupported(f"the recovery point objective {value!r}")
            case "location" if str(value).upper() != resource["location"]:
                raise invalid("The location of a bucket cannot be changed.")
    return {key: value for key, value in result.items() if value not in (None, {})}


def checked_storage_class(value: object) -> str:
    if value not in STORAGE_CLASSES:
        raise invalid("Invalid argument: storageClass.", code="InvalidStorageClass")
    return str(value)


@reading_document()
def object_properties(body: Mapping[str, Any]) -> dict[str, Any]:
    """The properties that a client sets on an object; every other field of `body` must be one that it may state."""
    stated = {"name", "bucket", "crc32c", "md5Hash", "kind"}
    if unknown := set(body) - set(WRITABLE_PROPERTIES) - stated:
        raise unsupported(f"the object field {sorted(unknown)[0]!r}")
    if body.get("storageClass") is not None:
        checked_storage_class(body["storageClass"])
    metadata = body.get("metadata")
    if metadata is not None and not all(isinstance(value, str | None) for value in metadata.values()):
        raise invalid("Invalid value for metadata: values are strings.")
    return {key: body[key] for key in WRITABLE_PROPERTIES if key in body}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _location(value: object, allowed: frozenset[str] | None) -> str:
    location = str(value).upper()
    if location not in _MULTI_REGIONS and not _REGION.fullmatch(location):
        raise invalid("The specified location constraint is not valid.", code="InvalidLocationConstraint")
    if allowed is not None and location.lower() not in allowed:
        raise StorageError(
            412,
            "conditionNotMet",
            f"'{location.lower()}' violates constraint 'constraints/gcp.resourceLocations'",
            "OrganizationPolicyConstraintFailed",
        )
    return location


def _labels(current: Mapping[str, str], patch: Mapping[str, str | None] | None) -> dict[str, str]:
    if patch is None:
        return {}
    merged: dict[str, str | None] = {**current, **patch}
    labels = {key: value for key, value in merged.items() if value is not None}
    for key, value in labels.items():
        good = _LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value) and key[0].isalpha()
        if not good or key != key.lower() or value != value.lower():
            raise invalid(f"Invalid argument: label {key!r}={value!r}.")
    if len(labels) > 64:
        raise invalid("Invalid argument: a bucket has at most 64 labels.")
    return labels


def _iam_configuration(current: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := set(patch) - {"uniformBucketLevelAccess", "bucketPolicyOnly", "publicAccessPrevention"}:
        raise unsupported(f"the field {sorted(unknown)[0]!r} of iamConfiguration")
    result = dict(current)
    prevention = patch.get("publicAccessPrevention", current["publicAccessPrevention"])
    if prevention == "unspecified":
        prevention = "inherited"
    if prevention not in {"enforced", "inherited"}:
        raise invalid(f"Invalid value for publicAccessPrevention: {prevention!r}.")
    result["publicAccessPrevention"] = prevention
    # bucketPolicyOnly is the older name of the same switch.
    switch = patch.get("uniformBucketLevelAccess") or patch.get("bucketPolicyOnly")
    if switch is not None:
        enabled = bool(switch.get("enabled"))
        uniform: dict[str, Any] = {"enabled": enabled}
        if enabled:
            uniform["lockedTime"] = now_rfc3339()
        result["uniformBucketLevelAccess"] = uniform
        result["bucketPolicyOnly"] = dict(uniform)
    return result


def _soft_delete(policy: Mapping[str, Any] | None) -> dict[str, str]:
    seconds = int((policy or {}).get("retentionDurationSeconds", 0))
    if seconds != 0 and not SOFT_DELETE_DEFAULT_S <= seconds <= 90 * 86_400:
        raise invalid("Invalid argument: retentionDurationSeconds must be 0 or from 7 to 90 days.")
    return {"retentionDurationSeconds": str(seconds), "effectiveTime": now_rfc3339()}


def _lifecycle(lifecycle: Mapping[str, Any] | None) -> dict[str, Any]:
    rules = (lifecycle or {}).get("rule", [])
    for rule in rules:
        action, condition = rule.get("action", {}).get("type"), rule.get("condition")
        if action not in _LIFECYCLE_ACTIONS or not condition:
            raise invalid(f"Invalid argument: a lifecycle rule with action {action!r} and condition {condition!r}.")
    return {"rule": rules} if rules else {}
