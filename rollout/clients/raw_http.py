"""Bulk bytes over HTTP/1.1 with as little CPU as Python allows: http.client, reading into the caller's buffers.

Clients that pass the body through more layers copy it more often. Redirects are never followed here: whoever asks
decides what may travel on.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

import certifi

from rollout.clients.retrying import transient
from rollout.errors import RolloutError

SLICE_BYTES = 2**20
"""How much is read or sent between two looks at the clock. `sendall` counts its timeout over the whole call, so a
body is sent in slices: a stall is then a slice that does not go out in time."""

_PORTS = {"http": 80, "https": 443}

Body = bytes | memoryview


class HttpResponse:
    """Status, headers and a body that is read in pieces."""

    def __init__(self, raw: http.client.HTTPResponse, where: str) -> None:
        self._raw = raw
        self.where = where
        self.status = raw.status
        self.headers = raw.headers

    @property
    def content_length(self) -> int | None:
        return self._raw.length

    def read_into(self, view: memoryview) -> int:
        """Read at most `len(view)` bytes; 0 at the end of the body."""
        with _mapped(self.where):
            return self._raw.readinto(view)

    def text(self, limit: int = 1 << 20) -> str:
        """The beginning of the body: for errors and small documents."""
        with _mapped(self.where):
            return self._raw.read(limit).decode("utf-8", "replace")

    def is_drained(self) -> bool:
        return self._raw.isclosed()


class HttpPool:
    """Keep-alive connections to any number of hosts, one request at a time on each. Safe to use from many threads."""

    def __init__(self, *, stall_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = defaultdict(list)
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False
        self._tls = ssl.create_default_context(cafile=None if _system_has_authorities() else certifi.where())
        self.requests = 0

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | None = None
    ) -> Iterator[HttpResponse]:
        """Send one request and hand out its response; the connection is reused if the body was read to its end.

        Raises:
            TransientError: the connection failed, or moved no byte within the stall timeout.
        """
        parts = urlsplit(url)
        # Without the query: a signed address keeps its secret there.
        where = f"{parts.scheme}://{parts.netloc}{parts.path}"
        with _mapped(where):
            connection, response = self._exchange(parts, method, headers, body)
        reusable = False
        try:
            yield HttpResponse(response, where)
            reusable = response.isclosed() and not response.will_close
        finally:
            self._put_back(parts, connection, reusable=reusable)

    def close(self) -> None:
        """Close all connections, also those in use: their threads see a failure at once."""
        with self._lock:
            self._closed = True
            connections = [*self._busy, *(one for idle in self._idle.values() for one in idle)]
            self._idle.clear()
        for connection in connections:
            _shut(connection)

    def _exchange(
        self, parts: SplitResult, method: str, headers: Mapping[str, str], body: Body | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection, is_fresh = self._take(parts)
        try:
            return connection, self._send(connection, parts, method, headers, body)
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._put_back(parts, connection, reusable=False)
            if is_fresh:
                raise
        except BaseException:
            self._put_back(parts, connection, reusable=False)
            raise
        # The server had closed the idle connection; everything we send may be sent twice.
        connection = self._connect(parts)
        try:
            return connection, self._send(connection, parts, method, headers, body)
        except BaseException:
            self._put_back(parts, connection, reusable=False)
            raise

    def _send(
        self,
        connection: http.client.HTTPConnection,
        parts: SplitResult,
        method: str,
        headers: Mapping[str, str],
        body: Body | None,
    ) -> http.client.HTTPResponse:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http" and connection.host != parts.hostname:
            target = f"http://{parts.netloc}{target}"  # through a proxy
        connection.putrequest(method, target, skip_accept_encoding=True, skip_host=True)
        connection.putheader("Host", parts.netloc.rpartition("@")[2])
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None or method in ("POST", "PUT"):
            connection.putheader("Content-Length", str(len(body or b"")))
        self.requests += 1
        try:
            connection.endheaders()
            for start in range(0, len(body or b""), SLICE_BYTES):
                connection.send((body or b"")[start : start + SLICE_BYTES])
        except (BrokenPipeError, ConnectionResetError):
            # A server that refuses a body may answer and close before it has read it: its answer says more.
            with contextlib.suppress(OSError, http.client.HTTPException):
                return connection.getresponse()
            raise
        return connection.getresponse()

    def _take(self, parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            idle = self._idle[parts.scheme, parts.netloc]
            if idle:
                connection = idle.pop()
                self._busy.add(connection)
                return connection, False
        return self._connect(parts), True

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        connection = self._new_connection(parts)
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the pool is closed")
            self._busy.add(connection)
        return connection

    def _new_connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        port = parts.port or _PORTS[parts.scheme]
        proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
        via = urlsplit(proxy) if proxy else None
        peer, peer_port = (via.hostname or "", via.port or 3128) if via else (host, port)
        if parts.scheme == "http":
            return http.client.HTTPConnection(peer, peer_port, timeout=self._stall_timeout_s)
        secure = http.client.HTTPSConnection(peer, peer_port, timeout=self._stall_timeout_s, context=self._tls)
        if via:
            secure.set_tunnel(host, port)
        return secure

    def _put_back(self, parts: SplitResult, connection: http.client.HTTPConnection, *, reusable: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if reusable and not self._closed:
                self._idle[parts.scheme, parts.netloc].append(connection)
                return
        connection.close()


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what decides whether a token may travel along."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def _shut(connection: http.client.HTTPConnection) -> None:
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            # The plain socket's: an SSLSocket's own drops the encryption first, while another thread may be sending.
            socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)


def _system_has_authorities() -> bool:
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or paths.capath)


@contextlib.contextmanager
def _mapped(where: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise transient("no byte came or went within the stall timeout.", where=where) from error
    except ssl.SSLCertVerificationError as error:
        raise RolloutError(
            f"the server's certificate is not trusted ({error.verify_message}).",
            where=where,
            resolution="Name the issuing authority's file in SSL_CERT_FILE.",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise transient(f"the connection failed ({type(error).__name__}).", where=where) from error
