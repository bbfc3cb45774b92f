"""What every step shares: retries of transient failures, one artifact, and an outcome for the record.

`step` turns a function that returns an `Outcome` into a Prefect task. `Story` runs steps and keeps the record.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar, cast
from uuid import UUID

import httpx
from prefect import get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.states import State
from prefect.tasks import Task, exponential_backoff

from rollout.errors import RolloutError, TransientError
from rollout.pictures import data_uri
from rollout.report import Change, StepReport, StepStatus, utc_now

P = ParamSpec("P")
T = TypeVar("T")

_attempts: dict[str, int] = {}
"""Attempts per task run. Kept here, because a failed task hands on nothing but its exception, and the server learns of
task runs later than the flow does."""

_started: dict[str, datetime] = {}
"""When a task run's first attempt began: later than it was submitted, if it had to wait for others."""


@contextmanager
def _best_effort(what: str) -> Iterator[None]:
    """Tell the Prefect server something that people want to see, and that no work may fail of: it goes on without."""
    try:
        yield
    except (httpx.HTTPError, PrefectException, OSError) as error:
        get_run_logger().warning(
            "the Prefect server did not take %s, going on without (%s: %s)", what, type(error).__name__, error
        )


@dataclass(frozen=True)
class Artifact:
    """What a step shows in the Prefect UI: a markdown text, a table of rows, or a picture."""

    key: str
    """Lower-case letters, digits and dashes; the same step always uses the same key, so its history lines up."""
    description: str
    markdown: str | None = None
    table: list[dict[str, Any]] | None = None
    png: bytes | None = None

    def publish(self) -> None:
        with _best_effort(f"the artifact {self.key}"):
            if self.table is not None:
                create_table_artifact(table=self.table, key=self.key, description=self.description)
            if self.markdown is not None:
                create_markdown_artifact(markdown=self.markdown, key=self.key, description=self.description)
            if self.png is not None:
                create_image_artifact(image_url=data_uri(self.png), key=self.key, description=self.description)


class ProgressBar:
    """A progress artifact of long work, for a `with` block.

    A thread of its own tells the server, at most once in `every_s`: the work never waits for Prefect, whose client
    tries again for a minute when its server restarts, longer than a claim on the bucket lives.
    """

    def __init__(self, key: str, description: str, *, every_s: float = 1.0) -> None:
        self._key = key
        self._description = description
        self._every_s = every_s
        self._id: UUID | None = None
        self._lock = threading.Lock()
        self._latest: tuple[float, str] | None = None
        self._is_telling = False
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=key)
        # The run's logger and the server's address belong to the context, which a thread does not inherit.
        self._context = contextvars.copy_context()

    def __enter__(self) -> Self:
        self.update(0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the last state, and wait until it is told."""
        self._closing.set()
        self._thread.shutdown()

    def update(self, percent: float, detail: str = "") -> None:
        """Note where the work stands; `detail` is added to the description. Returns at once."""
        with self._lock:
            self._latest = (min(100.0, percent), f"{self._description}: {detail}" if detail else self._description)
            if self._is_telling:
                return
            self._is_telling = True
        self._thread.submit(self._context.run, self._tell)

    def _tell(self) -> None:
        while True:
            with self._lock:
                latest, self._latest = self._latest, None
                if latest is None:
                    self._is_telling = False
                    return
            with _best_effort(f"the progress {self._key}"):
                self._show(*latest)
            self._closing.wait(self._every_s)

    def _show(self, percent: float, description: str) -> None:
        if self._id is None:
            self._id = cast(UUID, create_progress_artifact(percent, key=self._key, description=description))
        else:
            update_progress_artifact(self._id, percent, description)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a step hands on (`value`), and what the record says of it."""

    value: T
    summary: str
    status: StepStatus = StepStatus.DONE
    changes: tuple[Change, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    pictures: tuple[Artifact, ...] = ()


def is_transient(_task: Task[Any, Any], _run: object, state: State[Any]) -> bool:
    """Only transient failures are worth another try; each retry says why it happens."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, TransientError):
        get_run_logger().warning("will be tried again: %s", error)
        return True
    return False


def step(name: str, *, retries: int = 4) -> Callable[[Callable[P, Outcome[T]]], Task[P, Outcome[T]]]:
    """A task called `name` that publishes its artifact and retries transient failures.

    `retries` 4 with exponential back-off from 2 s waits about half a minute in all: longer outages are for a rerun,
    which continues where this one stopped.
    """

    def decorate(function: Callable[P, Outcome[T]]) -> Task[P, Outcome[T]]:
        @task(
            name=name,
            task_run_name=name,
            retries=retries,
            retry_delay_seconds=exponential_backoff(2),
            retry_jitter_factor=0.5,
            retry_condition_fn=is_transient,
            cache_result_in_memory=False,
        )
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Outcome[T]:
            _attempts[str(task_run.id)] = task_run.run_count or 1
            _started.setdefault(str(task_run.id), utc_now())
            outcome = function(*args, **kwargs)
            for artifact in (outcome.artifact, *outcome.pictures):
                if artifact is not None:
                    artifact.publish()
            get_run_logger().info("%s", outcome.summary)
            return outcome

        return run

    return decorate


class Story:
    """Runs steps and keeps their reports; `on_report` is told after each, so that a killed run leaves its story.

    `on_picture` gets the key and the PNG of every picture that a step made.
    """

    def __init__(
        self,
        on_report: Callable[[tuple[StepReport, ...]], None],
        on_picture: Callable[[str, bytes], None] = lambda _key, _png: None,
    ) -> None:
        self._reports: list[StepReport] = []
        self._on_report = on_report
        self.on_picture = on_picture

    @property
    def reports(self) -> tuple[StepReport, ...]:
        return tuple(sorted(self._reports, key=lambda report: report.started_at))

    def run(self, step_task: Task[..., Outcome[T]], *args: Any, **kwargs: Any) -> T:
        """Run a step to its end. Raises what the step raised, after the report of the failure is kept."""
        return self.start(step_task, *args, **kwargs).result()

    def start(
        self, step_task: Task[..., Outcome[T]], *args: Any, after: Iterable[Running[Any]] = (), **kwargs: Any
    ) -> Running[T]:
        """Start a step beside others, as soon as those of `after` have succeeded; `result()` waits for it."""
        future = step_task.submit(*args, wait_for=[each.future for each in after], **kwargs)
        return Running(self, step_task.name, utc_now(), future)

    def join(self, *steps: Running[Any]) -> None:
        """Wait until all `steps` have ended, and raise the first failure; none goes on behind a failure's back."""
        failures = [error for each in steps if (error := each.finish()) is not None]
        if failures:
            raise failures[0]

    def skip(self, name: str, why: str) -> None:
        """Keep in the record that a step was left out, and why."""
        self.keep(StepReport(name=name, status=StepStatus.SKIPPED, started_at=utc_now(), duration_s=0.0, summary=why))

    def keep(self, report: StepReport) -> None:
        self._reports.append(report)
        self._on_report(self.reports)


class Running(Generic[T]):
    """A step under way."""

    def __init__(self, story: Story, name: str, submitted_at: datetime, future: PrefectFuture[Outcome[T]]) -> None:
        self.future = future
        self._story = story
        self._name = name
        self._submitted_at = submitted_at
        self._ended: Outcome[T] | BaseException | None = None

    @property
    def began(self) -> bool:
        """Whether the step ran at all; meaningful once it has been joined."""
        return self._ended is not None

    def result(self) -> T:
        """What the step hands on. Raises what it raised."""
        error = self.finish()
        if error is not None:
            raise error
        if not isinstance(self._ended, Outcome):
            raise RolloutError(f"{self._name} never began, because a step before it failed.", where=self._name)
        return self._ended.value

    def finish(self) -> BaseException | None:
        """Wait for the end and keep the report, once. Returns the failure; None as well for a step that never began."""
        if self._ended is None:
            self.future.wait()
            if self.future.state.name == "NotReady":
                return None
            self._ended = self._keep_report()
        return self._ended if isinstance(self._ended, BaseException) else None

    def _keep_report(self) -> Outcome[T] | BaseException:
        state = self.future.state
        run_id = str(self.future.task_run_id)
        started_at = _started.pop(run_id, self._submitted_at)
        duration_s = max(0.0, ((state.timestamp or utc_now()) - started_at).total_seconds())
        outcome = self.future.result(raise_on_failure=False)
        attempts = _attempts.pop(run_id, 1)
        if isinstance(outcome, Outcome):
            self._story.keep(
                StepReport(
                    name=self._name,
                    status=outcome.status,
                    started_at=started_at,
                    duration_s=duration_s,
                    attempts=attempts,
                    summary=outcome.summary,
                    changes=outcome.changes,
                    data=outcome.data,
                )
            )
            for picture in outcome.pictures:
                if picture.png is not None:
                    self._story.on_picture(picture.key, picture.png)
            return outcome
        error = outcome if isinstance(outcome, BaseException) else RolloutError(f"{self._name} ended as {state.name}")
        self._story.keep(
            StepReport(
                name=self._name,
                status=StepStatus.FAILED,
                started_at=started_at,
                duration_s=duration_s,
                attempts=attempts,
                summary=str(error),
                error=f"{type(error).__name__}: {error}",
            )
        )
        return error
