"""A model server that answers slowly, and counts what it is answering as vLLM does.

GET `/slow` streams one piece a second until a file named by the environment's RELEASE exists; `/metrics` has vLLM's
gauges. Like vLLM it stops at once on SIGTERM, whatever it is answering.
"""

from __future__ import annotations

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RELEASE = Path(os.environ["RELEASE"])
running = 0
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.stream()
        elif self.path == "/metrics":
            self.answer(f'vllm:num_requests_running{{engine="0"}} {running}.0\n'.encode())
        else:
            self.answer(b"")

    def stream(self) -> None:
        global running
        with lock:
            running += 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while not RELEASE.exists():
            self.chunk(b"data: piece\n\n")
            time.sleep(1.0)
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")
        with lock:
            running -= 1

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Probes would fill the log."""


class Server(ThreadingHTTPServer):
    daemon_threads = True


Server(("127.0.0.1", int(os.environ["SANDBOX_HOST_PORT"])), Handler).serve_forever()
