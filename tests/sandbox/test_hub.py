"""The hub stand-in, seen by the official client and by plain HTTP."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from sandbox.faults import Corrupt, FaultRule, Reply
from sandbox.hub import HubServer, HubToken
from sandbox.hub_store import HubStore, tree_oid

REPO = "acme/tiny"
WEIGHTS = bytes(range(256)) * 1000
FILES: dict[str, Path | bytes] = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}',
    "README.md": "# Tiny – ünïcode\n".encode(),
    "empty.txt": b"",
    "model.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "original/deep/weights.pth": b"\x80" * 300,
}
TOKENS = {
    "hf_reader": HubToken(user="ada", accepted=frozenset({"acme/gated"}), private=frozenset({"acme/private"})),
    "hf_stranger": HubToken(user="bob"),
    "hf_waiting": HubToken(user="cyd", awaiting_review=frozenset({"acme/gated"})),
    "hf_fine_grained": HubToken(user="dan", role="fineGrained", reads_gated=False, accepted=frozenset({"acme/gated"})),
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(root=tmp_path / "hub", tokens=TOKENS, tree_page_entries=3) as running:
        running.store.publish(REPO, FILES, tags=["v1"])
        yield running


@pytest.fixture
def hub_with_cdn(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(root=tmp_path / "hub", tokens=TOKENS, cdn_link_ttl_s=3600) as running:
        running.store.publish(REPO, FILES)
        yield running


def api(hub: HubServer, token: str | None = None) -> HfApi:
    return HfApi(endpoint=hub.url, token=token or False)


def resolve_url(hub: HubServer, path: str, repo: str = REPO, revision: str = "main") -> str:
    return f"{hub.url}/{repo}/resolve/{revision}/{path}"


# Metadata


def test_model_info_states_commit_files_and_access(hub: HubServer) -> None:
    sha = hub.store.publish(REPO, FILES)
    info = api(hub).model_info(REPO, files_metadata=True)
    assert (info.sha, info.gated, info.private) == (sha, False, False)
    assert info.last_modified is not None
    assert info.config == json.loads(FILES["config.json"])  # type: ignore[arg-type]
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert set(siblings) == set(FILES)
    lfs = siblings["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert siblings["config.json"].lfs is None


def test_only_the_expanded_properties_are_answered(hub: HubServer) -> None:
    info = api(hub).model_info(REPO, expand=["sha", "gated"])
    assert info.sha is not None
    assert info.siblings is None
    with pytest.raises(BadRequestError, match="widgetData"):
        api(hub).model_info(REPO, expand=["widgetData"])


def test_a_paginated_tree_is_complete_and_states_the_hashes_that_git_and_lfs_use(hub: HubServer) -> None:
    entries = list(api(hub).list_repo_tree(REPO, recursive=True))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    assert set(files) == set(FILES)
    assert {entry.path for entry in entries if isinstance(entry, RepoFolder)} == {"original", "original/deep"}
    lfs = files["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs["sha256"], lfs["size"]) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    # `printf '{}' | git hash-object --stdin`
    assert files["original/params.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    # `git hash-object` of an empty file
    assert files["empty.txt"].blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert sum("/tree/" in record.path for record in hub.requests) == 3


def test_directories_have_the_hash_that_git_gives_them(tmp_path: Path) -> None:
    store = HubStore(tmp_path)
    store.publish(REPO, {"a.txt": b"a\n", "a/b.txt": b"b\n", "a0": b"c\n"})
    repository = store.repository(REPO)
    assert repository is not None
    commit = repository.resolve("main")
    assert commit is not None
    # `git write-tree` over these files.
    assert tree_oid(commit.files, "") == "68af1a46174d438f878e46896f2161e14ec4a2b7"


def test_gitattributes_decide_what_is_lfs(hub: HubServer) -> None:
    attributes = b"# comment\ntokenizer.json filter=lfs diff=lfs merge=lfs -text\n"
    files: dict[str, Path | bytes] = {".gitattributes": attributes, "tokenizer.json": b"{}", "a.safetensors": b"text"}
    hub.store.publish("acme/attributes", files)
    infos = api(hub).model_info("acme/attributes", files_metadata=True).siblings or []
    assert {info.rfilename for info in infos if info.lfs} == {"tokenizer.json"}


def test_a_tree_of_one_directory_and_expanded_entries(hub: HubServer) -> None:
    entries = list(api(hub).list_repo_tree(REPO, "original", expand=True))
    assert [entry.path for entry in entries] == ["original/deep", "original/params.json"]
    assert entries[1].last_commit is not None
    with pytest.raises(RemoteEntryNotFoundError):
        list(api(hub).list_repo_tree(REPO, "nowhere"))
    infos = api(hub).get_paths_info(REPO, ["config.json", "original"])
    assert [info.path for info in infos] == ["config.json", "original"]


def test_refs_and_revisions_name_commits(hub: HubServer) -> None:
    first = hub.store.publish(REPO, FILES)
    second = hub.store.publish(REPO, {**FILES, "new.txt": b"new"}, branch="feature/x")
    refs = api(hub).list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "feature/x": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    for revision, expected in (("v1", first), ("feature/x", second), (second, second), (second[:8], second)):
        assert api(hub).model_info(REPO, revision=revision).sha == expected
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: nope"):
        api(hub).model_info(REPO, revision="nope")


def test_metadata_is_answered_304_to_who_has_it_already(hub: HubServer) -> None:
    url = f"{hub.url}/api/models/{REPO}"
    etag = requests.get(url, timeout=60).headers["ETag"]
    assert requests.get(url, headers={"If-None-Match": etag}, timeout=60).status_code == 304


# Files


@pytest.mark.parametrize("server", ["hub", "hub_with_cdn"])
def test_the_official_client_downloads_every_file_bit_exactly(
    server: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    hub: HubServer = request.getfixturevalue(server)
    folder = snapshot_download(REPO, endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == FILES
    path = hf_hub_download(
        REPO, "model.safetensors", revision="main", endpoint=hub.url, token=False, local_dir=tmp_path / "one"
    )
    assert Path(path).read_bytes() == WEIGHTS


@pytest.mark.parametrize("server", ["hub", "hub_with_cdn"])
def test_file_metadata_states_commit_size_and_hash(server: str, request: pytest.FixtureRequest) -> None:
    hub: HubServer = request.getfixturevalue(server)
    sha = api(hub).model_info(REPO).sha
    big = get_hf_file_metadata(hf_hub_url(REPO, "model.safetensors", endpoint=hub.url), token=False)
    assert (big.commit_hash, big.size, big.etag) == (sha, len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    small = get_hf_file_metadata(hf_hub_url(REPO, "original/params.json", endpoint=hub.url), token=False)
    assert (small.commit_hash, small.size) == (sha, 2)
    assert small.etag == "9e26dfeeb6e641a33dae4961196235bdb965b21b"


@pytest.mark.parametrize(
    ("header", "status", "expected", "content_range"),
    [
        ("bytes=0-9", 206, WEIGHTS[:10], "bytes 0-9/256000"),
        ("bytes=255990-", 206, WEIGHTS[-10:], "bytes 255990-255999/256000"),
        ("bytes=-4", 206, WEIGHTS[-4:], "bytes 255996-255999/256000"),
        ("bytes=255990-999999", 206, WEIGHTS[-10:], "bytes 255990-255999/256000"),
        ("bytes=256000-", 416, b"", "bytes */256000"),
        ("bytes=0-1,5-6", 200, WEIGHTS, None),
        ("lines=1-2", 200, WEIGHTS, None),
    ],
)
def test_ranges_are_answered_as_http_says(
    hub: HubServer, header: str, status: int, expected: bytes, content_range: str | None
) -> None:
    answer = requests.get(resolve_url(hub, "model.safetensors"), headers={"Range": header}, timeout=60)
    assert (answer.status_code, answer.content) == (status, expected)
    assert answer.headers.get("Content-Range") == content_range


def test_a_range_of_an_older_version_is_answered_with_the_whole_file(hub: HubServer) -> None:
    headers = {"Range": "bytes=0-9", "If-Range": '"another"'}
    assert requests.get(resolve_url(hub, "model.safetensors"), headers=headers, timeout=60).status_code == 200


def test_small_files_go_through_the_resolve_cache(hub: HubServer) -> None:
    answer = requests.get(resolve_url(hub, "config.json"), timeout=60, allow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["Location"].startswith("/api/resolve-cache/models/acme/tiny/")
    assert answer.headers["X-Repo-Commit"] == api(hub).model_info(REPO).sha


def test_missing_entries_still_name_the_commit(hub: HubServer) -> None:
    with pytest.raises(RemoteEntryNotFoundError) as caught:
        get_hf_file_metadata(hf_hub_url(REPO, "absent.json", endpoint=hub.url), token=False)
    assert caught.value.response.headers["X-Repo-Commit"] == api(hub).model_info(REPO).sha


def test_hostile_names_are_listed_and_served_as_they_were_published(hub: HubServer) -> None:
    names = ["../escape.txt", "/etc/absolute", "conﬁg.json", "a b%2F.txt"]
    hub.store.publish("acme/hostile", {name: name.encode() for name in names})
    listed = [entry.path for entry in api(hub).list_repo_tree("acme/hostile", recursive=True)]
    assert set(names) <= set(listed)
    for name in ("conﬁg.json", "a b%2F.txt"):
        url = resolve_url(hub, urllib.parse.quote(name, safe=""), repo="acme/hostile")
        assert requests.get(url, timeout=60).content == name.encode()


# Access


def test_a_gated_repository_shows_its_metadata_but_not_its_files(hub: HubServer) -> None:
    hub.store.publish("acme/gated", FILES)
    hub.store.restrict("acme/gated", gate="manual")
    assert api(hub).model_info("acme/gated").gated == "manual"
    expectations = {
        None: (GatedRepoError, "401.*You must have access to it and be authenticated"),
        "hf_stranger": (GatedRepoError, "403.*you are not in the authorized list"),
        "hf_waiting": (GatedRepoError, "403.*awaiting a review from the repo authors"),
        "hf_fine_grained": (HfHubHTTPError, "403.*enable access to public gated repositories"),
    }
    for token, (error, message) in expectations.items():
        with pytest.raises(error, match=f"(?s){message}"):
            list(api(hub, token).list_repo_tree("acme/gated"))
        with pytest.raises(error, match=f"(?s){message}"):
            api(hub, token).auth_check("acme/gated")
        with pytest.raises(error):
            get_hf_file_metadata(hf_hub_url("acme/gated", "config.json", endpoint=hub.url), token=token or False)
    assert len(list(api(hub, "hf_reader").list_repo_tree("acme/gated"))) > 0
    api(hub, "hf_reader").auth_check("acme/gated")


@pytest.mark.parametrize("repo", ["acme/private", "acme/never-made"])
def test_private_and_missing_repositories_look_the_same_to_strangers(hub: HubServer, repo: str) -> None:
    hub.store.publish("acme/private", FILES)
    hub.store.restrict("acme/private", private=True)
    for token, status in ((None, 401), ("hf_stranger", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).model_info(repo)
        assert caught.value.response.status_code == status
        assert not isinstance(caught.value, GatedRepoError)
    assert api(hub, "hf_reader").model_info("acme/private").private is True


def test_an_unknown_token_is_refused_even_for_public_repositories(hub: HubServer) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
        api(hub, "hf_unknown").model_info(REPO)
    assert not isinstance(caught.value, RepositoryNotFoundError)


def test_whoami_names_the_user_and_the_tokens_role(hub: HubServer) -> None:
    who = api(hub, "hf_fine_grained").whoami()
    assert (who["name"], who["auth"]["accessToken"]["role"]) == ("dan", "fineGrained")


def test_a_renamed_repository_redirects_metadata_and_files(hub: HubServer, tmp_path: Path) -> None:
    hub.store.rename(REPO, "acme/new-name")
    assert api(hub).model_info(REPO).id == "acme/new-name"
    answer = requests.get(resolve_url(hub, "model.safetensors"), timeout=60, allow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (307, "/acme/new-name/resolve/main/model.safetensors")
    path = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, token=False, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS


def test_what_the_hub_does_not_know_is_refused(hub: HubServer) -> None:
    assert requests.get(f"{hub.url}/api/models/{REPO}/xet-read-token/main", timeout=60).status_code == 404
    assert requests.get(f"{hub.url}/api/datasets/{REPO}", timeout=60).status_code == 404
    assert requests.post(f"{hub.url}/api/models/{REPO}/refs", timeout=60).status_code == 405
    assert requests.get(f"{hub.url}/api/models/{REPO}/tree/main?limit=x", timeout=60).status_code == 400


# CDN


def test_the_official_client_keeps_its_token_from_the_cdn(hub_with_cdn: HubServer, tmp_path: Path) -> None:
    hub = hub_with_cdn
    hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, token="hf_reader", cache_dir=tmp_path)
    to_cdn = [record for record in hub.requests if hub.cdn_url.endswith(record.host)]
    assert to_cdn
    assert not any(record.has_token for record in to_cdn)
    assert any(record.has_token for record in hub.requests)
    assert "hf_reader" not in repr(hub.requests)


def test_the_cdn_refuses_and_records_a_token(hub_with_cdn: HubServer) -> None:
    hub = hub_with_cdn
    link = requests.get(resolve_url(hub, "model.safetensors"), timeout=60, allow_redirects=False)
    assert link.status_code == 302
    assert link.headers["X-Linked-Size"] == str(len(WEIGHTS))
    location = link.headers["Location"]
    assert requests.get(location, headers={"Authorization": "Bearer hf_reader"}, timeout=60).status_code == 400
    assert hub.requests[-1].has_token
    assert requests.get(location, headers={"Range": "bytes=5-6"}, timeout=60).content == WEIGHTS[5:7]


def test_an_expired_or_forged_link_is_refused(hub_with_cdn: HubServer) -> None:
    hub = hub_with_cdn
    location = requests.get(resolve_url(hub, "model.safetensors"), timeout=60, allow_redirects=False).headers[
        "Location"
    ]
    assert requests.get(location.replace("Expires=1", "Expires=2"), timeout=60).status_code == 403
    hub.expire_cdn_links()
    assert requests.get(location, timeout=60).status_code == 403
    assert requests.get(resolve_url(hub, "model.safetensors"), timeout=60).content == WEIGHTS


# Store, faults, process


def test_publishing_again_changes_nothing_and_survives_a_restart(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(WEIGHTS)
    (model / "config.json").write_text("{}")
    store = HubStore(tmp_path / "hub")
    sha = store.publish(REPO, model)
    hashes = (tmp_path / "hub" / "hashes.json").read_bytes()
    restarted = HubStore(tmp_path / "hub")
    assert restarted.publish(REPO, model) == sha
    assert (tmp_path / "hub" / "hashes.json").read_bytes() == hashes
    (model / "config.json").write_text("{ }")
    assert restarted.publish(REPO, model) != sha
    assert restarted.publish("acme/copy", model) == restarted.publish(REPO, model)


def test_faults_hit_the_hub_in_its_own_format(hub: HubServer) -> None:
    hub.faults.add(
        FaultRule(fault=Reply(status=429, retry_after_s=1), path="/api/models", first=1),
        FaultRule(fault=Corrupt(), path="/resolve/.*safetensors", method="GET", first=1),
    )
    answer = requests.get(f"{hub.url}/api/models/{REPO}", timeout=60)
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    assert "error" in answer.json()
    url = resolve_url(hub, "model.safetensors")
    assert requests.get(url, timeout=60).content != WEIGHTS
    assert requests.get(url, timeout=60).content == WEIGHTS
    assert hub.faults.injected == {"reply": 1, "corrupt": 1}


def test_parallel_ranges_assemble_to_the_file(hub_with_cdn: HubServer) -> None:
    url = resolve_url(hub_with_cdn, "model.safetensors")

    def part(start: int) -> bytes:
        return requests.get(url, headers={"Range": f"bytes={start}-{start + 999}"}, timeout=60).content

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(part, range(0, len(WEIGHTS), 1000))) == WEIGHTS


def test_the_hub_runs_as_a_process_and_ends_with_its_parents_stdin(tmp_path: Path) -> None:
    HubStore(tmp_path).publish(REPO, FILES)
    command = [sys.executable, "-m", "sandbox.hub", "--root", str(tmp_path), "--shape", "latency=1ms"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        url = json.loads(process.stdout.readline())["url"]
        assert HfApi(endpoint=url, token=False).model_info(REPO).id == REPO
        assert len(requests.get(f"{url}/_sandbox/stats", timeout=60).json()["requests"]) == 2
        process.stdin.close()
        assert process.wait(timeout=60) == 0
