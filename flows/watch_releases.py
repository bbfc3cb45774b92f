"""Look for new commits and tags of followed models; each becomes one event, and the event starts the rollout."""

from __future__ import annotations

from prefect import flow

from rollout.catalog import load_target
from rollout.releases import Announcement, WatchRequest
from rollout.report import utc_now
from tasks.releases import announce_release, look_for_releases
from tasks.step import Story


@flow(name="watch-releases", flow_run_name="releases for {request.target_title}")
def watch_releases(request: WatchRequest) -> tuple[Announcement, ...]:
    """Notice new commits, or new tags, on Hugging Face and announce each exactly once. Changes only its own notes.

    A deployment with a trigger on the event `llm-rollout.release` starts the rollout (see prefect.yaml).

    Args:
        request: Target, followed models, and which of their releases count when.
    """
    target = load_target(request.target)
    story = Story(lambda _: None)
    announcements = story.run(look_for_releases, target, request.follow, request.policy, utc_now())
    for announcement in announcements:
        story.run(announce_release, target, announcement)
    return announcements
