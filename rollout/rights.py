"""What a rollout must be allowed inside of the cluster: Kubernetes rights that follow from its objects and its policy.

`deployments/worker/serving/` grants them to the worker; anybody else who rolls out needs the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rollout.benchmark import Engine
from rollout.objects import INVENTORY_KINDS
from rollout.policy import RolloutPolicy, WarmUp
from rollout.preflight import Check, failed, ok
from rollout.values import Value

NAME = "cluster rights"
GRANTED_BY = "deployments/worker/serving/"

_OWN_VERBS = ("get", "create", "patch", "delete", "watch")
"""Server-side apply reads, creates and patches; whoever takes it back deletes, and watches until it is gone."""


class Right(Value):
    """One verb on one kind of object, in the target's namespace if the kind has one."""

    api_version: str
    kind: str
    verb: str
    subresource: str = ""


class Denied(Value):
    """A right that the caller lacks, in the API server's names."""

    resource: str
    """E.g. `deployments.apps` or `pods/log`."""
    verb: str
    namespace: str
    """Empty at the cluster scope."""


_ALWAYS = tuple(
    Right(api_version=api_version, kind=kind, verb=verb, subresource=subresource)
    for api_version, kind, subresource, verbs in (
        # A start is watched and explained.
        ("apps/v1", "Deployment", "", ("get", "watch")),
        ("apps/v1", "ReplicaSet", "", ("list", "watch")),
        ("v1", "Pod", "", ("watch",)),
        ("v1", "Event", "", ("list", "watch")),
        ("v1", "Pod", "log", ("get",)),
        # The model server is reached through a forwarded port; since Kubernetes 1.35 its websocket needs `create` too.
        ("v1", "Service", "", ("get",)),
        ("v1", "Pod", "portforward", ("get", "create")),
    )
    for verb in verbs
)
_BY_REVISIONS = (
    Right(api_version="discovery.k8s.io/v1", kind="EndpointSlice", verb="list"),
    Right(api_version="v1", kind="Pod", verb="get", subresource="proxy"),
)


def needed_rights(
    objects: Iterable[Mapping[str, Any]], policy: RolloutPolicy, *, namespace_exists: bool, sends_token: bool
) -> tuple[Right, ...]:
    """Every right that a rollout of `objects` by `policy`, and its teardown, will use; each of them once.

    `sends_token` tells whether the target names a token of the hub: it goes into a Secret.
    """
    applied = {(each["apiVersion"], each["kind"]) for each in objects} | _later_kinds(policy, sends_token=sends_token)
    rights = [Right(api_version=version, kind=kind, verb="list") for version, kind in INVENTORY_KINDS]
    rights += _ALWAYS
    if policy.delivery.by_revisions:
        rights += _BY_REVISIONS
    for version, kind in sorted(applied):
        # A namespace that is there is adopted: never made, never deleted.
        verbs = ("get", "patch") if kind == "Namespace" and namespace_exists else _OWN_VERBS
        rights += [Right(api_version=version, kind=kind, verb=verb) for verb in verbs]
    return tuple(dict.fromkeys(rights))


def _later_kinds(policy: RolloutPolicy, *, sends_token: bool) -> set[tuple[str, str]]:
    """What a rollout applies beside the plan's objects."""
    kinds: set[tuple[str, str]] = set()
    if policy.delivery.by_revisions and policy.delivery.gateway is not None:
        kinds.add(("gateway.networking.k8s.io/v1", "HTTPRoute"))
    if policy.warm_up is not WarmUp.OFF:
        kinds.add(("batch/v1", "Job"))
    if policy.benchmark is not None and policy.benchmark.engine is Engine.INFERENCE_PERF:
        kinds |= {("batch/v1", "Job"), ("v1", "ConfigMap")} | ({("v1", "Secret")} if sends_token else set())
    return kinds


def check_rights(denied: Iterable[Denied], caller: str, namespace: str, *, namespace_exists: bool) -> Check:
    """What `caller`, as the cluster calls it, may not do, and how it gets there."""
    missing: dict[tuple[str, str], list[str]] = {}
    for each in denied:
        missing.setdefault((each.namespace, each.resource), []).append(each.verb)
    if not missing:
        return ok(NAME, f"{caller} may do everything that the rollout will")
    listed = [
        f"{', '.join(verbs)} {resource} {f'in {scope}' if scope else 'at the cluster scope'}"
        for (scope, resource), verbs in sorted(missing.items())
    ]
    first = "" if namespace_exists else f"kubectl create namespace {namespace}, then "
    return failed(
        NAME,
        f"{caller} may not {'; '.join(listed)}",
        f"Name {caller} as a subject in both bindings of {GRANTED_BY}, and let an administrator run:"
        f" {first}kubectl apply -n {namespace} -f {GRANTED_BY}",
    )
