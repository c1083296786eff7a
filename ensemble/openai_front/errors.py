"""Errors as OpenAI's API answers them: a status, and a body of message, type, param and code."""

import math
import re
from typing import Any

import grpc
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from ensemble.errors import InvalidRequest
from ensemble.serving.http_contract import RETRY_AFTER, STATUSES

RETRY_AFTER_S = 1.0  # of a stage that is down: its workers and the Triton server start again within seconds
_FIELD = re.compile(r"(?:length of )?([a-z_]+)([\w.\[\]]*) = ")  # with which the text of an InvalidRequest begins
# The scheduler's name |-> OpenAI's.
_SENT_AS = {"stop_words": "stop", "text_input": "prompt", "input_ids": "prompt", "tenant": "user"}
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")  # which the Triton server puts before a model's error


class ApiError(Exception):
    """What a client gets in place of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self._details = {"message": message, "type": kind, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self._details}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        milliseconds = math.ceil(1e3 * self.retry_after_s)
        return {"retry-after": str(math.ceil(self.retry_after_s)), "retry-after-ms": str(milliseconds)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InvalidRequest)
    return invalid(error).response()


def invalid(error: InvalidRequest) -> ApiError:
    return ApiError(400, str(error), param=error.field, code="invalid_value")


def invalid_body(error: ValidationError) -> ApiError:
    """The first of what a request's model finds wrong."""
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    allowed = first["msg"].removeprefix("Value error, ").replace("Input should be ", "")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return ApiError(400, str(InvalidRequest(param, first["input"], allowed)), param=param, code=code)


def of_the_scheduler(text: str) -> ApiError:
    """Of an error's text: a stream has no code for it."""
    text = _REQUEST_ID.sub("", text)
    status = next((status for pattern, status in STATUSES if pattern.match(text)), 400)
    if text.startswith("overloaded: "):
        retry = RETRY_AFTER.search(text)
        retry_after_s = float(retry[1]) if retry else RETRY_AFTER_S
        return ApiError(429, text, kind="rate_limit_error", code="overloaded", retry_after_s=retry_after_s)
    if status == 503:
        return unavailable(text)
    if status == 504:
        return ApiError(504, text, kind="timeout_error", code="deadline_exceeded")
    if status == 400:
        found = _FIELD.match(text)
        if found is None:
            return ApiError(400, text, code="invalid_value")
        name = _SENT_AS.get(found[1], found[1])
        text = f"{text[: found.start(1)]}{name}{text[found.end(1) :]}"
        return ApiError(400, text, param=name + found[2], code="invalid_value")
    return ApiError(500, text, kind="server_error", code="internal_error")


def of_the_connection(code: grpc.StatusCode) -> ApiError:
    """Of a stream that broke off."""
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # CANCELLED: the server stops
        return unavailable("the Triton server does not answer")
    message = f"the Triton server ended the stream: {code.name}"
    return ApiError(500, message, kind="server_error", code="internal_error")


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, kind="server_error", code="unavailable", retry_after_s=RETRY_AFTER_S)


def _path(location: tuple[int | str, ...]) -> str:
    """As in `messages[0].content`."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in location).removeprefix(".")
