"""Prompts of an exact number of tokens, made of words that are one token each in the model's tokenizer.

Which words those are is found out once per model by counting (`calibrate`), with the server's own tokenizer or any
other: common English words, each with its leading blank, are single tokens in practically every vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rollout.errors import BadInput

_TEXT = """
the of and to in is that for was with as by at from his her it be are this have or had not but they which one you were
all she there would their we him been has when who will no more if out so said what up its about than into them can
only other new some could time these two may then do first any my now such like our over man me even most made after
also did many before must through back years where much your way well down should because each just those people too
how little state good very make world still own see men work long get here between both life being under never day
same another know while last might us great old year off come since against go came right used take three small end
large high place part hold water city house night side point white kind form best left room line hand door young light
"""
_WORDS = _TEXT.split()

FEWEST_WORDS = 32
"""With fewer single-token words, prompts would repeat themselves."""

TokenCounter = Callable[[str], int]
"""Tokens of a whole prompt, with what the server puts around it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What prompts are made of."""

    words: tuple[str, ...]
    overhead_tokens: int
    """Tokens around the words: the start token, the chat template."""
    tokens_per_word: float = 1.0
    """1 when counts are exact; another mean where the tokenizer has too few single-token words."""

    @property
    def exact(self) -> bool:
        return self.tokens_per_word == 1.0

    def prompt(self, tokens: int, source: random.Random, *, prefix_words: Sequence[str] = ()) -> str:
        """`tokens` tokens as the server counts them, beginning with `prefix_words` and random after them.

        At least one word: a prompt cannot be shorter than what surrounds it.
        """
        count = max(1, round((tokens - self.overhead_tokens) / self.tokens_per_word))
        shared = prefix_words[: count - 1]
        return " ".join([*shared, *source.choices(self.words, k=count - len(shared))])

    def prefix(self, tokens: int, source: random.Random) -> list[str]:
        """The first `tokens` tokens that a group of prompts shares."""
        return source.choices(self.words, k=max(0, round((tokens - self.overhead_tokens) / self.tokens_per_word)))


def calibrate(count: TokenCounter) -> Vocabulary:
    """Find the words that are one token each, and the tokens around them, with as few counts as possible.

    Raises BadInput if longer texts do not count more.
    """
    anchor = _WORDS[0]
    alone = count(anchor)

    def single(words: list[str]) -> list[str]:
        if count(" ".join([anchor, *words])) - alone == len(words):
            return words
        half = len(words) // 2
        return single(words[:half]) + single(words[half:]) if half else []

    words = single(_WORDS)
    if len(words) >= FEWEST_WORDS:
        return Vocabulary(words=tuple(words), overhead_tokens=alone - 1)
    both, once = " ".join(_WORDS + _WORDS), " ".join(_WORDS)
    tokens_per_word = (count(both) - count(once)) / len(_WORDS)
    if tokens_per_word <= 0:
        raise BadInput(
            f"the server counts {count(both)} tokens for a text and {count(once)} for half of it.",
            where="prompts",
            resolution="Prompts of exact lengths need a server that counts: see its /tokenize, or `usage`.",
        )
    return Vocabulary(
        words=tuple(_WORDS),
        overhead_tokens=max(0, round(count(once) - tokens_per_word * len(_WORDS))),
        tokens_per_word=tokens_per_word,
    )
