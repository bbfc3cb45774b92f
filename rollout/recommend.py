"""From requirements to ranked options: which profile, how many replicas, what it costs, and why the others lost.

Pure arithmetic over profiles. One replica runs at `utilisation` of the highest load within the targets: that leaves
room while a new replica starts. The ranking is by cost per hour, then by headroom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from rollout.cost import DEFAULT_OUTPUT_TO_INPUT_RATIO, Price, PricingModel, default_region, token_cost
from rollout.curve import TARGET_UTILISATION
from rollout.profiles import LoadPoint, Profile, Targets, possible_ranges, use_case_named
from rollout.values import Value

PriceOf = Callable[[Profile], Price | None]
"""What one accelerator of a profile costs with its share of the machine; None where no price is known."""


class Requirements(Value):
    """What the deployment must do; None: no such requirement."""

    model: str | None = None
    targets: Targets = Targets()
    requests_per_s: Annotated[float, Field(gt=0)] | None = None
    """Demand; or `output_tokens_per_s`."""
    output_tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    use_case: str | None = None
    accelerators: tuple[str, ...] = ()
    """Only these; empty: any."""
    pricing_model: PricingModel = PricingModel.ON_DEMAND
    region: str | None = None
    """Where the prices count; None: where the quickstart takes its own."""
    max_usd_per_hour: Annotated[float, Field(gt=0)] | None = None
    max_usd_per_million_output_tokens: Annotated[float, Field(gt=0)] | None = None
    output_to_input_ratio: Annotated[float, Field(gt=0)] = DEFAULT_OUTPUT_TO_INPUT_RATIO
    utilisation: Annotated[float, Field(gt=0, le=1)] = TARGET_UTILISATION

    @model_validator(mode="after")
    def _one_demand(self) -> Requirements:
        if self.requests_per_s is not None and self.output_tokens_per_s is not None:
            raise ValueError("state the demand once: requests_per_s or output_tokens_per_s")
        return self


class Option(Value):
    """One way to meet the requirements."""

    profile: Profile
    point: LoadPoint
    """The highest load of one replica within the targets."""
    replicas: int
    usd_per_hour: float | None
    """All replicas; None where no price is known."""
    usd_per_million_input_tokens: float | None
    usd_per_million_output_tokens: float | None
    """At `point`: what a fully used replica's tokens cost."""
    headroom: float
    """Share of the replicas' throughput within the targets that the demand leaves free."""
    notes: tuple[str, ...] = ()


class Loser(Value):
    """A profile that is no option, and why."""

    profile: Profile
    reason: str


class Recommendation(Value):
    """Options, best first."""

    options: tuple[Option, ...]
    losers: tuple[Loser, ...]
    notes: tuple[str, ...] = ()

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Those of the options too."""
        return tuple(dict.fromkeys((*self.notes, *(note for option in self.options for note in option.notes))))

    @property
    def best(self) -> Option | None:
        return self.options[0] if self.options else None


def recommend(profiles: Sequence[Profile], requirements: Requirements, price_of: PriceOf) -> Recommendation:
    """Rank every profile that meets the requirements; the others say what they fail by.

    A target below the lowest observed latency leaves no option, and the note says the range that is possible; a target
    above the highest means maximum throughput.
    """
    if requirements.use_case is not None:
        offered = [profile.use_case for profile in profiles if profile.use_case]
        use_case = use_case_named(requirements.use_case, offered).name
        requirements = requirements.model_copy(update={"use_case": use_case})
    options: list[Option] = []
    losers: list[Loser] = []
    for profile in profiles:
        found = _consider(profile, requirements, price_of(profile))
        if isinstance(found, Option):
            options.append(found)
        else:
            losers.append(Loser(profile=profile, reason=found))
    options.sort(key=lambda each: (each.usd_per_hour is None, each.usd_per_hour or 0.0, -each.headroom))
    notes = [] if profiles else ["the sources know no profile: benchmark first, or name another --source or --file"]
    if not options and requirements.targets.given():
        of_interest = [p for p in profiles if _wrong_kind(p, requirements) is None]
        ranges = "; ".join(map(str, possible_ranges(of_interest)))
        if ranges:
            notes.append(f"no recommendation; choose a target within what was observed: {ranges}")
    beaten = [Loser(profile=each.profile, reason=_dearer(each, options[0])) for each in options[1:]]
    return Recommendation(options=tuple(options), losers=(*losers, *beaten), notes=tuple(notes))


def _consider(profile: Profile, wanted: Requirements, price: Price | None) -> Option | str:
    """The option, or the reason why it is none."""
    wrong = _wrong_kind(profile, wanted)
    if wrong is not None:
        return wrong
    point = profile.operating_point(wanted.targets)
    if point is None:
        return _misses(profile, wanted.targets)
    replicas = _replicas(point, wanted)
    if replicas is None:
        return "its source does not state requests/s: state the demand in output tokens/s"
    usd_input, usd_output = _token_costs(profile, point, price, wanted)
    per_hour = None if price is None else replicas * profile.accelerator_count * price.usd_per_gpu_hour
    too_dear = _too_dear(per_hour, usd_output, wanted)
    if too_dear is not None:
        return too_dear
    return Option(
        profile=profile,
        point=point,
        replicas=replicas,
        usd_per_hour=per_hour,
        usd_per_million_input_tokens=usd_input,
        usd_per_million_output_tokens=usd_output,
        headroom=_headroom(point, replicas, wanted),
        notes=(*_notes(profile, wanted.targets), *_price_notes(profile, point, price, usd_output)),
    )


def _wrong_kind(profile: Profile, wanted: Requirements) -> str | None:
    if wanted.model is not None and profile.model != wanted.model:
        return f"it serves {profile.model}"
    if wanted.accelerators and profile.accelerator not in wanted.accelerators:
        return f"it runs on {profile.accelerator}"
    if wanted.use_case is not None:
        if profile.use_case is None:
            return "its source does not state the use case"
        if profile.use_case != wanted.use_case:
            return f"it was measured with {profile.use_case}"
    return None


def _misses(profile: Profile, targets: Targets) -> str:
    stated = {each.metric: each for each in profile.ranges}
    for name, limit in targets.given().items():
        metric = name[:-3].upper()
        if metric not in stated:
            return f"its source does not state {metric}"
        lowest = stated[metric].lowest_ms
        if lowest > limit:
            return f"{metric} is at least {lowest:.4g} ms, the target is {limit:.4g} ms"
    return "it misses the targets together at its lowest load"


def _replicas(point: LoadPoint, wanted: Requirements) -> int | None:
    if wanted.requests_per_s is not None:
        if not point.requests_per_s:
            return None
        load = wanted.requests_per_s / point.requests_per_s
    elif wanted.output_tokens_per_s is not None:
        load = wanted.output_tokens_per_s / point.output_tokens_per_s
    else:
        return 1
    return max(1, math.ceil(load / wanted.utilisation - 1e-9))


def _headroom(point: LoadPoint, replicas: int, wanted: Requirements) -> float:
    if wanted.requests_per_s is not None and point.requests_per_s:
        return 1 - wanted.requests_per_s / (replicas * point.requests_per_s)
    if wanted.output_tokens_per_s is not None:
        return 1 - wanted.output_tokens_per_s / (replicas * point.output_tokens_per_s)
    return 1 - wanted.utilisation


def _token_costs(
    profile: Profile, point: LoadPoint, price: Price | None, wanted: Requirements
) -> tuple[float | None, float | None]:
    if price is not None and point.input_tokens_per_s is None and not _is_the_sources_price(profile, price, wanted):
        # The source's cost of a token is of another price per hour: the two must not stand in one line.
        return None, None
    if price is None or point.input_tokens_per_s is None:
        return point.usd_per_million_input_tokens, point.usd_per_million_output_tokens
    cost = token_cost(
        price,
        gpus=profile.accelerator_count,
        input_tokens_per_s=point.input_tokens_per_s,
        output_tokens_per_s=point.output_tokens_per_s,
        output_to_input_ratio=wanted.output_to_input_ratio,
    )
    return cost.usd_per_million_input_tokens, cost.usd_per_million_output_tokens


def _is_the_sources_price(profile: Profile, price: Price, wanted: Requirements) -> bool:
    """Whether a catalogue's costs rest on about this price: a list price where the quickstart takes its own."""
    return price.as_of is not None and wanted.region in (None, default_region(profile.accelerator))


def _price_notes(profile: Profile, point: LoadPoint, price: Price | None, usd_output: float | None) -> list[str]:
    name = profile.accelerator
    if price is None:
        return [f"no price of {name} is known: give --usd-per-accelerator-hour {name}=USD"]
    theirs = point.usd_per_million_output_tokens
    if usd_output is None and theirs is not None:
        return [
            f"{profile.source.name} states no input tokens/s of {profile.model} on {name}, so what a token costs at"
            f" {price.usd_per_gpu_hour:.2f} USD/hour is not known; at its own price it is {theirs:.3f} USD per million"
            " output tokens"
        ]
    return []


def _too_dear(per_hour: float | None, usd_output: float | None, wanted: Requirements) -> str | None:
    if wanted.max_usd_per_hour is not None:
        if per_hour is None:
            return "no price of its accelerator is known, so the budget cannot be checked"
        if per_hour > wanted.max_usd_per_hour:
            return f"it costs {per_hour:.2f} USD/hour, the budget is {wanted.max_usd_per_hour:.2f}"
    limit = wanted.max_usd_per_million_output_tokens
    if limit is not None:
        if usd_output is None:
            return "the cost of its tokens is not known"
        if usd_output > limit:
            return f"it costs {usd_output:.3f} USD per million output tokens, the limit is {limit:.3f}"
    return None


def _notes(profile: Profile, targets: Targets) -> list[str]:
    stated = {each.metric: each for each in profile.ranges}
    return [
        f"the {name[:-3].upper()} target of {limit:.4g} ms is above every observed latency: maximum throughput"
        for name, limit in targets.given().items()
        if name[:-3].upper() in stated and limit > stated[name[:-3].upper()].highest_ms
    ]


def _dearer(option: Option, best: Option) -> str:
    if option.usd_per_hour is None or best.usd_per_hour is None:
        return "no price of its accelerator is known"
    if option.usd_per_hour > best.usd_per_hour:
        more = option.usd_per_hour / best.usd_per_hour - 1
        return f"it meets everything, and costs {option.usd_per_hour:.2f} USD/hour, {more:.0%} more than the best"
    return f"it costs the same and leaves {option.headroom:.0%} free instead of {best.headroom:.0%}"
