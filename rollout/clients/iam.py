"""Service accounts and IAM policies: made if absent, changed without ever dropping somebody else's binding.

IAM's admin client has no REST transport, so IAM v1 is called through an authorised session. A policy is one document
that many people write: it is read, changed and written back with its etag, and on a conflict read again
(https://cloud.google.com/iam/docs/policies#etag).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote

from google.api_core.iam import Policy as BucketIamPolicy
from google.cloud.storage import Client as StorageClient

from rollout.clients.google_auth import RestApi, client_options, credentials_for, google_errors
from rollout.clients.retrying import with_retries
from rollout.errors import AlreadyExists, BucketNotFound, NotFound, TransientError
from rollout.report import Action, Change
from rollout.target import Target
from rollout.values import Value

WORKLOAD_IDENTITY_USER = "roles/iam.workloadIdentityUser"
OBJECT_VIEWER = "roles/storage.objectViewer"
OBJECT_USER = "roles/storage.objectUser"
"""Reads, writes and deletes objects and multipart uploads, and nothing of the bucket itself."""

OWNERSHIP_DESCRIPTION = "Made by llm-rollout: identity of model servers."
"""How a service account, which has no labels, says that it is ours."""

POLICY_ATTEMPTS = 8
"""Conflicts in a row before giving up: about half a minute with jitter, far beyond any honest race."""

VISIBLE_ATTEMPTS = 10
"""Google: a new account can take 60 seconds or more until it can be read. Ten attempts wait up to two minutes. The same
for a grant to be read back."""

PolicyDocument = dict[str, Any]
"""`{version, etag, bindings: [{role, members, condition?}], …}` as the APIs give it; unknown fields are kept."""


class ServiceAccount(Value):
    """A Google service account."""

    email: str
    unique_id: str
    description: str = ""

    @property
    def is_ours(self) -> bool:
        return self.description == OWNERSHIP_DESCRIPTION


class ServiceAccounts:
    """The service accounts of a target's project."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._api = RestApi(target, "iam")
        self._accounts = f"/v1/projects/{quote(target.project, safe=':')}/serviceAccounts"

    def get(self, email: str) -> ServiceAccount | None:
        """The account, or None if there is none (or it cannot be read yet)."""
        try:
            answer = self._api.get(f"{self._accounts}/{email}")
        except NotFound:
            return None
        return ServiceAccount(
            email=answer["email"], unique_id=answer["uniqueId"], description=answer.get("description", "")
        )

    def ensure(self, name: str) -> tuple[ServiceAccount, Change]:
        """The account `name` of the project: created and awaited until it can be read, adopted or left as it is."""
        email = self._target.universe.service_account_email(name, self._target.project)
        found = self.get(email)
        if found is not None:
            action = Action.UNCHANGED if found.is_ours else Action.ADOPTED
            return found, Change(action=action, kind="ServiceAccount", name=email)
        details = {"displayName": name, "description": OWNERSHIP_DESCRIPTION}
        action = Action.CREATED
        try:
            self._api.post(self._accounts, {"accountId": name, "serviceAccount": details})
        except AlreadyExists:
            # Made a moment ago, by an attempt of ours or by somebody else; the description will tell.
            action = Action.ADOPTED
        account = with_retries(lambda: self._visible(email), attempts=VISIBLE_ATTEMPTS)
        if action is Action.ADOPTED and account.is_ours:
            action = Action.UNCHANGED
        return account, Change(action=action, kind="ServiceAccount", name=email)

    def delete(self, email: str) -> Change | None:
        """Delete the account; None if it was gone already."""
        try:
            self._api.delete(f"{self._accounts}/{email}")
        except NotFound:
            return None
        return Change(action=Action.DELETED, kind="ServiceAccount", name=email)

    def _visible(self, email: str) -> ServiceAccount:
        account = self.get(email)
        if account is None:
            raise TransientError(
                "the service account was created but cannot be read yet.",
                where=email,
                resolution="IAM is slow today: run again, nothing needs to be undone.",
            )
        return account


class PolicyStore(Protocol):
    """Something with an IAM policy."""

    @property
    def name(self) -> str:
        """E.g. `gs://bucket` or a service account's e-mail."""

    def read(self) -> PolicyDocument:
        """The policy, version 3, so that conditions are seen."""

    def write(self, policy: PolicyDocument) -> None:
        """Replace the policy; `ConcurrentChange` if its etag is not the current one."""


class ServiceAccountPolicy:
    """Who may act as a service account."""

    def __init__(self, target: Target, email: str) -> None:
        self.name = email
        self._api = RestApi(target, "iam")
        self._path = f"/v1/projects/{quote(target.project, safe=':')}/serviceAccounts/{email}"

    def read(self) -> PolicyDocument:
        return self._api.post(f"{self._path}:getIamPolicy", query={"options.requestedPolicyVersion": "3"})

    def write(self, policy: PolicyDocument) -> None:
        self._api.post(f"{self._path}:setIamPolicy", {"policy": policy})


class ProjectPolicy:
    """Who may do what in the project."""

    def __init__(self, target: Target) -> None:
        self.name = f"projects/{target.project}"
        self._api = RestApi(target, "cloudresourcemanager")
        self._path = f"/v3/projects/{quote(target.project, safe=':')}"

    def read(self) -> PolicyDocument:
        return self._api.post(f"{self._path}:getIamPolicy", {"options": {"requestedPolicyVersion": 3}})

    def write(self, policy: PolicyDocument) -> None:
        self._api.post(f"{self._path}:setIamPolicy", {"policy": policy})


class BucketPolicy:
    """Who may read and write a bucket."""

    def __init__(self, target: Target, bucket: str) -> None:
        self.name = f"gs://{bucket}"
        client = StorageClient(
            project=target.project,
            credentials=credentials_for(target),
            client_options=client_options(target, "storage"),
        )
        self._bucket = client.bucket(bucket)

    def read(self) -> PolicyDocument:
        try:
            with google_errors(self.name):
                policy = self._bucket.get_iam_policy(requested_policy_version=3)
        except NotFound as error:
            raise BucketNotFound(
                "there is no such bucket.", where=self.name, resolution="Create it, or correct the target."
            ) from error
        document: PolicyDocument = policy.to_api_repr()
        return document

    def write(self, policy: PolicyDocument) -> None:
        with google_errors(self.name):
            self._bucket.set_iam_policy(BucketIamPolicy.from_api_repr(copy.deepcopy(policy)))


def ensure_binding(store: PolicyStore, role: str, member: str) -> Change | None:
    """Let `member` have `role` on the store, unconditionally; None if it has it already.

    A binding of the same role under a condition is somebody else's and stays; the member gets one without. A new one is
    awaited until it can be read. Until it is enforced, two to seven minutes may pass, and no API tells: the pods are
    asked, and their refusals of that time are taken for what they are (`rollout.diagnosis`, patience).
    """
    change = _change_policy(store, role, member, with_member, Action.CREATED)
    if change is not None:
        with_retries(lambda: _require_visible(store, role, member), attempts=VISIBLE_ATTEMPTS)
    return change


def remove_binding(store: PolicyStore, role: str, member: str) -> Change | None:
    """Take `role` from `member` where it has it unconditionally; None if it had not. Other members keep it."""
    return _change_policy(store, role, member, without_member, Action.DELETED)


def has_binding(store: PolicyStore, role: str, member: str) -> bool:
    """Whether `member` has `role` on the store, unconditionally."""
    return with_member(store.read(), role, member) is None


def _require_visible(store: PolicyStore, role: str, member: str) -> None:
    if not has_binding(store, role, member):
        raise TransientError(
            f"{role} was granted to {member} and cannot be read yet.",
            where=store.name,
            resolution="IAM is slow today: run again, nothing needs to be undone.",
        )


def binding_name(store_name: str, role: str, member: str) -> str:
    """How a binding is named in the record: `gs://bucket roles/storage.objectViewer serviceAccount:…`."""
    return f"{store_name} {role} {member}"


PolicyEdit = Callable[[Mapping[str, Any], str, str], PolicyDocument | None]


def with_member(policy: Mapping[str, Any], role: str, member: str) -> PolicyDocument | None:
    """`policy` with `member` added to the unconditional binding of `role`; None if it is in there."""
    changed = _editable(policy)
    for binding in changed["bindings"]:
        if binding["role"] == role and not binding.get("condition"):
            if member in binding["members"]:
                return None
            binding["members"] = [*binding["members"], member]
            return changed
    changed["bindings"].append({"role": role, "members": [member]})
    return changed


def without_member(policy: Mapping[str, Any], role: str, member: str) -> PolicyDocument | None:
    """`policy` without `member` in the unconditional bindings of `role`; None if it is in none."""
    changed = _editable(policy)
    found = False
    for binding in changed["bindings"]:
        if binding["role"] == role and not binding.get("condition") and member in binding["members"]:
            binding["members"] = [other for other in binding["members"] if other != member]
            found = True
    changed["bindings"] = [binding for binding in changed["bindings"] if binding["members"]]
    return changed if found else None


def _editable(policy: Mapping[str, Any]) -> PolicyDocument:
    changed = copy.deepcopy(dict(policy))
    changed["bindings"] = [
        binding | {"members": list(binding.get("members", ()))} for binding in changed.get("bindings", ())
    ]
    # Version 3 is what allows conditions: writing less would drop or refuse other people's.
    changed["version"] = 3
    return changed


def _change_policy(store: PolicyStore, role: str, member: str, edit: PolicyEdit, action: Action) -> Change | None:
    def attempt() -> Change | None:
        # The whole read-modify-write is tried again: writing the same document with a newer etag would lose bindings.
        changed = edit(store.read(), role, member)
        if changed is None:
            return None
        store.write(changed)
        return Change(action=action, kind="IamBinding", name=binding_name(store.name, role, member))

    return with_retries(attempt, attempts=POLICY_ATTEMPTS)
