"""Resource Manager v3 and Cloud Billing v1, for the one project that there is.

Simulated: get by ID or number, the project's policy with etags, testIamPermissions, whether billing is enabled. A
project that is not ours answers 403, as the real API does for one that the caller cannot see. Not simulated: everything
that creates, moves, tags or deletes projects, and changing the billing account.
"""

from __future__ import annotations

from google.iam.v1 import iam_policy_pb2

from sandbox.google_apis.cloud import Cloud, tested_permissions
from sandbox.google_apis.policies import Policies, requested_version
from sandbox.google_apis.rest import Call, Json, Route

RESOURCE_MANAGER = "cloudresourcemanager.googleapis.com"
BILLING = "cloudbilling.googleapis.com"
BILLING_ACCOUNT = "billingAccounts/0X0X0X-0X0X0X-0X0X0X"


class Projects:
    def __init__(self, cloud: Cloud, policies: Policies, *, billing_enabled: bool) -> None:
        self._cloud = cloud
        self._policies = policies
        self.billing_enabled = billing_enabled

    def routes(self) -> list[Route]:
        project = "/v3/projects/{project}"

        def permission(verb: str) -> str:
            return f"resourcemanager.projects.{verb}"

        return [
            Route("GET", project, RESOURCE_MANAGER, permission("get"), self._get),
            Route("POST", project + ":getIamPolicy", RESOURCE_MANAGER, permission("getIamPolicy"), self._get_policy),
            Route("POST", project + ":setIamPolicy", RESOURCE_MANAGER, permission("setIamPolicy"), self._set_policy),
            Route("POST", project + ":testIamPermissions", RESOURCE_MANAGER, None, self._test_permissions),
            Route("GET", "/v1/projects/{project}/billingInfo", BILLING, permission("get"), self._billing),
        ]

    def _get(self, call: Call) -> Json:
        created = self._cloud.timestamp(self._cloud.store.data["created_at"])
        return {
            "name": f"projects/{self._cloud.project_number}",
            "parent": "organizations/111111111111",
            "projectId": self._cloud.project,
            "state": "ACTIVE",
            "displayName": self._cloud.project.rpartition(":")[2],
            "createTime": created,
            "updateTime": created,
            "etag": 'W/"0"',
        }

    def _get_policy(self, call: Call) -> Json:
        return self._policies.get(self._cloud.store.data["project_policy"], requested_version(call))

    def _set_policy(self, call: Call) -> Json:
        return self._policies.set(self._cloud.store.data["project_policy"], call)

    def _test_permissions(self, call: Call) -> Json:
        request = call.parse(iam_policy_pb2.TestIamPermissionsRequest())
        if not self._cloud.is_own_project(call.params["project"]):
            return {}
        return tested_permissions(request.permissions, self._cloud.denied_permissions)

    def _billing(self, call: Call) -> Json:
        return {
            "name": f"projects/{self._cloud.project}/billingInfo",
            "projectId": self._cloud.project,
            "billingAccountName": BILLING_ACCOUNT if self.billing_enabled else "",
            "billingEnabled": self.billing_enabled,
        }
