"""The stand-in for Google's control plane, held to what the real one answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import Conflict, NotFound
from google.auth.credentials import AnonymousCredentials
from google.cloud import container_v1, resourcemanager_v3, service_usage_v1

from sandbox.google_apis import Delays, GoogleApisServer

PROJECT = "rehearsal-project"
NUMBER = "123456789012"
REGION = "u-france-east1"
EMAIL = f"gemma-gsa@{PROJECT}.iam.gserviceaccount.com"
POOL = f"{PROJECT}.svc.id.goog"
ACCOUNTS = f"/v1/projects/{PROJECT}/serviceAccounts"
LOCATION = f"/v1/projects/{PROJECT}/locations/{REGION}"
CLUSTERS = f"{LOCATION}/clusters"
AUTOPILOT = {"cluster": {"name": "llm", "autopilot": {"enabled": True}, "releaseChannel": {"channel": "RAPID"}}}
AT_ONCE = Delays(cluster_creation_s=0.0, cluster_change_s=0.0, node_pool_s=0.0, api_enable_s=0.0, iam_propagation_s=0.0)
NEVER = Delays(cluster_creation_s=1e6, cluster_change_s=1e6, node_pool_s=1e6, api_enable_s=1e6, iam_propagation_s=1e6)


class Api:
    """A server and a plain HTTP client for it: what curl would see."""

    def __init__(self, server: GoogleApisServer) -> None:
        self.server = server
        self.session = requests.Session()

    def __call__(self, method: str, path: str, body: Any = None, **query: str) -> requests.Response:
        return self.session.request(method, self.server.url + path, json=body, params=query, timeout=60)

    def create_account(self, name: str = "gemma-gsa") -> None:
        assert self("POST", ACCOUNTS, {"accountId": name, "serviceAccount": {"displayName": name}}).status_code == 200

    def create_cluster(self, body: dict[str, Any] = AUTOPILOT) -> None:
        assert self("POST", CLUSTERS, body).status_code == 200


ServerMaker = Callable[..., Api]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServerMaker]:
    started: list[GoogleApisServer] = []

    def make(delays: Delays = AT_ONCE, root: str = "state", **options: Any) -> Api:
        started.append(GoogleApisServer(root=tmp_path / root, delays=delays, **options).start())
        return Api(started[-1])

    yield make
    for server in started:
        server.stop()


@pytest.fixture
def api(serve: ServerMaker) -> Api:
    return serve()


def holds(found: Any, expected: Any) -> bool:
    """Whether `found` has everything of `expected`; a trailing `…` in an expected text means `starts with`."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and holds(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) >= len(expected) and all(map(holds, found, expected))
    if isinstance(expected, str) and expected.endswith("…"):
        return isinstance(found, str) and found.startswith(expected[:-1])
    return bool(found == expected)


def legacy(code: int, status: str, reason: str, message: str) -> dict[str, Any]:
    """An error body with the older `errors` list."""
    errors = [{"domain": "global", "message": message, "reason": reason}]
    return {"error": {"code": code, "status": status, "message": message, "errors": errors}}


CONTRACT: dict[str, tuple[str, str, Any, int, Any]] = {
    "a service account that is unknown": (
        "GET",
        f"{ACCOUNTS}/nobody@{PROJECT}.iam.gserviceaccount.com",
        None,
        404,
        legacy(404, "NOT_FOUND", "notFound", "Unknown service account"),
    ),
    "a service account by its e-mail in any project": (
        "GET",
        f"/v1/projects/-/serviceAccounts/{EMAIL}",
        None,
        200,
        {"email": EMAIL, "name": f"projects/{PROJECT}/serviceAccounts/{EMAIL}", "projectId": PROJECT},
    ),
    "a service account that exists": (
        "POST",
        ACCOUNTS,
        {"accountId": "gemma-gsa"},
        409,
        legacy(
            409,
            "ALREADY_EXISTS",
            "alreadyExists",
            f"Service account gemma-gsa already exists within project projects/{PROJECT}.",
        ),
    ),
    "a service account's name that is too short": (
        "POST",
        ACCOUNTS,
        {"accountId": "gsa"},
        400,
        {"error": {"code": 400, "status": "INVALID_ARGUMENT"}},
    ),
    "an unknown field of a service account": (
        "POST",
        ACCOUNTS,
        {"accountId": "another-gsa", "serviceAccount": {"labels": {}}},
        400,
        {
            "error": {
                "message": "Invalid JSON payload received. Unknown name \"labels\" at 'service_account': "
                "Cannot find field."
            }
        },
    ),
    "a service account's change": (
        "PATCH",
        f"{ACCOUNTS}/{EMAIL}",
        {"serviceAccount": {"displayName": "New", "etag": "abcdef0123A="}, "updateMask": "display_name"},
        200,
        {"displayName": "New", "name": f"projects/{PROJECT}/serviceAccounts/{EMAIL}"},
    ),
    "undeleting a service account": ("POST", f"{ACCOUNTS}/{EMAIL}:undelete", {}, 501, {"error": {"code": 501}}),
    "the policy of a resource that has none": ("POST", f"{ACCOUNTS}/{EMAIL}:getIamPolicy", None, 200, {"etag": "ACAB"}),
    "a stale etag": (
        "POST",
        f"{ACCOUNTS}/{EMAIL}:setIamPolicy",
        {"policy": {"etag": "BwXhqDVIFXo=", "bindings": []}},
        409,
        {
            "error": {
                "code": 409,
                "status": "ABORTED",
                "message": "There were concurrent policy changes. Please retry the whole read-modify-write with "
                "exponential backoff.…",
                "errors": [{"reason": "aborted"}],
            }
        },
    ),
    "a member of no known type": (
        "POST",
        f"{ACCOUNTS}/{EMAIL}:setIamPolicy",
        {"policy": {"bindings": [{"role": "roles/iam.workloadIdentityUser", "members": ["somebody"]}]}},
        400,
        {"error": {"message": "The member somebody is of an unknown type.…"}},
    ),
    "a role that does not fit the resource": (
        "POST",
        f"{ACCOUNTS}/{EMAIL}:setIamPolicy",
        {"policy": {"bindings": [{"role": "roles/storage.objectViewer", "members": ["user:a@example.com"]}]}},
        400,
        {"error": {"message": "Role roles/storage.objectViewer is not supported for this resource."}},
    ),
    "a workload pool before the first cluster": (
        "POST",
        f"{ACCOUNTS}/{EMAIL}:setIamPolicy",
        {
            "policy": {
                "bindings": [
                    {"role": "roles/iam.workloadIdentityUser", "members": [f"serviceAccount:{POOL}[default/gemma-ksa]"]}
                ]
            }
        },
        400,
        {
            "error": {
                "message": f"Identity Pool does not exist ({POOL}). Please check that you specified a valid "
                "resource name as returned in the `name` attribute in the configuration API."
            }
        },
    ),
    "a service account in a policy that does not exist": (
        "POST",
        f"/v3/projects/{PROJECT}:setIamPolicy",
        {
            "policy": {
                "bindings": [
                    {"role": "roles/viewer", "members": [f"serviceAccount:nobody@{PROJECT}.iam.gserviceaccount.com"]}
                ]
            }
        },
        400,
        {"error": {"message": f"Service account nobody@{PROJECT}.iam.gserviceaccount.com does not exist."}},
    ),
    "a condition without version 3": (
        "POST",
        f"/v3/projects/{PROJECT}:setIamPolicy",
        {
            "policy": {
                "bindings": [
                    {
                        "role": "roles/viewer",
                        "members": ["user:a@example.com"],
                        "condition": {"title": "t", "expression": "request.time < timestamp('2027-01-01T00:00:00Z')"},
                    }
                ]
            }
        },
        400,
        {"error": {"status": "INVALID_ARGUMENT"}},
    ),
    "a project by its ID": (
        "GET",
        f"/v3/projects/{PROJECT}",
        None,
        200,
        {"name": f"projects/{NUMBER}", "projectId": PROJECT, "state": "ACTIVE"},
    ),
    "a project by its number": ("GET", f"/v3/projects/{NUMBER}", None, 200, {"projectId": PROJECT}),
    "somebody else's project": (
        "GET",
        "/v3/projects/somebody-elses",
        None,
        403,
        {
            "error": {
                "status": "PERMISSION_DENIED",
                "details": [
                    {"reason": "IAM_PERMISSION_DENIED", "metadata": {"permission": "resourcemanager.projects.get"}}
                ],
            }
        },
    ),
    "permissions that the caller has": (
        "POST",
        f"/v3/projects/{PROJECT}:testIamPermissions",
        {"permissions": ["container.clusters.create", "iam.serviceAccounts.create"]},
        200,
        {"permissions": ["container.clusters.create", "iam.serviceAccounts.create"]},
    ),
    "a permission that does not exist": (
        "POST",
        f"/v3/projects/{PROJECT}:testIamPermissions",
        {"permissions": ["container.cluster.create"]},
        400,
        {"error": {"message": "Permission container.cluster.create is not valid for this resource."}},
    ),
    "whether billing is enabled": (
        "GET",
        f"/v1/projects/{PROJECT}/billingInfo",
        None,
        200,
        {"name": f"projects/{PROJECT}/billingInfo", "projectId": PROJECT, "billingEnabled": True},
    ),
    "a service": (
        "GET",
        f"/v1/projects/{PROJECT}/services/container.googleapis.com",
        None,
        200,
        {
            "name": f"projects/{NUMBER}/services/container.googleapis.com",
            "parent": f"projects/{NUMBER}",
            "state": "ENABLED",
        },
    ),
    "a service that does not exist": (
        "POST",
        f"/v1/projects/{PROJECT}/services/nothing.googleapis.com:enable",
        {},
        403,
        {"error": {"status": "PERMISSION_DENIED"}},
    ),
    "a cluster that is unknown": (
        "GET",
        f"{CLUSTERS}/nothing",
        None,
        404,
        legacy(404, "NOT_FOUND", "notFound", f"Not found: projects/{PROJECT}/locations/{REGION}/clusters/nothing."),
    ),
    "a zonal cluster that is unknown": (
        "GET",
        f"/v1/projects/{PROJECT}/locations/{REGION}-a/clusters/nothing",
        None,
        404,
        legacy(404, "NOT_FOUND", "notFound", f"Not found: projects/{PROJECT}/zones/{REGION}-a/clusters/nothing."),
    ),
    "a location that is unknown": (
        "GET",
        f"/v1/projects/{PROJECT}/locations/mars-north1/clusters",
        None,
        403,
        {"error": {"message": "Permission denied on 'locations/mars-north1' (or it may not exist)."}},
    ),
    "an unknown field deep in a cluster": (
        "POST",
        CLUSTERS,
        {"cluster": {"name": "llm", "nodePools": [{"name": "gpu", "config": {"gpus": 8}}]}},
        400,
        {
            "error": {
                "status": "INVALID_ARGUMENT",
                "message": "Invalid JSON payload received. Unknown name \"gpus\" at 'cluster.node_pools[0].config': "
                "Cannot find field.",
            }
        },
    ),
    "an enum value that does not exist": (
        "POST",
        CLUSTERS,
        {"cluster": {"name": "llm", "releaseChannel": {"channel": "FAST"}}},
        400,
        {"error": {"message": "Invalid value at 'cluster.release_channel.channel'…"}},
    ),
    "a cluster's name that GKE refuses": (
        "POST",
        CLUSTERS,
        {"cluster": {"name": "LLM", "autopilot": {"enabled": True}}},
        400,
        {"error": {"message": 'Invalid value for field "cluster.name": "LLM".…'}},
    ),
    "an Autopilot cluster in a zone": (
        "POST",
        f"/v1/projects/{PROJECT}/locations/{REGION}-a/clusters",
        AUTOPILOT,
        400,
        {"error": {"message": "Autopilot clusters must be regional clusters."}},
    ),
    "a Standard cluster without nodes": (
        "POST",
        CLUSTERS,
        {"cluster": {"name": "llm"}},
        400,
        {"error": {"message": "Cluster.initial_node_count must be greater than zero."}},
    ),
    "a version that GKE does not offer": (
        "POST",
        CLUSTERS,
        {"cluster": {"name": "llm", "initialNodeCount": 1, "initialClusterVersion": "1.9"}},
        400,
        {"error": {"message": 'No valid versions with the prefix "1.9" found.'}},
    ),
    "another project's workload pool": (
        "POST",
        CLUSTERS,
        {
            "cluster": {
                "name": "llm",
                "initialNodeCount": 1,
                "workloadIdentityConfig": {"workloadPool": "other.svc.id.goog"},
            }
        },
        400,
        {"error": {"status": "INVALID_ARGUMENT"}},
    ),
    "an operation that is unknown": (
        "GET",
        f"{LOCATION}/operations/operation-1",
        None,
        404,
        {"error": {"status": "NOT_FOUND"}},
    ),
    "the versions on offer": (
        "GET",
        f"{LOCATION}/serverConfig",
        None,
        200,
        {"channels": [{"channel": "RAPID", "defaultVersion": "1.36…"}]},
    ),
    "a machine type": (
        "GET",
        f"/compute/v1/projects/{PROJECT}/zones/{REGION}-a/machineTypes/a3-edgegpu-8g-nolssd",
        None,
        200,
        {"guestCpus": 208, "accelerators": [{"guestAcceleratorType": "nvidia-h100-80gb", "guestAcceleratorCount": 8}]},
    ),
    "a machine type that does not exist": (
        "GET",
        f"/compute/v1/projects/{PROJECT}/zones/{REGION}-a/machineTypes/a9",
        None,
        404,
        {"error": {"message": f"The resource 'projects/{PROJECT}/zones/{REGION}-a/machineTypes/a9' was not found"}},
    ),
    "a filter that Compute Engine refuses": (
        "GET",
        f"/compute/v1/projects/{PROJECT}/aggregated/disks?filter=owner",
        None,
        400,
        {"error": {"message": "Invalid value for field 'filter': 'owner'. Invalid list filter expression."}},
    ),
    "a query parameter that does not exist": (
        "GET",
        f"{CLUSTERS}?owner=me",
        None,
        400,
        {"error": {"message": 'Invalid JSON payload received. Unknown name "owner": Cannot bind query parameter.…'}},
    ),
    "a part of an answer": ("GET", f"{CLUSTERS}?fields=clusters.name", None, 501, {"error": {"code": 501}}),
}


@pytest.mark.parametrize("case", CONTRACT)
def test_answers_as_google_does(api: Api, case: str) -> None:
    method, path, body, status, expected = CONTRACT[case]
    api.create_account()

    answer = api(method, path, body)

    assert (answer.status_code, holds(answer.json(), expected)) == (status, True), answer.text
    assert answer.headers["Content-Type"] == "application/json; charset=UTF-8"


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/nothing"), ("PUT", ACCOUNTS), ("GET", "/v2/projects")])
def test_an_unknown_route_gets_googles_404_page(api: Api, method: str, path: str) -> None:
    answer = api(method, path)

    assert answer.status_code == 404
    assert answer.headers["Content-Type"].startswith("text/html")
    assert f"The requested URL <code>{path}</code> was not found" in answer.text


def test_a_body_that_is_not_json_is_refused(api: Api) -> None:
    answer = api.session.post(f"{api.server.url}{CLUSTERS}", data="name: llm", timeout=60)

    assert (answer.status_code, answer.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")


DENIALS = {
    "iam.serviceAccounts.create": ("POST", ACCOUNTS, {"accountId": "gemma-gsa"}, "iam.serviceAccounts.create"),
    "container.clusters.create": (
        "POST",
        CLUSTERS,
        AUTOPILOT,
        'Required "container.clusters.create" permission(s) for',
    ),
    "compute.regions.get": (
        "GET",
        f"/compute/v1/projects/{PROJECT}/regions/{REGION}",
        None,
        f"Required 'compute.regions.get' permission for 'projects/{PROJECT}/regions/{REGION}'",
    ),
    "serviceusage.services.enable": (
        "POST",
        f"/v1/projects/{PROJECT}/services/container.googleapis.com:enable",
        {},
        "Permission denied to enable service [container.googleapis.com]",
    ),
}


@pytest.mark.parametrize("permission", DENIALS)
def test_a_missing_permission_is_named_in_the_words_of_its_api(serve: ServerMaker, permission: str) -> None:
    method, path, body, message = DENIALS[permission]
    api = serve(denied_permissions=[permission])

    answer = api(method, path, body)
    tested = api("POST", f"/v3/projects/{PROJECT}:testIamPermissions", {"permissions": [permission]})

    assert (answer.status_code, answer.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
    assert message in answer.json()["error"]["message"]
    assert tested.json() == {}


def test_an_api_that_is_not_enabled_says_so_until_it_is(serve: ServerMaker) -> None:
    api = serve(enabled_services=["serviceusage.googleapis.com"])

    refused = api("GET", CLUSTERS)
    operation = api(
        "POST", f"/v1/projects/{PROJECT}/services:batchEnable", {"serviceIds": ["container.googleapis.com"]}
    ).json()
    done = api("GET", f"/v1/{operation['name']}").json()

    error = refused.json()["error"]
    assert refused.status_code == 403
    assert error["message"].startswith(f"Kubernetes Engine API has not been used in project {NUMBER} before")
    assert error["details"][1] == {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": "SERVICE_DISABLED",
        "domain": "googleapis.com",
        "metadata": {"service": "container.googleapis.com", "consumer": f"projects/{NUMBER}"},
    }
    assert done["done"]
    assert done["response"]["services"][0]["state"] == "ENABLED"
    assert api("GET", CLUSTERS).status_code == 200


@pytest.mark.parametrize(
    ("universe", "project", "email"),
    [
        ("googleapis.com", "my-project", "gemma-gsa@my-project.iam.gserviceaccount.com"),
        ("s3nsapis.fr", "my-project", "gemma-gsa@my-project.s3ns.iam.gserviceaccount.com"),
        ("s3nsapis.fr", "example.com:my-project", "gemma-gsa@my-project.example.com.s3ns.iam.gserviceaccount.com"),
        ("googleapis.com", "example.com:my-project", "gemma-gsa@my-project.example.com.iam.gserviceaccount.com"),
    ],
)
def test_an_email_follows_from_universe_and_project(
    serve: ServerMaker, universe: str, project: str, email: str
) -> None:
    api = serve(universe_domain=universe, project=project)

    made = api("POST", f"/v1/projects/{project}/serviceAccounts", {"accountId": "gemma-gsa"}).json()

    assert made["email"] == email
    assert api("GET", f"/v1/projects/{project}/serviceAccounts/{email}").json() == made
    assert api("POST", f"/v3/projects/{project}:getIamPolicy", {}).status_code == 200


def test_a_new_service_account_cannot_be_read_at_once(serve: ServerMaker) -> None:
    api = serve(NEVER)
    api.create_account()

    assert api("GET", f"{ACCOUNTS}/{EMAIL}").status_code == 404
    assert api("POST", ACCOUNTS, {"accountId": "gemma-gsa"}).status_code == 409


def test_a_deleted_account_stays_in_policies_as_deleted(api: Api) -> None:
    api.create_account()
    unique_id = api("GET", f"{ACCOUNTS}/{EMAIL}").json()["uniqueId"]
    policy = {"bindings": [{"role": "roles/viewer", "members": [f"serviceAccount:{EMAIL}"]}]}
    api("POST", f"/v3/projects/{PROJECT}:setIamPolicy", {"policy": policy})

    assert api("DELETE", f"{ACCOUNTS}/{EMAIL}").json() == {}

    found = api("POST", f"/v3/projects/{PROJECT}:getIamPolicy", {}).json()
    assert found["bindings"][0]["members"] == [f"deleted:serviceAccount:{EMAIL}?uid={unique_id}"]
    assert api("DELETE", f"{ACCOUNTS}/{EMAIL}").status_code == 404


def test_below_version_3_a_condition_is_hidden_and_its_role_marked(api: Api) -> None:
    condition = {"title": "until", "expression": "request.time < timestamp('2027-01-01T00:00:00Z')"}
    binding = {"role": "roles/viewer", "members": ["user:a@example.com"], "condition": condition}
    path = f"/v3/projects/{PROJECT}"
    api("POST", f"{path}:setIamPolicy", {"policy": {"version": 3, "bindings": [binding]}})

    old = api("POST", f"{path}:getIamPolicy", {}).json()
    new = api("POST", f"{path}:getIamPolicy", {"options": {"requestedPolicyVersion": 3}}).json()

    assert (old["version"], old["bindings"][0].keys()) == (1, {"role", "members"})
    assert old["bindings"][0]["role"].startswith("roles/viewer_withcond_")
    assert (new["version"], new["bindings"]) == (3, [binding])


def test_a_cluster_is_made_by_an_operation_with_stages(serve: ServerMaker) -> None:
    api = serve(NEVER, kubernetes_endpoint="127.0.0.1:6443", kubernetes_ca_pem="PEM")

    operation = api("POST", CLUSTERS, AUTOPILOT).json()
    running = api("GET", f"{LOCATION}/operations/{operation['name']}").json()
    cluster = api("GET", f"{CLUSTERS}/llm").json()

    assert operation.keys() >= {"name", "operationType", "selfLink", "startTime", "status", "targetLink", "zone"}
    assert (operation["operationType"], operation["status"]) == ("CREATE_CLUSTER", "RUNNING")
    assert operation["targetLink"].endswith(f"/v1/projects/{NUMBER}/locations/{REGION}/clusters/llm")
    assert [metric["name"] for metric in running["progress"]["metrics"]][:2] == [
        "CLUSTER_CONFIGURING",
        "CLUSTER_CONFIGURING_TOTAL",
    ]
    assert (cluster["status"], "endpoint" in cluster) == ("PROVISIONING", False)


def test_a_finished_cluster_has_what_connects_to_it(serve: ServerMaker) -> None:
    api = serve()
    api.server.connect_cluster("127.0.0.1:6443", "PEM")

    operation = api("POST", CLUSTERS, AUTOPILOT).json()
    done = api("GET", f"{LOCATION}/operations/{operation['name']}").json()
    cluster = api("GET", f"{CLUSTERS}/llm").json()

    assert done["status"] == "DONE"
    assert [int(metric["intValue"]) for metric in done["progress"]["metrics"]] == [8, 8, 12, 12, 1, 2]
    assert holds(
        cluster,
        {
            "status": "RUNNING",
            "endpoint": "127.0.0.1:6443",
            "masterAuth": {"clusterCaCertificate": "UEVN"},
            "autopilot": {"enabled": True},
            "releaseChannel": {"channel": "RAPID"},
            "workloadIdentityConfig": {"workloadPool": POOL},
            "addonsConfig": {"gcsFuseCsiDriverConfig": {"enabled": True}},
            "currentMasterVersion": "1.36…",
        },
    )


def test_a_busy_cluster_refuses_a_second_operation(serve: ServerMaker) -> None:
    api = serve(NEVER)
    name = api("POST", CLUSTERS, AUTOPILOT).json()["name"]

    answer = api("DELETE", f"{CLUSTERS}/llm")

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        f"Operation {name} is currently creating cluster llm. Please wait and try again once it is done."
    )
    assert answer.json()["error"]["details"][0]["reason"] == "CLUSTER_ALREADY_HAS_OPERATION"


def test_a_cancelled_operation_is_aborted(serve: ServerMaker) -> None:
    api = serve(NEVER)
    name = api("POST", CLUSTERS, AUTOPILOT).json()["name"]

    assert api("POST", f"{LOCATION}/operations/{name}:cancel", {}).json() == {}

    done = api("GET", f"{LOCATION}/operations/{name}").json()
    assert (done["status"], done["error"]) == ("DONE", {"code": 1, "message": "Operation was cancelled."})
    assert api("GET", f"{CLUSTERS}/llm").json()["status"] == "ERROR"


def test_an_autopilot_cluster_lets_nobody_touch_its_node_pools(api: Api) -> None:
    api.create_cluster()

    answer = api("POST", f"{CLUSTERS}/llm/nodePools", {"nodePool": {"name": "gpu"}})

    assert answer.json()["error"]["message"] == "Autopilot node pools cannot be accessed or modified."


def gpu_pool(nodes: int) -> dict[str, Any]:
    accelerators = [{"acceleratorType": "nvidia-h100-80gb", "acceleratorCount": "8"}]
    config = {"machineType": "a3-highgpu-8g", "accelerators": accelerators}
    return {"nodePool": {"name": "gpu", "initialNodeCount": nodes, "locations": [f"{REGION}-a"], "config": config}}


def test_gpu_node_pools_count_against_the_regions_quota(serve: ServerMaker) -> None:
    api = serve(quotas={"NVIDIA_H100_GPUS": 16})
    api.create_cluster({"cluster": {"name": "llm", "initialNodeCount": 1}})

    too_many = api("POST", f"{CLUSTERS}/llm/nodePools", gpu_pool(3))
    made = api("POST", f"{CLUSTERS}/llm/nodePools", gpu_pool(1)).json()
    region = api("GET", f"/compute/v1/projects/{PROJECT}/regions/{REGION}").json()

    assert too_many.status_code == 403
    assert "\"NVIDIA_H100_GPUS\": request requires '24.0' and is short '8.0'" in too_many.json()["error"]["message"]
    assert made["operationType"] == "CREATE_NODE_POOL"
    assert {"metric": "NVIDIA_H100_GPUS", "limit": 16, "usage": 8.0} in region["quotas"]
    assert api("GET", f"{CLUSTERS}/llm/nodePools/gpu").json()["status"] == "RUNNING"


def test_a_regional_pool_has_its_nodes_in_every_zone(api: Api) -> None:
    api.create_cluster({"cluster": {"name": "llm", "initialNodeCount": 2}})

    assert api("GET", f"{CLUSTERS}/llm").json()["currentNodeCount"] == 6


def test_updates_come_one_at_a_time_except_for_observability(api: Api) -> None:
    api.create_cluster()
    logging = {"componentConfig": {"enableComponents": ["SYSTEM_COMPONENTS"]}}
    monitoring = {"managedPrometheusConfig": {"enabled": True, "autoMonitoringConfig": {"scope": "ALL"}}}

    both = {"desiredLoggingConfig": logging, "desiredMonitoringConfig": monitoring}
    assert api("PUT", f"{CLUSTERS}/llm", {"update": both}).json()["operationType"] == "UPDATE_CLUSTER"
    api("GET", f"{CLUSTERS}/llm")
    mixed = {"desiredLoggingConfig": logging, "desiredReleaseChannel": {"channel": "STABLE"}}
    assert api("PUT", f"{CLUSTERS}/llm", {"update": mixed}).status_code == 400
    assert api("PUT", f"{CLUSTERS}/llm", {"update": {}}).status_code == 400
    assert api("PUT", f"{CLUSTERS}/llm", {"update": {"desiredNodeVersion": "1.36"}}).status_code == 501

    found = api("GET", f"{CLUSTERS}/llm").json()
    assert found["loggingConfig"] == logging
    assert found["monitoringConfig"]["managedPrometheusConfig"]["autoMonitoringConfig"] == {"scope": "ALL"}


def test_enums_travel_as_numbers_when_asked(api: Api) -> None:
    numbers = {"cluster": {"name": "llm", "autopilot": {"enabled": True}, "releaseChannel": {"channel": 1}}}
    query = {"$alt": "json;enum-encoding=int"}

    operation = api("POST", CLUSTERS, numbers, **query).json()

    assert (operation["operationType"], operation["status"]) == (1, 2)
    assert api("GET", f"{CLUSTERS}/llm").json()["releaseChannel"] == {"channel": "RAPID"}


def test_state_and_running_operations_survive_a_restart(serve: ServerMaker) -> None:
    first = serve(Delays(cluster_creation_s=1e6, iam_propagation_s=0.0))
    first.create_account()
    first.create_cluster()
    first.server.stop()

    second = serve()

    assert second("GET", f"{ACCOUNTS}/{EMAIL}").status_code == 200
    assert second("GET", f"{CLUSTERS}/llm").json()["status"] == "PROVISIONING"
    assert len(second("GET", f"{LOCATION}/operations").json()["operations"]) == 1


def test_a_refused_request_leaves_no_trace(api: Api) -> None:
    api.create_account()
    before = api.server.cloud.store.data["service_accounts"]
    policy = {"bindings": [{"role": "roles/viewer", "members": ["user:a@example.com"]}, {"role": "x", "members": []}]}

    assert api("POST", f"{ACCOUNTS}/{EMAIL}:setIamPolicy", {"policy": policy}).status_code == 400

    assert api.server.cloud.store.data["service_accounts"] == before


def grant_workload_identity(api: Api, ksa: str = "gemma-ksa") -> None:
    member = f"serviceAccount:{POOL}[default/{ksa}]"
    policy = {"bindings": [{"role": "roles/iam.workloadIdentityUser", "members": [member]}]}
    assert api("POST", f"{ACCOUNTS}/{EMAIL}:setIamPolicy", {"policy": policy}).status_code == 200


def principal(ksa: str) -> str:
    pool = f"projects/{NUMBER}/locations/global/workloadIdentityPools/{POOL}"
    return f"principal://iam.googleapis.com/{pool}/subject/ns/default/sa/{ksa}"


def test_a_pod_is_its_google_service_account_only_with_annotation_and_binding(api: Api) -> None:
    api.create_account()
    api.create_cluster()
    api("GET", f"{CLUSTERS}/llm")
    annotations = {"iam.gke.io/gcp-service-account": EMAIL}
    identity = api.server.workload_identity

    assert identity("default", "gemma-ksa", annotations) == principal("gemma-ksa")
    grant_workload_identity(api)
    assert identity("default", "gemma-ksa", annotations) == f"serviceAccount:{EMAIL}"
    assert identity("default", "gemma-ksa", {}) == principal("gemma-ksa")
    assert identity("default", "other-ksa", annotations) == principal("other-ksa")


def test_a_grant_is_in_force_only_after_it_has_propagated(api: Api) -> None:
    now = time.time()
    api.server.cloud.clock = lambda: now
    api.create_account()
    api.create_cluster()
    api("GET", f"{CLUSTERS}/llm")
    api.server.cloud.delays.iam_propagation_s = 60.0
    grant_workload_identity(api)
    annotations = {"iam.gke.io/gcp-service-account": EMAIL}

    early = api.server.workload_identity("default", "gemma-ksa", annotations)
    api.server.cloud.clock = lambda: now + 61
    late = api.server.workload_identity("default", "gemma-ksa", annotations)

    assert (early, late) == (principal("gemma-ksa"), f"serviceAccount:{EMAIL}")


def test_the_official_clients_work_against_it(api: Api) -> None:
    options: dict[str, Any] = {
        "credentials": AnonymousCredentials(),
        "client_options": ClientOptions(api_endpoint=api.server.url),
        "transport": "rest",
    }
    gke = container_v1.ClusterManagerClient(**options)
    parent = f"projects/{PROJECT}/locations/{REGION}"
    wanted = container_v1.Cluster(name="llm", autopilot=container_v1.Autopilot(enabled=True))

    operation = gke.create_cluster(parent=parent, cluster=wanted)
    assert gke.get_operation(name=f"{parent}/operations/{operation.name}").status.name == "DONE"
    assert gke.get_cluster(name=f"{parent}/clusters/llm").status.name == "RUNNING"
    assert [cluster.name for cluster in gke.list_clusters(parent=parent).clusters] == ["llm"]
    with pytest.raises(Conflict):
        gke.create_cluster(parent=parent, cluster=wanted)
    with pytest.raises(NotFound):
        gke.get_node_pool(name=f"{parent}/clusters/llm/nodePools/gpu")

    projects = resourcemanager_v3.ProjectsClient(**options)
    assert projects.get_project(name=f"projects/{PROJECT}").name == f"projects/{NUMBER}"
    assert projects.get_iam_policy(resource=f"projects/{PROJECT}").etag

    usage = service_usage_v1.ServiceUsageClient(**options)
    enabled = usage.enable_service(request={"name": f"projects/{PROJECT}/services/compute.googleapis.com"})
    assert enabled.result(timeout=60).service.state == service_usage_v1.State.ENABLED


def test_its_own_process_says_where_it_is_and_ends_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sandbox.google_apis", "--root", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert requests.get(f"{url}/v3/projects/{PROJECT}", timeout=60).status_code == 200
        process.stdin.close()
        assert process.wait(timeout=120) == 0
