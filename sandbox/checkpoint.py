"""Sharded safetensors checkpoints, written without torch.

The container (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
that gives dtype, shape and offsets of each tensor, then the tensors' bytes in the same order. The `safetensors`
package has no bfloat16 for numpy, and wants all tensors of a file in memory; this writes one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

INDEX_NAME = "model.safetensors.index.json"

_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is made when it is written, so that memory holds one at a time."""

    name: str
    dtype: str
    """As safetensors calls it: BF16, F16, F32."""
    shape: tuple[int, ...]
    content: Callable[[], bytes | memoryview]

    @property
    def size_bytes(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count * _DTYPE_BYTES[self.dtype]


def bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 (nearest, ties to even), as its 16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    # Rounding could carry a NaN's payload into the sign: keep the upper half and set a quiet bit.
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def write_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Write one file, with the metadata that transformers expects of a PyTorch checkpoint."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Trailing spaces align the tensors to 8 bytes, as the reference implementation does.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)))
        stream.write(encoded)
        for tensor in tensors:
            content = tensor.content()
            if memoryview(content).nbytes != tensor.size_bytes:
                raise ValueError(f"{tensor.name} has not the {tensor.size_bytes} bytes that its shape states")
            stream.write(content)


def write_sharded(folder: Path, tensors: Iterable[Tensor], *, shard_bytes: int) -> None:
    """Write `model-0000i-of-0000n.safetensors` of at most `shard_bytes` of tensors each, and their index.

    A tensor larger than `shard_bytes` gets a shard of its own.
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.size_bytes for shard in shards for tensor in shard)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
