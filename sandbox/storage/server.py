"""Cloud Storage on loopback: the server that ties routes, identities, faults and the shaped link together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aiohttp import web

from sandbox.faults import FaultPlan
from sandbox.server import LoopbackServer
from sandbox.shaping import Link, Shape
from sandbox.storage.blobs import Store
from sandbox.storage.call import Access, Body, Call, Route
from sandbox.storage.errors import Dialect, StorageError, reading_document, unsupported
from sandbox.storage.iam import Caller
from sandbox.storage.json_api import JsonApi
from sandbox.storage.upload_api import CLIENT_CLOSED_REQUEST, UploadApi
from sandbox.storage.uploads import MultipartUploads, Sessions
from sandbox.storage.xml_api import XmlApi
from sandbox.wire import RequestLog, RequestRecord, wire_middlewares

OPERATOR = "operator@example.com"

_SEMANTIC_HEADERS = frozenset(
    {
        "range",
        "content-range",
        "content-md5",
        "content-encoding",
        "if-match",
        "if-none-match",
        "if-modified-since",
        "if-unmodified-since",
        "if-range",
        "x-http-method-override",
        "x-upload-content-type",
        "x-upload-content-length",
    }
)
"""Headers that change what a request means: a route that does not name them refuses them."""

_SEMANTIC_PREFIXES = ("x-goog-", "x-amz-")
_INERT_HEADERS = frozenset({"x-goog-api-client", "x-goog-gcs-idempotency-token", "x-upload-content-type"})
"""What the official client sends along everywhere: who it is, which attempt it is, and the type of a body."""


class StorageServer(LoopbackServer):
    """Cloud Storage on loopback; see the package's docstring for what it simulates.

    Args:
        root: where buckets, objects and unfinished uploads live; a server started on it again has them all.
        project: the operator's only project: others are answered with 403. None: any project is the operator's.
        project_number: shown in every bucket's resource.
        foreign_buckets: names that belong to someone else's project: 409 on creation, 403 on anything else.
        allowed_locations: lower-case locations that the organisation's policy permits; 412 for others. None: any.
        operator: e-mail address of the operator, as error messages name it.
        iam_propagation_s: seconds until a changed bucket policy is felt; the real service takes up to 7 minutes.
        faults: which requests go wrong on purpose; may be changed while the server runs.
        ingress, egress: limits of the link for bodies of requests and of answers.
    """

    def __init__(
        self,
        *,
        root: Path,
        port: int = 0,
        project: str | None = None,
        project_number: int = 123456789012,
        foreign_buckets: Iterable[str] = (),
        allowed_locations: Iterable[str] | None = None,
        operator: str = OPERATOR,
        iam_propagation_s: float = 0.0,
        faults: FaultPlan | None = None,
        ingress: Shape | None = None,
        egress: Shape | None = None,
    ) -> None:
        super().__init__(port=port)
        self.faults = faults or FaultPlan()
        self._root = root
        self._project = project
        self._project_number = project_number
        self._foreign_buckets = frozenset(foreign_buckets)
        self._allowed_locations = None if allowed_locations is None else frozenset(allowed_locations)
        self._operator = operator
        self._iam_propagation_s = iam_propagation_s
        self._ingress_shape = ingress
        self._egress_shape = egress
        self._log = RequestLog()
        self._routes: tuple[tuple[Route, re.Pattern[str]], ...] = ()

    @property
    def requests(self) -> tuple[RequestRecord, ...]:
        """The requests up to now, in order of arrival."""
        return self._log.snapshot()

    def forget_requests(self) -> None:
        """Start the request log anew."""
        self._log.clear()

    def build_app(self) -> web.Application:
        self._root.mkdir(parents=True, exist_ok=True)
        store = Store(self._root, iam_propagation_s=self._iam_propagation_s)
        sessions = Sessions(self._root)
        uploads = MultipartUploads(store)
        access = Access(store, self._foreign_buckets)
        json_api = JsonApi(
            store,
            uploads,
            access,
            project=self._project,
            project_number=self._project_number,
            allowed_locations=self._allowed_locations,
        )
        upload_api = UploadApi(store, sessions, access, json_api)
        xml_api = XmlApi(store, uploads, access)
        # The JSON API's paths come first: the XML API takes everything else to be /BUCKET/OBJECT.
        routes = (*upload_api.routes(), *json_api.routes(), *xml_api.routes())
        self._routes = tuple((route, re.compile(route.path)) for route in routes)
        self._ingress = Link(self._ingress_shape)
        self._egress = Link(self._egress_shape)
        app = web.Application(
            middlewares=wire_middlewares(
                log=self._log, plan=self.faults, link=self._egress, error_response=_injected_error
            )
        )
        # No bucket has such a name: it would have to begin with a letter or a digit.
        app.router.add_get("/_sandbox/stats", self._stats)
        app.router.add_route("*", "/{path:.*}", self._serve_request)
        return app

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response({"faults": self.faults.injected})

    async def _serve_request(self, request: web.Request) -> web.StreamResponse:
        body = Body(request, self._ingress)
        dialect = _dialect_of(request.raw_path)
        try:
            route, names = self._route(request)
            dialect = _dialect_of_answer(request, route)
            check_headers(request.headers, route)
            caller = Caller.of(request.headers.get("Authorization"), self._operator)
            call = Call(request, caller, names, dict(request.query), body, self._egress)
            response = await route.handler(call)
        except StorageError as error:
            response = error.response(dialect)
        except ConnectionResetError:
            # The client went away while it was sending; nobody reads this answer.
            return web.Response(status=CLIENT_CLOSED_REQUEST)
        with suppress(ConnectionResetError):
            await body.drain()
        return response

    def _route(self, request: web.Request) -> tuple[Route, Mapping[str, str]]:
        """The route that a request means, and the names in its path; 404, 405 or 501 for the rest."""
        # From the raw target, since names hold percent-encoded slashes and dots that URL normalisation would lose.
        path = urlsplit(request.raw_path).path
        matched = [(route, match) for route, pattern in self._routes if (match := pattern.fullmatch(path))]
        if not matched or path.startswith(_RESERVED_PATHS):
            matched = [(route, match) for route, match in matched if route.dialect is not Dialect.XML]
        if not matched:
            raise StorageError(404, "notFound", "Not Found", "NoSuchResource", path)
        candidates = [(route, match) for route, match in matched if route.method == request.method]
        if not candidates:
            raise StorageError(405, "methodNotAllowed", "Method not allowed", "MethodNotAllowed", request.method)
        parameters = request.query.keys()
        for route, match in candidates:
            if route.needs <= parameters:
                if unknown := sorted(set(parameters) - route.query):
                    raise unsupported(f"the query parameter {unknown[0]!r} of {request.method} {path}")
                if (alternative := request.query.get("alt", "json")) not in route.alternatives:
                    raise unsupported(f"alt={alternative} of {request.method} {path}")
                with reading_document():
                    return route, {name: unquote(value, errors="strict") for name, value in match.groupdict().items()}
        raise unsupported(f"{request.method} {path} without {sorted(candidates[0][0].needs)}")


_RESERVED_PATHS = ("/storage/", "/upload/storage/", "/download/storage/", "/batch/", "/resumable/")


def check_headers(headers: Mapping[str, str], route: Route) -> None:
    """Refuse headers that change a request's meaning in a way that the route does not know."""
    for name in map(str.lower, headers):
        if name in _INERT_HEADERS or name in route.headers:
            continue
        if name.startswith("x-goog-meta-") and "x-goog-meta-" in route.headers:
            continue
        if name in _SEMANTIC_HEADERS or name.startswith(_SEMANTIC_PREFIXES):
            raise unsupported(f"the header {name!r} here")


def _dialect_of(path: str) -> Dialect:
    return Dialect.JSON if path.startswith(_RESERVED_PATHS) else Dialect.XML


def _dialect_of_answer(request: web.Request, route: Route) -> Dialect:
    return Dialect.MEDIA if request.query.get("alt") == "media" else route.dialect


def _injected_error(status: int) -> web.Response:
    reasons = {
        408: ("requestTimeout", "The request timed out. Please try again."),
        429: (
            "rateLimitExceeded",
            "The rate of requests is too high. Please reduce the rate and retry.",
        ),
        500: ("internalError", "We encountered an internal error. Please try again."),
        502: ("backendError", "Backend Error"),
        503: ("backendError", "We encountered an internal error. Please try again."),
        504: ("gatewayTimeout", "Gateway Timeout"),
    }
    reason, message = reasons.get(status, ("backendError", "Backend Error"))
    return StorageError(status, reason, message, "").response(Dialect.JSON)
