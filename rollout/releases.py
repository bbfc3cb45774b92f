"""Which new commits of followed models deserve a rollout, and when.

Pure; `rollout.clients.releases` has the side effects.

A release passes four questions, in this order: is it new, did anything that is served change (not only the README), is
it a quiet hour, is today's share used up. The first two decide for ever; the last two only put it off, and of several
commits that wait, the newest is announced.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, StringConstraints, model_validator

from rollout.model import PinnedModel
from rollout.objects import weights_digest
from rollout.request import PresetName
from rollout.values import CommitSha, RepoId, Value

RELEASE_EVENT = "llm-rollout.release"
STATE_OBJECT = ".llm-rollout/releases.json"
"""Where a target's bucket keeps the state."""

_EVENT_NAMESPACE = uuid.UUID("6f1d3a4e-9a3b-5c62-8f3e-1c9f0a7d2b54")
"""Arbitrary, and the same for ever: event ids follow from what they announce."""

KEPT_COMMITS = 100
"""Commits remembered per model: those that were rolled out or passed over. Older ones cannot come back as a branch's
head without somebody's force-push."""

Clock = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
"""`HH:MM`, 24 hours."""


class QuietHours(Value):
    """When no rollout may start: the hours in which nobody watches."""

    start: Clock = Field("19:00", title="From", description="HH:MM", json_schema_extra={"position": 0})
    end: Clock = Field("07:00", title="Until", description="HH:MM; earlier than the start means: the next morning.")
    timezone: str = Field("UTC", title="Time zone", description="IANA name, e.g. Europe/Paris.")

    @model_validator(mode="after")
    def _zone_is_known(self) -> Self:
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"there is no time zone {self.timezone!r}: take a name such as Europe/Paris") from error
        return self

    def covers(self, moment: datetime) -> bool:
        """Whether `moment` (with a zone) is in the quiet hours: start inclusive, end exclusive; equal means never."""
        local = moment.astimezone(ZoneInfo(self.timezone)).time()
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        if start <= end:
            return start <= local < end
        return local >= start or local < end


class ReleasePolicy(Value):
    """Which releases start a rollout, and when."""

    only_weights: bool = Field(
        True,
        title="Only if served files changed",
        description="Off: a commit that only changes the README starts a rollout too.",
        json_schema_extra={"position": 0},
    )
    quiet_hours: QuietHours | None = Field(
        None,
        title="Quiet hours",
        description="Releases found in these hours are announced after them.",
        json_schema_extra={"position": 1},
    )
    max_per_day: Annotated[int, Field(ge=1, le=100)] = Field(
        4,
        title="Rollouts per day",
        description="Of all followed models together, in any 24 hours; what comes on top waits.",
        json_schema_extra={"position": 2},
    )


class Followed(Value):
    """A model whose releases start rollouts."""

    model: PresetName = Field(
        title="Model",
        description="Preset in deployments/models/; its repository is watched.",
        json_schema_extra={"position": 0},
    )
    revision: Annotated[str, StringConstraints(pattern=r"^\S+$")] | None = Field(
        None,
        title="Branch or tag",
        description="What is watched; empty takes the preset's. A tag that is moved counts as a release.",
        json_schema_extra={"position": 1},
    )


class WatchRequest(Value):
    """Which models are watched for which target."""

    target: PresetName = Field(
        title="Target",
        description="Environment in deployments/targets/; its bucket keeps what was announced.",
        json_schema_extra={"position": 0},
    )
    follow: tuple[Followed, ...] = Field(title="Followed models", min_length=1, json_schema_extra={"position": 1})
    policy: ReleasePolicy = Field(
        ReleasePolicy(),
        title="Policy",
        description="Which releases count, and when.",
        json_schema_extra={"position": 2},
    )


class Announcement(Value):
    """A release for everybody to act on. Equal releases have the same `event_id`, whoever announces them."""

    model: str
    repo_id: RepoId
    revision: str
    commit_sha: CommitSha
    target: str
    decided_at: datetime
    sent: bool = False
    """False from the decision until the event is known to have arrived: a death in between is made good later."""

    @property
    def event_id(self) -> uuid.UUID:
        return uuid.uuid5(_EVENT_NAMESPACE, f"{self.target}/{self.model}/{self.commit_sha}")


class WatchedModel(Value):
    """What is known of one followed model."""

    etag: str = ""
    """Of the hub's last answer: an unchanged model costs one request without a body."""
    weights: str = ""
    """Digest of the files that were served last: equal digests need no rollout."""
    commits: tuple[CommitSha, ...] = ()
    """Commits that are settled: announced, passed over, or there at the first look. Newest last."""
    waiting: CommitSha | None = None
    """A commit that quiet hours or the daily share put off."""


class WatchState(Value):
    """Everything that must survive between two looks."""

    schema_version: int = 1
    models: dict[str, WatchedModel] = {}
    announcements: tuple[Announcement, ...] = ()
    """Unsent ones, and those of the last days. Newest last."""

    @property
    def unsent(self) -> tuple[Announcement, ...]:
        return tuple(entry for entry in self.announcements if not entry.sent)

    def sent(self, announcement: Announcement) -> WatchState:
        """The state after the event has arrived."""
        entries = tuple(
            entry.model_copy(update={"sent": True}) if entry.event_id == announcement.event_id else entry
            for entry in self.announcements
        )
        return self.model_copy(update={"announcements": entries})


class Decision(StrEnum):
    """What becomes of a followed model's head."""

    BASELINE = "first look: taken as known"
    KNOWN = "nothing new"
    ONLY_DOCS = "passed over: no served file changed"
    QUIET = "put off: quiet hours"
    CAPPED = "put off: the day's rollouts are used up"
    ANNOUNCE = "announced"


def decide(
    state: WatchState, followed: Followed, pinned: PinnedModel, policy: ReleasePolicy, target: str, now: datetime
) -> tuple[Decision, WatchState]:
    """What to do about the head of a followed model, and the state that remembers it.

    An announcement is in the new state's `unsent`: keep the state first, then send it.
    """
    known = state.models.get(followed.model, WatchedModel())
    digest = weights_digest(pinned)
    decision = _judge(state, known, pinned.commit_sha, digest, policy, now)
    put_off = decision in (Decision.QUIET, Decision.CAPPED)
    settled = known.commits
    if not put_off and decision is not Decision.KNOWN:
        settled = (*settled, pinned.commit_sha)[-KEPT_COMMITS:]
    model = known.model_copy(
        update={
            "weights": known.weights if put_off else digest,
            "commits": settled,
            "waiting": pinned.commit_sha if put_off else None,
        }
    )
    entries = _recent(state.announcements, now)
    if decision is Decision.ANNOUNCE:
        entries += (
            Announcement(
                model=followed.model,
                repo_id=pinned.repo_id,
                revision=pinned.revision,
                commit_sha=pinned.commit_sha,
                target=target,
                decided_at=now.astimezone(UTC),
            ),
        )
    models = {**state.models, followed.model: model}
    return decision, state.model_copy(update={"models": models, "announcements": entries})


def with_etag(state: WatchState, model: str, etag: str) -> WatchState:
    """The state after an answer of the hub; keep it only together with what was decided on that answer."""
    known = state.models.get(model, WatchedModel())
    return state.model_copy(update={"models": {**state.models, model: known.model_copy(update={"etag": etag})}})


def etag_to_send(state: WatchState, model: str) -> str:
    """What to ask the hub with; nothing while a commit waits, since it must be looked at again although unchanged."""
    known = state.models.get(model, WatchedModel())
    return "" if known.waiting else known.etag


def _judge(
    state: WatchState, known: WatchedModel, commit_sha: str, digest: str, policy: ReleasePolicy, now: datetime
) -> Decision:
    if not known.commits:
        return Decision.BASELINE
    if commit_sha in known.commits:
        return Decision.KNOWN
    if policy.only_weights and digest == known.weights:
        return Decision.ONLY_DOCS
    if policy.quiet_hours is not None and policy.quiet_hours.covers(now):
        return Decision.QUIET
    if sum(now - entry.decided_at < timedelta(days=1) for entry in state.announcements) >= policy.max_per_day:
        return Decision.CAPPED
    return Decision.ANNOUNCE


def _recent(entries: tuple[Announcement, ...], now: datetime) -> tuple[Announcement, ...]:
    """Unsent ones whatever their age; sent ones for as long as the daily share looks back, and a week for people."""
    return tuple(entry for entry in entries if not entry.sent or now - entry.decided_at < timedelta(days=7))
