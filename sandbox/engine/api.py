"""vLLM's HTTP routes: what they accept, what they refuse and in which words (as recorded from vLLM 0.32).

Simulated: `/health`, `/ping`, `/version`, `/v1/models`, `/tokenize`, `/detokenize`, `/v1/completions`,
`/v1/chat/completions` (streaming, reasoning, tools, JSON schema, images, stop strings, usage) and `/metrics`.
What vLLM knows and this does not (log probabilities, several choices, beam search, regular expressions and
grammars) is refused with 501: an answer that ignored it would look like a broken model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from time import time
from typing import Any

from rollout.vllm_flags import VLLM_VERSION
from sandbox.engine.answers import Answer, Limits, Writer
from sandbox.engine.args import ServeArguments
from sandbox.engine.bodies import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    NamedToolChoice,
    Sampling,
    TokenizeBody,
    Tool,
    bad_request,
    invalid,
    missing,
    not_simulated,
    read_body,
)
from sandbox.engine.core import Engine, EngineRequest, Sink
from sandbox.engine.http import Connection, Request
from sandbox.engine.latency import Sequence
from sandbox.engine.replies import (
    ChatStream,
    ChatWhole,
    CompletionStream,
    CompletionWhole,
    Reply,
    random_id,
    respond_json,
)
from sandbox.engine.text import json_answer, value_for
from sandbox.engine.tokens import ChatTemplate, ChatTemplateError, Tokenizer

DEFAULT_IMAGE_TOKENS = 256
"""Gemma's soft tokens per image, where the config does not say."""


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
            respond_json(connection, error.body, status, headers=error.headers)
        self._log(
            f'INFO:     {connection.peer} - "{request.method} {request.path} HTTP/1.1" {int(status)} {status.phrase}'
        )

    def _route(self, request: Request) -> Callable[[Request, Connection], None]:
        methods = self._routes.get(request.path)
        if methods is None:
            raise ApiError(HTTPStatus.NOT_FOUND, {"detail": "Not Found"})
        if request.method not in methods:
            allowed = (("allow", ", ".join(methods)),)
            raise ApiError(HTTPStatus.METHOD_NOT_ALLOWED, {"detail": "Method Not Allowed"}, allowed)
        keys = self._model.arguments.api_keys
        if keys and request.path.startswith("/v1"):
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or token not in keys:
                raise ApiError(HTTPStatus.UNAUTHORIZED, {"error": "Unauthorized"})
        return methods[request.method]

    def _health(self, _: Request, connection: Connection) -> None:
        connection.respond(HTTPStatus.OK, b"", content_type=None)

    def _version(self, _: Request, connection: Connection) -> None:
        respond_json(connection, {"version": VLLM_VERSION})

    def _metrics(self, _: Request, connection: Connection) -> None:
        body = self._engine.metrics.render().encode()
        connection.respond(HTTPStatus.OK, body, content_type="text/plain; version=1.0.0; charset=utf-8")

    def _models(self, _: Request, connection: Connection) -> None:
        model = self._model
        permission = {
            "id": f"modelperm-{random_id()}",
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
        respond_json(connection, {"object": "list", "data": cards})

    def _tokenize(self, request: Request, connection: Connection) -> None:
        body = read_body(TokenizeBody, request)
        self._check_model(body.model)
        if body.messages is not None:
            ids = self._model.tokenizer.encode(self._render(body.messages, None, {}))
        elif body.prompt is not None:
            ids = self._model.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            raise missing(request, "prompt", "messages")
        answer = {"count": len(ids), "max_model_len": self._model.max_model_len, "tokens": ids, "token_strs": None}
        if body.return_token_strs:
            raise not_simulated("return_token_strs")
        respond_json(connection, answer)

    def _detokenize(self, request: Request, connection: Connection) -> None:
        body = read_body(DetokenizeBody, request)
        self._check_model(body.model)
        try:
            text = self._model.tokenizer.decode(body.tokens)
        except NotImplementedError as error:
            raise not_simulated("detokenize without a tokenizer.json") from error
        respond_json(connection, {"prompt": text})

    def _completions(self, request: Request, connection: Connection) -> None:
        body = read_body(CompletionBody, request)
        self._check_model(body.model)
        self._check_sampling(body)
        if body.logprobs is not None:
            raise not_simulated("logprobs")
        if not body.prompt:
            raise invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        text, ids = self._completion_prompt(body)
        limits = self._limits(body, len(ids), body.max_tokens, "max_tokens", is_tokenized=not text)
        answer = self._structured(body, None, text, limits) or self._writer.completion(text, limits)
        reply = Reply(f"cmpl-{_request_id(request)}", self._model.name, connection, answer, len(ids), body)
        sink = CompletionStream(reply) if body.stream else CompletionWhole(reply)
        self._submit(request, reply, sink, ids, limits)

    def _completion_prompt(self, body: CompletionBody) -> tuple[str, list[int]]:
        prompt = body.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise not_simulated("several prompts in one request")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt, self._model.tokenizer.encode(prompt, add_special_tokens=True)
        return "", [int(each) for each in prompt or ()]  # type: ignore[arg-type]

    def _chat(self, request: Request, connection: Connection) -> None:
        body = read_body(ChatBody, request)
        self._check_model(body.model)
        self._check_sampling(body)
        if body.logprobs:
            raise not_simulated("logprobs")
        if not body.include_reasoning:
            raise not_simulated("include_reasoning")
        if not body.messages:
            raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
        tools = self._tools(body)
        images = self._check_images(body.messages)
        options = self._model.arguments.default_chat_template_kwargs | (body.chat_template_kwargs or {})
        rendered_tools = [tool.model_dump() for tool in body.tools or []] or None
        ids = self._model.tokenizer.encode(self._render(body.messages, rendered_tools, options))
        ids += [0] * (images * self._model.image_tokens)
        requested, parameter = body.max_tokens, "max_tokens"
        if body.max_completion_tokens is not None:
            requested, parameter = body.max_completion_tokens, "max_completion_tokens"
        limits = self._limits(body, len(ids), requested, parameter, is_tokenized=False)
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
        reply = Reply(f"chatcmpl-{_request_id(request)}", self._model.name, connection, answer, len(ids), body)
        sink = ChatStream(reply) if body.stream else ChatWhole(reply)
        self._submit(request, reply, sink, ids, limits)

    def _submit(self, request: Request, reply: Reply, sink: Sink, ids: list[int], limits: Limits) -> None:
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
            raise bad_request(
                f"The model `{name}` does not exist. Valid aliases: {', '.join(names)}.",
                status=HTTPStatus.NOT_FOUND,
                kind="NotFoundError",
                param="model",
            )

    def _check_sampling(self, body: Sampling) -> None:
        if body.unsimulated:
            raise not_simulated(body.unsimulated[0])
        if body.stream_options is not None and not body.stream:
            raise invalid("Stream options can only be defined when `stream=True`.", "stream_options")
        if body.temperature is not None and body.temperature < 0:
            raise invalid(f"temperature must be non-negative, got {body.temperature}.", "temperature", body.temperature)
        if body.top_p is not None and not 0 < body.top_p <= 1:
            raise invalid(f"top_p must be in (0, 1], got {body.top_p}.", "top_p", body.top_p)
        if body.min_tokens < 0:
            raise bad_request(f"min_tokens must be greater than or equal to 0, got {body.min_tokens}.")

    def _limits(
        self, body: Sampling, prompt_tokens: int, requested: int | None, parameter: str, *, is_tokenized: bool
    ) -> Limits:
        longest = self._model.max_model_len
        if requested is not None and requested > longest:
            raise invalid(
                f"{parameter}={requested} cannot be greater than max_model_len={longest}. Please request fewer output"
                " tokens.",
                parameter,
                requested,
            )
        if prompt_tokens > longest:
            # Text is only tokenized up to one token past the limit, so its real length stays unknown.
            known = prompt_tokens if is_tokenized else longest + 1
            raise invalid(
                f"This model's maximum context length is {longest} tokens. However, your prompt contains"
                f" {'' if is_tokenized else 'at least '}{known} input tokens, which exceeds this limit even without"
                " any output tokens. Please reduce the length of the input prompt.",
                "input_tokens",
                known,
            )
        # What does not fit beside the prompt is cut off without a word.
        max_tokens = min(requested if requested is not None else longest, longest - prompt_tokens)
        if max_tokens < 1:
            raise invalid(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
        if body.min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {body.min_tokens}."
            )
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return Limits(max_tokens, body.min_tokens, body.ignore_eos, stop, body.include_stop_str_in_output)

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> str:
        try:
            return self._model.template.render(_flattened(messages), tools, **options)
        except ChatTemplateError as error:
            raise bad_request(str(error)) from error

    def _check_images(self, messages: list[dict[str, Any]]) -> int:
        """How many images the messages hold. ApiError where the model or the limit does not allow them."""
        images = 0
        for message in messages:
            for part in message.get("content") or [] if isinstance(message.get("content"), list) else []:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "image_url":
                    if not self._model.is_multimodal:
                        raise bad_request(f"{self._model.name} is not a multimodal model")
                    images += 1
                elif kind != "text":
                    raise not_simulated(f"content of type {kind!r}")
        limit = self._model.arguments.limit_mm_per_prompt.get("image", 999)
        limit = limit.get("count", 999) if isinstance(limit, dict) else int(limit)
        if images > limit:
            raise bad_request(
                f"At most {limit} image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase this"
                " limit. (parameter=image)",
                param="image",
            )
        return images

    def _tools(self, body: ChatBody) -> list[Tool]:
        """The tools that the model may call."""
        if body.tools is not None and not body.tools:
            raise invalid(
                "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely.",
                "tools",
            )
        choice = body.tool_choice or ("auto" if body.tools else "none")
        if choice != "none" and not body.tools:
            raise invalid("When using `tool_choice`, `tools` must be set.", "tool_choice")
        if choice == "auto" and not self._model.arguments.tools_enabled:
            raise bad_request('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        if choice == "none":
            return []
        tools = body.tools or []
        if isinstance(choice, NamedToolChoice):
            tools = [tool for tool in tools if tool.function.get("name") == choice.function.name]
            if not tools:
                raise invalid(
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
        answer = self._writer.tool_call(str(function.get("name")), arguments, limits)
        if answer.tool_call is not None and isinstance(body.tool_choice, NamedToolChoice):
            answer = replace(answer, finish_reason="stop")  # as vLLM ends the call of a tool that was named
        return answer

    def _structured(
        self, body: Sampling, response_format: dict[str, Any] | None, question: str, limits: Limits
    ) -> Answer | None:
        """The answer that a JSON schema or a choice prescribes; None without one."""
        constraints = dict(body.structured_outputs or {})
        kind = (response_format or {}).get("type", "text")
        if kind == "json_schema":
            if "json_schema" not in (response_format or {}):
                raise invalid(
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


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id") or random_id()


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
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return "" if content is None else str(content)


def _last_user_text(messages: list[dict[str, Any]]) -> str:
    for message in reversed(messages):
        if message.get("role") == "user":
            return _content_text(message.get("content"))
    return ""
