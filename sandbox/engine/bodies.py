"""Request bodies, and the words in which vLLM refuses them."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from sandbox.engine.http import Request


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, body: dict[str, Any], headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = headers


def bad_request(
    message: str,
    *,
    status: HTTPStatus = HTTPStatus.BAD_REQUEST,
    kind: str = "BadRequestError",
    param: str | None = None,
) -> ApiError:
    """vLLM's form of an error."""
    return ApiError(status, {"error": {"message": message, "type": kind, "param": param, "code": int(status)}})


def invalid(message: str, param: str, value: Any = None) -> ApiError:
    """What vLLM's own checks of a parameter say."""
    details = f"parameter={param}" if value is None else f"parameter={param}, value={value}"
    return bad_request(f"{message} ({details})", param=param)


def not_simulated(what: str) -> ApiError:
    return bad_request(
        f"{what} is not simulated by the sandbox engine",
        status=HTTPStatus.NOT_IMPLEMENTED,
        kind="NotImplementedError",
        param=what,
    )


class _Body(BaseModel):
    """vLLM ignores fields that it does not know; those below it honours."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


UNSIMULATED = frozenset(
    {
        *("add_generation_prompt", "allowed_token_ids", "audio", "bad_words", "best_of", "chat_template"),
        *("continue_final_message", "documents", "echo", "functions", "function_call", "guided_json", "guided_regex"),
        *("logit_bias", "logits_processors", "logprob_token_ids", "mm_processor_kwargs", "n", "prompt_embeds"),
        *("prompt_logprobs", "return_token_ids", "return_tokens_as_token_ids", "stop_token_ids", "suffix"),
        *("thinking_token_budget", "top_logprobs", "truncate_prompt_tokens", "use_beam_search"),
    }
)
"""What vLLM honours and this engine does not: any of these would change the answer."""

_NEUTRAL_VALUES: tuple[object, ...] = (None, False, 0, "", [], {})


class Sampling(_Body):
    model_config = ConfigDict(extra="allow")
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    n: int | None = 1
    structured_outputs: dict[str, Any] | None = None

    @property
    def unsimulated(self) -> list[str]:
        """Fields of the request that this engine would have to ignore."""
        extra = self.model_extra or {}
        given = [name for name in extra if name in UNSIMULATED and extra[name] not in _NEUTRAL_VALUES]
        return given if self.n in (None, 1) else [*given, "n"]


class CompletionBody(Sampling):
    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None


class NamedFunction(_Body):
    name: str


class NamedToolChoice(_Body):
    function: NamedFunction
    type: Literal["function"] = "function"


class Tool(_Body):
    model_config = ConfigDict(extra="allow")
    type: Literal["function"] = "function"
    function: dict[str, Any]


class ChatBody(Sampling):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = True


class TokenizeBody(_Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: list[int]


BodyT = TypeVar("BodyT", bound=BaseModel)


def read_body(kind: type[BodyT], request: Request) -> BodyT:
    """The request's body; ApiError in the words of FastAPI's validation, as vLLM shortens them."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise bad_request(message, kind="Bad Request")
    if not request.body:
        raise _body_errors([{"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}])
    try:
        value = json.loads(request.body)
    except json.JSONDecodeError as error:
        problem = {
            "type": "json_invalid",
            "loc": f"body.{error.pos}",
            "msg": "JSON decode error",
            "input": "<dict of 0 items>",
            "ctx": {"error": error.msg},
        }
        raise _body_errors([problem]) from error
    try:
        return kind.model_validate(value, from_attributes=True)
    except ValidationError as error:
        raise _body_errors([_problem(each) for each in error.errors()]) from error


def missing(request: Request, *names: str) -> ApiError:
    """None of the fields `names` is there."""
    given = _summary(json.loads(request.body))
    return _body_errors(
        [{"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": given} for name in names]
    )


def _problem(error: ErrorDetails) -> dict[str, Any]:
    return {
        "type": error["type"],
        "loc": ".".join(("body", *(str(part) for part in error["loc"] if _is_field(part)))),
        "msg": error["msg"],
        "input": _summary(error["input"]),
    }


def _is_field(part: int | str) -> bool:
    """Whether a part of pydantic's location is the caller's, and not a branch of a union."""
    return isinstance(part, int) or (part not in ("str", "int", "float", "bool") and "[" not in part)


def _body_errors(problems: list[dict[str, Any]]) -> ApiError:
    count = f"{len(problems)} validation {'error' if len(problems) == 1 else 'errors'}"
    message = "".join([f"{count}:\n", *(f"  {problem}\n" for problem in problems)]).rstrip()
    return bad_request(message, kind="Bad Request", param=str(problems[0]["loc"]))


def _summary(value: Any) -> Any:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= 200 else text[:200] + "...[truncated]"
