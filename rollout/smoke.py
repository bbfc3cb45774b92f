"""What a model endpoint must be able to do: requests, and what their answers must look like.

Pure: requests are dictionaries, answers are what the server sent, a verdict is a list of problems (none: passed).
`rollout.clients.openai_api.run_smoke_suite` sends and collects. What a model cannot do, by its config and the serving
flags, is reported as not applicable, never as passed.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
import shlex
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from rollout.serving import ServingSpec
from rollout.values import Value

Json = Mapping[str, Any]

QUESTION = "Why is the sky blue?"
"""The tutorial's smoke request."""

THINKING_TOKENS = 2048
"""The tutorial's own answer took 1101 tokens, most of them reasoning."""

ANSWER_TOKENS = 256

_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>]{1,40}\|>|<\|(?:channel|turn|think)>|<(?:channel|turn|think)\|>|</?(?:start|end)_of_turn>|</?think>"
    r"|<(?:bos|eos|pad|unk)>|</?s>|\[/?INST\]|<unused\d+>|<tool_call>|<\|tool"
)
"""What chat templates of Gemma, Llama, Qwen, Mistral, DeepSeek and SmolLM put around turns and thoughts."""


class Outcome(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not-applicable"


class Capabilities(Value):
    """What the endpoint should be able to do."""

    chat: bool = True
    """The model has a chat template."""
    reasoning: bool = False
    """A reasoning parser separates thoughts from the answer."""
    tools: bool = False
    vision: bool = False
    max_images_per_prompt: Annotated[int, Field(ge=0)] | None = None
    """None: the server sets no limit of ours."""
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    structured_output: bool = True
    why_not: dict[str, str] = {}
    """Reason by capability that is missing, for the report."""

    @classmethod
    def of(cls, config: Json, serving: ServingSpec, *, has_chat_template: bool = True) -> Capabilities:
        """From the model's `config.json` and how it is served."""
        why_not = {}
        if not has_chat_template:
            why_not["chat"] = "the model has no chat template"
        if not serving.reasoning_parser:
            why_not["reasoning"] = "served without --reasoning-parser"
        if not serving.tool_call_parser:
            why_not["tools"] = "served without --enable-auto-tool-choice and --tool-call-parser"
        if not _sees_images(config):
            why_not["vision"] = "the model's config has no vision part"
        elif serving.max_images_per_prompt == 0:
            why_not["vision"] = "served with --limit_mm_per_prompt.image=0"
        chat = has_chat_template
        return cls(
            chat=chat,
            reasoning=chat and "reasoning" not in why_not,
            tools=chat and "tools" not in why_not,
            vision=chat and "vision" not in why_not,
            max_images_per_prompt=serving.max_images_per_prompt,
            max_model_len=serving.max_model_len or _context_window(config),
            structured_output=chat,
            why_not=why_not,
        )

    def missing(self, capability: str) -> str | None:
        """Why a capability is missing; None if it is there."""
        if getattr(self, capability):
            return None
        if not self.chat and capability != "chat":
            return self.why_not.get("chat", "the model has no chat template")
        return self.why_not.get(capability, f"{capability} is not among this endpoint's capabilities")


def _sees_images(config: Json) -> bool:
    return any(config.get(key) for key in ("vision_config", "vision_tower", "mm_vision_tower", "visual"))


def _context_window(config: Json) -> int | None:
    text = config.get("text_config") or config
    window = text.get("max_position_embeddings")
    return int(window) if window else None


class SmokeResult(Value):
    """One check's verdict."""

    name: str
    outcome: Outcome
    latency_s: float | None = None
    """Of the check's first request."""
    detail: str = ""
    """What was seen, or what is wrong."""
    curl: str = ""
    """Repeats the check's first request."""


class SmokeReport(Value):
    """All checks in order."""

    base_url: str
    """Which the curl lines name."""
    reach_with: str = ""
    """The command that makes `base_url` reachable, e.g. a port-forward; empty if it is anyway."""
    model: str
    results: tuple[SmokeResult, ...]
    canary_answers: dict[str, str] = {}
    """What the canary prompts were answered: the expectations of the next rollout, if this one is good."""

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.outcome is not Outcome.FAILED for result in self.results)

    @property
    def passed_checks(self) -> frozenset[str]:
        return frozenset(result.name for result in self.results if result.outcome is Outcome.PASSED)

    @property
    def failures(self) -> tuple[SmokeResult, ...]:
        return tuple(result for result in self.results if result.outcome is Outcome.FAILED)

    def summary(self) -> str:
        counts = {outcome: sum(result.outcome is outcome for result in self.results) for outcome in Outcome}
        head = ", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count)
        return "; ".join([head, *(f"{result.name}: {result.detail}" for result in self.failures)])

    def table(self) -> list[dict[str, str]]:
        """Rows for a table artifact."""
        return [
            {
                "check": result.name,
                "verdict": result.outcome.value,
                "latency": "" if result.latency_s is None else f"{result.latency_s * 1e3:.0f} ms",
                "detail": result.detail,
                "repeat with": result.curl,
            }
            for result in self.results
        ]


@dataclass(frozen=True, slots=True)
class SmokeCheck:
    """A check's name, what it shows, and the capability that it needs."""

    name: str
    shows: str
    needs: str | None = None


CHECKS: tuple[SmokeCheck, ...] = (
    SmokeCheck("health", "the server says that it is healthy"),
    SmokeCheck("models", "the served model's name and context window are as planned"),
    SmokeCheck("chat", "the tutorial's question is answered, field by field", "chat"),
    SmokeCheck("reasoning", "thoughts are separated from the answer", "reasoning"),
    SmokeCheck("streaming", "a streamed answer has the parts of a whole one", "chat"),
    SmokeCheck("tools", "a tool is called with valid arguments, and its result used", "tools"),
    SmokeCheck("image", "an image is looked at", "vision"),
    SmokeCheck("image-limit", "one image too many is refused", "vision"),
    SmokeCheck("structured-output", "an answer follows a JSON schema", "structured_output"),
    SmokeCheck("long-context", "a prompt that nearly fills the context window is answered"),
    SmokeCheck("bad-request", "a wrong request is refused with a message"),
    SmokeCheck("concurrency", "several answers stream at once", "chat"),
    SmokeCheck("canary", "answers are those of the last good rollout", "chat"),
)
"""In order: from reachable to sensible."""

CHECK_NAMES = tuple(check.name for check in CHECKS)


def chat_request(
    model: str, content: str | list[dict[str, Any]], *, max_tokens: int = ANSWER_TOKENS, **fields: Any
) -> dict[str, Any]:
    """A greedy chat request with one user message."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        **fields,
    }


def sky_request(model: str, capabilities: Capabilities, *, thinking: bool) -> dict[str, Any]:
    """The tutorial's request; bounded, so that a small or lost model does not fill its context window."""
    wanted = THINKING_TOKENS if thinking else ANSWER_TOKENS
    longest = max(16, (capabilities.max_model_len or 8192) // 2)
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "chat_template_kwargs": {"enable_thinking": thinking},
        "skip_special_tokens": False,
        "max_tokens": min(wanted, longest),
    }


def chat_problems(answer: Any, *, model: str) -> list[str]:
    """What is wrong with a chat completion, field by field."""
    if not isinstance(answer, Mapping):
        return ["the answer is not a JSON object"]
    problems = []
    if answer.get("object") != "chat.completion":
        problems.append(f"object is {answer.get('object')!r}, not 'chat.completion'")
    if not str(answer.get("id") or ""):
        problems.append("the id is empty")
    if answer.get("model") != model:
        problems.append(f"model is {answer.get('model')!r}, not {model!r}")
    choices = answer.get("choices")
    if not isinstance(choices, Sequence) or len(choices) != 1:
        return [*problems, f"there are {len(choices) if isinstance(choices, Sequence) else 'no'} choices, not 1"]
    message = choices[0].get("message") or {}
    if message.get("role") != "assistant":
        problems.append(f"the role is {message.get('role')!r}, not 'assistant'")
    finish = choices[0].get("finish_reason")
    if finish not in ("stop", "length", "tool_calls"):
        problems.append(f"the finish reason is {finish!r}")
    texts = [str(message.get(key) or "") for key in ("content", "reasoning", "reasoning_content")]
    if not any(text.strip() for text in texts) and not message.get("tool_calls"):
        problems.append("the answer is empty")
    leaked = sorted({token for text in texts for token in _CONTROL_TOKEN.findall(text)})
    if leaked:
        problems.append(f"control tokens leaked into the answer: {' '.join(leaked)}")
    return problems + usage_problems(answer.get("usage"))


def usage_problems(usage: Any) -> list[str]:
    if not isinstance(usage, Mapping):
        return ["usage is missing"]
    prompt, answer, total = (usage.get(f"{kind}_tokens") for kind in ("prompt", "completion", "total"))
    if not all(isinstance(count, int) for count in (prompt, answer, total)):
        return [f"usage is incomplete: {dict(usage)}"]
    assert isinstance(prompt, int)
    assert isinstance(answer, int)
    if prompt < 1 or answer < 1:
        return [f"usage counts {prompt} prompt and {answer} answer tokens"]
    return [] if prompt + answer == total else [f"usage does not add up: {prompt} + {answer} is not {total}"]


def message_of(answer: Any) -> Json:
    """The first choice's message; empty if there is none."""
    try:
        return answer["choices"][0]["message"] or {}
    except (KeyError, IndexError, TypeError):
        return {}


def reasoning_of(message: Json) -> str:
    """`reasoning`; older versions of vLLM call it `reasoning_content`."""
    return str(message.get("reasoning") or message.get("reasoning_content") or "")


def reasoning_problems(answer: Any, *, model: str) -> list[str]:
    message = message_of(answer)
    problems = chat_problems(answer, model=model)
    if not reasoning_of(message).strip():
        problems.append("no reasoning was separated although thinking was asked for: check --reasoning-parser")
    cut_short = finish_reason(answer) == "length"
    if not str(message.get("content") or "").strip() and not cut_short:
        problems.append("there is reasoning but no answer")
    return problems


def finish_reason(answer: Any) -> str | None:
    try:
        reason = answer["choices"][0]["finish_reason"]
    except (KeyError, IndexError, TypeError):
        return None
    return None if reason is None else str(reason)


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """A stream put together."""

    content: str
    reasoning: str
    finish_reason: str | None
    roles: tuple[str, ...]
    models: frozenset[str]
    ids: frozenset[str]
    usage: Json | None
    pieces: int
    ended: bool
    """Whether `[DONE]` came."""


def assemble_stream(events: Sequence[str]) -> StreamedAnswer:
    """Put the `data:` payloads of a stream together. ValueError if one is neither JSON nor `[DONE]`."""
    content, reasoning, roles, finish, usage = "", "", [], None, None
    models, ids, pieces = set(), set(), 0
    for event in events:
        if event == "[DONE]":
            continue
        chunk = json.loads(event)
        if "error" in chunk:
            raise ValueError(f"the stream reports an error: {chunk['error']}")
        models.add(str(chunk.get("model")))
        ids.add(str(chunk.get("id")))
        usage = chunk.get("usage") or usage
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            if delta.get("role"):
                roles.append(str(delta["role"]))
            content += delta.get("content") or ""
            reasoning += reasoning_of(delta)
            pieces += bool(delta.get("content") or reasoning_of(delta))
            finish = choice.get("finish_reason") or finish
    return StreamedAnswer(
        content,
        reasoning,
        finish,
        tuple(roles),
        frozenset(models),
        frozenset(ids),
        usage,
        pieces,
        bool(events) and events[-1] == "[DONE]",
    )


def stream_problems(streamed: StreamedAnswer, whole: Any, *, model: str) -> list[str]:
    """Compare a streamed answer with the whole answer to the same request, in shape.

    Not word for word: batching may change the last bits of a logit, and with them a greedy answer.
    """
    problems = []
    if not streamed.ended:
        problems.append("the stream does not end with [DONE]")
    if streamed.roles[:1] != ("assistant",):
        problems.append("the stream does not begin with the assistant's role")
    if streamed.models != {model} or len(streamed.ids) != 1:
        problems.append(f"id or model change within the stream: {sorted(streamed.models)}")
    message = message_of(whole)
    for name, text, expected in (
        ("content", streamed.content, str(message.get("content") or "")),
        ("reasoning", streamed.reasoning, reasoning_of(message)),
    ):
        if bool(text.strip()) != bool(expected.strip()):
            where = "whole answer" if expected.strip() else "stream"
            problems.append(f"only the {where} has {name}")
    if streamed.finish_reason != finish_reason(whole):
        problems.append(f"the stream ends with {streamed.finish_reason!r}, the answer with {finish_reason(whole)!r}")
    if streamed.pieces < 2 and (usage := streamed.usage) and usage.get("completion_tokens", 0) > 8:
        problems.append("the whole answer came in one piece: something in between buffers streams")
    return problems + usage_problems(streamed.usage)


WEATHER_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
TOOL_RESULT = '{"temperature_celsius": 21, "sky": "clear"}'
TOOL_RESULT_MARK = "21"
"""What an answer that uses the result must contain."""


def tool_request(model: str) -> dict[str, Any]:
    return chat_request(
        model,
        "What is the weather in Paris right now? Use the tool.",
        max_tokens=512,
        tools=[WEATHER_TOOL],
        tool_choice="auto",
    )


def tool_call_problems(answer: Any) -> list[str]:
    calls = message_of(answer).get("tool_calls") or []
    if not calls:
        text = str(message_of(answer).get("content") or "")[:80]
        return [f"no tool was called; the answer was {text!r}: check --tool-call-parser and the chat template"]
    function = calls[0].get("function") or {}
    problems = []
    if function.get("name") != "get_weather":
        problems.append(f"the tool {function.get('name')!r} was called, not 'get_weather'")
    try:
        arguments = json.loads(function.get("arguments") or "")
    except ValueError:
        return [*problems, f"the arguments are not JSON: {str(function.get('arguments'))[:80]!r}"]
    if not isinstance(arguments, Mapping) or not isinstance(arguments.get("city"), str):
        problems.append(f"the arguments do not name a city: {arguments!r}")
    if finish_reason(answer) != "tool_calls":
        problems.append(f"the finish reason is {finish_reason(answer)!r}, not 'tool_calls'")
    return problems


def tool_result_request(model: str, first: dict[str, Any], answer: Any) -> dict[str, Any]:
    """The second turn: the call and its result."""
    calls = message_of(answer)["tool_calls"]
    messages = [
        *first["messages"],
        {"role": "assistant", "content": message_of(answer).get("content") or "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0].get("id"), "name": "get_weather", "content": TOOL_RESULT},
    ]
    return {**first, "messages": messages}


def tool_result_problems(answer: Any, *, model: str) -> list[str]:
    problems = chat_problems(answer, model=model)
    content = str(message_of(answer).get("content") or "")
    if TOOL_RESULT_MARK not in content:
        problems.append(f"the answer does not use the tool's result: {content[:80]!r}")
    return problems


def image_request(model: str, images: int = 1) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": red_square()}}
    return chat_request(model, [{"type": "text", "text": "Which colour is this?"}, *[picture] * images], max_tokens=64)


def red_square(side: int = 64) -> str:
    """A red PNG as a data: URI; 64 pixels a side: above the smallest patch of every vision tower we know."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\xff\0\0" * side) * side)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"blue": {"type": "boolean"}, "cause": {"enum": ["scattering", "reflection", "absorption"]}},
    "required": ["blue", "cause"],
    "additionalProperties": False,
}
"""Without free text: a small model must be able to finish it."""


def structured_request(model: str) -> dict[str, Any]:
    response_format = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA}}
    return chat_request(model, QUESTION, response_format=response_format, max_tokens=128)


def structured_problems(answer: Any, *, model: str) -> list[str]:
    problems = chat_problems(answer, model=model)
    content = str(message_of(answer).get("content") or "")
    try:
        value = json.loads(content)
    except ValueError:
        return [*problems, f"the answer is not JSON: {content[:80]!r}"]
    allowed = SCHEMA["properties"]["cause"]["enum"]
    fits = (
        isinstance(value, dict)
        and value.keys() == {"blue", "cause"}
        and isinstance(value["blue"], bool)
        and value["cause"] in allowed
    )
    return problems if fits else [*problems, f"the answer does not follow the schema: {content[:80]!r}"]


def refusal_problems(status: int, answer: Any, *, expected: Sequence[int]) -> list[str]:
    """An error must have the right status and say why."""
    if status not in expected:
        return [f"answered with {status}, not {' or '.join(map(str, expected))}"]
    return [] if error_message(answer) else ["the refusal does not say why"]


def image_limit_problems(status: int, answer: Any, *, limit: int) -> list[str]:
    """One image too many must be refused, and for that: the message speaks of images and names the limit."""
    problems = refusal_problems(status, answer, expected=(400, 422))
    message = error_message(answer)
    if problems or ("image" in message.lower() and re.search(rf"\b{limit}\b", message)):
        return problems
    return [f"refused, but not for the number of images: {message[:120]}"]


def prompt_tokens(answer: Any) -> int:
    """As the server counts them. ValueError if it does not say."""
    try:
        return int(answer["usage"]["prompt_tokens"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError("it has no usage.prompt_tokens") from error


def error_message(answer: Any) -> str:
    """The message of an OpenAI-style error; empty if there is none."""
    if not isinstance(answer, Mapping):
        return ""
    error = answer.get("error")
    source = error if isinstance(error, Mapping) else answer
    return str(source.get("message") or source.get("detail") or "")


class CanaryPrompt(Value):
    """A prompt whose answer is compared from one revision to the next."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    prompt: str
    must_contain: str | None = None
    """Case-insensitive; holds for every sane model."""
    expected: str | None = None
    """The last good rollout's answer; None: nothing to compare with yet."""
    min_similarity: Annotated[float, Field(ge=0, le=1)] = 0.6
    """1 asks for the exact answer. 0.6: another batch size changes words, another model changes sentences."""
    max_tokens: Annotated[int, Field(ge=1)] = 96


CANARIES: tuple[CanaryPrompt, ...] = (
    CanaryPrompt(name="sky", prompt=QUESTION, must_contain="scatter"),
    CanaryPrompt(name="arithmetic", prompt="What is 17 + 25? Answer with the number only.", max_tokens=16),
    CanaryPrompt(name="capital", prompt="What is the capital of France? Answer with one word.", max_tokens=16),
    CanaryPrompt(name="order", prompt="Sort these words alphabetically: pear, apple, fig.", max_tokens=48),
    CanaryPrompt(name="translation", prompt="Translate to German: The book is on the table.", max_tokens=32),
    CanaryPrompt(name="code", prompt="Write a Python function that reverses a string.", max_tokens=96),
)


def with_expectations(canaries: Sequence[CanaryPrompt], answers: Mapping[str, str]) -> tuple[CanaryPrompt, ...]:
    """The canaries with the stored answers of the last good rollout."""
    return tuple(
        canary.model_copy(update={"expected": answers[canary.name]}) if canary.name in answers else canary
        for canary in canaries
    )


def canary_request(model: str, canary: CanaryPrompt) -> dict[str, Any]:
    return chat_request(model, canary.prompt, max_tokens=canary.max_tokens, seed=0)


def canary_problems(canary: CanaryPrompt, answer: str) -> list[str]:
    problems = []
    if canary.must_contain and canary.must_contain.lower() not in answer.lower():
        problems.append(f"{canary.name}: {canary.must_contain!r} is missing from {answer[:80]!r}")
    if canary.expected is not None:
        similarity = text_similarity(canary.expected, answer)
        if similarity < canary.min_similarity:
            problems.append(
                f"{canary.name}: only {similarity:.0%} like the last good answer"
                f" ({answer[:60]!r} instead of {canary.expected[:60]!r})"
            )
    return problems


def text_similarity(one: str, other: str) -> float:
    """0 to 1 by matching words in order; 1 for equal texts."""
    if one == other:
        return 1.0
    return difflib.SequenceMatcher(None, one.lower().split(), other.lower().split(), autojunk=False).ratio()


def curl_line(base_url: str, path: str, body: Any = None) -> str:
    """A command that repeats a request."""
    url = shlex.quote(f"{base_url}{path}")
    if body is None:
        return f"curl -sS {url}"
    data = shlex.quote(body if isinstance(body, str) else json.dumps(body, ensure_ascii=False))
    return f"curl -sS {url} -H 'Content-Type: application/json' -d {data}"
