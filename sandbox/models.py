"""Models for rehearsals, tests and benchmarks: a real small one, stand-ins for large ones, tiny ones, broken ones.

`smollm2` holds real weights that answer. `synthetic_gemma4` and `tiny_model` hold seeded random bytes in the right
layout: they travel and are checked like real checkpoints, and cannot be served. The breakers damage a folder in place,
but never write into an existing file: a hub may serve a hard link to it.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np

from sandbox import smollm2 as _smollm2
from sandbox.checkpoint import INDEX_NAME, Tensor, write_json, write_safetensors, write_sharded

_SMOLLM2_VERSION = 1
"""Raise it when the conversion changes, so that cached checkpoints are made anew."""
_GEMMA4_VERSION = 2

Gemma4Size: TypeAlias = Literal["26b-a4b", "31b"]


def smollm2(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct: 269 MB in four bfloat16 shards with everything that vLLM needs.

    Made once per cache (about 10 s and a download of 93 MB), by one process at a time.
    """
    return _made_once(cache_dir / f"smollm2-135m-instruct-v{_SMOLLM2_VERSION}", _smollm2.build)


def synthetic_gemma4(cache_dir: Path, *, size: Gemma4Size, total_bytes: int, seed: int = 0) -> Path:
    """A checkpoint with the files, tensor names and proportions of google/gemma-4-26B-A4B-it or -31B-it.

    `config.json` states the real architecture; the tensors are flat and shrunken so that all of them together take
    `total_bytes` (even; ≥ 2 bytes per tensor), in two shards split where the real ones are (50 GB).
    """
    build = functools.partial(_build_gemma4, size=size, total_bytes=total_bytes, seed=seed)
    return _made_once(cache_dir / f"gemma-4-{size}-it-{total_bytes}-{seed}-v{_GEMMA4_VERSION}", build)


def tiny_model(
    folder: Path, *, shards: int = 2, seed: int = 0, config: Mapping[str, Any] = MappingProxyType({})
) -> Path:
    """A complete checkpoint of a few KB for LlamaForCausalLM. Returns `folder`.

    One shard is `model.safetensors` without an index, as transformers writes it; more have an index. `config` overrides
    what config.json says: the shape of a large model, whose tensors nobody loads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hidden, layers, vocabulary = 8, max(1, shards - 1), 260
    tensors = [
        _random_tensor("model.embed_tokens.weight", (vocabulary, hidden), (seed, 0)),
        *(
            _random_tensor(f"model.layers.{layer}.self_attn.q_proj.weight", (hidden, hidden), (seed, layer + 1))
            for layer in range(layers)
        ),
    ]
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
    else:  # The embedding alone in the first shard, and a layer in each of the others.
        write_sharded(folder, tensors, shard_bytes=tensors[-1].size_bytes)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
    }
    write_json(folder / "config.json", {**described, **config})
    write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258})
    _write_byte_tokenizer(folder, ["<bos>", "<eos>", "<pad>", "<unk>"])
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nA model of random numbers, for tests.\n")
    return folder


# Breakers


def shard_names(folder: Path) -> list[str]:
    """The shards that the index names, in order."""
    return sorted(set(json.loads((folder / INDEX_NAME).read_bytes())["weight_map"].values()))


def remove_shard(folder: Path, *, number: int = 1) -> str:
    """Delete a shard that the index still names. Returns its name."""
    name = shard_names(folder)[number - 1]
    (folder / name).unlink()
    return name


def truncate_shard(folder: Path, *, number: int = 1) -> str:
    """Cut off the last byte of a shard, as a broken download does. Returns its name."""
    name = shard_names(folder)[number - 1]
    _replace(folder / name, (folder / name).read_bytes()[:-1])
    return name


def add_original_folder(folder: Path) -> str:
    """Add weights in the authors' own format, as many repositories carry them. Returns the folder's name."""
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(bytes(1000))
    (folder / "original" / "params.json").write_text("{}")
    return "original"


def make_index_disagree(folder: Path) -> str:
    """Let the index place a tensor in a shard that does not hold it. Returns the tensor's name."""
    index = json.loads((folder / INDEX_NAME).read_bytes())
    names = shard_names(folder)
    tensor, shard = next(iter(sorted(index["weight_map"].items())))
    index["weight_map"][tensor] = next(name for name in names if name != shard)
    _replace(folder / INDEX_NAME, json.dumps(index).encode())
    return str(tensor)


# How they are made


def _made_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built in a temporary folder and renamed: it is whole or not there. One process builds at a time."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():
            return target
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            build(temporary)
            # mkdtemp makes it private; what is served should be readable like any other folder.
            temporary.chmod(0o755)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _random_tensor(name: str, shape: tuple[int, ...], seed: tuple[int, ...]) -> Tensor:
    def content() -> bytes:
        return np.random.Generator(np.random.SFC64(seed)).bytes(2 * int(np.prod(shape)))

    return Tensor(name, "BF16", shape, content)


def _write_byte_tokenizer(folder: Path, special: list[str]) -> None:
    """A byte-level BPE without merges: every text has tokens, and the files are the usual ones."""
    alphabet = _byte_level_alphabet()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(alphabet) + i, "content": token, **flags} for i, token in enumerate(special)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    write_json(folder / "tokenizer.json", tokenizer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}
    for token in special:
        name = token.strip("<>")
        if name in {"bos", "eos", "pad", "unk"}:
            config[f"{name}_token"] = token
    write_json(folder / "tokenizer_config.json", config)


def _byte_level_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2): printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


# Gemma 4. Values: the model cards and configuration_gemma4.py of transformers 5; sizes agree with the published
# 25.2 B and 30.7 B parameters (without the vision tower).

_GEMMA4_TEXT: dict[Gemma4Size, dict[str, Any]] = {
    "26b-a4b": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": 30,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    },
}

_GEMMA4_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10240,
    "rms_norm_eps": 1e-6,
    "standardize": True,
}

_GEMMA4_VOCABULARY = 262_144
_HEAD, _GLOBAL_HEAD = 256, 512
_REAL_SHARD_BYTES = 50 * 10**9
"""transformers 5 splits at 50 GB: both checkpoints have two files."""

_GITATTRIBUTES = """*.safetensors filter=lfs diff=lfs merge=lfs -text
*.bin filter=lfs diff=lfs merge=lfs -text
*.pth filter=lfs diff=lfs merge=lfs -text
tokenizer.json filter=lfs diff=lfs merge=lfs -text
"""

_GEMMA4_TEMPLATE = """{{ bos_token }}{% if enable_thinking | default(false) %}<|turn>system
<|think|><turn|>
{% endif %}{% for message in messages -%}
<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def _build_gemma4(folder: Path, *, size: Gemma4Size, total_bytes: int, seed: int) -> None:
    real = list(_gemma4_shapes(size))
    shard_bytes = int(_REAL_SHARD_BYTES * total_bytes / sum(2 * count for _, count in real))
    write_sharded(folder, _shrunken(real, total_bytes, seed), shard_bytes=shard_bytes)
    write_json(folder / "config.json", _gemma4_config(size))
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}
    ids = {"bos_token_id": 2, "eos_token_id": [1, 106, 50], "pad_token_id": 0}
    write_json(folder / "generation_config.json", {**ids, **sampling})
    image = {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 16, "pooling_kernel_size": 3}
    processor = {"processor_class": "Gemma4Processor", "image_processor": {**image, "max_soft_tokens": 280}}
    write_json(folder / "processor_config.json", processor)
    _write_byte_tokenizer(folder, ["<bos>", "<eos>", "<pad>", "<unk>", "<|turn>", "<turn|>", "<|image|>"])
    (folder / "chat_template.jinja").write_text(_GEMMA4_TEMPLATE)
    (folder / ".gitattributes").write_text(_GITATTRIBUTES)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"Random numbers in the layout of google/gemma-4-{'26B-A4B' if size == '26b-a4b' else '31B'}-it.\n"
    )


def _shrunken(real: list[tuple[str, int]], total_bytes: int, seed: int) -> list[Tensor]:
    """The same tensors, flat, with their share of `total_bytes`; the largest takes what rounding leaves over."""
    if total_bytes % 2 or total_bytes < 2 * len(real):
        raise ValueError(f"total_bytes must be even and at least {2 * len(real)}, two for each tensor")
    total = total_bytes // 2
    ratio = (total - len(real)) / sum(count for _, count in real)
    counts = {name: 1 + int(count * ratio) for name, count in real}
    largest = max(real, key=lambda entry: entry[1])[0]
    counts[largest] += total - sum(counts.values())
    return [_random_tensor(name, (count,), (seed, i)) for i, (name, count) in enumerate(counts.items())]


def _gemma4_config(size: Gemma4Size) -> dict[str, Any]:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    }
    text = {
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        **_GEMMA4_TEXT[size],
        "layer_types": _layer_types(size),
        "head_dim": _HEAD,
        "global_head_dim": _GLOBAL_HEAD,
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision",
        "vocab_size": _GEMMA4_VOCABULARY,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": _GEMMA4_VISION,
        "audio_config": None,
        "boi_token_id": 255_999,
        "eoi_token_id": 258_882,
        "image_token_id": 258_880,
        "video_token_id": 258_884,
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
    }


def _layer_types(size: Gemma4Size) -> list[str]:
    """Five sliding layers, then a full one."""
    layers = _GEMMA4_TEXT[size]["num_hidden_layers"]
    return ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]


def _gemma4_shapes(size: Gemma4Size) -> Iterator[tuple[str, int]]:
    """Every tensor of the real checkpoint and how many numbers it holds."""
    text = _GEMMA4_TEXT[size]
    hidden = text["hidden_size"]
    yield "model.language_model.embed_tokens.weight", _GEMMA4_VOCABULARY * hidden
    for layer, kind in enumerate(_layer_types(size)):
        for name, count in _gemma4_text_layer(text, full_attention=kind == "full_attention"):
            yield f"model.language_model.layers.{layer}.{name}", count
    yield "model.language_model.norm.weight", hidden
    width = _GEMMA4_VISION["hidden_size"]
    yield "model.vision_tower.patch_embedder.input_proj.weight", width * 3 * _GEMMA4_VISION["patch_size"] ** 2
    table = 2 * _GEMMA4_VISION["position_embedding_size"] * width
    yield "model.vision_tower.patch_embedder.position_embedding_table", table
    for layer in range(_GEMMA4_VISION["num_hidden_layers"]):
        for name, count in _gemma4_vision_layer():
            yield f"model.vision_tower.encoder.layers.{layer}.{name}", count
    yield "model.vision_tower.std_bias", width
    yield "model.vision_tower.std_scale", width
    yield "model.embed_vision.embedding_projection.weight", hidden * width


def _gemma4_text_layer(text: dict[str, Any], *, full_attention: bool) -> Iterator[tuple[str, int]]:
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    head = _GLOBAL_HEAD if full_attention else _HEAD
    keys = text["num_global_key_value_heads"] if full_attention else text["num_key_value_heads"]
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "self_attn.q_proj.weight", text["num_attention_heads"] * head * hidden
    yield "self_attn.k_proj.weight", keys * head * hidden
    if not full_attention:  # Full layers use their keys as values.
        yield "self_attn.v_proj.weight", keys * head * hidden
    yield "self_attn.o_proj.weight", text["num_attention_heads"] * head * hidden
    yield "self_attn.q_norm.weight", head
    yield "self_attn.k_norm.weight", head
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"mlp.{name}.weight", inner * hidden
    if text["enable_moe_block"]:
        experts, expert_inner = text["num_experts"], text["moe_intermediate_size"]
        yield "experts.gate_up_proj", experts * 2 * expert_inner * hidden
        yield "experts.down_proj", experts * expert_inner * hidden
        yield "router.proj.weight", experts * hidden
        yield "router.scale", hidden
        yield "router.per_expert_scale", experts
        norms += ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    for name in norms:
        yield f"{name}.weight", hidden
    yield "layer_scalar", 1


def _gemma4_vision_layer() -> Iterator[tuple[str, int]]:
    width, inner = _GEMMA4_VISION["hidden_size"], _GEMMA4_VISION["intermediate_size"]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"self_attn.{name}.linear.weight", width * width
    yield "self_attn.q_norm.weight", _GEMMA4_VISION["head_dim"]
    yield "self_attn.k_norm.weight", _GEMMA4_VISION["head_dim"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"mlp.{name}.linear.weight", width * inner
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{name}_layernorm.weight", width
