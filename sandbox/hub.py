"""A stand-in for the Hugging Face Hub: model repositories from local folders, for `huggingface_hub` and plain HTTP.

Simulates: model info (with ETag), tree with LFS metadata and pagination, paths-info, refs, auth-check, whoami; resolve
by HEAD and GET with ranges, the redirect of small files to `/api/resolve-cache`, and (with `cdn_link_ttl_s`) that of
LFS files to signed, expiring links on another origin; public, gated, private, missing and renamed repositories; tokens.
Does not simulate: xet, writing, datasets and spaces, `raw`, git itself, search. What it does not know answers 404.

Statuses, `X-Error-Code` and messages are the real hub's as its client's sources and public reports show them.

    python -m sandbox.hub --root DIR [--port N] [--shape per-connection=50MB/s,latency=20ms] …
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler
from pydantic import TypeAdapter

from sandbox.faults import FaultPlan
from sandbox.hub_store import HubCommit, HubFile, HubRepository, HubStore, lfs_pointer, tree_oid
from sandbox.processes import wait_for_stop
from sandbox.server import LoopbackServer
from sandbox.shaping import Link, Shape
from sandbox.wire import RequestLog, RequestRecord, SlicedBody, wire_middlewares

TREE_PAGE_ENTRIES = 1000
"""The hub's page of a tree listing."""

_INFO_EXPAND = frozenset(
    {"author", "cardData", "config", "createdAt", "disabled", "downloads", "gated", "lastModified", "library_name"}
    | {"likes", "pipeline_tag", "private", "safetensors", "sha", "siblings", "spaces", "tags", "usedStorage"}
)

_MISSING_FINE_GRAINED_RIGHT = (
    "Please enable access to public gated repositories in your fine-grained token settings to view this repository."
)


@dataclasses.dataclass(frozen=True)
class HubToken:
    """Whose token it is, and what it may read beyond public repositories."""

    user: str
    accepted: frozenset[str] = frozenset()
    """Gated repositories whose licence the user has accepted."""
    awaiting_review: frozenset[str] = frozenset()
    """Gated repositories whose authors have not yet answered the user's request."""
    private: frozenset[str] = frozenset()
    """Private repositories that the user may read."""
    role: Literal["read", "write", "fineGrained"] = "read"
    reads_gated: bool = True
    """False: a fine-grained token without the right to read public gated repositories."""


class _Refusal(Exception):
    """An answer other than the one that was asked for, in the hub's format."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}

    def response(self) -> web.Response:
        return web.json_response({"error": self.message}, status=self.status, headers=self.headers)


class _Moved(Exception):
    """The repository goes by another name now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, new)
        self.old, self.new = old, new


class HubServer(LoopbackServer):
    """Serve the repositories under `root`; `store` publishes further ones at any time, also while serving.

    Args:
        tokens: Known tokens. Any other token is refused, as the hub does, even for public repositories.
        cdn_link_ttl_s: Redirect LFS files to a second origin by links that expire after so many seconds. None: the
            hub sends them itself.
        tree_page_entries: Entries on a page of a tree listing.
    """

    def __init__(
        self,
        *,
        root: Path,
        port: int = 0,
        tokens: Mapping[str, HubToken] | None = None,
        faults: FaultPlan | None = None,
        shape: Shape | None = None,
        cdn_link_ttl_s: float | None = None,
        tree_page_entries: int = TREE_PAGE_ENTRIES,
    ) -> None:
        super().__init__(port=port)
        self.store = HubStore(root)
        self.faults = faults or FaultPlan()
        self._tokens = dict(tokens or {})
        self._link = Link(shape)
        self._log = RequestLog()
        self._cdn = None if cdn_link_ttl_s is None else _Cdn(self.store, self._link, cdn_link_ttl_s)
        self._tree_page_entries = tree_page_entries

    @property
    def requests(self) -> tuple[RequestRecord, ...]:
        """All requests up to now, to the hub and to its CDN; `host` tells them apart."""
        return self._log.snapshot()

    def forget_requests(self) -> None:
        self._log.clear()

    @property
    def cdn_url(self) -> str:
        """The CDN's origin. Only with `cdn_link_ttl_s`."""
        if self._cdn is None or self._cdn.url is None:
            raise RuntimeError("this hub has no CDN, or is not started")
        return self._cdn.url

    def expire_cdn_links(self) -> None:
        """Make all links that were given out until now invalid, as if their time had passed."""
        if self._cdn is not None:
            self._cdn.forget_key()

    def build_app(self) -> web.Application:
        app = self._application()
        app.router.add_get("/_sandbox/stats", self._stats)
        app.router.add_get("/api/whoami-v2", self._whoami)
        model = "/api/models/{organisation}/{name}"
        app.router.add_get(model, self._model_info)
        app.router.add_get(model + "/revision/{revision}", self._model_info)
        app.router.add_get(model + "/tree/{revision}", self._tree)
        app.router.add_get(model + "/tree/{revision}/{path:.+}", self._tree)
        app.router.add_post(model + "/paths-info/{revision}", self._paths_info)
        app.router.add_get(model + "/refs", self._refs)
        app.router.add_get(model + "/auth-check", self._auth_check)
        app.router.add_get("/api/resolve-cache/models/{organisation}/{name}/{revision}/{path:.+}", self._send_git_file)
        app.router.add_get("/{organisation}/{name}/resolve/{revision}/{path:.+}", self._resolve)
        app.cleanup_ctx.append(self._serve_cdn)
        return app

    def _application(self) -> web.Application:
        middlewares = wire_middlewares(
            log=self._log, plan=self.faults, link=self._link, error_response=_error_for_status
        )
        return web.Application(middlewares=[*middlewares, _answer_refusals])

    async def _serve_cdn(self, _: web.Application) -> AsyncIterator[None]:
        if self._cdn is None:
            yield
            return
        app = self._application()
        app.router.add_get("/repos/{organisation}/{name}/{blob}", self._cdn.send)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self._cdn.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield
        self._cdn.url = None
        await runner.cleanup()

    # Who asks, and for what

    def _caller(self, request: web.Request) -> HubToken | None:
        header = request.headers.get(hdrs.AUTHORIZATION)
        if header is None:
            return None
        token = self._tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return token

    def _visible(self, request: web.Request) -> HubRepository:
        """The repository of the request's path, if the caller may know that it exists."""
        caller = self._caller(request)
        repo_id = f"{request.match_info['organisation']}/{request.match_info['name']}"
        repository = self.store.repository(repo_id)
        if repository is not None and repository.record.moved_to is not None:
            raise _Moved(repo_id, repository.record.moved_to)
        if repository is not None and not (
            repository.record.private and (caller is None or repo_id not in caller.private)
        ):
            return repository
        if caller is None:
            # The hub does not tell strangers which names exist.
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.", code="RepoNotFound")
        raise _Refusal(HTTPStatus.NOT_FOUND, "Repository not found", code="RepoNotFound")

    def _readable(self, request: web.Request) -> HubRepository:
        """The repository of the request's path, if the caller may read its files."""
        repository = self._visible(request)
        if not repository.record.gate:
            return repository
        caller, repo_id = self._caller(request), repository.repo_id
        if caller is None:
            raise _Refusal(
                HTTPStatus.UNAUTHORIZED,
                f"Access to model {repo_id} is restricted. You must have access to it and be authenticated to access "
                "it. Please log in.",
                code="GatedRepo",
            )
        if not caller.reads_gated:
            raise _Refusal(HTTPStatus.FORBIDDEN, _MISSING_FINE_GRAINED_RIGHT)
        if repo_id in caller.awaiting_review:
            message = f"Your request to access model {repo_id} is awaiting a review from the repo authors."
            raise _Refusal(HTTPStatus.FORBIDDEN, message, code="GatedRepo")
        if repo_id not in caller.accepted:
            raise _Refusal(
                HTTPStatus.FORBIDDEN,
                f"Access to model {repo_id} is restricted and you are not in the authorized list. Visit "
                f"https://huggingface.co/{repo_id} to ask for access.",
                code="GatedRepo",
            )
        return repository

    # API

    async def _stats(self, _: web.Request) -> web.Response:
        records = [dataclasses.asdict(record) for record in self.requests]
        return web.json_response({"requests": records, "faults": self.faults.injected})

    async def _whoami(self, request: web.Request) -> web.Response:
        caller = self._caller(request)
        if caller is None:
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        token = {"displayName": "sandbox", "role": caller.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        return web.json_response(
            {
                "type": "user",
                "id": hashlib.sha256(caller.user.encode()).hexdigest()[:24],
                "name": caller.user,
                "fullname": caller.user,
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    async def _model_info(self, request: web.Request) -> web.Response:
        repository = self._visible(request)
        commit = _commit(repository, request)
        info = _info(repository, commit, with_blobs=request.query.get("blobs", "").lower() == "true")
        expand = request.query.getall("expand", [])
        if unknown := set(expand) - _INFO_EXPAND:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f'"expand" does not know {sorted(unknown)}')
        if expand:
            info = {key: value for key, value in info.items() if key in {"_id", "id", *expand}}
        return _cacheable_json(request, info)

    async def _tree(self, request: web.Request) -> web.Response:
        repository = self._readable(request)
        commit = _commit(repository, request)
        recursive, expand = (_flag(request.query.get(name, "false"), name) for name in ("recursive", "expand"))
        entries = _tree_entries(commit, request.match_info.get("path", "").strip("/"), recursive=recursive)
        if entries is None:
            raise _entry_not_found(commit)
        start = _cursor_position(request.query.get("cursor"))
        limit = min(_count(request.query.get("limit"), self._tree_page_entries), self._tree_page_entries)
        page = entries[start : start + limit]
        headers: dict[str, str] = {}
        if start + limit < len(entries):
            query = {**request.query, "cursor": base64.urlsafe_b64encode(b"%d" % (start + limit)).decode()}
            headers[hdrs.LINK] = f'<{self.url}{request.rel_url.raw_path}?{urlencode(query)}>; rel="next"'
        return _cacheable_json(request, [_expanded(entry, commit) for entry in page] if expand else page, headers)

    async def _paths_info(self, request: web.Request) -> web.Response:
        repository = self._readable(request)
        commit = _commit(repository, request)
        form = await request.post()
        wanted = {str(path) for path in form.getall("paths", [])}
        entries = [entry for entry in _tree_entries(commit, "", recursive=True) or [] if entry["path"] in wanted]
        if _flag(str(form.get("expand", "false")), "expand"):
            entries = [_expanded(entry, commit) for entry in entries]
        return web.json_response(entries)

    async def _refs(self, request: web.Request) -> web.Response:
        record = self._visible(request).record
        answer: dict[str, list[dict[str, str]]] = {"converts": []}
        for kind, prefix, refs in (("branches", "heads", record.branches), ("tags", "tags", record.tags)):
            answer[kind] = [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": sha} for name, sha in refs.items()
            ]
        return _cacheable_json(request, answer)

    async def _auth_check(self, request: web.Request) -> web.Response:
        self._readable(request)
        return web.Response(text="OK")

    # Files

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repository = self._readable(request)
        commit = _commit(repository, request)
        file = _file(commit, request)
        headers = {"X-Repo-Commit": commit.sha, hdrs.ACCEPT_RANGES: "bytes"}
        if file.sha256 is None:
            path = f"{repository.repo_id}/{commit.sha}/{quote(file.path)}"
            query = urlencode({request.rel_url.raw_path: "", "etag": f'"{file.git_oid}"'})
            headers[hdrs.LOCATION] = f"/api/resolve-cache/models/{path}?{query}"
            return _redirect(HTTPStatus.TEMPORARY_REDIRECT, headers)
        etag = f'"{file.sha256}"'
        headers |= {"X-Linked-Size": str(file.size_bytes), "X-Linked-ETag": etag}
        if self._cdn is None:
            return _send(request, repository.blob(file), file.size_bytes, etag, headers, self._link)
        headers[hdrs.LOCATION] = self._cdn.link(repository, file)
        return _redirect(HTTPStatus.FOUND, headers)

    async def _send_git_file(self, request: web.Request) -> web.StreamResponse:
        repository = self._readable(request)
        commit = _commit(repository, request)
        file = _file(commit, request)
        headers = {"X-Repo-Commit": commit.sha}
        return _send(request, repository.blob(file), file.size_bytes, f'"{file.git_oid}"', headers, self._link)


class _Cdn:
    """The second origin: it knows signed links only, and refuses whoever brings a token."""

    def __init__(self, store: HubStore, link: Link, link_ttl_s: float) -> None:
        self.url: str | None = None
        self._store = store
        self._link = link
        self._link_ttl_s = link_ttl_s
        self._key = secrets.token_bytes(32)

    def forget_key(self) -> None:
        self._key = secrets.token_bytes(32)

    def link(self, repository: HubRepository, file: HubFile) -> str:
        path = f"/repos/{repository.repo_id}/{file.blob_name}"
        expires = str(int(time.time() + self._link_ttl_s))
        query = {
            "response-content-disposition": f"inline; filename*=UTF-8''{quote(Path(file.path).name)}",
            "Expires": expires,
            "Signature": self._sign(path, expires),
            "Key-Pair-Id": "SANDBOX",
        }
        return f"{self.url}{path}?{urlencode(query)}"

    async def send(self, request: web.Request) -> web.StreamResponse:
        if hdrs.AUTHORIZATION in request.headers:
            message = "Only one auth mechanism allowed; only the signed query string or the Authorization header"
            return _xml_error(HTTPStatus.BAD_REQUEST, "InvalidArgument", message)
        expires = request.query.get("Expires", "0")
        signature = self._sign(request.path, expires)
        signed = hmac.compare_digest(signature, request.query.get("Signature", ""))
        if not signed or float(expires) < time.time():
            return _xml_error(HTTPStatus.FORBIDDEN, "AccessDenied", "Access denied")
        repo_id = f"{request.match_info['organisation']}/{request.match_info['name']}"
        repository, blob = self._store.repository(repo_id), request.match_info["blob"]
        path = None if repository is None else repository.folder / "blobs" / blob
        if path is None or not path.is_file():  # It was renamed since the link was given out.
            return _xml_error(HTTPStatus.NOT_FOUND, "NoSuchKey", "The specified key does not exist.")
        # The CDN's own ETag says nothing about the content: only the hub's X-Linked-ETag is the sha256.
        etag = f'"{hashlib.md5(blob.encode()).hexdigest()}"'
        return _send(request, path, path.stat().st_size, etag, {}, self._link)

    def _sign(self, path: str, expires: str) -> str:
        return hmac.new(self._key, f"{path}?{expires}".encode(), hashlib.sha256).hexdigest()


@web.middleware
async def _answer_refusals(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except _Refusal as refusal:
        return refusal.response()
    except _Moved as moved:
        location = str(request.rel_url).replace(f"/{moved.old}", f"/{moved.new}", 1)
        return _redirect(HTTPStatus.TEMPORARY_REDIRECT, {hdrs.LOCATION: location})
    except web.HTTPNotFound:
        return _error_for_status(HTTPStatus.NOT_FOUND)
    except web.HTTPMethodNotAllowed:
        return _error_for_status(HTTPStatus.METHOD_NOT_ALLOWED)


def _error_for_status(status: int) -> web.Response:
    messages = {
        HTTPStatus.NOT_FOUND: "Sorry, we can't find the page you are looking for.",
        HTTPStatus.TOO_MANY_REQUESTS: "We had to rate limit you. Please retry later.",
    }
    error_status = HTTPStatus(status)
    return _Refusal(error_status, messages.get(error_status, error_status.phrase)).response()


def _redirect(status: HTTPStatus, headers: Mapping[str, str]) -> web.Response:
    text = f"{status.phrase}. Redirecting to {headers[hdrs.LOCATION]}"
    return web.Response(status=status, text=text, headers=headers)


def _xml_error(status: HTTPStatus, code: str, message: str) -> web.Response:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return web.Response(status=status, text=body, content_type="application/xml")


def _cacheable_json(request: web.Request, payload: object, headers: Mapping[str, str] | None = None) -> web.Response:
    body = json.dumps(payload, ensure_ascii=False).encode()
    etag = f'W/"{len(body):x}-{hashlib.sha1(body).hexdigest()[:27]}"'
    if request.headers.get(hdrs.IF_NONE_MATCH) == etag:
        return web.Response(status=HTTPStatus.NOT_MODIFIED, headers={hdrs.ETAG: etag})
    return web.Response(
        body=body, content_type="application/json", charset="utf-8", headers={hdrs.ETAG: etag, **(headers or {})}
    )


def _commit(repository: HubRepository, request: web.Request) -> HubCommit:
    revision = request.match_info.get("revision", "main")
    commit = repository.resolve(revision)
    if commit is None:
        raise _Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", code="RevisionNotFound")
    return commit


def _file(commit: HubCommit, request: web.Request) -> HubFile:
    file = commit.by_path.get(request.match_info["path"])
    if file is None:
        raise _entry_not_found(commit)
    return file


def _entry_not_found(commit: HubCommit) -> _Refusal:
    headers = {"X-Repo-Commit": commit.sha}
    return _Refusal(HTTPStatus.NOT_FOUND, "Entry not found", code="EntryNotFound", headers=headers)


def _flag(text: str, name: str) -> bool:
    if text.lower() not in {"true", "false", "1", "0"}:
        raise _Refusal(HTTPStatus.BAD_REQUEST, f'"{name}" must be a boolean')
    return text.lower() in {"true", "1"}


def _count(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not re.fullmatch("[1-9][0-9]*", text):
        raise _Refusal(HTTPStatus.BAD_REQUEST, '"limit" must be a positive number')
    return int(text)


def _cursor_position(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(cursor))
    except ValueError as error:
        raise _Refusal(HTTPStatus.BAD_REQUEST, "Invalid cursor") from error


def _info(repository: HubRepository, commit: HubCommit, *, with_blobs: bool) -> dict[str, Any]:
    record, repo_id = repository.record, repository.repo_id
    names = commit.by_path
    info: dict[str, Any] = {
        "_id": hashlib.sha256(repo_id.encode()).hexdigest()[:24],
        "id": repo_id,
        "modelId": repo_id,
        "author": repo_id.partition("/")[0],
        "private": record.private,
        "gated": record.gate,
        "disabled": False,
        "sha": commit.sha,
        "createdAt": _timestamp(record.created_at.timestamp()),
        "lastModified": _timestamp(commit.date.timestamp()),
        "downloads": 0,
        "likes": 0,
        "library_name": "transformers",
        "tags": ["transformers", *(["safetensors"] if any(n.endswith(".safetensors") for n in names) else [])],
        "spaces": [],
        "siblings": [_sibling(file, with_blobs=with_blobs) for file in commit.files],
        "usedStorage": sum(file.size_bytes for file in commit.files),
    }
    if "config.json" in names:
        info["config"] = _config_summary(repository.blob(names["config.json"]))
    return info


def _config_summary(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        return {}
    wanted = ("architectures", "model_type")
    return {key: config[key] for key in wanted if key in config} if isinstance(config, dict) else {}


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def _sibling(file: HubFile, *, with_blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.path}
    if with_blobs:
        sibling |= {"size": file.size_bytes, "blobId": file.git_oid}
        if file.sha256 is not None:
            pointer_size = len(lfs_pointer(file.sha256, file.size_bytes))
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size_bytes, "pointerSize": pointer_size}
    return sibling


def _tree_entries(commit: HubCommit, directory: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """Files and directories below a directory, by path; None if there is no such directory."""
    prefix = f"{directory}/" if directory else ""
    inside = [file for file in commit.files if file.path.startswith(prefix)]
    if not inside and directory:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for file in inside:
        parts = file.path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            path = prefix + "/".join(parts[:depth])
            if path not in entries and (recursive or depth == 1):
                entries[path] = {"type": "directory", "oid": tree_oid(inside, path), "size": 0, "path": path}
        if recursive or len(parts) == 1:
            entries[file.path] = _tree_file(file)
    return [entries[path] for path in sorted(entries)]


def _tree_file(file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": file.git_oid, "size": file.size_bytes, "path": file.path}
    if file.sha256 is not None:
        pointer_size = len(lfs_pointer(file.sha256, file.size_bytes))
        entry["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": pointer_size}
    return entry


def _expanded(entry: dict[str, Any], commit: HubCommit) -> dict[str, Any]:
    last_commit = {"id": commit.sha, "title": commit.title, "date": _timestamp(commit.date.timestamp())}
    security = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return {**entry, "lastCommit": last_commit, "securityFileStatus": security}


def _send(
    request: web.Request, path: Path, size: int, etag: str, headers: Mapping[str, str], link: Link
) -> web.StreamResponse:
    """A file or the asked-for range of it: 200, 206, 304 or 416."""
    common = {hdrs.ETAG: etag, hdrs.ACCEPT_RANGES: "bytes", **headers}
    if request.headers.get(hdrs.IF_NONE_MATCH) in {etag, "*"}:
        return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=common)
    window = _window(request.headers.get(hdrs.RANGE), size)
    if request.headers.get(hdrs.IF_RANGE, etag) != etag or window is None:
        return SlicedBody(path, count=size, headers=common, link=link)
    start, stop = window
    if start >= stop:
        unsatisfied = {**common, hdrs.CONTENT_RANGE: f"bytes */{size}"}
        return web.Response(status=HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=unsatisfied)
    partial = {**common, hdrs.CONTENT_RANGE: f"bytes {start}-{stop - 1}/{size}"}
    return SlicedBody(
        path, offset=start, count=stop - start, status=HTTPStatus.PARTIAL_CONTENT, headers=partial, link=link
    )


def _window(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header asks for; None if there is no single range to heed (RFC 9110)."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", header or "")
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def main(arguments: Iterable[str] | None = None) -> None:
    """Serve until SIGTERM or the end of stdin; the first line on stdout is `{"url": …}`."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.hub", description="A stand-in for the Hugging Face Hub.")
    parser.add_argument("--root", type=Path, required=True, help="where the repositories are")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--shape", type=Shape.parse, help="e.g. per-connection=50MB/s,total=200MB/s,latency=20ms")
    parser.add_argument("--faults", type=FaultPlan.from_json, help="a fault plan as JSON")
    parser.add_argument("--cdn-link-ttl-s", type=float, help="redirect LFS files to a CDN with links valid so long")
    parser.add_argument("--tokens", type=Path, help="JSON file: token -> its HubToken fields")
    options = parser.parse_args(None if arguments is None else list(arguments))
    tokens = TypeAdapter(dict[str, HubToken]).validate_json(options.tokens.read_bytes()) if options.tokens else {}
    server = HubServer(
        root=options.root,
        port=options.port,
        tokens=tokens,
        faults=options.faults,
        shape=options.shape,
        cdn_link_ttl_s=options.cdn_link_ttl_s,
    )
    with server:
        print(json.dumps({"url": server.url}), flush=True)
        wait_for_stop()


if __name__ == "__main__":
    main()
