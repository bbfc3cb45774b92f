"""The command line of a serving container, read as the image's entrypoint and vLLM 0.32 read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.vllm_flags import FLAGS, Flag, InvalidVllmArguments, Kind, parse_arguments

ENTRY_POINTS: tuple[tuple[str, ...], ...] = (
    ("python", "-m", "vllm.entrypoints.api_server"),  # Google's own build has it, vLLM 0.32 has not
    ("python3", "-m", "vllm.entrypoints.api_server"),
    ("python", "-m", "vllm.entrypoints.openai.api_server"),
    ("python3", "-m", "vllm.entrypoints.openai.api_server"),
    ("vllm", "serve"),
)
IMAGE_ENTRYPOINTS = ("./entrypoint.sh", "/entrypoint.sh")
"""Scripts that run what follows them."""


class UsageError(Exception):
    """vLLM prints its usage and this sentence, and exits with 2."""


class ExecutableNotFound(Exception):
    """The container's command is no entry point of this image; a container runtime would not start it (exit 127)."""


@dataclass(frozen=True, slots=True)
class ServeArguments:
    """What the engine does with its arguments; the rest was accepted by vLLM's parser and changes nothing here."""

    model: str
    served_names: tuple[str, ...]
    program: str
    """`api_server.py` or `vllm serve`, as usage and logs name it."""
    given: dict[str, Any] = field(hash=False)
    """Every flag that was set, as vLLM logs them ("non-default args")."""
    host: str | None = None
    port: int = 8000
    max_model_len: int | None = None
    max_num_seqs: int = 1024
    """vLLM's default for an online server on an H100-class GPU."""
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    num_gpu_blocks_override: int | None = None
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    tool_call_parser: str | None = None
    enable_auto_tool_choice: bool = False
    reasoning_parser: str | None = None
    limit_mm_per_prompt: dict[str, Any] = field(default_factory=dict, hash=False)
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    api_keys: tuple[str, ...] = ()

    @property
    def tools_enabled(self) -> bool:
        return self.enable_auto_tool_choice and self.tool_call_parser is not None


def strip_entry_point(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The program's name and the arguments after the entry point. Raises ExecutableNotFound for an unknown one."""
    words = list(arguments)
    while words and words[0] in IMAGE_ENTRYPOINTS:
        words.pop(0)
    for entry_point in ENTRY_POINTS:
        if tuple(words[: len(entry_point)]) == entry_point:
            program = "vllm serve" if entry_point[0] == "vllm" else "api_server.py"
            return program, words[len(entry_point) :]
    if words and not words[0].startswith("-"):
        raise ExecutableNotFound(words[0])
    return "api_server.py", words


def parse_serve_arguments(arguments: Sequence[str]) -> ServeArguments:
    """Read a container's arguments. Raises ExecutableNotFound, or UsageError as vLLM's parser would say it."""
    program, rest = strip_entry_point(arguments)
    try:
        given = parse_arguments(rest, prog=program)
        max_model_len = _model_len(given.get("max_model_len"))
    except InvalidVllmArguments as error:
        raise UsageError(error.summary) from error
    model = given.pop("model_tag", None) or given.get("model") or "Qwen/Qwen3-0.6B"  # vLLM's default model
    known = {name: given[name] for name in _PASSED_ON if given.get(name) is not None}
    return ServeArguments(
        model=model,
        served_names=tuple(given.get("served_model_name") or (model,)),
        program=program,
        given=given,
        max_model_len=max_model_len,
        api_keys=tuple(given.get("api_key") or ()),
        **known,
    )


_PASSED_ON = (
    "host",
    "port",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "num_gpu_blocks_override",
    "block_size",
    "kv_cache_dtype",
    "enable_prefix_caching",
    "enforce_eager",
    "tool_call_parser",
    "enable_auto_tool_choice",
    "reasoning_parser",
    "limit_mm_per_prompt",
    "default_chat_template_kwargs",
)


def _model_len(text: str | None) -> int | None:
    """`--max-model-len` takes an integer, a size such as 16k, or `auto`/-1 for what fits."""
    if text is None or text in ("auto", "-1"):
        return None
    return int(parse_arguments(["--max-num-batched-tokens", text])["max_num_batched_tokens"])


def usage_text(program: str) -> str:
    """The usage that precedes an error; vLLM's has the same flags, wrapped otherwise."""
    lines = [f"usage: {program} [-h]"]
    lines += [f"{' ' * 21}[{_usage_of(flag)}]" for flag in FLAGS]
    return "\n".join([*lines, f"{' ' * 21}[model_tag]"])


def _usage_of(flag: Flag) -> str:
    if flag.negatable:
        return f"{flag.name} | --no-{flag.name.removeprefix('--')}"
    if flag.kind is Kind.SWITCH:
        return flag.name
    value = (
        "{" + ",".join(flag.choices) + "}" if flag.choices else flag.name.removeprefix("--").replace("-", "_").upper()
    )
    if flag.many:
        return f"{flag.name} {value} [{value} ...]"
    return f"{flag.name} [{value}]" if flag.optional else f"{flag.name} {value}"
