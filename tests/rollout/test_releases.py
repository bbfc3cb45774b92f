"""Which releases count, and when they are announced."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from rollout.model import ModelFile, PinnedModel
from rollout.releases import (
    Decision,
    Followed,
    QuietHours,
    ReleasePolicy,
    WatchState,
    decide,
    decide_tag,
    etag_to_send,
    new_tags,
    with_etag,
    with_tags,
)

NOON = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
NIGHT = datetime(2026, 11, 23, 23, 0, tzinfo=UTC)
FOLLOWED = Followed(model="gemma")
NIGHTS = QuietHours(start="22:00", end="06:00")


def head(commit: str, weights: str = "a") -> PinnedModel:
    """A repository's head whose commit begins with `commit` and whose weights hash to `weights`."""
    return PinnedModel(
        repo_id="google/gemma",
        revision="main",
        commit_sha=commit.ljust(40, "0"),
        files=(ModelFile(path="model.safetensors", size_bytes=5, sha256=weights.ljust(64, "0")),),
    )


def look(
    state: WatchState, pinned: PinnedModel, policy: ReleasePolicy | None = None, now: datetime = NOON
) -> tuple[Decision, WatchState]:
    return decide(state, FOLLOWED, pinned, policy or ReleasePolicy(), "s3ns", now)


@pytest.fixture
def watched() -> WatchState:
    """A state that knows commit 1 with weights `a`."""
    return look(WatchState(), head("1"))[1]


def test_the_first_look_announces_nothing() -> None:
    decision, state = look(WatchState(), head("1"))
    assert decision is Decision.BASELINE
    assert state.announcements == ()


def test_a_commit_with_new_weights_is_announced_once(watched: WatchState) -> None:
    decision, state = look(watched, head("2", "b"))
    assert decision is Decision.ANNOUNCE
    assert [entry.commit_sha[0] for entry in state.unsent] == ["2"]
    again, after = look(state, head("2", "b"))
    assert again is Decision.KNOWN
    assert after.announcements == state.announcements


def test_a_commit_that_only_changes_documentation_is_passed_over_for_ever(watched: WatchState) -> None:
    decision, state = look(watched, head("2"))
    assert decision is Decision.ONLY_DOCS
    assert look(state, head("2"))[0] is Decision.KNOWN


def test_documentation_counts_if_the_policy_says_so(watched: WatchState) -> None:
    assert look(watched, head("2"), ReleasePolicy(only_weights=False))[0] is Decision.ANNOUNCE


def test_a_branch_that_goes_back_to_a_known_commit_is_no_release(watched: WatchState) -> None:
    _, state = look(watched, head("2", "b"))
    assert look(state, head("1"))[0] is Decision.KNOWN


def test_a_release_in_quiet_hours_is_announced_after_them(watched: WatchState) -> None:
    policy = ReleasePolicy(quiet_hours=NIGHTS)
    decision, state = look(watched, head("2", "b"), policy, NIGHT)
    assert decision is Decision.QUIET
    assert state.unsent == ()
    assert look(state, head("2", "b"), policy, NIGHT + timedelta(hours=8))[0] is Decision.ANNOUNCE


def test_of_several_commits_that_waited_only_the_newest_is_announced(watched: WatchState) -> None:
    policy = ReleasePolicy(quiet_hours=NIGHTS)
    _, state = look(watched, head("2", "b"), policy, NIGHT)
    _, state = look(state, head("3", "c"), policy, NIGHT)
    _, state = look(state, head("3", "c"), policy, NOON)
    assert [entry.commit_sha[0] for entry in state.unsent] == ["3"]


def test_the_hub_is_asked_without_an_etag_while_a_commit_waits(watched: WatchState) -> None:
    state = with_etag(watched, FOLLOWED, 'W/"1"')
    assert etag_to_send(state, FOLLOWED) == 'W/"1"'
    _, state = look(state, head("2", "b"), ReleasePolicy(quiet_hours=NIGHTS), NIGHT)
    assert etag_to_send(with_etag(state, FOLLOWED, 'W/"2"'), FOLLOWED) == ""


# --- Tags -------------------------------------------------------------------------------------------------------------

VERSIONS = Followed(model="gemma", tags="v*")


def look_at_tags(
    state: WatchState, listed: dict[str, str], policy: ReleasePolicy | None = None, now: datetime = NOON
) -> tuple[dict[str, Decision], WatchState]:
    """One look at the tags, which point to commits whose weights are named like them."""
    fresh, state = new_tags(state, VERSIONS, listed), with_tags(state, VERSIONS, listed)
    decisions = {}
    for tag in fresh:
        pinned = head(listed[tag], listed[tag])
        decisions[tag], state = decide_tag(
            state, VERSIONS, tag, listed[tag], pinned, policy or ReleasePolicy(), "s3ns", now
        )
    return decisions, state


@pytest.fixture
def tagged() -> WatchState:
    """A state that knows the tag v1.0."""
    return look_at_tags(WatchState(), {"v1.0": "1"})[1]


def test_the_first_look_takes_all_tags_as_known(tagged: WatchState) -> None:
    assert tagged.announcements == ()
    assert look_at_tags(tagged, {"v1.0": "1"})[0] == {}


def test_each_new_tag_is_announced_once_in_the_order_of_versions_and_others_are_not(tagged: WatchState) -> None:
    listed = {"nightly": "9", "v1.0": "1", "v1.10": "3", "v1.9": "2"}
    _, state = look_at_tags(tagged, listed)
    assert [(entry.tag, entry.commit_sha[0]) for entry in state.unsent] == [("v1.9", "2"), ("v1.10", "3")]
    assert look_at_tags(state, listed)[0] == {}


def test_a_tag_that_is_moved_is_a_release(tagged: WatchState) -> None:
    assert look_at_tags(tagged, {"v1.0": "2"})[0] == {"v1.0": Decision.ANNOUNCE}


def test_a_tag_on_the_weights_of_the_last_one_is_passed_over_unless_the_policy_wants_it(tagged: WatchState) -> None:
    _, state = look_at_tags(tagged, {"v1.1": "2"})
    again = {"v1.1": "2", "v1.1-docs": "2"}
    assert look_at_tags(state, again)[0] == {"v1.1-docs": Decision.ONLY_DOCS}
    assert look_at_tags(state, again, ReleasePolicy(only_weights=False))[0] == {"v1.1-docs": Decision.ANNOUNCE}


def test_tags_wait_out_quiet_hours_and_the_daily_share_each_for_itself(tagged: WatchState) -> None:
    policy = ReleasePolicy(quiet_hours=NIGHTS, max_per_day=1)
    listed = {"v1.1": "2", "v1.2": "3"}
    quiet, state = look_at_tags(tagged, listed, policy, NIGHT)
    assert set(quiet.values()) == {Decision.QUIET}
    later, state = look_at_tags(state, listed, policy, NOON + timedelta(days=1))
    assert later == {"v1.1": Decision.ANNOUNCE, "v1.2": Decision.CAPPED}
    last, state = look_at_tags(state, listed, policy, NOON + timedelta(days=2))
    assert last == {"v1.2": Decision.ANNOUNCE}


def test_a_model_may_be_followed_by_its_branch_and_by_its_tags(tagged: WatchState) -> None:
    _, state = look(look(tagged, head("1"))[1], head("2", "b"))
    _, state = look_at_tags(state, {"v1.0": "1", "v1.1": "2"})
    assert [entry.tag for entry in state.unsent] == ["", "v1.1"]
    assert len({entry.event_id for entry in state.unsent}) == 2


def test_branch_and_tags_in_one_are_refused() -> None:
    with pytest.raises(ValidationError, match="either revision or tags"):
        Followed(model="gemma", revision="main", tags="v*")


def test_the_daily_share_counts_the_last_24_hours_and_then_frees_up(watched: WatchState) -> None:
    policy = ReleasePolicy(max_per_day=1)
    _, state = look(watched, head("2", "b"), policy, NOON)
    capped, state = look(state, head("3", "c"), policy, NOON + timedelta(hours=23))
    assert capped is Decision.CAPPED
    assert look(state, head("3", "c"), policy, NOON + timedelta(hours=24))[0] is Decision.ANNOUNCE


def test_equal_releases_have_equal_event_ids_and_other_targets_have_others(watched: WatchState) -> None:
    (one,) = look(watched, head("2", "b"))[1].unsent
    (later,) = look(watched, head("2", "b"), now=NOON + timedelta(hours=1))[1].unsent
    (elsewhere,) = decide(watched, FOLLOWED, head("2", "b"), ReleasePolicy(), "other", NOON)[1].unsent
    assert one.event_id == later.event_id != elsewhere.event_id


def test_an_unsent_announcement_is_kept_whatever_its_age_and_a_sent_one_for_a_week(watched: WatchState) -> None:
    _, state = look(watched, head("2", "b"))
    _, unsent = look(state, head("2", "b"), now=NOON + timedelta(days=30))
    assert len(unsent.unsent) == 1
    _, sent = look(state.sent(state.unsent[0]), head("2", "b"), now=NOON + timedelta(days=6))
    assert [entry.sent for entry in sent.announcements] == [True]
    assert look(sent, head("2", "b"), now=NOON + timedelta(days=8))[1].announcements == ()


@pytest.mark.parametrize(
    ("start", "end", "hour", "quiet"),
    [
        ("22:00", "06:00", 23, True),
        ("22:00", "06:00", 5, True),
        ("22:00", "06:00", 6, False),
        ("22:00", "06:00", 12, False),
        ("12:00", "13:00", 12, True),
        ("12:00", "13:00", 13, False),
        ("12:00", "12:00", 12, False),
    ],
)
def test_quiet_hours_may_span_midnight(start: str, end: str, hour: int, quiet: bool) -> None:
    assert QuietHours(start=start, end=end).covers(NOON.replace(hour=hour)) is quiet


def test_quiet_hours_are_local_in_winter_and_in_summer() -> None:
    paris = QuietHours(start="19:00", end="07:00", timezone="Europe/Paris")
    assert paris.covers(datetime(2026, 1, 10, 18, 30, tzinfo=UTC))  # 19:30
    assert not paris.covers(datetime(2026, 1, 10, 17, 30, tzinfo=UTC))  # 18:30
    assert paris.covers(datetime(2026, 7, 10, 17, 30, tzinfo=UTC))  # 19:30


@pytest.mark.parametrize("fields", [{"timezone": "Paris"}, {"start": "24:00"}, {"start": "7:00"}])
def test_nonsense_hours_are_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        QuietHours.model_validate(fields)
