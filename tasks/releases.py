"""Look at followed models, and announce their releases exactly once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client

from rollout.catalog import load_model
from rollout.clients.hub import HubClient
from rollout.clients.releases import WatchStore, look
from rollout.releases import (
    RELEASE_EVENT,
    Announcement,
    Decision,
    Followed,
    ReleasePolicy,
    decide,
    etag_to_send,
    with_etag,
)
from rollout.report import StepStatus
from rollout.target import Target
from tasks.credentials import hub_token
from tasks.step import Artifact, Outcome, step


@step("look for releases")
def look_for_releases(
    target: Target, follow: tuple[Followed, ...], policy: ReleasePolicy, now: datetime
) -> Outcome[tuple[Announcement, ...]]:
    """Decide about the head of every followed model; announcements are kept before they are sent.

    The value is what still has to be sent: new announcements, and those of a watch that died in between.
    """
    store = WatchStore(target)
    state = store.read()
    hub = HubClient(target.hub_endpoint, hub_token(target))
    rows: list[dict[str, Any]] = []
    for followed in follow:
        preset = load_model(followed.model)
        model = preset.model
        if followed.revision is not None:
            model = model.model_copy(update={"revision": followed.revision})
        etag = look(hub, model, etag_to_send(state, followed.model))
        commit_sha, decision = "", Decision.KNOWN
        if etag is not None:
            pinned = hub.pin(model)
            commit_sha = pinned.commit_sha
            decision, state = decide(state, followed, pinned, policy, target.name, now)
            state = with_etag(state, followed.model, etag)
        rows.append(
            {
                "model": followed.model,
                "repository": f"{model.repo_id}@{model.revision}",
                "commit": commit_sha or "unchanged",
                "decision": decision.value,
            }
        )
        get_run_logger().info("%s: %s", followed.model, decision.value)
    store.write(state)
    announced = len(state.unsent)
    return Outcome(
        value=state.unsent,
        summary=f"{len(rows)} models looked at, {announced} releases to announce",
        status=StepStatus.DONE if announced else StepStatus.UNCHANGED,
        data={"models": rows},
        artifact=Artifact("releases", f"Releases for {target.name}: what was found and decided", table=rows),
    )


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
