"""Requests to a Kubernetes API server, with objects as plain dictionaries.

The official client gives the address, TLS, credentials and connection pool; its typed models are left aside, because
they validate *answers* and would refuse a server that is newer than they are. Vendor exceptions stop here.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlencode

import urllib3
from kubernetes.client import ApiClient

from rollout.clients.retrying import TRANSIENT_STATUSES, transient, wait_before_retry_s, with_retries
from rollout.diagnosis import diagnose_client_error
from rollout.errors import (
    BadInput,
    ClusterUnreachable,
    FieldConflict,
    ManifestRejected,
    NotFound,
    PermissionMissing,
    QuotaExceeded,
    RolloutError,
    TransientError,
)
from rollout.rendering import KubernetesObject

Query = Mapping[str, str | int | bool]
ResultT = TypeVar("ResultT")

ATTEMPTS = 12
"""Twelve attempts with exponential waits of up to 30 s bridge about 100 s: an API server's upgrade takes a minute."""

REQUEST_TIMEOUT = urllib3.Timeout(connect=10.0, read=60.0)
WATCH_S = 240
"""Seconds after which the server ends a watch; below the five minutes of most proxies' idle limits."""
QUIET_S = 20.0
"""A watch without an event for so long is asked anew: the connection may be dead without a word."""

_NEVER = threading.Event()


class VersionExpired(RolloutError):
    """The server no longer, or not yet, knows the resource version: list again. Never leaves the clients."""


class Silence(Exception):
    """A streamed answer brought nothing for a while. Never leaves the clients."""


@dataclass(frozen=True)
class Resource:
    """How the server names a kind in its paths."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool

    def path(self, namespace: str | None = None, name: str | None = None) -> str:
        """E.g. `/apis/apps/v1/namespaces/default/deployments/web`; without a name, the collection."""
        parts = [_group_path(self.api_version)]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{quote(namespace)}")
        parts.append(self.plural)
        if name:
            parts.append(quote(name))
        return "/".join(parts)


@dataclass(frozen=True)
class Snapshot:
    """All objects of a collection: what a watch begins with, and begins again with after a gap."""

    items: tuple[KubernetesObject, ...]


@dataclass(frozen=True)
class Update:
    """One event of a watch."""

    type: str
    """ADDED, MODIFIED or DELETED."""
    item: KubernetesObject


class ClusterApi:
    """One API server. Safe to use from several threads."""

    def __init__(self, client: ApiClient, *, attempts: int = ATTEMPTS) -> None:
        self._client = client
        self._attempts = attempts
        self._resources: dict[str, dict[str, Resource]] = {}

    @property
    def host(self) -> str:
        host: str = self._client.configuration.host
        return host.rstrip("/")

    @property
    def configuration(self) -> Any:
        """The official client's Configuration: address, TLS and credentials."""
        return self._client.configuration

    def headers(self) -> dict[str, str]:
        """The headers of every request, with a fresh credential."""
        headers = dict(self._client.default_headers)
        for setting in self._client.configuration.auth_settings().values():
            if setting["in"] == "header" and setting["value"]:
                headers[setting["key"]] = setting["value"]
        return headers

    def resource(self, api_version: str, kind: str) -> Resource:
        """Look a kind up by the server's own discovery. Raises NotFound if it is not installed."""
        if api_version not in self._resources:
            try:
                found = self.get(_group_path(api_version))
            except NotFound:
                found = {"resources": []}
            self._resources[api_version] = {
                entry["kind"]: Resource(api_version, entry["kind"], entry["name"], bool(entry["namespaced"]))
                for entry in found["resources"]
                if "/" not in entry["name"]
            }
        try:
            return self._resources[api_version][kind]
        except KeyError:
            # Not remembered: a CRD may be installed a moment later.
            del self._resources[api_version]
            raise NotFound(
                f"the cluster knows no {kind} ({api_version}).",
                where=self.host,
                resolution="Install its custom resource definition, or choose a plan without it.",
            ) from None

    def path_of(self, manifest: Mapping[str, Any]) -> str:
        """The path of one object."""
        metadata = manifest["metadata"]
        return self.resource(manifest["apiVersion"], manifest["kind"]).path(metadata.get("namespace"), metadata["name"])

    def get(self, path: str, query: Query | None = None) -> dict[str, Any]:
        return self.request("GET", path, query)

    def find(self, path: str, query: Query | None = None) -> dict[str, Any] | None:
        """What is at `path`, or None."""
        try:
            return self.get(path, query)
        except NotFound:
            return None

    def request(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """One request with a JSON answer, repeated through an outage.

        Only for requests that may be sent twice: reads, server-side apply, deletion, dry runs.
        """
        return self._persist(lambda: self._once(method, path, query, body, content_type))

    def text(self, path: str, query: Query | None = None) -> str:
        """A plain-text answer, e.g. a log."""
        return self._persist(lambda: self._send("GET", path, query, None, "").decode("utf-8", "replace"))

    def follow(
        self, path: str, query: Query | None = None, *, stop: threading.Event = _NEVER, quiet_s: float = QUIET_S
    ) -> Iterator[Snapshot | Update]:
        """List a collection, then watch it until `stop` is set; list again whenever the watch lost its place.

        `stop` is seen at the next event, or after `quiet_s` without one.
        Survives a dropped connection, 410 Gone, 504 "Too large resource version" and a server that is away for a while.
        Raises ClusterUnreachable when it stays away.
        """
        query = dict(query or {})
        while not stop.is_set():
            listing = self.get(path, query)
            yield Snapshot(tuple(_complete(item, listing) for item in listing["items"]))
            try:
                yield from self._watch(path, query, listing["metadata"]["resourceVersion"], stop, quiet_s)
            except VersionExpired:
                # A stale server may repeat itself: do not list in a tight loop.
                stop.wait(wait_before_retry_s(1, transient("expired")))

    def _watch(self, path: str, query: Query, version: str, stop: threading.Event, quiet_s: float) -> Iterator[Update]:
        failures = 0
        options = {**query, "watch": True, "allowWatchBookmarks": True, "timeoutSeconds": WATCH_S}
        while not stop.is_set():
            try:
                for line in self.lines(path, {**options, "resourceVersion": version}, quiet_s=quiet_s):
                    failures = 0
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _watch_error(event["object"])
                    version = event["object"]["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        yield Update(event["type"], event["object"])
                    if stop.is_set():
                        return
            except Silence:
                failures = 0
            except TransientError as error:
                failures += 1
                if failures >= self._attempts:
                    raise _unreachable(self.host, error) from error
                stop.wait(wait_before_retry_s(failures, error))

    def lines(self, path: str, query: Query | None = None, *, quiet_s: float) -> Iterator[str]:
        """The lines of a streamed answer, as they come, until the server ends it.

        Raises Silence after `quiet_s` without a byte, and TransientError if the connection breaks: the caller knows
        where to go on.
        """
        response = self._open("GET", path, query, None, "", urllib3.Timeout(connect=10.0, read=quiet_s))
        try:
            if response.status >= 400:
                _raise_status(response.status, response.data, path)
            pending = b""
            # read1, not stream(): an unchunked answer must not wait for a full block.
            while chunk := response.read1():
                *whole, pending = (pending + chunk).split(b"\n")
                for line in whole:
                    if line:
                        yield line.decode("utf-8", "replace")
            if pending:
                yield pending.decode("utf-8", "replace")
        except urllib3.exceptions.ReadTimeoutError as error:
            raise Silence from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise transient(str(error), where=path) from error
        finally:
            response.close()

    def _persist(self, call: Callable[[], ResultT]) -> ResultT:
        try:
            return with_retries(call, attempts=self._attempts)
        except TransientError as error:
            raise _unreachable(self.host, error) from error

    def _once(self, method: str, path: str, query: Query | None, body: Any, content_type: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._send(method, path, query, body, content_type) or b"{}")
        return answer

    def _send(self, method: str, path: str, query: Query | None, body: Any, content_type: str) -> bytes:
        response = self._open(method, path, query, body, content_type, REQUEST_TIMEOUT)
        try:
            data = response.data
        except urllib3.exceptions.HTTPError as error:
            raise transient(str(error), where=path) from error
        if response.status >= 400:
            _raise_status(response.status, data, path)
        return data

    def _open(
        self, method: str, path: str, query: Query | None, body: Any, content_type: str, timeout: urllib3.Timeout
    ) -> urllib3.BaseHTTPResponse:
        headers = self.headers() | {"Accept": "application/json, text/plain, */*"}
        if body is not None:
            headers["Content-Type"] = content_type
        url = f"{self.host}{path}" + (f"?{urlencode(_query(query))}" if query else "")
        try:
            response: urllib3.BaseHTTPResponse = self._client.rest_client.pool_manager.request(
                method,
                url,
                headers=headers,
                body=None if body is None else json.dumps(body),
                timeout=timeout,
                retries=False,
                preload_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise transient(f"{type(error).__name__}: {error}", where=self.host) from error
        return response


def _group_path(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _query(query: Query | None) -> dict[str, str]:
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in (query or {}).items()}


def _complete(item: KubernetesObject, listing: Mapping[str, Any]) -> KubernetesObject:
    """Items of a list carry neither kind nor version; objects elsewhere do."""
    return {"apiVersion": listing["apiVersion"], "kind": str(listing["kind"]).removesuffix("List"), **item}


def _watch_error(status: Mapping[str, Any]) -> RolloutError:
    code, message = int(status.get("code") or 500), str(status.get("message") or "")
    if code in (410, 504):
        return VersionExpired(message)
    return transient(message)


def _unreachable(host: str, error: RolloutError) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"the API server does not answer: {error.summary}",
        where=host,
        resolution="Check the cluster's state, the network and the VPN, then run again.",
    )


def _raise_status(status: int, data: bytes, path: str) -> NoReturn:
    answer = _status_of(data)
    message = str(answer.get("message") or data.decode("utf-8", "replace").strip() or f"HTTP {status}")
    causes = (answer.get("details") or {}).get("causes") or []
    if status == 410 or (status == 504 and "resource version" in message.lower()):
        raise VersionExpired(message, where=path)
    if status == 401:
        raise PermissionMissing(
            message,
            where=path,
            resolution="The cluster does not accept the credentials: log in again, or correct the kubeconfig's user.",
        )
    if status == 403 and not any(cause.get("reason") == "NamespaceTerminating" for cause in causes):
        raise _denial(message, path)
    if status == 404:
        raise NotFound(message, where=path)
    if status == 409 and any(cause.get("reason") == "FieldManagerConflict" for cause in causes):
        raise _conflict(causes, path)
    # Server-side apply answers 500 to a field that the schema does not have.
    if status in (400, 409, 422) or "typed patch object" in message:
        raise ManifestRejected(message, where=path, resolution="Correct the field that the message names.")
    if status in TRANSIENT_STATUSES or status == 403:
        raise transient(message, where=path)
    raise RolloutError(f"HTTP {status}: {message}", where=path)


_BY_ADMISSION = re.compile(r"denied (?:the )?request|rejected the request|is forbidden: (?![Uu]ser )")


def _denial(message: str, path: str) -> BadInput:
    """Tell apart who says no, because the cures differ: a ResourceQuota, an admission policy, or RBAC and IAM."""
    if "exceeded quota" in message:
        return QuotaExceeded(
            message,
            where=path,
            resolution="The namespace's ResourceQuota is used up: raise it, use another target.namespace, or tear down"
            " a model there.",
        )
    if not _BY_ADMISSION.search(message):
        return PermissionMissing(
            message,
            where=path,
            resolution="Grant the caller roles/container.developer, or the RBAC verb that the message names:"
            " deployments/worker/serving/ holds all that are needed.",
        )
    known = diagnose_client_error(message)
    resolution = known.resolution if known else "An admission policy of the cluster asks for what the message names."
    return ManifestRejected(message, where=path, resolution=resolution)


def _status_of(data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _conflict(causes: list[dict[str, Any]], path: str) -> FieldConflict:
    owned = [f"{cause.get('field')} ({cause.get('message')})" for cause in causes]
    return FieldConflict(
        f"another field manager owns {'; '.join(owned)}.",
        where=path,
        resolution="Let that manager give the field up, or take the same value into the serving spec; we never force.",
    )
