"""What a benchmark sends: lengths, arrivals and prefix sharing, all drawn from one seed.

A workload says nothing about texts: prompts of exact token counts are the client's business, because they depend on
the model's tokenizer. The lengths and arrival times of a stage depend on `(workload, rate, duration)` alone, so that
two runs, or two engines, send the same load.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from rollout.errors import BadInput
from rollout.values import Value, content_digest

_BEND = 0.7
"""Where `TokenLengths.from_summary` puts its one free knot: half way between the median and the 90th percentile."""


class Arrivals(StrEnum):
    POISSON = "poisson"
    """Independent users: exponential gaps."""
    CONSTANT = "constant"
    """Equal gaps: least noise, and flattering for queues."""


class QuantilePoint(Value):
    """`share` of all requests have at most `tokens` tokens."""

    share: Annotated[float, Field(ge=0, le=1)]
    tokens: Annotated[float, Field(ge=1)]


class TokenLengths(Value):
    """A length distribution in tokens, as a piecewise-linear quantile function."""

    points: Annotated[tuple[QuantilePoint, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _is_a_quantile_function(self) -> TokenLengths:
        shares = [point.share for point in self.points]
        tokens = [point.tokens for point in self.points]
        if shares[0] != 0 or shares[-1] != 1 or any(b <= a for a, b in pairwise(shares)):
            raise ValueError(f"shares must rise from 0 to 1, not {shares}")
        if any(b < a for a, b in pairwise(tokens)):
            raise ValueError(f"token counts must not fall: {tokens}")
        return self

    @classmethod
    def fixed(cls, tokens: int) -> TokenLengths:
        return cls(points=(QuantilePoint(share=0, tokens=tokens), QuantilePoint(share=1, tokens=tokens)))

    @classmethod
    def from_summary(
        cls, *, minimum: float, median: float, mean: float, p90: float, p99: float, maximum: float
    ) -> TokenLengths:
        """The piecewise-linear quantile function through the given points whose mean is `mean`.

        Straight lines through the points alone give, for the quickstart's input (4, 108, 635, 887, 1024),
        0.5·56 + 0.4·371.5 + 0.09·761 + 0.01·955.5 = 254.6 tokens instead of 226: between the median and the 90th
        percentile the real curve sags. One knot at the 70th percentile takes up the difference: its value `v` adds
        0.2·(median + v)/2 + 0.2·(v + p90)/2 = 0.1·(median + p90) + 0.2·v, so v follows from the mean
        (228.3 for the input, 168.9 for the output).

        Raises BadInput if no monotone curve with that knot has that mean.
        """
        below = 0.5 * (minimum + median) / 2
        above = 0.09 * (p90 + p99) / 2 + 0.01 * (p99 + maximum) / 2
        bend = (mean - below - above - 0.1 * (median + p90)) / 0.2
        if not median <= bend <= p90:
            raise BadInput(
                f"no length distribution has mean {mean:g}, median {median:g} and 90th percentile {p90:g}.",
                where="workload",
                resolution="Check the six figures, or give the quantile points themselves.",
            )
        shares = (0.0, 0.5, _BEND, 0.9, 0.99, 1.0)
        tokens = (minimum, median, bend, p90, p99, maximum)
        return cls(points=tuple(QuantilePoint(share=s, tokens=t) for s, t in zip(shares, tokens, strict=True)))

    @property
    def mean(self) -> float:
        return sum((b.share - a.share) * (a.tokens + b.tokens) / 2 for a, b in pairwise(self.points))

    @property
    def maximum(self) -> int:
        return math.ceil(self.points[-1].tokens)

    def quantile(self, share: float) -> float:
        """Tokens that `share` of all requests do not exceed."""
        return float(self._tokens(np.array([share]))[0])

    def sample(self, count: int, random: np.random.Generator) -> np.ndarray:
        """`count` lengths in tokens, shape (count,), integers of at least 1.

        Stratified: one length from each of `count` equally likely slices, in random order. So even a short stage has
        the distribution's mean and quantiles, and two stages differ by what the server does, not by luck.
        """
        shares = (random.permutation(count) + random.random(count)) / max(count, 1)
        return np.maximum(1, np.rint(self._tokens(shares))).astype(int)

    def _tokens(self, shares: np.ndarray) -> np.ndarray:
        return np.interp(shares, [p.share for p in self.points], [p.tokens for p in self.points])


class DatasetEntry(Value):
    """One prompt of an own dataset."""

    prompt: Annotated[str, Field(min_length=1)]
    output_tokens: Annotated[int, Field(ge=1)]


class PrefixSharing(Value):
    """Requests of one group begin with the same tokens, as with a common system prompt."""

    tokens: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a schedule."""

    at_s: float
    """Seconds after the start of the stage."""
    input_tokens: int
    """0 for a dataset entry: its text decides."""
    output_tokens: int
    prefix_group: int | None = None
    prompt: str | None = None
    """The text itself, for datasets."""


class Workload(Value):
    """The load of a benchmark; `schedule` turns it into requests for one rate."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    description: str = ""
    input_lengths: TokenLengths | None = None
    output_lengths: TokenLengths | None = None
    dataset: tuple[DatasetEntry, ...] = ()
    """Own prompts instead of lengths; used in random order, again from the start when they run out."""
    arrivals: Arrivals = Arrivals.POISSON
    shared_prefix: PrefixSharing | None = None
    """None: every prompt is unique from its first token, so the prefix cache cannot help."""
    seed: int = 0

    @model_validator(mode="after")
    def _lengths_or_dataset(self) -> Workload:
        has_lengths = self.input_lengths is not None and self.output_lengths is not None
        if has_lengths == bool(self.dataset) or (self.input_lengths is None) != (self.output_lengths is None):
            raise ValueError("give input_lengths and output_lengths, or a dataset, and not both")
        if self.dataset and self.shared_prefix:
            raise ValueError("a dataset's prompts share prefixes by themselves: leave shared_prefix out")
        return self

    @property
    def key(self) -> str:
        """Identifies the load itself, whatever it is called or described as: equal keys, comparable curves."""
        return content_digest(self.model_dump(mode="json", exclude={"description"}))

    @property
    def is_lengths_alone(self) -> bool:
        """Whether any tool that draws lengths can send it: no texts of its own, nothing shared."""
        return not self.dataset and self.shared_prefix is None

    @property
    def mean_output_tokens(self) -> float:
        if self.output_lengths is not None:
            return self.output_lengths.mean
        return sum(entry.output_tokens for entry in self.dataset) / len(self.dataset)

    @property
    def max_total_tokens(self) -> int | None:
        """The longest request, prompt and answer; None for datasets, whose prompts no one has counted yet."""
        if self.input_lengths is None or self.output_lengths is None:
            return None
        return self.input_lengths.maximum + self.output_lengths.maximum

    def schedule(self, rate_per_s: float, duration_s: float, *, repeat: int = 0) -> list[PlannedRequest]:
        """The requests of a stage in order of time; at least one. `repeat` draws the same load anew.

        `planned_duration_s` says how long the stage is: `duration_s`, rounded to a whole number of requests.

        Poisson arrivals are drawn given their expected number: that many independent uniform times, which is what a
        Poisson process looks like once its count is known. The offered rate is then exactly `rate_per_s` in every
        stage, and the gaps are still those of independent users.
        """
        if rate_per_s <= 0 or duration_s <= 0:
            raise BadInput(f"a rate of {rate_per_s:g}/s for {duration_s:g} s sends nothing.", where="workload")
        count = _request_count(rate_per_s, duration_s)
        # The rate is part of the seed: stages of different rates must not repeat each other's prompts.
        random = np.random.default_rng([self.seed, repeat, round(rate_per_s * 1e6), count])
        shares = np.sort(random.random(count)) if self.arrivals is Arrivals.POISSON else np.arange(count) / count
        times = shares * planned_duration_s(rate_per_s, duration_s)
        if self.dataset:
            order = [i for _ in range(-(-count // len(self.dataset))) for i in random.permutation(len(self.dataset))]
            entries = (self.dataset[i] for i in order[:count])
            return [
                PlannedRequest(float(at_s), 0, entry.output_tokens, prompt=entry.prompt)
                for at_s, entry in zip(times, entries, strict=True)
            ]
        assert self.input_lengths is not None
        assert self.output_lengths is not None
        inputs = self.input_lengths.sample(count, random)
        outputs = self.output_lengths.sample(count, random)
        groups = random.integers(self.shared_prefix.groups, size=count) if self.shared_prefix else [None] * count
        return [
            PlannedRequest(float(at_s), int(i), int(o), None if g is None else int(g))
            for at_s, i, o, g in zip(times, inputs, outputs, groups, strict=True)
        ]

    def with_limit(self, max_model_len: int) -> Workload:
        """The same workload, cut to what a context window of `max_model_len` tokens holds.

        Lengths are scaled alike where they exceed it, so a small model keeps the shape of the load; the name says so,
        and with it the key, because such a curve is not comparable with the whole workload's.
        """
        longest = self.max_total_tokens
        if longest is None or longest <= max_model_len:
            return self
        assert self.input_lengths is not None
        assert self.output_lengths is not None
        # A few tokens stay free for the start token and the answer's end.
        scale = (max_model_len - 8) / longest
        return self.model_copy(
            update={
                "name": f"{self.name}-within-{max_model_len}",
                "input_lengths": _scaled(self.input_lengths, scale),
                "output_lengths": _scaled(self.output_lengths, scale),
            }
        )


def planned_duration_s(rate_per_s: float, duration_s: float) -> float:
    """The length of a stage, so that a whole number of requests is offered at exactly `rate_per_s`."""
    return _request_count(rate_per_s, duration_s) / rate_per_s


def _request_count(rate_per_s: float, duration_s: float) -> int:
    return max(1, round(rate_per_s * duration_s))


def _scaled(lengths: TokenLengths, scale: float) -> TokenLengths:
    return TokenLengths(
        points=tuple(QuantilePoint(share=p.share, tokens=max(1.0, p.tokens * scale)) for p in lengths.points)
    )


def fixed_workload(input_tokens: int, output_tokens: int, *, name: str | None = None, **fields: Any) -> Workload:
    """Every request alike."""
    return Workload(
        name=name or f"fixed-{input_tokens}-{output_tokens}",
        input_lengths=TokenLengths.fixed(input_tokens),
        output_lengths=TokenLengths.fixed(output_tokens),
        **fields,
    )


QUICKSTART = Workload(
    name="quickstart",
    description="The distribution of GKE Inference Quickstart's own benchmarks (inference-perf)",
    input_lengths=TokenLengths.from_summary(minimum=4, median=108, mean=226, p90=635, p99=887, maximum=1024),
    output_lengths=TokenLengths.from_summary(minimum=1, median=132, mean=195, p90=488, p99=778, maximum=1024),
)
"""https://cloud.google.com/kubernetes-engine/docs/how-to/machine-learning/inference/inference-quickstart#benchmarking"""

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (
        QUICKSTART,
        fixed_workload(8192, 256, name="customer-support", description="Advanced customer support, 32:1"),
        fixed_workload(512, 32, name="code-completion", description="Code completion, 16:1"),
        fixed_workload(1024, 128, name="text-summarization", description="Text summarization, 8:1"),
        fixed_workload(128, 128, name="chatbot", description="Chatbot (ShareGPT), 1:1"),
        fixed_workload(512, 2048, name="text-generation", description="Text generation, 1:4"),
        fixed_workload(256, 4096, name="deep-research", description="Deep research, 1:16"),
    )
}
"""The quickstart's distribution and its six use cases, by name."""


def workload_named(name: str) -> Workload:
    try:
        return WORKLOADS[name]
    except KeyError:
        raise BadInput(
            f"there is no workload {name!r}.", where="workload", resolution=f"Known are {', '.join(WORKLOADS)}."
        ) from None


def _spelled_out(given: object) -> object:
    """A use case's name stands for its workload."""
    if not isinstance(given, str):
        return given
    try:
        return workload_named(given)
    except BadInput as error:
        raise ValueError(f"{error.summary} {error.resolution}") from error


_WorkloadName = Annotated[str, Field(json_schema_extra={"enum": [*WORKLOADS]})]
NamedWorkload = Annotated[Workload, BeforeValidator(_spelled_out, json_schema_input_type=_WorkloadName | Workload)]
"""A field that takes a workload, or the name of one of `WORKLOADS`; it holds the workload itself."""


def dataset_workload(name: str, lines: Iterable[str], *, output_tokens: int = 256, **fields: Any) -> Workload:
    """A workload of own prompts from JSON lines `{"prompt": …, "output_tokens": …}`.

    `output_tokens` stands for lines that have none.

    Raises BadInput with the number of the first line that cannot be used.
    """
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(DatasetEntry.model_validate({"output_tokens": output_tokens, **json.loads(line)}))
        except (ValidationError, ValueError, TypeError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise BadInput(
                f"line {number} is not a prompt: {reason}.",
                where=f"dataset {name}",
                resolution='Each line is a JSON object: {"prompt": "…", "output_tokens": 128}.',
            ) from error
    if not entries:
        raise BadInput("the dataset is empty.", where=f"dataset {name}")
    return Workload(name=name, dataset=tuple(entries), **fields)
