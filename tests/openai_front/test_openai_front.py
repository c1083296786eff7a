"""OpenAI's API on the real server, by OpenAI's own client, against what transformers says of the same checkpoint."""

import contextlib
import gzip
import http.client
import json
import os
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import openai
import pytest
import torch

from ensemble.serving.pacing import PATIENCE_S
from tests.serving.clients import blocks_in_use, read_metrics
from tests.serving.oracle import greedy_by_transformers
from tests.serving.test_cancel import CANCELLED, FREED_S, sample, wait_until
from tools.installation.server_files import ServerError
from tools.server.answers import MAX_SILENCE_S, OPENAI_FRONT, RELAY
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server
MODEL = "tiny-chat"
PROMPT = "The capital of France is"
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
NUM_TOKENS = 12


class Oracle:
    """transformers' tokenizer and model."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)

    def continuation(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> str:
        (answer,) = greedy_by_transformers(self.path, [prompt], num_tokens, torch.float64)
        return str(self.tokenizer.decode(answer))


@pytest.fixture(scope="module")
def oracle(chat_model: Path) -> Oracle:
    return Oracle(chat_model)


def complete(client: openai.OpenAI, **changes: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    return client.completions.create(**asked | changes)


def chat(client: openai.OpenAI, **changes: Any) -> Any:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": NUM_TOKENS}
    return client.chat.completions.create(**asked | {"temperature": 0} | changes)


def post(server: TritonServer, path: str, body: bytes) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers, without any client's own checks."""
    try:
        with urllib.request.urlopen(f"{server.openai_url}/{path}", body, timeout=60) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "distserve")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="model `other` does not exist"):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI, oracle: Oracle) -> None:
    token_ids = oracle.tokenizer(PROMPT).input_ids
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer._request_id == answer.id
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, oracle.continuation(token_ids), "length")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(token_ids), NUM_TOKENS)
    assert usage.total_tokens == len(token_ids) + NUM_TOKENS
    assert complete(client, prompt=token_ids).choices[0].text == choice.text
    assert complete(client, echo=True).choices[0].text == PROMPT + choice.text
    assert complete(client, echo=True, prompt=token_ids).choices[0].text == PROMPT + choice.text
    marked = f"{oracle.tokenizer.eos_token}{PROMPT}"
    for each in complete(client, echo=True, prompt=[marked, PROMPT], n=2).choices:
        assert each.text.startswith(marked if each.index < 2 else PROMPT)
    streamed = complete(client, echo=True, prompt=marked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith(marked)
    assert complete(client, max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16


def test_a_chat(client: openai.OpenAI, oracle: Oracle) -> None:
    token_ids = oracle.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", oracle.continuation(token_ids))
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(token_ids), NUM_TOKENS)
    assert answer.system_fingerprint is None


def test_forms_of_messages_that_mean_the_same(client: openai.OpenAI) -> None:
    expected = chat(client).choices[0].message.content
    parts = [{"type": "text", "text": PROMPT}]
    assert (
        chat(client, messages=[MESSAGES[0], {"role": "user", "content": parts}]).choices[0].message.content == expected
    )
    developer = [{"role": "developer", "content": "Be brief."}, MESSAGES[1]]
    assert chat(client, messages=developer).choices[0].message.content == expected
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    history = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    history += [{"role": "tool", "tool_call_id": "1", "content": "Paris"}]
    asked = [*MESSAGES, *history]
    said = [*MESSAGES, {"role": "assistant", "content": "look"}, {"role": "tool", "content": "Paris"}]
    assert chat(client, messages=asked).choices[0].message == chat(client, messages=said).choices[0].message


def test_a_chat_without_a_limit_may_take_the_models_length(client: openai.OpenAI) -> None:
    stop = chat(client).choices[0].message.content[2:6]
    answer = chat(client, max_completion_tokens=openai.NOT_GIVEN, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert stop not in answer.choices[0].message.content
    assert answer.choices[0].message.content == chat(client).choices[0].message.content.partition(stop)[0]


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_says_the_same(client: openai.OpenAI, ask: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in parts)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices[0].finish_reason] == ["length"]
    if ask is complete:
        assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    else:
        assert parts[0].choices[0].delta.role == "assistant"
        content = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
        assert content == whole.choices[0].message.content
    assert all(chunk.choices for chunk in ask(client, stream=True)), "no usage unless it is asked for"


def test_the_bytes_of_a_stream(openai_server: TritonServer) -> None:
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}).encode()
    with urllib.request.urlopen(f"{openai_server.openai_url}/completions", body, timeout=60) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        sent = response.read()
    *events, done, nothing = sent.split(b"\n\n")
    assert (done, nothing) == (b"data: [DONE]", b"")
    form = re.compile(
        rb'data: \{"id":"cmpl-[0-9a-f]{32}","object":"text_completion","created":\d+,"model":"tiny-chat",'
        rb'"choices":\[\{"index":0,"text":".*","logprobs":null,"finish_reason":(null|"length")\}\]\}'
    )
    assert [form.fullmatch(event).group(1) for event in events][-1] == b'"length"'  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [True, False])
def test_several_choices_and_prompts(client: openai.OpenAI, stream: bool) -> None:
    """Each prompt with each seed is what it is alone; choices are numbered prompt by prompt."""
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 5, "n": 2}
    prompts = [PROMPT, "Once upon a time"]
    alone = [choice.text for prompt in prompts for choice in complete(client, prompt=prompt, **asked).choices]
    answer = complete(client, prompt=prompts, stream=stream, **asked)
    texts = [""] * 4
    for choice in [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices:
        texts[choice.index] += choice.text
    assert texts == alone
    assert len(set(texts)) == 4


def test_log_probs_of_a_chat(client: openai.OpenAI) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=3).choices
    entries = choice.logprobs.content
    assert len(entries) == NUM_TOKENS
    spelled = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelled.decode(errors="replace") == choice.message.content
    for entry in entries:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob), "greedy"
    streamed = chat(client, logprobs=True, top_logprobs=3, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [entry for part in parts for entry in part.content] == entries
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_log_probs_of_a_completion(client: openai.OpenAI, oracle: Oracle) -> None:
    (choice,) = complete(client, logprobs=2, seed=3, temperature=1.5).choices
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == NUM_TOKENS
    assert found.text_offset[:2] == [0, len(found.tokens[0])]
    for token, log_prob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == log_prob
        assert 2 <= len(top) <= 3
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(oracle.path, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([oracle.tokenizer(PROMPT).input_ids])).logits[0, -1]
    expected = torch.log_softmax(logits, dim=-1).topk(2).values.tolist()
    assert sorted(found.top_logprobs[0].values(), reverse=True)[:2] == pytest.approx(expected, abs=1e-5)


def test_sampling_members_reach_the_sampler(client: openai.OpenAI) -> None:
    forced = complete(client, logit_bias={"40": 100}, max_tokens=4, logprobs=0).choices[0]
    assert len(set(forced.logprobs.tokens)) == 1
    assert complete(client, seed=1, temperature=1).choices == complete(client, seed=1, temperature=1).choices
    assert complete(client, seed=1, temperature=1).choices != complete(client, seed=2, temperature=1).choices
    assert complete(client, top_p=0, temperature=1).choices == complete(client).choices
    assert complete(client, frequency_penalty=2, presence_penalty=2).choices != complete(client).choices
    assert complete(client, user="somebody", extra_body={"top_k": 1}, temperature=1).choices == complete(client).choices


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", {"model": "other"}, 404, "model", "model_not_found"),
        ("completions", {"foo": 1}, 400, "foo", "unknown_parameter"),
        ("completions", {"max_tokens": 5000}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": [5] * 5000}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": "x" * 200_000}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": [100_000]}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": []}, 400, "prompt", "invalid_value"),
        ("completions", {"n": 17}, 400, "n", "invalid_value"),
        ("completions", {"logit_bias": {"100000": 1}}, 400, "logit_bias", "invalid_value"),
        ("completions", {"stream": True, "n": 17}, 400, "n", "invalid_value"),
        ("completions", {"timeout_ms": 1, "max_tokens": 3000, "ignore_eos": True}, 504, None, "deadline_exceeded"),
        ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", {"messages": [{"role": "x"}]}, 400, "messages[0].role", "invalid_value"),
        ("chat/completions", {"tools": [{}]}, 400, "tools", "unsupported_parameter"),
        ("completions", {"user": "a" * 257}, 400, "user", "invalid_value"),
        ("completions", {"stop": ["a"] * 65}, 400, "stop", "invalid_value"),
        ("completions", {"logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content[0]",
            "invalid_value",
        ),
        ("embeddings", {}, 404, None, None),
    ],
)
def test_errors(
    openai_server: TritonServer, path: str, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    asked = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": PROMPT}
    found, answer, _ = post(openai_server, path, json.dumps({"model": MODEL, **asked, **body}).encode())
    assert found == status, answer
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)
    assert answer["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["v1/models", f"v1/models/{MODEL}", "health"])
def test_methods(openai_server: TritonServer, path: str) -> None:
    def status_of(method: str) -> tuple[int, str | None]:
        request = urllib.request.Request(f"{openai_server.page_url}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.headers["allow"]
        except urllib.error.HTTPError as error:
            return error.code, error.headers["allow"]

    assert status_of("HEAD") == (200, None)
    status, allowed = status_of("DELETE")
    assert (status, sorted((allowed or "").split(", "))) == (405, ["GET", "HEAD"])


def test_the_template_gets_its_own_members(client: openai.OpenAI) -> None:
    plain, told = (chat(client, extra_body=body) for body in ({}, {"chat_template_kwargs": {"closing": "Now:"}}))
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens


def test_a_body_that_is_too_large(openai_server: TritonServer) -> None:
    status, answer, _ = post(openai_server, "completions", b" " * (5 << 20))
    assert (status, answer["error"]["code"]) == (413, "too_large")


def test_a_compressed_body_is_refused_as_such(openai_server: TritonServer) -> None:
    url, body = f"{openai_server.openai_url}/completions", gzip.compress(b"{}")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Encoding": "gzip"}), timeout=30)
    assert (caught.value.code, json.load(caught.value)["error"]["code"]) == (415, "unsupported_encoding")


def test_many_requests_on_a_connection(openai_server: TritonServer) -> None:
    """Whose heads have more bytes together than one may have, as have their bodies."""
    host, port = openai_server.openai_url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    with contextlib.closing(connection):
        for _ in range(6):
            body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "user": "a" * 200_000})
            connection.request("POST", "/v1/completions", body, {"X": "a" * 20_000})
            response = connection.getresponse()
            assert (response.status, bool(response.read())) == (400, True), "a user's name has 256 characters"


@pytest.mark.parametrize(
    "changes",
    [{}, {"stream": True}, {"stream": True, "n": 2, "prompt": [PROMPT, PROMPT]}],
    ids=["whole", "stream", "several"],
)
def test_a_closed_connection_frees_the_blocks(
    openai_server: TritonServer, client: openai.OpenAI, changes: dict[str, Any]
) -> None:
    """Within 500 ms: the best of three tries, since the server shares its cores with whatever else runs."""
    complete(client)
    assert min(seconds_to_free(openai_server, changes) for _ in range(3)) < FREED_S


def seconds_to_free(server: TritonServer, changes: dict[str, Any]) -> float:
    """From the close of a connection until its requests are cancelled, and no block is held any more."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, **changes}
    num_requests = 4 if "n" in changes else 1
    before = sample(server, CANCELLED)
    with open_post(server, "completions", body) as connection:
        if "stream" in changes:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: sample(server, "vllm:num_requests_running") == num_requests, 10)
    closed_at = time.monotonic()
    wait_until(lambda: sample(server, CANCELLED) == before + num_requests, 10)
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 10)
    return time.monotonic() - closed_at


def open_post(server: TritonServer, path: str, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    host, port = server.openai_url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_streams_next_event_follows_when_the_last_has_been_passed_on(client: openai.OpenAI) -> None:
    """Not as late as one whose predecessor is taken for lost."""
    times = [time.monotonic() for _ in complete(client, max_tokens=40, stream=True, extra_body={"ignore_eos": True})]
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps and median(gaps) < PATIENCE_S / 2


def test_32_at_once(client: openai.OpenAI) -> None:
    expected = complete(client, max_tokens=40).choices[0].text

    def ask(stream: bool) -> str:
        answer = complete(client, max_tokens=40, stream=stream)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else str(answer.choices[0].text)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, [True, False] * 16)) == [expected] * 32


def test_a_front_that_hangs_is_started_again(
    openai_server: TritonServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the relay, which hangs at the same time, and is found when the front's new process is waited for."""
    pid, front_pid, relay_pid = openai_server.pid, openai_server.openai_pid, openai_server.relay_pid
    monkeypatch.setitem(MAX_SILENCE_S, RELAY, 60.0)
    for each in (front_pid, relay_pid):
        os.kill(each, signal.SIGSTOP)
    monkeypatch.setitem(MAX_SILENCE_S, OPENAI_FRONT, 1.0)
    assert f"the OpenAI front (process {front_pid}) has answered nothing for " in openai_server.wait()
    monkeypatch.setitem(MAX_SILENCE_S, OPENAI_FRONT, 60.0)
    openai_server.restart()
    monkeypatch.setitem(MAX_SILENCE_S, RELAY, 2.0)
    with pytest.raises(ServerError, match=rf"^the HTTP relay \(process {relay_pid}\) has answered nothing for "):
        openai_server.wait_ready(timeout_s=120)
    monkeypatch.undo()
    openai_server.restart()
    openai_server.wait_ready(timeout_s=120)
    assert openai_server.pid == pid
    assert not {front_pid, relay_pid} & set(openai_server.beside_pids)
    assert complete(client).choices[0].text


def test_while_the_triton_server_starts_again(openai_server: TritonServer, client: openai.OpenAI) -> None:
    """Last in this file: it kills the Triton server. The front's own process goes on."""
    health = openai_server.openai_url.replace("/v1", "/health")
    with urllib.request.urlopen(health, timeout=10) as response:
        assert response.status == 200
    pids = openai_server.beside_pids
    os.kill(openai_server.pid, signal.SIGKILL)
    openai_server.wait()
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    with pytest.raises(urllib.error.HTTPError) as unhealthy:
        urllib.request.urlopen(health, timeout=10)
    assert unhealthy.value.code == 503
    openai_server.restart()
    openai_server.wait_ready(timeout_s=120)
    assert complete(client.with_options(max_retries=5)).choices[0].text
    with urllib.request.urlopen(health, timeout=10) as response:
        assert response.status == 200
    assert openai_server.beside_pids == pids
