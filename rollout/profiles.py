"""Profiles: what a model on a server on an accelerator delivers, at which latency and cost, and who says so.

GKE Inference Quickstart's own catalogue, our measured curves and files are brought to one form, filtered by one query
and shown in the quickstart's columns. A catalogue predicts, a sweep measures; where both speak of the same thing, the
difference is shown. What a source cannot filter is filtered here, or refused with the reason, never ignored.

Figures are those of one replica; latencies are medians, as in the quickstart's targets.
https://cloud.google.com/kubernetes-engine/docs/how-to/machine-learning/inference/inference-quickstart
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Protocol

from pydantic import Field

from rollout.accelerators import ACCELERATORS
from rollout.benchmark import BenchmarkReport
from rollout.cost import DEFAULT_OUTPUT_TO_INPUT_RATIO, Price, PricingModel, token_cost
from rollout.errors import BadInput, RolloutError
from rollout.stage import LatencyMetric, Percentile, Stage
from rollout.values import Value
from rollout.workload import QUICKSTART, WORKLOADS

SATURATED_SHARE = 0.95
"""The quickstart's inflection point: the lowest load that yields 95 % of the highest throughput; repeated stages of one
rate differ by about 5 %."""

LENGTH_TOLERANCE = 0.2
"""gcloud's `--target-input-length`: profiles within 20 % of the wanted length."""

CHATBOT = "Chatbot (ShareGPT)"
"""What the quickstart assumes where no use case is named."""


UNSTATED_USE_CASES = (CHATBOT, QUICKSTART.name)
"""What a prediction without a use case may be compared with: Google's default, and the lengths of its own benchmark."""


class Evidence(StrEnum):
    PREDICTION = "prediction"
    """Somebody else's measurement, or a model's: it may differ here."""
    MEASUREMENT = "measurement"
    """Our own sweep of a server of ours, or a report of a load generator that the user hands us."""


class Source(Value):
    """Who says so, and when."""

    name: str
    """E.g. `gkerecommender.googleapis.com`, or the path of a file."""
    evidence: Evidence
    as_of: date | None = None
    """The day of the measurement or of the answer; None where a file does not say."""


class UseCase(Value):
    """A workload as the quickstart names it."""

    name: str
    input_tokens: int | None
    """None: a distribution, or not stated by the source."""
    output_tokens: int | None
    description: str
    workload: str = ""
    """Our workload of these lengths; empty where there is none."""

    @property
    def ratio(self) -> str:
        """Input to output tokens, e.g. `32:1` or `1:4`."""
        if not self.input_tokens or not self.output_tokens:
            return ""
        divisor = math.gcd(self.input_tokens, self.output_tokens)
        return f"{self.input_tokens // divisor}:{self.output_tokens // divisor}"


USE_CASES: tuple[UseCase, ...] = (
    UseCase(
        name="Advanced Customer Support",
        input_tokens=8192,
        output_tokens=256,
        description="Comprehensive answers to complex customer questions, to scale support and satisfaction.",
        workload="customer-support",
    ),
    UseCase(
        name="Code Completion",
        input_tokens=512,
        output_tokens=32,
        description="Suggests and completes code.",
        workload="code-completion",
    ),
    UseCase(
        name="Text Summarization",
        input_tokens=1024,
        output_tokens=128,
        description="Condenses documents, articles and conversations.",
        workload="text-summarization",
    ),
    UseCase(
        name=CHATBOT,
        input_tokens=128,
        output_tokens=128,
        description="Conversation in real time: answers, tasks, guidance.",
        workload="chatbot",
    ),
    UseCase(
        name="Text Generation",
        input_tokens=512,
        output_tokens=2048,
        description="New text: e-mails, reports, stories.",
        workload="text-generation",
    ),
    UseCase(
        name="Deep Research",
        input_tokens=256,
        output_tokens=4096,
        description="Analyses and combines much data for facts, patterns and insights.",
        workload="deep-research",
    ),
)
"""The six of the quickstart's table, with its token counts."""

OTHER_USE_CASES: tuple[UseCase, ...] = (
    UseCase(
        name="Multi Agent Large Document Summarization",
        input_tokens=None,
        output_tokens=None,
        description="The quickstart's example for llm-d; it does not state the lengths.",
    ),
    *(
        UseCase(name=each.name, input_tokens=None, output_tokens=None, description=each.description, workload=each.name)
        for each in WORKLOADS.values()
        if each.name not in {use_case.workload for use_case in USE_CASES}
    ),
)
"""Those that the quickstart names elsewhere, and our workloads that stand for none of the six."""


class LoadPoint(Value):
    """One load and what came of it."""

    requests_per_s: float | None = None
    output_tokens_per_s: float
    input_tokens_per_s: float | None = None
    ttft_ms: float | None = None
    ntpot_ms: float | None = None
    itl_ms: float | None = None
    running_requests: float | None = None
    """Requests in flight, as measured."""
    usd_per_million_input_tokens: float | None = None
    usd_per_million_output_tokens: float | None = None

    @property
    def concurrency(self) -> float | None:
        """Requests in flight; by Little's law output tokens/s x NTPOT where it was not measured."""
        if self.running_requests is not None:
            return self.running_requests
        return None if self.ntpot_ms is None else self.output_tokens_per_s * self.ntpot_ms / 1e3


class Targets(Value):
    """Upper limits on median latencies in milliseconds, as in the quickstart; None: no limit."""

    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    ntpot_ms: Annotated[float, Field(gt=0)] | None = None
    itl_ms: Annotated[float, Field(gt=0)] | None = None

    def given(self) -> dict[str, float]:
        """Field of `LoadPoint` -> limit, of those that are set."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class LatencyRange(Value):
    """What a metric was observed to be, from the least load to saturation."""

    metric: str
    """`TTFT`, `NTPOT` or `ITL`."""
    lowest_ms: float
    highest_ms: float

    def __str__(self) -> str:
        return f"{self.metric} {self.lowest_ms:.4g} to {self.highest_ms:.4g} ms"


class Profile(Value):
    """One model on one server on one kind of accelerator, as one source knows it."""

    model: str
    model_server: str = "vllm"
    model_server_version: str = ""
    accelerator: str
    accelerator_count: Annotated[int, Field(ge=1)] = 1
    """GPUs or chips of one replica."""
    instance_type: str = ""
    tpu_topology: str = ""
    serving_stack: str | None = None
    """`vllm` for the bare server, `llm-d` …; None: the source does not say."""
    serving_stack_version: str = ""
    use_case: str | None = None
    """A use case's name, or the workload's where it is none; None: the source does not say."""
    pricing_model: PricingModel | None = None
    points: Annotated[tuple[LoadPoint, ...], Field(min_length=1)]
    knee_requests_per_s: float | None = None
    """The measured knee; None leaves it to `SATURATED_SHARE`."""
    source: Source

    @property
    def subject(self) -> tuple[str, str, str, int]:
        """What must agree for a prediction and a measurement to speak of the same thing."""
        return (self.model, self.model_server, self.accelerator, self.accelerator_count)

    @property
    def rising(self) -> tuple[LoadPoint, ...]:
        """The load points up to saturation, by rising load."""
        points = sorted(self.points, key=lambda point: (point.requests_per_s or 0.0, point.output_tokens_per_s))
        if self.knee_requests_per_s is not None:
            below = [p for p in points if p.requests_per_s and p.requests_per_s <= self.knee_requests_per_s * 1.001]
            if below:
                return tuple(below)
        enough = SATURATED_SHARE * max(point.output_tokens_per_s for point in points)
        end = next(i for i, point in enumerate(points) if point.output_tokens_per_s >= enough)
        return tuple(points[: end + 1])

    @property
    def saturation(self) -> LoadPoint:
        """Where throughput stops rising and latency begins to: what the quickstart shows without targets."""
        return self.rising[-1]

    @property
    def ranges(self) -> tuple[LatencyRange, ...]:
        """The latencies that can be had below saturation."""
        found = []
        for name, metric in (("ttft_ms", "TTFT"), ("ntpot_ms", "NTPOT"), ("itl_ms", "ITL")):
            values = [value for point in self.rising if (value := getattr(point, name)) is not None]
            if values:
                found.append(LatencyRange(metric=metric, lowest_ms=min(values), highest_ms=max(values)))
        return tuple(found)

    @property
    def has_costs(self) -> bool:
        return any(point.usd_per_million_output_tokens is not None for point in self.points)

    @property
    def mean_lengths(self) -> tuple[float | None, float | None]:
        """Mean input and output tokens of a request; None where the source does not say."""
        point = self.saturation
        if not point.requests_per_s:
            return None, None
        inputs = None if point.input_tokens_per_s is None else point.input_tokens_per_s / point.requests_per_s
        return inputs, point.output_tokens_per_s / point.requests_per_s

    def operating_point(self, targets: Targets | None = None) -> LoadPoint | None:
        """The highest load within the targets, linear between load points; None if not even the least load is.

        A target above every observed latency means maximum throughput, as the quickstart documents. A metric that the
        source does not state meets no target.
        """
        limits = (targets or Targets()).given()
        rising = self.rising
        if not _meets(rising[0], limits):
            return None
        for low, high in pairwise(rising):
            if not _meets(high, limits):
                shares = [_crossing(getattr(low, name), getattr(high, name), limit) for name, limit in limits.items()]
                return _between(low, high, min(shares))
        return rising[-1]


def _meets(point: LoadPoint, limits: dict[str, float]) -> bool:
    return all((value := getattr(point, name)) is not None and value <= limit for name, limit in limits.items())


def _crossing(low: float, high: float | None, limit: float) -> float:
    """Share of the way from `low` to `high` at which `limit` is reached; 0 where nothing is known of `high`."""
    if high is None:
        return 0.0
    return 1.0 if high <= limit else (limit - low) / (high - low)


def _between(low: LoadPoint, high: LoadPoint, share: float) -> LoadPoint:
    def at(name: str) -> float | None:
        first, last = getattr(low, name), getattr(high, name)
        return None if first is None or last is None else first + (last - first) * share

    values = {name: at(name) for name in LoadPoint.model_fields}
    for name in ("usd_per_million_input_tokens", "usd_per_million_output_tokens"):
        # At one price the cost of a token falls as 1 / throughput: a straight line would overstate it.
        per_s = [(c, p.output_tokens_per_s) for p in (low, high) if (c := getattr(p, name)) is not None]
        if len(per_s) == 2:
            (first, slow), (last, fast) = per_s
            usd_per_s = first * slow + (last * fast - first * slow) * share
            values[name] = usd_per_s / (slow + (fast - slow) * share)
    return LoadPoint.model_validate(values)


SHOWN_USD = 0.001
"""gcloud prints costs with three decimals: a ratio that is read off two printed costs is known no better than that."""


def at_ratio(profile: Profile, ratio: float) -> tuple[Profile, str | None]:
    """The profile with its costs at another output-to-input cost ratio, and a note where that cannot be said.

    A catalogue's answers and files hold costs without their price per hour. The ratio that they were computed with is
    that of the two costs; the price follows from the tokens/s of both kinds. Without input tokens/s the costs of
    another ratio are left out.
    """
    points, lost = [], None
    for point in profile.points:
        usd_in, usd_out = point.usd_per_million_input_tokens, point.usd_per_million_output_tokens
        if not usd_in or not usd_out or _is_about(ratio, usd_out, usd_in):
            points.append(point)
            continue
        costs: tuple[float | None, float | None] = (None, None)
        if point.input_tokens_per_s is None:
            lost = (
                f"the costs of {profile.model} in {profile.source.name} are of an output-to-input ratio of about"
                f" {usd_out / usd_in:.3g}: without input tokens/s they cannot be had at {ratio:g}, and are left out"
            )
        else:
            usd_per_s = (usd_in * point.input_tokens_per_s + usd_out * point.output_tokens_per_s) / 1e6
            output = usd_per_s / (point.input_tokens_per_s / ratio + point.output_tokens_per_s) * 1e6
            costs = (output / ratio, output)
        points.append(
            point.model_copy(
                update={"usd_per_million_input_tokens": costs[0], "usd_per_million_output_tokens": costs[1]}
            )
        )
    return profile.model_copy(update={"points": tuple(points)}), lost


def _is_about(ratio: float, usd_out: float, usd_in: float) -> bool:
    half = SHOWN_USD / 2
    return (usd_out - half) / (usd_in + half) <= ratio <= (usd_out + half) / max(usd_in - half, 1e-9)


# --- From our own measurements ---------------------------------------------------------------------------------------


class MeasuredOn(Value):
    """What a benchmark report does not say of itself."""

    name: str
    """Where the report is kept."""
    instance_type: str = ""
    replicas: Annotated[int, Field(ge=1)] = 1
    price: Price | None = None
    """Of one accelerator with its share of the machine; None leaves costs out."""
    pricing_model: PricingModel | None = None


def measured_profile(
    report: BenchmarkReport, on: MeasuredOn, *, output_to_input_ratio: float = DEFAULT_OUTPUT_TO_INPUT_RATIO
) -> Profile:
    """A sweep of ours as a profile of one replica. Raises BadInput for a report without a stage that completed."""
    environment = report.environment
    count = max(1, environment.accelerator_count // on.replicas)
    points = [_measured_point(stages, on, count, output_to_input_ratio) for stages in _by_rate(report.stages)]
    if not points:
        raise BadInput("no request of this benchmark was answered.", where=on.name)
    knee = report.curve.knee
    return Profile(
        model=environment.model,
        model_server_version=environment.server_version or image_version(environment.image),
        accelerator=environment.accelerator or "unknown",
        accelerator_count=count,
        instance_type=on.instance_type or usual_instance(environment.accelerator, count),
        serving_stack="vllm",
        use_case=use_case_of(report.spec.workload.name),
        pricing_model=on.pricing_model if on.price else None,
        points=tuple(points),
        knee_requests_per_s=None if knee is None else knee.rate_per_s / on.replicas,
        source=Source(name=on.name, evidence=Evidence.MEASUREMENT, as_of=report.started_at.date()),
    )


def image_version(image: str) -> str:
    """The tag of a container image, without a digest."""
    _, colon, tag = image.partition("@")[0].rpartition(":")
    return tag if colon and "/" not in tag else ""


def usual_instance(accelerator: str, count: int) -> str:
    """The usual machine type of that many accelerators; empty where none is known."""
    known = ACCELERATORS.get(accelerator)
    if known is None or count not in known.counts:
        return ""
    return known.machine_for(count).type


def use_case_of(workload: str) -> str:
    """The use case that a workload stands for; its own name where it is none of the six (`quickstart`, a dataset)."""
    base = workload.partition("-within-")[0]
    return next((each.name for each in USE_CASES if each.workload == base), workload)


def use_cases(profiles: Iterable[Profile] = ()) -> tuple[UseCase, ...]:
    """The quickstart's six, and what else the profiles were measured with."""
    offered = {profile.use_case for profile in profiles if profile.use_case}
    return (
        *USE_CASES,
        *(use_case_named(name, offered) for name in sorted(offered - {each.name for each in USE_CASES})),
    )


def use_case_named(name: str, offered: Iterable[str] = ()) -> UseCase:
    """By name, in any case, with or without `(ShareGPT)`; `offered` are the names that profiles at hand bring along.

    BadInput lists the known ones.
    """
    wanted = name.casefold().removesuffix("(sharegpt)").strip()
    known = (*USE_CASES, *OTHER_USE_CASES)
    for each in known:
        if wanted in (each.name.casefold().removesuffix("(sharegpt)").strip(), each.workload):
            return each
    own = sorted(set(offered) - {each.name for each in known})
    for each_own in own:
        if each_own.casefold() == name.casefold().strip():
            return UseCase(name=each_own, input_tokens=None, output_tokens=None, description="Measured by the source.")
    raise BadInput(
        f"there is no use case {name!r}.",
        where="--use-case",
        resolution=f"Known are {', '.join((*(each.name for each in known), *own))}.",
    )


def _by_rate(stages: Sequence[Stage]) -> list[list[Stage]]:
    rates: dict[float, list[Stage]] = {}
    for stage in stages:
        if stage.completed:
            rates.setdefault(round(stage.rate_per_s, 6), []).append(stage)
    return [rates[rate] for rate in sorted(rates)]


def _measured_point(stages: Sequence[Stage], on: MeasuredOn, gpus: int, ratio: float) -> LoadPoint:
    """The median of the stages of one rate, for one of the replicas."""

    def median(values: Iterable[float | None]) -> float | None:
        found = sorted(value for value in values if value is not None)
        return found[len(found) // 2] if found else None

    def latency_ms(metric: LatencyMetric) -> float | None:
        seconds = median(stage.latency_s(metric, Percentile.P50) for stage in stages)
        return None if seconds is None else seconds * 1e3

    outputs = (median(stage.output_tokens_per_s for stage in stages) or 0.0) / on.replicas
    # Input and output are counted over different windows of a stage: the ratio of one request's tokens is in neither.
    inputs = outputs * (median(_input_share(stage) for stage in stages) or 0.0)
    cost = None
    if on.price is not None and outputs + inputs > 0:
        cost = token_cost(
            on.price,
            gpus=gpus,
            input_tokens_per_s=inputs,
            output_tokens_per_s=outputs,
            output_to_input_ratio=ratio,
        )
    return LoadPoint(
        requests_per_s=stages[0].rate_per_s / on.replicas,
        output_tokens_per_s=outputs,
        input_tokens_per_s=inputs,
        ttft_ms=latency_ms(LatencyMetric.TTFT),
        ntpot_ms=latency_ms(LatencyMetric.NTPOT),
        itl_ms=latency_ms(LatencyMetric.ITL),
        running_requests=(median(stage.concurrency_mean for stage in stages) or 0.0) / on.replicas,
        usd_per_million_input_tokens=cost.usd_per_million_input_tokens if cost else None,
        usd_per_million_output_tokens=cost.usd_per_million_output_tokens if cost else None,
    )


def _input_share(stage: Stage) -> float | None:
    """Input tokens per output token of the stage's requests."""
    if stage.requests_per_s <= 0 or stage.offered_output_tokens_per_s <= 0:
        return None
    outputs = stage.offered_output_tokens_per_s / stage.rate_per_s
    return stage.input_tokens_per_s / stage.requests_per_s / outputs


# --- Asking ----------------------------------------------------------------------------------------------------------


class ProfileQuery(Value):
    """What is looked for; None and empty do not filter."""

    model: str | None = None
    model_server: str | None = None
    model_server_version: str | None = None
    accelerator: str | None = None
    accelerator_count: Annotated[int, Field(ge=1)] | None = None
    """Of one replica."""
    instance_type: str | None = None
    usd_per_accelerator_hour: dict[str, Annotated[float, Field(gt=0)]] = {}
    """What the asker pays for one accelerator with its share of the machine, by accelerator; before any list price."""
    pricing_model: PricingModel = PricingModel.ON_DEMAND
    """Google's API assumes spot where it is told nothing, so it is always told."""
    output_to_input_ratio: Annotated[float, Field(gt=0)] = DEFAULT_OUTPUT_TO_INPUT_RATIO
    use_case: str | None = None
    serving_stack: str | None = None
    serving_stack_version: str | None = None
    input_length: Annotated[int, Field(gt=0)] | None = None
    output_length: Annotated[int, Field(gt=0)] | None = None
    targets: Targets = Targets()
    max_usd_per_million_input_tokens: Annotated[float, Field(gt=0)] | None = None
    max_usd_per_million_output_tokens: Annotated[float, Field(gt=0)] | None = None
    sort_by: tuple[str, ...] = ("usd_per_million_output_tokens",)
    """Column keys; `~` before a key sorts it downwards, as gcloud does."""
    limit: Annotated[int, Field(ge=1)] | None = None


class UnsupportedFilter(BadInput):
    """The source knows nothing by which it could be filtered so."""


class ProfileAnswer(Value):
    """What one or several sources answered."""

    profiles: tuple[Profile, ...] = ()
    notes: tuple[str, ...] = ()
    """What the reader must know: refused filters, missing figures, the source's comments."""
    ranges: tuple[LatencyRange, ...] = ()
    """What the source says is possible over all its profiles."""


class ProfileSource(Protocol):
    """Where profiles come from."""

    @property
    def name(self) -> str: ...

    def models(self) -> Sequence[str]: ...

    def model_servers(self, model: str) -> Sequence[str]: ...

    def model_server_versions(self, model: str, model_server: str) -> Sequence[str]: ...

    def profiles(self, query: ProfileQuery) -> ProfileAnswer:
        """Candidates for `query`: at least those that match. Raises UnsupportedFilter for what cannot be told."""
        ...

    def benchmarks(self, query: ProfileQuery) -> ProfileAnswer:
        """The same with every load point."""
        ...


class StaticSource:
    """Profiles that are at hand: our history, or a file."""

    def __init__(self, name: str, profiles: Sequence[Profile], notes: Sequence[str] = ()) -> None:
        self.name = name
        self._profiles = tuple(profiles)
        self._notes = tuple(notes)

    def models(self) -> Sequence[str]:
        return sorted({profile.model for profile in self._profiles})

    def model_servers(self, model: str) -> Sequence[str]:
        return sorted({p.model_server for p in self._profiles if p.model == model})

    def model_server_versions(self, model: str, model_server: str) -> Sequence[str]:
        mine = (p for p in self._profiles if (p.model, p.model_server) == (model, model_server))
        return sorted({p.model_server_version for p in mine if p.model_server_version})

    def profiles(self, query: ProfileQuery) -> ProfileAnswer:
        return ProfileAnswer(profiles=self._profiles, notes=self._notes)

    benchmarks = profiles


def ask(sources: Sequence[ProfileSource], query: ProfileQuery, *, every_point: bool = False) -> ProfileAnswer:
    """The answers of all sources together. A source that fails, or cannot filter so, is left out with a note.

    Raises its error if the others know no profile at all: then the error is the answer.
    """
    answers: list[ProfileAnswer] = []
    errors: list[RolloutError] = []
    for source in sources:
        try:
            answers.append(source.benchmarks(query) if every_point else source.profiles(query))
        except RolloutError as error:
            errors.append(error)
    if errors and not any(answer.profiles for answer in answers):
        raise errors[0]
    notes = [note for answer in answers for note in answer.notes]
    notes += [f"left out: {error}" for error in errors]
    return ProfileAnswer(
        profiles=tuple(dict.fromkeys(profile for answer in answers for profile in answer.profiles)),
        notes=tuple(dict.fromkeys(notes)),
        ranges=tuple(each for answer in answers for each in answer.ranges),
    )


def ask_names(
    sources: Sequence[ProfileSource], question: Callable[[ProfileSource], Sequence[str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the sources list (models, servers, versions), sorted, and notes about those that failed; as `ask`."""
    names: set[str] = set()
    errors: list[RolloutError] = []
    for source in sources:
        try:
            names.update(question(source))
        except RolloutError as error:
            errors.append(error)
    if errors and not names:
        raise errors[0]
    return tuple(sorted(names)), tuple(f"left out: {error}" for error in errors)


class Row(Value):
    """A profile at one load."""

    profile: Profile
    point: LoadPoint


class Gap(Value):
    """A prediction beside a measurement of the same model, server and accelerator, both at saturation."""

    prediction: Profile
    measurement: Profile

    @property
    def same_workload(self) -> bool:
        """Whether both were measured with the same kind of requests: only then is a difference a shortfall."""
        if self.prediction.use_case is None:
            return self.measurement.use_case in UNSTATED_USE_CASES
        return self.prediction.use_case == self.measurement.use_case

    @property
    def workload(self) -> str:
        """What was measured with, seen from the prediction."""
        return "the same" if self.same_workload else f"another: {self.measurement.use_case or 'not stated'}"

    def differences(self) -> tuple[tuple[str, float, float, float], ...]:
        """(figure, predicted, measured, how much more was measured as a share) of the figures that both state."""
        rows = []
        for name, label in GAP_FIGURES.items():
            predicted = getattr(self.prediction.saturation, name)
            measured = getattr(self.measurement.saturation, name)
            if predicted and measured is not None:
                rows.append((label, predicted, measured, (measured - predicted) / predicted))
        return tuple(rows)

    @property
    def shortfall(self) -> float:
        """By how much the worst figure is worse than predicted, as a share of the prediction; 0 if none is."""
        return max(
            (-share if label == GAP_FIGURES["output_tokens_per_s"] else share)
            for label, _, _, share in (*self.differences(), ("", 0.0, 0.0, 0.0))
        )


GAP_FIGURES = {
    "output_tokens_per_s": "output tokens/s",
    "ntpot_ms": "NTPOT ms",
    "ttft_ms": "TTFT ms",
    "itl_ms": "ITL ms",
    "usd_per_million_output_tokens": "USD/M output tokens",
}


class ProfileList(Value):
    """The rows that answer a query."""

    rows: tuple[Row, ...]
    gaps: tuple[Gap, ...] = ()
    notes: tuple[str, ...] = ()


def select(answer: ProfileAnswer, query: ProfileQuery, *, every_point: bool = False) -> ProfileList:
    """Filter, choose each profile's operating point (or all points), sort, and compare predictions.

    Where the targets leave nothing, a note says which latencies are possible.
    """
    notes = list(answer.notes)
    if query.use_case:
        offered = [profile.use_case for profile in answer.profiles if profile.use_case]
        query = query.model_copy(update={"use_case": use_case_named(query.use_case, offered).name})
    matching = [profile for profile in answer.profiles if _matches(profile, query, notes)]
    rows: list[Row] = []
    for profile in matching:
        if every_point:
            points: Sequence[LoadPoint | None] = profile.points
        else:
            points = [profile.operating_point(query.targets)]
        rows += [Row(profile=profile, point=p) for p in points if p is not None and _is_affordable(p, query)]
    if matching and not rows:
        notes.append(_why_nothing(matching, query, answer.ranges))
    elif not matching and _are_below(query.targets, answer.ranges):
        # Such a source answers with the range and without profiles.
        notes.append(_too_low(answer.ranges))
    elif not matching:
        known = sorted({profile.model for profile in answer.profiles})
        notes.append(f"no profile matches; the sources know {', '.join(known) or 'no model'}")
    notes += [_without_price(profile) for profile in matching if _lacks_price(profile)]
    for key in reversed(query.sort_by if not every_point else ()):
        rows = _sorted(rows, key)
    return ProfileList(rows=tuple(rows[: query.limit]), gaps=gaps(matching), notes=tuple(dict.fromkeys(notes)))


def gaps(profiles: Sequence[Profile]) -> tuple[Gap, ...]:
    """Every prediction beside the youngest measurement of the same model, server, accelerator and use case.

    Google does not say of its figures which use case they are of. Where nothing of ours was measured with what it
    assumes, the youngest of any other workload stands there, and `Gap.same_workload` says so.
    """
    found = []
    for prediction in profiles:
        if prediction.source.evidence is not Evidence.PREDICTION:
            continue
        beside = [
            Gap(prediction=prediction, measurement=each)
            for each in profiles
            if each.source.evidence is Evidence.MEASUREMENT
            and each.subject == prediction.subject
            and prediction.use_case in (None, each.use_case)
        ]
        if beside:
            found.append(max(beside, key=lambda gap: (gap.same_workload, gap.measurement.source.as_of or date.min)))
    return tuple(found)


def best_curve(
    profiles: Iterable[Profile], *, accelerator_count: int | None = None, use_case: str | None = None
) -> Profile | None:
    """The curve to derive a threshold from: the youngest measurement, else the prediction with the most load points.

    Curves of another number of accelerators, or measured with another use case, say nothing about this replica. One
    whose source does not state the use case counts where no other one is known.
    """
    return max(
        (
            each
            for each in profiles
            if accelerator_count in (None, each.accelerator_count)
            and each.use_case in (None, use_case or each.use_case)
        ),
        key=lambda each: (
            each.source.evidence is Evidence.MEASUREMENT,
            each.use_case is not None,
            each.source.as_of or date.min,
            len(each.points),
        ),
        default=None,
    )


def possible_ranges(profiles: Sequence[Profile]) -> tuple[LatencyRange, ...]:
    """The latencies that any of the profiles offers."""
    return _merged(each for profile in profiles for each in profile.ranges)


def _merged(ranges: Iterable[LatencyRange]) -> tuple[LatencyRange, ...]:
    found: dict[str, LatencyRange] = {}
    for each in ranges:
        known = found.get(each.metric, each)
        found[each.metric] = LatencyRange(
            metric=each.metric,
            lowest_ms=min(known.lowest_ms, each.lowest_ms),
            highest_ms=max(known.highest_ms, each.highest_ms),
        )
    return tuple(found.values())


def _matches(profile: Profile, query: ProfileQuery, notes: list[str]) -> bool:
    exact = {
        "model": query.model,
        "model_server": query.model_server,
        "accelerator": query.accelerator,
        "accelerator_count": query.accelerator_count,
        "instance_type": query.instance_type,
        "model_server_version": None if query.model_server_version == "all" else query.model_server_version,
        "serving_stack": query.serving_stack,
        "serving_stack_version": query.serving_stack_version,
        "use_case": query.use_case,
    }
    for name, wanted in exact.items():
        value = getattr(profile, name)
        if wanted is None:
            continue
        if value in (None, ""):
            notes.append(f"{profile.source.name} does not state the {name.replace('_', ' ')} of {profile.model}")
            return False
        if value != wanted:
            return False
    if profile.pricing_model not in (None, query.pricing_model):
        notes.append(f"{profile.source.name} states {profile.pricing_model} costs: ask with that --pricing-model")
        return False
    for metric in query.targets.given():
        if getattr(profile.saturation, metric) is None:
            notes.append(f"{profile.source.name} does not state the {metric[:-3].upper()} of {profile.model}")
            return False
    return _has_lengths(profile, query)


def _has_lengths(profile: Profile, query: ProfileQuery) -> bool:
    for wanted, actual in zip((query.input_length, query.output_length), profile.mean_lengths, strict=True):
        if wanted is not None and (actual is None or abs(actual - wanted) > LENGTH_TOLERANCE * wanted):
            return False
    return True


def _is_affordable(point: LoadPoint, query: ProfileQuery) -> bool:
    limits = (
        (query.max_usd_per_million_input_tokens, point.usd_per_million_input_tokens),
        (query.max_usd_per_million_output_tokens, point.usd_per_million_output_tokens),
    )
    return all(limit is None or (cost is not None and cost <= limit) for limit, cost in limits)


def _why_nothing(profiles: Sequence[Profile], query: ProfileQuery, stated: Sequence[LatencyRange]) -> str:
    within = [profile for profile in profiles if profile.operating_point(query.targets) is not None]
    if within:
        costs = [p.saturation.usd_per_million_output_tokens for p in within]
        cheapest = min((cost for cost in costs if cost is not None), default=None)
        least = "unknown: no price" if cheapest is None else f"{cheapest:.3f} USD per million output tokens"
        return f"no profile is that cheap; the lowest cost is {least}"
    return _too_low((*possible_ranges(profiles), *stated))


def _too_low(observed: Iterable[LatencyRange]) -> str:
    ranges = "; ".join(map(str, _merged(observed)))
    return f"no recommendation: the latency target is too low. Choose one within what was observed: {ranges}"


def _are_below(targets: Targets, observed: Sequence[LatencyRange]) -> bool:
    lowest = {each.metric: each.lowest_ms for each in _merged(observed)}
    return any(limit < lowest.get(name[:-3].upper(), 0.0) for name, limit in targets.given().items())


def _lacks_price(profile: Profile) -> bool:
    """Whether a price alone is missing for its costs."""
    point = profile.saturation
    return point.usd_per_million_output_tokens is None and point.input_tokens_per_s is not None


def _without_price(profile: Profile) -> str:
    name = profile.accelerator
    return f"no price of {name} is known, so its costs are missing: give --usd-per-accelerator-hour {name}=USD"


def _sorted(rows: Sequence[Row], key: str) -> list[Row]:
    """By one column; rows that do not have it come last either way."""
    column = column_named(key.removeprefix("~"))
    known = [(value, row) for row in rows if (value := column.value(row)) not in (None, "")]
    known.sort(key=lambda pair: pair[0], reverse=key.startswith("~"))
    return [row for _, row in known] + [row for row in rows if column.value(row) in (None, "")]


# --- Columns ---------------------------------------------------------------------------------------------------------


class Column:
    """One column: key in JSON and YAML, header in tables, header in CSV, and how to read it."""

    def __init__(
        self, key: str, header: str, csv_header: str, value: Callable[[Row], str | float | None], digits: int = 0
    ) -> None:
        self.key = key
        self.header = header
        self.csv_header = csv_header
        self.value = value
        self.digits = digits

    def text(self, row: Row) -> str:
        """As gcloud prints it: costs with three decimals, N/A for what is unknown."""
        value = self.value(row)
        if value is None:
            return "N/A"
        return value if isinstance(value, str) else f"{value:.{self.digits}f}"


INSTANCE = Column("instance_type", "Instance Type", "Instance Type", lambda row: row.profile.instance_type)
ACCELERATOR = Column("accelerator", "Accelerator", "Accelerator Type", lambda row: row.profile.accelerator)
USD_INPUT = Column(
    "usd_per_million_input_tokens",
    "Cost/M Input Tokens",
    "Cost/M Input Tokens",
    lambda row: row.point.usd_per_million_input_tokens,
    3,
)
USD_OUTPUT = Column(
    "usd_per_million_output_tokens",
    "Cost/M Output Tokens",
    "Cost/M Output Tokens",
    lambda row: row.point.usd_per_million_output_tokens,
    3,
)
THROUGHPUT = Column(
    "output_tokens_per_s", "Output Tokens/s", "Output Tokens/s", lambda row: row.point.output_tokens_per_s
)
NTPOT = Column("ntpot_ms", "NTPOT(ms)", "NTPOT (ms)", lambda row: row.point.ntpot_ms)
TTFT = Column("ttft_ms", "TTFT(ms)", "TTFT (ms)", lambda row: row.point.ttft_ms)
ITL = Column("itl_ms", "ITL(ms)", "ITL (ms)", lambda row: row.point.itl_ms, 1)
QPS = Column("requests_per_s", "QPS", "QPS", lambda row: row.point.requests_per_s, 3)
INPUT_TOKENS = Column(
    "input_tokens_per_s", "Input Tokens/s", "Input Tokens/s", lambda row: row.point.input_tokens_per_s
)
RUNNING = Column("running_requests", "Running", "Running Requests", lambda row: row.point.concurrency, 1)
SERVER = Column("model_server", "Model Server", "Model Server Name", lambda row: row.profile.model_server)
VERSION = Column(
    "model_server_version", "Model Server Version", "Model Server Version", lambda row: row.profile.model_server_version
)
MODEL = Column("model", "Model", "Model Name", lambda row: row.profile.model)
COUNT = Column("accelerator_count", "Count", "Accelerator Count", lambda row: row.profile.accelerator_count)
USE_CASE = Column("use_case", "Use Case", "Use Case", lambda row: row.profile.use_case)
STACK = Column("serving_stack", "Serving Stack", "Serving Stack", lambda row: row.profile.serving_stack)
PRICING = Column(
    "pricing_model",
    "Pricing",
    "Pricing Model",
    lambda row: row.profile.pricing_model.value if row.profile.pricing_model else None,
)
EVIDENCE = Column("evidence", "Evidence", "Evidence", lambda row: row.profile.source.evidence.value)
SOURCE = Column("source", "Source", "Source", lambda row: row.profile.source.name)
AS_OF = Column(
    "as_of", "Date", "Date", lambda row: row.profile.source.as_of.isoformat() if row.profile.source.as_of else None
)

PROFILE_COLUMNS = (INSTANCE, ACCELERATOR, USD_INPUT, USD_OUTPUT, THROUGHPUT, NTPOT, TTFT, SERVER, VERSION, MODEL)
"""The columns of `gcloud container ai profiles list`, in its order."""

BENCHMARK_COLUMNS = (
    *(INSTANCE, ACCELERATOR, MODEL, SERVER, VERSION),
    *(THROUGHPUT, NTPOT, TTFT, QPS, USD_INPUT, USD_OUTPUT),
)
"""The columns of `gcloud container ai profiles benchmarks list`, in its order."""

OUR_COLUMNS = (ITL, COUNT, USE_CASE, PRICING, EVIDENCE, SOURCE, AS_OF)
"""What follows them here: an answer names its source and its date."""

OUR_BENCHMARK_COLUMNS = (ITL, INPUT_TOKENS, RUNNING, COUNT, USE_CASE, STACK, PRICING, EVIDENCE, SOURCE, AS_OF)

_SORTABLE = {column.key: column for column in (*BENCHMARK_COLUMNS, *OUR_BENCHMARK_COLUMNS)}


def column_named(key: str) -> Column:
    """The column of that key; BadInput lists the keys."""
    try:
        return _SORTABLE[key]
    except KeyError:
        raise BadInput(
            f"there is no column {key!r}.", where="--sort-by", resolution=f"Known are {', '.join(_SORTABLE)}."
        ) from None
