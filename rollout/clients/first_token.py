"""Ready means that one real token came back: Kubernetes only knows that `/health` answers."""

from __future__ import annotations

import time

from rollout.clients.cluster import ClusterClient
from rollout.clients.cluster_wait import WaitReport
from rollout.clients.openai_api import OpenAiApi
from rollout.errors import SmokeFailed, StartupFailed
from rollout.smoke import error_message

PATH = "/v1/chat/completions"
PATIENCE_S = 60.0
"""A Service's endpoints follow its pods within seconds; a minute for a control plane under load."""
RETRY_S = 1.0


def with_first_tokens(report: WaitReport, cluster: ClusterClient, service: str, model: str) -> WaitReport:
    """Ask the Service that has just become available for one token, then each of its pods, and add it to their starts.

    Of a single pod the Service's answer is its own. Raises StartupFailed, with the reason, if there is no token.
    """
    with cluster.endpoint(service) as base_url:
        service_s = first_token_s(base_url, model)
    if len(report.pods) == 1:
        return report.with_first_tokens(service_s, {report.pods[0]: service_s})
    by_pod = {}
    for pod in report.pods:
        with cluster.endpoint(service, pod=pod) as base_url:
            by_pod[pod] = first_token_s(base_url, model)
    return report.with_first_tokens(service_s, by_pod)


def first_token_s(base_url: str, model: str, *, patience_s: float = PATIENCE_S) -> float:
    """How long a server takes to give one token; asked again for `patience_s`, because its address may be news.

    Raises StartupFailed, with the reason, if it gives none.
    """
    gives_up = time.monotonic() + patience_s
    while True:
        began = time.monotonic()
        try:
            _one_token(OpenAiApi(base_url), model)
            return time.monotonic() - began
        except SmokeFailed as error:
            if time.monotonic() >= gives_up:
                raise StartupFailed(
                    f"the pods are ready, but the server gives no token: {error.summary}",
                    where=f"{base_url}{PATH}",
                    resolution=error.resolution,
                ) from error
        time.sleep(RETRY_S)


def _one_token(api: OpenAiApi, model: str) -> None:
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    answer = api.post(PATH, body)
    tokens = answer.body.get("usage", {}).get("completion_tokens", 0) if isinstance(answer.body, dict) else 0
    if answer.status != 200 or tokens < 1:
        raise SmokeFailed(
            f"{answer.status}: {error_message(answer.body)}",
            where=api.base_url,
            resolution="Look at the pod's log; the request was one chat message with max_tokens 1.",
        )
