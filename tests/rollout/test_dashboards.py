"""Dashboards: checked-in files are the rendered ones, objectives are drawn in, metrics exist, links fit."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest

from rollout.dashboards import CHARTS, DashboardKind, console_links, dashboard_json
from rollout.profiles import Targets
from rollout.target import Cluster, ClusterMode, CredentialSource, Target
from rollout.universe import Universe

VLLM_METRICS = {
    "vllm:e2e_request_latency_seconds",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:request_generation_tokens",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds",
}
"""Of a real vLLM 0.32's `/metrics`; histograms without their suffix."""


@pytest.mark.parametrize("kind", DashboardKind)
def test_the_checked_in_file_is_the_rendering_without_objectives(kind: DashboardKind) -> None:
    file = resources.files("deployments") / "dashboards" / f"vllm-{kind.value}.json"

    assert file.read_text(encoding="utf-8") == dashboard_json(kind)


def test_every_metric_is_one_that_vllm_exports() -> None:
    used = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for chart in CHARTS
        for query in chart.queries
        for name in re.findall(r"vllm:\w+", query.promql)
    }

    assert used == VLLM_METRICS


def test_objectives_are_drawn_into_their_charts() -> None:
    targets = Targets(ttft_ms=500, ntpot_ms=60, itl_ms=40)

    cloud = json.loads(dashboard_json(DashboardKind.CLOUD_MONITORING, targets))
    grafana = json.loads(dashboard_json(DashboardKind.GRAFANA, targets))

    drawn = [tile["widget"]["xyChart"].get("thresholds", []) for tile in cloud["mosaicLayout"]["tiles"]]
    assert [each["value"] for thresholds in drawn for each in thresholds] == [0.5, 0.04, 0.06]
    steps = [panel["fieldConfig"]["defaults"]["thresholds"]["steps"] for panel in grafana["panels"]]
    assert [each["value"] for panel in steps for each in panel if each["value"] is not None] == [0.5, 0.04, 0.06]


def test_no_tile_lies_on_another() -> None:
    cloud = json.loads(dashboard_json(DashboardKind.CLOUD_MONITORING))
    grafana = json.loads(dashboard_json(DashboardKind.GRAFANA))

    assert len({(tile["xPos"], tile["yPos"]) for tile in cloud["mosaicLayout"]["tiles"]}) == len(CHARTS)
    assert len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in grafana["panels"]}) == len(CHARTS)


def test_grafanas_variables_are_defined() -> None:
    grafana = json.loads(dashboard_json(DashboardKind.GRAFANA))
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(grafana["panels"])))

    assert used == {variable["name"] for variable in grafana["templating"]["list"]}


@pytest.mark.parametrize(
    ("domain", "console"),
    [
        ("googleapis.com", "https://console.cloud.google.com/"),
        ("s3nsapis.fr", "https://console.cloud.s3nscloud.fr/"),
    ],
)
def test_links_lead_to_the_universes_own_console(domain: str, console: str) -> None:
    target = Target(
        name="t", project="my-project", region="u-france-east1", bucket="abc", universe=Universe(domain=domain)
    )
    links = console_links(target, "vllm-gemma-0123abcd", instance="vllm-gemma")

    assert all(link.startswith(console) and "project=my-project" in link for link in links.values())
    assert "/kubernetes/deployment/u-france-east1/llm-serving/default/vllm-gemma-0123abcd/overview" in links["workload"]
    assert links["bucket"] == f"{console}storage/browser/abc?project=my-project"
    assert "%22vllm-gemma%22" in links["logs"]


def test_there_are_no_links_to_pages_that_do_not_exist() -> None:
    by_kubeconfig = Cluster(mode=ClusterMode.KUBECONFIG)
    target = Target(name="t", project="my-project", region="r", bucket="abc", cluster=by_kubeconfig)
    assert list(console_links(target, "m", instance="m")) == ["bucket"]
    embedded = target.model_copy(update={"credentials": CredentialSource.ANONYMOUS})
    assert console_links(embedded, "m", instance="m") == {}
