"""What real vLLM 0.32 answers to these requests, held against the simulated engine and against vLLM itself.

The table was distilled from real vLLM's answers. Against real vLLM (`-m vllm`) it needs the venv that
`sandbox.engine.real_vllm.ensure_venv` makes, at `.venv-vllm` or at `LLM_ROLLOUT_VLLM_PYTHON`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox.engine.metrics import token_count_buckets
from sandbox.models import smollm2, tiny_model
from sandbox.processes import Child
from tests.engines import has_vllm, vllm_python

REPOSITORY = Path(__file__).parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
START_TIMEOUT_S = 600.0
"""Real vLLM takes over a minute on an idle machine."""
ARGUMENTS = [f"--served-model-name={MODEL}", "--max-model-len=1024", "--max-num-seqs=16"]
QUICK = '{"base_s": 0.001, "per_sequence_s": 0}'
"""A thousand tokens per second and sequence: these tests ask what is answered, not when."""
SKY = [{"role": "user", "content": "Why is the sky blue?"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NAME_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@dataclass(frozen=True)
class Endpoint:
    """A running engine."""

    port: int
    is_real: bool

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, str, str]:
        """Status, content type and text of an answer; `body` is bytes or a value to encode as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_TIMEOUT_S)
        try:
            payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, payload, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers["content-type"] or "", answer.read().decode()
        finally:
            connection.close()

    def chat(self, **fields: Any) -> dict[str, Any]:
        status, _, text = self.request("POST", "/v1/chat/completions", {"model": MODEL, "messages": SKY} | fields)
        assert status == 200, text
        answer: dict[str, Any] = json.loads(text)
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a streamed answer, which must end with the end mark."""
        status, content_type, text = self.request("POST", path, body | {"stream": True})
        assert (status, content_type) == (200, "text/event-stream; charset=utf-8"), text
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_engine(
    arguments: Sequence[str], log: Path, *, options: Sequence[str] = (), **environment: str
) -> tuple[Child, int]:
    """Start an engine and wait until it is healthy."""
    port = free_port()
    command = [sys.executable, "-m", "sandbox.engine", "serve", *options, "vllm", "serve", *arguments]
    child = Child(command, log=log, env=os.environ | environment | {"SANDBOX_HOST_PORT": str(port)}, cwd=REPOSITORY)
    # The engine's own output is the pod's log: nobody may leave the pipe full.
    assert child.process.stdout is not None
    threading.Thread(target=_drain, args=(child.process.stdout, log.with_suffix(".out")), daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if child.process.poll() is not None:
            raise AssertionError(f"the engine ended with {child.process.returncode}: {child.log_tail()}")
        try:
            if Endpoint(port, is_real=False).request("GET", "/health")[0] == 200:
                return child, port
        except ConnectionRefusedError:
            time.sleep(0.05)
    child.stop()
    raise AssertionError("the engine did not become healthy in time")


def _drain(stream: Any, target: Path) -> None:
    with target.open("wb") as file:
        for line in stream:
            file.write(line)


@pytest.fixture(
    scope="module",
    params=["simulated", pytest.param("real", marks=[pytest.mark.vllm, pytest.mark.timeout(1800)])],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("engine")
    is_real = request.param == "real"
    if is_real and not has_vllm():
        pytest.skip(f"no venv of real vLLM at {vllm_python()}: make it with sandbox.engine.real_vllm.ensure_venv")
    environment = {} if is_real else {"SANDBOX_ENGINE_LATENCY": QUICK}
    if is_real:
        model = smollm2(Path.home() / ".cache" / "llm-rollout" / "models")
        options = ["--real-vllm-python", str(vllm_python()), "--"]
    else:
        model, options = roomy_model(folder / "model"), []
    arguments = [str(model), *ARGUMENTS]
    child, port = start_engine(arguments, folder / "log", options=options, **environment)
    with child:
        yield Endpoint(port, is_real)


@pytest.fixture(scope="module")
def tool_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A simulated Gemma 4: multimodal, reasoning, with tools; no tokenizer of its own."""
    folder = tmp_path_factory.mktemp("engine")
    model = roomy_model(folder / "model")
    config = json.loads((model / "config.json").read_text())
    wrapped = {"model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "text_config": config}
    _replace(model / "config.json", json.dumps(wrapped | {"vision_config": {}, "mm_tokens_per_image": 20}))
    _replace(model / "chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}{{ enable_thinking }}")
    parsers = ["--enable-auto-tool-choice", "--tool-call-parser=gemma4", "--reasoning-parser=gemma4"]
    arguments = [str(model), *ARGUMENTS, *parsers, "--limit_mm_per_prompt.image=1"]
    child, port = start_engine(arguments, folder / "log", SANDBOX_ENGINE_LATENCY=QUICK)
    with child:
        yield Endpoint(port, is_real=False)


def roomy_model(folder: Path) -> Path:
    """A tiny checkpoint whose config allows a context window of 4096 tokens."""
    config = tiny_model(folder) / "config.json"
    _replace(config, json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    return folder


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


class Pattern(str):
    """An expected string, as a regular expression for the whole of it."""


def differences(expected: Any, actual: Any, path: str = "$") -> list[str]:
    """Where `actual` differs from `expected`: a value, a type that stands for any value of it, or a Pattern.

    Objects must have the same keys, so that a field that is missing, or that vLLM does not have, shows.
    """
    if isinstance(expected, type):
        return [] if isinstance(actual, expected) else [f"{path}: {actual!r} is no {expected.__name__}"]
    if isinstance(expected, Pattern):
        fits = isinstance(actual, str) and re.fullmatch(expected, actual, re.DOTALL)
        return [] if fits else [f"{path}: {actual!r} is not like {str(expected)!r}"]
    if isinstance(expected, dict) and isinstance(actual, dict):
        found = [f"{path}: keys {sorted(set(expected) ^ set(actual))} differ"] if set(expected) != set(actual) else []
        shared = [key for key in expected if key in actual]
        return found + [each for key in shared for each in differences(expected[key], actual[key], f"{path}.{key}")]
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return [each for index, (one, other) in pairs for each in differences(one, other, f"{path}[{index}]")]
    return [] if expected == actual else [f"{path}: {actual!r} instead of {expected!r}"]


def error(message: str, *, code: int = 400, kind: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(problem: str, param: str) -> dict[str, Any]:
    """FastAPI's validation as vLLM words it."""
    return error(Pattern(r"1 validation error:\n  " + problem), kind="Bad Request", param=param)


USAGE = {"prompt_tokens": int, "total_tokens": int, "completion_tokens": int}
FULL_USAGE = USAGE | {"prompt_tokens_details": None, "completion_tokens_details": None}
MESSAGE = {
    "role": "assistant",
    "content": str,
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "reasoning": None,
}


def chat_answer(finish_reason: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "id": Pattern("chatcmpl-[0-9a-f]{16}"),
        "object": "chat.completion",
        "created": int,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": message or MESSAGE,
                "logprobs": None,
                "finish_reason": finish_reason,
                "stop_reason": None,
                "token_ids": None,
                "routed_experts": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": Pattern(r"vllm-0\.32\.0-.+"),
        "usage": FULL_USAGE,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


COMPLETION_ANSWER = {
    "id": Pattern("cmpl-[0-9a-f]{16}"),
    "object": "text_completion",
    "created": int,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "text": str,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
    ],
    "service_tier": None,
    "system_fingerprint": Pattern(r"vllm-0\.32\.0-.+"),
    "usage": FULL_USAGE,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "metrics": None,
}


@dataclass(frozen=True)
class Case:
    """A request and vLLM's answer to it."""

    name: str
    path: str
    body: Any
    status: int
    expected: Any
    method: str = "POST"


CHAT = "/v1/chat/completions"
CASES = [
    Case("version", "/version", None, 200, {"version": "0.32.0"}, method="GET"),
    Case(
        "chat",
        CHAT,
        {"model": MODEL, "messages": SKY, "max_tokens": 8, "temperature": 0},
        200,
        chat_answer("length"),
    ),
    Case(
        "structured output",
        CHAT,
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Give me a name."}],
            "max_tokens": 60,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": NAME_SCHEMA}},
        },
        200,
        chat_answer("stop"),
    ),
    Case(
        "completion", "/v1/completions", {"model": MODEL, "prompt": "The sky", "max_tokens": 4}, 200, COMPLETION_ANSWER
    ),
    Case(
        "an unknown model",
        CHAT,
        {"model": "nope", "messages": SKY},
        404,
        error(
            f"The model `nope` does not exist. Valid aliases: {MODEL}.", code=404, kind="NotFoundError", param="model"
        ),
    ),
    Case(
        "broken JSON",
        CHAT,
        b'{"model":}',
        400,
        invalid(
            r"\{'type': 'json_invalid', 'loc': 'body\.9', 'msg': 'JSON decode error', 'input': '<dict of 0 items>',"
            r" 'ctx': \{'error': 'Expecting value'\}\}",
            "body.9",
        ),
    ),
    Case(
        "no messages",
        CHAT,
        {"model": MODEL},
        400,
        invalid(
            r"\{'type': 'missing', 'loc': 'body\.messages', 'msg': 'Field required', 'input': '<dict of 1 items>'\}",
            "body.messages",
        ),
    ),
    Case(
        "a word as max_tokens",
        CHAT,
        {"model": MODEL, "messages": SKY, "max_tokens": "many"},
        400,
        invalid(
            r"\{'type': 'int_parsing', 'loc': 'body\.max_tokens', 'msg': 'Input should be a valid integer, unable to"
            r" parse string as an integer', 'input': 'many'\}",
            "body.max_tokens",
        ),
    ),
    Case(
        "more output than the context window",
        CHAT,
        {"model": MODEL, "messages": SKY, "max_tokens": 99999},
        400,
        error(
            "max_tokens=99999 cannot be greater than max_model_len=1024. Please request fewer output tokens."
            " (parameter=max_tokens, value=99999)",
            param="max_tokens",
        ),
    ),
    Case(
        "a prompt longer than the context window",
        "/v1/completions",
        {"model": MODEL, "prompt": [7] * 1100, "max_tokens": 4},
        400,
        error(
            Pattern(
                r"This model's maximum context length is 1024 tokens\. However, your prompt contains 1100 input tokens,"
                r" which exceeds this limit even without any output tokens\. Please reduce the length of the input"
                r" prompt\. \(parameter=input_tokens, value=1100\)"
            ),
            param="input_tokens",
        ),
    ),
    Case(
        "no token asked for",
        CHAT,
        {"model": MODEL, "messages": SKY, "max_tokens": 0},
        400,
        error(Pattern(r"max_tokens must be at least 1, got 0\..*"), param="max_tokens"),
    ),
    Case(
        "more tokens at least than at most",
        CHAT,
        {"model": MODEL, "messages": SKY, "max_tokens": 4, "min_tokens": 5},
        400,
        error(Pattern(r"min_tokens must be less than or equal to max_tokens=4, got 5\..*")),
    ),
    Case(
        "tools that are not enabled",
        CHAT,
        {"model": MODEL, "messages": SKY, "tools": [WEATHER]},
        400,
        error('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
    ),
    Case(
        "an empty list of tools",
        CHAT,
        {"model": MODEL, "messages": SKY, "tools": []},
        400,
        error(
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
            " (parameter=tools)",
            param="tools",
        ),
    ),
    Case(
        "options of a stream without a stream",
        CHAT,
        {"model": MODEL, "messages": SKY, "stream_options": {"include_usage": True}},
        400,
        error(
            "Stream options can only be defined when `stream=True`. (parameter=stream_options)", param="stream_options"
        ),
    ),
    Case(
        "an image for a text model",
        CHAT,
        {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}]},
        400,
        error(f"{MODEL} is not a multimodal model"),
    ),
    Case(
        "tokenize",
        "/tokenize",
        {"model": MODEL, "prompt": "Why is the sky blue?"},
        200,
        {"count": int, "max_model_len": 1024, "tokens": list, "token_strs": None},
    ),
    Case(
        "a text longer than the context window",
        CHAT,
        {"model": MODEL, "messages": [{"role": "user", "content": "word " * 3000}]},
        400,
        error(
            Pattern(
                r"This model's maximum context length is 1024 tokens\. However, your prompt contains at least 1025"
                r" input tokens, which exceeds .* \(parameter=input_tokens, value=1025\)"
            ),
            param="input_tokens",
        ),
    ),
    Case(
        "a prompt that leaves no room",
        "/v1/completions",
        {"model": MODEL, "prompt": [7] * 1024, "max_tokens": 4},
        400,
        error("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", param="max_tokens"),
    ),
    Case(
        "no prompt",
        "/v1/completions",
        {"model": MODEL, "max_tokens": 4},
        400,
        error("Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)", param="prompt"),
    ),
    Case(
        "no message",
        CHAT,
        {"model": MODEL, "messages": []},
        400,
        error("Cannot apply chat template to an empty conversation. Provide at least one message."),
    ),
    Case(
        "messages that are no list",
        CHAT,
        {"model": MODEL, "messages": "hi"},
        400,
        invalid(
            r"\{'type': 'list_type', 'loc': 'body\.messages', 'msg': 'Input should be a valid list', 'input': 'hi'\}",
            "body.messages",
        ),
    ),
    Case(
        "a body that is no object",
        CHAT,
        [],
        400,
        invalid(
            r"\{'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary or object to"
            r" extract fields from', 'input': '<list of 0 items>'\}",
            "body",
        ),
    ),
    Case(
        "no body",
        CHAT,
        None,
        400,
        invalid(r"\{'type': 'missing', 'loc': 'body', 'msg': 'Field required', 'input': 'None'\}", "body"),
    ),
    Case(
        "a negative temperature",
        CHAT,
        {"model": MODEL, "messages": SKY, "temperature": -1},
        400,
        error("temperature must be non-negative, got -1.0. (parameter=temperature, value=-1.0)", param="temperature"),
    ),
    Case(
        "a top_p of 0",
        CHAT,
        {"model": MODEL, "messages": SKY, "top_p": 0},
        400,
        error("top_p must be in (0, 1], got 0.0. (parameter=top_p, value=0.0)", param="top_p"),
    ),
    Case(
        "a choice of tools without tools",
        CHAT,
        {"model": MODEL, "messages": SKY, "tool_choice": "auto"},
        400,
        error("When using `tool_choice`, `tools` must be set. (parameter=tool_choice)", param="tool_choice"),
    ),
    Case(
        "tokenize nothing",
        "/tokenize",
        {},
        400,
        error(
            Pattern(r"2 validation errors:\n  .*body\.prompt.*\n  .*body\.messages.*"),
            kind="Bad Request",
            param="body.prompt",
        ),
    ),
    Case("an unknown path", "/v1/nothing", {}, 404, {"detail": "Not Found"}),
    Case(
        "a wrong method",
        CHAT,
        None,
        405,
        {"detail": "Method Not Allowed"},
        method="GET",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_answer_is_vllms(engine: Endpoint, case: Case) -> None:
    status, content_type, text = engine.request(case.method, case.path, case.body)
    assert (status, content_type) == (case.status, "application/json"), text
    assert differences(case.expected, json.loads(text)) == []


def test_the_model_list_names_the_served_model_and_its_context_window(engine: Endpoint) -> None:
    status, _, text = engine.request("GET", "/v1/models")
    card = json.loads(text)["data"][0]
    assert status == 200
    assert {name: card[name] for name in ("id", "object", "owned_by", "parent", "max_model_len")} == {
        "id": MODEL,
        "object": "model",
        "owned_by": "vllm",
        "parent": None,
        "max_model_len": 1024,
    }
    assert card["permission"][0]["object"] == "model_permission"


def test_health_answers_with_an_empty_body(engine: Endpoint) -> None:
    assert engine.request("GET", "/health")[::2] == (200, "")


def test_a_chat_stream_starts_with_the_role_and_ends_with_the_usage(engine: Endpoint) -> None:
    body = {"model": MODEL, "messages": SKY, "max_tokens": 5, "temperature": 0}
    first, *middle, last, usage = engine.stream(CHAT, body | {"stream_options": {"include_usage": True}})
    shared = {"id": Pattern("chatcmpl-.+"), "object": "chat.completion.chunk", "created": int, "model": MODEL}
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    opening = choice | {"delta": {"role": "assistant", "content": ""}}
    assert differences(shared | {"choices": [opening], "prompt_token_ids": None, "prompt_text": None}, first) == []
    for chunk in middle:
        assert differences(shared | {"choices": [choice | {"delta": {"content": str}, "token_ids": None}]}, chunk) == []
    closing = {"delta": {"content": str}, "finish_reason": "length", "stop_reason": None, "token_ids": None}
    assert differences(shared | {"choices": [choice | closing]}, last) == []
    assert differences(shared | {"choices": [], "usage": USAGE, "system_fingerprint": str}, usage) == []
    assert usage["usage"]["completion_tokens"] == 5
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_a_stream_and_a_whole_answer_hold_the_same_greedy_text(engine: Endpoint) -> None:
    fields = {"max_tokens": 12, "temperature": 0}
    whole = engine.chat(**fields)
    chunks = engine.stream(CHAT, {"model": MODEL, "messages": SKY} | fields)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"


def test_a_completion_stream_has_a_chunk_per_token_and_names_the_build_in_the_last(engine: Endpoint) -> None:
    chunks = engine.stream("/v1/completions", {"model": MODEL, "prompt": "The sky is", "max_tokens": 4})
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]
    assert ["system_fingerprint" in chunk for chunk in chunks] == [False, False, False, True]
    assert set(chunks[0]["choices"][0]) == {
        *("index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids", "token_ids")
    }


def test_ignore_eos_gives_exactly_the_tokens_asked_for(engine: Endpoint) -> None:
    answer = engine.chat(max_tokens=200, ignore_eos=True, temperature=0)
    assert answer["usage"]["completion_tokens"] == 200
    assert answer["choices"][0]["finish_reason"] == "length"


def test_output_that_does_not_fit_beside_the_prompt_is_cut_off(engine: Endpoint) -> None:
    body = {"model": MODEL, "prompt": [7] * 1000, "max_tokens": 500, "ignore_eos": True}
    status, _, text = engine.request("POST", "/v1/completions", body)
    usage = json.loads(text)["usage"]
    assert (status, usage["total_tokens"]) == (200, 1024)


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Endpoint) -> None:
    free = engine.chat(max_tokens=20, temperature=0)["choices"][0]["message"]["content"]
    word = free.split()[3]
    choice = engine.chat(max_tokens=20, temperature=0, stop=[word])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", word)
    assert choice["message"]["content"] == free[: free.index(word)]


def test_structured_output_fits_its_schema(engine: Endpoint) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": NAME_SCHEMA}}
    answer = engine.chat(max_tokens=80, temperature=0, response_format=format_)
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["name"], str)


def test_metrics_have_vllms_names_and_count_what_was_asked(engine: Endpoint) -> None:
    before = _metrics(engine)
    answer = engine.chat(max_tokens=7, ignore_eos=True, temperature=0)
    after = _metrics(engine)

    def gained(name: str) -> float:
        return after[name] - before[name]

    assert gained("vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert gained("vllm:generation_tokens_total") == 7
    assert gained('vllm:request_success_total{finished_reason="length"}') == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert gained(f"vllm:{name}_count") == 1
    assert gained("vllm:inter_token_latency_seconds_count") == 6
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1
    assert {"vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"} <= set(
        after
    )


def _metrics(endpoint: Endpoint) -> dict[str, float]:
    """Samples by name and distinguishing labels; the labels that all have are left out."""
    status, content_type, text = endpoint.request("GET", "/metrics")
    assert (status, content_type) == (200, "text/plain; version=1.0.0; charset=utf-8")
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("vllm:"):
            name, value = line.rsplit(" ", 1)
            name = re.sub(r'(engine="0"|model_name="[^"]*"),?', "", name).replace(",}", "}").replace("{}", "")
            samples[name] = float(value)
    return samples


def test_buckets_of_token_counts_end_at_the_context_window() -> None:
    assert token_count_buckets(1024) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert token_count_buckets(16384)[-2:] == (5000, 10000)


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True, "top_logprobs": 2},
        {"logit_bias": {"5": 1}},
        {"truncate_prompt_tokens": 5},
        {"n": 2},
        {"use_beam_search": True},
        {"structured_outputs": {"regex": "a+"}},
        {"response_format": {"type": "structural_tag"}},
    ],
)
def test_what_is_not_simulated_is_refused_and_never_ignored(tool_engine: Endpoint, fields: dict[str, Any]) -> None:
    status, _, text = tool_engine.request("POST", CHAT, {"model": MODEL, "messages": SKY} | fields)
    assert status == 501
    assert json.loads(text)["error"]["type"] == "NotImplementedError"


def test_reasoning_is_separated_from_the_content(tool_engine: Endpoint) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "skip_special_tokens": False, "temperature": 0}
    answer = tool_engine.chat(**thinking)
    message = answer["choices"][0]["message"]
    assert "Rayleigh" in message["reasoning"]
    assert "Rayleigh scattering" in message["content"]
    assert "<" not in message["content"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = tool_engine.stream(CHAT, {"model": MODEL, "messages": SKY} | thinking)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == message["reasoning"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


def test_without_thinking_there_is_no_reasoning(tool_engine: Endpoint) -> None:
    assert tool_engine.chat()["choices"][0]["message"]["reasoning"] is None


def test_a_tool_is_called_with_arguments_that_fit_its_schema(tool_engine: Endpoint) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = tool_engine.chat(messages=question, tools=[WEATHER])["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "")
    assert (call["type"], call["function"]["name"]) == ("function", "get_weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}


def test_a_streamed_tool_call_adds_up_to_the_whole_one(tool_engine: Endpoint) -> None:
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    chunks = tool_engine.stream(CHAT, {"model": MODEL, "messages": question, "tools": [WEATHER]})
    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "get_weather"
    assert json.loads("".join(call["function"].get("arguments", "") for call in calls)) == {"city": "Paris"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_tools_result_is_used_in_the_answer(tool_engine: Endpoint) -> None:
    call = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "18 degrees and rain"},
    ]
    choice = tool_engine.chat(messages=messages, tools=[WEATHER])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "18 degrees and rain" in choice["message"]["content"]


def test_one_image_is_counted_and_two_are_refused(tool_engine: Endpoint) -> None:
    text = {"type": "text", "text": "What is this?"}
    one = [{"role": "user", "content": [text, IMAGE]}]
    none = [{"role": "user", "content": [text]}]
    tokens = [tool_engine.chat(messages=each, max_tokens=1)["usage"]["prompt_tokens"] for each in (one, none)]
    assert tokens[0] - tokens[1] == 20
    two = [{"role": "user", "content": [text, IMAGE, IMAGE]}]
    status, _, answer = tool_engine.request("POST", CHAT, {"model": MODEL, "messages": two})
    assert status == 400
    assert json.loads(answer)["error"]["message"].startswith("At most 1 image(s) may be provided in one prompt.")


def test_a_repeated_prompt_is_served_from_the_prefix_cache(tool_engine: Endpoint) -> None:
    body = {"model": MODEL, "prompt": list(range(100)), "max_tokens": 1}
    tool_engine.request("POST", "/v1/completions", body)
    before = _metrics(tool_engine)["vllm:prefix_cache_hits_total"]
    tool_engine.request("POST", "/v1/completions", body)
    assert _metrics(tool_engine)["vllm:prefix_cache_hits_total"] - before == 96


def test_a_client_that_goes_away_frees_its_place(tool_engine: Endpoint) -> None:
    body = json.dumps({"model": MODEL, "messages": SKY, "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    before = _metrics(tool_engine)['vllm:request_success_total{finished_reason="abort"}']
    with socket.create_connection(("127.0.0.1", tool_engine.port)) as client:
        kind = "content-type: application/json"
        head = f"POST {CHAT} HTTP/1.1\r\nhost: engine\r\n{kind}\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert client.recv(1024)
    deadline = time.monotonic() + 60
    while _metrics(tool_engine)['vllm:request_success_total{finished_reason="abort"}'] == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert _metrics(tool_engine)["vllm:num_requests_running"] == 0


def test_requests_on_one_connection_are_answered_in_turn(tool_engine: Endpoint) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", tool_engine.port, timeout=60)
    for _ in range(3):
        headers = {"expect": "100-continue", "content-type": "application/json"}
        connection.request("POST", CHAT, json.dumps({"messages": SKY, "max_tokens": 2}), headers)
        assert connection.getresponse().read().startswith(b'{"id"')
    connection.close()
