"""IAM allow policies: etags, conditions, members, and when a change is in force.

Simulated: read-modify-write with etags (a stale one is refused; without one IAM overwrites blindly), merging of equal
bindings, conditions only under version 3, unknown service accounts and Workload Identity pools refused, members of
deleted service accounts shown as `deleted:…?uid=…`. Not simulated: deny policies, audit configs, inheritance.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Collection
from typing import Any

from google.iam.v1 import iam_policy_pb2, policy_pb2
from google.protobuf import json_format

from sandbox.google_apis.cloud import Cloud
from sandbox.google_apis.rest import ApiError, Call, Json, not_simulated

_MEMBER_PREFIXES = ("user:", "serviceAccount:", "group:", "domain:", "principal://", "principalSet://", "deleted:")
_POOL_MEMBER = re.compile(r"serviceAccount:(?P<pool>[^\[]+\.svc\.id\.goog)\[[^/\]]+/[^/\]]+\]")

Record = dict[str, Any]
"""`{etag, version, bindings, history: [{at, bindings}]}` as stored."""


def new_record() -> Record:
    # ACAB is the etag that Google gives to a policy that was never set.
    return {"etag": "ACAB", "version": 1, "bindings": [], "history": []}


class Policies:
    """The policies of one project's resources."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    def get(self, record: Record, requested_version: int) -> Json:
        """A policy as getIamPolicy answers it; below version 3 conditions are left out and roles marked."""
        if not record["bindings"]:
            return {"etag": record["etag"]}
        bindings = record["bindings"]
        if requested_version < 3:
            bindings = [_without_condition(binding) for binding in bindings]
        conditional = any("condition" in binding for binding in bindings)
        return {"version": 3 if conditional else 1, "etag": record["etag"], "bindings": bindings}

    def set(self, record: Record, call: Call, *, roles: Collection[str] | None = None) -> Json:
        """Replace the policy by a setIamPolicy request. `roles` may be granted on this resource; None means all."""
        request = call.parse(iam_policy_pb2.SetIamPolicyRequest())
        if request.policy.audit_configs:
            raise not_simulated("audit configs in policies")
        self._require_current(record, request.policy.etag)
        bindings = [self._binding(binding, roles) for binding in request.policy.bindings]
        had_conditions = any("condition" in binding for binding in record["bindings"])
        has_conditions = any("condition" in binding for binding in bindings)
        if (had_conditions or has_conditions) and request.policy.version != 3:
            raise ApiError(
                "INVALID_ARGUMENT",
                "Policies with conditional role bindings must be set with version 3, so that no condition is lost.",
            )
        self._store(record, _merged(bindings))
        return self.get(record, 3)

    def replace_member(self, record: Record, old: str, new: str) -> None:
        """Show `old` as `new` in every binding, as IAM does with the members of a deleted service account."""
        bindings = [
            binding | {"members": [new if member == old else member for member in binding["members"]]}
            for binding in record["bindings"]
        ]
        if bindings != record["bindings"]:
            self._store(record, bindings)

    def in_force(self, record: Record) -> list[Json]:
        """The bindings that workloads see now: the newest that are older than the propagation delay."""
        horizon = self._cloud.now() - self._cloud.delays.iam_propagation_s
        effective = [entry["bindings"] for entry in record["history"] if entry["at"] <= horizon]
        return effective[-1] if effective else []

    def _require_current(self, record: Record, etag: bytes) -> None:
        presented = base64.b64encode(etag).decode()
        if etag and presented != record["etag"]:
            raise ApiError(
                "ABORTED",
                "There were concurrent policy changes. Please retry the whole read-modify-write with exponential "
                "backoff. "
                f"The request's ETag '{presented}' did not match the current policy's ETag '{record['etag']}'.",
            )

    def _binding(self, binding: policy_pb2.Binding, roles: Collection[str] | None) -> Json:
        known = re.fullmatch(r"(projects/[^/]+/|organizations/[^/]+/)?roles/[\w.]+", binding.role)
        if not known or (roles is not None and binding.role not in roles):
            raise ApiError("INVALID_ARGUMENT", f"Role {binding.role} is not supported for this resource.")
        for member in binding.members:
            self._require_member(member)
        return json_format.MessageToDict(binding)

    def _require_member(self, member: str) -> None:
        if member in ("allUsers", "allAuthenticatedUsers"):
            return
        if not member.startswith(_MEMBER_PREFIXES):
            raise ApiError(
                "INVALID_ARGUMENT",
                f"The member {member} is of an unknown type. Please set a valid type prefix for the member.",
            )
        data = self._cloud.store.data
        if workload := _POOL_MEMBER.fullmatch(member):
            if workload["pool"] != self._cloud.workload_pool or not data["workload_pool_exists"]:
                raise ApiError(
                    "INVALID_ARGUMENT",
                    f"Identity Pool does not exist ({workload['pool']}). Please check that you specified a valid "
                    "resource name as returned in the `name` attribute in the configuration API.",
                )
            return
        kind, _, email = member.partition(":")
        own = email.endswith(f"@{self._cloud.scoped_project}.iam.gserviceaccount.com")
        account = data["service_accounts"].get(email)
        if kind == "serviceAccount" and own and (account is None or account["visible_at"] > self._cloud.now()):
            raise ApiError("INVALID_ARGUMENT", f"Service account {email} does not exist.")

    def _store(self, record: Record, bindings: list[Json]) -> None:
        now = self._cloud.now()
        record["bindings"] = bindings
        record["etag"] = base64.b64encode(secrets.token_bytes(8)).decode()
        # Old entries matter only up to the one in force.
        record["history"] = [*record["history"][-20:], {"at": now, "bindings": bindings}]


def requested_version(call: Call) -> int:
    """The policy version that a getIamPolicy call asks for, in its body (POST with options) or in its query."""
    request = call.parse(iam_policy_pb2.GetIamPolicyRequest())
    version = int(call.query.get("options.requestedPolicyVersion", request.options.requested_policy_version))
    if version not in (0, 1, 3):
        raise ApiError("INVALID_ARGUMENT", f"Policy version {version} is not supported.")
    return version


def _without_condition(binding: Json) -> Json:
    if "condition" not in binding:
        return binding
    return {"role": f"{binding['role']}_withcond_0123456789abcdef0123", "members": binding["members"]}


def _merged(bindings: list[Json]) -> list[Json]:
    """Bindings of equal role and condition become one; members are unique and sorted; empty ones vanish."""
    merged: dict[str, Json] = {}
    for binding in bindings:
        key = repr((binding["role"], binding.get("condition")))
        members = {*merged.get(key, {}).get("members", ()), *binding.get("members", ())}
        if members:
            merged[key] = binding | {"members": sorted(members)}
    return list(merged.values())
