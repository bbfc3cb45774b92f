"""The API server's routes: discovery, objects, lists, watches, patches, and the connections to pods.

Simulated as a real API server answers: statuses, bodies, warnings, watch events, dry runs, field validation. Not
simulated: protobuf and CBOR bodies, `Table` answers, OpenAPI documents (404), SPDY, exec and attach. What a caller may
do is judged by `rbac`; whoever presents the server's own token may do everything.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
from dataclasses import dataclass, replace
from typing import Any, Protocol

import yaml
from aiohttp import web

from sandbox.cluster import errors, fields, patch, rbac
from sandbox.cluster.errors import ApiError, bad_request
from sandbox.cluster.rbac import COLLECTION_VERBS, NAMED_VERBS, Action, Authorizer, Callers, User
from sandbox.cluster.registry import Deletion, Registry, Writer, decode
from sandbox.cluster.resources import BUILT_IN, CUSTOM, POD, SERVICE, Resource
from sandbox.cluster.selectors import Matcher, field_matcher, is_subset, label_matcher
from sandbox.cluster.store import Change, Store
from sandbox.cluster.streams import PodConnections, follow_log, forward_ports, proxy

WATCH_DEFAULT_S = 1800.0
"""A real API server ends a watch after 30 to 60 minutes when the client names no time."""

BOOKMARK_LEAD_S = 2.0
"""A bookmark comes so long before a watch ends, and once a minute."""

_MERGE, _STRATEGIC = "application/merge-patch+json", "application/strategic-merge-patch+json"
_JSON_PATCH, _APPLY = "application/json-patch+json", "application/apply-patch+yaml"
_ACCESS_REVIEW = ["authorization.k8s.io", "v1", "selfsubjectaccessreviews"]
_SELF_REVIEW = ["authentication.k8s.io", "v1", "selfsubjectreviews"]

logger = logging.getLogger(__name__)

_API_VERSIONS = {
    "kind": "APIVersions",
    "versions": ["v1"],
    "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": "127.0.0.1:443"}],
}
VERSION = {
    "major": "1",
    "minor": "36",
    "gitVersion": "v1.36.0-gke.1000000",
    "gitCommit": "0" * 40,
    "gitTreeState": "clean",
    "buildDate": "2026-01-01T00:00:00Z",
    "goVersion": "go1.27.3",
    "compiler": "gc",
    "platform": "linux/amd64",
}


class Gate(Protocol):
    """What tests switch on and off to make the API server misbehave."""

    def refusal(self, query: dict[str, str]) -> ApiError | None:
        """An error that answers this request instead of its work."""


@dataclass(frozen=True)
class Address:
    """What a request's path names."""

    resource: Resource
    namespace: str | None
    name: str | None
    subresource: str
    rest: str


class Api:
    """The request handler of the API server; `serve` is its only route."""

    def __init__(
        self,
        registry: Registry,
        pods: PodConnections,
        gate: Gate,
        callers: Callers,
        authorizer: Authorizer,
        served: tuple[Resource, ...],
        *,
        aggregated: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """`aggregated`: (group, version) of API servers behind this one, which discovery names; none is reachable."""
        self._registry = registry
        self._store: Store = registry.store
        self._pods = pods
        self._gate = gate
        self._callers = callers
        self._authorizer = authorizer
        self._by_path = {(each.group, each.version, each.plural): each for each in served}
        self._groups = sorted({(each.group, each.version) for each in served if each.group} | set(aggregated))

    async def serve(self, request: web.Request) -> web.StreamResponse:
        try:
            self._caller(request)
            refusal = self._gate.refusal(dict(request.query))
            if refusal is not None:
                raise refusal
            return await self._route(request)
        except ApiError as error:
            return web.json_response(error.status(), status=error.code)
        except Exception as error:
            logger.exception("%s %s", request.method, request.path)
            internal = ApiError(500, "InternalError", f"Internal error occurred: {error}")
            return web.json_response(internal.status(), status=internal.code)

    def _caller(self, request: web.Request) -> User:
        """Who asks; 401 for a token that is nobody's."""
        return self._callers.known_by(request.headers.get("Authorization", ""))

    def _authorize(self, request: web.Request, at: Address) -> None:
        """403 unless the caller may do what it asks for. The name in a field selector counts, as in a path."""
        selector, _, value = request.query.get("fieldSelector", "").partition("=")
        selected = value if (request.method, selector) == ("GET", "metadata.name") else ""
        watch = request.query.get("watch") in ("1", "true")
        asked = rbac.action(request.method, at.resource, at.namespace, at.name, at.subresource, watch=watch)
        self._authorizer.require(self._caller(request), replace(asked, name=at.name or selected))
        if at.subresource == "portforward" and request.method == "GET":
            # Since 1.35 a websocket must be allowed what SPDY's POST always had to be allowed.
            self._authorizer.require(self._caller(request), replace(asked, verb="create"))

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = [part for part in request.path.split("/") if part]
        if request.path in ("/healthz", "/livez", "/readyz"):
            return web.Response(text="ok")
        if parts == ["version"]:
            return web.json_response(VERSION)
        if parts[:1] in (["api"], ["apis"]) and len(parts) < (3 if parts[0] == "api" else 4):
            rbac.require_path(self._caller(request), request.method, request.path)
        if parts[:1] == ["api"]:
            return await self._in_group(request, "", parts[1:], ["v1"])
        if parts[:1] == ["apis"]:
            if len(parts) == 1:
                return web.json_response(self._group_list())
            versions = [version for group, version in self._groups if group == parts[1]]
            if parts[1:] in (_ACCESS_REVIEW, _SELF_REVIEW) and request.method == "POST":
                review = await self._body(request)
                answer = self._who if parts[1:] == _SELF_REVIEW else self._may
                return web.json_response(review | {"status": answer(self._caller(request), review)}, status=201)
            if versions:
                return await self._in_group(request, parts[1], parts[2:], versions)
        return _page_not_found()

    def _who(self, user: User, review: dict[str, Any]) -> dict[str, Any]:
        return {"userInfo": {"username": user.name, "groups": list(user.groups)}}

    def _may(self, user: User, review: dict[str, Any]) -> dict[str, Any]:
        asked = review["spec"]["resourceAttributes"]
        plural = "/".join(part for part in (asked.get("resource"), asked.get("subresource")) if part)
        wanted = Action(
            asked.get("verb", ""), asked.get("group", ""), plural, asked.get("namespace", ""), asked.get("name", "")
        )
        return {"allowed": self._authorizer.allows(user, wanted)}

    async def _in_group(
        self, request: web.Request, group: str, parts: list[str], versions: list[str]
    ) -> web.StreamResponse:
        if not parts:
            return web.json_response(self._group(group) if group else _API_VERSIONS)
        if parts[0] not in versions:
            return _page_not_found()
        if len(parts) == 1:
            return web.json_response(self._resource_list(group, parts[0]))
        return await self._dispatch(request, self._address(group, parts))

    def _address(self, group: str, parts: list[str]) -> Address:
        version, *path = parts
        namespace = None
        if path[0] == "namespaces" and len(path) >= 3 and path[2] not in ("status", "finalize"):
            namespace, path = path[1], path[2:]
        resource = self._by_path.get((group, version, path[0]))
        if resource is None or (namespace is not None and not resource.namespaced):
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        name = path[1] if len(path) > 1 else None
        subresource = path[2] if len(path) > 2 else ""
        if subresource and subresource not in resource.subresources:
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        if name is not None and resource.namespaced and namespace is None:
            raise ApiError(404, "NotFound", "the server could not find the requested resource", {})
        return Address(resource, namespace, name, subresource, "/".join(path[3:]))

    async def _dispatch(self, request: web.Request, at: Address) -> web.StreamResponse:
        self._authorize(request, at)
        if at.subresource in ("log", "portforward", "proxy"):
            return await self._connect(request, at)
        if at.subresource == "scale":
            return await self._scale(request, at)
        if at.name is None:
            return await self._collection(request, at)
        verb = NAMED_VERBS.get(request.method)
        if verb is None or verb not in at.resource.verbs or (at.subresource and verb == "delete"):
            raise errors.method_not_allowed()
        if verb == "get":
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, at)
            return web.json_response(self._registry.get(at.resource, at.namespace or "", at.name))
        if verb == "update":
            return await self._put(request, at)
        if verb == "patch":
            return await self._patch(request, at)
        return await self._delete(request, at)

    async def _collection(self, request: web.Request, at: Address) -> web.StreamResponse:
        verb = COLLECTION_VERBS.get(request.method)
        if verb is None or verb not in at.resource.verbs:
            raise errors.method_not_allowed()
        if verb == "list":
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, at)
            return web.json_response(self._list(request, at))
        if at.resource.namespaced and at.namespace is None:
            raise errors.method_not_allowed()
        if verb == "deletecollection":
            return await self._delete_collection(request, at)
        return await self._post(request, at)

    # Reading

    def _matcher(self, request: web.Request, at: Address) -> Matcher:
        labels = label_matcher(request.query.get("labelSelector", ""))
        fields = field_matcher(at.resource.kind, request.query.get("fieldSelector", ""))

        def matches(obj: dict[str, Any]) -> bool:
            metadata = obj["metadata"]
            return (
                (at.namespace is None or metadata.get("namespace") == at.namespace)
                and (at.name is None or metadata["name"] == at.name)
                and labels(obj)
                and fields(obj)
            )

        return matches

    def _list(self, request: web.Request, at: Address) -> dict[str, Any]:
        matches = self._matcher(request, at)
        version = self._store.version
        self._refuse_future(request)
        start, token = request.query.get("continue"), None
        items = [obj for obj in self._store.find(at.resource, at.namespace) if matches(obj)]
        if start:
            version, after = self._read_continue(start)
            items = [obj for obj in items if _place(obj) > after]
        limit = int(request.query.get("limit") or 0)
        metadata: dict[str, Any] = {"resourceVersion": str(version)}
        if limit and len(items) > limit:
            token = _write_continue(version, _place(items[limit - 1]))
            metadata["continue"] = token
            if not request.query.get("labelSelector") and not request.query.get("fieldSelector"):
                metadata["remainingItemCount"] = len(items) - limit
            items = items[:limit]
        return _as_list(at.resource, items, metadata)

    def _refuse_future(self, request: web.Request) -> None:
        wanted = request.query.get("resourceVersion", "")
        if wanted and not wanted.isdigit():
            raise bad_request(f'strconv.ParseUint: parsing "{wanted}": invalid syntax')
        if wanted and int(wanted) > self._store.version:
            raise too_large_resource_version(int(wanted), self._store.version)

    def _read_continue(self, token: str) -> tuple[int, tuple[str, str]]:
        try:
            held = json.loads(base64.urlsafe_b64decode(token))
            version, (namespace, name) = held["rv"], held["start"]
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise bad_request(f"continue key is not valid: {error}") from error
        if version < self._store.compacted:
            raise errors.gone(
                "The provided continue parameter is too old to display a consistent list result. You can start a new "
                "list without the continue parameter, or use the continue token in this response to retrieve the "
                "remainder of the results. Continuing with the provided token results in an inconsistent list - "
                "objects that were created, modified, or deleted between the time the first chunk was returned and "
                "now may show up in the list."
            )
        return version, (namespace, name)

    async def _watch(self, request: web.Request, at: Address) -> web.StreamResponse:
        if at.resource.verbs and "watch" not in at.resource.verbs:
            raise errors.method_not_allowed()
        matches = self._matcher(request, at)
        wanted = request.query.get("resourceVersion", "")
        if wanted and not wanted.isdigit():
            raise bad_request(f'Invalid value: "{wanted}": strconv.ParseUint: parsing "{wanted}": invalid syntax')
        since = int(wanted or 0)
        timeout_s = float(request.query.get("timeoutSeconds") or WATCH_DEFAULT_S)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        watcher = self._store.watch(at.resource)
        try:
            # From here to the first await nothing changes: what is listed and what is queued fit without a gap.
            first = self._first_events(at, since, matches)
            await response.prepare(request)
            for event in first:
                await _send_event(response, event)
            if not (first and first[-1]["type"] == "ERROR"):
                await self._stream(response, request, at, matches, watcher, since, timeout_s)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            # The client hung up, or the server stops: both end a watch.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._store.unwatch(watcher)
        return response

    def _first_events(self, at: Address, since: int, matches: Matcher) -> list[dict[str, Any]]:
        if since == 0:
            present = self._store.find(at.resource, at.namespace)
            return [{"type": "ADDED", "object": obj} for obj in present if matches(obj)]
        if since < self._store.compacted:
            error = errors.gone(f"too old resource version: {since} ({self._store.compacted})")
            return [{"type": "ERROR", "object": error.status()}]
        changes = self._store.since(since, at.resource)
        return [event for change in changes if (event := _event(change, matches)) is not None]

    async def _stream(
        self,
        response: web.StreamResponse,
        request: web.Request,
        at: Address,
        matches: Matcher,
        watcher: Any,
        since: int,
        timeout_s: float,
    ) -> None:
        bookmarks = request.query.get("allowWatchBookmarks") in ("1", "true")
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        next_bookmark = max(loop.time(), min(end - BOOKMARK_LEAD_S, loop.time() + 60.0))
        while (now := loop.time()) < end:
            wake = min(end, next_bookmark) if bookmarks else end
            try:
                async with asyncio.timeout(max(0.0, wake - now)):
                    change = await watcher.queue.get()
            except TimeoutError:
                if bookmarks and loop.time() >= next_bookmark:
                    await _send_event(response, self._bookmark(at))
                    next_bookmark = loop.time() + 60.0
                continue
            if change is None:
                return
            if isinstance(change, dict):
                await _send_event(response, change)
            elif change.version > since and (event := _event(change, matches)) is not None:
                await _send_event(response, event)

    def _bookmark(self, at: Address) -> dict[str, Any]:
        metadata = {"resourceVersion": str(self._store.version), "creationTimestamp": None}
        obj = {"kind": at.resource.kind, "apiVersion": at.resource.api_version, "metadata": metadata}
        return {"type": "BOOKMARK", "object": obj}

    # Writing

    async def _body(self, request: web.Request) -> Any:
        raw = await request.read()
        try:
            body = json.loads(raw) if raw else {}
        except ValueError as error:
            raise bad_request(f"couldn't get version/kind; json parse error: {error}") from error
        return body

    async def _object(self, request: web.Request, at: Address) -> tuple[dict[str, Any], list[str]]:
        content = request.content_type
        if content not in ("application/json", "application/yaml", "application/octet-stream"):
            raise errors.unsupported_media_type(content, ("application/json", "application/yaml"))
        body = _parse_yaml(await request.read()) if content == "application/yaml" else await self._body(request)
        if not isinstance(body, dict):
            raise bad_request("couldn't get version/kind; json parse error: the body is not an object")
        self._check_kind(at.resource, body)
        return decode(at.resource, body)

    def _check_kind(self, resource: Resource, body: dict[str, Any]) -> None:
        kind, version = body.get("kind", resource.kind), body.get("apiVersion", resource.api_version)
        if (kind, version) != (resource.kind, resource.api_version):
            message = f"the API version in the data ({version}) does not match the expected API version "
            message += f"({resource.api_version})"
            if version == resource.api_version:
                message = f"{kind} in version {version!r} cannot be handled as a {resource.kind}"
            raise bad_request(message)

    def _writer(self, request: web.Request, at: Address) -> Writer:
        dry_run = request.query.get("dryRun", "")
        if dry_run not in ("", "All"):
            cause = errors.not_supported("dryRun", dry_run, ("All",))
            options = {"POST": "CreateOptions", "PUT": "UpdateOptions"}.get(request.method, "PatchOptions")
            raise errors.invalid("meta.k8s.io", options, "", [cause])
        agent = request.headers.get("User-Agent", "unknown").split("/", 1)[0]
        return Writer(request.query.get("fieldManager") or agent, at.subresource, dry_run == "All")

    def _warn_or_refuse(self, request: web.Request, resource: Resource, unknown: list[str]) -> dict[str, str]:
        mode = request.query.get("fieldValidation") or "Warn"
        if not unknown or mode == "Ignore":
            return {}
        listed = ", ".join(f'unknown field "{path}"' for path in unknown)
        if mode == "Strict":
            head = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'
            raise bad_request(f"{head}: strict decoding error: {listed}")
        quoted = listed.replace('"', '\\"')
        return {"Warning": f'299 - "{quoted}"'}

    async def _post(self, request: web.Request, at: Address) -> web.StreamResponse:
        body, unknown = await self._object(request, at)
        headers = self._warn_or_refuse(request, at.resource, unknown)
        obj = self._registry.create(at.resource, body, at.namespace or "", self._writer(request, at))
        return web.json_response(obj, status=201, headers=headers)

    async def _put(self, request: web.Request, at: Address) -> web.StreamResponse:
        body, unknown = await self._object(request, at)
        headers = self._warn_or_refuse(request, at.resource, unknown)
        assert at.name is not None
        live = self._registry.get(at.resource, at.namespace or "", at.name)
        given = body.setdefault("metadata", {}).get("name", at.name)
        if given != at.name:
            raise bad_request(f"the name of the object ({given}) does not match the name on the URL ({at.name})")
        if at.resource.custom and not body["metadata"].get("resourceVersion"):
            cause = errors.invalid_value("metadata.resourceVersion", "0", "must be specified for an update")
            raise errors.invalid(at.resource.group, at.resource.kind, at.name, [cause])
        obj = self._registry.update(at.resource, live, body, self._writer(request, at))
        return web.json_response(obj, headers=headers)

    async def _patch(self, request: web.Request, at: Address) -> web.StreamResponse:
        content = request.content_type
        supported = (_JSON_PATCH, _MERGE, *(() if at.resource.custom else (_STRATEGIC,)), _APPLY)
        if content not in supported:
            raise errors.unsupported_media_type(content, supported)
        if content == _APPLY:
            return await self._apply(request, at)
        assert at.name is not None
        live = self._registry.get(at.resource, at.namespace or "", at.name)
        body = await self._body(request)
        if content == _JSON_PATCH:
            patched = patch.json_patch(live, body)
        elif content == _MERGE:
            patched = patch.merge(live, body)
        else:
            patched = patch.strategic_merge(live, body, at.resource.node)
        decoded, unknown = decode(at.resource, patched)
        headers = self._warn_or_refuse(request, at.resource, unknown)
        obj = self._registry.update(at.resource, live, decoded, self._writer(request, at))
        return web.json_response(obj, headers=headers)

    async def _apply(self, request: web.Request, at: Address) -> web.StreamResponse:
        if not request.query.get("fieldManager"):
            cause = errors.required("fieldManager", "is required for apply patch")
            raise errors.invalid("meta.k8s.io", "PatchOptions", "", [cause])
        assert at.name is not None
        config = _parse_yaml(await request.read())
        if not isinstance(config, dict) or "apiVersion" not in config or "kind" not in config:
            raise bad_request("error decoding YAML: Object 'Kind' is missing")
        self._check_kind(at.resource, config)
        config = self._applied_config(at, config)
        writer = self._writer(request, at)
        if self._store.get(at.resource, at.namespace or "", at.name) is None:
            created = rbac.action("POST", at.resource, at.namespace, at.name, "", watch=False)
            self._authorizer.require(self._caller(request), created)
        force = request.query.get("force") in ("1", "true")
        obj, is_new = self._registry.apply(at.resource, config, at.namespace or "", at.name, writer, force=force)
        return web.json_response(obj, status=201 if is_new else 200)

    def _applied_config(self, at: Address, config: dict[str, Any]) -> dict[str, Any]:
        metadata = config.get("metadata") or {}
        if metadata.get("managedFields"):
            raise bad_request("metadata.managedFields must be nil")
        if metadata.get("name", at.name) != at.name:
            message = f"the name of the object ({metadata['name']}) does not match the name on the URL ({at.name})"
            raise bad_request(message)
        if metadata.get("namespace", at.namespace) != at.namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        decoded, unknown = decode(at.resource, config)
        if unknown:
            where = f"{metadata.get('namespace', '')}/{at.name}"
            kind = f"{at.resource.api_version}, Kind={at.resource.kind}"
            listed = f"{fields.keyed(unknown[0], config, at.resource.node)}: field not declared in schema"
            # A plain error in the real server's code, so a 500 without a reason.
            raise ApiError(500, "", f"failed to create typed patch object ({where}; {kind}): {listed}")
        if at.subresource == "status":
            decoded = {
                key: value for key, value in decoded.items() if key in ("apiVersion", "kind", "metadata", "status")
            }
        elif "status" in at.resource.subresources:
            decoded.pop("status", None)
        return decoded

    async def _scale(self, request: web.Request, at: Address) -> web.StreamResponse:
        assert at.name is not None
        live = self._registry.get(at.resource, at.namespace or "", at.name)
        if request.method == "GET":
            return web.json_response(_scale_of(live))
        if request.method not in ("PUT", "PATCH"):
            raise errors.method_not_allowed()
        body = await self._body(request)
        scale = patch.json_patch(_scale_of(live), body) if request.content_type == _JSON_PATCH else body
        replicas = (scale.get("spec") or {}).get("replicas", live["spec"]["replicas"])
        changed = patch.merge(live, {"spec": {"replicas": replicas}})
        writer = self._writer(request, Address(at.resource, at.namespace, at.name, "", ""))
        return web.json_response(_scale_of(self._registry.update(at.resource, live, changed, writer)))

    async def _deletion(self, request: web.Request) -> Deletion:
        options = await self._body(request)
        preconditions = options.get("preconditions") or {}
        grace = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
        propagation = request.query.get("propagationPolicy") or options.get("propagationPolicy") or "Background"
        if propagation not in ("Foreground", "Background", "Orphan"):
            cause = errors.not_supported("propagationPolicy", propagation, ("Foreground", "Background", "Orphan"))
            raise errors.invalid("meta.k8s.io", "DeleteOptions", "", [cause])
        dry_run = request.query.get("dryRun") == "All" or "All" in (options.get("dryRun") or [])
        return Deletion(
            propagation=propagation,
            grace_s=None if grace is None else int(grace),
            uid=preconditions.get("uid"),
            resource_version=preconditions.get("resourceVersion"),
            dry_run=dry_run,
        )

    async def _delete(self, request: web.Request, at: Address) -> web.StreamResponse:
        assert at.name is not None
        how = await self._deletion(request)
        live = self._registry.get(at.resource, at.namespace or "", at.name)
        obj = self._registry.delete(at.resource, live, how)
        if at.resource.returns_deleted or "deletionTimestamp" in obj["metadata"]:
            return web.json_response(obj)
        details = {"name": at.name} | ({"group": at.resource.group} if at.resource.group else {})
        details |= {"kind": at.resource.plural, "uid": live["metadata"]["uid"]}
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return web.json_response(body)

    async def _delete_collection(self, request: web.Request, at: Address) -> web.StreamResponse:
        how = await self._deletion(request)
        matches = self._matcher(request, at)
        targets = [obj for obj in self._store.find(at.resource, at.namespace) if matches(obj)]
        deleted = [self._registry.delete(at.resource, obj, how) for obj in targets]
        return web.json_response(_as_list(at.resource, deleted, {"resourceVersion": str(self._store.version)}))

    # Connections to pods

    async def _connect(self, request: web.Request, at: Address) -> web.StreamResponse:
        assert at.name is not None
        assert at.namespace is not None
        if at.subresource == "proxy":
            pod, port, path = self._proxy_target(at)
            return await proxy(request, self._pods, pod, port, path)
        if at.subresource == "log" and request.method != "GET":
            raise errors.method_not_allowed()
        pod = self._registry.get(POD, at.namespace, at.name)
        if at.subresource == "log":
            return await follow_log(request, self._pods, pod, request.query.get("container", ""))
        return await forward_ports(request, self._pods, pod, request.query.getall("ports", []))

    def _proxy_target(self, at: Address) -> tuple[dict[str, Any], int, str]:
        """`[scheme:]name[:port]` of a pod, or of a service with a ready pod behind it."""
        assert at.name is not None
        assert at.namespace is not None
        parts = at.name.split(":")
        name, port = (parts[1], parts[2]) if len(parts) == 3 else (parts[0], parts[1] if len(parts) == 2 else "")
        if at.resource == POD:
            pod = self._registry.get(POD, at.namespace, name)
            return pod, int(port or 80), at.rest
        service = self._registry.get(SERVICE, at.namespace, name)
        ports = service["spec"].get("ports", [])
        chosen = next((each for each in ports if port in ("", str(each["port"]), each.get("name"))), None)
        selector = service["spec"].get("selector") or {}
        ready = [
            pod
            for pod in self._store.find(POD, at.namespace)
            if selector and is_subset(selector, pod["metadata"].get("labels") or {}) and self._pods.ready(pod)
        ]
        if chosen is None or not ready:
            message = f'no endpoints available for service "{at.name}"'
            raise ApiError(503, "ServiceUnavailable", message)
        target = self._pods.resolve_port(ready[0], chosen.get("targetPort", chosen["port"]))
        return ready[0], target, at.rest

    # Discovery

    def _group(self, group: str) -> dict[str, Any]:
        versions = [
            {"groupVersion": f"{name}/{version}", "version": version} for name, version in self._groups if name == group
        ]
        return {"kind": "APIGroup", "apiVersion": "v1", **_group_entry(group, versions)}

    def _group_list(self) -> dict[str, Any]:
        groups = []
        for group, version in self._groups:
            groups.append(_group_entry(group, [{"groupVersion": f"{group}/{version}", "version": version}]))
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}

    def _resource_list(self, group: str, version: str) -> dict[str, Any]:
        listed = []
        for resource in sorted(self._by_path.values(), key=lambda each: each.plural):
            if (resource.group, resource.version) != (group, version):
                continue
            listed.append(_resource_entry(resource))
            listed += [_subresource_entry(resource, name) for name in sorted(resource.subresources)]
        group_version = f"{group}/{version}" if group else version
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": listed}


def served_resources() -> tuple[Resource, ...]:
    return (*BUILT_IN, *CUSTOM)


def too_large_resource_version(wanted: int, current: int) -> ApiError:
    """504: this server has not seen that version yet (a client that talks to several API servers meets it)."""
    cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
    message = f"Timeout: Too large resource version: {wanted}, current: {current}"
    return ApiError(504, "Timeout", message, {"causes": [cause], "retryAfterSeconds": 1})


def _page_not_found() -> web.Response:
    return web.Response(status=404, text="404 page not found\n")


def _parse_yaml(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(raw)
    raise bad_request("error decoding YAML: the body is neither YAML nor JSON")


def _place(obj: dict[str, Any]) -> tuple[str, str]:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


def _write_continue(version: int, start: tuple[str, str]) -> str:
    held = json.dumps({"v": "meta.k8s.io/v1", "rv": version, "start": start}, separators=(",", ":"))
    return base64.urlsafe_b64encode(held.encode()).decode()


def _as_list(resource: Resource, items: list[dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    """A list answer; items of built-in kinds carry no kind of their own."""
    bare = [{key: value for key, value in obj.items() if key not in ("kind", "apiVersion")} for obj in items]
    head = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata}
    return head | {"items": items if resource.custom else bare}


def _event(change: Change, matches: Matcher) -> dict[str, Any] | None:
    """A change as a watch with selectors sees it: leaving the selection is a deletion, entering it an addition."""
    now = matches(change.obj) and change.type != "DELETED"
    before = change.old is not None and matches(change.old)
    if not now and not before:
        return None
    kind = "MODIFIED" if now and before else "ADDED" if now else "DELETED"
    return {"type": kind, "object": change.obj}


async def _send_event(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")


def _scale_of(obj: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    labels = (obj["spec"].get("selector") or {}).get("matchLabels") or {}
    selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {key: obj["metadata"][key] for key in kept},
        "spec": {"replicas": obj["spec"]["replicas"]},
        "status": {"replicas": (obj.get("status") or {}).get("replicas", 0), "selector": selector},
    }


def _group_entry(group: str, versions: list[dict[str, str]]) -> dict[str, Any]:
    return {"name": group, "versions": versions, "preferredVersion": versions[0]}


def _resource_entry(resource: Resource) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": resource.plural,
        "singularName": resource.singular,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(resource.verbs),
    }
    return entry | ({"shortNames": list(resource.short_names)} if resource.short_names else {})


def _subresource_entry(resource: Resource, name: str) -> dict[str, Any]:
    entry = {"name": f"{resource.plural}/{name}", "singularName": "", "namespaced": resource.namespaced}
    if name == "scale":
        return entry | {"group": "autoscaling", "version": "v1", "kind": "Scale", "verbs": ["get", "patch", "update"]}
    verbs = {"log": ["get"], "portforward": ["create", "get"], "proxy": ["create", "delete", "get", "patch", "update"]}
    return entry | {"kind": resource.kind, "verbs": verbs.get(name, ["get", "patch", "update"])}
