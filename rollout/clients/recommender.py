"""GKE Inference Quickstart: Google's catalogue of profiles, its benchmark data and its generator of manifests.

The service's API v1 knows neither use cases, ITL targets nor serving stacks (gcloud's newer flags), and assumes spot
prices where it is told nothing. So the pricing model is always sent, and a filter that Google cannot apply is refused
with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from google.cloud import gkerecommender_v1 as giq

from rollout.clients.google_auth import REQUEST_TIMEOUT_S, client_options, credentials_for, google_errors
from rollout.cost import PricingModel
from rollout.diagnosis import Category, StartupObservation, diagnose_client_error
from rollout.errors import BadInput, NotFound, PermissionMissing, RolloutError
from rollout.profile_formats import pricing_named
from rollout.profiles import (
    Evidence,
    LatencyRange,
    LoadPoint,
    Profile,
    ProfileAnswer,
    ProfileQuery,
    Source,
    Targets,
    UnsupportedFilter,
    at_ratio,
)
from rollout.report import utc_now
from rollout.target import Target
from rollout.values import Value

SERVICE = "gkerecommender.googleapis.com"

_API_PRICING = {PricingModel.COMMITMENT_1Y: "1-year-cud", PricingModel.COMMITMENT_3Y: "3-years-cud"}

_NOT_FILTERABLE = {
    "use_case": "use case",
    "serving_stack": "serving stack",
    "serving_stack_version": "serving stack version",
    "input_length": "input length",
    "output_length": "output length",
}


class GoogleManifests(Value):
    """What Google generated."""

    documents: tuple[str, ...]
    """YAML texts, one object each."""
    kinds: tuple[str, ...]
    comments: tuple[str, ...]
    version: str
    """The versions that the manifests were validated with."""

    def documents_text(self) -> str:
        """As `gcloud … manifests create --output=manifest` prints them."""
        return "".join(f"{document.rstrip()}\n---\n" for document in self.documents)

    def comments_text(self) -> str:
        """As `--output=comments` prints them."""
        return "".join(f"# {line}\n" for line in self.comments)


class AutoscalerOmitted(RolloutError):
    """Google left the HorizontalPodAutoscaler out without a word: the target cannot be reached."""


class Recommender:
    """The service as a `rollout.profiles.ProfileSource`; the target's project pays the quota."""

    name = SERVICE

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = giq.GkeInferenceQuickstartClient(
            credentials=credentials_for(target),
            transport="rest",
            client_options=client_options(target, "gkerecommender"),
        )

    def models(self) -> Sequence[str]:
        with self._errors("models"):
            return list(self._client.fetch_models(request={}, timeout=REQUEST_TIMEOUT_S))

    def model_servers(self, model: str) -> Sequence[str]:
        with self._errors(f"model servers of {model}"):
            return list(self._client.fetch_model_servers(request={"model": model}, timeout=REQUEST_TIMEOUT_S))

    def model_server_versions(self, model: str, model_server: str) -> Sequence[str]:
        request = {"model": model, "model_server": model_server}
        with self._errors(f"versions of {model_server} for {model}"):
            return list(self._client.fetch_model_server_versions(request=request, timeout=REQUEST_TIMEOUT_S))

    def profiles(self, query: ProfileQuery) -> ProfileAnswer:
        """Each profile at the targets' operating point, or at saturation. Raises UnsupportedFilter and our errors."""
        _refuse_what_google_cannot_filter(query)
        request = giq.FetchProfilesRequest(
            model=query.model or "",
            model_server=query.model_server or "",
            model_server_version=_version(query),
            performance_requirements=_requirements(query),
        )
        with self._errors("profiles"):
            # A page may be partial and even empty; only its token says whether there is another one.
            pages = list(self._client.fetch_profiles(request=request, timeout=REQUEST_TIMEOUT_S).pages)
        profiles = [each for page in pages for each in page.profile]
        return ProfileAnswer(
            profiles=tuple(self._read(each, query) for each in profiles if each.performance_stats),
            notes=_comments(page.comments for page in pages),
            ranges=_ranges([page.performance_range for page in pages]),
        )

    def benchmarks(self, query: ProfileQuery) -> ProfileAnswer:
        """Every load point. Google wants a model and a server."""
        _refuse_what_google_cannot_filter(query)
        if not query.model or not query.model_server:
            raise BadInput(
                "benchmark data is asked for one model on one server.",
                where=SERVICE,
                resolution="Give --model and --model-server.",
            )
        request = giq.FetchBenchmarkingDataRequest(
            model_server_info=giq.ModelServerInfo(
                model=query.model, model_server=query.model_server, model_server_version=_version(query)
            ),
            instance_type=query.instance_type or "",
            pricing_model=_pricing(query.pricing_model),
        )
        with self._errors("benchmark data"):
            answer = self._client.fetch_benchmarking_data(request=request, timeout=REQUEST_TIMEOUT_S)
        # The request has no field for the cost ratio: Google answers with its own.
        found = [
            at_ratio(self._read(each, query), query.output_to_input_ratio)
            for each in answer.profile
            if each.performance_stats
        ]
        return ProfileAnswer(
            profiles=tuple(profile for profile, _ in found), notes=tuple(note for _, note in found if note)
        )

    def manifests(
        self,
        *,
        model: str,
        model_server: str,
        model_server_version: str,
        accelerator: str,
        namespace: str,
        targets: Targets,
        model_bucket_uri: str | None = None,
    ) -> GoogleManifests:
        """Google's own manifests.

        Raises AutoscalerOmitted when targets were given and no HorizontalPodAutoscaler came back, UnsupportedFilter
        for an ITL target, and BadInput in universes without the generator.
        """
        if not self._target.universe.is_default:
            raise BadInput(
                f"Google's generator of manifests does not exist in {self._target.universe.domain}.",
                where=SERVICE,
                resolution="Use --generator=local: the manifests are rendered here.",
            )
        if targets.itl_ms is not None:
            raise UnsupportedFilter(
                "Google's API v1 takes no ITL target.", where=SERVICE, resolution="Use --generator=local for it."
            )
        request = giq.GenerateOptimizedManifestRequest(
            model_server_info=giq.ModelServerInfo(
                model=model, model_server=model_server, model_server_version=model_server_version
            ),
            accelerator_type=accelerator,
            kubernetes_namespace=namespace,
        )
        if targets.given():
            request.performance_requirements = _latency_targets(targets)
        if model_bucket_uri:
            request.storage_config = giq.StorageConfig(model_bucket_uri=model_bucket_uri)
        with self._errors(f"manifests of {model} on {accelerator}"):
            answer = self._client.generate_optimized_manifest(request=request, timeout=REQUEST_TIMEOUT_S)
        found = GoogleManifests(
            documents=tuple(each.content for each in answer.kubernetes_manifests),
            kinds=tuple(each.kind for each in answer.kubernetes_manifests),
            comments=tuple(answer.comments),
            version=answer.manifest_version,
        )
        if targets.given() and "HorizontalPodAutoscaler" not in found.kinds:
            raise self._omitted(model, accelerator, targets)
        return found

    def _omitted(self, model: str, accelerator: str, targets: Targets) -> AutoscalerOmitted:
        everything = self.profiles(ProfileQuery(model=model)).profiles
        mine = [each for each in everything if each.accelerator == accelerator]
        observed = "; ".join(
            f"{name} {min(values):.0f} ms at saturation"
            for name, field in (("TTFT", "ttft_ms"), ("NTPOT", "ntpot_ms"))
            if (values := [v for each in mine if (v := getattr(each.saturation, field)) is not None])
        )
        wanted = ", ".join(f"{name[:-3].upper()} {limit:g} ms" for name, limit in targets.given().items())
        return AutoscalerOmitted(
            f"Google left the HorizontalPodAutoscaler out: {wanted} cannot be reached with {model} on {accelerator}.",
            where=SERVICE,
            resolution=f"Choose a target between the lowest and the highest latency observed ({observed})."
            if observed
            else "Choose a target between the lowest and the highest latency observed (profiles benchmarks list).",
        )

    def _read(self, found: giq.Profile, query: ProfileQuery) -> Profile:
        info = found.model_server_info
        stats = list(found.performance_stats)
        pricing = next((cost.pricing_model for each in stats for cost in each.cost if cost.pricing_model), "")
        return Profile(
            model=info.model,
            model_server=info.model_server,
            model_server_version=info.model_server_version,
            accelerator=found.accelerator_type,
            accelerator_count=max(1, found.resources_used.accelerator_count),
            instance_type=found.instance_type,
            tpu_topology=found.tpu_topology,
            pricing_model=pricing_named(pricing) if pricing else query.pricing_model,
            points=tuple(_point(each) for each in stats),
            source=Source(name=SERVICE, evidence=Evidence.PREDICTION, as_of=utc_now().date()),
        )

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Ours instead of Google's, with the quickstart's cure for its best-known trouble."""
        try:
            with google_errors(f"{SERVICE}: {what}"):
                yield
        except PermissionMissing as error:
            known = diagnose_client_error(
                f"PERMISSION_DENIED: {error.summary}", StartupObservation(target=self._target)
            )
            if known is None or known.category is not Category.QUOTA_PROJECT:
                raise
            raise PermissionMissing(
                f"{known.summary} {error.summary}", where=error.where, resolution=known.resolution
            ) from error
        except NotFound as error:
            raise NotFound(
                f"Google has no such profile: {error.summary}",
                where=error.where,
                resolution="See `profiles models list`, `model-servers list` and `model-server-versions list`.",
            ) from error


def _refuse_what_google_cannot_filter(query: ProfileQuery) -> None:
    asked = [label for field, label in _NOT_FILTERABLE.items() if getattr(query, field) is not None]
    if query.targets.itl_ms is not None:
        asked.append("ITL")
    if asked:
        raise UnsupportedFilter(
            f"{SERVICE} v1 neither takes nor states {', '.join(asked)}.",
            where="profiles",
            resolution="Leave the filter out, or ask our own measurements or a file (--source).",
        )


def _version(query: ProfileQuery) -> str:
    return "" if query.model_server_version in (None, "all") else str(query.model_server_version)


def _requirements(query: ProfileQuery) -> giq.PerformanceRequirements:
    requirements = _latency_targets(query.targets)
    cost = giq.Cost(pricing_model=_pricing(query.pricing_model), output_input_cost_ratio=query.output_to_input_ratio)
    if query.max_usd_per_million_input_tokens is not None:
        cost.cost_per_million_input_tokens = _amount(query.max_usd_per_million_input_tokens)
    if query.max_usd_per_million_output_tokens is not None:
        cost.cost_per_million_output_tokens = _amount(query.max_usd_per_million_output_tokens)
    requirements.target_cost = cost
    return requirements


def _latency_targets(targets: Targets) -> giq.PerformanceRequirements:
    fields = {"target_ttft_milliseconds": targets.ttft_ms, "target_ntpot_milliseconds": targets.ntpot_ms}
    # Rounded down: a target of 66.6 ms must not be answered with 67 ms.
    return giq.PerformanceRequirements({name: int(value) for name, value in fields.items() if value is not None})


def _pricing(model: PricingModel) -> str:
    return _API_PRICING.get(model, model.value)


def _amount(usd: float) -> giq.Amount:
    units, nanos = divmod(round(usd * 1e9), 10**9)
    return giq.Amount(units=units, nanos=nanos)


def _usd(amount: giq.Amount | None) -> float | None:
    return amount.units + amount.nanos / 1e9 if amount else None


def _point(stats: giq.PerformanceStats) -> LoadPoint:
    cost = stats.cost[0] if stats.cost else None
    # Zero is proto3's way of saying nothing.
    return LoadPoint(
        requests_per_s=stats.queries_per_second or None,
        output_tokens_per_s=stats.output_tokens_per_second,
        ttft_ms=stats.ttft_milliseconds or None,
        ntpot_ms=stats.ntpot_milliseconds or None,
        usd_per_million_input_tokens=_usd(cost.cost_per_million_input_tokens) if cost else None,
        usd_per_million_output_tokens=_usd(cost.cost_per_million_output_tokens) if cost else None,
    )


def _ranges(found: Sequence[giq.PerformanceRange]) -> tuple[LatencyRange, ...]:
    ranges = []
    for metric, field in (("TTFT", "ttft_range"), ("NTPOT", "ntpot_range")):
        stated = [each for page in found if (each := getattr(page, field)) and each.max_]
        if stated:
            lowest, highest = min(each.min_ for each in stated), max(each.max_ for each in stated)
            ranges.append(LatencyRange(metric=metric, lowest_ms=lowest, highest_ms=highest))
    return tuple(ranges)


def _comments(comments: Iterable[str]) -> tuple[str, ...]:
    lines = (re.sub(r"\s+", " ", text).strip() for text in comments)
    return tuple(dict.fromkeys(f"{SERVICE}: {line}" for line in lines if line))
