import re
from pathlib import Path

import pytest

from rollout.errors import PreflightFailed
from rollout.preflight import (
    AUTO_CREATION_SINCE,
    OPTIONAL_PERMISSIONS,
    CheckState,
    bucket_permissions,
    check_billing,
    check_bucket_permissions,
    check_cluster_version,
    check_gpu_quota,
    check_hub_token,
    check_image,
    check_machine,
    check_node_provisioning,
    check_permissions,
    check_region_accelerator,
    check_services,
    check_streamer,
    check_trial,
    check_vllm_arguments,
    ok,
    require,
    required_permissions,
    required_services,
)
from rollout.serving import Accelerator, ServingSpec
from rollout.target import Cluster, ClusterMode, IdentityMode, NodePool, Target

TARGET = Target.model_validate(
    {
        "name": "t",
        "project": "my-project",
        "region": "u-france-east1",
        "bucket": "my-bucket",
        "universe": {"domain": "s3nsapis.fr"},
    }
)
SERVING = ServingSpec(served_model_name="m")
BY_LABEL = SERVING.model_copy(update={"accelerator": Accelerator(compute_class=None)})


def test_disabled_apis_come_with_the_command_that_enables_them() -> None:
    check = check_services(["container", "iam"], ["container.googleapis.com"], TARGET)
    assert check.state is CheckState.FAILED
    assert "gcloud services enable iam.googleapis.com --project=my-project" in check.resolution


def test_missing_permissions_are_all_named() -> None:
    check = check_permissions(["a.b", "c.d", "e.f"], ["c.d"], TARGET)
    assert check.state is CheckState.FAILED
    assert "a.b, e.f" in check.why


def test_only_what_the_plan_needs_is_asked_for() -> None:
    everything = required_permissions(TARGET, creates_bucket=True, creates_cluster=True, updates_cluster=False)
    assert {"storage.buckets.create", "container.clusters.create", "iam.serviceAccounts.setIamPolicy"} <= set(
        everything
    )
    nothing_new = required_permissions(TARGET, creates_bucket=False, creates_cluster=False, updates_cluster=False)
    assert not {"storage.buckets.create", "container.clusters.create"} & set(nothing_new)


def test_the_workers_custom_roles_hold_exactly_what_the_preflight_asks_for() -> None:
    readme = (
        (Path(__file__).parents[2] / "deployments/worker/README.md").read_text(encoding="utf-8").replace("\\\n", "")
    )
    found = re.findall(r"gcloud iam roles create (\w+) --project=PROJECT --permissions=([\w.,]+)", readme)
    roles = {name: permissions.split(",") for name, permissions in found}
    direct = TARGET.model_copy(update={"identity": IdentityMode.DIRECT})
    on_project = required_permissions(direct, creates_bucket=False, creates_cluster=False, updates_cluster=True)
    with_account = required_permissions(TARGET, creates_bucket=False, creates_cluster=False, updates_cluster=True)
    everything = required_permissions(direct, creates_bucket=True, creates_cluster=True, updates_cluster=True)
    bucket = set(bucket_permissions(direct))
    developer = {"container.deployments.create", "container.services.create"}
    assert roles == {
        "llmRollout": sorted({*on_project, *OPTIONAL_PERMISSIONS}),
        "llmRolloutBucket": sorted(bucket),
        "llmRolloutIdentity": sorted(set(with_account) - set(on_project)),
        "llmRolloutMaker": sorted(set(everything) - set(on_project) - bucket - developer),
    }


def test_rights_on_an_existing_bucket_are_asked_of_the_bucket() -> None:
    wanted = bucket_permissions(TARGET)
    assert check_bucket_permissions(wanted, TARGET).state is CheckState.OK
    check = check_bucket_permissions(set(wanted) - {"storage.buckets.setIamPolicy"}, TARGET)
    assert (check.state, check.why) == (CheckState.FAILED, "missing on gs://my-bucket: storage.buckets.setIamPolicy")
    assert "gs://my-bucket" in check.resolution


def test_what_is_done_in_a_cluster_that_exists_is_not_asked_of_the_project() -> None:
    exists = required_permissions(TARGET, creates_bucket=False, creates_cluster=False, updates_cluster=False)
    assert [name for name in exists if name.startswith("container.")] == ["container.clusters.get"]


def test_direct_identity_needs_no_service_account_api() -> None:
    direct = TARGET.model_copy(update={"identity": IdentityMode.DIRECT})
    assert "iam" not in required_services(direct)
    assert not [
        name
        for name in required_permissions(direct, creates_bucket=False, creates_cluster=False, updates_cluster=False)
        if "iam" in name
    ]


def test_a_kubeconfig_target_asks_nothing_of_gke() -> None:
    target = TARGET.model_copy(update={"cluster": Cluster(mode=ClusterMode.KUBECONFIG)})
    assert required_services(target) == ("storage",)


@pytest.mark.parametrize(
    ("limit", "usage", "state"),
    [(8, 0, CheckState.OK), (8, 7, CheckState.FAILED), (None, None, CheckState.UNKNOWN)],
)
def test_gpu_quota_counts_what_is_in_use(limit: float | None, usage: float | None, state: CheckState) -> None:
    assert check_gpu_quota(2, limit, usage, metric="NVIDIA_H100_GPUS", region="r").state is state


def test_unreadable_billing_is_unknown_and_disabled_billing_fails() -> None:
    assert check_billing(None, TARGET).state is CheckState.UNKNOWN
    assert check_billing(False, TARGET).state is CheckState.FAILED


def test_a_region_without_the_accelerator_names_what_it_has() -> None:
    check = check_region_accelerator("nvidia-h100-80gb", ["nvidia-l4"], "europe-west9")
    assert check.state is CheckState.FAILED
    assert "nvidia-l4" in check.resolution


def test_all_failures_are_shown_at_once() -> None:
    checks = [ok("fine", "yes"), check_billing(False, TARGET), check_permissions(["a.b"], [], TARGET)]
    with pytest.raises(PreflightFailed, match=r"billing.*permissions"):
        require(checks)
    require(checks[:1])


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("1.28.9-gke.1000000", CheckState.FAILED),
        ("1.29.6-gke.1253999", CheckState.FAILED),
        ("1.29.6-gke.1254000", CheckState.OK),
        ("1.30.1-gke.1999999", CheckState.FAILED),
        ("1.30.2-gke.1394000", CheckState.OK),
        ("1.36.1-gke.1182000", CheckState.OK),
        (None, CheckState.UNKNOWN),
        ("", CheckState.UNKNOWN),
    ],
)
def test_loading_from_cloud_storage_needs_a_cluster_of_the_quickstarts_versions(
    version: str | None, state: CheckState
) -> None:
    assert check_cluster_version(version, TARGET).state is state


def standard(pool: NodePool | None = None) -> Target:
    return TARGET.model_copy(update={"cluster": Cluster(mode=ClusterMode.STANDARD, node_pool=pool)})


THREE = SERVING.model_copy(update={"replicas": 3})


@pytest.mark.parametrize(
    ("serving", "target", "version", "auto_provisioning", "state"),
    [
        (SERVING, TARGET, "1.36.1-gke.1", True, CheckState.OK),
        (SERVING, TARGET, "1.30.3-gke.1450999", True, CheckState.FAILED),
        (SERVING, TARGET, None, False, CheckState.UNKNOWN),
        (BY_LABEL, TARGET, None, False, CheckState.OK),
        (BY_LABEL, standard(), "1.36.1-gke.1", False, CheckState.FAILED),
        (SERVING, standard(), "1.33.3-gke.1135999", False, CheckState.FAILED),
        (SERVING, standard(), "1.33.3-gke.1135999", True, CheckState.OK),
        (SERVING, standard(), AUTO_CREATION_SINCE, False, CheckState.OK),
        (SERVING, standard(NodePool()), None, False, CheckState.OK),
        (SERVING, standard(NodePool(accelerator="nvidia-l4")), None, False, CheckState.FAILED),
        (
            SERVING.model_copy(update={"replicas": 3}),
            standard(NodePool(max_nodes=2, accelerator_count=1)),
            None,
            False,
            CheckState.FAILED,
        ),
    ],
)
def test_somebody_must_make_the_nodes(
    serving: ServingSpec, target: Target, version: str | None, auto_provisioning: bool, state: CheckState
) -> None:
    check = check_node_provisioning(serving, target, version=version, auto_provisioning=auto_provisioning)
    assert check.state is state


def test_a_node_pool_that_exists_counts_as_it_is() -> None:
    live = NodePool(accelerator="nvidia-l4")
    check = check_node_provisioning(
        SERVING, standard(NodePool()), version=None, auto_provisioning=False, live_pool=live
    )
    assert check.state is CheckState.FAILED
    assert "nvidia-l4" in check.why


def test_an_image_named_by_a_tag_is_a_warning_with_the_command_that_finds_its_digest() -> None:
    assert check_image("vllm/vllm-openai@sha256:" + "0" * 64).state is CheckState.OK
    check = check_image("vllm/vllm-openai:latest")
    assert check.state is CheckState.WARNING
    assert "gcloud artifacts docker images describe vllm/vllm-openai:latest" in check.resolution


def test_a_wrong_flag_fails_with_its_nearest() -> None:
    assert check_vllm_arguments(SERVING).state is CheckState.OK
    check = check_vllm_arguments(SERVING.model_copy(update={"extra_args": ("--max-num-seq=8", "--enforce-eagre")}))
    assert check.state is CheckState.FAILED
    assert "--enforce-eager" in check.resolution
    assert check_vllm_arguments(SERVING.model_copy(update={"extra_args": ("--block-size=x",)})).state is (
        CheckState.FAILED
    )


@pytest.mark.parametrize(
    ("load_format", "image", "state"),
    [
        (None, "vllm/vllm-openai:v0.9.0", CheckState.NOT_APPLICABLE),
        ("runai_streamer", "vllm/vllm-openai:v0.11.0", CheckState.FAILED),
        ("runai_streamer", "vllm/vllm-openai:v0.11.1", CheckState.OK),
        ("runai_streamer", "example.com/own-image:1", CheckState.UNKNOWN),
    ],
)
def test_the_model_streamer_needs_a_release_that_has_it(load_format: str | None, image: str, state: CheckState) -> None:
    assert check_streamer(SERVING.model_copy(update={"load_format": load_format, "image": image})).state is state


@pytest.mark.parametrize(
    ("from_hub", "secret_named", "token_found", "state"),
    [
        (False, False, False, CheckState.NOT_APPLICABLE),
        (True, False, False, CheckState.WARNING),
        (True, True, True, CheckState.OK),
        (True, True, False, CheckState.FAILED),
    ],
)
def test_pods_that_load_from_the_hub_need_its_token(
    from_hub: bool, secret_named: bool, token_found: bool, state: CheckState
) -> None:
    assert check_hub_token(from_hub=from_hub, secret_named=secret_named, token_found=token_found).state is state


@pytest.mark.parametrize(
    ("pool", "state"),
    [
        (NodePool(), CheckState.OK),
        (NodePool(machine_type="a3-highgpu-1g", accelerator_count=1), CheckState.WARNING),
        (NodePool(machine_type="a3-highgpu-1g", accelerator_count=1, spot=True), CheckState.OK),
    ],
)
def test_small_h100_machines_come_as_spot_alone(pool: NodePool, state: CheckState) -> None:
    assert check_machine(SERVING, standard(pool), on_pool=True).state is state


@pytest.mark.parametrize(
    ("served", "removes_itself", "state"),
    [
        (None, True, CheckState.OK),
        ("google/gemma@abc", False, CheckState.OK),
        ("google/gemma@abc", True, CheckState.FAILED),
    ],
)
def test_a_trial_never_takes_the_place_of_what_serves(
    served: str | None, removes_itself: bool, state: CheckState
) -> None:
    assert check_trial(served, removes_itself=removes_itself).state is state
