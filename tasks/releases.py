"""Look at followed models, and announce their releases exactly once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client

from rollout.catalog import load_model
from rollout.clients.hub import HubClient
from rollout.clients.releases import WatchStore, look
from rollout.model import ModelRef
from rollout.releases import (
    RELEASE_EVENT,
    Announcement,
    Decision,
    Followed,
    ReleasePolicy,
    WatchState,
    decide,
    decide_tag,
    etag_to_send,
    new_tags,
    with_etag,
    with_tags,
)
from rollout.report import StepStatus
from rollout.target import Target
from tasks.credentials import hub_token
from tasks.step import Artifact, Outcome, step


@step("look for releases")
def look_for_releases(
    target: Target, follow: tuple[Followed, ...], policy: ReleasePolicy, now: datetime
) -> Outcome[tuple[Announcement, ...]]:
    """Decide about the head, or the new tags, of every followed model; announcements are kept before they are sent.

    The value is what still has to be sent: new announcements, and those of a watch that died in between.
    """
    store = WatchStore(target)
    watch = _Watch(target, store.read(), policy, now)
    for followed in follow:
        watch.look_at(followed)
    store.write(watch.state)
    announced = len(watch.state.unsent)
    return Outcome(
        value=watch.state.unsent,
        summary=f"{len(follow)} models looked at, {announced} releases to announce",
        status=StepStatus.DONE if announced else StepStatus.UNCHANGED,
        data={"models": watch.rows},
        artifact=Artifact("releases", f"Releases for {target.name}: what was found and decided", table=watch.rows),
    )


class _Watch:
    """One look at the followed models: the state that it leads to, and what there is to say of it."""

    def __init__(self, target: Target, state: WatchState, policy: ReleasePolicy, now: datetime) -> None:
        self.state = state
        self.rows: list[dict[str, Any]] = []
        self._target, self._policy, self._now = target, policy, now
        self._hub = HubClient(target.hub_endpoint, hub_token(target))

    def look_at(self, followed: Followed) -> None:
        model = load_model(followed.model).model
        if followed.tags is not None:
            self._look_at_tags(followed, model)
        else:
            self._look_at_head(followed, model.model_copy(update={"revision": followed.revision or model.revision}))

    def _look_at_head(self, followed: Followed, model: ModelRef) -> None:
        etag = look(self._hub, model, etag_to_send(self.state, followed))
        if etag is None:
            self._note(followed, model, "unchanged", Decision.KNOWN)
            return
        pinned = self._hub.pin(model)
        decision, decided = decide(self.state, followed, pinned, self._policy, self._target.name, self._now)
        self.state = with_etag(decided, followed, etag)
        self._note(followed, model, pinned.commit_sha, decision)

    def _look_at_tags(self, followed: Followed, model: ModelRef) -> None:
        listed = self._hub.tags(model)
        fresh = new_tags(self.state, followed, listed)
        self.state = with_tags(self.state, followed, listed)
        for tag in fresh:
            tagged = model.model_copy(update={"revision": tag})
            pinned = self._hub.pin(tagged)
            decision, self.state = decide_tag(
                self.state, followed, tag, listed[tag], pinned, self._policy, self._target.name, self._now
            )
            self._note(followed, tagged, pinned.commit_sha, decision)
        if not fresh:
            self._note(followed, model.model_copy(update={"revision": followed.tags}), "unchanged", Decision.KNOWN)

    def _note(self, followed: Followed, model: ModelRef, commit: str, decision: Decision) -> None:
        repository = f"{model.repo_id}@{model.revision}"
        row = {"model": followed.model, "repository": repository, "commit": commit, "decision": decision.value}
        self.rows.append(row)
        get_run_logger().info("%s, %s: %s", followed.model, repository, decision.value)


@step("announce release")
def announce_release(target: Target, announcement: Announcement) -> Outcome[None]:
    """Send the event unless the server has it already, and remember that it has arrived."""
    with get_client(sync_client=True) as client:
        fresh = not _has_arrived(client, announcement)
        if fresh:
            # By REST and not `emit_event`, which hands over to a thread and cannot say whether the event arrived.
            response = client.request("POST", "/events", json=[event_of(announcement)])
            response.raise_for_status()
    store = WatchStore(target)
    store.write(store.read().sent(announcement))
    what = f"{announcement.repo_id}@{announcement.commit_sha[:12]} for {announcement.target}"
    return Outcome(value=None, summary=f"announced {what}" if fresh else f"{what} had been announced already")


def event_of(announcement: Announcement) -> dict[str, Any]:
    """The event as the server takes it; deployment triggers match its resource and its related target."""
    return {
        "id": str(announcement.event_id),
        "event": RELEASE_EVENT,
        "occurred": announcement.decided_at.isoformat(),
        "resource": {
            "prefect.resource.id": f"llm-rollout.model.{announcement.model}",
            "prefect.resource.name": announcement.model,
            "llm-rollout.commit": announcement.commit_sha,
        },
        "related": [
            {
                "prefect.resource.id": f"llm-rollout.target.{announcement.target}",
                "prefect.resource.role": "target",
                "prefect.resource.name": announcement.target,
            }
        ],
        "payload": announcement.model_dump(mode="json", exclude={"sent"}),
    }


def _has_arrived(client: SyncPrefectClient, announcement: Announcement) -> bool:
    # The filter looks back a day unless it is told otherwise.
    wanted = {
        "id": {"id": [str(announcement.event_id)]},
        "occurred": {"since": announcement.decided_at.isoformat()},
    }
    response = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 1})
    response.raise_for_status()
    return bool(response.json()["events"])
