"""How much of a GPU's memory is left for the KV cache, computed as vLLM does: what fits, and what it says if not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox.engine.weights import Checkpoint, ConfigError, LoadError

GIB = 2**30

ACCELERATOR_BYTES: dict[str, int] = {
    "nvidia-tesla-t4": int(14.56 * GIB),
    "nvidia-l4": int(22.03 * GIB),
    "nvidia-tesla-a100": int(39.38 * GIB),
    "nvidia-a100-80gb": int(79.15 * GIB),
    "nvidia-rtx-pro-6000": int(94.97 * GIB),
    "nvidia-h100-80gb": int(79.19 * GIB),
    "nvidia-h100-mega-80gb": int(79.19 * GIB),
    "nvidia-h200-141gb": int(139.81 * GIB),
    "nvidia-b200": int(178.36 * GIB),
    "tpu-v5-lite-podslice": int(15.75 * GIB),
    "tpu-v6e-slice": int(31.25 * GIB),
}
"""Memory that CUDA (or JAX, of a TPU chip) reports, by GKE's accelerator name: less than on the box."""

DEFAULT_ACCELERATOR = "nvidia-h100-80gb"

CUDA_CONTEXT_BYTES = int(0.6 * GIB)
ACTIVATION_BYTES_PER_TOKEN_AND_WIDTH = 18
"""Peak of the profiling run per batched token and unit of hidden size, in bytes; 18: about 9 buffers in bf16."""

_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Bytes that one token needs in the KV cache of one GPU."""

    full_bytes: int
    """In layers with full attention."""
    sliding_bytes: int
    """In layers that keep a window only."""
    window_tokens: int

    def request_bytes(self, tokens: int) -> int:
        """What one request of `tokens` holds."""
        return self.full_bytes * tokens + self.sliding_bytes * min(tokens, self.window_tokens)

    def longest_request(self, available_bytes: int) -> int:
        """The most tokens of one request that fit."""
        window = (self.full_bytes + self.sliding_bytes) * self.window_tokens
        if available_bytes <= window or not self.full_bytes:
            return available_bytes // max(1, self.full_bytes + self.sliding_bytes)
        return self.window_tokens + (available_bytes - window) // self.full_bytes


def kv_layout(checkpoint: Checkpoint, tensor_parallel_size: int, kv_cache_dtype: str = "auto") -> KvLayout:
    """From the model's config: two vectors (key, value) per layer, KV head and head dimension."""
    config = checkpoint.text_config
    heads = int(config.get("num_attention_heads", 1))
    head_size = int(config.get("head_dim") or config.get("hidden_size", heads) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    layers = int(config.get("num_hidden_layers", 1))
    kinds: list[Any] = config.get("layer_types") or ["full_attention"] * layers
    element_bytes = 1 if kv_cache_dtype.startswith("fp8") else _element_bytes(config)
    full_layers = sum(kind == "full_attention" for kind in kinds)

    def layer_bytes(layer_kv_heads: int, layer_head_size: int) -> int:
        # A KV head is never split; with more GPUs than heads it is repeated.
        return 2 * max(1, layer_kv_heads // tensor_parallel_size) * layer_head_size * element_bytes

    # Gemma 4 gives its global layers heads of their own.
    full_kv_heads = int(config.get("num_global_key_value_heads") or kv_heads)
    full_head_size = int(config.get("global_head_dim") or head_size)
    return KvLayout(
        full_bytes=full_layers * layer_bytes(full_kv_heads, full_head_size),
        sliding_bytes=(len(kinds) - full_layers) * layer_bytes(kv_heads, head_size),
        window_tokens=int(config.get("sliding_window") or 0),
    )


def _element_bytes(config: dict[str, Any]) -> int:
    return _DTYPE_BYTES.get(str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), 2)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How one GPU's memory is divided."""

    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_concurrency: float
    """Requests of the maximal length that fit at once."""


def max_model_len(checkpoint: Checkpoint, requested: int | None, environment: Mapping[str, str]) -> int:
    """The context window. Raises ConfigError with vLLM's message when more is asked than the model was made for."""
    derived = int(checkpoint.text_config.get("max_position_embeddings") or 2048)
    if requested is None:
        return derived
    if requested > derived and environment.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
        raise ConfigError(
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            f"  Value error, User-specified max_model_len ({requested}) is greater than the derived max_model_len"
            f" (max_position_embeddings={float(derived)} or model_max_length=None in model's config.json). To allow"
            " overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
            " VLLM_ALLOW_LONG_MAX_MODEL_LEN must be used with extreme caution. If the model uses relative position"
            " encoding (RoPE), positions exceeding derived_max_model_len lead to nan. If the model uses absolute"
            " position encoding, positions exceeding derived_max_model_len will cause a CUDA array out-of-bounds"
            " error. [type=value_error, input_value=ArgsKwargs((), {'model': ...nderer_num_workers': 1}),"
            " input_type=ArgsKwargs]\n"
            "    For further information visit https://errors.pydantic.dev/2.14/v/value_error"
        )
    return requested


def plan_memory(
    checkpoint: Checkpoint,
    *,
    accelerator: str,
    tensor_parallel_size: int,
    gpu_memory_utilization: float,
    model_len: int,
    max_num_batched_tokens: int,
    kv_cache_dtype: str = "auto",
) -> MemoryPlan:
    """Divide one GPU's memory. Raises LoadError with CUDA's or vLLM's message when something does not fit."""
    total = ACCELERATOR_BYTES.get(accelerator)
    if total is None:
        raise LoadError(f"RuntimeError: Failed to infer device type: unknown accelerator '{accelerator}'")
    weights = checkpoint.weight_bytes // tensor_parallel_size
    if weights + CUDA_CONTEXT_BYTES > total:
        # Layer by layer until the next tensor does not fit any more.
        needed = 2**28
        allocated = total - CUDA_CONTEXT_BYTES - needed // 2
        raise LoadError(
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {needed / 2**20:.2f} MiB. GPU 0 has a total"
            f" capacity of {total / GIB:.2f} GiB of which {needed / 2 / 2**20:.2f} MiB is free. Including non-PyTorch"
            f" memory, this process has {(total - needed / 2) / GIB:.2f} GiB memory in use. Of the allocated memory"
            f" {allocated / GIB:.2f} GiB is allocated by PyTorch, and 0.00 GiB is reserved by PyTorch but unallocated."
            " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
            " to avoid fragmentation.  See documentation for Memory Management "
            " (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
        )
    hidden = int(checkpoint.text_config.get("hidden_size", 1))
    activations = max_num_batched_tokens * hidden * ACTIVATION_BYTES_PER_TOKEN_AND_WIDTH
    available = int(total * gpu_memory_utilization) - weights - activations - CUDA_CONTEXT_BYTES
    if available <= 0:
        raise LoadError(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when"
            " initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its"
            " name). See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    layout = kv_layout(checkpoint, tensor_parallel_size, kv_cache_dtype)
    needed = layout.request_bytes(model_len)
    if needed > available:
        raise LoadError(
            f"ValueError: To serve at least one request with the model's max seq len ({model_len}),"
            f" ({needed / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache memory"
            f" ({available / GIB:.2f} GiB). Based on the available memory, the estimated maximum model length is"
            f" {layout.longest_request(available)}. Try increasing `gpu_memory_utilization` (which also controls CPU"
            " memory on the CPU backend) or decreasing `max_model_len` when initializing the engine. See"
            " https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
        )
    concurrency = available / needed
    return MemoryPlan(weights, available, int(concurrency * model_len), concurrency)
