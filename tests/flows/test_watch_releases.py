"""New releases: noticed by etag, announced exactly once, also through death and webhooks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.deployments.runner import EntrypointType

from flows.watch_releases import watch_releases
from flows.webhook import SECRET_HEADER, webhook_app
from rollout.clients.hub import HubClient
from rollout.clients.releases import WatchStore, look
from rollout.clients.storage import StorageClient
from rollout.errors import AnotherWriter, BadInput, BucketNotFound
from rollout.model import ModelRef
from rollout.releases import RELEASE_EVENT, Followed, ReleasePolicy, WatchRequest, decide
from rollout.report import utc_now
from sandbox.hub_store import HubStore
from sandbox.models import tiny_model
from tests.flows.conftest import Stage

pytestmark = [pytest.mark.flow, pytest.mark.usefixtures("prefect_server")]


class Watched:
    """A followed model of one test, on the shared hub, and what was announced of it."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.repo_id = f"tests/{stage.target.namespace}"
        self._folder = folder
        self._store = HubStore(stage.cloud.hub_root)
        self.preset = folder / "followed.yaml"
        serving = {"served_model_name": self.repo_id}
        self.preset.write_text(yaml.safe_dump({"model": {"repo_id": self.repo_id}, "serving": serving}))
        self.publish(seed=1)
        StorageClient(stage.target).ensure_bucket()

    def publish(self, *, seed: int, readme: str = "", tags: tuple[str, ...] = ()) -> None:
        model = tiny_model(self._folder / f"seed-{seed}", seed=seed)
        if readme:
            (model / "README.md").write_text(readme)
        self._store.publish(self.repo_id, model, tags=tags)

    @property
    def request(self) -> WatchRequest:
        return WatchRequest(target=str(self.stage.target_file), follow=(Followed(model=str(self.preset)),))

    @property
    def commit(self) -> str:
        return HubClient(self.stage.target.hub_endpoint, None).pin(ModelRef(repo_id=self.repo_id)).commit_sha

    def events(self, client: SyncPrefectClient) -> list[dict[str, Any]]:
        wanted = {
            "event": {"name": [RELEASE_EVENT]},
            "resource": {"id": [f"llm-rollout.model.{self.preset}"]},
        }
        response = client.request("POST", "/events/filter", json={"filter": wanted})
        response.raise_for_status()
        found: list[dict[str, Any]] = response.json()["events"]
        return found


@pytest.fixture
def watched(stage: Stage, tmp_path: Path) -> Watched:
    return Watched(stage, tmp_path)


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as opened:
        yield opened


def wait_for(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(poll(), 120))


def test_a_new_commit_is_announced_exactly_once(watched: Watched, client: SyncPrefectClient) -> None:
    assert watch_releases(watched.request) == ()
    watched.publish(seed=2)
    (announced,) = watch_releases(watched.request)
    assert announced.commit_sha == watched.commit
    assert watch_releases(watched.request) == ()
    wait_for(lambda: len(watched.events(client)) == 1)
    (event,) = watched.events(client)
    assert event["id"] == str(announced.event_id)
    assert event["payload"]["commit_sha"] == announced.commit_sha
    assert WatchStore(watched.stage.target).read().unsent == ()


def test_a_watch_that_died_before_sending_is_made_good_and_one_that_died_after_it_sends_nothing_twice(
    watched: Watched, client: SyncPrefectClient
) -> None:
    watch_releases(watched.request)
    watched.publish(seed=2)
    target = watched.stage.target
    store = WatchStore(target)
    pinned = HubClient(target.hub_endpoint, None).pin(ModelRef(repo_id=watched.repo_id))
    followed = watched.request.follow[0]
    _, decided = decide(store.read(), followed, pinned, ReleasePolicy(), target.name, utc_now())
    store.write(decided)  # and here it died, before the event

    (late,) = watch_releases(watched.request)
    assert late.commit_sha == pinned.commit_sha
    wait_for(lambda: len(watched.events(client)) == 1)

    died_after = WatchStore(target)
    died_after.read()
    died_after.write(decided)  # as if it had died after the event, before it could note so
    watch_releases(watched.request)
    assert len(watched.events(client)) == 1


def test_each_new_tag_that_matches_is_announced_exactly_once(watched: Watched, client: SyncPrefectClient) -> None:
    followed = Followed(model=str(watched.preset), tags="v*")
    request = watched.request.model_copy(update={"follow": (followed,)})
    watched.publish(seed=2, tags=("v1",))
    assert watch_releases(request) == ()
    watched.publish(seed=3)
    assert watch_releases(request) == (), "a commit without a tag"
    watched.publish(seed=4, tags=("v2", "nightly"))
    watched.publish(seed=5, tags=("v3",))
    announced = watch_releases(request)
    assert [(each.tag, each.revision) for each in announced] == [("v2", "v2"), ("v3", "v3")]
    assert announced[1].commit_sha == watched.commit
    assert watch_releases(request) == ()
    wait_for(lambda: len(watched.events(client)) == 2)


def test_a_new_readme_is_no_release(watched: Watched, client: SyncPrefectClient) -> None:
    watch_releases(watched.request)
    before = watched.commit
    watched.publish(seed=1, readme="A better explanation.")
    assert watched.commit != before
    assert watch_releases(watched.request) == ()


def test_an_unchanged_model_costs_one_request_without_a_body(watched: Watched) -> None:
    hub = HubClient(watched.stage.target.hub_endpoint, None)
    model = ModelRef(repo_id=watched.repo_id)
    etag = look(hub, model, "")
    assert etag
    assert look(hub, model, etag) is None
    watched.publish(seed=2)
    assert look(hub, model, etag) not in (None, etag)


def test_of_two_watchers_at_once_one_learns_that_it_was_too_late(watched: Watched) -> None:
    one, other = WatchStore(watched.stage.target), WatchStore(watched.stage.target)
    state = one.read()
    other.read()
    one.write(state)
    now = datetime(2026, 11, 23, tzinfo=UTC)
    pinned = HubClient(watched.stage.target.hub_endpoint, None).pin(ModelRef(repo_id=watched.repo_id))
    _, changed = decide(state, watched.request.follow[0], pinned, ReleasePolicy(), "t", now)
    with pytest.raises(AnotherWriter):
        other.write(changed)


def test_a_target_without_bucket_is_bad_input(stage: Stage) -> None:
    store = WatchStore(stage.target)
    state = store.read()
    with pytest.raises(BucketNotFound):
        store.write(state)


# --- The receiver -----------------------------------------------------------------------------------------------------

SECRET = "s3cret"
MESSAGE = {
    "event": {"action": "update", "scope": "repo.content"},
    "repo": {"type": "model", "name": "google/gemma", "id": "1", "headSha": "a" * 40, "private": False},
    "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "b" * 40, "newSha": "a" * 40}],
    "webhook": {"id": "w", "version": 3},
}


def send(deployment: str, body: Any, secret: str = SECRET) -> tuple[int, Any]:
    async def exchange() -> tuple[int, Any]:
        runner = web.AppRunner(webhook_app(deployment, SECRET))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.post(
                    f"http://127.0.0.1:{port}/huggingface", json=body, headers={SECRET_HEADER: secret}
                ) as response,
            ):
                is_json = response.content_type == "application/json"
                return response.status, await (response.json() if is_json else response.text())
        finally:
            await runner.cleanup()

    return asyncio.run(exchange())


@pytest.fixture
def deployment(watched: Watched) -> str:
    name = watched.stage.target.namespace
    parameters = {"request": watched.request.model_dump(mode="json")}
    watch_releases.to_deployment(name, parameters=parameters, entrypoint_type=EntrypointType.MODULE_PATH).apply()
    return f"watch-releases/{name}"


def test_a_message_starts_the_watch_and_its_repetition_starts_nothing_more(deployment: str) -> None:
    status, first = send(deployment, MESSAGE)
    assert status == 202
    assert send(deployment, MESSAGE) == (202, first)
    moved = {**MESSAGE, "updatedRefs": [{"ref": "refs/heads/main", "oldSha": "a" * 40, "newSha": "c" * 40}]}
    assert send(deployment, moved)[1] != first


def test_a_new_tag_starts_the_watch_although_the_head_stays(deployment: str) -> None:
    _, first = send(deployment, MESSAGE)
    tagged = {**MESSAGE, "updatedRefs": [{"ref": "refs/tags/v2", "oldSha": None, "newSha": "a" * 40}]}
    status, second = send(deployment, tagged)
    assert status == 202
    assert second != first
    assert send(deployment, tagged) == (202, second)


@pytest.mark.parametrize(
    ("body", "secret", "status"),
    [
        (MESSAGE, "guess", 401),
        (MESSAGE, "", 401),
        ({"event": "?"}, SECRET, 400),
        ([], SECRET, 400),
        ({**MESSAGE, "event": {"action": "create", "scope": "discussion"}}, SECRET, 200),
        ({**MESSAGE, "updatedRefs": []}, SECRET, 200),
        ({key: value for key, value in MESSAGE.items() if key != "updatedRefs"}, SECRET, 200),
        ({**MESSAGE, "updatedRefs": [{"ref": "refs/tags/v1", "oldSha": "a" * 40, "newSha": None}]}, SECRET, 200),
    ],
)
def test_what_is_no_message_about_files_starts_nothing(body: Any, secret: str, status: int) -> None:
    assert send("watch-releases/nobody", body, secret)[0] == status


def test_a_missing_deployment_asks_hugging_face_to_try_again() -> None:
    assert send("watch-releases/nobody", MESSAGE)[0] == 503


def test_a_receiver_without_secret_does_not_start() -> None:
    with pytest.raises(BadInput, match="secret is empty"):
        webhook_app("watch-releases/x", "")
