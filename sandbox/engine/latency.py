"""A pure model of an engine with continuous batching: what each step computes, and how long it takes.

No clock and no I/O in here. `Scheduler` decides which sequences a step advances, `LatencyModel` says how long the
step lasts, and whoever holds a clock drives them: the server with the wall clock, `simulate` with a virtual one.
So the curve that a load sweep measures on the server has a truth to be compared with: `true_knee`.

Simulated as vLLM's V1 scheduler does it: first come, first served; running sequences first; chunked prefill within
`max_num_batched_tokens`; a KV cache in blocks, whole prompts reserved on admission; preemption of the youngest
running sequence by recomputation; prefix caching of full prompt blocks with least-recently-used eviction.
Not simulated: prefix caching of generated tokens, priorities, speculative decoding, several engines behind one server.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Duration of one engine step: linear in what the step does, as roofline arithmetic gives it.

    Decoding reads all weights once (`base_s`), does a little work per sequence (`per_sequence_s`) and reads the
    sequences' KV cache (`per_kv_token_s`); prefill is compute-bound (`per_prefill_token_s`). All in seconds.
    """

    base_s: float
    per_sequence_s: float
    per_kv_token_s: float
    per_prefill_token_s: float

    def __post_init__(self) -> None:
        for each in fields(self):
            if not (math.isfinite(getattr(self, each.name)) and getattr(self, each.name) >= 0):
                raise ValueError(f"{each.name} must be a duration of 0 s or more, not {getattr(self, each.name)!r}")
        if self.base_s <= 0:
            raise ValueError("base_s must be more than 0 s: a step without a duration would let time stand still")

    def step_s(self, *, decodes: float, kv_tokens: float, prefill_tokens: float) -> float:
        """Seconds for a step that decodes `decodes` sequences holding `kv_tokens`, and prefills `prefill_tokens`."""
        return (
            self.base_s
            + self.per_sequence_s * decodes
            + self.per_kv_token_s * kv_tokens
            + self.per_prefill_token_s * prefill_tokens
        )


@dataclass(frozen=True, slots=True)
class EngineParameters:
    """Everything that decides an engine's throughput."""

    latency: LatencyModel
    max_num_seqs: int = 256
    """Sequences that may run at once."""
    max_num_batched_tokens: int = 8192
    """Tokens that one step may compute: one per decoding sequence, the rest for prefill."""
    kv_cache_tokens: int = 1_000_000
    """Size of the KV cache; what does not fit waits, and what outgrows it is preempted."""
    block_size: int = 16
    """Tokens per KV-cache block (vLLM's default on GPUs)."""
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")

    @property
    def kv_blocks(self) -> int:
        return self.kv_cache_tokens // self.block_size


@dataclass(frozen=True, slots=True)
class LatencySettings:
    """What `SANDBOX_ENGINE_LATENCY` holds: a latency model, and limits below those that the arguments give."""

    latency: LatencyModel
    max_num_seqs: int | None = None
    """Cap on `--max-num-seqs`, as if the GPU were this small; None leaves the argument alone."""
    kv_cache_tokens: int | None = None
    """Size of the KV cache instead of the one that GPU memory gives; None computes it."""


PRESETS: dict[str, LatencySettings] = {
    # Chosen for the rehearsal: with prompts of 100 and answers of 32 tokens it saturates at 37 requests/s with 32
    # running, so a sweep finds the knee within seconds and well below what two cores can stream and measure.
    "rehearsal": LatencySettings(
        LatencyModel(base_s=0.005, per_sequence_s=0.0006, per_kv_token_s=2e-7, per_prefill_token_s=3e-5),
        max_num_seqs=32,
    ),
    # Gemma 4 31B in bf16 on one H100 (3.35 TB/s, 989 dense TFLOP/s at 50 %): 62.5 GB / 3.35 TB/s = 18.7 ms; 0.5 MB of
    # KV per token / 3.35 TB/s = 0.15 µs; 2 × 31.3e9 FLOP / 495e12 = 126 µs. Sampling and kernels: 30 µs a sequence.
    "h100-gemma4-31b": LatencySettings(
        LatencyModel(base_s=0.0187, per_sequence_s=3e-5, per_kv_token_s=1.5e-7, per_prefill_token_s=1.26e-4)
    ),
    # A mixture of experts with 3.8B active parameters: reads most experts once the batch is large, computes few.
    "h100-gemma4-26b-a4b": LatencySettings(
        LatencyModel(base_s=0.0075, per_sequence_s=9e-5, per_kv_token_s=7e-8, per_prefill_token_s=1.6e-5)
    ),
    # Real vLLM on two CPU cores with SmolLM2-135M in float32: 62 output tokens/s at 20 streams.
    "cpu-smollm2": LatencySettings(
        LatencyModel(base_s=0.09, per_sequence_s=0.0115, per_kv_token_s=1e-6, per_prefill_token_s=4e-3)
    ),
}
DEFAULT_PRESET = "rehearsal"


def latency_settings(text: str | None) -> LatencySettings:
    """Read `SANDBOX_ENGINE_LATENCY`: a preset's name, or a JSON object with `preset` and any field to replace.

    ValueError names what is wrong; a misspelt field must not silently leave the preset's value.
    """
    if not text:
        return PRESETS[DEFAULT_PRESET]
    if not text.lstrip().startswith("{"):
        return _preset(text.strip())
    values = json.loads(text)
    settings = _preset(values.pop("preset", DEFAULT_PRESET))
    model_fields = {each.name for each in fields(LatencyModel)}
    limits = {"max_num_seqs", "kv_cache_tokens"}
    if unknown := set(values) - model_fields - limits:
        raise ValueError(f"unknown latency fields {sorted(unknown)}; known: {sorted(model_fields | limits)}")
    latency = replace(settings.latency, **{name: float(values[name]) for name in model_fields & set(values)})
    return replace(settings, latency=latency, **{name: int(values[name]) for name in limits & set(values)})


def _preset(name: str) -> LatencySettings:
    if name not in PRESETS:
        raise ValueError(f"unknown latency preset {name!r}; known: {sorted(PRESETS)}")
    return PRESETS[name]


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. The caller fills the first three; the scheduler owns the rest."""

    prompt_tokens: int
    output_tokens: int
    """Tokens that it will generate, known in advance because the answer is."""
    block_hashes: tuple[int, ...] = ()
    """Hash of each full prompt block *and all before it*; empty opts out of prefix caching."""
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    generated: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied on first admission."""
    preemptions: int = 0
    finished: bool = False
    admitted: bool = False
    """Whether it ran at least once (a preempted sequence keeps it)."""
    scheduled_tokens: int = 0
    private_blocks: int = 0
    shared_hashes: list[int] = field(default_factory=list)

    @property
    def known_tokens(self) -> int:
        return self.prompt_tokens + self.generated


@dataclass(slots=True)
class Step:
    """What one engine step computes."""

    duration_s: float
    sequences: list[Sequence]
    decodes: int
    prefill_tokens: int
    admitted: list[Sequence]
    """Those that run for the first time."""
    preempted: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefill_tokens


class KvCache:
    """Blocks of the KV cache: free, private to a sequence, or shared prefixes (referenced or idle)."""

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._free = blocks
        self._references: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be had now, idle prefixes included."""
        return self._free + len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.available

    def take(self, count: int) -> bool:
        """Take `count` private blocks, evicting idle prefixes as needed; False leaves everything as it was."""
        if count > self.available:
            return False
        while self._free < count:
            evicted, _ = self._idle.popitem(last=False)
            del self._references[evicted]
            self._free += 1
        self._free -= count
        return True

    def give_back(self, count: int) -> None:
        self._free += count

    def longest_prefix(self, hashes: SequenceOf[int], limit: int) -> list[int]:
        """The leading hashes, `limit` at most, whose blocks are in the cache."""
        hits: list[int] = []
        for each in hashes[:limit]:
            if each not in self._references:
                break
            hits.append(each)
        return hits

    def acquire(self, hashes: Iterable[int]) -> None:
        for each in hashes:
            self._references[each] += 1
            self._idle.pop(each, None)

    def publish(self, block_hash: int) -> bool:
        """Turn a private block into a shared one; False when another sequence published the same content."""
        if block_hash in self._references:
            return False
        self._references[block_hash] = 1
        return True

    def release(self, hashes: Iterable[int]) -> None:
        for each in hashes:
            self._references[each] -= 1
            if self._references[each] == 0:
                self._idle[each] = None


class Scheduler:
    """Which sequences each step advances. Drive it with `begin_step` and `end_step` in turn."""

    def __init__(self, parameters: EngineParameters) -> None:
        self.parameters = parameters
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.cache = KvCache(parameters.kv_blocks)
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; ValueError when it could never run because the whole cache is too small for it."""
        longest = sequence.prompt_tokens + sequence.output_tokens
        if self._blocks_for(longest) > self.cache.total:
            raise ValueError(f"{longest} tokens do not fit in a KV cache of {self.parameters.kv_cache_tokens}")
        if sequence.prompt_tokens < 1 or sequence.output_tokens < 1:
            raise ValueError("a sequence needs at least one prompt token and one output token")
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; also safe between `begin_step` and `end_step`."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free(sequence)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return self.cache.used / self.cache.total

    def begin_step(self) -> Step | None:
        """Decide the next step; None when there is nothing to compute."""
        if not self.running and not self.waiting:
            return None
        budget = self.parameters.max_num_batched_tokens
        scheduled: list[Sequence] = []
        decodes = kv_tokens = prefill_tokens = 0
        preemptions_before = self.preemptions
        block_size = self.parameters.block_size
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            # The inner loop of everything here: properties and calls would double its cost.
            known = sequence.prompt_tokens + sequence.generated
            missing = known - sequence.computed
            held = (sequence.private_blocks + len(sequence.shared_hashes)) * block_size
            if known > held and not self._grow(sequence):
                break  # it was itself the youngest, and is waiting again
            if missing == 1:
                sequence.scheduled_tokens = 1
                decodes += 1
                kv_tokens += sequence.computed
            else:
                sequence.scheduled_tokens = min(missing, budget)
                prefill_tokens += sequence.scheduled_tokens
            budget -= sequence.scheduled_tokens
            scheduled.append(sequence)
            index += 1
        admitted: list[Sequence] = []
        if self.preemptions == preemptions_before:
            while self.waiting and budget > 0 and len(self.running) < self.parameters.max_num_seqs:
                sequence = self.waiting[0]
                first_time = not sequence.admitted
                if not self._admit(sequence):
                    break
                sequence.scheduled_tokens = min(sequence.known_tokens - sequence.computed, budget)
                prefill_tokens += sequence.scheduled_tokens
                budget -= sequence.scheduled_tokens
                scheduled.append(sequence)
                if first_time:
                    admitted.append(sequence)
        duration_s = self.parameters.latency.step_s(decodes=decodes, kv_tokens=kv_tokens, prefill_tokens=prefill_tokens)
        return Step(duration_s, scheduled, decodes, prefill_tokens, admitted, self.preemptions - preemptions_before)

    def end_step(self, step: Step) -> list[Sequence]:
        """Apply a step and return the sequences that generated a token in it; the finished ones are out."""
        emitted: list[Sequence] = []
        any_finished = False
        for sequence in step.sequences:
            if sequence.finished:  # aborted while the step ran
                continue
            known = sequence.prompt_tokens + sequence.generated
            sequence.computed += sequence.scheduled_tokens
            if sequence.block_hashes and sequence.generated == 0:
                self._publish_prefix(sequence)
            if sequence.computed < known:
                continue
            sequence.generated += 1
            emitted.append(sequence)
            if sequence.generated >= sequence.output_tokens:
                sequence.finished = True
                any_finished = True
                self._free(sequence)
        if any_finished:
            self.running = [sequence for sequence in self.running if not sequence.finished]
        return emitted

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.parameters.block_size)

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence its cached prefix and blocks for all its known tokens."""
        hits: list[int] = []
        if self.parameters.prefix_caching:
            # The last token is always computed: its logits are the first output.
            limit = (sequence.known_tokens - 1) // self.parameters.block_size
            hits = self.cache.longest_prefix(sequence.block_hashes, limit)
        self.cache.acquire(hits)
        if not self.cache.take(self._blocks_for(sequence.known_tokens) - len(hits)):
            self.cache.release(hits)
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.private_blocks = self._blocks_for(sequence.known_tokens) - len(hits)
        sequence.shared_hashes = hits
        sequence.computed = len(hits) * self.parameters.block_size
        if not sequence.admitted:
            sequence.admitted = True
            sequence.cached_tokens = sequence.computed
            self.prefix_queried_tokens += sequence.prompt_tokens
            self.prefix_hit_tokens += sequence.computed
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """One more block for a decoding sequence, preempting the youngest running ones until there is one."""
        while not self.cache.take(1):
            victim = self.running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.private_blocks += 1
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _publish_prefix(self, sequence: Sequence) -> None:
        if not self.parameters.prefix_caching:
            return
        full = min(sequence.computed // self.parameters.block_size, len(sequence.block_hashes))
        for block_hash in sequence.block_hashes[len(sequence.shared_hashes) : full]:
            if not self.cache.publish(block_hash):
                break  # someone else computed the same prefix at the same time: keep the rest private
            sequence.private_blocks -= 1
            sequence.shared_hashes.append(block_hash)

    def _free(self, sequence: Sequence) -> None:
        self.cache.give_back(sequence.private_blocks)
        # Last block first: the start of a prefix serves more requests, so it must be evicted last.
        self.cache.release(reversed(sequence.shared_hashes))
        sequence.private_blocks = 0
        sequence.shared_hashes = []


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of the simulation."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()


@dataclass(slots=True)
class RequestTiming:
    """When what happened to one simulated request, in seconds of the simulation."""

    arrival: Arrival
    scheduled_s: float = math.nan
    first_token_s: float = math.nan
    finished_s: float = math.nan
    preemptions: int = 0

    @property
    def time_to_first_token_s(self) -> float:
        return self.first_token_s - self.arrival.at_s

    @property
    def queue_s(self) -> float:
        return self.scheduled_s - self.arrival.at_s

    @property
    def end_to_end_s(self) -> float:
        return self.finished_s - self.arrival.at_s

    @property
    def time_per_output_token_s(self) -> float:
        """Mean time between tokens after the first; 0 for an answer of one token."""
        return (self.finished_s - self.first_token_s) / max(1, self.arrival.output_tokens - 1)


StepObserver = Callable[[float, Step, Scheduler], None]
"""Called at the end of each simulated step with the time, the step, and the scheduler after it."""


def simulate(
    parameters: EngineParameters, arrivals: Iterable[Arrival], *, on_step: StepObserver | None = None
) -> list[RequestTiming]:
    """Play `arrivals` through an engine in virtual time until the last answer is complete.

    Deterministic; the result is in order of arrival. A request that comes while a step runs waits for its end.
    """
    timings = [RequestTiming(arrival) for arrival in sorted(arrivals, key=lambda arrival: arrival.at_s)]
    scheduler = Scheduler(parameters)
    of_sequence: dict[int, RequestTiming] = {}
    now_s = 0.0
    next_arrival = 0
    while True:
        while next_arrival < len(timings) and timings[next_arrival].arrival.at_s <= now_s:
            arrival = timings[next_arrival].arrival
            sequence = Sequence(arrival.prompt_tokens, arrival.output_tokens, arrival.block_hashes)
            of_sequence[id(sequence)] = timings[next_arrival]
            scheduler.add(sequence)
            next_arrival += 1
        step = scheduler.begin_step()
        if step is None:
            if next_arrival == len(timings):
                return timings
            now_s = timings[next_arrival].arrival.at_s
            continue
        for sequence in step.admitted:
            of_sequence[id(sequence)].scheduled_s = now_s
        now_s += step.duration_s
        for sequence in scheduler.end_step(step):
            if sequence.generated == 1:
                of_sequence[id(sequence)].first_token_s = now_s
            if sequence.finished:
                # Popped at once: CPython may give the next sequence the same id.
                timing = of_sequence.pop(id(sequence))
                timing.finished_s = now_s
                timing.preemptions = sequence.preemptions
        if on_step is not None:
            on_step(now_s, step, scheduler)


def saturation_by_simulation(
    parameters: EngineParameters, workload: SequenceOf[tuple[int, int]], *, requests: int = 2000
) -> float:
    """Requests/s that leave an engine whose queue is never empty, measured over the middle half of `requests`.

    The truth for a KV-bound engine, whose preemptions `true_knee` leaves out. `workload` is repeated in its order.
    """
    arrivals = [Arrival(0.0, *workload[index % len(workload)]) for index in range(requests)]
    finished = sorted(timing.finished_s for timing in simulate(parameters, arrivals))
    first, last = requests // 4, requests * 3 // 4
    return (last - first) / (finished[last] - finished[first])


@dataclass(frozen=True, slots=True)
class Knee:
    """Where an engine saturates."""

    requests_per_s: float
    output_tokens_per_s: float
    running: float
    """Sequences that run at once at saturation."""
    limited_by: str
    """`max_num_seqs`, `kv_cache_tokens` or `max_num_batched_tokens`."""


def true_knee(parameters: EngineParameters, workload: SequenceOf[tuple[int, int]]) -> Knee:
    """Throughput at saturation for requests drawn evenly from `workload`: (prompt, output) tokens, no shared prefixes.

    In steady state `r` requests start per step. Each holds a slot for one prefill step and one decode step per
    further token, so `running = r · (1 + decodes)`, bounded by `max_num_seqs`, by the KV cache and by the token
    budget `r · (prompt + decodes) ≤ max_num_batched_tokens`; a step lasts `LatencyModel.step_s` of the means, and
    throughput is `r / step`. Preemptions are left out, so a KV-bound engine saturates below this, by up to a fifth
    where answers are long; `saturation_by_simulation` knows.
    """
    count = len(workload)
    prompt = sum(prompt for prompt, _ in workload) / count
    output = sum(output for _, output in workload) / count
    decodes = sum(output - 1 for _, output in workload) / count
    # Σ over the decode steps of the tokens in the cache: prompt + 0 … prompt + output - 2.
    decoded_context = sum(p * (o - 1) + (o - 1) * (o - 2) / 2 for p, o in workload) / count
    # On average half a block of each sequence is unused.
    held_tokens = (prompt + decoded_context) / (1 + decodes) + parameters.block_size / 2
    limits = {
        "max_num_seqs": parameters.max_num_seqs / (1 + decodes),
        "kv_cache_tokens": parameters.kv_cache_tokens / held_tokens / (1 + decodes),
        "max_num_batched_tokens": parameters.max_num_batched_tokens / (prompt + decodes),
    }
    limited_by = min(limits, key=lambda name: limits[name])
    started_per_step = limits[limited_by]
    step_s = parameters.latency.step_s(
        decodes=started_per_step * decodes,
        kv_tokens=started_per_step * decoded_context,
        prefill_tokens=started_per_step * prompt,
    )
    requests_per_s = started_per_step / step_s
    return Knee(requests_per_s, requests_per_s * output, started_per_step * (1 + decodes), limited_by)
