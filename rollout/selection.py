"""Which files of a repository are transferred: everything that vLLM needs, once, and nothing else.

vLLM reads `*.safetensors` before `*.bin` before `*.pt` (its `model_loader/default_loader.py`), and from a
bucket it loads *every* `*.safetensors` below the model path, so that a copy in `original/` is loaded as a second model.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from rollout.errors import CheckpointInvalid

RESERVED_FOLDER = ".llm-rollout/"
"""Where the transfer keeps its own objects below a model path."""

MAX_NAME_BYTES = 900
"""Cloud Storage allows 1024 bytes of UTF-8 per object name, of which the prefix `<repo>/<commit>/` takes up to 138."""

_WEIGHT_FORMATS: tuple[tuple[str, ...], ...] = (
    ("*.safetensors",),
    ("pytorch_model*.bin", "model*.bin"),
    ("*.pt", "*.pth"),
)
"""In vLLM's order of preference; the first that the root holds is transferred, the others are duplicates of it."""

_WEIGHTS = tuple(pattern for formats in _WEIGHT_FORMATS for pattern in formats)

_WEIGHT_INDEXES = (("*.safetensors.index.json",), ("*.bin.index.json",), ())
"""The index that belongs to each of the formats."""

_KEPT = (
    "*.json",  # config, generation_config, tokenizer, processor and preprocessor configs, quantisation, chat_template
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",  # SentencePiece
    "*.spm",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "tokenizer*",
    "*.py",  # the repository's own modelling code, which vLLM runs only with --trust-remote-code
    "1_Pooling/config.json",  # sentence-transformers' pooling of embedding models
    "LICENSE*",  # most licences ask that a copy travels with the weights
    "NOTICE*",
    "USE_POLICY*",
)

_DROPPED = (
    "*.index.json",  # of whichever format was not chosen
    "trainer_state.json",
    "all_results.json",
    "*eval_results.json",
    "train_results.json",
    "*README*",
    "tokenizer*.md",
)

_VARIANT = re.compile(r"^(?P<stem>.+?)\.(?:fp16|fp32|bf16|fp8|int8|ema)(?P<tail>(?:-\d+-of-\d+)?\.\w+)$")
"""diffusers' naming of the same weights in another precision: `model.fp16.safetensors`."""


class Selection(NamedTuple):
    """Paths to transfer and paths to leave, both sorted."""

    selected: tuple[str, ...]
    excluded: tuple[str, ...]


def select_files(paths: Iterable[str], *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Selection:
    """Choose from a repository's paths.

    Args:
        paths: every file of the repository.
        include: shell patterns of further files to take, e.g. `original/params.json`; `*` also matches `/`.
        exclude: shell patterns of files to leave; wins over everything else.

    Raises:
        CheckpointInvalid: a name that no honest repository has, no weights, or no `config.json`.
    """
    names = sorted(set(paths))
    for name in names:
        refuse_unsafe_name(name)
    chosen = _default_choice(names) | {name for name in names if _matches(name, include)}
    selected = tuple(name for name in names if name in chosen and not _matches(name, exclude))
    _refuse_lookalikes(selected)
    _require_checkpoint(selected)
    return Selection(selected, tuple(name for name in names if name not in set(selected)))


def refuse_unsafe_name(name: str) -> None:
    """Stop at a name that would escape its folder, hide what it is, or that Cloud Storage could not hold.

    Raises:
        CheckpointInvalid: with the reason.
    """
    reason = _unsafe(name)
    if reason:
        raise CheckpointInvalid(
            f"the repository lists a file named {name!a}, which {reason}.",
            resolution="Do not trust this repository; look at its history on the hub.",
        )


def _unsafe(name: str) -> str | None:
    segments = name.split("/")
    if not name or "" in segments:
        return "is absolute or has an empty path segment"
    if "." in segments or ".." in segments:
        return "leaves its folder"
    if "\\" in name or re.match(r"^[A-Za-z]:", name):
        return "is a path on Windows"
    if any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co") for character in name):
        return "holds control or invisible characters"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if RESERVED_FOLDER.rstrip("/") in [segment.casefold() for segment in segments]:
        return f"lies in {RESERVED_FOLDER}, which is reserved for the transfer's own objects"
    return None


def belongs_to_a_model(name: str) -> bool:
    """Whether a file of that name, at the root or in a known folder, is one that a model server may look for."""
    return _matches_root(name, _KEPT + _WEIGHTS)


def _default_choice(names: Sequence[str]) -> set[str]:
    kept = {name for name in names if _matches_root(name, _KEPT) and not _matches_root(name, _DROPPED)}
    for formats, indexes in zip(_WEIGHT_FORMATS, _WEIGHT_INDEXES, strict=True):
        weights = {name for name in names if _matches_root(name, formats)}
        if weights:
            kept |= _without_duplicates(weights)
            kept |= _without_duplicates({name for name in names if _matches_root(name, indexes)})
            break
    return kept


def _without_duplicates(weights: set[str]) -> set[str]:
    """Drop the same weights under another name: other precisions, and Mistral's own format beside the common one."""
    plain = {name for name in weights if not _is_variant_of(name, weights)}
    common = {name for name in plain if not name.startswith("consolidated")}
    return common or plain


def _is_variant_of(name: str, weights: set[str]) -> bool:
    match = _VARIANT.match(name)
    if match is None:
        return False
    stem, suffix = match["stem"], match["tail"].rpartition(".")[2]
    return any(other.startswith(stem) and other.endswith(suffix) and not _VARIANT.match(other) for other in weights)


def _refuse_lookalikes(selected: Sequence[str]) -> None:
    """Two names that people or file systems take for one: other case, other composition, other alphabet."""
    seen: dict[str, str] = {}
    for name in selected:
        if not name.isascii():
            raise CheckpointInvalid(
                f"the file {name!a} has a name that can pass for another one (not plain ASCII).",
                resolution=f"Leave it out with the exclude pattern {name!a}, if it is not needed.",
            )
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise CheckpointInvalid(
                f"the files {other!r} and {name!r} differ only in case.",
                resolution="Leave one of them out with an exclude pattern.",
            )


def _require_checkpoint(selected: Sequence[str]) -> None:
    if not any(_matches_root(name, _WEIGHTS) for name in selected):
        raise CheckpointInvalid(
            "no weights that vLLM loads are at the repository's root (safetensors, bin or pt).",
            resolution="Name the repository of the model itself, not of its GGUF, ONNX or adapter conversion.",
        )
    if not {"config.json", "params.json"} & set(selected):
        raise CheckpointInvalid(
            "config.json is missing at the repository's root.",
            resolution="vLLM cannot load such a repository; choose another one or drop the exclude pattern.",
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _matches_root(name: str, patterns: Sequence[str]) -> bool:
    """Like a shell: `*` stays within one path segment."""
    depth = name.count("/")
    return any(pattern.count("/") == depth and fnmatchcase(name, pattern) for pattern in patterns)
