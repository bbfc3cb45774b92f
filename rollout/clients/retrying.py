"""Trying again, in one place: how long to wait, and when to give up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from rollout.errors import RolloutError, TransientError
from rollout.report import utc_now

T = TypeVar("T")

FIRST_WAIT_S = 0.5
MAX_WAIT_S = 30.0
MAX_RETRY_AFTER_S = 300.0
"""A server that wants longer than this is treated as down: better an error that people see than a silent run."""

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth another try: https://cloud.google.com/storage/docs/retry-strategy#retryable"""

_NEVER = threading.Event()


def wait_before_retry_s(failures: int, error: TransientError) -> float:
    """Seconds to wait after the `failures`-th failure in a row: the server's wish, or exponential with full jitter.

    Raises:
        RolloutError: the server wishes more than MAX_RETRY_AFTER_S.
    """
    if error.retry_after_s is not None:
        if error.retry_after_s > MAX_RETRY_AFTER_S:
            raise RolloutError(
                f"{error.summary} It asks to be left alone for {error.retry_after_s:.0f} s.",
                where=error.where,
                resolution="Rerun after that time: what was done is kept.",
            ) from error
        return error.retry_after_s
    return random.uniform(0.1, 1.0) * min(FIRST_WAIT_S * 2 ** (failures - 1), MAX_WAIT_S)


def with_retries(
    call: Callable[[], T],
    *,
    attempts: int,
    stop: threading.Event = _NEVER,
    on_retry: Callable[[TransientError], None] | None = None,
) -> T:
    """Call until it succeeds, at most `attempts` times; only `TransientError` is tried again.

    Raises:
        TransientError: of the last attempt, or of the current one once `stop` is set.
        RolloutError: the server wishes to be left alone for longer than we wait.
    """
    failures = 0
    while True:
        try:
            return call()
        except TransientError as error:
            failures += 1
            if failures >= attempts:
                raise
            if stop.wait(wait_before_retry_s(failures, error)):
                raise
            if on_retry is not None:
                on_retry(error)


def transient(
    summary: str, *, where: str = "", resolution: str = "", retry_after: str | float | None = None
) -> TransientError:
    """A `TransientError` that carries the server's Retry-After, given in seconds or as an HTTP date."""
    error = TransientError(summary, where=where, resolution=resolution)
    error.retry_after_s = _seconds(retry_after)
    return error


def _seconds(retry_after: str | float | None) -> float | None:
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(str(retry_after)) - utc_now()).total_seconds())
    except (ValueError, TypeError):
        return None
