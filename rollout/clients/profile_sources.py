"""Profiles that are at hand: rollout records, kept curves and benchmark files, in folders or in the target's bucket."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rollout.benchmark import BenchmarkReport
from rollout.clients.history import BucketHistory
from rollout.clients.records import RecordStore
from rollout.cost import Price, PricingModel, find_price
from rollout.errors import BadInput
from rollout.history import CurveRecord
from rollout.profile_formats import accelerators_of, read_benchmarks_csv, read_inference_perf
from rollout.profiles import (
    MeasuredOn,
    Profile,
    ProfileAnswer,
    ProfileQuery,
    StaticSource,
    at_ratio,
    measured_profile,
)
from rollout.record import RolloutReport
from rollout.target import Target

_DEPTH = ("*.json", "*/*.json", "*/*/*.json")
"""`out/report.json`, `out/rehearsal/report.json` and kept curves `out/history/<workload>/<time>.json`."""


def local_history(folder: Path, query: ProfileQuery, *, region: str | None = None) -> StaticSource:
    """Every benchmark in a folder: rollout records and kept curves. Other JSON files are passed over.

    `region` is where list prices are taken from for what does not say where it ran.
    """
    profiles: list[Profile] = []
    notes: list[str] = []
    paths = sorted({path for pattern in _DEPTH for path in folder.glob(pattern)}) if folder.is_dir() else []
    for path in paths:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not ours: a folder of records may hold other things
        if not isinstance(data, dict) or not ({"benchmark", "report"} & data.keys()):
            continue
        try:
            profiles += _profiles_of(data, str(path), query, region)
        except (ValidationError, BadInput) as error:
            notes.append(f"{path} was left out: {str(error).splitlines()[0]}")
    return StaticSource(str(folder), _distinct(profiles), notes)


class BucketSource:
    """Every benchmark that rollouts to this target kept in its bucket, as a `rollout.profiles.ProfileSource`.

    It is read when it is first asked: a bucket that cannot be read then fails as a source, and hides no other one.
    """

    def __init__(self, target: Target, query: ProfileQuery) -> None:
        self.name = f"gs://{target.bucket}"
        self._target = target
        self._query = query

    @cached_property
    def _kept(self) -> StaticSource:
        target, profiles = self._target, list[Profile]()
        for report in RecordStore(target).read_all():
            profiles += _of_record(report, f"{self.name} {report.run_id}", self._query)
        store = BucketHistory(target)
        for key in store.keys(""):
            profiles += _profiles_of(store.read(key), f"{self.name} {key}", self._query, target.region)
        return StaticSource(self.name, _distinct(profiles))

    def models(self) -> Sequence[str]:
        return self._kept.models()

    def model_servers(self, model: str) -> Sequence[str]:
        return self._kept.model_servers(model)

    def model_server_versions(self, model: str, model_server: str) -> Sequence[str]:
        return self._kept.model_server_versions(model, model_server)

    def profiles(self, query: ProfileQuery) -> ProfileAnswer:
        return self._kept.profiles(query)

    benchmarks = profiles


def benchmark_file(path: Path, query: ProfileQuery) -> StaticSource:
    """A CSV of `benchmarks list`, a benchmark of ours as JSON, or a folder of inference-perf's stage reports.

    Raises BadInput for anything else. inference-perf's reports name neither model nor accelerator: `query` must.
    """
    if path.is_dir():
        return StaticSource(str(path), [_inference_perf(path, query)])
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read the file: {error.strerror}.", where=str(path)) from error
    if path.suffix == ".json":
        try:
            return StaticSource(str(path), tuple(_profiles_of(json.loads(text), str(path), query, None)))
        except (ValueError, ValidationError) as error:
            raise BadInput(f"not a benchmark: {str(error).splitlines()[0]}", where=str(path)) from error
    found = [at_ratio(each, query.output_to_input_ratio) for each in read_benchmarks_csv(text, name=str(path))]
    notes = [note for _, note in found if note]
    if any(profile.pricing_model is None and profile.has_costs for profile, _ in found):
        notes.append(f"{path} does not state the pricing model of its costs: they are shown as they stand there")
    return StaticSource(str(path), [profile for profile, _ in found], notes)


def _inference_perf(folder: Path, query: ProfileQuery) -> Profile:
    if query.model is None or query.accelerator is None:
        raise BadInput(
            "inference-perf's reports name neither model nor accelerator.",
            where=str(folder),
            resolution="Give --model and --accelerator-type.",
        )
    paths = sorted(folder.glob("stage_*_lifecycle_metrics.json"))
    return read_inference_perf(
        {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths},
        name=str(folder),
        model=query.model,
        accelerator=query.accelerator,
        accelerator_count=query.accelerator_count or accelerators_of(query.instance_type or "", query.accelerator),
        price=_price(query.accelerator, query),
        pricing_model=query.pricing_model,
        output_to_input_ratio=query.output_to_input_ratio,
    )


def _profiles_of(data: Mapping[str, Any], name: str, query: ProfileQuery, region: str | None) -> Iterator[Profile]:
    if "run_id" in data:
        yield from _of_record(RolloutReport.model_validate(data), name, query)
        return
    report = CurveRecord.model_validate(data).report if "report" in data else BenchmarkReport.model_validate(data)
    price = _price(report.environment.accelerator, query, region)
    on = MeasuredOn(name=name, price=price, pricing_model=query.pricing_model)
    yield measured_profile(report, on, output_to_input_ratio=query.output_to_input_ratio)


def _of_record(report: RolloutReport, name: str, query: ProfileQuery) -> Iterator[Profile]:
    if report.benchmark is None or report.plan is None:
        return
    serving, target = report.plan.serving, report.plan.target
    price = _price(
        serving.accelerator.type,
        query,
        target.region,
        own_usd_per_gpu_hour=target.gpu_usd_per_hour,
        own_model=target.pricing,
    )
    on = MeasuredOn(
        name=name,
        instance_type=serving.accelerator.machine_type,
        replicas=serving.replicas,
        price=price,
        pricing_model=query.pricing_model,
    )
    profile = measured_profile(report.benchmark, on, output_to_input_ratio=query.output_to_input_ratio)
    yield profile.model_copy(update={"model": report.plan.model.repo_id})


def _price(
    accelerator: str,
    query: ProfileQuery,
    region: str | None = None,
    *,
    own_usd_per_gpu_hour: float | None = None,
    own_model: PricingModel = PricingModel.ON_DEMAND,
) -> Price | None:
    return find_price(
        accelerator,
        region,
        query.pricing_model,
        own_usd_per_gpu_hour=own_usd_per_gpu_hour,
        own_model=own_model,
        stated=query.usd_per_accelerator_hour,
    )


def _distinct(profiles: Iterable[Profile]) -> tuple[Profile, ...]:
    """A rerun that measured nothing anew repeats the stages of the run before: one profile is enough."""
    seen: dict[str, Profile] = {}
    for profile in profiles:
        seen.setdefault(
            profile.model_copy(update={"source": profile.source.model_copy(update={"name": ""})}).digest(), profile
        )
    return tuple(seen.values())
