"""What becomes of each member of a request, and of each error of the scheduler."""

import json
from typing import Any

import grpc
import pytest

from ensemble.errors import DeadlineExceeded, InternalError, InvalidRequest, Overloaded, StageUnavailable
from ensemble.openai_front.errors import ApiError, of_the_connection, of_the_scheduler
from ensemble.openai_front.protocol import ChatRequest, CompletionRequest, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "x"}


def chat(**members: Any) -> ChatRequest:
    return parse(json.dumps(CHAT | members).encode(), ChatRequest)


def completion(**members: Any) -> CompletionRequest:
    return parse(json.dumps(TEXT | members).encode(), CompletionRequest)


def refused(parsed: Any, **members: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        parsed(**members)
    assert caught.value.status == 400
    found: dict[str, Any] = caught.value.body["error"]
    assert found["type"] == "invalid_request_error"
    return found


def test_members_reach_the_scheduler_under_its_names() -> None:
    asked = completion(
        temperature=0, top_p=0, seed=7, stop=["a", "b"], logit_bias={"5": 1.5}, logprobs=2, n=3, presence_penalty=1,
        frequency_penalty=-1, top_k=4, ignore_eos=True, user="u", priority=-1, timeout_ms=5, echo=False, suffix="",
    )  # fmt: skip
    sampling = asked.sampling(max_tokens=9)
    assert 0 < sampling.pop("top_p") < 1e-3, "the likeliest token alone"
    assert sampling == {
        "temperature": 0, "seed": 7, "stop_words": ["a", "b"], "logit_bias": {"5": 1.5}, "logprobs": 2, "n": 3,
        "presence_penalty": 1, "frequency_penalty": -1, "top_k": 4, "ignore_eos": True, "max_tokens": 9,
    }  # fmt: skip
    assert asked.options() == {"tenant": "u", "priority": -1, "timeout_ms": 5, "stream": False, "echo": False}


def test_null_is_not_given() -> None:
    assert chat(temperature=None, stop=None, n=None, stream=None, tools=None, logprobs=None, foo=None) == chat()


@pytest.mark.parametrize("given", ["one", ["one"], [1, 2], [[1, 2]]])
def test_every_form_of_a_prompt(given: Any) -> None:
    assert completion(prompt=given).prompt == (["one"] if "one" in given else [[1, 2]])


@pytest.mark.parametrize(
    "members",
    [
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": False},
        {"safety_identifier": "x", "prompt_cache_key": "y", "prompt_cache_options": {"ttl": "30m"}},
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
        {"max_tokens": 3, "max_completion_tokens": 3},
        {"tools": [{"type": "function"}], "functions": [{}], "tool_choice": "none", "verbosity": "medium"},
    ],
)
def test_what_has_no_effect_is_taken(members: dict[str, Any]) -> None:
    assert chat(**members).sampling(3) == chat().sampling(3)


@pytest.mark.parametrize(
    ("members", "param", "code"),
    [
        ({"foo": 1}, "foo", "unknown_parameter"),
        ({"stream": True, "stream_options": {"foo": 1}}, "stream_options.foo", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"temperature": 2.5}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"n": True}, "n", "invalid_type"),
        ({"logprobs": 5}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stop": [1]}, "stop", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ],
)
def test_what_is_refused_is_named(members: dict[str, Any], param: str, code: str) -> None:
    error = refused(chat, **members)
    assert (error["param"], error["code"]) == (param, code)
    assert param in error["message"]


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"prompt": [["x"]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1 << 31]}, "prompt"),
        ({"prompt": [[-1]]}, "prompt"),
        ({"priority": 101}, "priority"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_completions_refuse(members: dict[str, Any], param: str) -> None:
    assert refused(completion, **members)["param"] == param


NO_OBJECTS = [b"", b"{", b"[]", b"[" * 100_000, b"\xff{}", b'{"model": "m", "messages": [], "user": "\\ud800"}']


@pytest.mark.parametrize("body", NO_OBJECTS)
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body, ChatRequest)
    assert caught.value.status == 400
    assert caught.value.body["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (InvalidRequest("stop_words[0]", "x", "less"), 400, {}),
        (Overloaded("the queue is full", 2.5), 429, {"retry-after": "3", "retry-after-ms": "2500"}),
        (StageUnavailable("decode", "no replica"), 503, {"retry-after": "1", "retry-after-ms": "1000"}),
        (DeadlineExceeded("deadline exceeded: the request's timeout_ms has passed"), 504, {}),
        (InternalError("prefill"), 500, {}),
    ],
)
def test_the_status_of_the_schedulers_errors(error: Exception, status: int, headers: dict[str, str]) -> None:
    found = of_the_scheduler(f"[request id: cmpl-1] {error}")
    assert (found.status, found.headers) == (status, headers)
    if status == 400:
        assert found.body["error"]["param"] == "stop[0]"
    assert found.body["error"]["message"] == str(error).replace("stop_words", "stop")


def test_the_status_of_a_stream_that_breaks_off() -> None:
    assert of_the_connection(grpc.StatusCode.UNAVAILABLE).status == 503
    assert of_the_connection(grpc.StatusCode.UNAVAILABLE).headers["retry-after"] == "1"
    assert of_the_connection(grpc.StatusCode.INTERNAL).status == 500
