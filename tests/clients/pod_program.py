"""What a container of the cluster tests runs: behaves as its first argument says.

`serve [SECONDS]` logs like vLLM, loads for SECONDS, then answers HTTP; `crash TEXT…` prints and exits with code 1;
`crash-once FILE TEXT…` does so only the first time; `warn TEXT…` prints and then serves; `exit CODE` exits;
`fill BYTES` reports so much local disk; `hang` never becomes ready. Like vLLM it stops at once on SIGTERM,
whatever it is answering.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKENS = 50

running = 0
"""Answers to `/slow` under way."""
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """`/health` is empty, `/bytes/N` has N bytes, `/name` the pod's name, and `/metrics` vLLM's gauge.

        `/stream` sends TOKENS chunks; `/slow` one a second until the file exists that the environment's RELEASE names.
        """
        if self.path == "/stream":
            with self.streaming():
                for number in range(TOKENS):
                    self.chunk(f"data: {number}\n\n".encode())
                    time.sleep(0.002)
        elif self.path == "/slow":
            with self.streaming(), counted():
                while not Path(os.environ["RELEASE"]).exists():
                    self.chunk(b"data: piece\n\n")
                    time.sleep(1.0)
                self.chunk(b"data: [DONE]\n\n")
        elif self.path == "/metrics":
            self.answer(f'vllm:num_requests_running{{engine="0"}} {running}.0\n'.encode())
        elif self.path.startswith("/bytes/"):
            self.answer(bytes(int(self.path.removeprefix("/bytes/"))))
        elif self.path == "/name":
            self.answer(os.environ.get("SANDBOX_POD_NAME", socket.gethostname()).encode())
        else:
            self.answer(b"")

    def do_POST(self) -> None:
        """Answers the number of bytes that came."""
        self.answer(str(len(self.rfile.read(int(self.headers["Content-Length"])))).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @contextlib.contextmanager
    def streaming(self) -> Iterator[None]:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        yield
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Probes would fill the log."""


@contextlib.contextmanager
def counted() -> Iterator[None]:
    global running
    with lock:
        running += 1
    yield
    with lock:
        running -= 1


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(seconds: float) -> None:
    print("(EngineCore pid=2) INFO [gpu_model_runner.py:68] Starting to load model x...", flush=True)
    for shard in range(3):
        print(f"Loading safetensors checkpoint shards: {50 * shard:3d}% Completed | {shard}/2", flush=True)
        time.sleep(seconds / 3)
    print(f"(EngineCore pid=2) INFO [default_loader.py:501] Loading weights took {max(seconds, 0.01):.2f} seconds")
    print("INFO:     Application startup complete.", flush=True)
    # The sandbox's pods share this machine: each gets a port of its own. A real one has its container's.
    host, port = ("127.0.0.1", os.environ["SANDBOX_HOST_PORT"]) if "SANDBOX_HOST_PORT" in os.environ else ("", "8080")
    Server((host, int(port)), Handler).serve_forever()


def main(mode: str, *arguments: str) -> None:
    if mode == "crash-once" and Path(arguments[0]).exists():
        mode, arguments = "serve", ()
    elif mode == "crash-once":
        Path(arguments[0]).touch()
        mode, arguments = "crash", arguments[1:]
    if mode == "warn":
        print(*arguments, sep="\n", flush=True)
        mode, arguments = "serve", (os.environ.get("LOADING_S", "3.0"),)
    if mode == "serve":
        serve(float(arguments[0]) if arguments else 0.0)
    if mode == "crash":
        print(*arguments, sep="\n", flush=True)
        sys.exit(1)
    if mode == "exit":
        sys.exit(int(arguments[0]))
    if mode == "fill":
        Path(os.environ["SANDBOX_EPHEMERAL_STORAGE_FILE"]).write_text(arguments[0], encoding="ascii")
    time.sleep(3600)


main(*sys.argv[1:])
