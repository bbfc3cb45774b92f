"""Which vLLM flags fit a model on an accelerator: tensor parallelism, context, sequences, quantisation, with the sum.

More accelerators of one machine come before quantisation, because quantisation changes answers and GPUs do not.
"""

from __future__ import annotations

from collections.abc import Iterator

from rollout.accelerators import GIB, AcceleratorKind, AcceleratorType
from rollout.errors import BadInput
from rollout.fit import FP8_FLAGS, MemoryFit, ModelShape, kv_bytes_per_value, memory_fit, model_shape
from rollout.model_facts import ModelFacts
from rollout.serving import Accelerator, ServingSpec
from rollout.values import Value

FULL_CONTEXTS = 4
"""The KV cache must hold this many sequences of the whole context window: vLLM itself starts with one, and then serves
long requests one after the other."""

TYPICAL_SEQUENCES = 16
"""…and this many of the use case's length, or batching has nothing to work with."""

MAX_NUM_SEQS = 256
"""vLLM's own default; more sequences than fit into the KV cache only preempt one another."""

_CONTEXTS = (262_144, 131_072, 65_536, 32_768, 16_384, 8192, 4096, 2048)


class Sizing(Value):
    """Flags that fit, and why."""

    accelerator_count: int
    max_model_len: int
    max_num_seqs: int
    extra_args: tuple[str, ...]
    """`--quantization=fp8`, `--kv-cache-dtype=fp8`, or nothing."""
    fit: MemoryFit
    arithmetic: tuple[str, ...]
    """Lines for the manifest's comments."""


def size_serving(
    facts: ModelFacts, accelerator: AcceleratorType, *, tokens_per_request: int, count: int | None = None
) -> Sizing:
    """The smallest number of accelerators (or `count`) that serves requests of `tokens_per_request` tokens.

    Raises BadInput if not even the largest machine does with FP8 weights, or config.json does not say enough.
    """
    shape = model_shape(facts.config)
    if shape is None:
        raise BadInput(
            "config.json does not state layers, heads and context length.",
            where=facts.repo_id,
            resolution="Give the repository's whole config.json.",
        )
    if tokens_per_request > shape.max_position_embeddings:
        raise BadInput(
            f"requests of {tokens_per_request} tokens exceed the model's context of {shape.max_position_embeddings}.",
            where=facts.repo_id,
            resolution="Choose another --use-case or model.",
        )
    counts = _counts(facts, accelerator, count)
    for flags in _quantisations(accelerator, facts):
        for gpus in counts:
            sizing = _fitting(facts, shape, accelerator, gpus, flags, tokens_per_request)
            if sizing is not None:
                return sizing
    largest = memory_fit(facts.weights_bytes, shape, _candidate(accelerator, counts[-1], (), None), accelerator)
    raise BadInput(
        f"{facts.repo_id} does not fit on {counts[-1]} x {accelerator.name}: {largest.arithmetic()}.",
        where="--accelerator-type",
        resolution="Choose an accelerator with more memory.",
    )


def _counts(facts: ModelFacts, accelerator: AcceleratorType, count: int | None) -> tuple[int, ...]:
    text = facts.config.get("text_config") or facts.config
    heads = int(text["num_attention_heads"])
    if count is not None:
        if heads % count:
            raise BadInput(
                f"{heads} attention heads cannot be divided over {count} accelerators.",
                where="--accelerator-count",
                resolution="vLLM needs a divisor for tensor parallelism.",
            )
        accelerator.machine_for(count)
        return (count,)
    if accelerator.kind is AcceleratorKind.TPU:
        return tuple(each for each in accelerator.topologies if heads % each == 0)
    # A pod may take some of a machine's GPUs.
    return tuple(each for each in (1, 2, 4, 8, 16) if each <= accelerator.counts[-1] and heads % each == 0)


def _quantisations(accelerator: AcceleratorType, facts: ModelFacts) -> Iterator[tuple[str, ...]]:
    yield ()
    if accelerator.has_fp8 and facts.allows_fp8_kv_cache:
        yield (FP8_FLAGS[1],)
        if not facts.is_quantised:
            yield FP8_FLAGS


def _fitting(
    facts: ModelFacts,
    shape: ModelShape,
    accelerator: AcceleratorType,
    gpus: int,
    flags: tuple[str, ...],
    tokens: int,
) -> Sizing | None:
    longest = shape.max_position_embeddings
    for context in dict.fromkeys((longest, *(each for each in _CONTEXTS if each < longest))):
        if context < tokens:
            return None
        serving = _candidate(accelerator, gpus, flags, context)
        fit = memory_fit(facts.weights_bytes, shape, serving, accelerator)
        per_request = shape.kv_bytes(tokens, bytes_per_value=kv_bytes_per_value(serving), gpus=gpus)
        sequences = int(fit.kv_cache_bytes / per_request)
        if not fit.starts or fit.full_contexts < FULL_CONTEXTS or sequences < TYPICAL_SEQUENCES:
            continue
        return Sizing(
            accelerator_count=gpus,
            max_model_len=context,
            max_num_seqs=min(MAX_NUM_SEQS, sequences),
            extra_args=flags,
            fit=fit,
            arithmetic=_arithmetic(facts, accelerator, gpus, flags, fit, tokens, sequences, per_request),
        )
    return None


def _candidate(accelerator: AcceleratorType, gpus: int, flags: tuple[str, ...], context: int | None) -> ServingSpec:
    machine = accelerator.machine_for(gpus)
    return ServingSpec(
        served_model_name="sizing",
        accelerator=Accelerator(
            type=accelerator.name,
            count=gpus,
            machine_type=machine.type,
            machine_gpu_count=machine.accelerators,
            compute_class=None,
        ),
        tensor_parallel_size=gpus,
        max_model_len=context,
        extra_args=flags,
    )


def _arithmetic(
    facts: ModelFacts,
    accelerator: AcceleratorType,
    gpus: int,
    flags: tuple[str, ...],
    fit: MemoryFit,
    tokens: int,
    sequences: int,
    per_request: float,
) -> tuple[str, ...]:
    unit = "chip" if accelerator.kind is AcceleratorKind.TPU else "GPU"
    machine = accelerator.machine_for(gpus)
    shared = (
        f"The smallest machine, {machine.type}, has {machine.accelerators} of them: on a Standard cluster other pods"
        " may use the rest, on Autopilot the whole machine is paid for."
    )
    quantised = f" Flags that make it fit: {' '.join(flags)}." if flags else ""
    return (
        f"Memory: {facts.weights_bytes / GIB:.1f} GiB of weights ({facts.source}) over {gpus} x"
        f" {accelerator.memory_gib:g} GiB, --tensor-parallel-size={gpus}, --gpu-memory-utilization=0.9.{quantised}",
        f"Per {unit}: {fit.arithmetic()}.",
        f"A request of {tokens} tokens takes {per_request / GIB:.3f} GiB: {sequences} fit,"
        f" --max-num-seqs={min(MAX_NUM_SEQS, sequences)}.",
        *([shared] if machine.accelerators > gpus else []),
    )
