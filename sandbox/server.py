"""An aiohttp application on a free loopback port, served from a thread of its own.

Every stand-in subclasses `LoopbackServer`, so tests, the rehearsal and the CLI start and stop them the same way.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import Self

from aiohttp import web

START_TIMEOUT_S = 60.0
"""Binding a loopback port takes milliseconds; a machine under full load may need seconds for the thread to run."""


class LoopbackServer:
    """Serve `build_app()` on 127.0.0.1; port 0 takes a free one. Start and stop are idempotent."""

    def __init__(self, *, port: int = 0, ssl_context: ssl.SSLContext | None = None) -> None:
        self._requested_port = port
        self._ssl_context = ssl_context
        self._port: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: BaseException | None = None

    def build_app(self) -> web.Application:
        """The application to serve; called once, inside the serving thread's event loop."""
        raise NotImplementedError

    @property
    def port(self) -> int:
        if self._port is None:
            raise RuntimeError(f"{type(self).__name__} is not started")
        return self._port

    @property
    def url(self) -> str:
        """Base address without a trailing slash, e.g. `http://127.0.0.1:40123`."""
        return f"{'https' if self._ssl_context else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        if self._thread is not None:
            return self
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), name=type(self).__name__, daemon=True)
        self._thread.start()
        if not started.wait(START_TIMEOUT_S):
            raise TimeoutError(f"{type(self).__name__} did not start within {START_TIMEOUT_S:.0f} s")
        if self._failure is not None:
            self._thread = None
            raise RuntimeError(f"{type(self).__name__} could not start: {self._failure}") from self._failure
        return self

    def stop(self) -> None:
        if self._thread is None or self._loop is None or self._stopping is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(timeout=START_TIMEOUT_S)
        self._thread = None
        self._port = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self, started: threading.Event) -> None:
        try:
            asyncio.run(self._serve_until_stopped(started))
        except BaseException as failure:
            self._failure = failure
            started.set()
            raise

    async def _serve_until_stopped(self, started: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        runner = web.AppRunner(self.build_app(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", self._requested_port, ssl_context=self._ssl_context)
            await site.start()
            self._port = runner.addresses[0][1]
            started.set()
            await self._stopping.wait()
        finally:
            await runner.cleanup()
