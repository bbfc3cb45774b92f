"""What rollouts share: one at a time on a target, and no more GPUs than the operator gives to rollouts.

Both are global concurrency limits of the Prefect server; `llm-rollout bootstrap` makes them. They are leases: a worker
that dies gives its slots back within a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import AcquireConcurrencySlotTimeoutError, ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment

from rollout.capacity import gpus_at_once
from rollout.errors import BadInput, DeadlineExceeded
from rollout.plan import RolloutPlan

LEASE_S = 60.0
"""After so long without a sign of life the slots of a dead run are free again: a rollout that is started again after
a `kill -9` waits no longer than this. The least that Prefect takes; it renews at three quarters of it."""

logger = logging.getLogger("prefect.flow_runs.limits")


def target_limit(target: str) -> str:
    """Name of the limit that lets one flow at a time change a target."""
    return f"target-{target}"


def gpu_limit(target: str) -> str:
    """Name of the limit on the GPUs that rollouts to a target may take at once."""
    return f"gpus-{target}"


@contextmanager
def target_alone(target: str) -> Iterator[None]:
    """Wait until no other flow changes `target`, and keep others out while the block runs."""
    with _slots_of_run(target_limit(target), 1):
        yield


@contextmanager
def target_alone_after(target: str, *, from_deployment: bool, patience_s: float) -> Iterator[None]:
    """`target_alone` for the hook of a run that is over: another process, and no run context.

    Raises DeadlineExceeded if others hold the target for longer than `patience_s`.
    """
    with _slots(target_limit(target), 1, strict=from_deployment, log=logger, patience_s=patience_s):
        yield


@contextmanager
def gpus_of(plan: RolloutPlan) -> Iterator[None]:
    """Wait until the target alone and all GPUs that `plan` holds at its widest point are free for this run.

    Always in this order, so that two rollouts cannot wait for each other.
    """
    with accelerators_of(plan.target.name, gpus_at_once(plan)):
        yield


@contextmanager
def accelerators_of(target: str, count: int) -> Iterator[None]:
    """The same for what has no plan: generated manifests, whose pods have `count` accelerators together."""
    with target_alone(target), _slots_of_run(gpu_limit(target), count):
        yield


@contextmanager
def _slots_of_run(name: str, count: int) -> Iterator[None]:
    with _slots(name, count, strict=deployment.id is not None, log=get_run_logger()):
        yield


@contextmanager
def _slots(
    name: str,
    count: int,
    *,
    strict: bool,
    log: logging.Logger | logging.LoggerAdapter[logging.Logger],
    patience_s: float | None = None,
) -> Iterator[None]:
    """Hold slots of a limit.

    For a deployment a missing limit is a mistake in the set-up, and an error (`strict`): without it, "no limit" would
    be its silent meaning. A run from the command line may have a server of its own, with nobody to share it with.
    Raises BadInput for a limit that is missing or smaller than `count`, DeadlineExceeded after `patience_s`.
    """
    if not strict and not _exists(name):
        yield
        return
    log.info("waiting for %d of the limit %s", count, name)
    with ExitStack() as stack:
        try:
            stack.enter_context(
                # A lease that cannot be renewed must not stop a rollout halfway: the objects' own conflicts protect
                # it too.
                concurrency(
                    name,
                    occupy=count,
                    timeout_seconds=patience_s,
                    lease_duration=LEASE_S,
                    strict=True,
                    raise_on_lease_renewal_failure=False,
                )
            )
        except AcquireConcurrencySlotTimeoutError as error:
            raise DeadlineExceeded(
                f"others hold it for longer than {patience_s:.0f} s.", where=f"limit {name}"
            ) from error
        except ConcurrencySlotAcquisitionError as error:
            raise BadInput(
                f"{count} of it cannot be had: {error}.",
                where=f"limit {name}",
                resolution="Missing limits are made by `llm-rollout bootstrap`; raise one that is too small in the UI"
                " (Concurrency).",
            ) from error
        yield


def _exists(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
    return True
