"""The four forms of an answer: chat or completion, whole or streamed, field for field as vLLM 0.32 sends them."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Any

from rollout.vllm_flags import VLLM_VERSION
from sandbox.engine.answers import Answer
from sandbox.engine.bodies import Sampling
from sandbox.engine.http import Connection

FINGERPRINT = f"vllm-{VLLM_VERSION}-sandbox"


@dataclass(slots=True)
class Reply:
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


class ChatWhole:
    """A chat answer in one piece."""

    def __init__(self, reply: Reply) -> None:
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
            message["content"] = ""
            message["tool_calls"] = [{"id": f"chatcmpl-tool-{random_id()}", "type": "function", "function": function}]
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
        respond_json(reply.connection, whole)


class CompletionWhole:
    """A completion in one piece."""

    def __init__(self, reply: Reply) -> None:
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
        respond_json(reply.connection, whole)


class _Stream:
    """A stream of events; the parts that all its chunks share are encoded once."""

    object = ""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        head = {
            "id": reply.request_id,
            "object": self.object,
            "created": reply.created,
            "model": reply.model,
        }
        self._head = b"data: " + encode(head)[:-1] + b","
        self._tokens = reply.answer.tokens
        self._last = reply.last_index
        self._continuous = reply.wants_continuous_usage
        self._write = reply.connection.write_event

    def _finish(self, last_choice: bytes) -> None:
        """The last choice, the usage if asked for, and the end mark. The last of the chunks names the build."""
        reply = self._reply
        fingerprint = b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
        tokens = self._last + 1
        if reply.wants_usage:
            total = b',"usage":' + encode(reply.usage(tokens))
            self._write(self._head + last_choice + self._usage(tokens) + b"}\n\n")
            self._write(self._head + b'"choices":[]' + total + fingerprint + b"}\n\n")
        else:
            self._write(self._head + last_choice + fingerprint + b"}\n\n")
        self._write(b"data: [DONE]\n\n")
        reply.connection.end_stream()

    def _usage(self, completion_tokens: int) -> bytes:
        """The usage so far as another field of a chunk, where the client wants it in every one."""
        if not self._continuous:
            return b""
        return b',"usage":' + encode(self._reply.usage(completion_tokens) | {"completion_tokens_details": None})


class ChatStream(_Stream):
    """A chat answer as chunks: the role first, then one chunk per token that has text."""

    object = "chat.completion.chunk"

    def __init__(self, reply: Reply) -> None:
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
                % (self._delta(index), encode(answer.finish_reason), encode(answer.stop_reason))
            )
        elif self._tokens[index]:
            self._write(
                b'%b%b,"logprobs":null,"finish_reason":null,"token_ids":null}]%b}\n\n'
                % (self._choice, self._delta(index), self._usage(index + 1))
            )

    def _start(self) -> None:
        self._reply.connection.start_stream()
        role = b'{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        self._write(b'%b%b,"prompt_token_ids":null,"prompt_text":null%b}\n\n' % (self._choice, role, self._usage(0)))
        call = self._reply.answer.tool_call
        if call is not None:
            function = {"name": call.name}
            opening = [{"id": f"chatcmpl-tool-{random_id()}", "type": "function", "index": 0, "function": function}]
            delta = encode({"content": None, "tool_calls": opening})
            self._write(b'%b%b,"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n' % (self._choice, delta))

    def _delta(self, index: int) -> bytes:
        text = _json_text(self._tokens[index])
        if self._reply.answer.tool_call is not None:
            if index == self._last:  # the end-of-sequence token
                return b"{}"
            return b'{"content":null,"tool_calls":[{"index":0,"function":{"arguments":%b}}]}' % text
        return b'{"reasoning":%b}' % text if index < self._reasoning_tokens else b'{"content":%b}' % text


class CompletionStream(_Stream):
    """A completion as chunks."""

    object = "text_completion"

    def __init__(self, reply: Reply) -> None:
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
                % (text, encode(answer.finish_reason), encode(answer.stop_reason))
            )
        else:
            self._write(
                b'%b%b,"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,'
                b'"token_ids":null}]%b}\n\n' % (self._choice, text, self._usage(index + 1))
            )


@lru_cache(maxsize=8192)
def _json_text(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def respond_json(
    connection: Connection,
    value: Any,
    status: HTTPStatus = HTTPStatus.OK,
    *,
    headers: tuple[tuple[str, str], ...] = (),
) -> None:
    connection.respond(status, encode(value), headers=headers)


def random_id() -> str:
    return uuid.uuid4().hex[:16]
