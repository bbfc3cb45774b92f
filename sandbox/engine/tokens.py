"""Tokens and chat templates of a checkpoint: exact where it brings its own, a plain stand-in where it does not.

With `tokenizer.json` the counts are the model's own (the `tokenizers` library, as vLLM uses it). Without one, words
of up to six characters count as a token each. A real vLLM would refuse to start without a tokenizer; checkpoints made
for tests rarely have one.
"""

from __future__ import annotations

import datetime
import json
import re
import zlib
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.sandbox

SIMPLE_VOCABULARY = 32_000
_SIMPLE_TOKEN = re.compile(r" ?[^\W_]{1,6}|\s+|.", re.DOTALL)


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; on demand with the tokens that the model wants around a prompt (such as BOS)."""

    def decode(self, ids: list[int]) -> str: ...

    def pieces(self, text: str) -> list[str]:
        """One string per token; joined they are `text`. A token inside a character is empty."""


class SimpleTokenizer:
    """Words in pieces of up to six characters. Decoding is impossible: ids are hashes."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [zlib.crc32(piece.encode()) % SIMPLE_VOCABULARY for piece in _SIMPLE_TOKEN.findall(text)]

    def decode(self, ids: list[int]) -> str:
        raise NotImplementedError("this checkpoint has no tokenizer.json, and hashed ids cannot be decoded")

    def pieces(self, text: str) -> list[str]:
        return _SIMPLE_TOKEN.findall(text)


class ModelTokenizer:
    """The checkpoint's own `tokenizer.json`."""

    def __init__(self, tokenizer_json: bytes) -> None:
        # Only checkpoints with a tokenizer pay for the import.
        from tokenizers import Tokenizer as FastTokenizer

        self._tokenizer = FastTokenizer.from_str(tokenizer_json.decode())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def pieces(self, text: str) -> list[str]:
        pieces: list[str] = []
        done = 0
        for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets:
            pieces.append(text[done : max(done, end)])
            done = max(done, end)
        if pieces and done < len(text):
            pieces[-1] += text[done:]
        return pieces


class ChatTemplateError(ValueError):
    """The template refuses the messages, or there is none."""


class ChatTemplate:
    """A model's Jinja template, rendered in the sandbox that transformers uses."""

    def __init__(self, source: str | None, special_tokens: dict[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._template = _environment().from_string(source) if source else None

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any) -> str:
        """The prompt for `messages`, ending where the model's answer begins. Raises ChatTemplateError."""
        if self._template is None:
            # Not vLLM's behaviour: it refuses chat without a template. Enough for checkpoints made for tests.
            return "".join(f"<|{each['role']}|>\n{each.get('content') or ''}\n" for each in messages)
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **self._special_tokens, **options
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(str(error)) from error


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
