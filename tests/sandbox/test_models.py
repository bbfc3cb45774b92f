"""The rehearsal's models: whole, in the layout that vLLM reads, deterministic; and broken where they should be."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from sandbox import models
from sandbox.checkpoint import INDEX_NAME, Tensor, bfloat16, write_safetensors
from sandbox.hub_store import HubStore

CACHE = Path(__file__).parents[2] / "out" / "cache" / "models"
"""Shared by all runs in this checkout: the wheel is downloaded once."""


def tensors_by_shard(folder: Path) -> dict[str, set[str]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            found[path.name] = set(shard.keys())
    return found


def assert_index_agrees(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_bytes())
    stated: dict[str, set[str]] = {}
    for tensor, shard in index["weight_map"].items():
        stated.setdefault(shard, set()).add(tensor)
    assert stated == tensors_by_shard(folder)
    headers = sum(8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in stated)
    assert index["metadata"]["total_size"] + headers == sum((folder / name).stat().st_size for name in stated)


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-0.0, 0x8000),
        (1.0 + 2**-8, 0x3F80),  # A tie goes to the even neighbour below …
        (1.0 + 3 * 2**-8, 0x3F82),  # … or above.
        (1.0 + 2**-8 + 2**-20, 0x3F81),
        (3.4e38, 0x7F80),
        (math.inf, 0x7F80),
        (-math.inf, 0xFF80),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert bfloat16(np.array([value], np.float32))[0] == bits


def test_bfloat16_keeps_nan() -> None:
    worst = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan((bfloat16(worst).astype(np.uint32) << 16).view(np.float32)).all()


def test_the_container_is_what_the_reference_implementation_reads(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(tmp_path / "x.safetensors", [Tensor("a", "F32", (2, 3), values.tobytes)])
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as shard:
        assert shard.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(shard.get_tensor("a"), values)


def test_a_tensor_that_disagrees_with_its_shape_is_not_written_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has not the 8 bytes"):
        write_safetensors(tmp_path / "x.safetensors", [Tensor("a", "F32", (2,), lambda: b"1234")])


# SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return models.smollm2(CACHE)


def test_smollm2_is_bit_for_bit_what_transformers_reads_from_the_gguf(smollm2: Path) -> None:
    # All tensors were compared with `AutoModelForCausalLM.from_pretrained(gguf_file=…)` of transformers 5.23, cast to
    # bfloat16; these are the hashes of the files that passed.
    expected = {
        "model-00001-of-00004.safetensors": "a5f6d9974cae8e99d13d93ea75ec03d94678980b8cf164c66df1ca42a9e7255b",
        "model-00002-of-00004.safetensors": "1f9f4c7c7e61b311acb87b7c0667a2ba57b3b1f052fbbc6d02596d62815c0003",
        "model-00003-of-00004.safetensors": "4a96c37a047f36490a98a79e0a554393b3f08a541aee80d5be6850ac9dedb4c5",
        "model-00004-of-00004.safetensors": "ee48097d369259554f08d6aef3528f49d49fa4af79f95dcdddee95c1a2648306",
    }
    for name, sha256 in expected.items():
        with (smollm2 / name).open("rb") as stream:
            assert hashlib.file_digest(stream, "sha256").hexdigest() == sha256
    assert_index_agrees(smollm2)


def test_smollm2_has_every_file_that_serving_needs_and_nothing_else(smollm2: Path) -> None:
    assert {path.name for path in smollm2.iterdir()} == {
        *(f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
    }


def test_smollm2_config_holds_the_originals_values(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_bytes())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected


def test_smollm2_tokenizer_knows_the_chat_tokens(smollm2: Path) -> None:
    tokenizer = json.loads((smollm2 / "tokenizer.json").read_bytes())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert (special["<|endoftext|>"], special["<|im_start|>"], special["<|im_end|>"]) == (0, 1, 2)
    assert (len(tokenizer["model"]["vocab"]), len(tokenizer["model"]["merges"])) == (49152, 48900)
    assert "<|im_start|>assistant" in (smollm2 / "chat_template.jinja").read_text()


def test_smollm2_is_made_once(smollm2: Path) -> None:
    made = (smollm2 / "config.json").stat().st_mtime_ns
    assert models.smollm2(CACHE) == smollm2
    assert (smollm2 / "config.json").stat().st_mtime_ns == made


# Gemma 4


@pytest.mark.parametrize(("size", "billions"), [("26b-a4b", 25.2), ("31b", 30.7)])
def test_gemma4_has_the_real_files_and_as_many_parameters_as_published(
    tmp_path: Path, size: models.Gemma4Size, billions: float
) -> None:
    folder = models.synthetic_gemma4(tmp_path, size=size, total_bytes=4 * 2**20)
    assert {path.name for path in folder.iterdir()} == {
        *(".gitattributes", "README.md", "chat_template.jinja", "config.json", "generation_config.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert_index_agrees(folder)
    assert json.loads((folder / INDEX_NAME).read_bytes())["metadata"]["total_size"] == 4 * 2**20
    config = json.loads((folder / "config.json").read_bytes())
    assert config["architectures"] == ["Gemma4ForConditionalGeneration"]
    language = sum(count for name, count in models._gemma4_shapes(size) if "language_model" in name)
    assert round(language / 1e9, 1) == billions


def test_gemma4_follows_from_its_seed(tmp_path: Path) -> None:
    def shard(seed: int, where: str) -> bytes:
        folder = models.synthetic_gemma4(tmp_path / where, size="31b", total_bytes=2**20, seed=seed)
        return (folder / "model-00002-of-00002.safetensors").read_bytes()

    assert shard(1, "a") == shard(1, "b") != shard(2, "a")


def test_gemma4_refuses_a_size_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="total_bytes must be even"):
        models.synthetic_gemma4(tmp_path, size="31b", total_bytes=2**20 + 1)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


# Tiny and broken ones


@pytest.mark.parametrize("shards", [2, 5])
def test_a_tiny_model_is_whole(tmp_path: Path, shards: int) -> None:
    folder = models.tiny_model(tmp_path, shards=shards)
    assert len(models.shard_names(folder)) == shards
    assert_index_agrees(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000


def test_a_tiny_model_of_one_shard_has_no_index(tmp_path: Path) -> None:
    folder = models.tiny_model(tmp_path, shards=1)
    assert list(tensors_by_shard(folder)) == ["model.safetensors"]
    assert not (folder / INDEX_NAME).exists()


@pytest.mark.parametrize(
    "break_it", [models.remove_shard, models.truncate_shard, models.make_index_disagree], ids=lambda f: f.__name__
)
def test_a_broken_model_is_broken_and_what_was_published_is_not(
    tmp_path: Path, break_it: Callable[[Path], str]
) -> None:
    folder = models.tiny_model(tmp_path / "model")
    store = HubStore(tmp_path / "hub")
    sha = store.publish("acme/tiny", folder)
    break_it(folder)
    with pytest.raises((AssertionError, SafetensorError)):
        assert_index_agrees(folder)
    repository = store.repository("acme/tiny")
    assert repository is not None
    commit = repository.resolve(sha)
    assert commit is not None
    for file in commit.files:
        assert repository.blob(file).stat().st_size == file.size_bytes
    assert store.publish("acme/tiny", folder) != sha


def test_a_foreign_folder_is_added(tmp_path: Path) -> None:
    folder = models.tiny_model(tmp_path)
    assert (folder / models.add_original_folder(folder) / "params.json").is_file()
