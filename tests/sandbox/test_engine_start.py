"""How the engine starts, and how it refuses to: arguments, weights, memory, identities, signals."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from sandbox.engine.args import ExecutableNotFound, UsageError, parse_serve_arguments
from sandbox.engine.memory import GIB, kv_layout, plan_memory
from sandbox.engine.real_vllm import command_for
from sandbox.engine.server import serve
from sandbox.engine.startup import Log
from sandbox.engine.weights import Checkpoint, LoadError, open_source, read_checkpoint
from sandbox.hub import HubServer
from sandbox.models import add_original_folder, remove_shard, tiny_model, truncate_shard
from sandbox.storage import StorageServer

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120.0
READER = "serviceAccount:reader@proj.s3ns.iam.gserviceaccount.com"


def run(*arguments: str) -> tuple[int, str]:
    """Start an engine that is expected to end by itself; its exit code and its log."""
    ended = subprocess.run(
        [sys.executable, "-m", "sandbox.engine", "serve", *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return ended.returncode, ended.stdout


def refusal(*arguments: str, **environment: str) -> tuple[int, str]:
    """The same within this process, for engines that fail while loading: a process of its own takes two seconds."""
    lines: list[str] = []
    code = asyncio.run(serve(parse_serve_arguments(arguments), environment, Log(lines.append)))
    return code, "\n".join(lines)


class Running:
    """A serving engine and its log."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sandbox.engine", "serve", *arguments],
            env=os.environ | {"SANDBOX_HOST_PORT": str(self.port)} | environment,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def wait_for(self, text: str) -> None:
        with self._changed:
            found = self._changed.wait_for(lambda: any(text in line for line in self.lines), timeout=TIMEOUT_S)
        assert found, "\n".join(self.lines)

    def post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection.getresponse()


@contextlib.contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Running]:
    engine = Running(*arguments, **environment)
    try:
        yield engine
    finally:
        engine.process.kill()
        engine.process.wait()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A bucket with a whole checkpoint at its root, which READER may read: storage URL and `gs://` path."""
    root = tmp_path_factory.mktemp("storage")
    folder = tiny_model(root / "model")
    with StorageServer(root=root / "state") as server:
        client = storage.Client(
            project="proj", credentials=AnonymousCredentials(), client_options={"api_endpoint": server.url}
        )
        made = client.create_bucket("weights", location="europe-west9")
        made.iam_configuration.uniform_bucket_level_access_enabled = True
        made.patch()
        for file in folder.iterdir():
            made.blob(file.name).upload_from_filename(str(file))
            made.blob(f"models/tiny/{file.name}").upload_from_filename(str(file))
        policy = made.get_iam_policy(requested_policy_version=3)
        policy.bindings.append({"role": "roles/storage.objectViewer", "members": {READER}})
        made.set_iam_policy(policy)
        yield server.url, "gs://weights"


def test_a_good_start_logs_what_vllm_logs_and_serves_what_was_asked(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    arguments = ("./entrypoint.sh", "python", "-m", "vllm.entrypoints.api_server", f"--model={model}")
    with running(*arguments, "--port=8080", "--served-model-name=tiny", SANDBOX_GPU="nvidia-l4") as engine:
        engine.wait_for("Application startup complete.")
        log = "\n".join(engine.lines)
        for sentence in (
            "non-default args: {",
            "Loading safetensors checkpoint shards: 100% Completed | 2/2",
            "Loading weights took",
            "GPU KV cache size: ",
            "Maximum concurrency for 2,048 tokens per request: ",
            "Graph capturing finished in",
        ):
            assert sentence in log
        assert engine.post({"model": "tiny", "prompt": "Hello", "max_tokens": 2}).status == 200


def test_connections_are_refused_until_the_model_is_loaded(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with running(f"--model={model}", SANDBOX_ENGINE_LOAD_BYTES_PER_S="1") as engine:
        engine.wait_for("Loading safetensors checkpoint shards:   0% Completed")
        with pytest.raises(ConnectionRefusedError):
            engine.post({"prompt": "Hello"})


def test_sigterm_while_loading_ends_the_engine(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    with running(f"--model={model}", SANDBOX_ENGINE_LOAD_BYTES_PER_S="1") as engine:
        engine.wait_for("Loading safetensors checkpoint shards:   0% Completed")
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(TIMEOUT_S) == 0


def test_sigterm_finishes_running_answers_and_takes_no_new_ones(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    truth = tmp_path / "truth.jsonl"
    with running(f"--model={model}", SANDBOX_ENGINE_TRUTH=str(truth)) as engine:
        engine.wait_for("Application startup complete.")
        answer = engine.post({"prompt": "Hello", "max_tokens": 100, "ignore_eos": True, "stream": True})
        engine.process.send_signal(signal.SIGTERM)
        engine.wait_for("shutdown triggered")
        with pytest.raises(ConnectionRefusedError):
            engine.post({"prompt": "Hello"})
        events = answer.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert engine.process.wait(TIMEOUT_S) == 0
    (record,) = [json.loads(line) for line in truth.read_text().splitlines()]
    assert record["output_tokens"] == len(record["token_s"]) == len(events) - 2 == 100
    assert record["received_s"] < record["token_s"][0]
    assert record["token_s"] == sorted(record["token_s"])


def test_weights_come_from_the_bucket_with_the_pods_identity(bucket: tuple[str, str]) -> None:
    url, path = bucket
    for model in (path, f"{path}/models/tiny", f"{path}/models/tiny/"):
        source = open_source(model, {"STORAGE_EMULATOR_HOST": url, "SANDBOX_IDENTITY": READER})
        assert len(read_checkpoint(source).shards) == 2


def test_weights_come_from_a_bucket_that_is_mounted(bucket: tuple[str, str]) -> None:
    url, path = bucket
    environment = {"STORAGE_EMULATOR_HOST": url, "SANDBOX_IDENTITY": READER}
    for mounted in (path, f"{path}/models/tiny"):
        source = open_source("/data", environment | {"SANDBOX_MOUNTS": json.dumps({"/data": mounted})})
        assert len(read_checkpoint(source).shards) == 2


def test_weights_come_from_the_hub(tmp_path: Path) -> None:
    with HubServer(root=tmp_path / "hub") as hub:
        hub.store.publish("org/tiny", tiny_model(tmp_path / "model"))
        checkpoint = read_checkpoint(open_source("org/tiny", {"HF_ENDPOINT": hub.url}))
        assert checkpoint.config["model_type"] == "llama"
        code, log = refusal("--model=org/none", HF_ENDPOINT=hub.url)
    assert code == 1
    assert "org/none is not a local folder and is not a valid model identifier listed on" in log


def test_an_identity_without_permission_is_told_which_one_is_missing(bucket: tuple[str, str]) -> None:
    url, path = bucket
    code, log = refusal(f"--model={path}", STORAGE_EMULATOR_HOST=url, SANDBOX_IDENTITY="serviceAccount:nobody@proj.iam")
    assert code == 1
    assert "google.api_core.exceptions.Forbidden: 403 GET https://storage.googleapis.com/storage/v1/b/weights/o" in log
    assert "nobody@proj.iam does not have storage.objects.list access" in log


def test_a_path_without_files_ends_in_the_misleading_error_of_the_quickstart(bucket: tuple[str, str]) -> None:
    url, path = bucket
    code, log = refusal(f"--model={path}/wrong", STORAGE_EMULATOR_HOST=url)
    assert code == 1
    assert "huggingface_hub.errors.HFValidationError: Repo id must use alphanumeric chars" in log
    assert "the maximum length is 96: '/data'." in log


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _nothing(folder: Path) -> None:
    del folder


@pytest.mark.parametrize(
    ("damage", "arguments", "gpu", "last_words"),
    [
        (_without_config, (), "", "Invalid repository ID or local directory specified: '"),
        (remove_shard, (), "", "FileNotFoundError: Weight files referenced in index but missing: {'"),
        (truncate_shard, (), "", "Error while deserializing header: incomplete metadata, file not fully covered"),
        (
            _nothing,
            ("--max-model-len=999999",),
            "",
            "User-specified max_model_len (999999) is greater than the derived",
        ),
        (_nothing, ("--tensor-parallel-size=2",), "", "World size (2) is larger than the number of available GPUs (1)"),
        (_nothing, ("--gpu-memory-utilization=0.005",), "", "ValueError: No available memory for the cache blocks."),
        (_nothing, (), "nvidia-gtx-1080", "unknown accelerator 'nvidia-gtx-1080'"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_ends_in_vllms_message(
    tmp_path: Path, damage: Callable[[Path], object], arguments: tuple[str, ...], gpu: str, last_words: str
) -> None:
    model = tiny_model(tmp_path / "model")
    damage(model)
    code, log = refusal(f"--model={model}", *arguments, SANDBOX_GPU=gpu, SANDBOX_GPU_COUNT="1")
    assert code == 1
    assert last_words in log
    assert "Application startup complete." not in log


def test_a_folder_of_original_weights_does_not_disturb(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    add_original_folder(model)
    assert len(read_checkpoint(open_source(str(model))).shards) == 2


def test_a_shard_that_failed_makes_three_processes_log_their_end(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    remove_shard(model)
    _, log = refusal(f"--model={model}")
    worker, core, server = (
        log.index("WorkerProc failed to start."),
        log.index("EngineCore failed to start."),
        log.index("RuntimeError: Engine core initialization failed. See root cause above."),
    )
    assert worker < core < server


def test_an_unknown_argument_prints_the_usage_and_exits_with_2() -> None:
    code, log = run("python", "-m", "vllm.entrypoints.openai.api_server", "--model=x", "--no-such-flag=1")
    assert code == 2
    assert log.startswith("usage: api_server.py [-h]")
    assert log.endswith("api_server.py: error: unrecognized arguments: --no-such-flag=1\n")


def test_a_command_that_is_no_entry_point_is_not_found() -> None:
    code, log = run("nginx", "-g", "daemon off;")
    assert (code, log) == (127, "exec: nginx: executable file not found in $PATH\n")


@pytest.mark.parametrize(
    ("arguments", "model", "names"),
    [
        (["vllm", "serve", "org/model", "--port", "80"], "org/model", ("org/model",)),
        (["vllm", "serve", "--model=gs://bucket"], "gs://bucket", ("gs://bucket",)),
        (["python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"], "m", ("m",)),
        (["./entrypoint.sh", "python", "-m", "vllm.entrypoints.api_server", "--model=m"], "m", ("m",)),
        (["--model=m", "--served-model-name", "a", "b"], "m", ("a", "b")),
    ],
)
def test_entry_points_are_understood(arguments: list[str], model: str, names: tuple[str, ...]) -> None:
    read = parse_serve_arguments(arguments)
    assert (read.model, read.served_names) == (model, names)


def test_arguments_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ExecutableNotFound):
        parse_serve_arguments(["sglang", "serve"])
    with pytest.raises(UsageError, match="argument --port: invalid int value"):
        parse_serve_arguments(["--port=http"])


GEMMA_31B = Checkpoint(
    path="/data",
    config={
        "model_type": "gemma4",
        "text_config": {
            "hidden_size": 5376,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "num_global_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 1024,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        },
    },
    shards={"model.safetensors": 62_500_000_000},
)


def test_memory_of_the_tutorials_31b_model_on_one_h100() -> None:
    layout = kv_layout(GEMMA_31B, tensor_parallel_size=1)
    assert layout.full_bytes == 10 * 2 * 4 * 512 * 2
    assert layout.sliding_bytes == 50 * 2 * 16 * 256 * 2
    plan = _plan(model_len=16384)
    assert plan.kv_cache_bytes > 0
    assert plan.max_concurrency > 1
    with pytest.raises(LoadError, match=r"To serve at least one request with the model's max seq len \(262144\)"):
        _plan(model_len=262144)
    with pytest.raises(LoadError, match=r"torch\.OutOfMemoryError: CUDA out of memory"):
        _plan(model_len=16384, accelerator="nvidia-a100-80gb", scale=2)


def _plan(*, model_len: int, accelerator: str = "nvidia-h100-80gb", scale: int = 1) -> Any:
    shards = {name: size * scale for name, size in GEMMA_31B.shards.items()}
    return plan_memory(
        Checkpoint(GEMMA_31B.path, GEMMA_31B.config, shards),
        accelerator=accelerator,
        tensor_parallel_size=1,
        gpu_memory_utilization=0.9,
        model_len=model_len,
        max_num_batched_tokens=8192,
    )


def test_a_model_that_is_estimated_to_fit_does_fit() -> None:
    layout = kv_layout(GEMMA_31B, tensor_parallel_size=1)
    for available in (GIB // 4, 2 * GIB, 9 * GIB):
        longest = layout.longest_request(available)
        assert layout.request_bytes(longest) <= available < layout.request_bytes(longest + 1)


def test_real_vllm_gets_the_same_model_without_what_needs_gpus(bucket: tuple[str, str], tmp_path: Path) -> None:
    url, path = bucket
    arguments = parse_serve_arguments(
        [
            *("vllm", "serve", f"--model={path}", "--host=0.0.0.0", "--port=8080", "--tensor-parallel-size=1"),
            *("--gpu-memory-utilization=0.9", "--limit_mm_per_prompt.image=1", "--enable-auto-tool-choice"),
            *("--tool-call-parser=hermes", "--max-model-len=128", "--no-enable-prefix-caching"),
        ]
    )
    environment = {"STORAGE_EMULATOR_HOST": url, "XDG_CACHE_HOME": str(tmp_path), "SANDBOX_HOST_PORT": "4711"}
    command, variables = command_for(arguments, Path("/venv/bin/python"), environment)
    model = Path(command[3].removeprefix("--model="))
    assert command[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert (model / "config.json").is_file()
    assert len(list(model.glob("*.safetensors"))) == 2
    assert "--port=4711" in command
    assert "--tensor-parallel-size" not in command
    assert command[command.index("--limit-mm-per-prompt") + 1] == '{"image": 1}'
    assert "--no-enable-prefix-caching" in command
    assert command[-2:] == ["--served-model-name", path]
    assert variables["PYTHONSAFEPATH"] == "1"
    again, _ = command_for(arguments, Path("/venv/bin/python"), environment)
    assert again[3] == command[3], "the same contents are copied once"
