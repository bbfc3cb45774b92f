"""vLLM's command line: every flag of vLLM 0.32, and a parser that accepts and refuses what vLLM's own does.

A misspelt flag costs a node scale-up and a crash loop before anybody reads the log; so the product checks a serving
spec's arguments here, before anything is created. `FLAGS` was generated once from vLLM 0.32's own parser
(`vllm.entrypoints.launchers.cli_args.make_arg_parser`): names, aliases, kinds of values and choices. Where its venv is
there, a test holds this parser against it. Meaning is not checked: a value of the right kind may still be refused when
the engine starts.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from rollout.errors import BadInput

VLLM_VERSION = "0.32.0"
"""The release that `FLAGS` describes; an image with another one may know more flags, or fewer."""


class Kind(StrEnum):
    """What a flag's value must look like."""

    SWITCH = "switch"
    TEXT = "text"
    INTEGER = "integer"
    SIZE = "size"
    """An integer, or a number with k, m, g, t (powers of 1000) or K, M, G, T (powers of 1024)."""
    NUMBER = "number"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of vLLM's command line."""

    name: str
    kind: Kind
    many: bool = False
    """Takes one value or more."""
    optional: bool = False
    """The value may be left out."""
    negatable: bool = False
    """A switch with a `--no-` form."""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


class InvalidVllmArguments(BadInput):
    """Arguments with which vLLM would print its usage and exit with status 2."""


def parse_arguments(arguments: Sequence[str], *, prog: str = "api_server.py") -> dict[str, Any]:
    """The flags that `arguments` set, by destination (`max_model_len`), converted to their kind.

    `arguments` are what follows the entry point. As in vLLM, names may be written with dashes or underscores, and
    a JSON value in dotted parts (`--limit-mm-per-prompt.image=1`). A positional model is under `model_tag`.
    Raises InvalidVllmArguments with argparse's own sentence and the nearest flag.
    """
    parser = _Parser(prog=prog, argument_default=argparse.SUPPRESS)
    parser.add_argument("model_tag", nargs="?")
    for flag in FLAGS:
        parser.add_argument(flag.name, *flag.aliases, **_argparse_options(flag))
    known, unknown = parser.parse_known_args(normalise(arguments))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return dict(vars(known))


def normalise(arguments: Sequence[str]) -> list[str]:
    """Rewrite to dashes, and gather dotted JSON values (`--a.b=1 --a.c=2`) into one (`--a {"b": 1, "c": 2}`)."""
    result: list[str] = []
    nested: dict[str, dict[str, Any]] = {}
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            result.append(argument)
            continue
        name, equals, value = argument.partition("=")
        root, dot, path = name.partition(".")
        root = "--" + root[2:].replace("_", "-")
        if not dot:
            result.append(root + equals + value)
            continue
        if not equals:
            value = next(remaining, "")
        if root not in nested:
            nested[root] = {}
        _put(nested[root], path, value)
    for root, values in nested.items():
        result += [root, json.dumps(values)]
    return result


def nearest_flag(name: str) -> str | None:
    """The known flag most like `name`, for an error message; None when nothing is near."""
    wanted = "--" + name.lstrip("-").partition("=")[0].partition(".")[0].replace("_", "-")
    matches = difflib.get_close_matches(wanted, [flag.name for flag in FLAGS], n=1)
    return matches[0] if matches else None


def _put(target: dict[str, Any], path: str, text: str) -> None:
    """Set `a.b` to the JSON value of `text` (or to the text), and extend the list at `a.b+`."""
    *parents, leaf = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    if leaf.endswith("+"):
        target.setdefault(leaf[:-1], []).extend(_json_or_text(part) for part in text.split(","))
    else:
        target[leaf] = _json_or_text(text)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would end the process; its sentence is what vLLM's log would hold.
        _, unknown, flags = message.partition("unrecognized arguments: ")
        nearest = nearest_flag(flags.split()[0]) if unknown else None
        raise InvalidVllmArguments(
            message,
            where=self.prog,
            resolution=f"Did you mean {nearest}?" if nearest else f"See the flags of vLLM {VLLM_VERSION}.",
        )


def _argparse_options(flag: Flag) -> dict[str, Any]:
    if flag.negatable:
        return {"action": argparse.BooleanOptionalAction}
    if flag.kind is Kind.SWITCH:
        return {"action": "store_true"}
    options: dict[str, Any] = {"type": _CONVERTERS[flag.kind]}
    if flag.many or flag.optional:
        options["nargs"] = "+" if flag.many else "?"
    if flag.choices:
        options["choices"] = [_CONVERTERS[flag.kind](choice) for choice in flag.choices]
    return options


_SIZE_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT])", text.strip())
    return int(float(match[1]) * _SIZE_FACTORS[match[2]]) if match else int(text)


# The names of these functions show in argparse's messages: "invalid int value: 'x'".
_CONVERTERS: dict[Kind, Callable[[str], Any]] = {
    Kind.TEXT: str,
    Kind.INTEGER: int,
    Kind.SIZE: _size,
    Kind.NUMBER: float,
    Kind.JSON: json.loads,
}

FLAGS: tuple[Flag, ...] = (
    Flag("--additional-config", Kind.TEXT),
    Flag("--aggregate-engine-logging", Kind.SWITCH),
    Flag(
        "--all2all-backend",
        Kind.TEXT,
        choices=(
            "allgather_reducescatter",
            "deepep_high_throughput",
            "deepep_low_latency",
            "deepep_v2",
            "flashinfer_all2allv",
            "flashinfer_nvlink_one_sided",
            "flashinfer_nvlink_two_sided",
            "moonep",
            "mori_high_throughput",
            "mori_low_latency",
            "naive",
            "nixl_ep",
            "pplx",
        ),
    ),
    Flag("--allow-credentials", Kind.SWITCH, negatable=True),
    Flag("--allow-deprecated-quantization", Kind.SWITCH, negatable=True),
    Flag("--allowed-headers", Kind.JSON),
    Flag("--allowed-local-media-path", Kind.TEXT),
    Flag("--allowed-media-domains", Kind.TEXT, many=True),
    Flag("--allowed-methods", Kind.JSON),
    Flag("--allowed-origins", Kind.JSON),
    Flag(
        "--anthropic-disabled-thinking-effort",
        Kind.TEXT,
        choices=(
            "auto",
            "high",
            "low",
            "max",
            "medium",
            "none",
            "xhigh",
        ),
    ),
    Flag("--api-key", Kind.TEXT, many=True),
    Flag("--api-server-count", Kind.INTEGER, aliases=("-asc",)),
    Flag("--async-scheduling", Kind.SWITCH, negatable=True),
    Flag("--attention-backend", Kind.TEXT),
    Flag("--attention-config", Kind.JSON, aliases=("-ac",)),
    Flag("--aux-output-config", Kind.JSON),
    Flag("--block-size", Kind.INTEGER),
    Flag("--chat-template", Kind.TEXT),
    Flag(
        "--chat-template-content-format",
        Kind.TEXT,
        choices=(
            "auto",
            "openai",
            "string",
        ),
    ),
    Flag("--code-revision", Kind.TEXT),
    Flag("--cohere-format", Kind.TEXT),
    Flag("--cohere-is-reasoning-model", Kind.SWITCH, negatable=True),
    Flag(
        "--collect-detailed-traces",
        Kind.TEXT,
        many=True,
        choices=(
            "all",
            "model",
            "worker",
            "None",
        ),
    ),
    Flag("--compilation-config", Kind.JSON, aliases=("-cc",)),
    Flag("--config", Kind.TEXT),
    Flag("--config-format", Kind.TEXT),
    Flag(
        "--convert",
        Kind.TEXT,
        choices=(
            "auto",
            "classify",
            "embed",
            "none",
        ),
    ),
    Flag("--cp-kv-cache-interleave-size", Kind.INTEGER),
    Flag("--cpu-distributed-timeout-seconds", Kind.INTEGER),
    Flag("--cpu-offload-gb", Kind.NUMBER),
    Flag("--cpu-offload-params", Kind.TEXT, many=True),
    Flag("--cudagraph-capture-sizes", Kind.INTEGER, many=True),
    Flag("--cudagraph-metrics", Kind.SWITCH, negatable=True),
    Flag("--custom-histogram-buckets", Kind.JSON),
    Flag("--data-parallel-address", Kind.TEXT, aliases=("-dpa",)),
    Flag("--data-parallel-backend", Kind.TEXT, aliases=("-dpb",)),
    Flag("--data-parallel-external-lb", Kind.SWITCH, negatable=True, aliases=("-dpe",)),
    Flag("--data-parallel-hybrid-lb", Kind.SWITCH, negatable=True, aliases=("-dph",)),
    Flag("--data-parallel-multi-port-external-lb", Kind.SWITCH, aliases=("-dpm",)),
    Flag("--data-parallel-rank", Kind.INTEGER, aliases=("-dpn",)),
    Flag("--data-parallel-rpc-port", Kind.INTEGER, aliases=("-dpp",)),
    Flag("--data-parallel-size", Kind.INTEGER, aliases=("-dp",)),
    Flag("--data-parallel-size-local", Kind.INTEGER, aliases=("-dpl",)),
    Flag("--data-parallel-start-rank", Kind.INTEGER, aliases=("-dpr",)),
    Flag("--data-parallel-supervisor-port", Kind.INTEGER),
    Flag("--dbo-decode-token-threshold", Kind.INTEGER),
    Flag("--dbo-prefill-token-threshold", Kind.INTEGER),
    Flag(
        "--dcp-comm-backend",
        Kind.TEXT,
        choices=(
            "a2a",
            "ag_rs",
            "None",
        ),
    ),
    Flag("--dcp-kv-cache-interleave-size", Kind.INTEGER),
    Flag("--dcp-q-replicate", Kind.SWITCH, negatable=True),
    Flag("--decode-context-parallel-size", Kind.INTEGER, aliases=("-dcp",)),
    Flag("--default-chat-template-kwargs", Kind.JSON),
    Flag("--default-mm-loras", Kind.JSON),
    Flag("--device-ids", Kind.TEXT),
    Flag("--diffusion-config", Kind.JSON, aliases=("-dc",)),
    Flag("--disable-access-log-for-endpoints", Kind.TEXT),
    Flag("--disable-cascade-attn", Kind.SWITCH, negatable=True),
    Flag("--disable-chunked-mm-input", Kind.SWITCH, negatable=True),
    Flag("--disable-custom-all-reduce", Kind.SWITCH, negatable=True),
    Flag("--disable-fastapi-docs", Kind.SWITCH, negatable=True),
    Flag("--disable-hybrid-kv-cache-manager", Kind.SWITCH, negatable=True),
    Flag("--disable-log-stats", Kind.SWITCH),
    Flag("--disable-nccl-for-dp-synchronization", Kind.SWITCH, negatable=True),
    Flag("--disable-sliding-window", Kind.SWITCH, negatable=True),
    Flag("--disable-uvicorn-access-log", Kind.SWITCH, negatable=True),
    Flag("--distributed-executor-backend", Kind.TEXT),
    Flag("--distributed-timeout-seconds", Kind.INTEGER),
    Flag("--download-dir", Kind.TEXT),
    Flag("--dp-supervisor-probe-failure-threshold", Kind.INTEGER),
    Flag("--dp-supervisor-probe-interval-s", Kind.NUMBER),
    Flag("--dp-supervisor-probe-timeout-s", Kind.NUMBER),
    Flag("--dp-sync-interval", Kind.INTEGER),
    Flag(
        "--dtype",
        Kind.TEXT,
        choices=(
            "auto",
            "bfloat16",
            "float",
            "float16",
            "float32",
            "half",
        ),
    ),
    Flag("--ec-manager-config", Kind.JSON),
    Flag("--ec-transfer-config", Kind.JSON),
    Flag("--elastic-ep-max-dp-size", Kind.INTEGER),
    Flag("--enable-auto-tool-choice", Kind.SWITCH, negatable=True),
    Flag("--enable-batch-sharded-sampling", Kind.SWITCH, negatable=True),
    Flag("--enable-chunked-prefill", Kind.SWITCH, negatable=True),
    Flag("--enable-cumem-allocator", Kind.SWITCH, negatable=True),
    Flag("--enable-dbo", Kind.SWITCH, negatable=True),
    Flag("--enable-elastic-ep", Kind.SWITCH, negatable=True),
    Flag("--enable-ep-weight-filter", Kind.SWITCH, negatable=True),
    Flag("--enable-eplb", Kind.SWITCH, negatable=True),
    Flag("--enable-expert-parallel", Kind.SWITCH, negatable=True, aliases=("-ep",)),
    Flag("--enable-fault-tolerance", Kind.SWITCH, negatable=True),
    Flag("--enable-flash-late-interaction", Kind.SWITCH, negatable=True),
    Flag("--enable-flashinfer-autotune", Kind.SWITCH, negatable=True),
    Flag("--enable-force-include-usage", Kind.SWITCH, negatable=True),
    Flag("--enable-hc-sp", Kind.SWITCH, negatable=True),
    Flag("--enable-layerwise-nvtx-tracing", Kind.SWITCH, negatable=True),
    Flag("--enable-log-deltas", Kind.SWITCH, negatable=True),
    Flag("--enable-log-outputs", Kind.SWITCH, negatable=True),
    Flag("--enable-log-requests", Kind.SWITCH, negatable=True),
    Flag("--enable-logging-iteration-details", Kind.SWITCH, negatable=True),
    Flag("--enable-lora", Kind.SWITCH, negatable=True),
    Flag("--enable-mamba-cache-stochastic-rounding", Kind.SWITCH, negatable=True),
    Flag("--enable-mamba-shared-prefix-checkpoint", Kind.SWITCH, negatable=True),
    Flag("--enable-mfu-metrics", Kind.SWITCH, negatable=True),
    Flag("--enable-mixed-moe-lora-format", Kind.SWITCH, negatable=True),
    Flag("--enable-mm-embeds", Kind.SWITCH, negatable=True),
    Flag("--enable-moe-shared-loras", Kind.SWITCH, negatable=True),
    Flag("--enable-nccl-comm-suspend", Kind.SWITCH, negatable=True),
    Flag("--enable-offline-docs", Kind.SWITCH, negatable=True),
    Flag("--enable-per-request-metrics", Kind.SWITCH, negatable=True),
    Flag("--enable-prefix-caching", Kind.SWITCH, negatable=True),
    Flag("--enable-prompt-embeds", Kind.SWITCH, negatable=True),
    Flag("--enable-prompt-tokens-details", Kind.SWITCH, negatable=True),
    Flag("--enable-request-id-headers", Kind.SWITCH, negatable=True),
    Flag("--enable-return-routed-experts", Kind.SWITCH, negatable=True),
    Flag("--enable-scale-out", Kind.SWITCH, negatable=True),
    Flag("--enable-server-load-tracking", Kind.SWITCH, negatable=True),
    Flag("--enable-shm-tensor-arena", Kind.SWITCH, negatable=True),
    Flag("--enable-sleep-mode", Kind.SWITCH, negatable=True),
    Flag("--enable-ssl-refresh", Kind.SWITCH, negatable=True),
    Flag("--enable-tokenizer-info-endpoint", Kind.SWITCH, negatable=True),
    Flag("--enable-tower-connector-lora", Kind.SWITCH, negatable=True),
    Flag("--enable-trace-replay", Kind.SWITCH, negatable=True),
    Flag("--enforce-eager", Kind.SWITCH, negatable=True),
    Flag("--engram-config", Kind.JSON),
    Flag("--eplb-config", Kind.JSON),
    Flag("--exclude-tools-when-tool-choice-none", Kind.SWITCH, negatable=True),
    Flag(
        "--expert-placement-strategy",
        Kind.TEXT,
        choices=(
            "linear",
            "round_robin",
        ),
    ),
    Flag("--fail-on-environ-validation", Kind.SWITCH, negatable=True),
    Flag("--fault-tolerance-config", Kind.JSON),
    Flag(
        "--fingerprint-mode",
        Kind.TEXT,
        choices=(
            "custom",
            "full",
            "hash",
            "none",
        ),
    ),
    Flag("--fingerprint-value", Kind.TEXT),
    Flag("--fully-sharded-loras", Kind.SWITCH, negatable=True),
    Flag(
        "--gdn-prefill-backend",
        Kind.TEXT,
        choices=(
            "flashinfer",
            "triton",
            "cutedsl",
            "aiter_flydsl",
        ),
    ),
    Flag("--generation-config", Kind.TEXT),
    Flag("--gpu-memory-utilization", Kind.NUMBER, aliases=("--device-memory-utilization",)),
    Flag("--grpc", Kind.SWITCH),
    Flag("--grpc-port", Kind.INTEGER),
    Flag("--h11-max-header-count", Kind.INTEGER),
    Flag("--h11-max-incomplete-event-size", Kind.INTEGER),
    Flag("--headless", Kind.SWITCH),
    Flag("--hf-config-path", Kind.TEXT),
    Flag("--hf-overrides", Kind.TEXT),
    Flag("--hf-token", Kind.TEXT, optional=True),
    Flag("--host", Kind.TEXT),
    Flag("--ignore-patterns", Kind.TEXT, many=True),
    Flag("--interleave-mm-strings", Kind.SWITCH, negatable=True),
    Flag("--io-processor-plugin", Kind.TEXT),
    Flag("--ir-op-priority", Kind.JSON),
    Flag(
        "--jit-monitor-mode",
        Kind.TEXT,
        choices=(
            "error",
            "warn",
        ),
    ),
    Flag("--jit-monitor-verbose", Kind.SWITCH, negatable=True),
    Flag(
        "--kda-decode-backend",
        Kind.TEXT,
        choices=(
            "auto",
            "native",
            "flashinfer",
            "triton",
        ),
    ),
    Flag(
        "--kda-prefill-backend",
        Kind.TEXT,
        choices=(
            "auto",
            "triton",
            "flashkda",
            "flashinfer",
            "fused",
        ),
    ),
    Flag("--kernel-config", Kind.JSON),
    Flag(
        "--kv-cache-dtype",
        Kind.TEXT,
        choices=(
            "auto",
            "bfloat16",
            "float16",
            "fp8",
            "fp8_ds_mla",
            "fp8_e4m3",
            "fp8_e5m2",
            "fp8_inc",
            "fp8_per_token_head",
            "int4_per_token_head",
            "int8_per_token_head",
            "nvfp4",
            "nvfp4_4over6",
            "nvfp4_ds_mla",
            "turboquant_3bit_nc",
            "turboquant_4bit_nc",
            "turboquant_k3v4_nc",
            "turboquant_k8v4",
            "ultraquant_4bit",
        ),
    ),
    Flag("--kv-cache-dtype-skip-layers", Kind.TEXT, many=True),
    Flag("--kv-cache-memory-bytes", Kind.SIZE),
    Flag("--kv-cache-metrics", Kind.SWITCH, negatable=True),
    Flag("--kv-cache-metrics-sample", Kind.NUMBER),
    Flag("--kv-events-config", Kind.JSON),
    Flag(
        "--kv-offloading-backend",
        Kind.TEXT,
        choices=(
            "lmcache",
            "native",
        ),
    ),
    Flag("--kv-offloading-size", Kind.NUMBER),
    Flag("--kv-sharing-fast-prefill", Kind.SWITCH, negatable=True),
    Flag("--kv-transfer-config", Kind.JSON),
    Flag("--language-model-only", Kind.SWITCH, negatable=True),
    Flag("--limit-mm-per-prompt", Kind.JSON),
    Flag(
        "--linear-backend",
        Kind.TEXT,
        choices=(
            "aiter",
            "auto",
            "b12x",
            "conch",
            "cutlass",
            "deep_gemm",
            "emulation",
            "exllama",
            "fbgemm",
            "flashinfer_b12x",
            "flashinfer_cudnn",
            "flashinfer_cutedsl",
            "flashinfer_cutlass",
            "flashinfer_trtllm",
            "humming",
            "machete",
            "marlin",
            "torch",
            "triton",
            "xpu",
            "xpu_woq",
        ),
    ),
    Flag("--load-format", Kind.TEXT),
    Flag("--log-config-file", Kind.TEXT),
    Flag("--log-error-stack", Kind.SWITCH, negatable=True),
    Flag(
        "--log-level",
        Kind.TEXT,
        choices=(
            "CRITICAL",
            "ERROR",
            "WARNING",
            "INFO",
            "DEBUG",
            "NOTSET",
        ),
    ),
    Flag("--logging-config", Kind.JSON),
    Flag("--logits-processors", Kind.TEXT, many=True),
    Flag(
        "--logprobs-mode",
        Kind.TEXT,
        choices=(
            "processed_logits",
            "processed_logprobs",
            "raw_logits",
            "raw_logprobs",
        ),
    ),
    Flag("--long-prefill-token-threshold", Kind.INTEGER),
    Flag("--long-prefill-token-threshold-adaptive", Kind.SWITCH, negatable=True),
    Flag(
        "--lora-dtype",
        Kind.TEXT,
        choices=(
            "auto",
            "bfloat16",
            "float16",
        ),
    ),
    Flag("--lora-modules", Kind.TEXT, many=True),
    Flag("--lora-target-modules", Kind.TEXT, many=True),
    Flag("--mamba-backend", Kind.TEXT),
    Flag("--mamba-block-size", Kind.INTEGER),
    Flag(
        "--mamba-cache-dtype",
        Kind.TEXT,
        choices=(
            "auto",
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    Flag(
        "--mamba-cache-mode",
        Kind.TEXT,
        choices=(
            "align",
            "none",
        ),
    ),
    Flag("--mamba-cache-philox-rounds", Kind.INTEGER),
    Flag(
        "--mamba-ssm-cache-dtype",
        Kind.TEXT,
        choices=(
            "auto",
            "bfloat16",
            "float16",
            "float32",
        ),
    ),
    Flag(
        "--mamba-ssu-algorithm",
        Kind.TEXT,
        choices=(
            "auto",
            "horizontal",
            "simple",
            "vertical",
            "None",
        ),
    ),
    Flag("--master-addr", Kind.TEXT),
    Flag("--master-port", Kind.INTEGER),
    Flag("--max-cpu-loras", Kind.INTEGER),
    Flag("--max-cudagraph-capture-size", Kind.INTEGER),
    Flag("--max-log-len", Kind.INTEGER),
    Flag("--max-logprobs", Kind.INTEGER),
    Flag("--max-lora-cls-labels", Kind.INTEGER),
    Flag(
        "--max-lora-rank",
        Kind.INTEGER,
        choices=(
            "1",
            "8",
            "16",
            "32",
            "64",
            "128",
            "256",
            "320",
            "512",
        ),
    ),
    Flag("--max-loras", Kind.INTEGER),
    Flag("--max-model-len", Kind.TEXT),
    Flag("--max-num-active-seqs", Kind.INTEGER),
    Flag("--max-num-batched-tokens", Kind.SIZE),
    Flag("--max-num-queued-reqs", Kind.INTEGER),
    Flag("--max-num-queued-tokens", Kind.SIZE),
    Flag("--max-num-scheduled-tokens", Kind.SIZE),
    Flag("--max-num-seqs", Kind.INTEGER),
    Flag("--max-parallel-loading-workers", Kind.INTEGER),
    Flag("--media-io-kwargs", Kind.JSON),
    Flag("--middleware", Kind.TEXT),
    Flag("--mm-device-do-normalize", Kind.SWITCH, negatable=True),
    Flag("--mm-encoder-attn-backend", Kind.TEXT),
    Flag(
        "--mm-encoder-attn-dtype",
        Kind.TEXT,
        choices=(
            "fp8",
            "None",
        ),
    ),
    Flag("--mm-encoder-fp8-scale-path", Kind.TEXT),
    Flag("--mm-encoder-fp8-scale-save-margin", Kind.NUMBER),
    Flag("--mm-encoder-fp8-scale-save-path", Kind.TEXT),
    Flag("--mm-encoder-only", Kind.SWITCH, negatable=True),
    Flag(
        "--mm-encoder-tp-mode",
        Kind.TEXT,
        choices=(
            "data",
            "weights",
        ),
    ),
    Flag(
        "--mm-hasher-algorithm",
        Kind.TEXT,
        choices=(
            "blake3",
            "sha256",
            "sha512",
        ),
    ),
    Flag("--mm-ipc-gpu-memory-gb", Kind.NUMBER),
    Flag("--mm-processor-cache-gb", Kind.NUMBER),
    Flag(
        "--mm-processor-cache-type",
        Kind.TEXT,
        choices=(
            "lru",
            "shm",
        ),
    ),
    Flag(
        "--mm-processor-device",
        Kind.TEXT,
        choices=(
            "auto",
            "cpu",
        ),
    ),
    Flag("--mm-processor-kwargs", Kind.JSON),
    Flag("--mm-shm-cache-max-object-size-mb", Kind.INTEGER),
    Flag(
        "--mm-tensor-ipc",
        Kind.TEXT,
        choices=(
            "direct_rpc",
            "torch_shm",
        ),
    ),
    Flag("--model", Kind.TEXT),
    Flag("--model-class-overrides", Kind.JSON),
    Flag("--model-impl", Kind.TEXT),
    Flag("--model-loader-extra-config", Kind.TEXT),
    Flag(
        "--moe-backend",
        Kind.TEXT,
        choices=(
            "aiter",
            "aiter_mega_moe",
            "aiter_triton_mxfp4_bf16",
            "auto",
            "b12x",
            "batched_triton",
            "cutlass",
            "deep_gemm",
            "deep_gemm_mega_moe",
            "emulation",
            "flashinfer_b12x",
            "flashinfer_cutedsl",
            "flashinfer_cutlass",
            "flashinfer_moe_ep_cutedsl",
            "flashinfer_moe_ep_mega_deep_gemm",
            "flashinfer_trtllm",
            "flydsl",
            "hpc",
            "humming",
            "marlin",
            "rdna3",
            "triton",
            "triton_unfused",
        ),
    ),
    Flag("--nnodes", Kind.INTEGER, aliases=("-n",)),
    Flag("--node-rank", Kind.INTEGER, aliases=("-r",)),
    Flag("--num-gpu-blocks-override", Kind.INTEGER),
    Flag("--numa-bind", Kind.SWITCH, negatable=True),
    Flag("--numa-bind-cpus", Kind.TEXT, many=True),
    Flag("--numa-bind-nodes", Kind.INTEGER, many=True),
    Flag(
        "--offload-backend",
        Kind.TEXT,
        choices=(
            "auto",
            "prefetch",
            "uva",
        ),
    ),
    Flag("--offload-group-size", Kind.INTEGER),
    Flag("--offload-num-in-group", Kind.INTEGER),
    Flag("--offload-params", Kind.TEXT, many=True),
    Flag("--offload-prefetch-step", Kind.INTEGER),
    Flag("--optimization-level", Kind.TEXT),
    Flag("--otlp-traces-endpoint", Kind.TEXT),
    Flag("--override-generation-config", Kind.JSON),
    Flag(
        "--per-request-spec-decode-metrics",
        Kind.TEXT,
        choices=(
            "detailed",
            "none",
            "summary",
        ),
    ),
    Flag(
        "--performance-mode",
        Kind.TEXT,
        choices=(
            "balanced",
            "interactivity",
            "throughput",
        ),
    ),
    Flag("--pipeline-parallel-size", Kind.INTEGER, aliases=("-pp",)),
    Flag("--pooler-config", Kind.JSON),
    Flag("--port", Kind.INTEGER),
    Flag("--prefill-context-parallel-size", Kind.INTEGER, aliases=("-pcp",)),
    Flag("--prefill-schedule-interval", Kind.INTEGER),
    Flag("--prefix-cache-retention-interval", Kind.INTEGER),
    Flag(
        "--prefix-caching-hash-algo",
        Kind.TEXT,
        choices=(
            "sha256",
            "sha256_cbor",
            "xxhash",
            "xxhash_cbor",
        ),
    ),
    Flag("--prefix-match-unit", Kind.INTEGER),
    Flag("--profiler-config", Kind.JSON),
    Flag("--pt-load-map-location", Kind.TEXT),
    Flag("--quantization", Kind.TEXT, aliases=("-q",)),
    Flag("--quantization-config", Kind.JSON),
    Flag("--ray-workers-use-nsight", Kind.SWITCH, negatable=True),
    Flag("--reasoning-config", Kind.JSON),
    Flag("--reasoning-parser", Kind.TEXT),
    Flag("--reasoning-parser-plugin", Kind.TEXT),
    Flag("--renderer-num-workers", Kind.INTEGER),
    Flag("--replayssm-buffer-len", Kind.INTEGER),
    Flag("--response-role", Kind.TEXT),
    Flag("--return-sampling-mask", Kind.SWITCH, negatable=True),
    Flag("--return-tokens-as-token-ids", Kind.SWITCH, negatable=True),
    Flag("--revision", Kind.TEXT),
    Flag("--root-path", Kind.TEXT),
    Flag(
        "--runner",
        Kind.TEXT,
        choices=(
            "auto",
            "draft",
            "generate",
            "pooling",
        ),
    ),
    Flag(
        "--safetensors-load-strategy",
        Kind.TEXT,
        choices=(
            "eager",
            "lazy",
            "prefetch",
            "torchao",
            "None",
        ),
    ),
    Flag("--safetensors-prefetch-block-size", Kind.SIZE),
    Flag("--safetensors-prefetch-num-threads", Kind.INTEGER),
    Flag("--scheduler-cls", Kind.TEXT),
    Flag("--scheduler-reserve-full-isl", Kind.SWITCH, negatable=True),
    Flag(
        "--scheduling-policy",
        Kind.TEXT,
        choices=(
            "fcfs",
            "priority",
        ),
    ),
    Flag("--seed", Kind.INTEGER),
    Flag("--served-model-name", Kind.TEXT, many=True),
    Flag("--show-hidden-metrics-for-version", Kind.TEXT),
    Flag("--shutdown-timeout", Kind.INTEGER),
    Flag("--skip-mm-profiling", Kind.SWITCH, negatable=True),
    Flag("--skip-tokenizer-init", Kind.SWITCH, negatable=True),
    Flag("--sleep-mode-offload-cudagraph", Kind.SWITCH, negatable=True),
    Flag("--sleep-preserve-parameter-names", Kind.TEXT, many=True),
    Flag(
        "--sparse-indexer-topk-backend",
        Kind.TEXT,
        choices=(
            "aiter",
            "auto",
            "cooperative",
            "deep_select",
            "flashinfer",
            "per_row",
            "persistent",
            "torch",
        ),
    ),
    Flag(
        "--spec-method",
        Kind.TEXT,
        choices=(
            "bailing_hybrid_mtp",
            "bailing_hybrid_v3_mtp",
            "custom_class",
            "deepseek_mtp",
            "dflash",
            "dots3_note_mtp",
            "draft_model",
            "dspark",
            "eagle",
            "eagle3",
            "ernie_mtp",
            "exaone4_5_mtp",
            "exaone_moe_mtp",
            "extract_hidden_states",
            "gemma4_mtp",
            "glm4_moe_lite_mtp",
            "glm4_moe_mtp",
            "glm5_next_mtp",
            "glm_ocr_mtp",
            "hy_v3_mtp",
            "hy_v4_mtp",
            "inkling_mtp",
            "kimi_k3_mtp",
            "longcat_flash_mtp",
            "medusa",
            "mimo_mtp",
            "mimo_v2_mtp",
            "minimax_m3_mtp",
            "mlp_speculator",
            "mtp",
            "nemotron_h_mtp",
            "ngram",
            "ngram_gpu",
            "pangu_ultra_moe_mtp",
            "qwen3_5_mtp",
            "qwen3_next_mtp",
            "qwen4_exp_mtp",
            "step3p5_mtp",
            "suffix",
            "None",
        ),
    ),
    Flag("--spec-model", Kind.TEXT),
    Flag("--spec-tokens", Kind.INTEGER),
    Flag("--specialize-active-lora", Kind.SWITCH, negatable=True),
    Flag("--speculative-config", Kind.JSON, aliases=("-sc",)),
    Flag("--sse-keep-alive-interval", Kind.INTEGER),
    Flag("--ssl-ca-certs", Kind.TEXT),
    Flag("--ssl-cert-reqs", Kind.INTEGER),
    Flag("--ssl-certfile", Kind.TEXT),
    Flag("--ssl-ciphers", Kind.TEXT),
    Flag("--ssl-keyfile", Kind.TEXT),
    Flag("--stream-interval", Kind.INTEGER),
    Flag("--structured-outputs-config", Kind.JSON),
    Flag("--swa-bounded-replay", Kind.SWITCH, negatable=True),
    Flag("--tensor-parallel-size", Kind.INTEGER, aliases=("-tp",)),
    Flag("--tokenizer", Kind.TEXT),
    Flag("--tokenizer-mode", Kind.TEXT),
    Flag("--tokenizer-revision", Kind.TEXT),
    Flag("--tokens-only", Kind.SWITCH, negatable=True),
    Flag(
        "--tool-call-parser",
        Kind.TEXT,
        choices=(
            "apertus",
            "cohere_command3",
            "cohere_command4",
            "deepseek_v3",
            "deepseek_v31",
            "deepseek_v32",
            "deepseek_v4",
            "deepseek_v41",
            "dots",
            "ernie45",
            "functiongemma",
            "gemma4",
            "gigachat3",
            "glm45",
            "glm47",
            "granite",
            "granite-20b-fc",
            "granite4",
            "hermes",
            "hf",
            "hunyuan_a13b",
            "hy_v3",
            "hy_v4",
            "inkling",
            "internlm",
            "jamba",
            "k2_horizon",
            "kimi_k2",
            "kimi_k3",
            "lfm2",
            "ling3",
            "llama3_json",
            "llama4_json",
            "llama4_pythonic",
            "longcat",
            "mimo",
            "minicpm5",
            "minimax_m2",
            "minimax_m3",
            "mistral",
            "muse_glimmer",
            "olmo3",
            "openai",
            "phi4_mini_json",
            "plamo3",
            "poolside_v1",
            "pythonic",
            "qwen3_coder",
            "qwen3_json",
            "qwen3_xml",
            "seed_oss",
            "step3",
            "step3p5",
            "xlam",
        ),
    ),
    Flag("--tool-parser-plugin", Kind.TEXT),
    Flag("--tool-server", Kind.TEXT),
    Flag(
        "--tool-strict-level",
        Kind.TEXT,
        choices=(
            "auto",
            "function",
            "parameter",
        ),
    ),
    Flag("--trust-remote-code", Kind.SWITCH, negatable=True),
    Flag("--trust-request-chat-template", Kind.SWITCH, negatable=True),
    Flag("--trust-request-mm-kwargs", Kind.SWITCH, negatable=True),
    Flag("--ubatch-size", Kind.INTEGER),
    Flag("--uds", Kind.TEXT),
    Flag("--use-fp64-gumbel", Kind.SWITCH, negatable=True),
    Flag("--use-replayssm", Kind.SWITCH, negatable=True),
    Flag("--use-tqdm-on-load", Kind.SWITCH, negatable=True),
    Flag(
        "--uvicorn-log-level",
        Kind.TEXT,
        choices=(
            "critical",
            "debug",
            "error",
            "info",
            "trace",
            "warning",
        ),
    ),
    Flag(
        "--video-pruning-method",
        Kind.TEXT,
        choices=(
            "evs",
            "vidcom2",
        ),
    ),
    Flag("--video-pruning-rate", Kind.NUMBER),
    Flag("--watermark", Kind.NUMBER),
    Flag("--watermark-config", Kind.JSON),
    Flag("--weight-transfer-config", Kind.JSON),
    Flag("--worker-cls", Kind.TEXT),
    Flag("--worker-extension-cls", Kind.TEXT),
)
"""Every flag of vLLM 0.32, by name."""
