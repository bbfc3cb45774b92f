"""Which Kubernetes rights follow from a plan, and what is said about those that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rollout.benchmark import BenchmarkSpec, Engine
from rollout.objects import INVENTORY_KINDS
from rollout.policy import RolloutPolicy
from rollout.preflight import CheckState
from rollout.rights import Denied, check_rights, needed_rights
from rollout.workload import fixed_workload
from sandbox.cluster.resources import BUILT_IN, CUSTOM

SERVING = Path(__file__).parents[2] / "deployments" / "worker" / "serving"

DEPLOYMENT = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "m", "namespace": "serving"}}
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "serving"}}
INFERENCE_PERF = BenchmarkSpec(workload=fixed_workload(16, 4), engine=Engine.INFERENCE_PERF).model_dump(mode="json")


def rights(
    *objects: dict[str, Any], namespace_exists: bool = True, sends_token: bool = False, **policy: Any
) -> dict[str, set[str]]:
    """Verbs by kind, with the subresource after a slash."""
    asked = RolloutPolicy.model_validate({"benchmark": None, "warm_up": "off", **policy})
    found: dict[str, set[str]] = {}
    for each in needed_rights(objects, asked, namespace_exists=namespace_exists, sends_token=sends_token):
        found.setdefault(f"{each.kind}/{each.subresource}".rstrip("/"), set()).add(each.verb)
    return found


def test_every_rollout_takes_an_inventory_and_watches_its_start() -> None:
    needed = rights(DEPLOYMENT)
    assert all("list" in needed[kind] for _, kind in INVENTORY_KINDS)
    assert needed["Deployment"] == {"get", "list", "watch", "create", "patch", "delete"}
    assert needed["Pod/portforward"] == {"get", "create"}
    assert needed["Secret"] == {"list"}
    assert not {"EndpointSlice", "Pod/proxy"} & needed.keys()


def test_no_rollout_gives_rights_to_others() -> None:
    needed = rights(DEPLOYMENT, delivery={"kind": "canary", "gateway": {"name": "g"}}, warm_up="fast")
    assert needed["Role"] == needed["RoleBinding"] == {"list"}


@pytest.mark.parametrize(("exists", "may_delete"), [(True, False), (False, True)])
def test_a_namespace_that_is_there_is_neither_made_nor_deleted(exists: bool, may_delete: bool) -> None:
    verbs = rights(NAMESPACE, namespace_exists=exists)["Namespace"]
    assert {"get", "patch", "list"} <= verbs
    assert ({"create", "delete"} <= verbs) is may_delete


def test_a_delivery_by_revisions_moves_the_traffic() -> None:
    needed = rights(DEPLOYMENT, delivery={"kind": "blue_green"})
    assert (needed["EndpointSlice"], needed["Pod/proxy"]) == ({"list"}, {"get"})
    assert "create" not in needed["HTTPRoute"]
    assert "create" in rights(DEPLOYMENT, delivery={"kind": "canary", "gateway": {"name": "g"}})["HTTPRoute"]


def test_secrets_are_only_written_for_a_load_that_needs_the_hubs_token() -> None:
    load = {"benchmark": INFERENCE_PERF}
    assert "create" in rights(DEPLOYMENT, **load)["Job"]
    assert "create" not in rights(DEPLOYMENT, **load)["Secret"]
    assert "create" in rights(DEPLOYMENT, sends_token=True, **load)["Secret"]
    assert "create" not in rights(DEPLOYMENT, sends_token=True)["Secret"]


def test_the_workers_files_grant_whatever_a_plan_can_need() -> None:
    """Quick to tell; tests/flows/test_worker_rights.py shows that it is also all that is really asked for."""
    granted = {
        (group, resource, verb)
        for file in SERVING.glob("*role.yaml")
        for rule in yaml.safe_load(file.read_text(encoding="utf-8"))["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    kinds = {(each.api_version, each.kind): each for each in (*BUILT_IN, *CUSTOM)}
    applied = [
        {"apiVersion": version, "kind": kind}
        for version, kind in INVENTORY_KINDS
        if kind not in ("Role", "RoleBinding", "InferencePool", "PersistentVolumeClaim", "Pod")
    ]
    canary = RolloutPolicy.model_validate(
        {"benchmark": INFERENCE_PERF, "delivery": {"kind": "canary", "gateway": {"name": "g"}}}
    )
    missing = []
    for right in needed_rights(applied, canary, namespace_exists=True, sends_token=True):
        kind = kinds[right.api_version, right.kind]
        resource = f"{kind.plural}/{right.subresource}" if right.subresource else kind.plural
        if (kind.group, resource, right.verb) not in granted:
            missing.append((resource, right.verb))
    assert missing == []


def test_missing_rights_are_told_by_resource_with_the_command_that_grants_them() -> None:
    denied = [
        Denied(resource="deployments.apps", verb="create", namespace="serving"),
        Denied(resource="deployments.apps", verb="patch", namespace="serving"),
        Denied(resource="computeclasses.cloud.google.com", verb="list", namespace=""),
    ]
    check = check_rights(denied, "me@x.com", "serving", namespace_exists=False)
    assert check.state is CheckState.FAILED
    assert "me@x.com may not list computeclasses.cloud.google.com at the cluster scope" in check.why
    assert "create, patch deployments.apps in serving" in check.why
    assert "kubectl create namespace serving, then kubectl apply -n serving -f deployments/worker/serving/" in (
        check.resolution
    )
    assert check_rights([], "me@x.com", "serving", namespace_exists=True).state is CheckState.OK
