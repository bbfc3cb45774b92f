"""From a request to the tokens that it will get: the whole answer is planned before the first step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

from sandbox.engine import text as canned
from sandbox.engine.tokens import Tokenizer

THINKING_MARKERS = {"gemma4": ("<|channel>thought\n", "<channel|>")}
DEFAULT_THINKING_MARKERS = ("<think>\n", "\n</think>\n\n")
"""What the model writes around its reasoning; a reasoning parser takes it out of the answer."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One string per generated token; control tokens that a parser or the detokenizer swallows are empty."""

    tokens: Sequence[str]
    reasoning_tokens: int = 0
    """How many of the leading tokens belong to the reasoning."""
    finish_reason: str = "stop"
    stop_reason: str | None = None
    tool_call: ToolCall | None = None

    @property
    def reasoning(self) -> str | None:
        return "".join(self.tokens[: self.reasoning_tokens]) if self.reasoning_tokens else None

    @property
    def content(self) -> str:
        return "".join(self.tokens[self.reasoning_tokens :])


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an answer may and must be."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False


class Writer:
    """Plans answers in the model's own tokens."""

    def __init__(self, tokenizer: Tokenizer, *, model_type: str, separates_reasoning: bool) -> None:
        self._tokenizer = tokenizer
        self._markers = next(
            (markers for name, markers in THINKING_MARKERS.items() if model_type.startswith(name)),
            DEFAULT_THINKING_MARKERS,
        )
        self._separates_reasoning = separates_reasoning
        self._pieces = lru_cache(maxsize=64)(lambda text: tuple(tokenizer.pieces(text)))

    def plain(self, question: str, limits: Limits, *, thinks: bool, skip_special_tokens: bool) -> Answer:
        """The natural answer to `question`, with reasoning before it when the model thinks."""
        content = list(self._pieces(canned.answer_for(question)))
        if not thinks:
            return self._limited(Answer(content), limits)
        reasoning = list(self._pieces(canned.reasoning_for(question)))
        if self._separates_reasoning:
            tokens = ["", *reasoning, ""]
            return self._limited(Answer(tokens + content, reasoning_tokens=len(tokens)), limits)
        # Nobody takes the thoughts out: they are part of the content, with their markers unless these are skipped.
        opening, closing = self._markers
        if skip_special_tokens:
            opening, closing = opening.rpartition(">")[2], ""
        return self._limited(Answer([opening, *reasoning, closing, *content]), limits)

    def fixed(self, content: str, limits: Limits) -> Answer:
        """An answer whose text is prescribed (structured output): it ends where it must, whatever `ignore_eos` says."""
        tokens = self._tokenizer.pieces(content)
        return self._limited(Answer(tokens), replace(limits, ignore_eos=False, min_tokens=0))

    def tool_call(self, name: str, arguments: Any, limits: Limits) -> Answer:
        """A call of a tool; its tokens are those of the arguments."""
        text = json.dumps(arguments, ensure_ascii=False)
        answer = self.fixed(text, limits)
        if answer.finish_reason == "length":
            return answer
        return replace(answer, tool_call=ToolCall(name, text), finish_reason="tool_calls")

    def completion(self, prompt: str, limits: Limits) -> Answer:
        """A continuation of raw text."""
        return self._limited(Answer(self._pieces(" " + canned.answer_for(prompt))), limits)

    def _limited(self, answer: Answer, limits: Limits) -> Answer:
        """Apply stop strings, minimum and maximum; a natural end costs one token more, the end-of-sequence token."""
        tokens = list(answer.tokens)
        stopped = self._stopped(tokens, answer.reasoning_tokens, limits)
        if stopped is not None:
            tokens, stop = stopped
            answer = replace(answer, stop_reason=stop)
        else:
            wanted = limits.max_tokens if limits.ignore_eos else limits.min_tokens - 1
            if len(tokens) < wanted:
                tokens += islice(cycle(self._pieces(canned.FILLER)), wanted - len(tokens))
            if not limits.ignore_eos:
                tokens.append("")
        if len(tokens) > limits.max_tokens or (limits.ignore_eos and stopped is None):
            answer = replace(answer, finish_reason="length", stop_reason=None)
        tokens = tokens[: limits.max_tokens]
        return replace(answer, tokens=tokens, reasoning_tokens=min(answer.reasoning_tokens, len(tokens)))

    def _stopped(self, tokens: list[str], start: int, limits: Limits) -> tuple[list[str], str] | None:
        """The tokens up to the first stop string after `limits.min_tokens`, and the string; None without one."""
        if not limits.stop:
            return None
        text = ""
        for index, token in enumerate(tokens[start:], start=start):
            before = len(text)
            text += token
            if index + 1 <= limits.min_tokens:
                continue
            found = [(at, stop) for stop in limits.stop if (at := text.find(stop, max(0, before - len(stop)))) >= 0]
            if found:
                at, stop = min(found)
                kept = text[: at + len(stop)] if limits.include_stop else text[:at]
                # The text of a stop string that began in earlier tokens was held back, so it can still be cut.
                return _cut(tokens[: index + 1], start, len(kept)), stop
        return None


def _cut(tokens: list[str], start: int, length: int) -> list[str]:
    """Shorten the text after `start` to `length` characters, keeping the number of tokens."""
    result = tokens[:start]
    for token in tokens[start:]:
        result.append(token[:length])
        length -= len(result[-1])
    return result
