from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from rollout.serving import ServingSpec
from rollout.smoke import (
    CANARIES,
    CHECKS,
    CanaryPrompt,
    Capabilities,
    Outcome,
    SmokeReport,
    SmokeResult,
    assemble_stream,
    canary_problems,
    chat_problems,
    curl_line,
    error_message,
    image_limit_problems,
    image_request,
    reasoning_problems,
    red_square,
    refusal_problems,
    sky_request,
    stream_problems,
    structured_problems,
    text_similarity,
    tool_call_problems,
    tool_request,
    tool_result_problems,
    tool_result_request,
    with_expectations,
)

MODEL = "google/gemma-4-26B-A4B-it"
VISION_CONFIG = {"vision_config": {"patch": 16}, "text_config": {"max_position_embeddings": 131072}}


def answer(content: str | None = "Rayleigh scattering.", finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as the tutorial shows it."""
    return {
        "id": "chatcmpl-be75ccfcbdf753d1",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content} | message, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 21, "total_tokens": 1122, "completion_tokens": 1101},
    }


def test_the_tutorials_answer_passes() -> None:
    assert chat_problems(answer(), model=MODEL) == []
    assert reasoning_problems(answer(reasoning="Think."), model=MODEL) == []
    assert reasoning_problems(answer(reasoning_content="Think."), model=MODEL) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("text", "not a JSON object"),
        (answer() | {"object": "text_completion"}, "object is"),
        (answer() | {"id": ""}, "id is empty"),
        (answer() | {"model": "other"}, "model is 'other'"),
        (answer() | {"choices": []}, "0 choices"),
        (answer() | {"choices": None}, "no choices"),
        (answer(role="user"), "role is 'user'"),
        (answer(finish="abort"), "finish reason is 'abort'"),
        (answer("  "), "answer is empty"),
        (answer("Hello<|im_end|>"), "leaked into the answer: <|im_end|>"),
        (answer("Hello<end_of_turn>"), "<end_of_turn>"),
        (answer("x", reasoning="<|channel>thought"), "<|channel>"),
        (answer() | {"usage": None}, "usage is missing"),
        (answer() | {"usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 4}}, "1 + 2 is not 4"),
        (answer() | {"usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}}, "0 answer tokens"),
        (answer() | {"usage": {"prompt_tokens": 1}}, "usage is incomplete"),
    ],
)
def test_every_field_of_a_chat_answer_is_checked(broken: Any, problem: str) -> None:
    assert problem in "; ".join(chat_problems(broken, model=MODEL))


def test_ordinary_text_is_not_taken_for_control_tokens() -> None:
    text = "If a < b and c > d, then a|b; see <https://example.com>, <s3> and **bold** | table |"
    assert chat_problems(answer(text), model=MODEL) == []


def test_reasoning_that_stays_in_the_answer_is_found() -> None:
    assert "no reasoning was separated" in "; ".join(reasoning_problems(answer(), model=MODEL))
    assert reasoning_problems(answer(None, reasoning="Think."), model=MODEL) == ["there is reasoning but no answer"]
    assert reasoning_problems(answer(None, "length", reasoning="Think."), model=MODEL) == []


def chunk(delta: dict[str, Any], finish: str | None = None, **fields: Any) -> str:
    return json.dumps(
        {"id": "1", "model": MODEL, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | fields
    )


STREAM = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Rayleigh "}),
    chunk({"content": "scattering."}, "stop"),
    json.dumps({"id": "1", "model": MODEL, "choices": [], "usage": answer()["usage"]}),
    "[DONE]",
]


def test_a_stream_is_put_together_and_compared_with_the_whole_answer() -> None:
    streamed = assemble_stream(STREAM)
    assert (streamed.content, streamed.finish_reason, streamed.pieces) == ("Rayleigh scattering.", "stop", 2)
    assert stream_problems(streamed, answer(), model=MODEL) == []


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        (STREAM[:-1], "does not end with [DONE]"),
        (STREAM[1:], "begin with the assistant's role"),
        ([STREAM[0].replace(MODEL, "other"), *STREAM[1:]], "id or model change"),
        ([STREAM[0], *STREAM[2:]], "in one piece"),
        ([STREAM[0], STREAM[1], *STREAM[3:]], "the stream ends with None"),
        ([*STREAM[:3], STREAM[-1]], "usage is missing"),
        ([STREAM[0], chunk({"reasoning": "Think."}, "stop"), *STREAM[3:]], "only the whole answer has content"),
    ],
)
def test_streams_that_differ_in_shape_are_found(events: list[str], problem: str) -> None:
    assert problem in "; ".join(stream_problems(assemble_stream(events), answer(), model=MODEL))


@pytest.mark.parametrize("events", [["nonsense"], ['{"error": {"message": "lost"}}']])
def test_broken_streams_are_errors(events: list[str]) -> None:
    with pytest.raises(ValueError, match=r"lost|Expecting value"):
        assemble_stream(events)


def called(arguments: str = '{"city": "Paris"}', name: str = "get_weather", finish: str = "tool_calls") -> Any:
    call = {"id": "call-1", "type": "function", "function": {"name": name, "arguments": arguments}}
    return answer(None, finish, tool_calls=[call])


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (called(), ""),
        (answer("It is sunny."), "no tool was called"),
        (called(name="get_time"), "'get_time' was called"),
        (called(arguments='{"city": '), "not JSON"),
        (called(arguments='{"town": "Paris"}'), "do not name a city"),
        (called(finish="stop"), "finish reason"),
    ],
)
def test_tool_calls_need_the_right_tool_and_valid_arguments(response: Any, problem: str) -> None:
    problems = tool_call_problems(response)
    assert problem in "; ".join(problems)
    assert bool(problems) == bool(problem)


def test_the_tools_result_must_be_used() -> None:
    second = tool_result_request(MODEL, tool_request(MODEL), called())
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    assert second["messages"][2]["tool_call_id"] == "call-1"
    assert tool_result_problems(answer("It is 21 degrees."), model=MODEL) == []
    assert "does not use" in "; ".join(tool_result_problems(answer("It is nice."), model=MODEL))


@pytest.mark.parametrize(
    ("content", "passes"),
    [
        ('{"blue": true, "cause": "scattering"}', True),
        ('{"blue": true}', False),
        ('{"blue": "yes", "cause": "scattering"}', False),
        ('{"blue": true, "cause": "magic"}', False),
        ('{"blue": true, "cause": "scattering", "more": 1}', False),
        ("[1]", False),
        ("The sky is blue.", False),
    ],
)
def test_structured_output_must_follow_the_schema(content: str, passes: bool) -> None:
    assert (structured_problems(answer(content), model=MODEL) == []) is passes


def test_refusals_need_the_status_and_a_reason() -> None:
    vllm = {"error": {"message": "The model `nope` does not exist.", "code": 404}}
    assert refusal_problems(404, vllm, expected=(404,)) == []
    assert refusal_problems(200, vllm, expected=(400, 422)) == ["answered with 200, not 400 or 422"]
    assert refusal_problems(400, {}, expected=(400,)) == ["the refusal does not say why"]
    assert error_message({"detail": "fastapi's own"}) == "fastapi's own"
    assert error_message("text") == ""


VLLM_LIMIT = "At most 1 image(s) may be provided in one prompt. Set `--limit-mm-per-prompt` to increase this limit."


@pytest.mark.parametrize(
    ("message", "passes"),
    [
        (VLLM_LIMIT, True),
        ("You set image=1 in `--limit-mm-per-prompt`, but passed 2 image items in the same prompt.", True),
        ("tiny is not a multimodal model (error 1)", False),
        ("The prompt of 2100 tokens exceeds 2048.", False),
        ("image 11 of 12 is broken", False),
    ],
)
def test_a_refused_image_must_be_one_too_many(message: str, passes: bool) -> None:
    assert (image_limit_problems(400, {"error": {"message": message}}, limit=1) == []) is passes
    assert image_limit_problems(200, {}, limit=1) == ["answered with 200, not 400 or 422"]


def test_the_picture_is_a_red_png() -> None:
    image = Image.open(io.BytesIO(base64.b64decode(red_square().partition(",")[2])))
    assert (image.size, image.getpixel((5, 5))) == ((64, 64), (255, 0, 0))
    assert len(image_request(MODEL, 2)["messages"][0]["content"]) == 3


@pytest.mark.parametrize(
    ("config", "serving", "expected"),
    [
        (VISION_CONFIG, {}, {"reasoning", "tools", "vision"}),
        (VISION_CONFIG, {"max_images_per_prompt": 0}, {"reasoning", "tools"}),
        ({}, {}, {"reasoning", "tools"}),
        (VISION_CONFIG, {"reasoning_parser": None, "tool_call_parser": None}, {"vision"}),
    ],
)
def test_capabilities_follow_from_config_and_flags(
    config: dict[str, Any], serving: dict[str, Any], expected: set[str]
) -> None:
    capabilities = Capabilities.of(config, ServingSpec(served_model_name=MODEL, **serving))
    assert {name for name in ("reasoning", "tools", "vision") if not capabilities.missing(name)} == expected


def test_the_context_window_is_the_flag_or_the_models_own() -> None:
    assert Capabilities.of(VISION_CONFIG, ServingSpec(served_model_name=MODEL)).max_model_len == 16384
    unlimited = ServingSpec(served_model_name=MODEL, max_model_len=None)
    assert Capabilities.of(VISION_CONFIG, unlimited).max_model_len == 131072
    assert Capabilities.of({"max_position_embeddings": 2048}, unlimited).max_model_len == 2048


def test_without_a_chat_template_nothing_of_chat_is_applicable() -> None:
    capabilities = Capabilities.of(VISION_CONFIG, ServingSpec(served_model_name=MODEL), has_chat_template=False)
    for check in CHECKS:
        if check.needs:
            assert capabilities.missing(check.needs) == "the model has no chat template"


def test_the_sky_request_is_the_tutorials_but_bounded() -> None:
    request = sky_request(MODEL, Capabilities(max_model_len=16384), thinking=True)
    assert request["chat_template_kwargs"] == {"enable_thinking": True}
    assert request["skip_special_tokens"] is False
    assert request["max_tokens"] == 2048
    assert sky_request(MODEL, Capabilities(max_model_len=1024), thinking=True)["max_tokens"] == 512


CANARY = CanaryPrompt(name="c", prompt="?", expected="The quick brown fox jumps over the lazy dog", min_similarity=0.6)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("The quick brown fox jumps over the lazy dog", True),
        ("the quick brown fox leaps over the lazy dog", True),
        ("A slow cat sleeps", False),
        ("", False),
    ],
)
def test_canary_answers_are_compared_by_similarity(text: str, passes: bool) -> None:
    assert (canary_problems(CANARY, text) == []) is passes


def test_a_canary_may_ask_for_the_exact_answer_or_for_a_word() -> None:
    exact = CANARY.model_copy(update={"min_similarity": 1.0})
    assert canary_problems(exact, "The quick brown fox jumps over the lazy dog") == []
    assert canary_problems(exact, "The quick brown fox jumps over the lazy cat")
    assert canary_problems(CanaryPrompt(name="c", prompt="?", must_contain="Paris"), "paris") == []
    assert canary_problems(CanaryPrompt(name="c", prompt="?", must_contain="Paris"), "London")
    assert text_similarity("", "") == 1


def test_expectations_come_from_the_last_good_answers() -> None:
    expected = {canary.name: canary.expected for canary in with_expectations(CANARIES, {"capital": "Paris"})}
    assert expected["capital"] == "Paris"
    assert expected["sky"] is None


def test_a_report_fails_with_any_check_and_counts_the_rest() -> None:
    results = (
        SmokeResult(name="chat", outcome=Outcome.PASSED, latency_s=0.5, curl="curl x"),
        SmokeResult(name="tools", outcome=Outcome.FAILED, detail="no tool was called"),
        SmokeResult(name="image", outcome=Outcome.NOT_APPLICABLE, detail="text only"),
    )
    report = SmokeReport(base_url="http://x", model=MODEL, results=results)
    assert not report.passed
    assert report.passed_checks == {"chat"}
    assert report.summary() == "1 passed, 1 failed, 1 not-applicable; tools: no tool was called"
    assert report.table()[0]["latency"] == "500 ms"
    assert SmokeReport(base_url="http://x", model=MODEL, results=(results[0], results[2])).passed
    assert not SmokeReport(base_url="http://x", model=MODEL, results=()).passed


def test_curl_lines_survive_a_shell() -> None:
    assert curl_line("http://h:1", "/health") == "curl -sS http://h:1/health"
    line = curl_line("http://h:1", "/v1", {"text": "it's"})
    assert line.endswith("""-d '{"text": "it'"'"'s"}'""")
