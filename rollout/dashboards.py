"""Dashboards of vLLM's metrics with the objectives drawn in, for Cloud Monitoring and for Grafana; console links.

One list of charts, two renderings. Both read PromQL: on GKE, Managed Service for Prometheus answers it. Metric names
are those of vLLM 0.32. `deployments/dashboards/` holds the renderings without objectives.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any
from urllib.parse import quote

from rollout.profiles import Targets
from rollout.target import ClusterMode, CredentialSource, Target
from rollout.values import Value

SELECTOR = '{namespace=~"$namespace",pod=~"$deployment-.*"}'
"""Grafana's variables; Cloud Monitoring's template variables have the same names."""

TITLE = "vLLM serving"


class DashboardKind(StrEnum):
    CLOUD_MONITORING = "cloud-monitoring"
    GRAFANA = "grafana"


class Query(Value):
    """One line of a chart."""

    legend: str
    promql: str


class Chart(Value):
    """One chart."""

    title: str
    unit: str
    """`s`, `tokens/s`, `requests/s`, `requests` or `share` (0 to 1)."""
    queries: tuple[Query, ...]
    objective_field: str | None = None
    """Field of `Targets` that is drawn into it."""


def _quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            legend=f"p{round(share * 100)}",
            promql=f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{SELECTOR}[1m])))",
        )
        for share in (0.5, 0.9, 0.99)
    )


def _rate(metric: str) -> str:
    return f"sum(rate({metric}{SELECTOR}[1m]))"


CHARTS: tuple[Chart, ...] = (
    Chart(
        title="Time to first token (TTFT)",
        unit="s",
        queries=_quantiles("vllm:time_to_first_token_seconds"),
        objective_field="ttft_ms",
    ),
    Chart(
        title="Inter-token latency (ITL)",
        unit="s",
        queries=_quantiles("vllm:inter_token_latency_seconds"),
        objective_field="itl_ms",
    ),
    Chart(
        title="Normalised time per output token (NTPOT), mean",
        unit="s",
        # Latency and tokens are separate histograms of the same requests: their means have a ratio, quantiles do not.
        queries=(
            Query(
                legend="mean",
                promql=f"{_rate('vllm:e2e_request_latency_seconds_sum')}"
                f" / {_rate('vllm:request_generation_tokens_sum')}",
            ),
        ),
        objective_field="ntpot_ms",
    ),
    Chart(title="Request latency", unit="s", queries=_quantiles("vllm:e2e_request_latency_seconds")),
    Chart(
        title="Throughput",
        unit="tokens/s",
        queries=(
            Query(legend="output", promql=_rate("vllm:generation_tokens_total")),
            Query(legend="input", promql=_rate("vllm:prompt_tokens_total")),
        ),
    ),
    Chart(
        title="Finished requests",
        unit="requests/s",
        queries=(
            Query(
                legend="{{finished_reason}}",
                promql=f"sum by (finished_reason) (rate(vllm:request_success_total{SELECTOR}[1m]))",
            ),
        ),
    ),
    Chart(
        title="Requests in flight per replica: what the autoscaler follows",
        unit="requests",
        queries=(
            Query(legend="running, mean", promql=f"avg(vllm:num_requests_running{SELECTOR})"),
            Query(legend="waiting, mean", promql=f"avg(vllm:num_requests_waiting{SELECTOR})"),
        ),
    ),
    Chart(
        title="KV cache",
        unit="share",
        queries=(
            Query(legend="used, highest", promql=f"max(vllm:kv_cache_usage_perc{SELECTOR})"),
            Query(
                legend="prefix hits",
                promql=f"{_rate('vllm:prefix_cache_hits_total')} / {_rate('vllm:prefix_cache_queries_total')}",
            ),
        ),
    ),
    Chart(
        title="Preemptions",
        unit="requests/s",
        queries=(Query(legend="preempted", promql=_rate("vllm:num_preemptions_total")),),
    ),
    Chart(
        title="Replicas that answer",
        unit="requests",
        queries=(Query(legend="replicas", promql=f"count(vllm:num_requests_running{SELECTOR})"),),
    ),
)


def dashboard_json(kind: DashboardKind, targets: Targets | None = None) -> str:
    """The dashboard as a file: `gcloud monitoring dashboards create --config-from-file`, or Grafana's import."""
    render = cloud_monitoring_dashboard if kind is DashboardKind.CLOUD_MONITORING else grafana_dashboard
    return json.dumps(render(targets or Targets()), indent=2) + "\n"


def cloud_monitoring_dashboard(targets: Targets) -> dict[str, Any]:
    """A dashboard of the Cloud Monitoring API v1."""
    tiles = []
    for index, chart in enumerate(CHARTS):
        limit_s = _objective_s(chart, targets)
        axis = {"label": chart.unit, "scale": "LINEAR"}
        data_sets = [
            {
                "plotType": "LINE",
                "targetAxis": "Y1",
                "legendTemplate": _cloud_legend(query.legend),
                "timeSeriesQuery": {"prometheusQuery": _cloud_promql(query.promql), "unitOverride": _UCUM[chart.unit]},
            }
            for query in chart.queries
        ]
        xy_chart: dict[str, Any] = {"chartOptions": {"mode": "COLOR"}, "dataSets": data_sets, "yAxis": axis}
        if limit_s is not None:
            xy_chart["thresholds"] = [{"label": f"objective {limit_s:g} s", "targetAxis": "Y1", "value": limit_s}]
        tiles.append(
            {
                "width": 24,
                "height": 16,
                "xPos": 24 * (index % 2),
                "yPos": 16 * (index // 2),
                "widget": {"title": chart.title, "xyChart": xy_chart},
            }
        )
    filters = [
        {"filterType": "RESOURCE_LABEL", "labelKey": key, "templateVariable": name, "stringValue": ""}
        for key, name in (("namespace", "namespace"),)
    ]
    return {"displayName": TITLE, "dashboardFilters": filters, "mosaicLayout": {"columns": 48, "tiles": tiles}}


def grafana_dashboard(targets: Targets) -> dict[str, Any]:
    """A dashboard of Grafana's JSON model, schema 39 (Grafana 10.4 and later)."""
    panels = []
    for index, chart in enumerate(CHARTS):
        limit_s = _objective_s(chart, targets)
        steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
        if limit_s is not None:
            steps.append({"color": "red", "value": limit_s})
        defaults = {
            "unit": _GRAFANA_UNITS[chart.unit],
            "custom": {"thresholdsStyle": {"mode": "line" if limit_s is not None else "off"}},
            "thresholds": {"mode": "absolute", "steps": steps},
        }
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": chart.title,
                "datasource": _GRAFANA_SOURCE,
                "gridPos": {"h": 8, "w": 12, "x": 12 * (index % 2), "y": 8 * (index // 2)},
                "fieldConfig": {"defaults": defaults, "overrides": []},
                "targets": [
                    {
                        "refId": "ABCDEF"[i],
                        "datasource": _GRAFANA_SOURCE,
                        "expr": query.promql,
                        "legendFormat": query.legend,
                    }
                    for i, query in enumerate(chart.queries)
                ],
            }
        )
    return {
        "title": TITLE,
        "uid": "llm-rollout-vllm",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_variable("datasource", "datasource", "prometheus"), *_GRAFANA_VARIABLES]},
        "panels": panels,
    }


_UCUM = {"s": "s", "tokens/s": "{tokens}/s", "requests/s": "{requests}/s", "requests": "1", "share": "10^2.%"}
_GRAFANA_UNITS = {"s": "s", "tokens/s": "short", "requests/s": "reqps", "requests": "short", "share": "percentunit"}
_GRAFANA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _variable(name: str, kind: str, query: str) -> dict[str, Any]:
    return {"name": name, "type": kind, "query": query, "refresh": 1}


_GRAFANA_VARIABLES = [
    {
        **_variable("namespace", "query", "label_values(vllm:num_requests_running, namespace)"),
        "datasource": _GRAFANA_SOURCE,
        "includeAll": True,
        "allValue": ".*",
    },
    {**_variable("deployment", "textbox", ".*"), "current": {"text": ".*", "value": ".*"}},
]


def _objective_s(chart: Chart, targets: Targets) -> float | None:
    value = getattr(targets, chart.objective_field) if chart.objective_field else None
    return None if value is None else value / 1e3


def _cloud_promql(promql: str) -> str:
    """Cloud Monitoring inserts a filter's whole matcher where `${namespace}` stands."""
    return promql.replace(SELECTOR, "{${namespace}}")


def _cloud_legend(legend: str) -> str:
    return legend.replace("{{", "${metric.labels.").replace("}}", "}") if "{{" in legend else legend


def console_links(target: Target, deployment: str, *, instance: str) -> dict[str, str]:
    """Pages of the target's console, in its universe: the bucket, and of a Deployment workload, metrics and logs.

    `instance` is the model server that the Deployment is, or is a revision of. A cluster that a kubeconfig names has no
    pages there, and the embedded cloud has no console at all.
    """
    if target.credentials is CredentialSource.ANONYMOUS:
        return {}
    console, project = target.universe.console, quote(target.project)
    bucket = {"bucket": f"{console}/storage/browser/{target.bucket}?project={project}"}
    if target.cluster.mode is ClusterMode.KUBECONFIG:
        return bucket
    where = "/".join(map(quote, (target.region, target.cluster.name, target.namespace, deployment)))
    log_query = quote(
        f'resource.type="k8s_container" resource.labels.cluster_name="{target.cluster.name}"'
        f' resource.labels.namespace_name="{target.namespace}"'
        f' labels."k8s-pod/app_kubernetes_io/instance"="{instance}"',
        safe="",
    )
    return bucket | {
        "workload": f"{console}/kubernetes/deployment/{where}/overview?project={project}",
        "AI/ML": f"{console}/kubernetes/aiml/overview?project={project}",
        "Metrics Explorer": f"{console}/monitoring/metrics-explorer?project={project}",
        "dashboards": f"{console}/monitoring/dashboards?project={project}",
        "logs": f"{console}/logs/query;query={log_query}?project={project}",
    }
