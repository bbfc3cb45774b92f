"""Hugging Face: pin a revision, check access, read ranges of files.

The token travels in the Authorization header to the hub's own origin and nowhere else: not to the host of a redirect
(the CDN's links are signed), not into a message.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

from huggingface_hub import HfApi
from huggingface_hub import errors as hf  # its HTTPError is that of whichever httpx the release uses
from huggingface_hub.hf_api import RepoFile

from rollout import errors
from rollout.clients.raw_http import HttpPool, HttpResponse, origin
from rollout.clients.retrying import TRANSIENT_STATUSES, transient, with_retries
from rollout.model import ModelFile, ModelRef, PinnedModel
from rollout.selection import select_files

METADATA_ATTEMPTS = 5
"""With back-off from 0.5 s about eight seconds: what a restart of a proxy takes."""

READ_BYTES = 2**20
"""Between two looks at progress and the stop signal."""

DOCUMENT_LIMIT_BYTES = 64 * 2**20
"""The largest index that we know of (1 TB of weights in small experts) has 15 MB; a config.json a few kilobytes."""

_MAX_REDIRECTS = 5
_EXPIRED = frozenset({400, 401, 403, 404, 410})
"""What content delivery networks answer to a signed link whose time has passed."""


class HubClient:
    """One hub, one identity. `token=None` is anonymous: no token of the machine's user is ever picked up."""

    def __init__(
        self, endpoint: str, token: str | None, *, stall_timeout_s: float = 30.0, pool: HttpPool | None = None
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self._token = token
        self._api = HfApi(endpoint=self.endpoint, token=token or False, library_name="llm-rollout")
        self.pool = pool or HttpPool(stall_timeout_s=stall_timeout_s)

    def pin(self, model: ModelRef, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> PinnedModel:
        """Resolve the revision to a commit, choose its files, and make sure that this identity may read them.

        Raises:
            RepositoryNotFound, RepositoryRenamed, RepositoryGated, RevisionNotFound: each before any byte moves.
            CheckpointInvalid: hostile names, no weights, no configuration.
            TransientError: the hub does not answer.
        """
        info = self._metadata(model, partial(self._api.model_info, model.repo_id, revision=model.revision))
        if info.id != model.repo_id:
            raise errors.RepositoryRenamed(
                f"{model.repo_id} is now called {info.id}.",
                where=self.endpoint,
                resolution=f"Ask for {info.id} if that is the model that you mean: a name can be taken by others.",
            )
        assert info.sha is not None, "model_info of a revision always names the commit"
        tree = {file.path: file for file in self._metadata(model, partial(self._tree, model.repo_id, info.sha))}
        selection = select_files(tree, include=include, exclude=exclude)
        pinned = PinnedModel(
            repo_id=model.repo_id,
            revision=model.revision,
            commit_sha=info.sha,
            files=tuple(_model_file(tree[path]) for path in selection.selected),
            excluded=selection.excluded,
            gated=bool(info.gated),
        )
        self.check_access(pinned)
        return pinned

    def tags(self, model: ModelRef) -> dict[str, str]:
        """All tags of the repository, with what they point to.

        Raises:
            RepositoryNotFound, RepositoryGated, TransientError: the hub does not say.
        """
        refs = self._metadata(model, partial(self._api.list_repo_refs, model.repo_id))
        return {tag.name: tag.target_commit for tag in refs.tags}

    def check_access(self, pinned: PinnedModel) -> None:
        """Ask for the largest file without fetching it: metadata of a gated repository is open, its files are not.

        Raises:
            RepositoryGated: licence not accepted, token missing, invalid or without the right.
        """
        largest = max(pinned.files, key=lambda file: file.size_bytes)

        def ask() -> None:
            with self.pool.request("HEAD", self.resolve_url(pinned, largest.path), self._headers()) as response:
                if response.status >= 400:
                    raise self._refusal(response, pinned.repo_id, pinned.revision)

        with_retries(ask, attempts=METADATA_ATTEMPTS)

    def open(self, pinned: PinnedModel, file: ModelFile) -> HubFile:
        return HubFile(self, pinned, file)

    def read(self, pinned: PinnedModel, file: ModelFile) -> bytes:
        """A small file (config.json, an index) whole.

        Raises:
            CheckpointInvalid: it is too large to be one.
            TransientError, RepositoryGated, RepositoryNotFound, TransferFailed.
        """
        source = self.open(pinned, file)
        if file.size_bytes > DOCUMENT_LIMIT_BYTES:
            raise errors.CheckpointInvalid(
                f"it has {file.size_bytes:,} bytes, more than any such file.",
                where=source.where,
                resolution="Look at it on the hub, and choose another revision.",
            )

        def ask() -> bytes:
            content = bytearray(file.size_bytes)
            for _ in source.read(0, memoryview(content)):
                pass
            return bytes(content)

        return with_retries(ask, attempts=METADATA_ATTEMPTS) if file.size_bytes else b""

    def resolve_url(self, pinned: PinnedModel, path: str) -> str:
        return f"{self.endpoint}/{pinned.repo_id}/resolve/{pinned.commit_sha}/{quote(path)}"

    def download_arguments(self, pinned: PinnedModel, file: ModelFile, folder: Path) -> dict[str, Any]:
        """Of `huggingface_hub.hf_hub_download`, for one file below `folder`: what is in xet comes through hf_xet."""
        return {
            "repo_id": pinned.repo_id,
            "filename": file.path,
            "revision": pinned.commit_sha,
            "local_dir": str(folder),
            "endpoint": self.endpoint,
            "token": self._token or False,
            "library_name": "llm-rollout",
        }

    def refusal(
        self, pinned: PinnedModel, status: int, code: str | None, retry_after: str | None
    ) -> errors.RolloutError:
        """The error for a status of 400 or more, with the hub's X-Error-Code, that huggingface_hub met."""
        return self._error_for_status(status, code, pinned.repo_id, pinned.revision, retry_after)

    @contextlib.contextmanager
    def get(self, url: str, byte_range: str) -> Iterator[HttpResponse]:
        """GET with the token if, and only if, `url` is on the hub's own origin. Redirects are not followed."""
        with self.pool.request("GET", url, self.headers_for(url) | {"Range": byte_range}) as response:
            yield response

    def headers_for(self, url: str) -> dict[str, str]:
        """Headers for a GET: with the token only to the hub's own origin."""
        return self._headers() if origin(url) == origin(self.endpoint) else _anonymous_headers()

    def refuse(self, response: HttpResponse, pinned: PinnedModel) -> errors.RolloutError:
        """The error for a status of 400 or more from the hub itself."""
        return self._refusal(response, pinned.repo_id, pinned.revision)

    def _headers(self) -> dict[str, str]:
        token = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return _anonymous_headers() | token

    def _tree(self, repo_id: str, commit_sha: str) -> list[RepoFile]:
        entries = self._api.list_repo_tree(repo_id, revision=commit_sha, recursive=True)
        return [entry for entry in entries if isinstance(entry, RepoFile)]

    def _metadata(self, model: ModelRef, call: Callable[[], Any]) -> Any:
        def mapped() -> Any:
            try:
                return call()
            except (hf.HTTPError, hf.OfflineModeIsEnabled, ValueError) as error:
                raise self._error_for(error, model) from _without_request(error)

        return with_retries(mapped, attempts=METADATA_ATTEMPTS)

    def _error_for(self, error: Exception, model: ModelRef) -> errors.RolloutError:
        if isinstance(error, hf.OfflineModeIsEnabled):
            return errors.BadInput(
                "huggingface_hub is set to offline mode.", where=self.endpoint, resolution="Unset HF_HUB_OFFLINE."
            )
        response = getattr(error, "response", None)
        if response is None:
            return transient(f"the hub does not answer ({type(error).__name__}).", where=self.endpoint)
        return self._error_for_status(
            response.status_code,
            response.headers.get("X-Error-Code"),
            model.repo_id,
            model.revision,
            response.headers.get("Retry-After"),
        )

    def _refusal(self, response: HttpResponse, repo_id: str, revision: str) -> errors.RolloutError:
        code, retry_after = response.headers.get("X-Error-Code"), response.headers.get("Retry-After")
        return self._error_for_status(response.status, code, repo_id, revision, retry_after)

    def _error_for_status(
        self, status: int, code: str | None, repo_id: str, revision: str, retry_after: str | None
    ) -> errors.RolloutError:
        page = f"{self.endpoint}/{repo_id}"
        if status in TRANSIENT_STATUSES:
            return transient(f"the hub answers with status {status}.", where=page, retry_after=retry_after)
        if code == "RevisionNotFound":
            return errors.RevisionNotFound(
                f"{repo_id} has no branch, tag or commit {revision!r}.",
                where=self.endpoint,
                resolution=f"Look at {page}/tree/main for what there is.",
            )
        if code == "GatedRepo":
            return errors.RepositoryGated(f"{repo_id} is gated{self._who()}.", resolution=self._how_to_gain(page))
        if status == 401 and self._token and code is None:
            return errors.RepositoryGated(
                "the hub does not accept the token (expired, revoked or mistyped).",
                where=self.endpoint,
                resolution=f"Make a new one at {self.endpoint}/settings/tokens and store it in the Secret block.",
            )
        if code == "RepoNotFound" or status in (401, 404):
            return errors.RepositoryNotFound(
                f"there is no repository {repo_id}, or it is private and not visible{self._who()}.",
                where=self.endpoint,
                resolution="Check the spelling; for a private repository, use a token of an account that may read it.",
            )
        if status == 403:
            return errors.RepositoryGated(
                f"the hub refuses to hand out {repo_id}: the token lacks a right.",
                where=self.endpoint,
                resolution=f"At {self.endpoint}/settings/tokens, give the token read access to gated repositories.",
            )
        return errors.TransferFailed(f"the hub answers with status {status}.", where=page)

    def _who(self) -> str:
        return " to the account of the token" if self._token else " without a token"

    def _how_to_gain(self, page: str) -> str:
        if self._token:
            return f"Accept its licence at {page} with the account of the token (some wait for a review), then rerun."
        return f"Accept its licence at {page}, and name the Secret block with that account's token in hub_token_secret."


class HubFile:
    """One file at a commit, read in ranges by many threads. Remembers the signed link that the hub redirects to."""

    def __init__(self, hub: HubClient, pinned: PinnedModel, file: ModelFile) -> None:
        self._hub = hub
        self._pinned = pinned
        self._file = file
        self._lock = threading.Lock()
        self._link: str | None = None

    @property
    def where(self) -> str:
        return f"{self._pinned.repo_id}@{self._pinned.short_sha}/{self._file.path}"

    def read(self, start: int, view: memoryview) -> Iterator[int]:
        """Fetch `len(view)` bytes from `start`, and yield how many came each time; one attempt.

        Raises:
            TransientError: the connection failed or stalled, the body ended early, the link has expired, or the answer
                was not the range that was asked for.
            RepositoryGated, RepositoryNotFound, TransferFailed: trying again would not help.
        """
        byte_range = f"bytes={start}-{start + len(view) - 1}"
        known = link = self._link
        url = link or self._hub.resolve_url(self._pinned, self._file.path)
        for _ in range(_MAX_REDIRECTS):
            with self._hub.get(url, byte_range) as response:
                location = self._redirected_to(url, response)
                if location is None:
                    self._check(response, start, len(view), link, was_known=link == known)
                    yield from self._receive(response, view)
                    return
            url = location
            if origin(url) != origin(self._hub.endpoint):
                link = self._remember(url)
        raise errors.TransferFailed("the hub redirects in a circle.", where=self.where)

    def address(self) -> tuple[str, dict[str, str]]:
        """Where the file's bytes are now, and the headers to ask with; without the token if that is another origin.

        Raises:
            TransientError, RepositoryGated, RepositoryNotFound, TransferFailed.
        """
        url = self._hub.resolve_url(self._pinned, self._file.path)
        for _ in range(_MAX_REDIRECTS):
            with self._hub.get(url, "bytes=0-0") as response:
                location = self._redirected_to(url, response)
                if location is None:
                    if response.status >= 400:
                        raise self._hub.refuse(response, self._pinned)
                    return url, self._hub.headers_for(url)
            url = location
        raise errors.TransferFailed("the hub redirects in a circle.", where=self.where)

    def reject(self) -> None:
        """What came was wrong: the next reading asks for a new link, and with it perhaps for another copy."""
        with self._lock:
            self._link = None

    def _remember(self, link: str) -> str:
        with self._lock:
            self._link = link
        return link

    def _forget(self, link: str) -> None:
        with self._lock:
            if self._link == link:
                self._link = None

    def _redirected_to(self, url: str, response: HttpResponse) -> str | None:
        if response.status not in (301, 302, 303, 307, 308):
            return None
        location = urljoin(url, response.headers.get("Location", ""))
        response.text()  # the connection can be used again
        scheme, host, _ = origin(location)
        if scheme not in ("http", "https") or (origin(url)[0] == "https" and scheme != "https"):
            raise errors.TransferFailed(
                f"the hub redirects to an address without encryption ({scheme}://{host}).", where=self.where
            )
        return location

    def _check(self, response: HttpResponse, start: int, count: int, link: str | None, *, was_known: bool) -> None:
        """Accept nothing but exactly the range that was asked for, of a file of the size that the tree states."""
        size = self._file.size_bytes
        if response.status >= 400:
            if link is not None and response.status in _EXPIRED:
                self._forget(link)
                # A new one is to be had at once; where a new one is refused, waiting may help.
                what = "has expired" if was_known else "is refused"
                raise transient(
                    f"the signed link {what} (status {response.status}).",
                    where=self.where,
                    retry_after=0 if was_known else None,
                )
            raise self._hub.refuse(response, self._pinned)
        whole = response.status == 200 and (start, count) == (0, size)
        expected_range = f"bytes {start}-{start + count - 1}/{size}"
        if not whole and (response.status != 206 or response.headers.get("Content-Range") != expected_range):
            raise transient(
                f"asked for {expected_range!r}, got status {response.status} with"
                f" {response.headers.get('Content-Range')!r}.",
                where=self.where,
            )
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.content_length not in (count, None) or encoding != "identity":
            raise transient(
                f"asked for {count} bytes, the server announces {response.content_length} ({encoding}).",
                where=self.where,
            )

    def _receive(self, response: HttpResponse, view: memoryview) -> Iterator[int]:
        filled = 0
        while filled < len(view):
            count = response.read_into(view[filled : filled + READ_BYTES])
            if not count:
                raise transient(f"the body ended {len(view) - filled} bytes early.", where=self.where)
            filled += count
            yield count


def _anonymous_headers() -> dict[str, str]:
    return {"User-Agent": "llm-rollout", "Accept-Encoding": "identity"}


def _model_file(file: RepoFile) -> ModelFile:
    return ModelFile(
        path=file.path,
        size_bytes=file.lfs.size if file.lfs else file.size,
        sha256=file.lfs.sha256 if file.lfs else None,
        git_blob_sha1=None if file.lfs else file.blob_id,
        is_xet=file.xet_hash is not None,
    )


def _without_request(error: Exception) -> Exception | None:
    # HTTP errors hold the request, and with it the Authorization header, which a pickled traceback would carry along.
    return None if isinstance(error, hf.HTTPError) else error
