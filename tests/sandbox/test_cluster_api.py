"""The API server's contract: what a real Kubernetes 1.36 answers to the requests that a rollout makes.

The stories run against the sandbox, or against a real API server where one is configured (see `cluster_support`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, watch
from kubernetes.client import ApiException

from sandbox.cluster import KubernetesServer
from tests.sandbox.cluster_support import HAS_CONTROLLERS, REAL, Connection, api_server, deployment, eventually, sandbox

with_controllers = pytest.mark.skipif(not HAS_CONTROLLERS, reason="needs controllers")
only_ours = pytest.mark.skipif(REAL, reason="needs the sandbox's switches")
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
ANY = object()
"""Stands for any value that is there."""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    with api_server(tmp_path_factory.mktemp("api")) as connection:
        yield connection


@pytest.fixture
def namespace(api: Connection) -> Iterator[str]:
    with api.namespace() as name:
        yield name


@dataclass(frozen=True)
class Step:
    """A request, and what the answer must hold: `expected` is a part of the body, or the whole text."""

    note: str
    request: str
    status: int
    expected: Any = field(default_factory=dict)
    body: Any = None
    content_type: str = "application/json"
    warning: str | None = None


def failure(code: int, reason: str, message: str, **details: Any) -> dict[str, Any]:
    body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message}
    return body | {"reason": reason, "code": code} | ({"details": details} if details else {})


def changed(path: str, value: Any, name: str = "web") -> dict[str, Any]:
    """A Deployment with one place changed, e.g. `spec.template.metadata.labels`."""
    obj = copy.deepcopy(deployment(name))
    *parents, last = path.split(".")
    place: Any = obj
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[last] = value
    return obj


LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
DEPLOYMENTS = "/apis/apps/v1/namespaces/{ns}/deployments"
WEB = f"{DEPLOYMENTS}/web"
CONFIG_MAPS = "/api/v1/namespaces/{ns}/configmaps"
CONTAINER = "spec.template.spec.containers.0"

STORIES: dict[str, list[Step]] = {
    "what is not there is not found": [
        Step(
            "in a namespace that does not exist",
            "POST /apis/apps/v1/namespaces/no-such-place/deployments",
            404,
            failure(404, "NotFound", 'namespaces "no-such-place" not found', name="no-such-place", kind="namespaces"),
            body=deployment(),
        ),
        Step(
            "read",
            f"GET {WEB}",
            404,
            failure(404, "NotFound", 'deployments.apps "web" not found', name="web", group="apps", kind="deployments"),
        ),
        Step(
            "delete",
            f"DELETE {WEB}",
            404,
            failure(404, "NotFound", 'deployments.apps "web" not found', name="web", group="apps", kind="deployments"),
        ),
        Step("a group that is not installed", "GET /apis/nobody.example/v1/things", 404, "404 page not found\n"),
        Step(
            "a kind that the group does not have",
            "GET /apis/apps/v1/namespaces/{ns}/nonsense",
            404,
            {"reason": "NotFound", "message": "the server could not find the requested resource"},
        ),
        Step(
            "a service behind a proxy",
            "GET /api/v1/namespaces/{ns}/services/none:8080/proxy/health",
            404,
            failure(404, "NotFound", 'services "none" not found', name="none", kind="services"),
        ),
    ],
    "a namespace has a name that is a DNS label and is made once": [
        Step(
            "a bad name",
            "POST /api/v1/namespaces",
            422,
            {
                "message": f'Namespace "Bad_Name" is invalid: metadata.name: Invalid value: "Bad_Name": {LABEL_RULE}',
                "reason": "Invalid",
                "details": {
                    "name": "Bad_Name",
                    "kind": "Namespace",
                    "causes": [
                        {
                            "reason": "FieldValueInvalid",
                            "message": f'Invalid value: "Bad_Name": {LABEL_RULE}',
                            "field": "metadata.name",
                        }
                    ],
                },
            },
            body={"metadata": {"name": "Bad_Name"}},
        ),
        Step(
            "again",
            "POST /api/v1/namespaces",
            409,
            failure(409, "AlreadyExists", 'namespaces "{ns}" already exists', name="{ns}", kind="namespaces"),
            body={"metadata": {"name": "{ns}"}},
        ),
        Step(
            "as it is",
            "GET /api/v1/namespaces/{ns}",
            200,
            {
                "metadata": {"labels": {"kubernetes.io/metadata.name": "{ns}"}},
                "spec": {"finalizers": ["kubernetes"]},
                "status": {"phase": "Active"},
            },
        ),
    ],
    "secrets are encoded and accounts annotated": [
        Step(
            "plain text becomes data",
            "POST /api/v1/namespaces/{ns}/secrets",
            201,
            {"data": {"hf_api_token": "aGZfbm90X2FfdG9rZW4="}, "type": "Opaque"},
            body={"metadata": {"name": "hf-secret"}, "stringData": {"hf_api_token": "hf_not_a_token"}},
        ),
        Step(
            "a service account",
            "POST /api/v1/namespaces/{ns}/serviceaccounts",
            201,
            {"kind": "ServiceAccount", "metadata": {"name": "ksa", "uid": ANY, "resourceVersion": ANY}},
            body={"metadata": {"name": "ksa"}},
        ),
        Step(
            "annotated",
            "PATCH /api/v1/namespaces/{ns}/serviceaccounts/ksa",
            200,
            {"metadata": {"annotations": {"iam.gke.io/gcp-service-account": "gsa@p.iam.gserviceaccount.com"}}},
            body={"metadata": {"annotations": {"iam.gke.io/gcp-service-account": "gsa@p.iam.gserviceaccount.com"}}},
            content_type=MERGE,
        ),
    ],
    "a service gets an address and defaults": [
        Step(
            "created",
            "POST /api/v1/namespaces/{ns}/services",
            201,
            {
                "spec": {
                    "ports": [{"protocol": "TCP", "port": 8080, "targetPort": 8080}],
                    "clusterIP": ANY,
                    "type": "ClusterIP",
                    "sessionAffinity": "None",
                    "ipFamilyPolicy": "SingleStack",
                    "internalTrafficPolicy": "Cluster",
                },
                "status": {"loadBalancer": {}},
            },
            body={"metadata": {"name": "svc"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 8080}]}},
        ),
    ],
    "a deployment is refused with a cause for every broken rule": [
        Step(
            "labels that the selector does not match",
            f"POST {DEPLOYMENTS}",
            422,
            {
                "message": 'Deployment.apps "web" is invalid: spec.template.metadata.labels: Invalid value: '
                '{"app":"other"}: `selector` does not match template `labels`',
                "details": {
                    "name": "web",
                    "group": "apps",
                    "kind": "Deployment",
                    "causes": [{"reason": "FieldValueInvalid", "field": "spec.template.metadata.labels"}],
                },
            },
            body=changed("spec.template.metadata.labels", {"app": "other"}),
        ),
        Step(
            "more GPUs requested than allowed",
            f"POST {DEPLOYMENTS}",
            422,
            {
                "message": 'Deployment.apps "web" is invalid: spec.template.spec.containers[0].resources.requests: '
                'Invalid value: "2": must be equal to nvidia.com/gpu limit of 1'
            },
            body=changed(
                f"{CONTAINER}.resources", {"requests": {"nvidia.com/gpu": "2"}, "limits": {"nvidia.com/gpu": "1"}}
            ),
        ),
        Step(
            "an unknown field, strictly",
            f"POST {DEPLOYMENTS}?fieldValidation=Strict",
            400,
            failure(
                400,
                "BadRequest",
                'Deployment in version "v1" cannot be handled as a Deployment: strict decoding error: unknown field '
                '"spec.template.spec.containers[0].imagee"',
            ),
            body=changed(f"{CONTAINER}.imagee", "x"),
        ),
        Step(
            "an unknown field, by default: a warning",
            f"POST {DEPLOYMENTS}?dryRun=All",
            201,
            body=changed(f"{CONTAINER}.imagee", "x"),
            warning='299 - "unknown field \\"spec.template.spec.containers[0].imagee\\""',
        ),
        Step("and a dry run leaves nothing", f"GET {WEB}", 404),
    ],
    "a deployment is patched in every format": [
        Step("created", f"POST {DEPLOYMENTS}", 201, {"metadata": {"generation": 1}}, body=deployment()),
        Step(
            "strategic merge goes by the container's name",
            f"PATCH {WEB}",
            200,
            {
                "metadata": {"generation": 2},
                "spec": {
                    "template": {"spec": {"containers": [{"image": "web:1", "env": [{"name": "A", "value": "1"}]}]}}
                },
            },
            body={
                "spec": {"template": {"spec": {"containers": [{"name": "c", "env": [{"name": "A", "value": "1"}]}]}}}
            },
            content_type=STRATEGIC,
        ),
        Step(
            "JSON patch",
            f"PATCH {WEB}",
            200,
            {"metadata": {"generation": 3}, "spec": {"replicas": 2}},
            body=[{"op": "replace", "path": "/spec/replicas", "value": 2}],
            content_type=JSON_PATCH,
        ),
        Step(
            "a status patch leaves the spec alone",
            f"PATCH {WEB}/status",
            200,
            {"metadata": {"generation": 3}, "spec": {"replicas": 2}},
            body={"spec": {"replicas": 99}, "status": {"observedGeneration": 9}},
            content_type=MERGE,
        ),
        Step(
            "the scale",
            f"GET {WEB}/scale",
            200,
            {
                "kind": "Scale",
                "apiVersion": "autoscaling/v1",
                "spec": {"replicas": 2},
                "status": {"selector": "app=web"},
            },
        ),
        Step("an unknown format", f"PATCH {WEB}", 415, body={}, content_type="application/nonsense"),
        Step(
            "the selector is immutable",
            f"PATCH {WEB}",
            422,
            {
                "message": 'Deployment.apps "web" is invalid: spec.selector: Invalid value: '
                '{"matchLabels":{"app":"changed"}}: field is immutable'
            },
            body={
                "spec": {
                    "selector": {"matchLabels": {"app": "changed"}},
                    "template": {"metadata": {"labels": {"app": "changed"}}},
                }
            },
            content_type=MERGE,
        ),
        Step(
            "a stale update",
            f"PUT {WEB}",
            409,
            failure(
                409,
                "Conflict",
                'Operation cannot be fulfilled on deployments.apps "web": the object has been modified; please apply '
                "your changes to the latest version and try again",
                name="web",
                group="apps",
                kind="deployments",
            ),
            body=deployment() | {"metadata": deployment()["metadata"] | {"resourceVersion": "1"}},
        ),
        Step("a method that the address does not have", f"POST {WEB}", 405, {"reason": "MethodNotAllowed"}, body={}),
    ],
    "lists select by label and come in pages": [
        Step("one", f"POST {CONFIG_MAPS}", 201, body={"metadata": {"name": "a", "labels": {"app": "web"}}}),
        Step("two", f"POST {CONFIG_MAPS}", 201, body={"metadata": {"name": "b", "labels": {"app": "web"}}}),
        Step("three", f"POST {CONFIG_MAPS}", 201, body={"metadata": {"name": "c", "labels": {"app": "db"}}}),
        Step(
            "by label",
            f"GET {CONFIG_MAPS}?labelSelector=app%3Dweb",
            200,
            {
                "kind": "ConfigMapList",
                "metadata": {"resourceVersion": ANY},
                "items": [{"metadata": {"name": "a"}}, {"metadata": {"name": "b"}}],
            },
        ),
        Step(
            "by set",
            f"GET {CONFIG_MAPS}?labelSelector=app+in+(db,x),app!%3Dweb",
            200,
            {"items": [{"metadata": {"name": "c"}}]},
        ),
        Step("by name", f"GET {CONFIG_MAPS}?fieldSelector=metadata.name%3Db", 200, {"items": [{"metadata": {}}]}),
        Step("none", f"GET {CONFIG_MAPS}?labelSelector=app%3Dnone", 200, {"items": []}),
        Step("a page", f"GET {CONFIG_MAPS}?limit=1", 200, {"items": [{"metadata": {}}], "metadata": {"continue": ANY}}),
        Step(
            "a bad selector",
            f"GET {CONFIG_MAPS}?labelSelector=app+in+%28",
            400,
            failure(400, "BadRequest", "unable to parse requirement: found '', expected: ',', ')' or identifier"),
        ),
    ],
}


def filled(value: Any, namespace: str) -> Any:
    if isinstance(value, str):
        return value.replace("{ns}", namespace)
    if isinstance(value, dict):
        return {key: filled(each, namespace) for key, each in value.items()}
    return [filled(each, namespace) for each in value] if isinstance(value, list) else value


def missing(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """What `expected` asks for and `found` does not have."""
    if expected is ANY:
        if not found:
            yield f"{path} is empty"
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key, value in expected.items():
            if key in found:
                yield from missing(value, found[key], f"{path}.{key}")
            else:
                yield f"{path}.{key} is not there"
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from missing(*pair, f"{path}[{index}]")
    elif expected != found:
        yield f"{path}: expected {expected!r}, found {found!r}"


@pytest.mark.parametrize("story", STORIES)
def test_the_api_server_answers_as_kubernetes_does(api: Connection, namespace: str, story: str) -> None:
    for step in STORIES[story]:
        method, path = filled(step.request, namespace).split(" ", 1)
        answer = api.request(method, path, filled(step.body, namespace), step.content_type)
        wrong = list(missing(filled(step.expected, namespace), answer.body))
        assert (answer.status, wrong) == (step.status, []), f"{step.note}: {answer.body}"
        if step.warning is not None:
            assert answer.warning == step.warning, step.note


def test_discovery_names_the_groups_and_kinds_of_a_rollout(api: Connection) -> None:
    assert int(client.VersionApi(api.api_client).get_code().minor.rstrip("+")) >= 30
    groups = {each.name for each in client.ApisApi(api.api_client).get_api_versions().groups}
    assert {"apps", "batch", "autoscaling", "policy", "discovery.k8s.io", "apiextensions.k8s.io"} <= groups
    deployments = {each.name: each for each in api.apps.get_api_resources().resources}["deployments"]
    assert (deployments.kind, deployments.namespaced) == ("Deployment", True)


def test_every_page_of_a_list_is_read_once(api: Connection, namespace: str) -> None:
    for number in range(5):
        api.core.create_namespaced_config_map(namespace, {"metadata": {"name": f"m{number}", "labels": {"app": "p"}}})
    names, token = [], None
    while True:
        page = api.core.list_namespaced_config_map(namespace, limit=2, label_selector="app=p", _continue=token)
        names += [each.metadata.name for each in page.items]
        token = page.metadata._continue
        if not token:
            break
    assert names == ["m0", "m1", "m2", "m3", "m4"]


def test_a_watch_shows_the_changes_after_its_version_and_ends_in_time(api: Connection, namespace: str) -> None:
    version = api.core.list_namespaced_config_map(namespace).metadata.resource_version
    api.core.create_namespaced_config_map(namespace, {"metadata": {"name": "w"}, "data": {"a": "1"}})
    api.core.patch_namespaced_config_map("w", namespace, {"data": {"a": "2"}})
    api.core.delete_namespaced_config_map("w", namespace)
    seen = [
        (event["type"], event["object"].data)
        for event in watch.Watch().stream(
            api.core.list_namespaced_config_map, namespace, resource_version=version, timeout_seconds=1
        )
        if event["object"].metadata.name == "w"
    ]
    assert seen == [("ADDED", {"a": "1"}), ("MODIFIED", {"a": "2"}), ("DELETED", {"a": "2"})]


def test_a_watch_with_a_selector_shows_leaving_as_deletion(api: Connection, namespace: str) -> None:
    first = api.core.create_namespaced_config_map(namespace, {"metadata": {"name": "w", "labels": {"on": "yes"}}})
    api.core.patch_namespaced_config_map("w", namespace, {"metadata": {"labels": {"on": "no"}}})
    stream = watch.Watch().stream(
        api.core.list_namespaced_config_map,
        namespace,
        resource_version=first.metadata.resource_version,
        label_selector="on=yes",
        timeout_seconds=1,
    )
    assert [event["type"] for event in stream] == ["DELETED"]


def test_a_watch_from_the_future_is_silent(api: Connection, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps?watch=1&resourceVersion=99999999&timeoutSeconds=1"
    assert api.request("GET", path).body == ""


@only_ours
def test_a_watch_from_before_the_compaction_gets_gone(tmp_path: Path) -> None:
    with sandbox(tmp_path) as (server, api), api.namespace() as namespace:
        api.core.create_namespaced_config_map(namespace, {"metadata": {"name": "w"}})
        server.compact()
        path = f"/api/v1/namespaces/{namespace}/configmaps?watch=1&resourceVersion=1&timeoutSeconds=5"
        event = api.request("GET", path).body
        assert event["type"] == "ERROR"
        assert (event["object"]["code"], event["object"]["reason"]) == (410, "Expired")


@only_ours
def test_a_watch_with_bookmarks_ends_with_one(tmp_path: Path) -> None:
    with sandbox(tmp_path) as (_, api):
        path = "/api/v1/namespaces/default/secrets?watch=1&allowWatchBookmarks=true&timeoutSeconds=1"
        event = api.request("GET", path).body
        assert event["type"] == "BOOKMARK"
        assert int(event["object"]["metadata"]["resourceVersion"]) > 0


@only_ours
@pytest.mark.parametrize(
    ("fault", "code", "reason"),
    [
        ("answer_gone", 410, "Expired"),
        ("answer_too_large_resource_version", 504, "Timeout"),
        ("answer_unavailable", 503, "ServiceUnavailable"),
    ],
)
def test_a_fault_is_answered_once(tmp_path: Path, fault: str, code: int, reason: str) -> None:
    with sandbox(tmp_path) as (server, api):
        getattr(server.faults, fault)()
        answers = [api.request("GET", "/api/v1/pods?resourceVersion=1001") for _ in range(2)]
        assert [each.status for each in answers] == [code, 200]
        assert answers[0].body["reason"] == reason


@only_ours
def test_a_server_that_went_away_comes_back_with_its_objects(tmp_path: Path) -> None:
    with sandbox(tmp_path) as (server, api):
        api.core.create_namespaced_config_map("default", {"metadata": {"name": "kept"}})
        server.go_away(0.3)
        with pytest.raises(OSError, match=r"refused|reset|closed"):
            api.request("GET", "/readyz")

        def back() -> bool:
            try:
                return api.request("GET", "/api/v1/namespaces/default/configmaps/kept").status == 200
            except OSError:
                return False

        eventually(back, "the server is back")


@only_ours
def test_only_the_right_token_is_let_in(tmp_path: Path) -> None:
    with KubernetesServer(tmp_path, tls=True, token="right") as server:
        api = Connection(server.kubeconfig(tmp_path / "kubeconfig"))
        assert api.request("GET", "/api/v1/pods").status == 200
        assert api.core.list_pod_for_all_namespaces().items == []
        api.token = "wrong"
        wrong = api.request("GET", "/api/v1/pods")
        assert wrong.body == failure(401, "Unauthorized", "Unauthorized")
        api.token = None
        message = 'pods is forbidden: User "system:anonymous" cannot list resource "pods" in API group "" at the '
        anonymous = api.request("GET", "/api/v1/pods")
        assert anonymous.body == failure(403, "Forbidden", message + "cluster scope", kind="pods")


def test_a_deletion_in_the_foreground_waits_for_the_finalizer(api: Connection, namespace: str) -> None:
    api.core.create_namespaced_config_map(namespace, {"metadata": {"name": "m", "finalizers": ["test.example/hold"]}})
    api.core.delete_namespaced_config_map("m", namespace)
    held = api.core.read_namespaced_config_map("m", namespace)
    assert held.metadata.deletion_timestamp is not None
    api.core.patch_namespaced_config_map("m", namespace, {"metadata": {"finalizers": None}})
    with pytest.raises(ApiException, match="not found"):
        api.core.read_namespaced_config_map("m", namespace)


def test_a_deletion_of_another_object_is_refused(api: Connection, namespace: str) -> None:
    api.core.create_namespaced_config_map(namespace, {"metadata": {"name": "m"}})
    with pytest.raises(
        ApiException, match=r"the UID in the precondition \(other\) does not match the UID in record"
    ) as refused:
        api.core.delete_namespaced_config_map("m", namespace, body={"preconditions": {"uid": "other"}})
    assert refused.value.status == 409


@with_controllers
def test_an_owner_deleted_in_the_foreground_goes_after_what_it_owns(api: Connection, namespace: str) -> None:
    idle = deployment()
    idle["spec"]["replicas"] = 0
    api.apps.create_namespaced_deployment(namespace, idle)
    eventually(lambda: api.apps.list_namespaced_replica_set(namespace).items, "a replica set")
    version = api.apps.list_namespaced_deployment(namespace).metadata.resource_version
    answer = api.request("DELETE", f"/apis/apps/v1/namespaces/{namespace}/deployments/web?propagationPolicy=Foreground")
    assert answer.body["kind"] == "Deployment"
    assert answer.body["metadata"]["finalizers"] == ["foregroundDeletion"]
    seen = []
    follow = api.apps.list_namespaced_deployment
    for event in watch.Watch().stream(follow, namespace, resource_version=version, timeout_seconds=30):
        seen.append((event["type"], event["raw_object"]["metadata"].get("finalizers")))
        if event["type"] == "DELETED":
            break
    # The last finalizer's end is the object's: nobody sees it without.
    assert {tuple(finalizers or ()) for _, finalizers in seen} == {("foregroundDeletion",)}
    assert seen[-1][0] == "DELETED"
    assert api.apps.list_namespaced_replica_set(namespace).items == []


@with_controllers
def test_nothing_is_created_in_a_namespace_that_goes_away_and_still_holds_what_it_held(api: Connection) -> None:
    with api.namespace() as name:
        hold = {"metadata": {"name": "m", "finalizers": ["test.example/hold"]}}
        api.core.create_namespaced_config_map(name, hold)
        api.core.create_namespaced_config_map(name, {"metadata": {"name": "plain"}})
        api.core.delete_namespace(name)
        assert api.core.read_namespace(name).status.phase == "Terminating"
        assert api.core.read_namespaced_config_map("plain", name).metadata.deletion_timestamp is None
        late = api.request("POST", f"/api/v1/namespaces/{name}/configmaps", {"metadata": {"name": "late"}})
        message = f'configmaps "late" is forbidden: unable to create new content in namespace {name} '
        assert (late.status, late.body["message"]) == (403, message + "because it is being terminated")
        api.core.patch_namespaced_config_map("m", name, {"metadata": {"finalizers": None}})
        eventually(lambda: api.request("GET", f"/api/v1/namespaces/{name}").status == 404, "the namespace is gone")


@only_ours
def test_custom_resources_hold_to_their_schema(api: Connection) -> None:
    where = ("cloud.google.com", "v1", "computeclasses")
    compute_class = {"apiVersion": "cloud.google.com/v1", "kind": "ComputeClass", "metadata": {"name": "c"}}
    path = "/apis/cloud.google.com/v1/computeclasses"
    refused = api.request("POST", path, compute_class | {"spec": {}})
    assert refused.body["message"] == ('ComputeClass.cloud.google.com "c" is invalid: spec.priorities: Required value')
    spec = {"priorities": [{"machineType": "a3-edgegpu-8g-nolssd"}]}
    created = api.custom.create_cluster_custom_object(*where, compute_class | {"spec": spec})
    assert created["metadata"]["generation"] == 1
    gone = api.custom.delete_cluster_custom_object(*where, "c")
    assert gone["details"] == {
        "name": "c",
        "group": "cloud.google.com",
        "kind": "computeclasses",
        "uid": created["metadata"]["uid"],
    }
    definition = client.ApiextensionsV1Api(api.api_client).read_custom_resource_definition(
        "computeclasses.cloud.google.com"
    )
    assert definition.spec.names.kind == "ComputeClass"


def test_a_collection_is_deleted_by_label(api: Connection, namespace: str) -> None:
    for name, app in (("a", "web"), ("b", "web"), ("c", "db")):
        api.core.create_namespaced_config_map(namespace, {"metadata": {"name": name, "labels": {"app": app}}})
    path = f"/api/v1/namespaces/{namespace}/configmaps?labelSelector=app%3Dweb"
    assert api.request("DELETE", path).status == 200
    left = api.core.list_namespaced_config_map(namespace, label_selector="app")
    assert [each.metadata.name for each in left.items] == ["c"]


def test_the_caller_may_do_what_it_asks_about(api: Connection, namespace: str) -> None:
    wanted = {"verb": "create", "group": "apps", "resource": "deployments", "namespace": namespace}
    review = client.AuthorizationV1Api(api.api_client).create_self_subject_access_review(
        {"spec": {"resourceAttributes": wanted}}
    )
    assert review.status.allowed
