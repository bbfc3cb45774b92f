"""Which files of a repository are transferred."""

from __future__ import annotations

import pytest

from rollout.errors import CheckpointInvalid
from rollout.selection import select_files

BASE = ["config.json", "model.safetensors"]


def selected(*more: str, **patterns: list[str]) -> set[str]:
    return set(select_files([*BASE, *more], **patterns).selected) - set(BASE)


def test_everything_that_vllm_needs_is_taken() -> None:
    needed = {
        "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "special_tokens_map.json",
        "chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json", "merges.txt",
        "vocab.json", "model.safetensors.index.json", "quantize_config.json", "additional_chat_templates/tools.jinja",
        "modeling_own.py", "LICENSE",
    }  # fmt: skip
    assert selected(*needed) == needed


@pytest.mark.parametrize(
    "name",
    [
        "README.md", ".gitattributes", "logo.png", "original/consolidated.00.pth", "original/params.json",
        "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.pt",
        "consolidated.safetensors", "model.fp16.safetensors", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack",
        "flax_model.msgpack.index.json", "model-q4.gguf", "trainer_state.json", "figures/bench.json",
    ],
)  # fmt: skip
def test_duplicates_and_what_a_server_does_not_read_are_left(name: str) -> None:
    assert selected(name) == set()
    assert name in select_files([*BASE, name]).excluded


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "model.pt"], {"model.safetensors"}),
        (["pytorch_model.bin", "model.pt"], {"pytorch_model.bin"}),
        (["consolidated.00.pth"], {"consolidated.00.pth"}),
        (["consolidated.safetensors"], {"consolidated.safetensors"}),
        (["model.fp16.safetensors"], {"model.fp16.safetensors"}),
    ],
)
def test_the_best_format_that_is_there_is_taken(there: list[str], taken: set[str]) -> None:
    assert set(select_files(["config.json", *there]).selected) - {"config.json"} == taken


def test_patterns_add_and_remove_and_removal_wins() -> None:
    assert selected("original/params.json", include=["original/*"]) == {"original/params.json"}
    assert selected("own.py", exclude=["*.py"]) == set()
    assert selected("original/params.json", include=["original/*"], exclude=["original/*"]) == set()


@pytest.mark.parametrize(
    "name",
    [
        "../config.json", "a/../../b.json", "/etc/passwd", "a//b.json", "./config.json", "C:\\x.json", "a\\b.json",
        "config.json\n", "con\u202efig.json", "con\u200bfig.json", "", "x" * 901, ".llm-rollout/ready.json",
        "x/.LLM-rollout/transfer/a.bin",
        ".LLM-Rollout/ready.json",
    ],
)  # fmt: skip
def test_a_name_that_no_honest_repository_has_stops_everything(name: str) -> None:
    with pytest.raises(CheckpointInvalid, match="Do not trust"):
        select_files([*BASE, name])


def test_lookalikes_of_selected_names_are_refused_and_can_be_excluded() -> None:
    cyrillic = "\u0441onfig.json"
    with pytest.raises(CheckpointInvalid, match=r"\\u0441onfig"):
        select_files([*BASE, cyrillic])
    assert selected(cyrillic, exclude=[cyrillic]) == set()
    with pytest.raises(CheckpointInvalid, match="differ only in case"):
        select_files([*BASE, "Config.json"])


@pytest.mark.parametrize(
    ("paths", "message"), [(["config.json"], "no weights"), (["model.safetensors"], "config.json is")]
)
def test_a_repository_that_vllm_could_not_load_is_refused(paths: list[str], message: str) -> None:
    with pytest.raises(CheckpointInvalid, match=message):
        select_files(paths)
