"""The serving process: load the model, bind the port, answer until SIGTERM, then finish what is running."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from sandbox.engine.api import Api, ServedModel
from sandbox.engine.args import ServeArguments
from sandbox.engine.core import Engine
from sandbox.engine.http import Connection
from sandbox.engine.metrics import EngineMetrics
from sandbox.engine.startup import Loaded, Log, StartupFailed, cache_config_labels, load
from sandbox.engine.tokens import ChatTemplate, ModelTokenizer, SimpleTokenizer
from sandbox.engine.weights import EntrypointError


async def serve(arguments: ServeArguments, environment: Mapping[str, str], log: Log) -> int:
    """Run the engine until SIGTERM or SIGINT; returns the container's exit code.

    Connections are refused until the model is loaded: vLLM binds its port only then. On SIGTERM the port closes, and
    running answers are finished; how long that may take is the business of whoever sent the signal.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loading = asyncio.create_task(load(arguments, environment, log))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    try:
        loaded = loading.result()
    except StartupFailed:
        return 1
    except EntrypointError as error:
        log.write(f"Failed to copy the model to local disk.\n{error}")
        return 1
    with ExitStack() as stack:
        truth_path = environment.get("SANDBOX_ENGINE_TRUTH")
        truth = stack.enter_context(Path(truth_path).open("a")) if truth_path else None
        labels = cache_config_labels(loaded, arguments)
        metrics = EngineMetrics(arguments.served_names[0], loaded.max_model_len, labels)
        engine = Engine(loaded.parameters, metrics, truth)
        await _answer_requests(engine, _served_model(arguments, loaded), environment, stopped, log)
    return 0


def _served_model(arguments: ServeArguments, loaded: Loaded) -> ServedModel:
    checkpoint = loaded.checkpoint
    tokenizer_json = checkpoint.tokenizer_json
    config = checkpoint.config
    return ServedModel(
        arguments=arguments,
        path=checkpoint.path,
        max_model_len=loaded.max_model_len,
        model_type=str(config["model_type"]),
        tokenizer=ModelTokenizer(tokenizer_json) if tokenizer_json else SimpleTokenizer(),
        template=ChatTemplate(checkpoint.chat_template, checkpoint.special_tokens),
        is_multimodal=checkpoint.is_multimodal,
        can_think=checkpoint.can_think,
        **({"image_tokens": int(tokens)} if (tokens := _image_tokens(config)) else {}),
    )


def _image_tokens(config: Mapping[str, object]) -> int | None:
    for name in ("vision_soft_tokens_per_image", "mm_tokens_per_image"):
        if isinstance(value := config.get(name), int):
            return value
    return None


async def _answer_requests(
    engine: Engine, model: ServedModel, environment: Mapping[str, str], stopped: asyncio.Task[bool], log: Log
) -> None:
    api = Api(engine, model, log.write)
    connections: set[Connection] = set()
    host, port = _address(model.arguments, environment)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(partial(Connection, api.handle, connections), host, port, backlog=2048)
    # The port that was asked for, which is the container's: a container does not know what it is mapped to.
    log.api_server("entry.py:140", f"Starting vLLM server on http://{model.arguments.host or '0.0.0.0'}:{port}")
    log.api_server("launcher.py:186", "Available routes are:")
    for path, methods in api.routes:
        log.api_server("launcher.py:195", f"Route: {path}, Methods: {methods}")
    for line in ("Started server process [1]", "Waiting for application startup.", "Application startup complete."):
        log.write(f"INFO:     {line}")
    await stopped
    server.close()
    log.api_server("launcher.py:254", "[shutdown] API server: shutdown triggered")
    await engine.drain()
    # One turn of the loop, so that the last bytes are on their way.
    await asyncio.sleep(0)
    for connection in list(connections):
        connection.close()
    for line in ("Shutting down", "Waiting for application shutdown.", "Application shutdown complete."):
        log.write(f"INFO:     {line}")


def _address(arguments: ServeArguments, environment: Mapping[str, str]) -> tuple[str, int]:
    """Where to listen: the port that stands for the container's, or the arguments' own outside the cluster."""
    if host_port := environment.get("SANDBOX_HOST_PORT"):
        return "127.0.0.1", int(host_port)
    return "127.0.0.1" if arguments.host in (None, "0.0.0.0", "::") else arguments.host, arguments.port
