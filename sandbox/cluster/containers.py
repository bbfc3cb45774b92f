"""One container: its image, its environment, its process, its probes, its restarts and its end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from sandbox.cluster import probes
from sandbox.cluster.defaults import GPU_RESOURCE, TPU_RESOURCE
from sandbox.cluster.environment import ConfigError, expand, resolve
from sandbox.cluster.events import NORMAL, WARNING
from sandbox.cluster.logs import ContainerLog
from sandbox.cluster.nodes import ACCELERATOR_LABEL, TPU_LABEL
from sandbox.cluster.probes import Rhythm, Target
from sandbox.cluster.quantity import parse
from sandbox.cluster.resources import NODE, SERVICE_ACCOUNT
from sandbox.cluster.store import timestamp
from sandbox.cluster.surroundings import mount_volumes, service_addresses

if TYPE_CHECKING:
    from sandbox.cluster.agent import PodWorker

OOM_EXIT_CODE = 137
START_ERROR_EXIT_CODE = 128
LOG_LINE_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_MESSAGE_BYTES, _MESSAGE_LINES = 2048, 80
_PORT_ARGUMENT = re.compile(r"^--port(?:=(\d+))?$")
_EVICTION_THRESHOLD_BYTES = 10_120_387_530
_AVAILABLE_KIB = 303_108
"""What the quickstart's real eviction message says was the threshold and was left: only the wording matters."""


def _die_with_parent() -> None:
    """In the child, before exec: no container outlives the cluster's process, whatever kills it."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Container:
    """A container of a pod, over all of its restarts."""

    def __init__(self, worker: PodWorker, spec: dict[str, Any], *, init: bool) -> None:
        self._worker = worker
        self._spec = spec
        self._init = init
        self.name: str = spec["name"]
        self.image: str = spec["image"]
        self.host_port = free_port()
        self.log: ContainerLog | None = None
        self.previous_log: ContainerLog | None = None
        self.restarts = 0
        self.exit_code: int | None = None
        self.finished = False
        """Ended, and not to be started again."""

        self.gave_up = False
        self.ever_started = False
        self.ready = False
        self._started = False
        after_others = not init and worker.pod["spec"].get("initContainers")
        reason = "PodInitializing" if after_others else "ContainerCreating"
        self._state: dict[str, Any] = {"waiting": {"reason": reason}}
        self._last_state: dict[str, Any] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._id = ""
        self._started_at = ""
        self._environment: dict[str, str] = {}
        self._killed_by_us = False
        self._ports = {port["containerPort"] for port in spec.get("ports", [])} | _port_arguments(spec)
        self._usage_file = worker.settings.root / "usage" / f"{uuid.uuid4().hex}"

    # What others ask

    def listens_on(self, port: int) -> bool:
        """Ports that the container declares or names in its arguments; one that names none may use any."""
        return self.log is not None and (port in self._ports or not self._ports)

    def status(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.image.encode()).hexdigest()
        status = {
            "name": self.name,
            "state": self._state,
            "lastState": self._last_state,
            "ready": self.ready,
            "restartCount": self.restarts,
            "image": self.image,
            "imageID": f"{self.image.split('@')[0]}@sha256:{digest}" if self.ever_started else "",
            "started": self._started,
        }
        return status | ({"containerID": f"containerd://{self._id}"} if self._id else {})

    def disk_excess(self) -> str | None:
        """The message of an eviction, when the process has reported too much local disk (see `surroundings`)."""
        try:
            used = int(self._usage_file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        resources = self._spec["resources"]
        limit = (resources.get("limits") or {}).get("ephemeral-storage")
        if limit is not None and used > parse(limit):
            return f'Container {self.name} exceeded its local ephemeral storage limit "{limit}". '
        node = self._worker.agents.store.get(NODE, "", self._worker.node)
        if node is None or used <= parse(node["status"]["allocatable"].get("ephemeral-storage", "1Ei")):
            return None
        request = (resources.get("requests") or {}).get("ephemeral-storage", "0")
        return (
            f"The node was low on resource: ephemeral-storage. Threshold quantity: {_EVICTION_THRESHOLD_BYTES}, "
            f"available: {_AVAILABLE_KIB}Ki. Container {self.name} was using {used // 1024}Ki, request is {request}, "
            "has larger consumption of ephemeral-storage."
        )

    # Life

    async def run(self) -> None:
        """Until the container has ended for good; a server is restarted for ever."""
        failures = 0
        while True:
            await self._pull()
            await self._configure()
            code = await self._run_process()
            if not self._restarts_after(code):
                self.finished = True
                self.gave_up = code != 0
                self._worker.write_status()
                return
            failures = failures + 1
            await self._back_off(failures)
            self.restarts += 1

    async def run_once_to_success(self) -> None:
        """An init container: again until it succeeds; with restartPolicy Never a failure ends the pod."""
        await self.run()
        if self.exit_code != 0:
            self._worker.write_status()
            raise asyncio.CancelledError

    def _restarts_after(self, code: int) -> bool:
        policy = self._worker.restart_policy
        if policy == "Never" or (self._init and code == 0):
            return False
        return policy == "Always" or code != 0

    def _wait_for(self, reason: str, message: str = "") -> None:
        self._state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
        self._worker.write_status()

    async def _pull(self) -> None:
        settings, agents, node = self._worker.settings, self._worker.agents, self._worker.node
        backoff_s = settings.backoff_s
        while True:
            if agents.has_image(node, self.image):
                message = f'Container image "{self.image}" already present on machine'
                self._tell(NORMAL, "Pulled", message)
                return
            self._tell(NORMAL, "Pulling", f'Pulling image "{self.image}"')
            error = agents.pull_error(self.image)
            if error is None:
                await agents.pull(node, self.image)
                took = f"{settings.image_pull_s:.3g}s"
                message = f'Successfully pulled image "{self.image}" in {took} ({took} including waiting).'
                self._tell(NORMAL, "Pulled", f"{message} Image size: 10737418240 bytes.")
                return
            self._tell(WARNING, "Failed", f'Failed to pull image "{self.image}": {error}')
            self._tell(WARNING, "Failed", "Error: ErrImagePull")
            self._wait_for("ErrImagePull", error)
            await asyncio.sleep(min(0.1, settings.backoff_s))
            self._tell(NORMAL, "BackOff", f'Back-off pulling image "{self.image}"')
            self._tell(WARNING, "Failed", "Error: ImagePullBackOff")
            self._wait_for("ImagePullBackOff", f'Back-off pulling image "{self.image}": ErrImagePull: {error}')
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, settings.longest_backoff_s)

    async def _configure(self) -> None:
        while True:
            try:
                own = resolve(self._worker.agents.store, self._pod_with_address(), self._spec)
            except ConfigError as error:
                self._tell(WARNING, "Failed", f"Error: {error}")
                self._wait_for("CreateContainerConfigError", str(error))
                await asyncio.sleep(self._worker.settings.backoff_s)
                continue
            self._usage_file.parent.mkdir(parents=True, exist_ok=True)
            around = surroundings(self._worker, self._spec, self.host_port, self._usage_file)
            self._environment = around | own | {key: around[key] for key in around if key.startswith("SANDBOX_")}
            self._environment |= self._worker.settings.environment
            return

    def _pod_with_address(self) -> dict[str, Any]:
        pod = self._worker.pod
        return pod | {"status": pod["status"] | {"podIP": self._worker.address}}

    async def _run_process(self) -> int:
        try:
            await self._start()
        except OSError as error:
            return self._on_failed_start(error)
        assert self._process is not None
        assert self._process.stdout is not None
        assert self.log is not None
        reading = asyncio.create_task(self.log.read(self._process.stdout))
        probing = asyncio.create_task(self._probe())
        try:
            code = await self._process.wait()
            # A grandchild may hold the pipe open: what it writes after the container's end is not the container's.
            await asyncio.wait([reading], timeout=1.0)
        finally:
            probing.cancel()
            if self._process.returncode is not None:
                reading.cancel()
                self.log.close()
        self._on_exit(code)
        return self.exit_code if self.exit_code is not None else code

    async def _start(self) -> None:
        settings = self._worker.settings
        if settings.start_s:
            await asyncio.sleep(settings.start_s)
        command = self._worker.agents.runner_of(self.image)
        assert command is not None  # an image without a runner is never pulled
        own = [*self._spec.get("command", []), *self._spec.get("args", [])]
        arguments = [expand(each, self._environment) for each in own]
        self.previous_log = self.log
        self.log = ContainerLog(self._worker.directory / self.name / f"{self.restarts}.log")
        self._id = hashlib.sha256(uuid.uuid4().bytes).hexdigest()
        self._tell(NORMAL, "Created", f"Created container: {self.name}")
        self._killed_by_us = False
        # Every image has the usual Unix tools: a container that only waits needs none of what plays the image.
        words = arguments if arguments[:1] == ["sleep"] else [*command, *arguments]
        self._process = await asyncio.create_subprocess_exec(
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            cwd=settings.working_directory,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            limit=LOG_LINE_BYTES,
        )
        self._tell(NORMAL, "Started", f"Started container {self.name}")
        self._started_at = timestamp()
        self._state = {"running": {"startedAt": self._started_at}}
        self.ever_started = True
        self._started = self._spec.get("startupProbe") is None
        self.ready = self._started and self._spec.get("readinessProbe") is None
        self._worker.write_status()

    def _on_failed_start(self, error: OSError) -> int:
        """The runner's executable is not there: the runtime's words, and its exit code."""
        message = (
            "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create "
            f'failed: unable to start container process: exec: "{error.filename}": {error.strerror}: unknown'
        )
        self._tell(WARNING, "Failed", f"Error: {message}")
        now = timestamp()
        ended = {"exitCode": START_ERROR_EXIT_CODE, "reason": "StartError", "message": message}
        self._state = {
            "terminated": ended | {"startedAt": now, "finishedAt": now, "containerID": f"containerd://{self._id}"}
        }
        self.exit_code, self.ever_started = START_ERROR_EXIT_CODE, True
        if self.log is not None:
            self.log.close()
        self._worker.write_status()
        return START_ERROR_EXIT_CODE

    def _on_exit(self, returned: int) -> None:
        code = 128 - returned if returned < 0 else returned
        self.exit_code = code
        reason = "Completed" if code == 0 else "Error"
        if code == OOM_EXIT_CODE and not self._killed_by_us:
            reason = "OOMKilled"
        ended: dict[str, Any] = {"exitCode": code, "reason": reason, "startedAt": self._started_at}
        ended |= {"finishedAt": timestamp(), "containerID": f"containerd://{self._id}"}
        if code and self._spec.get("terminationMessagePolicy") == "FallbackToLogsOnError" and self.log is not None:
            ended["message"] = self.log.tail(_MESSAGE_BYTES, _MESSAGE_LINES)
        self._state = {"terminated": ended}
        self.ready = self._started = False
        self._worker.write_status()

    async def _back_off(self, failures: int) -> None:
        """The first restart is immediate; each later one waits twice as long as the one before."""
        settings = self._worker.settings
        self._last_state = self._state
        if failures == 1:
            return
        seconds = min(settings.backoff_s * 2 ** (failures - 2), settings.longest_backoff_s)
        metadata = self._worker.pod["metadata"]
        who = f"{metadata['name']}_{metadata['namespace']}({metadata['uid']})"
        self._tell(WARNING, "BackOff", f"Back-off restarting failed container {self.name} in pod {who}")
        message = f"back-off {seconds:g}s restarting failed container={self.name} pod={who}"
        self._wait_for("CrashLoopBackOff", message)
        await asyncio.sleep(seconds)

    # Probes

    async def _probe(self) -> None:
        startup = self._spec.get("startupProbe")
        if startup is not None:
            if not await anext(self._verdicts(startup, "Startup")):
                await self._kill_for("startup")
                return
            self._started = True
            self.ready = self._spec.get("readinessProbe") is None
            self._worker.write_status()
        async with asyncio.TaskGroup() as group:
            if self._spec.get("readinessProbe") is not None:
                group.create_task(self._keep_ready(self._spec["readinessProbe"]))
            if self._spec.get("livenessProbe") is not None:
                group.create_task(self._keep_alive(self._spec["livenessProbe"]))

    async def _verdicts(self, probe: dict[str, Any], name: str) -> AsyncIterator[bool]:
        """Whether the probe holds, each time that it has passed or failed often enough in a row to say so."""
        rhythm = Rhythm.of(probe, self._worker.settings.longest_probe_period_s)
        await asyncio.sleep(rhythm.delay_s)
        failed = passed = 0
        while True:
            error = await probes.check(probe, self._target())
            failed, passed = (0, passed + 1) if error is None else (failed + 1, 0)
            if error is not None:
                self._tell(WARNING, "Unhealthy", f"{name} probe failed: {error}")
            if passed >= rhythm.successes:
                yield True
            elif failed >= rhythm.failures:
                yield False
            await asyncio.sleep(rhythm.period_s)

    async def _keep_ready(self, probe: dict[str, Any]) -> None:
        async for ready in self._verdicts(probe, "Readiness"):
            if ready != self.ready:
                self.ready = ready
                self._worker.write_status()

    async def _keep_alive(self, probe: dict[str, Any]) -> None:
        async for alive in self._verdicts(probe, "Liveness"):
            if not alive:
                await self._kill_for("liveness")
                return

    async def _kill_for(self, probe: str) -> None:
        self._tell(NORMAL, "Killing", f"Container {self.name} failed {probe} probe, will be restarted")
        grace_s = float(self._worker.pod["spec"].get("terminationGracePeriodSeconds", 30))
        await self._terminate(grace_s)

    def _target(self) -> Target:
        return Target(self._worker.address, self._probe_port, self._run_inside)

    def _probe_port(self, port: int | str) -> tuple[int, int | None]:
        number = self._worker.agents.resolve_port(self._worker.pod, port)
        return number, self.host_port if self.listens_on(number) else None

    async def _run_inside(self, command: list[str], timeout_s: float) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *map(self._with_own_address, command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=self._environment,
            cwd=self._worker.settings.working_directory,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        try:
            async with asyncio.timeout(timeout_s):
                output, _ = await process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return process.returncode or 0, output.decode(errors="replace")

    def _with_own_address(self, word: str) -> str:
        """What a hook calls `127.0.0.1:8080` is another port here: there are no network namespaces."""
        for port in self._ports:
            word = re.sub(rf"\b(127\.0\.0\.1|localhost):{port}\b", rf"\1:{self.host_port}", word)
        return word

    # The end

    async def stop(self, grace_s: float) -> None:
        """Delete: preStop, SIGTERM, and SIGKILL when the grace period is over."""
        if self._process is None or self._process.returncode is not None:
            return
        self._tell(NORMAL, "Killing", f"Stopping container {self.name}")
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        try:
            async with asyncio.timeout(grace_s):
                await self._pre_stop()
        except TimeoutError:
            pass  # the hook used up the grace period: the kubelet goes on to kill
        await self._terminate(max(0.0, end - loop.time()))
        if self.log is not None:
            self.log.close()

    async def _pre_stop(self) -> None:
        hook = (self._spec.get("lifecycle") or {}).get("preStop") or {}
        if "sleep" in hook:
            await asyncio.sleep(float(hook["sleep"]["seconds"]))
        elif "exec" in hook:
            await self._hook(self._run_inside(hook["exec"].get("command", []), 3600.0))
        elif "httpGet" in hook:
            await self._hook(self._get(hook["httpGet"]))

    async def _hook(self, work: Awaitable[object]) -> None:
        try:
            await work
        except (OSError, aiohttp.ClientError) as error:
            self._tell(WARNING, "FailedPreStopHook", f"PreStopHook failed: {error}")

    async def _get(self, action: dict[str, Any]) -> None:
        _, host_port = self._probe_port(action["port"])
        async with aiohttp.ClientSession() as session:
            await session.get(f"http://127.0.0.1:{host_port}{action['path']}")

    async def _terminate(self, grace_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._killed_by_us = True
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()

    async def kill(self) -> None:
        """At once, without a word: eviction, force, the end of the cluster."""
        if self._process is not None and self._process.returncode is None:
            self._killed_by_us = True
            self._signal(signal.SIGKILL)
            code = await self._process.wait()
            self._on_exit(code)
        if self.log is not None:
            self.log.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _tell(self, kind: str, reason: str, message: str) -> None:
        self._worker.record(kind, reason, message, self.name)


def _port_arguments(spec: dict[str, Any]) -> set[int]:
    """`--port=8080` or `--port 8080` among a container's arguments."""
    arguments = [*spec.get("command", []), *spec.get("args", [])]
    found: set[int] = set()
    for index, argument in enumerate(arguments):
        matched = _PORT_ARGUMENT.match(argument)
        value = (matched.group(1) or "".join(arguments[index + 1 : index + 2])) if matched else ""
        if value.isdigit():
            found.add(int(value))
    return found


def free_port() -> int:
    """A loopback port that nobody uses now; the container binds it in a moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def surroundings(worker: PodWorker, container: dict[str, Any], host_port: int, usage_file: Path) -> dict[str, str]:
    """The environment that every container gets beside its own, see the sandbox's contracts."""
    store = worker.agents.store
    metadata, spec = worker.pod["metadata"], worker.pod["spec"]
    account = store.get(SERVICE_ACCOUNT, metadata["namespace"], spec["serviceAccountName"])
    annotations = (account["metadata"].get("annotations") or {}) if account is not None else {}
    node = store.get(NODE, "", worker.node)
    labels = (node["metadata"].get("labels") or {}) if node is not None else {}
    limits = container["resources"].get("limits") or {}
    mounts = mount_volumes(store, worker.pod, container, worker.directory / "volumes")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH") if name in os.environ}
    return {
        **kept,
        "PYTHONUNBUFFERED": "1",
        "HOSTNAME": spec.get("hostname", metadata["name"]),
        **worker.settings.environment,
        "SANDBOX_IDENTITY": worker.settings.identity_of(metadata["namespace"], spec["serviceAccountName"], annotations),
        "SANDBOX_GPU": labels.get(ACCELERATOR_LABEL) or labels.get(TPU_LABEL, ""),
        "SANDBOX_GPU_COUNT": str(limits.get(GPU_RESOURCE) or limits.get(TPU_RESOURCE, "0")),
        "SANDBOX_HOST_PORT": str(host_port),
        "SANDBOX_POD_NAME": metadata["name"],
        "SANDBOX_EPHEMERAL_STORAGE_FILE": str(usage_file),
        "SANDBOX_MOUNTS": json.dumps(mounts),
        "SANDBOX_SERVICES": json.dumps(service_addresses(worker.agents)),
    }
