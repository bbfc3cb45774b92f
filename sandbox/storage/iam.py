"""Who may do what with a bucket: the caller's identity, the roles of Cloud Storage and the bucket's policy.

Roles: https://cloud.google.com/storage/docs/access-control/iam-roles
(the roles for objects and buckets; none for folders and HMAC keys).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.storage.errors import StorageError, invalid, reading_document, unsupported

BEARER_PREFIX = "Bearer sandbox-identity:"

_OBJECT_READ = {"storage.objects.get", "storage.objects.list"}
_MULTIPART_WRITE = {
    "storage.multipartUploads.create",
    "storage.multipartUploads.abort",
    "storage.multipartUploads.listParts",
}
_MULTIPART = _MULTIPART_WRITE | {"storage.multipartUploads.list"}
_OBJECT_WRITE = {
    "storage.objects.create",
    "storage.objects.delete",
    "storage.objects.update",
    "storage.objects.move",
}
_OBJECT_IAM = {"storage.objects.getIamPolicy", "storage.objects.setIamPolicy"}
_BUCKET_IAM = {"storage.buckets.getIamPolicy", "storage.buckets.setIamPolicy"}
_BUCKET_ADMIN = _BUCKET_IAM | {"storage.buckets.get", "storage.buckets.update", "storage.buckets.delete"}

ROLES: Mapping[str, frozenset[str]] = {
    role: frozenset(permissions)
    for role, permissions in {
        "roles/storage.objectViewer": _OBJECT_READ,
        "roles/storage.objectCreator": {"storage.objects.create"} | _MULTIPART_WRITE,
        "roles/storage.objectUser": _OBJECT_READ | _OBJECT_WRITE | _MULTIPART,
        "roles/storage.objectAdmin": _OBJECT_READ | _OBJECT_WRITE | _OBJECT_IAM | _MULTIPART,
        "roles/storage.admin": _OBJECT_READ | _OBJECT_WRITE | _OBJECT_IAM | _MULTIPART | _BUCKET_ADMIN,
        "roles/storage.bucketViewer": {"storage.buckets.get"},
        "roles/storage.legacyBucketReader": {
            "storage.buckets.get",
            "storage.objects.list",
            "storage.multipartUploads.list",
        },
        "roles/storage.legacyBucketWriter": {
            "storage.buckets.get",
            "storage.objects.list",
            "storage.objects.create",
            "storage.objects.delete",
        }
        | _MULTIPART,
        "roles/storage.legacyBucketOwner": {
            "storage.buckets.get",
            "storage.buckets.update",
            "storage.objects.list",
            "storage.objects.create",
            "storage.objects.delete",
        }
        | _MULTIPART
        | _BUCKET_IAM,
        "roles/storage.legacyObjectReader": {"storage.objects.get"},
        "roles/storage.legacyObjectOwner": {"storage.objects.get", "storage.objects.update"} | _OBJECT_IAM,
    }.items()
}

PERMISSIONS = frozenset().union(*ROLES.values())

_MEMBER = re.compile(
    r"allUsers|allAuthenticatedUsers"
    r"|(user|serviceAccount|group):[^@\s]+@[^@\s]+"
    r"|serviceAccount:[a-z0-9.:-]+\.svc\.id\.goog\[[^/\s]+/[^\]\s]+\]"
    r"|domain:\S+"
    r"|project(Owner|Editor|Viewer):\S+"
    r"|principal(Set)?://\S+"
)
_PUBLIC = frozenset({"allUsers", "allAuthenticatedUsers"})
_PRINCIPAL = re.compile(r"principal://(?P<pool>.+)/subject/ns/(?P<namespace>[^/]+)/sa/(?P<account>[^/]+)")


@dataclass(frozen=True)
class Caller:
    """Who sent a request: a workload's IAM member, or (None) the operator, who owns all but foreign buckets."""

    member: str | None
    operator_email: str

    @classmethod
    def of(cls, authorization: str | None, operator_email: str) -> Caller:
        if authorization and authorization.startswith(BEARER_PREFIX):
            return cls(authorization.removeprefix(BEARER_PREFIX), operator_email)
        return cls(None, operator_email)

    @property
    def is_operator(self) -> bool:
        return self.member is None

    @property
    def shown_as(self) -> str:
        """The name in error messages: an e-mail address; federated principals have none and are called "Caller"."""
        if self.member is None:
            return self.operator_email
        if self.member.startswith("principal://"):
            return "Caller"
        return self.member.partition(":")[2]

    def identities(self) -> frozenset[str]:
        """Every member of a binding that covers this caller."""
        if self.member is None:
            return frozenset()
        covered = {self.member, *_PUBLIC}
        if match := _PRINCIPAL.fullmatch(self.member):
            covered |= {
                f"principalSet://{match['pool']}/*",
                f"principalSet://{match['pool']}/namespace/{match['namespace']}",
            }
        return frozenset(covered)


def granted(policy: Mapping[str, Any], caller: Caller) -> frozenset[str]:
    """The permissions that the policy's bindings give to the caller."""
    identities = caller.identities()
    roles = [binding["role"] for binding in policy["bindings"] if identities.intersection(binding["members"])]
    return frozenset().union(*(ROLES[role] for role in roles))


def default_bindings(project: str) -> list[dict[str, Any]]:
    """The policy of a new bucket: the project's convenience members."""
    writers = [f"projectEditor:{project}", f"projectOwner:{project}"]
    readers = [f"projectViewer:{project}"]
    return [
        {"role": "roles/storage.legacyBucketOwner", "members": writers},
        {"role": "roles/storage.legacyBucketReader", "members": readers},
        {"role": "roles/storage.legacyObjectOwner", "members": writers},
        {"role": "roles/storage.legacyObjectReader", "members": readers},
    ]


@reading_document()
def checked_bindings(body: Mapping[str, Any], *, public_access_prevented: bool) -> list[dict[str, Any]]:
    """The bindings of a policy that someone wants to set, merged by role and sorted as the service keeps them."""
    if unknown := set(body) - {"bindings", "etag", "version", "kind", "resourceId"}:
        raise unsupported(f"the policy field {sorted(unknown)[0]!r}")
    members_by_role: dict[str, set[str]] = {}
    for binding in body.get("bindings", []):
        if unknown := set(binding) - {"role", "members"}:
            raise unsupported(f"{sorted(unknown)[0]!r} in a binding of a bucket's policy")
        role = binding.get("role", "")
        if role not in ROLES:
            raise invalid(f"Role {role} is not supported for this resource.")
        members = binding.get("members", [])
        if public_access_prevented and _PUBLIC.intersection(members):
            raise StorageError(
                412,
                "conditionNotMet",
                "The member bindings allUsers and allAuthenticatedUsers are not allowed since public access prevention"
                " is enforced.",
                "PreconditionFailed",
            )
        for member in members:
            if not _MEMBER.fullmatch(member):
                raise invalid(f"Invalid argument: {member!r} is not a valid member.")
        if members:
            members_by_role.setdefault(role, set()).update(members)
    return [{"role": role, "members": sorted(members)} for role, members in sorted(members_by_role.items())]
