from __future__ import annotations

import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from rollout.clients.openai_api import OpenAiApi, run_smoke_suite
from rollout.errors import BadInput, SmokeFailed
from rollout.serving import ServingSpec
from rollout.smoke import CANARIES, CHECK_NAMES, Capabilities, Outcome, SmokeReport, with_expectations
from sandbox.server import LoopbackServer
from tests.engines import MODEL, free_port, simulated_engine

ABLE = Capabilities(reasoning=True, tools=True, vision=True, max_images_per_prompt=1, max_model_len=2048)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    latency = {"base_s": 0.001, "per_sequence_s": 0.0}
    with simulated_engine(tmp_path_factory.mktemp("gemma"), gemma=True, latency=latency) as url:
        yield url


@pytest.fixture(scope="module")
def report(gemma: str) -> SmokeReport:
    return run_smoke_suite(gemma, MODEL, ABLE)


def outcomes(report: SmokeReport) -> dict[str, Outcome]:
    return {result.name: result.outcome for result in report.results}


def test_an_able_endpoint_passes_every_check(report: SmokeReport) -> None:
    assert report.passed, report.summary()
    assert report.passed_checks == frozenset(CHECK_NAMES) - {"canary"}
    assert set(report.canary_answers) == {canary.name for canary in CANARIES}


def test_canaries_without_a_stored_answer_are_not_compared_and_not_passed(report: SmokeReport) -> None:
    canary = next(result for result in report.results if result.name == "canary")
    assert canary.outcome is Outcome.NOT_APPLICABLE
    assert canary.detail.startswith("not compared: ")


def test_every_check_has_a_latency_and_a_curl_line(report: SmokeReport) -> None:
    for result in report.results:
        if result.outcome is Outcome.PASSED:
            assert result.latency_s is not None, result.name
            assert "curl -sS" in result.curl


def test_curl_lines_name_an_address_that_outlives_the_run(gemma: str) -> None:
    forward = "kubectl port-forward --namespace ns service/llm 8080:8080"
    report = run_smoke_suite(gemma, MODEL, Capabilities(), curl_url="http://127.0.0.1:8080", reach_with=forward)
    assert (report.base_url, report.reach_with) == ("http://127.0.0.1:8080", forward)
    for result in report.results:
        assert gemma not in result.curl
        assert "http://127.0.0.1:8080/" in result.curl or not result.curl


def test_curl_lines_hold_the_request(gemma: str, report: SmokeReport) -> None:
    chat = next(result for result in report.results if result.name == "chat")
    body = chat.curl.partition(" -d ")[2].strip("'")
    assert OpenAiApi(gemma).post("/v1/chat/completions", json.loads(body)).status == 200


def test_what_the_model_cannot_do_is_not_applicable_and_says_why(gemma: str) -> None:
    capabilities = Capabilities.of(
        {"max_position_embeddings": 2048},
        ServingSpec(served_model_name=MODEL, tool_call_parser=None, reasoning_parser=None, max_model_len=None),
    )
    report = run_smoke_suite(gemma, MODEL, capabilities)
    missing = {r.name: r.detail for r in report.results if r.outcome is Outcome.NOT_APPLICABLE}
    assert missing == {
        "reasoning": "served without --reasoning-parser",
        "tools": "served without --enable-auto-tool-choice and --tool-call-parser",
        "image": "the model's config has no vision part",
        "image-limit": "the model's config has no vision part",
        "canary": "not compared: no answer of an earlier rollout is stored; these answers are the first",
    }
    assert report.passed
    assert "tools" not in report.passed_checks


def test_capabilities_that_are_not_there_fail(tmp_path: Path) -> None:
    with simulated_engine(tmp_path, latency={"base_s": 0.001}) as url:
        report = run_smoke_suite(url, MODEL, ABLE)
    failed = {result.name: result.detail for result in report.failures}
    assert set(failed) == {"reasoning", "tools", "image", "image-limit"}
    assert "--enable-auto-tool-choice" in failed["tools"]
    assert "not a multimodal model" in failed["image"]


def test_a_wrong_name_is_named(gemma: str) -> None:
    report = run_smoke_suite(gemma, "google/gemma-4-26B-A4B-it", ABLE)
    assert outcomes(report)["models"] is Outcome.FAILED
    assert f"the server names {MODEL}" in report.summary()
    with pytest.raises(BadInput, match="served-model-name"):
        OpenAiApi(gemma).max_model_len("google/gemma-4-26B-A4B-it")


def test_a_changed_answer_is_found_by_the_stored_expectation(gemma: str, report: SmokeReport) -> None:
    same = with_expectations(CANARIES, report.canary_answers)
    assert outcomes(run_smoke_suite(gemma, MODEL, ABLE, canaries=same))["canary"] is Outcome.PASSED
    other = with_expectations(CANARIES, report.canary_answers | {"capital": "Paris is what the old revision said"})
    again = run_smoke_suite(gemma, MODEL, ABLE, canaries=other)
    assert outcomes(again)["canary"] is Outcome.FAILED
    assert "capital: only" in again.summary()


def test_results_are_handed_over_as_they_come(gemma: str) -> None:
    seen: list[str] = []
    run_smoke_suite(gemma, MODEL, ABLE, on_result=lambda result: seen.append(result.name))
    assert tuple(seen) == CHECK_NAMES


def test_a_refused_connection_is_explained_as_in_the_tutorial() -> None:
    report = run_smoke_suite(f"http://127.0.0.1:{free_port()}", MODEL, Capabilities())
    assert not report.passed
    assert all("port-forward" in result.detail for result in report.failures)


def test_an_empty_reply_is_explained_as_in_the_tutorial() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with pytest.raises(SmokeFailed, match=r"Empty reply from server.*Application startup complete"):
            OpenAiApi(f"http://127.0.0.1:{listener.getsockname()[1]}").get("/health")
        thread.join()


CHAT = {
    "id": "x",
    "object": "chat.completion",
    "model": MODEL,
    "choices": [{"message": {"role": "assistant", "content": "Rayleigh scattering"}, "finish_reason": "stop"}],
}


class Malformed(LoopbackServer):
    """Answers every POST with one body."""

    def __init__(self, chat: Any, *, models: Any, tokens: Any) -> None:
        super().__init__()
        self._chat, self._models, self._tokens = chat, models, tokens

    def build_app(self) -> web.Application:
        app = web.Application()
        for path, body in (("/v1/models", self._models), ("/health", {})):
            app.router.add_get(path, self._answering(body))
        app.router.add_post("/tokenize", self._answering(self._tokens))
        app.router.add_post("/{path:.*}", self._answering(self._chat))
        return app

    @staticmethod
    def _answering(body: Any) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(body)

        return answer


@pytest.mark.parametrize(
    ("chat", "models", "tokens"),
    [
        (CHAT, {"data": [{"id": MODEL, "max_model_len": 2048}]}, {"count": 3}),
        (CHAT, {"data": [{"id": MODEL, "max_model_len": "many"}]}, {"tokens": []}),
        (CHAT | {"usage": {"prompt_tokens": None}}, {"data": "none"}, ["no", "object"]),
        (CHAT | {"choices": ["text"]}, {"data": ["text"]}, {"count": "3"}),
        (CHAT | {"choices": [{"message": "text", "finish_reason": 1}]}, ["none"], 3),
        (CHAT | {"choices": [{"message": {"tool_calls": ["get_weather"]}}]}, None, None),
        ([], "text", "text"),
    ],
    ids=["no-usage", "no-count", "no-numbers", "no-choices", "no-message", "no-call", "lists"],
)
def test_a_malformed_answer_is_a_verdict_and_never_an_exception(chat: Any, models: Any, tokens: Any) -> None:
    with Malformed(chat, models=models, tokens=tokens) as server:
        report = run_smoke_suite(server.url, MODEL, ABLE)
    seen = outcomes(report)
    assert tuple(seen) == CHECK_NAMES
    assert {seen[name] for name in ("chat", "reasoning", "streaming", "tools", "image", "long-context")} == {
        Outcome.FAILED
    }
    assert all(result.detail for result in report.failures)


class WithoutTokenize(LoopbackServer):
    """An OpenAI-compatible server that is not vLLM: no `/tokenize`, usage in its answers."""

    def build_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"usage": {"prompt_tokens": 1 + len(body["prompt"].split())}})


def test_tokens_are_counted_by_usage_where_there_is_no_tokenize() -> None:
    with WithoutTokenize() as server:
        assert OpenAiApi(server.url).count_tokens("m", "one two three", chat=False) == 4


def test_a_base_address_may_end_in_v1(gemma: str) -> None:
    assert MODEL in OpenAiApi(f"{gemma}/v1/").models()
