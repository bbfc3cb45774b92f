"""GKE Inference Quickstart on loopback: the REST surface of `google.cloud.gkerecommender.v1`.

Simulated: all six methods with strict requests, paging with opaque tokens, profiles at their saturation or at a latency
target, performance ranges, pricing models (spot where none is sent), cost targets, benchmark data, generated manifests
with comments, the HorizontalPodAutoscaler that is silently left out where the target cannot be reached, and the errors
of a missing quota project, of a disabled API and of unknown profiles.
Not simulated: everything that the v1 API does not have (use cases, ITL, serving stacks).

The figures are SYNTHETIC: made up from a formula, with the right shape and units. They say nothing about any real
accelerator and must never be taken for Google's data.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from aiohttp import web
from google.cloud import gkerecommender_v1 as giq
from google.protobuf.message import Message

from sandbox.google_apis.rest import (
    JSON_CONTENT_TYPE,
    SERVER_HEADERS,
    SYSTEM_PARAMETERS,
    ApiError,
    Json,
    bad_request,
    encode,
    error_info,
    not_found_page,
    parse_message,
    unknown_field,
)
from sandbox.server import LoopbackServer

SERVICE = "gkerecommender.googleapis.com"
GOOGLE_CLIENT_PROJECT = "764086051850"
"""The project of gcloud's own OAuth client, which Google names when a caller names no quota project."""

PRICING = {"on-demand": 1.0, "spot": 0.4, "1-year-cud": 0.7, "3-years-cud": 0.45}
"""Share of the on-demand price."""

_DEFAULT_PRICING = "spot"
_SYNTHETIC = "Synthetic figures of the embedded cloud: not Google's data."


@dataclass(frozen=True, slots=True)
class SyntheticProfile:
    """One line of the catalogue; its curve follows from four numbers."""

    model: str
    version: str
    accelerator: str
    instance_type: str
    accelerators: int
    usd_per_hour: float
    max_output_tokens_per_s: int
    idle_ntpot_ms: float
    idle_ttft_ms: float
    server: str = "vllm"
    tpu_topology: str = ""

    def points(self) -> list[tuple[float, int, int, int]]:
        """(requests/s, output tokens/s, NTPOT ms, TTFT ms) from a tenth of the load to a little past saturation."""
        rows = []
        for load in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1):
            tokens = self.max_output_tokens_per_s * min(load, 1.0)
            # Latency grows as in a queue that has a tenth of its capacity in reserve at saturation.
            growth = 1 + 2.2 * load**3 + max(0.0, load - 1) * 30
            ntpot, ttft = self.idle_ntpot_ms * growth, self.idle_ttft_ms * (1 + 3 * load**4 + max(0.0, load - 1) * 60)
            rows.append((tokens / MEAN_OUTPUT_TOKENS, round(tokens), round(ntpot), round(ttft)))
        return rows


MEAN_INPUT_TOKENS, MEAN_OUTPUT_TOKENS = 226, 195
"""Of the quickstart's benchmark distribution."""

CATALOGUE: tuple[SyntheticProfile, ...] = (
    SyntheticProfile("openai/gpt-oss-20b", "gptoss", "nvidia-h100-80gb", "a3-highgpu-1g", 1, 11.06, 13000, 21, 75),
    SyntheticProfile("openai/gpt-oss-20b", "gptoss", "nvidia-l4", "g2-standard-12", 1, 1.00, 1100, 38, 160),
    SyntheticProfile("openai/gpt-oss-120b", "v0.11.2", "nvidia-h100-80gb", "a3-highgpu-2g", 2, 22.12, 9000, 24, 95),
    SyntheticProfile("google/gemma-2-27b-it", "v0.7.2", "nvidia-l4", "g2-standard-48", 4, 4.00, 700, 62, 260),
    SyntheticProfile("google/gemma-2-27b-it", "v0.11.2", "nvidia-l4", "g2-standard-48", 4, 4.00, 760, 60, 250),
    SyntheticProfile(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "v0.11.2",
        "nvidia-tesla-a100",
        "a2-highgpu-1g",
        1,
        3.67,
        3900,
        18,
        70,
    ),
    SyntheticProfile(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "v0.11.2", "nvidia-l4", "g2-standard-12", 1, 1.00, 900, 36, 130
    ),
    SyntheticProfile(
        *("meta-llama/Llama-3.1-8B-Instruct", "v0.14.0", "tpu-v6e-slice", "ct6e-standard-1t", 1, 2.70, 4100, 19, 80),
        tpu_topology="1x1",
    ),
    SyntheticProfile(
        *("HuggingFaceTB/SmolLM2-135M-Instruct", "v0.32.0", "nvidia-h100-80gb", "a3-edgegpu-8g-nolssd", 1),
        *(10.0, 1200, 9, 12),
    ),
)


class RecommenderServer(LoopbackServer):
    """The service for one project."""

    def __init__(
        self,
        *,
        catalogue: Sequence[SyntheticProfile] = CATALOGUE,
        page_size: int = 2,
        requires_quota_project: bool = False,
        enabled: bool = True,
        port: int = 0,
    ) -> None:
        """`page_size` is small, so that whoever reads one page only is caught."""
        super().__init__(port=port)
        self.catalogue = tuple(catalogue)
        self.page_size = page_size
        self.requires_quota_project = requires_quota_project
        self.enabled = enabled
        self.received: list[tuple[str, Json]] = []
        """Method and parsed request of every call that was accepted."""

    def build_app(self) -> web.Application:
        app = web.Application()
        routes: dict[str, tuple[Any, Callable[[Any], Message]]] = {
            "/v1/models:fetch": (giq.FetchModelsRequest, self._models),
            "/v1/modelServers:fetch": (giq.FetchModelServersRequest, self._servers),
            "/v1/modelServerVersions:fetch": (giq.FetchModelServerVersionsRequest, self._versions),
            "/v1/profiles:fetch": (giq.FetchProfilesRequest, self._profiles),
            "/v1/benchmarkingData:fetch": (giq.FetchBenchmarkingDataRequest, self._benchmarks),
            "/v1/optimizedManifest:generate": (giq.GenerateOptimizedManifestRequest, self._manifest),
        }

        async def serve(request: web.Request) -> web.Response:
            try:
                kind, handler = routes[request.path]
            except KeyError:
                return web.Response(status=404, text=not_found_page(request.path), content_type="text/html")
            expected = "GET" if request.path in _GETS else "POST"
            if request.method != expected:
                return web.Response(status=404, text=not_found_page(request.path), content_type="text/html")
            try:
                self._admit(request)
                call = kind.pb(kind())
                await _read(request, call)
                self.received.append((request.path, _as_json(call)))
                body = encode(handler(call), enums_as_numbers=False)
                return web.Response(body=body, headers=SERVER_HEADERS | {"Content-Type": JSON_CONTENT_TYPE})
            except ApiError as error:
                text = json.dumps(error.body(), indent=2)
                return web.Response(
                    status=error.code, text=text, headers=SERVER_HEADERS | {"Content-Type": JSON_CONTENT_TYPE}
                )

        app.router.add_route("*", "/{path:.*}", serve)
        return app

    def _admit(self, request: web.Request) -> None:
        if self.requires_quota_project and "X-Goog-User-Project" not in request.headers:
            consumer = {"service": SERVICE, "consumer": f"projects/{GOOGLE_CLIENT_PROJECT}"}
            raise ApiError(
                "PERMISSION_DENIED",
                "Your application is authenticating by using local Application Default Credentials. The"
                f" {SERVICE} API requires a quota project, which is not set by default. To learn how to set your quota"
                " project, see https://cloud.google.com/docs/authentication/adc-troubleshooting/user-creds .",
                details=(error_info("SERVICE_DISABLED", "googleapis.com", consumer),),
                legacy=False,
            )
        if not self.enabled:
            consumer = {"service": SERVICE, "consumer": "projects/rehearsal-project"}
            raise ApiError(
                "PERMISSION_DENIED",
                f"{SERVICE} has not been used in project rehearsal-project before or it is disabled.",
                details=(error_info("SERVICE_DISABLED", "googleapis.com", consumer),),
                legacy=False,
            )

    def _models(self, call: Any) -> Message:
        names, token = self._page(sorted({each.model for each in self.catalogue}), call)
        return giq.FetchModelsResponse.pb(giq.FetchModelsResponse(models=names, next_page_token=token))

    def _servers(self, call: Any) -> Message:
        found = sorted({each.server for each in self._of_model(call.model)})
        names, token = self._page(found, call)
        return giq.FetchModelServersResponse.pb(
            giq.FetchModelServersResponse(model_servers=names, next_page_token=token)
        )

    def _versions(self, call: Any) -> Message:
        found = [each for each in self._of_model(call.model) if each.server == call.model_server]
        names, token = self._page(sorted({each.version for each in found}), call)
        return giq.FetchModelServerVersionsResponse.pb(
            giq.FetchModelServerVersionsResponse(model_server_versions=names, next_page_token=token)
        )

    def _profiles(self, call: Any) -> Message:
        wanted = [
            each
            for each in self.catalogue
            if call.model in ("", each.model)
            and call.model_server in ("", each.server)
            and call.model_server_version in ("", each.version)
        ]
        needs = call.performance_requirements
        cost = _cost_terms(needs.target_cost)
        found = []
        for each in wanted:
            point = _operating_point(each, needs)
            if point is not None:
                stats = _stats(each, point, *cost)
                if _is_affordable(stats, needs.target_cost):
                    found.append(_profile(each, [stats]))
        page, token = self._page(found, call)
        answer = giq.FetchProfilesResponse(
            profile=page, performance_range=_range(wanted), comments=_SYNTHETIC, next_page_token=token
        )
        return giq.FetchProfilesResponse.pb(answer)

    def _benchmarks(self, call: Any) -> Message:
        info = call.model_server_info
        found = [
            each
            for each in self._of_model(info.model)
            if each.server == info.model_server
            and info.model_server_version in ("", each.version)
            and call.instance_type in ("", each.instance_type)
        ]
        pricing = _known_pricing(call.pricing_model)
        profiles = [_profile(each, [_stats(each, point, pricing, 4.0) for point in each.points()]) for each in found]
        return giq.FetchBenchmarkingDataResponse.pb(giq.FetchBenchmarkingDataResponse(profile=profiles))

    def _manifest(self, call: Any) -> Message:
        info = call.model_server_info
        found = [
            each
            for each in self._of_model(info.model)
            if each.server == info.model_server
            and info.model_server_version in ("", each.version)
            and each.accelerator == call.accelerator_type
        ]
        if not found:
            raise ApiError("NOT_FOUND", f"No profile of {info.model} on {call.accelerator_type}.", legacy=False)
        profile = found[-1]
        namespace = call.kubernetes_namespace or "default"
        objects = _objects(profile, namespace, call.storage_config.model_bucket_uri)
        needs = call.performance_requirements
        wants_scaling = bool(needs.target_ntpot_milliseconds or needs.target_ttft_milliseconds)
        if wants_scaling and _operating_point(profile, needs) is not None:
            objects.append(_autoscaler(profile, namespace))
        manifests = [
            giq.KubernetesManifest(
                kind=each["kind"], api_version=each["apiVersion"], content=yaml.safe_dump(each, sort_keys=False)
            )
            for each in objects
        ]
        answer = giq.GenerateOptimizedManifestResponse(
            kubernetes_manifests=manifests,
            comments=[_SYNTHETIC, "Rule Name: Sample comment of the embedded cloud"],
            manifest_version=f"GKE cluster synthetic\nModel server {profile.server} {profile.version}",
        )
        return giq.GenerateOptimizedManifestResponse.pb(answer)

    def _of_model(self, model: str) -> list[SyntheticProfile]:
        if not model:
            raise bad_request("model", "The model is required.")
        found = [each for each in self.catalogue if each.model == model]
        if not found:
            raise ApiError("NOT_FOUND", f"Model {model} is not supported.", legacy=False)
        return found

    def _page(self, items: Sequence[Any], call: Any) -> tuple[list[Any], str]:
        size = call.page_size or self.page_size
        start = 0
        if call.page_token:
            try:
                start = int(base64.urlsafe_b64decode(call.page_token.encode()))
            except ValueError:
                raise bad_request("page_token", "Invalid page token.") from None
        end = start + size
        token = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(items) else ""
        return list(items[start:end]), token


_GETS = frozenset({"/v1/models:fetch", "/v1/modelServers:fetch", "/v1/modelServerVersions:fetch"})


async def _read(request: web.Request, call: Message) -> None:
    """Fill the message from the body, or from the query of a GET."""
    if request.method == "POST":
        body = await request.text()
        try:
            data = json.loads(body) if body else {}
        except ValueError as error:
            raise bad_request("", f"Invalid JSON payload received. {error}") from error
        parse_message(data, call)
        return
    fields = {each.json_name for each in call.DESCRIPTOR.fields}
    query = {name: value for name, value in request.query.items() if name not in SYSTEM_PARAMETERS}
    for name in query:
        if name not in fields:
            raise unknown_field(name)
    parse_message(query, call)


def _as_json(call: Message) -> Json:
    parsed: Json = json.loads(encode(call, enums_as_numbers=False))
    return parsed


def _known_pricing(name: str) -> str:
    if name and name not in PRICING:
        raise bad_request("pricing_model", f"Invalid pricing model: {name}")
    return name or _DEFAULT_PRICING


def _cost_terms(cost: Any) -> tuple[str, float]:
    return _known_pricing(cost.pricing_model), cost.output_input_cost_ratio or 4.0


def _operating_point(profile: SyntheticProfile, needs: Any) -> tuple[float, int, int, int] | None:
    """The highest throughput within the targets; None where the least load misses them."""
    rising = profile.points()[:-1]
    ntpot = needs.target_ntpot_milliseconds or None
    ttft = needs.target_ttft_milliseconds or None
    within = [p for p in rising if (ntpot is None or p[2] <= ntpot) and (ttft is None or p[3] <= ttft)]
    return within[-1] if within else None


def _stats(
    profile: SyntheticProfile, point: tuple[float, int, int, int], pricing: str, ratio: float
) -> giq.PerformanceStats:
    qps, tokens, ntpot, ttft = point
    usd_per_s = profile.usd_per_hour * PRICING[pricing] / 3600
    output = usd_per_s / (qps * MEAN_INPUT_TOKENS / ratio + tokens) * 1e6
    return giq.PerformanceStats(
        queries_per_second=qps,
        output_tokens_per_second=tokens,
        ntpot_milliseconds=ntpot,
        ttft_milliseconds=ttft,
        cost=[
            giq.Cost(
                cost_per_million_output_tokens=_amount(output),
                cost_per_million_input_tokens=_amount(output / ratio),
                pricing_model=pricing,
                output_input_cost_ratio=ratio,
            )
        ],
    )


def _amount(usd: float) -> giq.Amount:
    units, nanos = divmod(round(usd * 1e9), 10**9)
    return giq.Amount(units=units, nanos=nanos)


def _is_affordable(stats: giq.PerformanceStats, target: Any) -> bool:
    def usd(amount: Any) -> float:
        return float(amount.units) + amount.nanos / 1e9

    pairs = (
        (usd(target.cost_per_million_output_tokens), usd(stats.cost[0].cost_per_million_output_tokens)),
        (usd(target.cost_per_million_input_tokens), usd(stats.cost[0].cost_per_million_input_tokens)),
    )
    return all(not limit or cost <= limit for limit, cost in pairs)


def _profile(each: SyntheticProfile, stats: Sequence[giq.PerformanceStats]) -> giq.Profile:
    return giq.Profile(
        model_server_info=giq.ModelServerInfo(
            model=each.model, model_server=each.server, model_server_version=each.version
        ),
        accelerator_type=each.accelerator,
        tpu_topology=each.tpu_topology,
        instance_type=each.instance_type,
        resources_used=giq.ResourcesUsed(accelerator_count=each.accelerators),
        performance_stats=list(stats),
    )


def _range(profiles: Sequence[SyntheticProfile]) -> giq.PerformanceRange | None:
    points = [point for each in profiles for point in each.points()[:-1]]
    if not points:
        return None
    tokens, ntpot, ttft = ([point[i] for point in points] for i in (1, 2, 3))
    return giq.PerformanceRange(
        throughput_output_range=giq.TokensPerSecondRange(min_=min(tokens), max_=max(tokens)),
        ntpot_range=giq.MillisecondRange(min_=min(ntpot), max_=max(ntpot)),
        ttft_range=giq.MillisecondRange(min_=min(ttft), max_=max(ttft)),
    )


def _objects(profile: SyntheticProfile, namespace: str, bucket_uri: str) -> list[Json]:
    name = profile.model.partition("/")[2].lower().replace(".", "-")
    labels = {"app": f"{name}-{profile.server}"}
    source = bucket_uri or profile.model
    container: Json = {
        "name": "inference-server",
        "image": f"{profile.server}:{profile.version}",
        "args": [f"--model={source}", f"--tensor-parallel-size={profile.accelerators}"],
        "ports": [{"containerPort": 8000}],
        "resources": {"limits": {"nvidia.com/gpu": str(profile.accelerators)}},
    }
    metadata = {"namespace": namespace, "labels": {"recommender.ai.gke.io/generated": "true"}}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{name}-deployment", **metadata},
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{name}-service", **metadata},
        "spec": {"selector": labels, "ports": [{"port": 8000, "targetPort": 8000}]},
    }
    monitoring = {
        "apiVersion": "monitoring.googleapis.com/v1",
        "kind": "PodMonitoring",
        "metadata": {"name": f"{name}-podmonitoring", **metadata},
        "spec": {"selector": {"matchLabels": labels}, "endpoints": [{"port": 8000, "path": "/metrics"}]},
    }
    return [deployment, service, monitoring]


def _autoscaler(profile: SyntheticProfile, namespace: str) -> Json:
    name = profile.model.partition("/")[2].lower().replace(".", "-")
    metric = {"name": "prometheus.googleapis.com|vllm:num_requests_running|gauge"}
    target = {"type": "AverageValue", "averageValue": "64"}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": f"{name}-hpa", "namespace": namespace},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{name}-deployment"},
            "minReplicas": 1,
            "maxReplicas": 5,
            "metrics": [{"type": "Pods", "pods": {"metric": metric, "target": target}}],
        },
    }
