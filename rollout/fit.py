"""Does the model fit? Weights + KV cache + overhead against accelerator memory, and the cache against the boot disk.

The arithmetic is vLLM's own: it may use `gpu_memory_utilization` of each GPU; weights are divided by the
tensor-parallel size; what remains after activations is the KV cache, and the engine refuses to start when that holds
fewer than `max_model_len` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from rollout.accelerators import GIB, AcceleratorType
from rollout.preflight import Check, failed, not_applicable, ok, unknown, warning
from rollout.serving import ServingSpec, quantity_bytes
from rollout.target import NodePool
from rollout.values import Value

ACTIVATION_GIB = 4.0
"""Activations, CUDA graphs and the CUDA context of one GPU: what vLLM's profile run reports for 30B models at 8192
batched tokens is 2–4 GiB; the upper end."""

LARGE_GPU_BATCH, SMALL_GPU_BATCH, LARGE_GPU_GIB = 8192, 2048, 70.0
"""Defaults of `--max-num-batched-tokens` for the API server, by the GPU's memory (vLLM, `EngineArgs`)."""

BOOT_DISK_USABLE = 0.9
"""GKE keeps 10 % of a node's boot disk: of the default 100 GiB, 90 GiB are usable (quickstart, troubleshooting)."""

DEFAULT_BOOT_DISK_GIB = 100

_WITH_LOCAL_SSD = ("a3-highgpu", "a3-megagpu", "a3-ultragpu", "a2-ultragpu", "a4-highgpu")
"""Machine types that come with local SSDs, which GKE uses for ephemeral storage:
https://cloud.google.com/kubernetes-engine/docs/concepts/local-ssd"""

MEMORY_MOUNT = "/dev/shm"  # the emptyDir of deployment.yaml
SERVER_MEMORY_GIB = 16.0
"""What the server itself needs beside a copy of the weights in memory; as `rollout.optimize` reckons."""

FP8_FLAGS = ("--quantization=fp8", "--kv-cache-dtype=fp8")
"""vLLM's flags for weights and for a KV cache of one byte per value."""


class WeightsCopy(StrEnum):
    """Where a pod keeps a copy of the weights before vLLM reads them."""

    NONE = "none"
    """They are streamed from the bucket."""
    DISK = "disk"
    MEMORY = "memory"


class ModelShape(Value):
    """What of a model's config.json decides its KV cache."""

    full_attention_layers: int
    sliding_attention_layers: int = 0
    sliding_window: int = 0
    """Tokens that a sliding layer keeps per sequence."""
    kv_heads: int
    head_dim: int
    full_kv_heads: int
    """KV heads of the full-attention layers, where they differ (Gemma 4)."""
    full_head_dim: int
    shared_kv_layers: int = 0
    """Layers that reuse another layer's cache."""
    max_position_embeddings: int

    def kv_bytes(self, tokens: int, *, bytes_per_value: int = 2, gpus: int = 1, batched_tokens: int = 1) -> int:
        """KV cache of one sequence of `tokens` tokens on each of `gpus` GPUs, in bytes (2 bytes a value: bfloat16).

        KV heads are divided over the GPUs, but each GPU has one at least. A sliding layer keeps its window and what one
        step adds to it: a single token while answering, `batched_tokens` while the prompt is read (vLLM,
        `SlidingWindowSpec.max_memory_usage_bytes`).
        """
        window = min(tokens, max(0, self.sliding_window - 1) + batched_tokens)
        full = self.full_attention_layers * tokens * math.ceil(self.full_kv_heads / gpus) * self.full_head_dim
        sliding = self.sliding_attention_layers * window * math.ceil(self.kv_heads / gpus) * self.head_dim
        return 2 * bytes_per_value * (full + sliding)


class MemoryFit(Value):
    """Bytes on one GPU, and what follows."""

    usable_bytes: int
    weights_bytes: int
    activation_bytes: int
    kv_cache_bytes: int
    """What is left for the KV cache; negative when the weights alone do not fit."""
    bytes_per_full_context: int
    max_model_len: int
    full_contexts: float
    """How many sequences of the whole context window the cache holds."""
    bytes_to_start: int
    """What vLLM wants for one sequence of the whole context window whose prompt is read in large steps: with a smaller
    cache the engine refuses to start."""

    @property
    def starts(self) -> bool:
        return self.kv_cache_bytes >= self.bytes_to_start > 0

    def arithmetic(self) -> str:
        """The sum in words, in GiB per GPU."""

        def gib(count: int) -> str:
            return f"{count / GIB:.1f}"

        return (
            f"{gib(self.usable_bytes)} usable − {gib(self.weights_bytes)} weights"
            f" − {gib(self.activation_bytes)} activations = {gib(self.kv_cache_bytes)} GiB KV cache per GPU;"
            f" {self.full_contexts:.1f} × {self.max_model_len} tokens at {gib(self.bytes_per_full_context)} GiB"
        )


def model_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the KV-cache shape from a config.json (its `text_config` when there is one); None when it does not say."""
    text = config.get("text_config") or config
    try:
        layers = int(text["num_hidden_layers"])
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or text["hidden_size"] // heads)
        longest = int(text["max_position_embeddings"])
    except (KeyError, TypeError):
        return None
    kinds = text.get("layer_types") or ["full_attention"] * layers
    shared = int(text.get("num_kv_shared_layers") or 0)
    own = kinds[: len(kinds) - shared] if shared else kinds
    sliding = sum(kind == "sliding_attention" for kind in own)
    return ModelShape(
        full_attention_layers=sum(kind == "full_attention" for kind in own),
        sliding_attention_layers=sliding,
        sliding_window=int(text.get("sliding_window") or 0) if sliding else 0,
        kv_heads=kv_heads,
        head_dim=head_dim,
        full_kv_heads=int(text.get("num_global_key_value_heads") or kv_heads),
        full_head_dim=int(text.get("global_head_dim") or head_dim),
        shared_kv_layers=shared,
        max_position_embeddings=longest,
    )


def served_weights_bytes(weights_bytes: int, serving: ServingSpec) -> int:
    """Size of the weights in memory: `--quantization=fp8` halves a 16-bit checkpoint while it is loaded."""
    return weights_bytes // 2 if FP8_FLAGS[0] in serving.extra_args else weights_bytes


def kv_bytes_per_value(serving: ServingSpec) -> int:
    """2 for bfloat16, 1 with `--kv-cache-dtype=fp8`."""
    return 1 if FP8_FLAGS[1] in serving.extra_args else 2


def batched_tokens(serving: ServingSpec, accelerator: AcceleratorType) -> int:
    """Tokens that one step of the engine reads at most: `--max-num-batched-tokens`, or the API server's default."""
    for flag in serving.extra_args:
        name, _, value = flag.partition("=")
        if name == "--max-num-batched-tokens" and value.isdigit():
            return int(value)
    return LARGE_GPU_BATCH if accelerator.memory_gib >= LARGE_GPU_GIB else SMALL_GPU_BATCH


def memory_fit(weights_bytes: int, shape: ModelShape, serving: ServingSpec, accelerator: AcceleratorType) -> MemoryFit:
    """The memory of one GPU when the model is served as `serving` asks."""
    split = serving.tensor_parallel_size
    usable = int(accelerator.memory_gib * GIB * serving.gpu_memory_utilization)
    activation = int(ACTIVATION_GIB * GIB)
    weights = served_weights_bytes(weights_bytes, serving) // split
    cache = usable - weights - activation
    length = serving.max_model_len or shape.max_position_embeddings
    value = kv_bytes_per_value(serving)
    per_context = shape.kv_bytes(length, bytes_per_value=value, gpus=split)
    batched = batched_tokens(serving, accelerator)
    return MemoryFit(
        usable_bytes=usable,
        weights_bytes=weights,
        activation_bytes=activation,
        kv_cache_bytes=cache,
        bytes_per_full_context=per_context,
        max_model_len=length,
        full_contexts=max(0.0, cache / per_context) if per_context else 0.0,
        bytes_to_start=shape.kv_bytes(length, bytes_per_value=value, gpus=split, batched_tokens=batched),
    )


def check_memory(
    weights_bytes: int, config: Mapping[str, Any], serving: ServingSpec, accelerator: AcceleratorType
) -> Check:
    """The preflight check of accelerator memory."""
    name = "fits in GPU memory"
    shape = model_shape(config)
    if shape is None:
        return unknown(name, "config.json does not state layers, heads and context length")
    fit = memory_fit(weights_bytes, shape, serving, accelerator)
    if fit.kv_cache_bytes <= 0:
        needed = -(-weights_bytes // max(1, fit.usable_bytes - fit.activation_bytes))
        return failed(
            name,
            f"the weights do not fit: {fit.arithmetic()}",
            f"Set tensor_parallel_size and accelerator.count to {needed} or more, or take a larger accelerator.",
        )
    if not fit.starts:
        possible = int(fit.max_model_len * min(1.0, fit.kv_cache_bytes / fit.bytes_to_start))
        return failed(
            name,
            f"the KV cache does not hold one whole context ({fit.bytes_to_start / GIB:.1f} GiB while its prompt is"
            f" read): {fit.arithmetic()}",
            f"Lower max_model_len to {possible} or less, add --max-num-batched-tokens=2048 to serving.extra_args, or"
            " raise tensor_parallel_size and accelerator.count.",
        )
    if fit.full_contexts < 2:
        return warning(name, f"hardly any concurrency: {fit.arithmetic()}", "Lower max_model_len or add GPUs.")
    return ok(name, fit.arithmetic())


def check_context_window(config: Mapping[str, Any], serving: ServingSpec) -> Check:
    """The preflight check of `max_model_len` against the model's own limit: vLLM refuses to start above it."""
    name = "context window"
    shape = model_shape(config)
    if shape is None or serving.max_model_len is None:
        return not_applicable(name, "vLLM takes the model's own limit")
    longest = shape.max_position_embeddings
    if serving.max_model_len <= longest:
        return ok(name, f"{serving.max_model_len} of the model's {longest} tokens")
    return failed(
        name,
        f"max_model_len={serving.max_model_len}, but the model was made for {longest} tokens",
        f"Set max_model_len to {longest} or less.",
    )


def weights_copy(serving: ServingSpec, *, from_hub: bool) -> WeightsCopy:
    """Where the image keeps the weights: the hub's cache and the tutorial's entry point make a local copy."""
    if not (from_hub or serving.copies_weights):
        return WeightsCopy.NONE
    in_memory = serving.env.get(serving.cache_variable, "").startswith(MEMORY_MOUNT)
    return WeightsCopy.MEMORY if in_memory else WeightsCopy.DISK


def check_ephemeral_storage(
    weights_bytes: int,
    serving: ServingSpec,
    copy: WeightsCopy,
    *,
    boot_disk_gib: int | None = DEFAULT_BOOT_DISK_GIB,
) -> Check:
    """The 90 GiB trap: a local copy needs a disk and a limit, or memory, that hold it; else the pod is evicted.

    `boot_disk_gib` is the node's, None where it is not known: then only the pod's own limit counts.
    """
    name = "fits on the boot disk"
    size = f"{weights_bytes / GIB:.1f} GiB of weights"
    if copy is WeightsCopy.NONE:
        return not_applicable(name, "the weights are streamed, not copied to the node")
    if copy is WeightsCopy.MEMORY:
        return _check_memory_copy(name, size, weights_bytes, serving)
    limit = quantity_bytes(serving.resources.ephemeral_storage)
    usable = limit if boot_disk_gib is None else int(boot_disk_gib * GIB * BOOT_DISK_USABLE)
    if weights_bytes <= min(limit, usable):
        return ok(name, f"{size} on {usable / GIB:.0f} GiB usable, of which the pod may take {limit / GIB:.0f} GiB")
    which = "usable" if usable < limit else "that serving.resources.ephemeral_storage allows"
    disk_gib = int(weights_bytes / GIB / BOOT_DISK_USABLE) + 20
    return failed(
        name,
        f"{size} on {min(limit, usable) / GIB:.0f} GiB {which}: the pod would be evicted",
        f"Cache in memory: serving.env {serving.cache_variable}={MEMORY_MOUNT}/model with serving.resources.memory"
        f" {_memory_for(weights_bytes)}Gi; or on a larger disk: serving.accelerator.boot_disk_gib {disk_gib} (Standard:"
        f" target.cluster.node_pool.boot_disk_gib) with serving.resources.ephemeral_storage"
        f" {int(weights_bytes / GIB) + 10}Gi; or stream with vLLM's own image and serving.load_format runai_streamer.",
    )


def schedulable_gib(boot_disk_gib: float) -> float:
    """What pods may *request* of a boot disk: GKE reserves far more than the 10 % of which files keep clear.

    https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes: the eviction threshold (10 %) and
    min(50 %, 6 GiB + 35 %, 100 GiB) for the system; of 100 GiB 49 are left.
    """
    return 0.9 * boot_disk_gib - min(0.5 * boot_disk_gib, 6 + 0.35 * boot_disk_gib, 100.0)


def check_ephemeral_request(serving: ServingSpec, pool: NodePool) -> Check:
    """Whether a node of the pool can ever hold the pod's request for ephemeral storage: else it stays Pending."""
    name = "disk request fits on a node"
    if pool.machine_type.startswith(_WITH_LOCAL_SSD):
        return not_applicable(name, f"{pool.machine_type} has local SSDs, which count instead of the boot disk")
    wanted = quantity_bytes(serving.resources.ephemeral_storage) / GIB
    there = schedulable_gib(pool.boot_disk_gib)
    if wanted <= there:
        return ok(name, f"{wanted:.0f} of {there:.0f} GiB")
    enough = next(size for size in range(pool.boot_disk_gib, 100_000, 10) if schedulable_gib(size) >= wanted)
    return failed(
        name,
        f"the pod requests {wanted:.0f} GiB, and of a boot disk of {pool.boot_disk_gib} GiB GKE gives pods {there:.0f}:"
        " it would stay Pending",
        f"Set target.cluster.node_pool.boot_disk_gib to {enough} or more, or lower"
        " serving.resources.ephemeral_storage.",
    )


def _check_memory_copy(name: str, size: str, weights_bytes: int, serving: ServingSpec) -> Check:
    memory = quantity_bytes(serving.resources.memory)
    if weights_bytes + SERVER_MEMORY_GIB * GIB <= memory:
        return ok(name, f"{size} are copied to memory: {memory / GIB:.0f} GiB")
    return failed(
        name,
        f"{size} in {MEMORY_MOUNT} count as memory, of which the pod has {memory / GIB:.0f} GiB: it would be killed",
        f"Raise serving.resources.memory to {_memory_for(weights_bytes)}Gi.",
    )


def _memory_for(weights_bytes: int) -> int:
    return int(weights_bytes / GIB + SERVER_MEMORY_GIB) + 1
