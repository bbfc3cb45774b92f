from __future__ import annotations

from typing import Any

import pytest

from rollout.model import ModelFile, PinnedModel
from rollout.objects import (
    INSTANCE_LABEL,
    MANAGED_BY_LABEL,
    ROLLOUT_LABEL,
    WeightsSource,
    hub_token_object,
    is_ours,
    removable,
    scales,
    serving_objects,
    weights_digest,
    with_autoscaled_replicas,
    without_ownership,
)
from rollout.serving import Accelerator, ServingSpec, UpdateStrategy
from rollout.target import Cluster, ClusterMode, IdentityMode, NodePool, Target
from rollout.universe import Universe

TARGET = Target(
    name="here",
    project="my-project",
    region="u-france-east1",
    universe=Universe(domain="s3nsapis.fr"),
    namespace="llm",
    bucket="weights",
    hub_token_secret="hf-token",
)
SERVING = ServingSpec(name="vllm-a", service_name="service-a", app="app-a", served_model_name="a")


def model(weights_bytes: int = 10, sha256: str = "b" * 64, revision: str = "main") -> PinnedModel:
    files = (ModelFile(path="model.safetensors", size_bytes=weights_bytes, sha256=sha256),)
    return PinnedModel(repo_id="org/model", revision=revision, commit_sha="a" * 40, files=files)


def objects(
    serving: ServingSpec = SERVING, target: Target = TARGET, pinned: PinnedModel | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    made = serving_objects(pinned or model(), serving, target, **{"rollout_id": "r1", **options})
    return {item["kind"]: item for item in made}


def container(made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    first: dict[str, Any] = made["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return first


def env(made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container(made)["env"]}


def with_cluster(**settings: Any) -> Target:
    return TARGET.model_copy(update={"cluster": Cluster(**settings)})


@pytest.mark.parametrize(
    ("serving", "target", "kinds"),
    [
        (SERVING, TARGET, "Namespace ComputeClass ServiceAccount Deployment Service PodMonitoring"),
        (
            SERVING,
            TARGET.model_copy(update={"namespace": "default"}),
            "ComputeClass ServiceAccount Deployment Service PodMonitoring",
        ),
        (
            SERVING.model_copy(update={"replicas": 2}),
            with_cluster(observability=False),
            "Namespace ComputeClass ServiceAccount Deployment Service PodDisruptionBudget",
        ),
        (
            SERVING,
            with_cluster(mode=ClusterMode.STANDARD, node_pool=NodePool()),
            "Namespace ServiceAccount Deployment Service PodMonitoring",
        ),
        (SERVING, with_cluster(mode=ClusterMode.KUBECONFIG), "Namespace ServiceAccount Deployment Service"),
    ],
)
def test_the_plan_selects_what_the_target_needs_in_order_of_dependency(
    serving: ServingSpec, target: Target, kinds: str
) -> None:
    assert list(objects(serving, target)) == kinds.split()


@pytest.mark.parametrize(
    ("target", "selector"),
    [
        (TARGET, {"cloud.google.com/compute-class": "a3-edgegpu-8g-nolssd"}),
        (
            with_cluster(mode=ClusterMode.STANDARD, node_pool=NodePool()),
            {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
        ),
        (with_cluster(mode=ClusterMode.KUBECONFIG), {}),
    ],
)
def test_pods_select_the_nodes_that_the_target_makes(target: Target, selector: dict[str, str]) -> None:
    assert objects(target=target)["Deployment"]["spec"]["template"]["spec"]["nodeSelector"] == selector


def test_the_pods_use_the_service_account_that_may_read_the_bucket() -> None:
    made = objects()
    assert made["Deployment"]["spec"]["template"]["spec"]["serviceAccountName"] == "llm-server"
    assert made["ServiceAccount"]["metadata"]["annotations"] == {
        "iam.gke.io/gcp-service-account": "llm-server@my-project.s3ns.iam.gserviceaccount.com"
    }


def test_the_direct_principal_needs_no_annotation() -> None:
    target = TARGET.model_copy(update={"identity": IdentityMode.DIRECT})
    assert objects(target=target)["ServiceAccount"]["metadata"]["annotations"] == {}


def test_the_tutorials_image_keeps_its_entry_point_and_its_environment() -> None:
    made = objects()
    assert container(made)["command"] == ["./entrypoint.sh"]
    assert container(made)["args"][:3] == ["python", "-m", "vllm.entrypoints.api_server"]
    assert env(made)["GCS_URI_ARG_KEY"] == "model"
    assert env(made)["GOOGLE_CLOUD_UNIVERSE_DOMAIN"] == "s3nsapis.fr"


def test_vllms_own_image_is_not_told_its_entry_point_twice() -> None:
    serving = SERVING.model_copy(
        update={
            "image": "vllm/vllm-openai:v0.32.0",
            "command": (),
            "entrypoint": ("vllm", "serve"),
            "load_format": "runai_streamer",
        }
    )
    made = objects(serving)
    assert container(made)["command"] == ["vllm", "serve"]
    assert container(made)["args"][0] == "--host=0.0.0.0"
    assert "--load-format=runai_streamer" in container(made)["args"]
    assert "GCS_URI_ARG_KEY" not in env(made)
    assert env(made)["GOOGLE_CLOUD_UNIVERSE_DOMAIN"] == "s3nsapis.fr"


def test_the_specs_environment_wins() -> None:
    made = objects(SERVING.model_copy(update={"env": {"HF_HUB_ENABLE_HF_TRANSFER": "0", "X": "y"}}))
    assert env(made)["HF_HUB_ENABLE_HF_TRANSFER"] == "0"
    assert env(made)["X"] == "y"
    assert len(env(made)) == len(container(made)["env"])


def test_loading_from_the_hub_pins_the_commit_and_takes_the_token_from_a_secret() -> None:
    made = objects(source=WeightsSource.HUB)
    assert "--model=org/model" in container(made)["args"]
    assert f"--revision={'a' * 40}" in container(made)["args"]
    assert env(made)["HF_TOKEN"] == {"secretKeyRef": {"name": "vllm-a-hf-token", "key": "hf_api_token"}}
    secret = hub_token_object(SERVING, TARGET, "token", rollout_id="r1")
    assert (secret["metadata"]["name"], secret["data"]) == ("vllm-a-hf-token", {"hf_api_token": "dG9rZW4="})


@pytest.mark.parametrize(
    ("weights_bytes", "boot_disk_gib", "expected"),
    [(90 * 2**30, None, "/dev/shm/hf_cache"), (90 * 2**30, 300, None), (90 * 2**30 - 1, None, None)],
)
def test_a_cache_of_90_gib_goes_to_ram_unless_the_boot_disk_is_larger(
    weights_bytes: int, boot_disk_gib: int | None, expected: str | None
) -> None:
    serving = SERVING.model_copy(update={"accelerator": Accelerator(boot_disk_gib=boot_disk_gib)})
    made = objects(serving, pinned=model(weights_bytes), source=WeightsSource.HUB)
    assert env(made).get("HF_HOME") == expected


def test_a_larger_boot_disk_stands_in_the_compute_class() -> None:
    serving = SERVING.model_copy(update={"accelerator": Accelerator(boot_disk_gib=300)})
    priority = objects(serving)["ComputeClass"]["spec"]["priorities"][0]
    assert priority["storage"] == {"bootDiskSize": 300}
    assert "storage" not in objects()["ComputeClass"]["spec"]["priorities"][0]


def test_an_update_keeps_the_old_pod_until_the_new_one_answers() -> None:
    rolling = objects()["Deployment"]["spec"]["strategy"]
    assert rolling == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    recreate = SERVING.model_copy(update={"strategy": UpdateStrategy.RECREATE})
    assert objects(recreate)["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


def test_the_startup_probe_waits_as_long_as_the_rollout_does() -> None:
    probe = container(objects(pinned=model(52_000_000_000)))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800


def test_another_rollout_of_the_same_thing_does_not_restart_the_pods() -> None:
    first, second = objects(rollout_id="r1"), objects(rollout_id="r2")
    assert first["Deployment"]["spec"] == second["Deployment"]["spec"]
    assert first["Deployment"]["metadata"]["labels"][ROLLOUT_LABEL] == "r1"
    assert second["Deployment"]["metadata"]["labels"][ROLLOUT_LABEL] == "r2"


def test_other_weights_under_the_same_path_restart_the_pods() -> None:
    one, other = objects(), objects(pinned=model(sha256="c" * 64))
    assert one["Deployment"]["spec"]["template"] != other["Deployment"]["spec"]["template"]


def test_the_weights_digest_does_not_know_branch_names() -> None:
    assert weights_digest(model(revision="main")) == weights_digest(model(revision="v1"))


def test_two_models_in_one_namespace_share_only_what_is_shared() -> None:
    other = ServingSpec(name="vllm-b", service_name="service-b", app="app-b", served_model_name="b", replicas=2)
    one = {(m["kind"], m["metadata"]["name"]) for m in objects(SERVING.model_copy(update={"replicas": 2})).values()}
    two = {(m["kind"], m["metadata"]["name"]) for m in objects(other).values()}
    assert {kind for kind, _ in one & two} == {"Namespace", "ComputeClass", "ServiceAccount"}


def test_everything_is_marked_as_ours_and_can_be_unmarked() -> None:
    for made in objects().values():
        assert is_ours(made)
        bare = without_ownership(made)
        assert not is_ours(bare)
        assert is_ours(made)
        assert not {MANAGED_BY_LABEL, ROLLOUT_LABEL, INSTANCE_LABEL} & bare["metadata"]["labels"].keys()


def test_teardown_leaves_other_models_and_what_they_share() -> None:
    mine = list(objects().values())
    other = ServingSpec(name="vllm-b", service_name="service-b", app="app-b", served_model_name="b")
    others = [made for made in objects(other).values() if INSTANCE_LABEL in made["metadata"]["labels"]]
    foreign = [without_ownership(made) for made in others]
    assert {made["kind"] for made in removable(mine + others, "vllm-a")} == {"Deployment", "Service", "PodMonitoring"}
    assert removable(mine + foreign, "vllm-a") == tuple(mine)


def test_what_the_cluster_shares_stays_for_a_model_in_another_namespace() -> None:
    mine = list(objects().values())
    going = removable(mine, "vllm-a", [("elsewhere", "vllm-c")])
    assert {made["kind"] for made in mine} - {made["kind"] for made in going} == {"ComputeClass"}


@pytest.mark.parametrize(
    ("manager", "applied"),
    [("llm-rollout", {"replicas": 5}), ("kube-controller-manager", {})],
)
def test_replicas_are_the_autoscalers_once_it_has_set_them(manager: str, applied: dict[str, int]) -> None:
    deployment = objects()["Deployment"]
    autoscaler = {"spec": {"scaleTargetRef": {"kind": "Deployment", "name": "vllm-a"}}}
    assert scales(autoscaler, deployment)
    assert not scales({"spec": {"scaleTargetRef": {"kind": "Deployment", "name": "other"}}}, deployment)

    fields = {"manager": manager, "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    live = {"metadata": {"managedFields": [fields]}, "spec": {"replicas": 5}}
    spec = with_autoscaled_replicas(deployment, live)["spec"]
    assert {key: value for key, value in spec.items() if key == "replicas"} == applied
    assert deployment["spec"]["replicas"] == 1
