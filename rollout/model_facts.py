"""What sizing needs of a model: how large its weights are, the shape of its KV cache, whether its licence is gated.

For models that a plan has pinned, both come from the hub. The table below is for work without a network: the models of
the quickstart's examples and of our presets. It was written down without a connection to the hub: take it for an
estimate, and `--from-hub` (or a plan) for the repositories' own `config.json` and index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from rollout.errors import BadInput
from rollout.values import RepoId, Value


class ModelFacts(Value):
    """One model."""

    repo_id: RepoId
    weights_bytes: Annotated[int, Field(gt=0)]
    config: dict[str, Any]
    """The parts of config.json that decide the KV cache and how the weights are quantised."""
    gated: bool = False
    """Its licence must be accepted on the hub, so its pods need a token."""
    source: str = "the project's table"

    @property
    def is_quantised(self) -> bool:
        """Whether the checkpoint is quantised already (MXFP4, AWQ, GPTQ, FP8 …): vLLM refuses another method."""
        return any("quantization_config" in part for part in (self.config, self.config.get("text_config") or {}))

    @property
    def allows_fp8_kv_cache(self) -> bool:
        """gpt-oss fails at its first request: https://github.com/vllm-project/vllm/issues/23832 (attention sinks)."""
        return self.config.get("model_type") != "gpt_oss"


def _layers(count: int, pattern: Sequence[str]) -> list[str]:
    return [pattern[layer % len(pattern)] for layer in range(count)]


_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _config(layers: int, heads: int, kv_heads: int, head_dim: int, longest: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": longest,
        **more,
    }


def _gpt_oss(layers: int) -> dict[str, Any]:
    """Experts in MXFP4, as its own `quantization_config` says."""
    return _config(
        *(layers, 64, 8, 64, 131_072),
        model_type="gpt_oss",
        quantization_config={"quant_method": "mxfp4"},
        sliding_window=128,
        layer_types=_layers(layers, [_LOCAL, _GLOBAL]),
    )


def _gemma4(layers: int, heads: int, kv_heads: int, global_kv_heads: int) -> dict[str, Any]:
    text = _config(
        *(layers, heads, kv_heads, 256, 262_144),
        num_global_key_value_heads=global_kv_heads,
        global_head_dim=512,
        sliding_window=1024,
        layer_types=_layers(layers, [_LOCAL] * 5 + [_GLOBAL]),
    )
    return {"model_type": "gemma4", "text_config": text}


MODELS: dict[str, ModelFacts] = {
    each.repo_id: each
    for each in (
        ModelFacts(
            repo_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
            weights_bytes=15_231_233_024,
            config=_config(28, 28, 4, 128, 131_072),
        ),
        ModelFacts(
            repo_id="google/gemma-2-27b-it",
            weights_bytes=54_454_256_640,
            config=_config(46, 32, 16, 128, 8192, sliding_window=4096, layer_types=_layers(46, [_LOCAL, _GLOBAL])),
            gated=True,
        ),
        ModelFacts(
            repo_id="openai/gpt-oss-20b",
            weights_bytes=13_761_264_768,
            config=_gpt_oss(24),
        ),
        ModelFacts(
            repo_id="openai/gpt-oss-120b",
            weights_bytes=65_248_815_744,
            config=_gpt_oss(36),
        ),
        ModelFacts(
            repo_id="meta-llama/Llama-3.1-8B-Instruct",
            weights_bytes=16_060_522_496,
            config=_config(32, 32, 8, 128, 131_072),
            gated=True,
        ),
        ModelFacts(
            repo_id="meta-llama/Llama-3.3-70B-Instruct",
            weights_bytes=141_107_412_992,
            config=_config(80, 64, 8, 128, 131_072),
            gated=True,
        ),
        ModelFacts(
            repo_id="google/gemma-4-26B-A4B-it", weights_bytes=51_600_000_000, config=_gemma4(30, 16, 8, 2), gated=True
        ),
        ModelFacts(
            repo_id="google/gemma-4-31B-it", weights_bytes=62_500_000_000, config=_gemma4(60, 32, 16, 4), gated=True
        ),
        ModelFacts(
            repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            weights_bytes=269_060_552,
            config=_config(30, 9, 3, 64, 8192),
        ),
    )
}


def known_model(repo_id: str) -> ModelFacts:
    """From the table. Raises BadInput that says how to state the facts of another model."""
    try:
        return MODELS[repo_id]
    except KeyError:
        raise BadInput(
            f"the size and shape of {repo_id} are not in the project's table.",
            where="--model",
            resolution="Give --config FILE (its config.json) and --weights-gib, or --from-hub to ask the hub.",
        ) from None
