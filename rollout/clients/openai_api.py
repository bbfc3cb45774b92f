"""An OpenAI-compatible endpoint over HTTP, and the smoke suite that proves it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from rollout.diagnosis import diagnose_client_error
from rollout.errors import BadInput, RolloutError, SmokeFailed
from rollout.prompts import calibrate
from rollout.smoke import (
    CANARIES,
    CHECKS,
    QUESTION,
    CanaryPrompt,
    Capabilities,
    Outcome,
    SmokeCheck,
    SmokeReport,
    SmokeResult,
    StreamedAnswer,
    assemble_stream,
    canary_problems,
    canary_request,
    chat_problems,
    chat_request,
    curl_line,
    error_message,
    finish_reason,
    image_limit_problems,
    image_request,
    message_of,
    prompt_tokens,
    reasoning_of,
    reasoning_problems,
    refusal_problems,
    sky_request,
    stream_problems,
    structured_problems,
    structured_request,
    tool_call_problems,
    tool_request,
    tool_result_problems,
    tool_result_request,
)

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
"""The tutorial's answer takes 1101 tokens: 55 s at 50 ms each, and a cold server on a CPU needs five times that."""

CONCURRENT_STREAMS = 4
LONG_CONTEXT_SHARE = 0.9
"""Of the context window."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: Any
    """Parsed JSON, or the text if it is none."""
    latency_s: float


class OpenAiApi:
    """A small client; raises SmokeFailed, with the tutorial's explanation, when the endpoint cannot be reached."""

    def __init__(self, base_url: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        parts = urlsplit(base_url)
        if parts.username is not None:
            raise BadInput(
                "an address with a user name and a password would show them in every line that repeats a request.",
                where=f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}",
                resolution="Give the address without them, through a proxy or port-forward that authenticates.",
            )
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._timeout = (CONNECT_TIMEOUT_S, timeout_s)
        self._session = requests.Session()

    def get(self, path: str) -> Answer:
        return self._answer("GET", path)

    def post(self, path: str, body: Any) -> Answer:
        """POST JSON; a string is sent as it is."""
        return self._answer("POST", path, body)

    def stream(self, path: str, body: dict[str, Any]) -> list[str]:
        """The `data:` payloads of a streamed answer, `[DONE]` included.

        Raises SmokeFailed if the request is refused or the stream breaks.
        """
        try:
            with self._request("POST", path, {**body, "stream": True}, stream=True) as answer:
                if answer.status_code != 200:
                    raise SmokeFailed(f"answered with {answer.status_code}: {answer.text[:300]}", where=path)
                answer.encoding = "utf-8"
                lines = answer.iter_lines(decode_unicode=True)
                return [line[5:].strip() for line in lines if line.startswith("data:")]
        except requests.RequestException as error:
            raise explain(error, self.base_url) from error

    def models(self) -> dict[str, int | None]:
        """Served models and their context windows in tokens."""
        answer = self.get("/v1/models")
        entries = answer.body.get("data") if answer.status == 200 and isinstance(answer.body, dict) else None
        listed = entries if isinstance(entries, list) else []
        return {str(each.get("id")): each.get("max_model_len") for each in listed if isinstance(each, dict)}

    def max_model_len(self, model: str) -> int | None:
        """The context window in tokens, if the server states it. Raises BadInput if it does not serve `model`."""
        models = self.models()
        if model not in models:
            raise BadInput(
                f"the endpoint serves {', '.join(models) or 'nothing'}, not {model}.",
                where=self.base_url,
                resolution="Name the model as the server does (--served-model-name).",
            )
        return models[model]

    def version(self) -> str:
        """The server's version; empty if it does not tell."""
        answer = self.get("/version")
        return str(answer.body.get("version", "")) if isinstance(answer.body, dict) else ""

    def count_tokens(self, model: str, text: str, *, chat: bool) -> int:
        """Tokens of a prompt as the server counts it: by `/tokenize`, or by asking for one token of an answer."""
        message = [{"role": "user", "content": text}]
        prompt: dict[str, Any] = {"messages": message} if chat else {"prompt": text}
        answer = self.post("/tokenize", {"model": model, **prompt})
        if answer.status == 200 and isinstance(answer.body, dict) and isinstance(answer.body.get("count"), int):
            return int(answer.body["count"])
        path = "/v1/chat/completions" if chat else "/v1/completions"
        answer = self.post(path, {"model": model, "max_tokens": 1, **prompt})
        if answer.status != 200:
            raise SmokeFailed(
                f"tokens cannot be counted: {answer.status} {error_message(answer.body)}", where=self.base_url + path
            )
        try:
            return prompt_tokens(answer.body)
        except ValueError as error:
            raise SmokeFailed(
                f"tokens cannot be counted: the answer cannot be read, {error}", where=self.base_url + path
            ) from error

    def _answer(self, method: str, path: str, body: Any = None) -> Answer:
        started = time.perf_counter()
        try:
            with self._request(method, path, body) as answer:
                text = answer.text
                status = answer.status_code
        except requests.RequestException as error:
            raise explain(error, self.base_url) from error
        latency_s = time.perf_counter() - started
        try:
            return Answer(status, json.loads(text), latency_s)
        except ValueError:
            return Answer(status, text, latency_s)

    def _request(self, method: str, path: str, body: Any, *, stream: bool = False) -> requests.Response:
        data = body if body is None or isinstance(body, str) else json.dumps(body)
        return self._session.request(
            method,
            self.base_url + path,
            data=data.encode() if data is not None else None,
            headers={"Content-Type": "application/json"} if data is not None else {},
            timeout=self._timeout,
            stream=stream,
        )


def explain(error: requests.RequestException, base_url: str) -> SmokeFailed:
    """A connection error in the tutorial's terms."""
    text = str(error)
    known = diagnose_client_error(text)
    if known:
        return SmokeFailed(known.summary, where=base_url, resolution=known.resolution)
    if isinstance(error, requests.Timeout):
        return SmokeFailed(
            f"no answer in time: {text}.",
            where=base_url,
            resolution="The server is overloaded or stuck: look at its log and at vllm:num_requests_waiting.",
        )
    return SmokeFailed(f"the request failed: {text}.", where=base_url)


def run_smoke_suite(
    base_url: str,
    model: str,
    capabilities: Capabilities,
    *,
    canaries: Sequence[CanaryPrompt] = CANARIES,
    curl_url: str | None = None,
    reach_with: str = "",
    on_result: Callable[[SmokeResult], None] | None = None,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> SmokeReport:
    """Run every check against `base_url` (without `/v1`) and report; a failed check is a result, never an exception.

    The report's curl lines name `curl_url` where `base_url` ends with this run, as a port-forward does; `reach_with`
    is the command that makes it reachable.
    """
    api = OpenAiApi(base_url, timeout_s=timeout_s)
    suite = _Suite(api, model, capabilities, canaries, curl_url or api.base_url)
    results = []
    for check in CHECKS:
        result = suite.run(check)
        results.append(result)
        log.info("smoke %s: %s %s", result.name, result.outcome.value, result.detail)
        if on_result is not None:
            on_result(result)
    return SmokeReport(
        base_url=suite.curl_url,
        reach_with=reach_with,
        model=model,
        results=tuple(results),
        canary_answers=suite.canary_answers,
    )


class _NotApplicable(Exception):
    """The check cannot be made on this endpoint; the message says why."""


class _Suite:
    """The checks. Each method sends its requests, notes what was seen, and returns the problems."""

    def __init__(
        self,
        api: OpenAiApi,
        model: str,
        capabilities: Capabilities,
        canaries: Sequence[CanaryPrompt],
        curl_url: str,
    ) -> None:
        self.api = api
        self.curl_url = curl_url
        self.canary_answers: dict[str, str] = {}
        self._model = model
        self._capabilities = capabilities
        self._canaries = canaries
        self._seen = ""
        self._curl = ""
        self._latency_s: float | None = None

    def run(self, check: SmokeCheck) -> SmokeResult:
        if check.needs is not None and (reason := self._capabilities.missing(check.needs)):
            return SmokeResult(name=check.name, outcome=Outcome.NOT_APPLICABLE, detail=reason)
        self._seen, self._curl, self._latency_s = "", "", None
        method: Callable[[], list[str]] = getattr(self, "_check_" + check.name.replace("-", "_"))
        try:
            problems = method()
        except _NotApplicable as reason_:
            return SmokeResult(name=check.name, outcome=Outcome.NOT_APPLICABLE, detail=str(reason_))
        except RolloutError as error:
            problems = [str(error)]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Whatever a server may send in place of an object, a list or a number is a verdict on the server.
            problems = [f"the answer cannot be read: {str(error) or type(error).__name__}"]
        return SmokeResult(
            name=check.name,
            outcome=Outcome.FAILED if problems else Outcome.PASSED,
            latency_s=self._latency_s,
            detail="; ".join(problems) if problems else self._seen,
            curl=self._curl,
        )

    def _get(self, path: str) -> Answer:
        self._curl = self._curl or curl_line(self.curl_url, path)
        answer = self.api.get(path)
        self._latency_s = self._latency_s or answer.latency_s
        return answer

    def _post(self, path: str, body: Any) -> Answer:
        self._curl = self._curl or curl_line(self.curl_url, path, body)
        answer = self.api.post(path, body)
        self._latency_s = self._latency_s or answer.latency_s
        return answer

    def _chat(self, body: dict[str, Any]) -> Any:
        """The answer's body. Raises SmokeFailed with the server's reason if it refuses."""
        answer = self._post("/v1/chat/completions", body)
        if answer.status != 200:
            reason = error_message(answer.body) or str(answer.body)[:300]
            raise SmokeFailed(f"refused with {answer.status}: {reason}")
        return answer.body

    def _check_health(self) -> list[str]:
        answer = self._get("/health")
        return [] if answer.status == 200 else [f"/health answered with {answer.status}"]

    def _check_models(self) -> list[str]:
        answer = self._get("/v1/models")
        if answer.status != 200:
            return [f"/v1/models answered with {answer.status}"]
        models = self.api.models()
        if self._model not in models:
            return [f"the server names {', '.join(models) or 'no model'}, not {self._model}"]
        served, planned = models[self._model], self._capabilities.max_model_len
        self._seen = f"{self._model}, context window {served}"
        if served is not None and planned is not None and served < planned:
            return [f"the context window is {served} tokens, not {planned}"]
        return []

    def _check_chat(self) -> list[str]:
        answer = self._chat(sky_request(self._model, self._capabilities, thinking=False))
        message = message_of(answer)
        self._seen = str(message.get("content") or "")[:80]
        problems = chat_problems(answer, model=self._model)
        if not str(message.get("content") or "").strip() and finish_reason(answer) != "length":
            problems.append("the content is empty")
        return problems

    def _check_reasoning(self) -> list[str]:
        answer = self._chat(sky_request(self._model, self._capabilities, thinking=True))
        self._seen = f"{len(reasoning_of(message_of(answer)))} characters of reasoning, separated"
        return reasoning_problems(answer, model=self._model)

    def _check_streaming(self) -> list[str]:
        body = chat_request(self._model, QUESTION, max_tokens=64)
        whole = self._chat(body)
        streamed = self._stream(body)
        same = "the same text" if streamed.content == str(message_of(whole).get("content") or "") else "another text"
        self._seen = f"{streamed.pieces} pieces, {same} as the whole answer"
        return stream_problems(streamed, whole, model=self._model)

    def _stream(self, body: dict[str, Any]) -> StreamedAnswer:
        events = self.api.stream("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
        return assemble_stream(events)

    def _check_tools(self) -> list[str]:
        first = tool_request(self._model)
        called = self._chat(first)
        problems = tool_call_problems(called)
        if problems:
            return problems
        answer = self._chat(tool_result_request(self._model, first, called))
        self._seen = str(message_of(answer).get("content") or "")[:80]
        return tool_result_problems(answer, model=self._model)

    def _check_image(self) -> list[str]:
        answer = self._chat(image_request(self._model, 1))
        problems = chat_problems(answer, model=self._model)
        without = self._chat(image_request(self._model, 0))
        if not problems:
            tokens = prompt_tokens(answer) - prompt_tokens(without)
            self._seen = f"{tokens} tokens of image; {str(message_of(answer).get('content') or '')[:60]}"
            if tokens < 1:
                problems.append("the image adds no tokens to the prompt: it was not looked at")
        return problems

    def _check_image_limit(self) -> list[str]:
        limit = self._capabilities.max_images_per_prompt
        if limit is None:
            raise _NotApplicable("served without --limit_mm_per_prompt.image")
        answer = self._post("/v1/chat/completions", image_request(self._model, limit + 1))
        self._seen = error_message(answer.body)[:120]
        return image_limit_problems(answer.status, answer.body, limit=limit)

    def _check_structured_output(self) -> list[str]:
        answer = self._chat(structured_request(self._model))
        self._seen = str(message_of(answer).get("content") or "")[:80]
        return structured_problems(answer, model=self._model)

    def _check_long_context(self) -> list[str]:
        window = self._capabilities.max_model_len or self.api.models().get(self._model)
        if window is None:
            raise _NotApplicable("neither the model's config nor the server states a context window")
        chat = self._capabilities.chat
        vocabulary = calibrate(lambda text: self.api.count_tokens(self._model, text, chat=chat))
        tokens = int(window * LONG_CONTEXT_SHARE)
        text = " ".join(vocabulary.words[i % len(vocabulary.words)] for i in range(self._words(vocabulary, tokens)))
        if chat:
            path, body = "/v1/chat/completions", chat_request(self._model, text, max_tokens=8)
        else:
            path, body = "/v1/completions", {"model": self._model, "prompt": text, "max_tokens": 8, "temperature": 0}
        # The whole prompt would drown the report.
        self._curl = f"# a prompt of {tokens} tokens: {curl_line(self.curl_url, path, {'prompt': '…'})}"
        answer = self._post(path, body)
        if answer.status != 200:
            return [f"a prompt of {tokens} tokens was refused with {answer.status}: {error_message(answer.body)}"]
        counted = prompt_tokens(answer.body)
        self._seen = f"{counted} of {window} tokens"
        return [] if counted >= 0.9 * tokens else [f"of about {tokens} prompt tokens the server saw {counted}"]

    @staticmethod
    def _words(vocabulary: Any, tokens: int) -> int:
        return max(1, int((tokens - vocabulary.overhead_tokens) / vocabulary.tokens_per_word))

    def _check_bad_request(self) -> list[str]:
        path = "/v1/chat/completions"
        cases: list[tuple[str, Any, tuple[int, ...]]] = [
            ("a request without messages", {"model": self._model}, (400, 422)),
            ("broken JSON", '{"model": ', (400, 422)),
            ("an unknown model", chat_request("no-such-model", QUESTION, max_tokens=1), (400, 404)),
        ]
        problems = []
        for what, body, expected in cases:
            answer = self._post(path, body)
            problems += [f"{what}: {p}" for p in refusal_problems(answer.status, answer.body, expected=expected)]
            self._seen = self._seen or error_message(answer.body).replace("\n", " ")[:120]
        return problems

    def _check_concurrency(self) -> list[str]:
        bodies = [chat_request(self._model, f"Count to {n + 10}.", max_tokens=32) for n in range(CONCURRENT_STREAMS)]
        self._curl = curl_line(self.curl_url, "/v1/chat/completions", {**bodies[0], "stream": True})
        started = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENT_STREAMS) as pool:
            streams = list(pool.map(self._stream, bodies))
        self._latency_s = time.perf_counter() - started
        self._seen = f"{len(streams)} streams, {sum(stream.pieces for stream in streams)} pieces"
        broken = sum(not stream.ended or stream.pieces == 0 for stream in streams)
        return [f"{broken} of {len(streams)} concurrent streams are incomplete"] if broken else []

    def _check_canary(self) -> list[str]:
        problems = []
        for canary in self._canaries:
            answer = self._chat(canary_request(self._model, canary))
            message = message_of(answer)
            text = str(message.get("content") or reasoning_of(message))
            self.canary_answers[canary.name] = text
            problems += canary_problems(canary, text)
        compared = sum(canary.expected is not None for canary in self._canaries)
        if not compared and not problems:
            raise _NotApplicable("not compared: no answer of an earlier rollout is stored; these answers are the first")
        self._seen = f"{len(self._canaries)} prompts, {compared} compared with the last good rollout"
        return problems
