"""An endpoint that costs next to nothing per token: what a load generator meets in front of it is its own limit.

    python -m tests.endless_server

Prints `{"url": …}` when it listens. Every answer is one block of bytes that was made before, each token in an HTTP
chunk of its own as vLLM sends it, and all of them at once.
"""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sandbox.processes import Child

MODEL = "endless"
REPOSITORY = Path(__file__).parents[1]


@contextmanager
def endless_server(folder: Path) -> Iterator[str]:
    """Its base address, as a process of its own."""
    with Child([sys.executable, "-m", "tests.endless_server"], log=folder / "endless.log", cwd=REPOSITORY) as child:
        yield str(child.ready_line(120.0)["url"])


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after another and have a Content-Length."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (request := self._next_request()) is not None:
            self._transport.write(answer(*request))

    def _next_request(self) -> tuple[str, bytes] | None:
        head, separator, rest = self._received.partition(b"\r\n\r\n")
        if not separator:
            return None
        request_line, *lines = head.split(b"\r\n")
        lengths = [int(line[15:]) for line in lines if line.lower().startswith(b"content-length:")]
        length = lengths[0] if lengths else 0
        if len(rest) < length:
            return None
        self._received = rest[length:]
        return request_line.split()[1].decode(), rest[:length]


def answer(path: str, body: bytes) -> bytes:
    if path == "/v1/models":
        return document({"data": [{"id": MODEL, "max_model_len": 100_000}]})
    if path == "/tokenize":
        return document({"count": len(json.loads(body)["prompt"].split())})
    if path == "/v1/completions":
        return stream(int(json.loads(body)["max_tokens"]))
    return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def document(content: object) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@functools.cache
def stream(tokens: int) -> bytes:
    """A whole streamed answer."""
    token = event({"choices": [{"index": 0, "text": " a"}]})
    usage = event({"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": tokens}})
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + token * tokens + usage + chunk(b"data: [DONE]\n\n") + chunk(b"")


def event(content: object) -> bytes:
    return chunk(b"data: %s\n\n" % json.dumps(content, separators=(",", ":")).encode())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=4096)
    print(json.dumps({"url": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"}), flush=True)
    # The parent closes our stdin, or dies.
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve())
