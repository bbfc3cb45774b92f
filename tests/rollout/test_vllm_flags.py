"""The table of vLLM's flags, and the parser on top of it."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from rollout.catalog import load_model
from rollout.vllm_flags import FLAGS, InvalidVllmArguments, Kind, nearest_flag, parse_arguments
from tests.engines import has_vllm, vllm_python
from tests.rollout.tutorial import TUTORIAL_ARGUMENTS


def test_the_tutorials_arguments_are_accepted() -> None:
    assert parse_arguments(TUTORIAL_ARGUMENTS) == {
        "host": "0.0.0.0",
        "port": 8080,
        "model": "gs://gemma-4-26b-it",
        "tensor_parallel_size": 1,
        "max_num_seqs": 128,
        "gpu_memory_utilization": 0.9,
        "limit_mm_per_prompt": {"image": 1},
        "enable_auto_tool_choice": True,
        "tool_call_parser": "gemma4",
        "reasoning_parser": "gemma4",
    }


READ: list[tuple[list[str], dict[str, Any]]] = [
    (["--max-model-len", "16384"], {"max_model_len": "16384"}),
    (["--max_model_len=16k"], {"max_model_len": "16k"}),
    (["--max-num-batched-tokens=8k"], {"max_num_batched_tokens": 8000}),
    (["--max-num-batched-tokens=8K"], {"max_num_batched_tokens": 8192}),
    (["-tp", "2"], {"tensor_parallel_size": 2}),
    (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
    (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
    (["--limit-mm-per-prompt", '{"image": 1}'], {"limit_mm_per_prompt": {"image": 1}}),
    (["--limit_mm_per_prompt.image", "2"], {"limit_mm_per_prompt": {"image": 2}}),
    (
        ["--kv-transfer-config.a.b=1", "--kv-transfer-config.c+=x,y"],
        {"kv_transfer_config": {"a": {"b": 1}, "c": ["x", "y"]}},
    ),
    (["org/model", "--enforce-eager"], {"model_tag": "org/model", "enforce_eager": True}),
]


@pytest.mark.parametrize(("arguments", "expected"), READ)
def test_arguments_are_read_as_vllm_reads_them(arguments: list[str], expected: dict[str, Any]) -> None:
    assert parse_arguments(arguments) == expected


REFUSED = [
    (["--no-such-flag=1"], "unrecognized arguments: --no-such-flag=1"),
    (["--max-num-seqs=many"], "argument --max-num-seqs: invalid int value: 'many'"),
    (["--max-num-seqs"], "argument --max-num-seqs: expected one argument"),
    (["--enforce-eager=yes"], "argument --enforce-eager/--no-enforce-eager: ignored explicit argument 'yes'"),
    (["--dtype=int3"], "argument --dtype: invalid choice: 'int3' (choose from "),
    (["--tool-call-parser=gemini"], "argument --tool-call-parser: invalid choice: 'gemini' (choose from "),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_what_vllm_refuses_is_refused_in_its_words(arguments: list[str], sentence: str) -> None:
    with pytest.raises(InvalidVllmArguments) as refused:
        parse_arguments(arguments)
    assert refused.value.summary.startswith(sentence)


def test_a_misspelt_flag_gets_the_nearest_one_as_a_hint() -> None:
    with pytest.raises(InvalidVllmArguments, match=r"Did you mean --max-num-batched-tokens\?"):
        parse_arguments(["--max_batched_tokens=1"])
    assert nearest_flag("--modle") == "--model"
    assert nearest_flag("--zzzzzzzz") is None


def test_every_flag_has_one_unambiguous_meaning() -> None:
    names = [name for flag in FLAGS for name in (flag.name, *flag.aliases)]
    assert len(names) == len(set(names))
    assert all(flag.kind is Kind.SWITCH for flag in FLAGS if flag.negatable)
    assert not any(flag.many and flag.optional for flag in FLAGS)
    assert len(FLAGS) == 316, "vLLM 0.32 has 316 flags besides --help"


VLLMS_OWN = """
import contextlib, io, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(prog="api_server.py"))
refusals = []
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            parser.parse_args(arguments)
            refusals.append("")
        except SystemExit:
            refusals.append(said.getvalue().strip().splitlines()[-1])
print(json.dumps(refusals))
"""


DIFFERENT_ON_PURPOSE = (
    # vLLM's parser looks into its settings, and the keys of that row are made up; our table knows no settings.
    "--kv-transfer-config",
    # vLLM learns only while it starts that there is no such parser; a plan should know before.
    "--tool-call-parser=gemini",
)


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_vllm(), reason="no venv of real vLLM: make it with sandbox.engine.real_vllm.ensure_venv")
def test_vllms_own_parser_accepts_and_refuses_the_same() -> None:
    presets = [load_model(f"gemma-4-{size}-it").serving for size in ("26b-a4b", "31b")]
    ours = [spec.vllm_args("gs://bucket/model")[len(spec.entrypoint) :] for spec in presets]
    table = [*ours, TUTORIAL_ARGUMENTS, *(row[0] for row in READ), *(row[0] for row in REFUSED)]
    table = [arguments for arguments in table if not arguments[0].startswith(DIFFERENT_ON_PURPOSE)]
    told = subprocess.run(
        [str(vllm_python()), "-c", VLLMS_OWN], input=json.dumps(table), capture_output=True, text=True, check=True
    )
    theirs = json.loads(told.stdout.splitlines()[-1])
    assert [_refusal(arguments) for arguments in table] == [_sentence(said) for said in theirs]


def _refusal(arguments: list[str]) -> str:
    try:
        parse_arguments(arguments)
    except InvalidVllmArguments as refused:
        return _sentence(refused.summary)
    return ""


def _sentence(message: str) -> str:
    """What is wrong, without the program's name, the list of choices and our hint."""
    return message.partition("error: ")[2].partition(" (choose from")[0] or message.partition(" (choose from")[0]
