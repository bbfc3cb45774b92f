"""Server-side apply: owners of fields, conflicts, force, what is given up, dry runs.

Runs against the sandbox, or against a real API server where one is configured (see `cluster_support`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes.client import ApiException

from tests.sandbox.cluster_support import Connection, api_server, deployment

APPLY = "application/apply-patch+yaml"
IMAGE = '.spec.template.spec.containers[name="c"].image'


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    with api_server(tmp_path_factory.mktemp("apply")) as connection:
        yield connection


@pytest.fixture
def namespace(api: Connection) -> Iterator[str]:
    with api.namespace() as name:
        yield name


class Applier:
    """Applies Deployments called `web` in one namespace."""

    def __init__(self, api: Connection, namespace: str) -> None:
        self._api = api
        self._namespace = namespace

    def apply(self, obj: dict[str, Any], manager: str = "m1", **options: Any) -> Any:
        return self._api.apps.patch_namespaced_deployment(
            "web", self._namespace, obj, field_manager=manager, _content_type=APPLY, **options
        )

    def read(self) -> Any:
        return self._api.apps.read_namespaced_deployment("web", self._namespace)


@pytest.fixture
def web(api: Connection, namespace: str) -> Applier:
    return Applier(api, namespace)


def owners(obj: Any) -> dict[str, dict[str, Any]]:
    return {each.manager: each.fields_v1 for each in obj.metadata.managed_fields if each.operation == "Apply"}


def test_a_dry_run_fills_in_defaults_and_creates_nothing(web: Applier) -> None:
    planned = web.apply(deployment(), dry_run="All")
    assert planned.metadata.resource_version is None
    assert planned.spec.progress_deadline_seconds == 600
    assert planned.spec.template.spec.containers[0].image_pull_policy == "IfNotPresent"
    with pytest.raises(ApiException, match="not found"):
        web.read()


def test_the_first_apply_owns_exactly_what_it_names(web: Applier) -> None:
    created = web.apply(deployment())
    container = {
        ".": {},
        "f:name": {},
        "f:image": {},
        "f:ports": {'k:{"containerPort":8080,"protocol":"TCP"}': {".": {}, "f:containerPort": {}}},
        "f:resources": {"f:limits": {"f:nvidia.com/gpu": {}}},
    }
    template = {
        "f:metadata": {"f:labels": {"f:app": {}}},
        "f:spec": {"f:containers": {'k:{"name":"c"}': container}},
    }
    assert owners(created)["m1"] == {
        "f:metadata": {"f:labels": {"f:app": {}}},
        "f:spec": {"f:replicas": {}, "f:selector": {}, "f:template": template},
    }


def test_a_second_apply_of_the_same_changes_nothing(web: Applier) -> None:
    web.apply(deployment())
    before = web.read()
    after = web.apply(deployment())
    assert after.metadata.generation == before.metadata.generation == 1
    assert owners(after) == owners(before)


def test_a_conflict_names_the_other_manager_and_the_field(web: Applier) -> None:
    web.apply(deployment())
    with pytest.raises(ApiException) as refused:
        web.apply(deployment(image="web:2"), "m2")
    assert refused.value.status == 409
    assert f'"message":"Apply failed with 1 conflict: conflict with \\"m1\\": {IMAGE}'.replace(
        '"c"', '\\"c\\"'
    ) in refused.value.body.replace('": "', '":"')


def test_several_conflicts_are_listed_by_manager(api: Connection, namespace: str, web: Applier) -> None:
    web.apply(deployment())
    other = deployment(image="web:2")
    other["spec"]["replicas"] = 3
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/web?fieldManager=m2"
    body = api.request("PATCH", path, other, APPLY).body
    assert body["message"] == (f'Apply failed with 2 conflicts: conflicts with "m1":\n- .spec.replicas\n- {IMAGE}')
    assert {each["field"] for each in body["details"]["causes"]} == {".spec.replicas", IMAGE}
    assert {each["reason"] for each in body["details"]["causes"]} == {"FieldManagerConflict"}


def test_force_takes_the_field_and_the_ownership(web: Applier) -> None:
    web.apply(deployment())
    forced = web.apply(deployment(image="web:2"), "m2", force=True)
    containers = {
        name: fields["f:spec"]["f:template"]["f:spec"]["f:containers"]['k:{"name":"c"}']
        for name, fields in owners(forced).items()
    }
    assert forced.metadata.generation == 2
    assert "f:image" in containers["m2"]
    assert "f:image" not in containers["m1"]


def test_a_field_that_nobody_owns_any_more_goes(web: Applier) -> None:
    web.apply(deployment(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]))
    after = web.apply(deployment(env=[{"name": "B", "value": "2"}]))
    assert [each.name for each in after.spec.template.spec.containers[0].env] == ["B"]
    after = web.apply(deployment())
    assert not after.spec.template.spec.containers[0].env


def test_a_field_that_another_manager_owns_stays(web: Applier) -> None:
    web.apply(deployment(env=[{"name": "A", "value": "1"}]))
    web.apply(deployment(env=[{"name": "A", "value": "1"}]), "m2")
    after = web.apply(deployment())
    assert [each.name for each in after.spec.template.spec.containers[0].env] == ["A"]


def test_a_default_comes_back_when_its_owner_drops_the_field(web: Applier) -> None:
    slow = deployment()
    slow["spec"]["progressDeadlineSeconds"] = 1800
    web.apply(slow)
    assert web.apply(deployment()).spec.progress_deadline_seconds == 600


def test_replicas_that_somebody_else_scaled_are_a_conflict_that_names_them(
    api: Connection, namespace: str, web: Applier
) -> None:
    web.apply(deployment())
    api.apps.patch_namespaced_deployment("web", namespace, {"spec": {"replicas": 2}}, field_manager="scaler")
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/web?fieldManager=m1"
    message = api.request("PATCH", path, deployment(), APPLY).body["message"]
    assert message == 'Apply failed with 1 conflict: conflict with "scaler" using apps/v1: .spec.replicas'


def test_an_apply_needs_a_field_manager(api: Connection, namespace: str) -> None:
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/web"
    answer = api.request("PATCH", path, deployment(), APPLY)
    assert answer.status == 422
    assert answer.body["message"] == (
        'PatchOptions.meta.k8s.io "" is invalid: fieldManager: Required value: is required for apply patch'
    )


def test_an_unknown_field_is_an_error_of_the_server(api: Connection, namespace: str) -> None:
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/web?fieldManager=m1"
    answer = api.request("PATCH", path, deployment(imagee="x"), APPLY)
    assert answer.status == 500
    assert answer.body["message"] == (
        "failed to create typed patch object (/web; apps/v1, Kind=Deployment): "
        '.spec.template.spec.containers[name="c"].imagee: field not declared in schema'
    )


def test_yaml_is_understood(api: Connection, namespace: str) -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: m\ndata:\n  a: '1'\n"
    path = f"/api/v1/namespaces/{namespace}/configmaps/m?fieldManager=m1"
    assert [api.request("PATCH", path, text, APPLY).status for _ in range(2)] == [201, 200]


def test_an_update_takes_ownership_from_the_applier(api: Connection, namespace: str, web: Applier) -> None:
    web.apply(deployment())
    api.apps.patch_namespaced_deployment("web", namespace, {"spec": {"replicas": 2}}, field_manager="scaler")
    managers = {each.manager: each.fields_v1 for each in web.read().metadata.managed_fields}
    assert "f:replicas" not in managers["m1"]["f:spec"]
    assert managers["scaler"] == {"f:spec": {"f:replicas": {}}}
