"""vLLM's HTTP routes: what they accept, what they refuse and in which words (as recorded from vLLM 0.32).

Simulated: `/health`, `/ping`, `/version`, `/v1/models`, `/tokenize`, `/detokenize`, `/v1/completions`,
`/v1/chat/completions` (streaming, reasoning, tools, JSON schema, images, stop strings, usage) and `/metrics`.
What vLLM knows and this does not (log probabilities, several choices, beam search, regular expressions and
grammars) is refused with 501: an answer that ignored it would look like a broken model.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rollout.vllm_flags import VLLM_VERSION
from sandbox.engine.answers import Answer, Limits, Writer
from sandbox.engine.args import ServeArguments
from sandbox.engine.core import Engine, EngineRequest, Sink
from sandbox.engine.http import Connection, Request
from sandbox.engine.latency import Sequence
from sandbox.engine.text import json_answer, value_for
from sandbox.engine.tokens import ChatTemplate, ChatTemplateError, Tokenizer

FINGERPRINT = f"vllm-{VLLM_VERSION}-sandbox"
DEFAULT_IMAGE_TOKENS = 256
"""Gemma's soft tokens per image, where the config does not say."""


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        type: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": int(status)}}


def not_simulated(what: str) -> ApiError:
    return ApiError(
        f"{what} is not simulated by the sandbox engine",
        status=HTTPStatus.NOT_IMPLEMENTED,
        type="NotImplementedError",
        param=what,
    )


class _Body(BaseModel):
    """vLLM ignores fields that it does not know; those below it honours."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class Sampling(_Body):
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    n: int | None = 1
    use_beam_search: bool = False
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionBody(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None


class NamedFunction(_Body):
    name: str


class NamedToolChoice(_Body):
    function: NamedFunction
    type: Literal["function"] = "function"


class Tool(_Body):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"] = "function"
    function: dict[str, Any]


class ChatBody(Sampling):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = True


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The loaded model as the routes see it."""

    arguments: ServeArguments
    path: str
    max_model_len: int
    model_type: str
    tokenizer: Tokenizer
    template: ChatTemplate
    is_multimodal: bool
    can_think: bool
    image_tokens: int = DEFAULT_IMAGE_TOKENS
    created: int = field(default_factory=lambda: int(time()))

    @property
    def name(self) -> str:
        return self.arguments.served_names[0]


class Api:
    """Answers requests; `handle` is the HTTP connection's handler."""

    def __init__(self, engine: Engine, model: ServedModel, log: Callable[[str], None]) -> None:
        self._engine = engine
        self._model = model
        self._log = log
        self._writer = Writer(
            model.tokenizer,
            model_type=model.model_type,
            separates_reasoning=model.arguments.reasoning_parser is not None,
        )
        self._routes: dict[str, dict[str, Callable[[Request, Connection], None]]] = {
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/version": {"GET": self._version},
            "/metrics": {"GET": self._metrics},
            "/v1/models": {"GET": self._models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/v1/completions": {"POST": self._completions},
            "/v1/chat/completions": {"POST": self._chat},
        }

    @property
    def routes(self) -> list[tuple[str, str]]:
        """Path and methods, for the start-up log."""
        return [(path, ", ".join(methods)) for path, methods in self._routes.items()]

    def handle(self, request: Request, connection: Connection) -> None:
        status = HTTPStatus.OK
        try:
            self._route(request)(request, connection)
        except ApiError as error:
            status = error.status
            _respond_json(connection, error.body, status)
        self._log(
            f'INFO:     {connection.peer} - "{request.method} {request.path} HTTP/1.1" {int(status)} {status.phrase}'
        )

    def _route(self, request: Request) -> Callable[[Request, Connection], None]:
        methods = self._routes.get(request.path)
        if methods is None:
            raise _http_error(HTTPStatus.NOT_FOUND)
        if request.method not in methods:
            raise _http_error(HTTPStatus.METHOD_NOT_ALLOWED)
        keys = self._model.arguments.api_keys
        if keys and request.path.startswith("/v1"):
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or token not in keys:
                error = ApiError("Unauthorized", status=HTTPStatus.UNAUTHORIZED)
                error.body = {"error": "Unauthorized"}  # type: ignore[dict-item]
                raise error
        return methods[request.method]

    def _health(self, _: Request, connection: Connection) -> None:
        connection.respond(HTTPStatus.OK, b"")

    def _version(self, _: Request, connection: Connection) -> None:
        _respond_json(connection, {"version": VLLM_VERSION})

    def _metrics(self, _: Request, connection: Connection) -> None:
        body = self._engine.metrics.render().encode()
        connection.respond(HTTPStatus.OK, body, content_type="text/plain; version=1.0.0; charset=utf-8")

    def _models(self, _: Request, connection: Connection) -> None:
        model = self._model
        permission = {
            "id": f"modelperm-{_random_id()}",
            "object": "model_permission",
            "created": model.created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        cards = [
            {
                "id": name,
                "object": "model",
                "created": model.created,
                "owned_by": "vllm",
                "root": model.path,
                "parent": None,
                "max_model_len": model.max_model_len,
                "permission": [permission],
            }
            for name in model.arguments.served_names
        ]
        _respond_json(connection, {"object": "list", "data": cards})

    def _tokenize(self, request: Request, connection: Connection) -> None:
        body = _read(TokenizeBody, request)
        self._check_model(body.model)
        if body.messages is not None:
            ids = self._model.tokenizer.encode(self._render(body.messages, None, {}))
        elif body.prompt is not None:
            ids = self._model.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            raise _missing("prompt", request)
        answer = {"count": len(ids), "max_model_len": self._model.max_model_len, "tokens": ids, "token_strs": None}
        if body.return_token_strs:
            raise not_simulated("return_token_strs")
        _respond_json(connection, answer)

    def _detokenize(self, request: Request, connection: Connection) -> None:
        body = _read(DetokenizeBody, request)
        self._check_model(body.model)
        try:
            text = self._model.tokenizer.decode(body.tokens)
        except NotImplementedError as error:
            raise not_simulated("detokenize without a tokenizer.json") from error
        _respond_json(connection, {"prompt": text})

    def _completions(self, request: Request, connection: Connection) -> None:
        body = _read(CompletionBody, request)
        self._check_model(body.model)
        self._check_sampling(body)
        for name in ("logprobs", "suffix"):
            if getattr(body, name) is not None:
                raise not_simulated(name)
        if body.echo:
            raise not_simulated("echo")
        text, ids = self._completion_prompt(body)
        limits = self._limits(body, len(ids), body.max_tokens, "max_tokens")
        answer = self._structured(body, None, text, limits) or self._writer.completion(text, limits)
        reply = _Reply(f"cmpl-{_request_id(request)}", self._model.name, connection, answer, len(ids), body)
        sink = _CompletionStream(reply) if body.stream else _CompletionWhole(reply)
        self._submit(request, reply, sink, ids, limits)

    def _completion_prompt(self, body: CompletionBody) -> tuple[str, list[int]]:
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise not_simulated("several prompts in one request")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt, self._model.tokenizer.encode(prompt, add_special_tokens=True)
        return "", [int(each) for each in prompt]  # type: ignore[arg-type]

    def _chat(self, request: Request, connection: Connection) -> None:
        body = _read(ChatBody, request)
        self._check_model(body.model)
        self._check_sampling(body)
        if body.logprobs or body.top_logprobs:
            raise not_simulated("logprobs")
        tools = self._tools(body)
        images = self._check_images(body.messages)
        options = self._model.arguments.default_chat_template_kwargs | (body.chat_template_kwargs or {})
        rendered_tools = [tool.model_dump() for tool in body.tools or []] or None
        ids = self._model.tokenizer.encode(self._render(body.messages, rendered_tools, options))
        ids += [0] * (images * self._model.image_tokens)
        requested, parameter = body.max_tokens, "max_tokens"
        if body.max_completion_tokens is not None:
            requested, parameter = body.max_completion_tokens, "max_completion_tokens"
        limits = self._limits(body, len(ids), requested, parameter)
        question = _last_user_text(body.messages)
        answer = (
            self._structured(body, body.response_format, question, limits)
            or self._called(body, tools, question, limits)
            or self._writer.plain(
                question,
                limits,
                thinks=self._model.can_think and bool(options.get("enable_thinking")),
                skip_special_tokens=body.skip_special_tokens,
            )
        )
        reply = _Reply(f"chatcmpl-{_request_id(request)}", self._model.name, connection, answer, len(ids), body)
        sink = _ChatStream(reply) if body.stream else _ChatWhole(reply)
        self._submit(request, reply, sink, ids, limits)

    def _submit(self, request: Request, reply: _Reply, sink: Sink, ids: list[int], limits: Limits) -> None:
        sequence = Sequence(len(ids), len(reply.answer.tokens), self._block_hashes(ids))
        engine_request = EngineRequest(
            request_id=reply.request_id,
            sequence=sequence,
            sink=sink,
            finish_reason="length" if reply.answer.finish_reason == "length" else "stop",
            max_tokens=limits.max_tokens,
            received_s=request.received_s,
        )
        reply.connection.on_disconnect = lambda: self._engine.abort(engine_request)
        self._engine.submit(engine_request)

    def _block_hashes(self, ids: list[int]) -> tuple[int, ...]:
        """One hash per full block, of the block and all before it, as vLLM chains them."""
        parameters = self._engine.scheduler.parameters
        if not parameters.prefix_caching:
            return ()
        size = parameters.block_size
        hashes: list[int] = []
        previous = 0
        for start in range(0, len(ids) - size + 1, size):
            previous = hash((previous, *ids[start : start + size]))
            hashes.append(previous)
        return tuple(hashes)

    def _check_model(self, name: str | None) -> None:
        names = self._model.arguments.served_names
        if name is not None and name not in names:
            raise ApiError(
                f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}.",
                status=HTTPStatus.NOT_FOUND,
                type="NotFoundError",
                param="model",
            )

    def _check_sampling(self, body: Sampling) -> None:
        if body.n is not None and body.n != 1:
            raise not_simulated("n")
        if body.use_beam_search:
            raise not_simulated("use_beam_search")
        if body.prompt_logprobs is not None:
            raise not_simulated("prompt_logprobs")
        if body.stream_options is not None and not body.stream:
            raise _validation_error("Stream options can only be defined when `stream=True`.", "stream_options")
        if body.temperature is not None and body.temperature < 0:
            raise ApiError(f"temperature must be non-negative, got {body.temperature}.", param="temperature")
        if body.top_p is not None and not 0 < body.top_p <= 1:
            raise ApiError(f"top_p must be in (0, 1], got {body.top_p}.", param="top_p")
        if body.min_tokens < 0:
            raise ApiError(f"min_tokens must be greater than or equal to 0, got {body.min_tokens}.")

    def _limits(self, body: Sampling, prompt_tokens: int, requested: int | None, parameter: str) -> Limits:
        longest = self._model.max_model_len
        if requested is not None and requested > longest:
            raise ApiError(
                f"{parameter}={requested} cannot be greater than max_model_len={longest}. Please request fewer output"
                f" tokens. (parameter={parameter}, value={requested})",
                param=parameter,
            )
        if prompt_tokens > longest:
            # The tokenizer stops one token past the limit, so vLLM cannot say how long the prompt really is.
            raise ApiError(
                f"This model's maximum context length is {longest} tokens. However, your prompt contains at least"
                f" {longest + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce"
                f" the length of the input prompt. (parameter=input_tokens, value={longest + 1})",
                param="input_tokens",
            )
        if requested is not None and requested < 1:
            raise ApiError(
                f"max_tokens must be at least 1, got {requested}. (parameter=max_tokens, value={requested})",
                param="max_tokens",
            )
        # What does not fit beside the prompt is cut off without a word, as vLLM does.
        max_tokens = min(requested if requested is not None else longest, longest - prompt_tokens)
        if max_tokens < 1:
            raise ApiError("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", param="max_tokens")
        if body.min_tokens > max_tokens:
            raise ApiError(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {body.min_tokens}.")
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Limits(max_tokens, body.min_tokens, body.ignore_eos, stop, body.include_stop_str_in_output)

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> str:
        try:
            return self._model.template.render(_flattened(messages), tools, **options)
        except ChatTemplateError as error:
            raise ApiError(str(error)) from error

    def _check_images(self, messages: list[dict[str, Any]]) -> int:
        """How many images the messages hold. ApiError where the model or the limit does not allow them."""
        images = 0
        for message in messages:
            for part in message.get("content") or [] if isinstance(message.get("content"), list) else []:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "image_url":
                    if not self._model.is_multimodal:
                        raise ApiError(f"{self._model.name} is not a multimodal model")
                    images += 1
                elif kind != "text":
                    raise not_simulated(f"content of type {kind!r}")
        limit = self._model.arguments.limit_mm_per_prompt.get("image", 999)
        limit = limit.get("count", 999) if isinstance(limit, dict) else int(limit)
        if images > limit:
            raise ApiError(
                f"At most {limit} image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase this"
                " limit. (parameter=image)",
                param="image",
            )
        return images

    def _tools(self, body: ChatBody) -> list[Tool]:
        """The tools that the model may call."""
        if body.tools is not None and not body.tools:
            raise _validation_error(
                "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.",
                "tools",
            )
        choice = body.tool_choice or ("auto" if body.tools else "none")
        if choice != "none" and not body.tools:
            raise _validation_error("When using `tool_choice`, `tools` must be set.", "tool_choice")
        if choice == "auto" and not self._model.arguments.tools_enabled:
            raise ApiError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        if choice == "none":
            return []
        tools = body.tools or []
        if isinstance(choice, NamedToolChoice):
            tools = [tool for tool in tools if tool.function.get("name") == choice.function.name]
            if not tools:
                raise _validation_error(
                    "The tool specified in `tool_choice` does not match any of the specified `tools`", "tool_choice"
                )
        return tools

    def _called(self, body: ChatBody, tools: list[Tool], question: str, limits: Limits) -> Answer | None:
        """A call of the first tool, unless its result is what the model was given last."""
        if not tools:
            return None
        last = body.messages[-1] if body.messages else {}
        forced = body.tool_choice not in (None, "auto")
        if last.get("role") == "tool" and not forced:
            return self._writer.fixed(f"The tool answered: {_content_text(last.get('content'))}", limits)
        function = tools[0].function
        try:
            arguments = value_for(function.get("parameters") or {"type": "object"}, question)
        except NotImplementedError as error:
            raise not_simulated(str(error)) from error
        return self._writer.tool_call(str(function.get("name")), arguments, limits)

    def _structured(
        self, body: Sampling, response_format: dict[str, Any] | None, question: str, limits: Limits
    ) -> Answer | None:
        """The answer that a JSON schema or a choice prescribes; None without one."""
        constraints = dict(body.structured_outputs or {})
        kind = (response_format or {}).get("type", "text")
        if kind == "json_schema":
            if "json_schema" not in (response_format or {}):
                raise _validation_error(
                    "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
                    "response_format",
                )
            constraints["json"] = (response_format or {})["json_schema"].get("schema") or {}
        elif kind == "json_object":
            constraints["json_object"] = True
        elif kind != "text":
            raise not_simulated(f"response_format of type {kind!r}")
        if constraints.get("choice"):
            return self._writer.fixed(str(constraints["choice"][0]), limits)
        if unknown := set(constraints) - {"json", "json_object"}:
            raise not_simulated(f"structured_outputs.{sorted(unknown)[0]}")
        if constraints.get("json_object"):
            constraints["json"] = {"type": "object", "properties": {"answer": {"type": "string"}}}
        if "json" not in constraints:
            return None
        schema = constraints["json"]
        try:
            return self._writer.fixed(
                json_answer(json.loads(schema) if isinstance(schema, str) else schema, question), limits
            )
        except NotImplementedError as error:
            raise not_simulated(str(error)) from error


@dataclass(slots=True)
class _Reply:
    """What all forms of an answer have in common."""

    request_id: str
    model: str
    connection: Connection
    answer: Answer
    prompt_tokens: int
    body: Sampling
    created: int = field(default_factory=lambda: int(time()))

    @property
    def last_index(self) -> int:
        return len(self.answer.tokens) - 1

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }

    def full_usage(self) -> dict[str, Any]:
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return self.usage(len(self.answer.tokens)) | details

    @property
    def wants_usage(self) -> bool:
        options = self.body.stream_options
        return options is not None and bool(options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        options = self.body.stream_options
        return self.wants_usage and options is not None and bool(options.continuous_usage_stats)


class _ChatWhole:
    """A chat answer in one piece."""

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply

    def token(self, index: int) -> None:
        if index < self._reply.last_index:
            return
        reply, answer = self._reply, self._reply.answer
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": answer.reasoning,
        }
        if answer.tool_call is not None:
            function = {"name": answer.tool_call.name, "arguments": answer.tool_call.arguments}
            message["content"] = None
            message["tool_calls"] = [{"id": f"chatcmpl-tool-{_random_id()}", "type": "function", "function": function}]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "token_ids": None,
            "routed_experts": None,
        }
        whole = {
            "id": reply.request_id,
            "object": "chat.completion",
            "created": reply.created,
            "model": reply.model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": reply.full_usage(),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        _respond_json(reply.connection, whole)


class _CompletionWhole:
    """A completion in one piece."""

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply

    def token(self, index: int) -> None:
        if index < self._reply.last_index:
            return
        reply, answer = self._reply, self._reply.answer
        choice = {
            "index": 0,
            "text": answer.content,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        whole = {
            "id": reply.request_id,
            "object": "text_completion",
            "created": reply.created,
            "model": reply.model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": reply.full_usage(),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        _respond_json(reply.connection, whole)


class _Stream:
    """A stream of events; the parts that all its chunks share are encoded once."""

    object = ""

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply
        head = {
            "id": reply.request_id,
            "object": self.object,
            "created": reply.created,
            "model": reply.model,
        }
        self._head = b"data: " + _encode(head)[:-1] + b","
        self._tokens = reply.answer.tokens
        self._last = reply.last_index
        self._continuous = reply.wants_continuous_usage
        self._write = reply.connection.write_event

    def _finish(self, last_choice: bytes) -> None:
        """The last choice, the usage if asked for, and the end mark. The last of the chunks names the build."""
        reply = self._reply
        fingerprint = b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
        usage = b',"usage":' + _encode(reply.usage(self._last + 1))
        if reply.wants_usage:
            self._write(self._head + last_choice + (usage if self._continuous else b"") + b"}\n\n")
            self._write(self._head + b'"choices":[]' + usage + fingerprint + b"}\n\n")
        else:
            self._write(self._head + last_choice + fingerprint + b"}\n\n")
        self._write(b"data: [DONE]\n\n")
        reply.connection.end_stream()

    def _usage_at(self, index: int) -> bytes:
        return b',"usage":' + _encode(self._reply.usage(index + 1)) if self._continuous else b""


class _ChatStream(_Stream):
    """A chat answer as chunks: the role first, then one chunk per token that has text."""

    object = "chat.completion.chunk"

    def __init__(self, reply: _Reply) -> None:
        super().__init__(reply)
        self._choice = self._head + b'"choices":[{"index":0,"delta":'
        self._reasoning_tokens = reply.answer.reasoning_tokens

    def token(self, index: int) -> None:
        if index == 0:
            self._start()
        if index == self._last:
            answer = self._reply.answer
            self._finish(
                b'"choices":[{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b,"token_ids":null}]'
                % (self._delta(index), _encode(answer.finish_reason), _encode(answer.stop_reason))
            )
        elif self._tokens[index]:
            self._write(
                b'%b%b,"logprobs":null,"finish_reason":null,"token_ids":null}]%b}\n\n'
                % (self._choice, self._delta(index), self._usage_at(index))
            )

    def _start(self) -> None:
        self._reply.connection.start_stream()
        role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        usage = b',"usage":' + _encode(self._reply.usage(0)) if self._continuous else b""
        self._write(b'%b%b,"prompt_token_ids":null,"prompt_text":null%b}\n\n' % (self._choice, role, usage))
        call = self._reply.answer.tool_call
        if call is not None:
            function = {"name": call.name, "arguments": ""}
            opening = [{"id": f"chatcmpl-tool-{_random_id()}", "type": "function", "index": 0, "function": function}]
            delta = _encode({"tool_calls": opening})
            self._write(b'%b%b,"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n' % (self._choice, delta))

    def _delta(self, index: int) -> bytes:
        text = _json_text(self._tokens[index])
        if self._reply.answer.tool_call is not None:
            return b'{"tool_calls":[{"index":0,"function":{"arguments":%b}}]}' % text
        return b'{"reasoning":%b}' % text if index < self._reasoning_tokens else b'{"content":%b}' % text


class _CompletionStream(_Stream):
    """A completion as chunks."""

    object = "text_completion"

    def __init__(self, reply: _Reply) -> None:
        super().__init__(reply)
        self._choice = self._head + b'"choices":[{"index":0,"text":'

    def token(self, index: int) -> None:
        if index == 0:
            self._reply.connection.start_stream()
        text = _json_text(self._tokens[index])
        if index == self._last:
            answer = self._reply.answer
            self._finish(
                b'"choices":[{"index":0,"text":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b,'
                b'"prompt_token_ids":null,"token_ids":null}]'
                % (text, _encode(answer.finish_reason), _encode(answer.stop_reason))
            )
        else:
            self._write(
                b'%b%b,"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,'
                b'"token_ids":null}]%b}\n\n' % (self._choice, text, self._usage_at(index))
            )


@lru_cache(maxsize=8192)
def _json_text(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _respond_json(connection: Connection, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
    connection.respond(status, _encode(value))


def _random_id() -> str:
    return uuid.uuid4().hex[:16]


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id") or _random_id()


def _http_error(status: HTTPStatus) -> ApiError:
    return ApiError(status.phrase, status=status, type=status.phrase)


BodyT = TypeVar("BodyT", bound=BaseModel)


def _read(kind: type[BodyT], request: Request) -> BodyT:
    """The request's body; ApiError in the words of FastAPI's validation, as vLLM shortens them."""
    try:
        value = json.loads(request.body)
    except json.JSONDecodeError as error:
        problem = {
            "type": "json_invalid",
            "loc": f"body.{error.pos}",
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": error.msg},
        }
        raise _body_errors([problem]) from error
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _body_errors(
            [
                {
                    "type": each["type"],
                    "loc": ".".join(("body", *(str(part) for part in each["loc"] if _is_field(part)))),
                    "msg": each["msg"],
                    "input": _summary(each["input"]),
                }
                for each in error.errors()
            ]
        ) from error


def _is_field(part: int | str) -> bool:
    """Whether a part of pydantic's location is the caller's, and not a branch of a union."""
    return isinstance(part, int) or (part not in ("str", "int", "float", "bool") and "[" not in part)


def _missing(name: str, request: Request) -> ApiError:
    given = _summary(json.loads(request.body))
    return _body_errors([{"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": given}])


def _validation_error(message: str, parameter: str) -> ApiError:
    """What a validator of vLLM's request model says; FastAPI wraps it."""
    error = _body_errors(
        [
            {
                "type": "value_error",
                "loc": "body",
                "msg": f"Value error, {message} (parameter={parameter})",
                "input": "<dict>",
            }
        ]
    )
    error.body["error"]["param"] = parameter
    return error


def _body_errors(problems: list[dict[str, Any]]) -> ApiError:
    count = f"{len(problems)} validation {'error' if len(problems) == 1 else 'errors'}"
    message = "".join([f"{count}:\n", *(f"  {problem}\n" for problem in problems)]).rstrip()
    return ApiError(message, type="Bad Request", param=str(problems[0]["loc"]))


def _summary(value: Any) -> Any:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else text[:200] + "...[truncated]"


def _flattened(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their text parts joined, as vLLM hands them to templates of the format "string"."""
    return [
        message | {"content": _content_text(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _content_text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _last_user_text(messages: list[dict[str, Any]]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user":
            return _content_text(message.get("content"))
    return ""
