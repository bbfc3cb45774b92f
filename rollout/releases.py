"""Which new commits and tags of followed models deserve a rollout, and when.

Pure; `rollout.clients.releases` has the side effects.

A release passes four questions, in this order: is it new, did anything that is served change (not only the README), is
it a quiet hour, is today's share used up. The first two decide for ever; the last two only put it off, and of several
commits of a branch that wait, the newest is announced. Likewise of several that come between two looks: a branch is
seen only as it is. Tags are announced each for itself, in the order of their versions.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, StringConstraints, model_validator

from rollout import catalog
from rollout.model import PinnedModel
from rollout.objects import weights_digest
from rollout.request import PresetName
from rollout.values import CommitSha, RepoId, Value

RELEASE_EVENT = "llm-rollout.release"
STATE_PREFIX = ".llm-rollout/releases/"
"""Where a bucket keeps the state of each target, as TARGET.json: targets that share it follow models of their own."""

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
    tags: Annotated[str, StringConstraints(pattern=r"^\S+$")] | None = Field(
        None,
        title="New tags",
        description="Pattern of tag names, e.g. v*: every new tag that matches is a release, instead of every commit of"
        " a branch. To watch both, follow the model twice.",
        json_schema_extra={"position": 2},
    )

    @model_validator(mode="after")
    def _one_thing_is_watched(self) -> Self:
        if self.revision is not None and self.tags is not None:
            raise ValueError("give either revision or tags; to watch both, follow the model twice")
        return self

    @property
    def key(self) -> str:
        """Names what is watched in the state: a model may be followed by branches and by tags."""
        watched = f"tags {self.tags}" if self.tags is not None else self.revision
        return self.model if watched is None else f"{self.model}@{watched}"


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

    @property
    def target_title(self) -> str:
        return catalog.target_title(self.target)


class Announcement(Value):
    """A release for everybody to act on. Equal releases have the same `event_id`, whoever announces them."""

    model: str
    repo_id: RepoId
    revision: str
    commit_sha: CommitSha
    target: str
    tag: str = ""
    """Of a release that is a new tag; empty for a new commit of a branch."""
    decided_at: datetime
    sent: bool = False
    """False from the decision until the event is known to have arrived: a death in between is made good later."""

    @property
    def event_id(self) -> uuid.UUID:
        tag = f"/tags/{self.tag}" if self.tag else ""
        return uuid.uuid5(_EVENT_NAMESPACE, f"{self.target}/{self.model}/{self.commit_sha}{tag}")


class WatchedModel(Value):
    """What is known of one followed model: of a branch its commits, or of a pattern its tags."""

    etag: str = ""
    """Of the hub's last answer: an unchanged model costs one request without a body."""
    weights: str = ""
    """Digest of the files that were served last: equal digests need no rollout."""
    commits: tuple[CommitSha, ...] = ()
    """Commits that are settled: announced, passed over, or there at the first look. Newest last."""
    tags: dict[str, str] | None = None
    """Tags that are settled, with what they point to; None before the first look."""
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


_PUT_OFF = (Decision.QUIET, Decision.CAPPED)


def decide(
    state: WatchState, followed: Followed, pinned: PinnedModel, policy: ReleasePolicy, target: str, now: datetime
) -> tuple[Decision, WatchState]:
    """What to do about the head of a followed model, and the state that remembers it.

    An announcement is in the new state's `unsent`: keep the state first, then send it.
    """
    known = state.models.get(followed.key, WatchedModel())
    decision = _judge(state, known, pinned, policy, now)
    put_off = decision in _PUT_OFF
    settled = known.commits
    if not put_off and decision is not Decision.KNOWN:
        settled = (*settled, pinned.commit_sha)[-KEPT_COMMITS:]
    changes = {"commits": settled, "waiting": pinned.commit_sha if put_off else None}
    return decision, _decided(state, followed, pinned, decision, changes, target, now)


def new_tags(state: WatchState, followed: Followed, listed: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the tags to decide about, oldest version first: those that match and are new, or point elsewhere now.

    `listed` are all tags of the repository with what they point to. At the first look none is new.
    """
    known = state.models.get(followed.key, WatchedModel()).tags
    if known is None:
        return ()
    names = [name for name in _matching(followed, listed) if known.get(name) != listed[name]]
    return tuple(sorted(names, key=_version))


def with_tags(state: WatchState, followed: Followed, listed: Mapping[str, str]) -> WatchState:
    """The state after a look: at the first one, all tags are taken as known; later ones are for `decide_tag`."""
    known = state.models.get(followed.key, WatchedModel())
    tags = known.tags if known.tags is not None else {name: listed[name] for name in _matching(followed, listed)}
    return _with_model(state, followed.key, known.model_copy(update={"tags": tags}))


def decide_tag(
    state: WatchState,
    followed: Followed,
    tag: str,
    points_to: str,
    pinned: PinnedModel,
    policy: ReleasePolicy,
    target: str,
    now: datetime,
) -> tuple[Decision, WatchState]:
    """What to do about one of `new_tags`, and the state that remembers it; one that is put off stays new."""
    known = state.models.get(followed.key, WatchedModel())
    decision = _filter(state, known, weights_digest(pinned), policy, now)
    tags = known.tags or {}
    changes = {"tags": tags if decision in _PUT_OFF else {**tags, tag: points_to}}
    return decision, _decided(state, followed, pinned, decision, changes, target, now, tag=tag)


def _decided(
    state: WatchState,
    followed: Followed,
    pinned: PinnedModel,
    decision: Decision,
    changes: Mapping[str, object],
    target: str,
    now: datetime,
    *,
    tag: str = "",
) -> WatchState:
    known = state.models.get(followed.key, WatchedModel())
    weights = known.weights if decision in _PUT_OFF else weights_digest(pinned)
    entries = _recent(state.announcements, now)
    if decision is Decision.ANNOUNCE:
        entries += (
            Announcement(
                model=followed.model,
                repo_id=pinned.repo_id,
                revision=pinned.revision,
                commit_sha=pinned.commit_sha,
                target=target,
                tag=tag,
                decided_at=now.astimezone(UTC),
            ),
        )
    after = state.model_copy(update={"announcements": entries})
    return _with_model(after, followed.key, known.model_copy(update={"weights": weights, **changes}))


def with_etag(state: WatchState, followed: Followed, etag: str) -> WatchState:
    """The state after an answer of the hub; keep it only together with what was decided on that answer."""
    known = state.models.get(followed.key, WatchedModel())
    return _with_model(state, followed.key, known.model_copy(update={"etag": etag}))


def etag_to_send(state: WatchState, followed: Followed) -> str:
    """What to ask the hub with; nothing while a commit waits, since it must be looked at again although unchanged."""
    known = state.models.get(followed.key, WatchedModel())
    return "" if known.waiting else known.etag


def _judge(
    state: WatchState, known: WatchedModel, pinned: PinnedModel, policy: ReleasePolicy, now: datetime
) -> Decision:
    if not known.commits:
        return Decision.BASELINE
    if pinned.commit_sha in known.commits:
        return Decision.KNOWN
    return _filter(state, known, weights_digest(pinned), policy, now)


def _filter(state: WatchState, known: WatchedModel, digest: str, policy: ReleasePolicy, now: datetime) -> Decision:
    """Whether something new is announced, passed over or put off."""
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


def _with_model(state: WatchState, key: str, model: WatchedModel) -> WatchState:
    return state.model_copy(update={"models": {**state.models, key: model}})


def _matching(followed: Followed, listed: Mapping[str, str]) -> list[str]:
    return [name for name in listed if fnmatchcase(name, followed.tags or "")]


def _version(tag: str) -> list[str | int]:
    """Sorts v1.10 behind v1.9: texts and numbers take turns, so like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", tag)]
