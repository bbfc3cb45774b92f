"""Pinning a revision: what is found, and what is refused before any byte moves."""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout import errors
from rollout.clients.hub import HubClient
from rollout.model import ModelFile, ModelRef, PinnedModel
from sandbox.faults import FaultRule, Redirect, Reply
from sandbox.hub import HubServer, HubToken

REPO = "org/model"
FILES = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "README.md": b"# model",
}
SECRET = "hf_never_show_this"

HubMaker = Callable[..., HubServer]


@pytest.fixture
def serve_hub(tmp_path: Path) -> Iterator[HubMaker]:
    started: list[HubServer] = []

    def make(**options: Any) -> HubServer:
        hub = HubServer(root=tmp_path / f"hub-{len(started)}", **options).start()
        hub.store.publish(REPO, FILES, tags=["v1"])
        started.append(hub)
        return hub

    yield make
    for hub in started:
        hub.stop()


def pin(hub: HubServer, token: str | None = None, repo_id: str = REPO, revision: str = "main") -> PinnedModel:
    return HubClient(hub.url, token, stall_timeout_s=10).pin(ModelRef(repo_id=repo_id, revision=revision))


def test_a_pin_names_the_commit_the_files_and_their_hashes(serve_hub: HubMaker) -> None:
    hub = serve_hub()
    pinned = pin(hub)
    assert pinned.commit_sha == hub.store.publish(REPO, FILES)
    assert pinned.excluded == (".gitattributes", "README.md")
    config, weights = pinned.files
    assert (config.path, config.sha256, config.size_bytes) == ("config.json", None, 2)
    assert config.git_blob_sha1 == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert (weights.path, weights.git_blob_sha1) == ("model.safetensors", None)
    assert weights.sha256 == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_branches_and_tags_are_resolved_once(serve_hub: HubMaker, revision: str) -> None:
    pinned = pin(serve_hub(), revision=revision)
    assert pinned.revision == revision
    assert len(pinned.commit_sha) == 40


def test_a_tree_of_several_pages_is_read_to_its_end(serve_hub: HubMaker) -> None:
    hub = serve_hub(tree_page_entries=2)
    hub.store.publish(REPO, FILES | {f"extra-{number}.json": b"{}" for number in range(7)})
    assert len(pin(hub).files) == 9


TOKENS = {
    SECRET: HubToken("me", accepted=frozenset({"org/other"})),
    "hf_waiting": HubToken("me", awaiting_review=frozenset({REPO})),
    "hf_narrow": HubToken("me", accepted=frozenset({REPO}), role="fineGrained", reads_gated=False),
    "hf_good": HubToken("me", accepted=frozenset({REPO}), private=frozenset({REPO})),
}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "is gated without a token.*hub_token_secret"),
        (SECRET, "is gated to the account of the token.*Accept its licence"),
        ("hf_waiting", "is gated to the account of the token.*some wait for a review"),
        ("hf_narrow", "lacks a right.*read access to gated repositories"),
        ("hf_unknown", "does not accept the token.*Make a new one"),
    ],
)
def test_a_gated_repository_is_refused_with_what_to_do(serve_hub: HubMaker, token: str | None, message: str) -> None:
    hub = serve_hub(tokens=TOKENS)
    hub.store.restrict(REPO, gate="manual")
    with pytest.raises(errors.RepositoryGated, match=message):
        pin(hub, token)
    assert pin(hub, "hf_good").gated


def test_a_private_repository_looks_like_a_missing_one(serve_hub: HubMaker) -> None:
    hub = serve_hub(tokens=TOKENS)
    hub.store.restrict(REPO, private=True)
    for token in (None, SECRET):
        with pytest.raises(errors.RepositoryNotFound, match="or it is private"):
            pin(hub, token)
    assert pin(hub, "hf_good").repo_id == REPO


@pytest.mark.parametrize("token", [None, SECRET])
def test_a_missing_repository_and_a_missing_revision_have_their_own_errors(
    serve_hub: HubMaker, token: str | None
) -> None:
    hub = serve_hub(tokens=TOKENS)
    with pytest.raises(errors.RepositoryNotFound, match="org/absent"):
        pin(hub, token, "org/absent")
    with pytest.raises(errors.RevisionNotFound, match="'nowhere'"):
        pin(hub, token, revision="nowhere")


def test_a_renamed_repository_names_its_new_name(serve_hub: HubMaker) -> None:
    hub = serve_hub()
    hub.store.rename(REPO, "org/new-name")
    with pytest.raises(errors.RepositoryRenamed, match="now called org/new-name"):
        pin(hub)


@pytest.mark.parametrize("name", ["../escape.json", "/absolute.json", "con\u202efig.json", "\u0441onfig.json"])
def test_a_hostile_file_name_stops_the_pin(serve_hub: HubMaker, name: str) -> None:
    hub = serve_hub()
    hub.store.publish(REPO, FILES | {name: b"{}"})
    with pytest.raises(errors.CheckpointInvalid):
        pin(hub)


def test_a_busy_hub_is_asked_again(serve_hub: HubMaker) -> None:
    hub = serve_hub()
    hub.faults.add(FaultRule(fault=Reply(status=503), path="/api/", first=2))
    assert pin(hub).repo_id == REPO


def test_a_hub_that_is_not_there_is_a_transient_error() -> None:
    with pytest.raises(errors.TransientError, match="does not answer"):
        HubClient("http://127.0.0.1:9", SECRET).pin(ModelRef(repo_id=REPO))


def test_a_redirect_of_the_metadata_does_not_carry_the_token_away(serve_hub: HubMaker) -> None:
    hub, other = serve_hub(tokens=TOKENS), serve_hub()
    hub.faults.add(FaultRule(fault=Redirect(origin=other.url), path="/api/models", first=1))
    pin(hub, SECRET)
    assert other.requests
    assert not any(record.has_token for record in other.requests)


@pytest.mark.parametrize("repo_id", [REPO, "org/absent"])
def test_no_error_holds_the_token(serve_hub: HubMaker, repo_id: str) -> None:
    hub = serve_hub(tokens=TOKENS)
    hub.store.restrict(REPO, gate="auto")
    with pytest.raises(errors.RolloutError) as caught:
        pin(hub, SECRET, repo_id)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert SECRET not in shown
    assert SECRET.encode() not in pickle.dumps(caught.value)


def test_a_token_of_the_machines_user_is_never_picked_up(serve_hub: HubMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub = serve_hub(tokens=TOKENS)
    pin(hub)
    assert not any(record.has_token for record in hub.requests)


def test_a_file_is_asked_for_by_its_quoted_name(serve_hub: HubMaker) -> None:
    hub = serve_hub()
    client = HubClient(hub.url, None)
    pinned = PinnedModel(repo_id=REPO, revision="main", commit_sha="0" * 40, files=(ModelFile(path="a", size_bytes=0),))
    assert client.resolve_url(pinned, "a b#c?.json").endswith("/a%20b%23c%3F.json")
