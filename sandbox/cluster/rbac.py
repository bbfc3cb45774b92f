"""Who a caller is, and what Roles and ClusterRoles let it do, judged as the real authorizer judges.

Simulated: tokens of service accounts, their groups, bindings to users, groups and service accounts, RoleBindings to
ClusterRoles, `*`, subresources, resource names, non-resource paths for discovery. Not simulated: aggregated roles,
impersonation, authorizers beside RBAC (GKE's IAM is one), and the rule that nobody may grant more than it has.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sandbox.cluster import errors
from sandbox.cluster.errors import ApiError
from sandbox.cluster.resources import CLUSTER_ROLE, CLUSTER_ROLE_BINDING, ROLE, ROLE_BINDING, Resource
from sandbox.cluster.store import Store

_MASTERS, _AUTHENTICATED = "system:masters", "system:authenticated"
NAMED_VERBS = {"GET": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
COLLECTION_VERBS = {"GET": "list", "POST": "create", "DELETE": "deletecollection"}


@dataclass(frozen=True)
class User:
    """A caller, as the API server knows it."""

    name: str
    groups: tuple[str, ...] = ()

    @property
    def is_authenticated(self) -> bool:
        return _AUTHENTICATED in self.groups


ADMIN = User("admin", (_MASTERS, _AUTHENTICATED))
ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))


def service_account(namespace: str, name: str) -> User:
    groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", _AUTHENTICATED)
    return User(f"system:serviceaccount:{namespace}:{name}", groups)


@dataclass(frozen=True)
class Action:
    """What is asked of the API server. Empty strings: the core group, cluster scope, no single object."""

    verb: str
    group: str
    resource: str
    """The plural, with its subresource: `pods/log`."""
    namespace: str = ""
    name: str = ""


def action(
    method: str, resource: Resource, namespace: str | None, name: str | None, subresource: str, *, watch: bool
) -> Action:
    """A request as the authorizer sees it."""
    verb = COLLECTION_VERBS["POST"] if method == "POST" else (NAMED_VERBS if name else COLLECTION_VERBS).get(method)
    plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
    if resource.plural == "namespaces" and not resource.group:
        namespace = name  # so that a Role can give rights on its own namespace
    return Action(
        "watch" if watch and method == "GET" else verb or method.lower(),
        resource.group,
        plural,
        namespace or "",
        name or "",
    )


@dataclass
class Callers:
    """Whose token is whose."""

    token: str | None
    """The administrator's. None: whoever calls is one, unless its token is a service account's."""
    without_token: User | None
    """Who calls without a token: an embedded cloud's anonymous Google credentials have none, and GKE knows somebody by
    them. None: the administrator where no token is asked for, else nobody that is known."""
    _issued: dict[str, User] = field(default_factory=dict)

    def issue(self, user: User) -> str:
        """A token by which `user` is known from now on."""
        token = secrets.token_urlsafe(24)
        self._issued[token] = user
        return token

    def known_by(self, authorization: str) -> User:
        """The caller with this `Authorization` header. 401 for a token that is nobody's."""
        token = authorization.removeprefix("Bearer ")
        if token in self._issued:
            return self._issued[token]
        if not token and self.without_token is not None:
            return self.without_token
        if self.token is None or token == self.token:
            return ADMIN
        if not token:
            return ANONYMOUS
        raise ApiError(401, "Unauthorized", "Unauthorized")


class Authorizer:
    """Judges by the Roles and bindings that the cluster holds, and remembers what it has let pass and what not."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.passed: dict[str, set[Action]] = {}
        """By the user's name: what it has done, administrators left out."""
        self.refused: dict[str, set[Action]] = {}

    def require(self, user: User, wanted: Action) -> None:
        """403 in the words of a real API server, unless `user` may."""
        allowed = self.allows(user, wanted)
        if _MASTERS not in user.groups:
            (self.passed if allowed else self.refused).setdefault(user.name, set()).add(wanted)
        if not allowed:
            raise _forbidden(user, wanted)

    def allows(self, user: User, wanted: Action) -> bool:
        if _MASTERS in user.groups:
            return True
        return any(_covers(rule, wanted) for rule in self._rules(user, wanted.namespace))

    def _rules(self, user: User, namespace: str) -> Iterator[dict[str, Any]]:
        for binding in self._store.find(CLUSTER_ROLE_BINDING, None):
            if _binds(binding, user):
                yield from self._rules_of(binding["roleRef"], "")
        if namespace:
            for binding in self._store.find(ROLE_BINDING, namespace):
                if _binds(binding, user):
                    yield from self._rules_of(binding["roleRef"], namespace)

    def _rules_of(self, reference: dict[str, Any], namespace: str) -> list[dict[str, Any]]:
        is_role = reference["kind"] == "Role"
        role = self._store.get(ROLE if is_role else CLUSTER_ROLE, namespace if is_role else "", reference["name"])
        return (role or {}).get("rules") or []


def require_path(user: User, method: str, path: str) -> None:
    """403 unless `user` may read a path that names no resource: discovery is for whoever is known."""
    if not user.is_authenticated:
        raise ApiError(403, "Forbidden", f'forbidden: User "{user.name}" cannot {method.lower()} path "{path}"', {})


def _binds(binding: dict[str, Any], user: User) -> bool:
    return any(_is_subject(subject, binding["metadata"], user) for subject in binding.get("subjects") or ())


def _is_subject(subject: dict[str, Any], metadata: dict[str, Any], user: User) -> bool:
    if subject["kind"] == "ServiceAccount":
        namespace = subject.get("namespace") or metadata.get("namespace", "")
        return service_account(namespace, subject["name"]).name == user.name
    return subject["name"] in (user.groups if subject["kind"] == "Group" else (user.name,))


def _covers(rule: dict[str, Any], wanted: Action) -> bool:
    subresource = wanted.resource.partition("/")[2]
    resources = rule.get("resources") or []
    return (
        _holds(rule.get("verbs"), wanted.verb)
        and _holds(rule.get("apiGroups"), wanted.group)
        and (_holds(resources, wanted.resource) or bool(subresource and f"*/{subresource}" in resources))
        and (not rule.get("resourceNames") or wanted.name in rule["resourceNames"])
    )


def _holds(allowed: list[str] | None, wanted: str) -> bool:
    return "*" in (allowed or ()) or wanted in (allowed or ())


def _forbidden(user: User, wanted: Action) -> ApiError:
    plural = wanted.resource.partition("/")[0]
    scope = f'in the namespace "{wanted.namespace}"' if wanted.namespace else "at the cluster scope"
    head = errors.qualified(wanted.group, plural) + (f' "{wanted.name}"' if wanted.name else "")
    message = f'{head} is forbidden: User "{user.name}" cannot {wanted.verb} resource "{wanted.resource}" in API group '
    details = ({"name": wanted.name} if wanted.name else {}) | ({"group": wanted.group} if wanted.group else {})
    return ApiError(403, "Forbidden", f'{message}"{wanted.group}" {scope}', details | {"kind": plural})
