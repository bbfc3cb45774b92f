"""Probes against a container's real port, with the kubelet's words for what went wrong.

A gRPC probe holds as soon as the port takes connections: its health service is not asked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from sandbox.cluster.defaults import random_suffix

RunInContainer = Callable[[list[str], float], Awaitable[tuple[int, str]]]
_MAX_BODY_IN_MESSAGE = 4096


@dataclass(frozen=True)
class Target:
    """Where a probe goes: the pod's address for the messages, the loopback port for the connection."""

    address: str
    port_of: Callable[[Any], tuple[int, int | None]]
    """A port number or name -> (number, loopback port; None when nothing can listen there)."""

    run: RunInContainer


async def check(probe: dict[str, Any], target: Target) -> str | None:
    """Probe once: None when it succeeded, else the reason as an Unhealthy event tells it."""
    timeout_s = float(probe.get("timeoutSeconds", 1))
    if "httpGet" in probe:
        return await _http(probe["httpGet"], target, timeout_s)
    if "tcpSocket" in probe or "grpc" in probe:
        return await _tcp(probe.get("tcpSocket") or probe["grpc"], target, timeout_s)
    if "exec" in probe:
        return await _exec(probe["exec"].get("command", []), target, timeout_s)
    return "the probe has no handler"


async def _http(action: dict[str, Any], target: Target, timeout_s: float) -> str | None:
    number, host_port = target.port_of(action["port"])
    shown = f"{target.address}:{number}"
    url = f"{action['scheme'].lower()}://{shown}{action['path']}"
    if host_port is None:
        return f'Get "{url}": dial tcp {shown}: connect: connection refused'
    headers = {"User-Agent": "kube-probe/1.36"}
    headers |= {each["name"]: each["value"] for each in action.get("httpHeaders", [])}
    real = f"{action['scheme'].lower()}://127.0.0.1:{host_port}{action['path']}"
    try:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(real, headers=headers, ssl=False) as got,
        ):
            await got.read()
            ok = 200 <= got.status < 400
            return None if ok else f"HTTP probe failed with statuscode: {got.status}"
    except TimeoutError:
        return f'Get "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
    except aiohttp.ClientConnectorError:
        return f'Get "{url}": dial tcp {shown}: connect: connection refused'
    except aiohttp.ServerDisconnectedError:
        return f'Get "{url}": EOF'
    except (aiohttp.ClientError, OSError):
        source = f"10.128.0.1:{random_suffix()}"
        return f'Get "{url}": read tcp {source}->{shown}: read: connection reset by peer'


async def _tcp(action: dict[str, Any], target: Target, timeout_s: float) -> str | None:
    number, host_port = target.port_of(action["port"])
    refused = f"dial tcp {target.address}:{number}: connect: connection refused"
    if host_port is None:
        return refused
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection("127.0.0.1", host_port)
    except TimeoutError:
        return f"dial tcp {target.address}:{number}: i/o timeout"
    except OSError:
        return refused
    writer.close()
    return None


async def _exec(command: list[str], target: Target, timeout_s: float) -> str | None:
    try:
        code, output = await target.run(command, timeout_s)
    except TimeoutError:
        return f'command timed out: "{" ".join(command)}" timed out after {timeout_s:.0f}s'
    return None if code == 0 else output[:_MAX_BODY_IN_MESSAGE] or f"exit status {code}"


@dataclass(frozen=True)
class Rhythm:
    """When a probe runs, and how many answers in a row count."""

    delay_s: float
    period_s: float
    failures: int
    successes: int

    @classmethod
    def of(cls, probe: dict[str, Any], longest_period_s: float) -> Rhythm:
        """A probe's rhythm, run more often than asked when its period is longer than `longest_period_s`.

        The failure threshold grows by the same factor: a startup budget of 30 x 10 s stays 300 s.
        """
        asked_s = float(probe["periodSeconds"])
        period_s = min(asked_s, longest_period_s)
        failures = math.ceil(probe["failureThreshold"] * asked_s / period_s)
        return cls(float(probe.get("initialDelaySeconds", 0)), period_s, failures, probe["successThreshold"])
