"""IAM v1: service accounts and their policies.

Simulated: create, get, list, patch (description and display name), delete, policies with etags, testIamPermissions,
and the moment in which a new account cannot be read yet. Not simulated: keys, undelete (501), enable and disable (404).
"""

from __future__ import annotations

import re
import secrets
from typing import Any

from google.iam.v1 import iam_policy_pb2

from sandbox.google_apis.cloud import Cloud, tested_permissions
from sandbox.google_apis.policies import Policies, new_record, requested_version
from sandbox.google_apis.rest import ApiError, Call, Json, Route, bad_request, not_simulated, only_fields

SERVICE = "iam.googleapis.com"
WORKLOAD_IDENTITY_USER = "roles/iam.workloadIdentityUser"

_ACCOUNT_ID = re.compile(r"[a-z]([-a-z0-9]{4,28}[a-z0-9])")
_MUTABLE = {"description": "description", "displayName": "displayName", "display_name": "displayName"}
_GRANTABLE = frozenset(
    {
        "roles/owner",
        "roles/editor",
        "roles/viewer",
        WORKLOAD_IDENTITY_USER,
        "roles/iam.serviceAccountUser",
        "roles/iam.serviceAccountAdmin",
        "roles/iam.serviceAccountTokenCreator",
        "roles/iam.serviceAccountOpenIdTokenCreator",
    }
)
"""Roles that can be granted on a service account; `roles/storage.objectViewer`, say, cannot."""


class ServiceAccounts:
    def __init__(self, cloud: Cloud, policies: Policies) -> None:
        self._cloud = cloud
        self._policies = policies

    def routes(self) -> list[Route]:
        accounts = "/v1/projects/{project}/serviceAccounts"
        account = accounts + "/{email}"
        resource = "projects/{project}/serviceAccounts/{email}"

        def route(method: str, template: str, verb: str | None, handler: Any, **options: Any) -> Route:
            permission = f"iam.serviceAccounts.{verb}" if verb else None
            return Route(method, template, SERVICE, permission, handler, **options)

        return [
            route("POST", accounts, "create", self._create),
            route("GET", accounts, "list", self._list, query=frozenset({"pageSize", "pageToken"})),
            route("GET", account, "get", self._get, resource=resource),
            route("PATCH", account, "update", self._patch, resource=resource),
            route("DELETE", account, "delete", self._delete, resource=resource),
            route("POST", account + ":undelete", None, self._undelete, resource=resource),
            route(
                "POST",
                account + ":getIamPolicy",
                "getIamPolicy",
                self._get_policy,
                resource=resource,
                query=frozenset({"options.requestedPolicyVersion"}),
            ),
            route("POST", account + ":setIamPolicy", "setIamPolicy", self._set_policy, resource=resource),
            route("POST", account + ":testIamPermissions", None, self._test_permissions, resource=resource),
        ]

    def may_impersonate(self, email: str, member: str) -> bool:
        """Whether `member` may act as the account now, by a binding that is in force."""
        account = self._cloud.store.data["service_accounts"].get(email)
        if account is None:
            return False
        return any(
            binding["role"] == WORKLOAD_IDENTITY_USER and member in binding["members"]
            for binding in self._policies.in_force(account["policy"])
        )

    def _create(self, call: Call) -> Json:
        only_fields(call.body, {"accountId", "serviceAccount"})
        details = call.body.get("serviceAccount", {})
        only_fields(details, {"displayName", "description"}, "service_account")
        name = call.body.get("accountId", "")
        if not _ACCOUNT_ID.fullmatch(name):
            raise bad_request(
                "account_id",
                f'Invalid service account ID "{name}".',
                message='Service account ID must be between 6 and 30 characters, match "[a-z]([-a-z0-9]*[a-z0-9])".',
            )
        email = self._cloud.service_account_email(name)
        accounts = self._cloud.store.data["service_accounts"]
        resource = f"projects/{self._cloud.project}/serviceAccounts/{email}"
        if email in accounts:
            raise ApiError(
                "ALREADY_EXISTS",
                f"Service account {name} already exists within project projects/{self._cloud.project}.",
                details=({"@type": "type.googleapis.com/google.rpc.ResourceInfo", "resourceName": resource},),
            )
        unique_id = f"1{secrets.randbelow(10**20):020d}"
        public = {
            "name": resource,
            "projectId": self._cloud.project,
            "uniqueId": unique_id,
            "email": email,
            "etag": "MDEwMjE5MjA=",
            "oauth2ClientId": unique_id,
            **{field: details[field] for field in ("displayName", "description") if details.get(field)},
        }
        visible_at = self._cloud.now() + self._cloud.delays.iam_propagation_s
        accounts[email] = {"public": public, "policy": new_record(), "visible_at": visible_at}
        return public

    def _list(self, call: Call) -> Json:
        visible = [account["public"] for account in self._visible().values()]
        return {"accounts": visible} if visible else {}

    def _get(self, call: Call) -> Json:
        return self._account(call)["public"]

    def _patch(self, call: Call) -> Json:
        only_fields(call.body, {"serviceAccount", "updateMask"})
        changes = call.body.get("serviceAccount", {})
        only_fields(changes, {"description", "displayName", "etag"}, "service_account")
        public = self._account(call)["public"]
        mask = [path for path in call.body.get("updateMask", "").split(",") if path]
        if unknown := [path for path in mask if path not in _MUTABLE]:
            raise bad_request("update_mask", f"The field {unknown[0]} cannot be updated.")
        answer = {"name": public["name"]}
        for field in dict.fromkeys(_MUTABLE[path] for path in mask):
            public[field] = answer[field] = changes.get(field, "")
        return answer

    def _delete(self, call: Call) -> Json:
        account = self._account(call)
        email, unique_id = account["public"]["email"], account["public"]["uniqueId"]
        data = self._cloud.store.data
        del data["service_accounts"][email]
        for record in (data["project_policy"], *(other["policy"] for other in data["service_accounts"].values())):
            self._policies.replace_member(
                record, f"serviceAccount:{email}", f"deleted:serviceAccount:{email}?uid={unique_id}"
            )
        return {}

    def _undelete(self, call: Call) -> Json:
        raise not_simulated("the undeletion of service accounts")

    def _get_policy(self, call: Call) -> Json:
        return self._policies.get(self._account(call)["policy"], requested_version(call))

    def _set_policy(self, call: Call) -> Json:
        return self._policies.set(self._account(call)["policy"], call, roles=_GRANTABLE)

    def _test_permissions(self, call: Call) -> Json:
        self._account(call)
        request = call.parse(iam_policy_pb2.TestIamPermissionsRequest())
        return tested_permissions(request.permissions, self._cloud.denied_permissions)

    def _visible(self) -> dict[str, Any]:
        now = self._cloud.now()
        accounts = self._cloud.store.data["service_accounts"]
        return {email: account for email, account in accounts.items() if account["visible_at"] <= now}

    def _account(self, call: Call) -> dict[str, Any]:
        wanted = call.params["email"]
        for email, account in self._visible().items():
            if wanted in (email, account["public"]["uniqueId"]):
                return account
        raise ApiError("NOT_FOUND", "Unknown service account")
