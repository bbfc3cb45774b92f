"""Preflight: every reason why a rollout could not work, found before anything changes, and shown all at once."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from rollout.errors import PreflightFailed
from rollout.target import ClusterMode, IdentityMode, Target
from rollout.values import Value


class CheckState(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """Could not be asked, e.g. the caller may not read quotas; says so instead of passing."""
    NOT_APPLICABLE = "not applicable"


class Check(Value):
    """One preflight check with its answer."""

    name: str
    state: CheckState
    why: str
    resolution: str = ""


def ok(name: str, why: str) -> Check:
    return Check(name=name, state=CheckState.OK, why=why)


def failed(name: str, why: str, resolution: str) -> Check:
    return Check(name=name, state=CheckState.FAILED, why=why, resolution=resolution)


def warning(name: str, why: str, resolution: str) -> Check:
    return Check(name=name, state=CheckState.WARNING, why=why, resolution=resolution)


def unknown(name: str, why: str, resolution: str = "") -> Check:
    return Check(name=name, state=CheckState.UNKNOWN, why=why, resolution=resolution)


def not_applicable(name: str, why: str) -> Check:
    return Check(name=name, state=CheckState.NOT_APPLICABLE, why=why)


def required_services(target: Target) -> tuple[str, ...]:
    """The Google APIs that a rollout to `target` calls."""
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return ("storage",)
    services = ["container", "storage", "cloudresourcemanager"]
    if target.identity is IdentityMode.SERVICE_ACCOUNT:
        services.append("iam")
    return tuple(services)


def required_permissions(target: Target, *, creates_bucket: bool, creates_cluster: bool) -> tuple[str, ...]:
    """The project permissions that the plan needs, least privilege.

    The tutorial asks for `roles/container.admin` and `roles/iam.serviceAccountAdmin`; these are the permissions of
    those roles (and of Storage Admin) that are used.
    """
    needed: list[str] = []
    if creates_bucket:
        needed.append("storage.buckets.create")
    if target.cluster.mode is not ClusterMode.KUBECONFIG:
        needed += ["container.clusters.get", "container.deployments.create", "container.services.create"]
        if creates_cluster:
            needed += ["container.clusters.create", "container.operations.get", "container.operations.list"]
        if target.identity is IdentityMode.SERVICE_ACCOUNT:
            needed += [
                "iam.serviceAccounts.create",
                "iam.serviceAccounts.get",
                "iam.serviceAccounts.getIamPolicy",
                "iam.serviceAccounts.setIamPolicy",
            ]
    return tuple(needed)


def check_services(required: Iterable[str], enabled: Iterable[str], target: Target) -> Check:
    missing = sorted(set(required) - {name.split(".")[0] for name in enabled})
    if not missing:
        return ok("APIs", "all required APIs are enabled")
    services = " ".join(f"{name}.googleapis.com" for name in missing)  # service IDs are the same in every universe
    return failed(
        "APIs",
        f"not enabled in {target.project}: {', '.join(missing)}",
        f"gcloud services enable {services} --project={target.project} (needs serviceusage.services.enable)",
    )


def check_permissions(required: Iterable[str], granted: Iterable[str], target: Target) -> Check:
    missing = sorted(set(required) - set(granted))
    if not missing:
        return ok("permissions", "the caller has every permission that the plan needs")
    return failed(
        "permissions",
        f"missing on {target.project}: {', '.join(missing)}",
        "Ask for roles/container.admin, roles/iam.serviceAccountAdmin and roles/storage.admin, or a custom role.",
    )


def check_billing(enabled: bool | None, target: Target) -> Check:
    if enabled is None:
        return unknown(
            "billing", "the caller may not read the billing state", "Grant billing.resourceAssociations.list."
        )
    if enabled:
        return ok("billing", f"enabled for {target.project}")
    return failed("billing", f"not enabled for {target.project}", "Link a billing account to the project.")


def check_region_accelerator(accelerator: str, offered: Iterable[str] | None, region: str) -> Check:
    if offered is None:
        return unknown(
            "accelerator in region", "the accelerator list could not be read", "Grant compute.acceleratorTypes.list."
        )
    offered = sorted(set(offered))
    if accelerator in offered:
        return ok("accelerator in region", f"{region} offers {accelerator}")
    return failed(
        "accelerator in region",
        f"{region} does not offer {accelerator}",
        f"It offers {', '.join(offered) or 'no accelerators'}; choose one of these, or another region.",
    )


def check_gpu_quota(needed: int, limit: float | None, usage: float | None, *, metric: str, region: str) -> Check:
    """`needed` GPUs beside the `usage` in force, against the region's `limit`."""
    if limit is None or usage is None:
        return unknown("GPU quota", f"the quota {metric} of {region} could not be read", "Grant compute.regions.get.")
    free = limit - usage
    if needed <= free:
        return ok(
            "GPU quota", f"{needed} of {free:.0f} free GPUs ({metric} in {region}: {usage:.0f} of {limit:.0f} in use)"
        )
    return failed(
        "GPU quota",
        f"the plan needs {needed} GPUs, {free:.0f} are free ({metric} in {region}: {usage:.0f} of {limit:.0f} in use)",
        f"Ask for {needed - free:.0f} more on the Quotas page, or lower replicas.",
    )


def require(checks: Iterable[Check]) -> None:
    """Raise `PreflightFailed` naming every failed check; warnings pass."""
    failures = [check for check in checks if check.state is CheckState.FAILED]
    if failures:
        raise PreflightFailed(
            "; ".join(f"{check.name}: {check.why}" for check in failures),
            where="preflight",
            resolution=" ".join(check.resolution for check in failures),
        )
