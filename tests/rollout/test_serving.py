"""The arguments of the tutorial, and the rules of the serving spec."""

import pytest
from pydantic import ValidationError

from rollout.serving import ServingSpec, quantity_bytes
from tests.rollout.tutorial import TUTORIAL_ARGUMENTS

ENTRYPOINT = ["python", "-m", "vllm.entrypoints.api_server"]


def test_defaults_give_the_tutorials_arguments_and_the_name_that_requests_use() -> None:
    spec = ServingSpec(served_model_name="google/gemma-4-26B-A4B-it", max_model_len=None)
    args = spec.vllm_args("gs://gemma-4-26b-it")
    assert [arg for arg in args if not arg.startswith("--served-model-name")] == [*ENTRYPOINT, *TUTORIAL_ARGUMENTS]
    assert "--served-model-name=google/gemma-4-26B-A4B-it" in args


def test_context_window_of_the_tutorials_example() -> None:
    assert "--max-model-len=16384" in ServingSpec(served_model_name="m").vllm_args("gs://b")


def test_text_models_get_no_vision_tool_or_reasoning_flags() -> None:
    spec = ServingSpec(served_model_name="m", max_images_per_prompt=None, tool_call_parser=None, reasoning_parser=None)
    args = " ".join(spec.vllm_args("gs://b"))
    assert "limit_mm" not in args
    assert "tool" not in args
    assert "reasoning" not in args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "raise accelerator.count"),
        ({"accelerator": {"count": 9, "machine_gpu_count": 8}}, "does not fit on a"),
        ({"name": "Bad_Name"}, "String should match pattern"),
        ({"gpu_memory_utilization": 1.5}, "less than or equal to 1"),
        ({"unknown_field": 1}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ServingSpec.model_validate({"served_model_name": "m", **changes})


@pytest.mark.parametrize(
    ("gigabytes", "command", "probes"),
    [
        # The tutorial's wait of 1800 s, in probes of 10 s.
        (0, ("./entrypoint.sh",), 180),
        (62, ("./entrypoint.sh",), 180),
        # 180 s of engine start and 200 GB at 0.2 GB/s, once to copy and once to load, or once to stream.
        (200, ("./entrypoint.sh",), 218),
        (400, (), 218),
    ],
)
def test_the_startup_probe_outlasts_the_wait_and_every_pass_over_the_weights(
    gigabytes: int, command: tuple[str, ...], probes: int
) -> None:
    spec = ServingSpec(served_model_name="m", command=command)
    assert spec.startup_failure_threshold(int(gigabytes * 1e9)) == probes


@pytest.mark.parametrize(("quantity", "number"), [("80Gi", 80 * 2**30), ("1.5G", 1_500_000_000), ("100", 100)])
def test_a_quantity_is_a_number(quantity: str, number: int) -> None:
    assert quantity_bytes(quantity) == number
