"""Worked by hand: what fits on which accelerator, and what the failure tells to change."""

import pytest

from rollout.accelerators import GIB, accelerator
from rollout.catalog import load_model
from rollout.errors import BadInput
from rollout.fit import (
    WeightsCopy,
    check_context_window,
    check_ephemeral_request,
    check_ephemeral_storage,
    check_memory,
    memory_fit,
    model_shape,
    weights_copy,
)
from rollout.preflight import CheckState
from rollout.serving import ServingSpec
from rollout.target import NodePool

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}
WINDOWED = {
    "text_config": {
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size": 2816,
        "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "max_position_embeddings": 262144,
    }
}


def spec(**changes: object) -> ServingSpec:
    return ServingSpec.model_validate({"served_model_name": "m", **changes})


def test_kv_cache_of_full_attention_is_two_values_per_layer_head_and_token() -> None:
    shape = model_shape(LLAMA_8B)
    assert shape is not None
    # 2 (K and V) × 32 layers × 8 heads × 128 dims × 2 bytes = 131072 bytes a token: Llama 3 8B's well-known 128 KiB.
    assert shape.kv_bytes(1) == 131072
    assert shape.kv_bytes(1000) == 131072 * 1000


def test_sliding_layers_stop_growing_at_their_window() -> None:
    shape = model_shape(WINDOWED)
    assert shape is not None
    sliding = 2 * 2 * 5 * 1024 * 8 * 256
    assert shape.kv_bytes(4096) == sliding + 2 * 2 * 1 * 4096 * 2 * 512
    assert shape.kv_bytes(8192) - shape.kv_bytes(4096) == 2 * 2 * 4096 * 2 * 512


@pytest.mark.parametrize(
    ("pool", "state"),
    [
        (NodePool(machine_type="g2-standard-12"), CheckState.FAILED),
        (NodePool(machine_type="g2-standard-12", boot_disk_gib=160), CheckState.OK),
        (NodePool(machine_type="a3-highgpu-8g"), CheckState.NOT_APPLICABLE),
    ],
)
def test_a_request_that_no_boot_disk_of_the_pool_can_hold_is_told_before_it_stays_pending(
    pool: NodePool, state: CheckState
) -> None:
    check = check_ephemeral_request(spec(), pool)
    assert check.state is state
    if state is CheckState.FAILED:
        assert "requests 80 GiB, and of a boot disk of 100 GiB GKE gives pods 49" in check.why
        assert "boot_disk_gib to 160" in check.resolution


def test_kv_heads_are_divided_over_gpus_down_to_one_each() -> None:
    shape = model_shape(WINDOWED)
    assert shape is not None
    # Of two heads of the full layer each of four GPUs has one; of eight heads of the sliding layers two.
    assert shape.kv_bytes(4096, gpus=4) == 2 * 2 * (5 * 1024 * 2 * 256 + 4096 * 1 * 512)


def test_an_engine_starts_only_if_a_prompt_fits_that_is_read_in_large_steps() -> None:
    """31B on one H100: sliding layers hold window - 1 + 8192 tokens while a prompt is read."""
    config = {
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size": 5376,
        "sliding_window": 1024,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        "max_position_embeddings": 262144,
    }
    h100, weights = accelerator("nvidia-h100-80gb"), int(58.3 * GIB)
    assert check_memory(weights, config, spec(max_model_len=16384), h100).state is not CheckState.FAILED
    too_long = check_memory(weights, config, spec(max_model_len=81920), h100)
    assert too_long.state is CheckState.FAILED
    assert "while its prompt is read" in too_long.why
    smaller_steps = spec(max_model_len=81920, extra_args=("--max-num-batched-tokens=1024",))
    assert check_memory(weights, config, smaller_steps, h100).state is not CheckState.FAILED


def test_memory_of_one_gpu_adds_up() -> None:
    shape = model_shape(LLAMA_8B)
    assert shape is not None
    fit = memory_fit(16 * GIB, shape, spec(max_model_len=16384), accelerator("nvidia-h100-80gb"))
    assert fit.usable_bytes == int(72 * GIB)
    assert fit.kv_cache_bytes == (72 - 16 - 4) * GIB
    assert fit.bytes_per_full_context == 2 * GIB
    assert fit.full_contexts == pytest.approx(26)


def test_weights_larger_than_the_gpu_ask_for_more_gpus() -> None:
    check = check_memory(140 * GIB, LLAMA_8B, spec(), accelerator("nvidia-h100-80gb"))
    assert check.state is CheckState.FAILED
    assert "tensor_parallel_size and accelerator.count to 3" in check.resolution


def test_context_window_larger_than_the_cache_names_the_possible_length() -> None:
    check = check_memory(15 * GIB, LLAMA_8B, spec(max_model_len=131072), accelerator("nvidia-l4"))
    assert check.state is CheckState.FAILED
    # 24 × 0.9 − 15 − 4 = 2.6 GiB at 128 KiB a token.
    assert "Lower max_model_len to 21299 or less" in check.resolution


def test_config_without_layers_is_unknown_not_ok() -> None:
    assert check_memory(GIB, {}, spec(), accelerator("nvidia-l4")).state is CheckState.UNKNOWN


@pytest.mark.parametrize(
    ("length", "state"),
    [(131072, CheckState.OK), (131073, CheckState.FAILED), (None, CheckState.NOT_APPLICABLE)],
)
def test_a_context_window_beyond_the_models_own_is_refused(length: int | None, state: CheckState) -> None:
    check = check_context_window(LLAMA_8B, spec(max_model_len=length))
    assert check.state is state
    if state is CheckState.FAILED:
        assert "131072 or less" in check.resolution


@pytest.mark.parametrize(
    ("weights_gib", "boot_disk_gib", "storage", "state"),
    [
        (79, 100, "80Gi", CheckState.OK),
        (81, 100, "80Gi", CheckState.FAILED),
        (89, 100, "200Gi", CheckState.OK),
        (91, 100, "200Gi", CheckState.FAILED),
        (140, 100, "80Gi", CheckState.FAILED),
        (140, 300, "200Gi", CheckState.OK),
        (140, None, "200Gi", CheckState.OK),
        (140, None, "80Gi", CheckState.FAILED),
    ],
)
def test_the_ninety_gib_trap(weights_gib: int, boot_disk_gib: int | None, storage: str, state: CheckState) -> None:
    serving = spec(resources={"ephemeral_storage": storage})
    check = check_ephemeral_storage(weights_gib * GIB, serving, WeightsCopy.DISK, boot_disk_gib=boot_disk_gib)
    assert check.state is state
    if state is CheckState.FAILED:
        assert "LOCAL_MODEL_DIR=/dev/shm/model" in check.resolution
        assert "boot_disk_gib" in check.resolution


@pytest.mark.parametrize(("memory", "state"), [("160Gi", CheckState.OK), ("150Gi", CheckState.FAILED)])
def test_a_copy_in_memory_counts_as_memory(memory: str, state: CheckState) -> None:
    serving = spec(env={"LOCAL_MODEL_DIR": "/dev/shm/model"}, resources={"memory": memory})
    check = check_ephemeral_storage(140 * GIB, serving, weights_copy(serving, from_hub=False))
    assert check.state is state
    if state is CheckState.FAILED:
        assert "serving.resources.memory to 157Gi" in check.resolution


def test_streamed_weights_need_no_disk() -> None:
    assert check_ephemeral_storage(500 * GIB, spec(), WeightsCopy.NONE).state is CheckState.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("changes", "from_hub", "copy"),
    [
        ({}, False, WeightsCopy.DISK),
        ({"load_format": "runai_streamer"}, False, WeightsCopy.DISK),  # its entry point copies all the same
        ({"env": {"LOCAL_MODEL_DIR": "/dev/shm/model"}}, False, WeightsCopy.MEMORY),
        ({"command": (), "load_format": "runai_streamer"}, False, WeightsCopy.NONE),
        ({"command": ()}, True, WeightsCopy.DISK),
        ({"command": (), "env": {"HF_HOME": "/dev/shm/hf_cache"}}, True, WeightsCopy.MEMORY),
    ],
)
def test_where_the_image_keeps_the_weights(changes: dict[str, object], from_hub: bool, copy: WeightsCopy) -> None:
    assert weights_copy(spec(**changes), from_hub=from_hub) is copy


@pytest.mark.parametrize(
    ("preset", "weights_bytes"), [("gemma-4-26b-a4b-it", 52_000_000_000), ("gemma-4-31b-it", 62_500_000_000)]
)
def test_both_gemma_presets_fit_on_the_tutorials_disk(preset: str, weights_bytes: int) -> None:
    serving = load_model(preset).serving
    check = check_ephemeral_storage(weights_bytes, serving, weights_copy(serving, from_hub=False))
    assert check.state is CheckState.OK
    assert "90 GiB usable" in check.why


def test_unknown_accelerator_suggests_the_nearest() -> None:
    with pytest.raises(BadInput, match="Did you mean 'nvidia-h100-80gb'"):
        accelerator("nvidia-h100-80g")
