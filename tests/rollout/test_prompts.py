from __future__ import annotations

import random
import re

import pytest

from rollout.prompts import FEWEST_WORDS, calibrate


def words_of_six(text: str) -> int:
    return 3 + len(re.findall(r" ?\w{1,6}", text))


def bytes_each(text: str) -> int:
    return 1 + len(text.encode())


def test_prompts_have_exactly_the_planned_tokens() -> None:
    vocabulary = calibrate(words_of_six)
    assert vocabulary.exact
    assert vocabulary.overhead_tokens == 3
    for tokens in (4, 5, 100, 1024):
        assert words_of_six(vocabulary.prompt(tokens, random.Random(tokens))) == tokens


def test_words_of_several_tokens_are_left_out() -> None:
    vocabulary = calibrate(words_of_six)
    assert "through" not in vocabulary.words
    assert len(vocabulary.words) >= FEWEST_WORDS


def test_calibration_counts_seldom() -> None:
    counted = []
    calibrate(lambda text: counted.append(text) or words_of_six(text))  # type: ignore[func-returns-value]
    assert len(counted) < 60


def test_a_tokenizer_of_bytes_is_approximated_and_says_so() -> None:
    vocabulary = calibrate(bytes_each)
    assert not vocabulary.exact
    assert bytes_each(vocabulary.prompt(1000, random.Random(0))) == pytest.approx(1000, rel=0.05)


def test_prompts_differ_from_the_first_word_on_unless_they_share_a_prefix() -> None:
    vocabulary = calibrate(words_of_six)
    prompts = [vocabulary.prompt(40, random.Random(n)) for n in range(50)]
    assert len({prompt[:60] for prompt in prompts}) == 50
    prefix = vocabulary.prefix(20, random.Random(1))
    shared = [vocabulary.prompt(40, random.Random(n), prefix_words=prefix) for n in range(50)]
    assert len(set(shared)) == 50
    assert len({" ".join(prompt.split()[:17]) for prompt in shared}) == 1


def test_the_shortest_prompt_is_one_word() -> None:
    assert calibrate(words_of_six).prompt(1, random.Random(0)).count(" ") == 0
