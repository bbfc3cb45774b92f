import pytest

from rollout.errors import PreflightFailed
from rollout.preflight import (
    CheckState,
    check_billing,
    check_gpu_quota,
    check_permissions,
    check_region_accelerator,
    check_services,
    ok,
    require,
    required_permissions,
    required_services,
)
from rollout.target import Cluster, ClusterMode, IdentityMode, Target

TARGET = Target.model_validate(
    {
        "name": "t",
        "project": "my-project",
        "region": "u-france-east1",
        "bucket": "my-bucket",
        "universe": {"domain": "s3nsapis.fr"},
    }
)


def test_disabled_apis_come_with_the_command_that_enables_them() -> None:
    check = check_services(["container", "iam"], ["container.googleapis.com"], TARGET)
    assert check.state is CheckState.FAILED
    assert "gcloud services enable iam.googleapis.com --project=my-project" in check.resolution


def test_missing_permissions_are_all_named() -> None:
    check = check_permissions(["a.b", "c.d", "e.f"], ["c.d"], TARGET)
    assert check.state is CheckState.FAILED
    assert "a.b, e.f" in check.why


def test_only_what_the_plan_needs_is_asked_for() -> None:
    everything = required_permissions(TARGET, creates_bucket=True, creates_cluster=True)
    assert {"storage.buckets.create", "container.clusters.create", "iam.serviceAccounts.setIamPolicy"} <= set(
        everything
    )
    nothing_new = required_permissions(TARGET, creates_bucket=False, creates_cluster=False)
    assert not {"storage.buckets.create", "container.clusters.create"} & set(nothing_new)


def test_direct_identity_needs_no_service_account_api() -> None:
    direct = TARGET.model_copy(update={"identity": IdentityMode.DIRECT})
    assert "iam" not in required_services(direct)
    assert not [
        name for name in required_permissions(direct, creates_bucket=False, creates_cluster=False) if "iam" in name
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
