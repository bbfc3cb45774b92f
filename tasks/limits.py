"""What rollouts share: one at a time on a target, and no more GPUs than the operator gives to rollouts.

Both are global concurrency limits of the Prefect server; `llm-rollout bootstrap` makes them. They are leases: a worker
that dies gives its slots back within a minute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment

from rollout.plan import RolloutPlan

LEASE_S = 60.0
"""After so long without a sign of life the slots of a dead run are free again: a rollout that is started again after
a `kill -9` waits no longer than this. The least that Prefect takes; it renews at three quarters of it."""


def target_limit(target: str) -> str:
    """Name of the limit that lets one flow at a time change a target."""
    return f"target-{target}"


def gpu_limit(target: str) -> str:
    """Name of the limit on the GPUs that rollouts to a target may take at once."""
    return f"gpus-{target}"


@contextmanager
def target_alone(target: str) -> Iterator[None]:
    """Wait until no other flow changes `target`, and keep others out while the block runs."""
    with _slots(target_limit(target), 1):
        yield


@contextmanager
def gpus_of(plan: RolloutPlan) -> Iterator[None]:
    """Wait until the target alone and all GPUs of `plan` are free for this run.

    Always in this order, so that two rollouts cannot wait for each other.
    """
    serving = plan.serving
    with (
        target_alone(plan.target.name),
        _slots(gpu_limit(plan.target.name), serving.replicas * serving.accelerator.count),
    ):
        yield


@contextmanager
def _slots(name: str, count: int) -> Iterator[None]:
    """Hold slots of a limit.

    For a deployment a missing limit is a mistake in the set-up, and an error (`strict`): without it, "no limit" would
    be its silent meaning. A run from the command line may have a server of its own, with nobody to share it with.
    """
    from_deployment = deployment.id is not None
    if not from_deployment and not _exists(name):
        yield
        return
    get_run_logger().info("waiting for %d of the limit %s", count, name)
    # A lease that cannot be renewed must not stop a rollout halfway: the objects' own conflicts protect it too.
    with concurrency(name, occupy=count, lease_duration=LEASE_S, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _exists(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
    return True
