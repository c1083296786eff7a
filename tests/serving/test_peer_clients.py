"""Requests as clients of TensorRT-LLM's and vLLM's servers write them, on the real server."""

import gzip
import http.client
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from ensemble.serving import control
from ensemble.serving.client_request import choice_seed
from ensemble.tokenizer import Tokenizer
from tests.serving.clients import Answer, StreamClient, blocks_in_use, generate, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_cancel import open_post, sample, wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

PROMPT = "The capital"
GREEDY: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 8, "temperature": 0}
MODELS = ["ensemble", "vllm_model", "scheduler"]


def post(
    server: TritonServer, model: str, body: dict[str, Any], endpoint: str = "generate"
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, answer (of a stream its first event), headers."""
    connection = http.client.HTTPConnection(server.http_url.removeprefix("http://"), timeout=30)
    connection.request("POST", f"/v2/models/{model}/{endpoint}", json.dumps(body))
    response = connection.getresponse()
    answer = response.read().partition(b"\n\n")[0]
    connection.close()
    return response.status, json.loads(answer.removeprefix(b"data: ")), dict(response.getheaders())


def text_of(server: TritonServer, model: str, **changes: Any) -> Any:
    status, answer, _ = post(server, model, GREEDY | changes)
    assert status == 200, answer
    return answer["text_output"]


def tensor(name: str, dtype: str, array: Any, batched: bool) -> grpc.InferInput:
    array = np.array([array] if batched else array)
    made = grpc.InferInput(name, list(array.shape), dtype)
    made.set_data_from_numpy(array)
    return made


def ask(server: TritonServer, model: str, tensors: list[grpc.InferInput], **settings: Any) -> Answer:
    client = StreamClient(server.grpc_url)
    client.send_inputs(model, "only", tensors, **settings)
    answer = client.wait(30)["only"]
    client.close()
    if answer.error is not None:
        raise answer.error
    return answer


def test_the_requests_of_tensorrt_llms_quickstart(tiny_server: TritonServer) -> None:
    plain = text_of(tiny_server, "ensemble")
    for words in ("", [""], []):
        assert text_of(tiny_server, "ensemble", bad_words=words, stop_words=words) == plain
    assert text_of(tiny_server, "ensemble", bad_words="", stop_words="", pad_id=2, end_id=-1, beam_width=1) == text_of(
        tiny_server, "ensemble", ignore_eos=True
    )


@pytest.mark.parametrize("model", ["ensemble", "scheduler"])
def test_the_tensors_of_tensorrt_llms_client(tiny_server: TritonServer, model: str) -> None:
    batched = model == "ensemble"
    values: list[tuple[str, str, Any]] = [
        ("text_input", "BYTES", np.array([PROMPT.encode()], object)),
        ("max_tokens", "INT32", np.array([8], np.int32)),
        ("bad_words", "BYTES", np.array([b""], object)),
        ("stop_words", "BYTES", np.array([b""], object)),
        ("stream", "BOOL", np.array([False])),
        ("beam_width", "INT32", np.array([1], np.int32)),
        ("num_return_sequences", "INT32", np.array([1], np.int32)),
        ("end_id", "INT32", np.array([1], np.int32)),
        ("pad_id", "INT32", np.array([1], np.int32)),
        ("temperature", "FP32", np.array([0], np.float32)),
        ("length_penalty", "FP32", np.array([1], np.float32)),
        ("return_log_probs", "BOOL", np.array([True])),
        ("return_context_logits", "BOOL", np.array([False])),
        ("return_generation_logits", "BOOL", np.array([False])),
        ("accumulate_tokens", "BOOL", np.array([False])),
        ("random_seed", "UINT64", np.array([7], np.uint64)),
    ]
    (response,) = ask(tiny_server, model, [tensor(*value, batched) for value in values]).responses
    assert response["text_output"].shape == ((1, 1) if batched else (1,))
    assert response["text_output"].reshape(-1)[0].decode() == text_of(tiny_server, "ensemble")
    assert response["output_log_probs"].shape == ((1, 1, 8) if batched else (1, 8))
    assert math.isclose(response["output_log_probs"].sum(), response["cum_log_probs"].item(), rel_tol=1e-5)
    for name, wrong in (("beam_width", 2), ("num_return_sequences", 17), ("end_id", 384)):
        changed = [(n, d, np.array([wrong], np.int32) if n == name else v) for n, d, v in values]
        shown = "n" if name == "num_return_sequences" else name
        with pytest.raises(InferenceServerException, match=f"{shown} = {wrong} is not valid"):
            ask(tiny_server, model, [tensor(*value, batched) for value in changed])


def test_the_requests_of_vllm_backends_clients(tiny_server: TritonServer) -> None:
    plain = text_of(tiny_server, "ensemble")
    assert text_of(tiny_server, "vllm_model") == PROMPT + plain
    assert text_of(tiny_server, "vllm_model", exclude_input_in_output=True) == plain
    packed = json.dumps({"temperature": "0", "max_tokens": "8", "top_p": 1.0, "prompt_logprobs": None})
    status, answer, _ = post(tiny_server, "vllm_model", {"text_input": PROMPT, "sampling_parameters": packed})
    assert (status, answer["text_output"]) == (200, PROMPT + plain)
    parameters = {"stream": False, "temperature": 0, "max_tokens": 8}
    status, answer, _ = post(tiny_server, "vllm_model", {"text_input": PROMPT, "parameters": parameters})
    assert (status, answer["text_output"]) == (200, PROMPT + plain)
    flags = ("exclude_input_in_output", "return_finish_reason", "return_num_input_tokens", "return_num_output_tokens")
    more = [tensor(name, "BOOL", np.array([True]), False) for name in (*flags, "return_cumulative_logprob")]
    more += [
        tensor("return_logprobs", "BOOL", np.array([True]), False),
        tensor("stream", "BOOL", np.array([True]), False),
    ]
    text = tensor("text_input", "BYTES", np.array([PROMPT.encode()], object), False)
    asked = json.dumps({"temperature": 0, "max_tokens": 8, "logprobs": 2})
    sampling = tensor("sampling_parameters", "BYTES", np.array([asked.encode()], object), False)
    answer = ask(tiny_server, "vllm_model", [text, sampling, *more])
    assert answer.text == plain
    reasons = [each["finish_reason"].tolist() for each in answer.responses]
    assert reasons == [[b"None"]] * (len(reasons) - 1) + [[b"length"]]
    assert {str(each["num_output_tokens"].dtype) for each in answer.responses} == {"uint32"}
    assert sum(int(each["num_output_tokens"][0]) for each in answer.responses) == 8
    assert {int(each["num_input_tokens"][0]) for each in answer.responses} == {
        len(Tokenizer.from_dir(tiny_server.deployment.model.path).encode(PROMPT))
    }
    positions = [position for each in answer.responses for position in json.loads(each["logprobs"][0])]
    assert len(positions) == 8
    assert all(len(position) == 2 and next(iter(position.values()))["rank"] == 1 for position in positions)
    total = sum(next(iter(position.values()))["logprob"] for position in positions)
    assert math.isclose(answer.responses[-1]["cumulative_logprob"].item(), total, rel_tol=1e-5)
    shown = GREEDY | {"exclude_input_in_output": False, "stream": True}
    status, error, _ = post(tiny_server, "vllm_model", shown, "generate_stream")
    assert (status, "exclude_input_in_output" in error["error"]) == (400, True)


def test_log_probs_are_those_of_transformers_in_every_front(tiny_server: TritonServer) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_server.deployment.model.path
    asked = {**GREEDY, "return_log_probs": True, "logprobs": 3, "return_output_ids": True, "ignore_eos": True}
    status, direct, _ = post(tiny_server, "scheduler", asked)
    assert status == 200, direct
    prompt = Tokenizer.from_dir(path).encode(PROMPT)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + direct["output_ids"]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(1)
    chosen = expected.gather(1, torch.tensor(direct["output_ids"])[:, None])[:, 0].tolist()
    assert direct["output_log_probs"] == pytest.approx(chosen, abs=1e-5)
    for row, position in zip(expected, json.loads(direct["logprobs"]), strict=True):
        top = row.topk(3)
        assert [int(token_id) for token_id in position] == top.indices.tolist()
        assert [each["logprob"] for each in position.values()] == pytest.approx(top.values.tolist(), abs=1e-5)
    del asked["return_output_ids"]
    for front in ("ensemble", "vllm_model"):
        _, answer, _ = post(tiny_server, front, asked)
        for name in ("output_log_probs", "cum_log_probs", "logprobs"):
            assert answer[name] == direct[name]


@pytest.mark.parametrize("model", MODELS)
def test_choices_are_what_their_seeds_give_alone(tiny_server: TritonServer, model: str) -> None:
    asked = {"temperature": 1.0, "seed": 5, "exclude_input_in_output": True, "max_tokens": 30}
    alone = [text_of(tiny_server, model, **asked | {"seed": choice_seed(5, choice)}) for choice in range(4)]
    assert len(set(alone)) == 4
    assert text_of(tiny_server, model, n=4, **asked) == alone
    shape = [1] if model == "ensemble" else []
    streamed = generate(tiny_server.grpc_url, model, text_input=PROMPT, **{**asked, "n": 4, "stream": True})
    texts = [b""] * 4
    for response in streamed.responses:
        assert response["sequence_index"].shape == (*shape, 1)
        texts[response["sequence_index"].item()] += response["text_output"].item()
    assert [text.decode() for text in texts] == alone


def test_bad_words_biases_stop_tokens_and_echo(tiny_server: TritonServer) -> None:
    tokenizer = Tokenizer.from_dir(tiny_server.deployment.model.path)
    status, free, _ = post(tiny_server, "scheduler", GREEDY | {"return_output_ids": True, "ignore_eos": True})
    assert status == 200
    ids, asked = free["output_ids"], {"ignore_eos": True, "return_output_ids": True}

    def ids_of(**changes: Any) -> list[int]:
        return list(np.atleast_1d(post(tiny_server, "scheduler", GREEDY | asked | changes)[1]["output_ids"]))

    assert ids_of(stop_token_ids=[ids[3]]) == ids[: ids.index(ids[3]) + 1]
    assert ids_of(end_id=ids[3]) == ids[: ids.index(ids[3]) + 1]
    assert ids[0] not in ids_of(logit_bias=json.dumps({ids[0]: -100}))
    assert ids_of(logit_bias=json.dumps({ids[0]: 100})) == [ids[0]] * 8
    assert ids_of(parameters={"sampling_parameters": json.dumps({"logit_bias": {ids[0]: 100}})}) == [ids[0]] * 8
    word = next(text for token_id in ids if (text := tokenizer.decode([token_id])).strip() and "\ufffd" not in text)
    assert word not in text_of(tiny_server, "ensemble", bad_words=[word], ignore_eos=True)
    assert text_of(tiny_server, "ensemble", echo=True) == PROMPT + text_of(tiny_server, "ensemble")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokns": 3}, "max_tokns = 3 is not valid: there is no input of this name; did you mean max_tokens?"),
        ({"parameters": {"tempurature": 1}}, "did you mean temperature?"),
        ({"use_beam_search": True}, "use_beam_search = True"),
        ({"best_of": 3}, "best_of = 3 is not valid: only n (1) is served"),
        ({"best": None}, "best = None is not valid"),
        ({"max_tokens": None}, "max_tokens = null is not valid: an integer"),
        ({"max_tokens": "8"}, 'max_tokens = "8" is not valid: an integer'),
        ({"temperature": [0, "x"]}, "temperature"),
        ({"max_tokens": 2**32 + 5}, "max_tokens = 4294967301 is not valid: an integer of 32 bits"),
        ({"logprobs": 21}, "logprobs = 21 is not valid: from 0 to 20"),
        ({"sampling_parameters": '{"guided_decoding": {}}'}, "sampling_parameters.guided_decoding = {}"),
        ({"lora_name": "x"}, "lora_name = 'x'"),
        ({"stream": True}, "stream = true is not valid: false, or generate_stream in place of generate"),
        ({"parameters": {"stream": True}}, "stream = true is not valid: false, or generate_stream"),
        ({"stream": "true"}, 'stream = "true" is not valid: true or false'),
        ({"prompt_embedding_table": [[0.5]]}, "prompt_embedding_table = [[0.5]] is not valid: there is no input"),
        ({"runtime_top_p": 0.5}, "runtime_top_p = 0.5 is not valid: there is no input"),
        ({"lora_weights": ["x"], "lora_task_id": 3}, "lora_"),
        ({"guided_decoding": {"json": {}}}, "guided_decoding = {'json': {}} is not valid: there is no input"),
    ],
)
def test_over_http_nothing_is_ignored(
    tiny_server: TritonServer, model: str, body: dict[str, Any], message: str
) -> None:
    status, answer, _ = post(tiny_server, model, GREEDY | body)
    assert status == 400
    assert message in answer["error"]


@pytest.mark.parametrize("model", MODELS)
def test_over_grpc_nothing_is_ignored(tiny_server: TritonServer, model: str) -> None:
    def inputs() -> list[grpc.InferInput]:
        return [tensor("text_input", "BYTES", np.array([PROMPT.encode()], object), model == "ensemble")]

    settings = {"temperature": 0.0, "max_tokens": 8, "exclude_input_in_output": True}
    assert ask(tiny_server, model, inputs(), parameters=settings).text == text_of(tiny_server, "ensemble")
    for name, value in (("max_tokns", 3), ("ignore_stop", True), ("return_cancel_handle", True)):
        with pytest.raises(InferenceServerException, match=f"{name} = {value} is not valid: there is no input"):
            ask(tiny_server, model, inputs(), parameters=settings | {name: value})
    ask(tiny_server, model, inputs(), parameters=settings, priority=1, timeout=10_000_000)
    ask(tiny_server, model, inputs(), parameters=settings, sequence_id=3, sequence_start=True, sequence_end=True)


def test_a_cancel_ends_all_choices(roomy_server: TritonServer) -> None:
    """Of a client over HTTP that closes while none of them has an answer."""
    asked = {"text_input": PROMPT, "max_tokens": 4000, "ignore_eos": True, "n": 3}
    for model in ("ensemble", "scheduler"):
        with open_post(roomy_server, model, "generate", asked):
            wait_until(lambda: sample(roomy_server, "vllm:num_requests_running") >= 3, 10)
        wait_until(lambda: blocks_in_use(read_metrics(roomy_server.metrics_url)) == 0, 5)


FORMS = {
    "an offer of HTTP/2": "POST {path} HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nContent-Length: {length}\r\n\r\n{body}",
    "a whole URL": "POST http://example.org{path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}",
    "chunks": "POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n",
    "a kept connection": "POST {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}",
}


@pytest.mark.parametrize("form", [*FORMS, "gzip"])
def test_every_way_to_send_is_answered_and_cancelled(roomy_server: TritonServer, form: str) -> None:
    assert roomy_server.ports is not None
    for max_tokens in (2, 4000):
        asked = {"text_input": PROMPT, "max_tokens": max_tokens, "ignore_eos": True}
        body, path = json.dumps(asked), "/v2/models/ensemble/generate"
        if form == "gzip":
            packed = gzip.compress(body.encode())
            head = f"POST {path} HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
            request = head.encode() + packed
        else:
            request = FORMS[form].format(path=path, length=len(body), body=body).encode()
        with socket.create_connection(("127.0.0.1", roomy_server.ports.http), timeout=20) as connection:
            if form == "a kept connection":
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
                assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(request)
            if max_tokens == 4000:
                wait_until(lambda: sample(roomy_server, "vllm:num_requests_running") >= 1, 10)
                continue
            received = b""
            while b"text_output" not in received:
                data = connection.recv(4096)
                assert data, received
                received += data
    wait_until(lambda: blocks_in_use(read_metrics(roomy_server.metrics_url)) == 0, 5)


@pytest.mark.parametrize("keep", ["", "Connection: keep-alive\r\n"])
def test_a_client_of_http_1_0_gets_no_chunks(tiny_server: TritonServer, keep: str) -> None:
    """Old proxies and load generators: they read until the connection is closed."""
    assert tiny_server.ports is not None
    plain = text_of(tiny_server, "ensemble", max_tokens=400)
    for endpoint in ("generate", "generate_stream"):
        body = json.dumps(GREEDY | {"max_tokens": 400, "stream": endpoint == "generate_stream"})
        head = f"POST /v2/models/ensemble/{endpoint} HTTP/1.0\r\n{keep}Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", tiny_server.ports.http), timeout=20) as connection:
            connection.sendall((head + body).encode())
            received = b"".join(iter(lambda: connection.recv(4096), b""))
        head, _, answer = received.decode().partition("\r\n\r\n")
        assert "200 OK" in head and "chunked" not in head and "keep-alive" not in head
        events = [json.loads(event.removeprefix("data: ")) for event in answer.strip().split("\n\n")]
        assert "".join(event["text_output"] for event in events) == plain
        assert (len(events) > 1) == (endpoint == "generate_stream")


@pytest.fixture(scope="module")
def roomy_server(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(roomy_llama, scheduler={"max_queue_requests": 4}, decode={"max_num_seqs": 4})
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("roomy") / "log") as server:
        server.wait_ready(timeout_s=120)
        yield server


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("model", MODELS)
def test_a_deadline_is_a_504(roomy_server: TritonServer, model: str, endpoint: str) -> None:
    asked = {"text_input": PROMPT, "max_tokens": 4000, "ignore_eos": True, "timeout_ms": 20}
    status, answer, _ = post(roomy_server, model, asked, endpoint)
    assert (status, "timeout_ms has passed" in answer["error"]) == (504, True)


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("model", MODELS)
def test_a_full_queue_is_a_503_and_ends_all_choices(roomy_server: TritonServer, model: str, endpoint: str) -> None:
    """Of 16, which wait for the first to compute their prompt, four may."""
    asked = {"text_input": PROMPT * 20, "max_tokens": 4000, "ignore_eos": True, "n": 16}
    status, answer, headers = post(roomy_server, model, asked, endpoint)
    assert (status, "overloaded: 4 requests are waiting" in answer["error"]) == (503, True)
    assert int(headers["Retry-After"]) >= 1
    wait_until(lambda: blocks_in_use(read_metrics(roomy_server.metrics_url)) == 0, 5)


def test_a_server_that_takes_no_more_is_a_503_of_every_model(roomy_server: TritonServer) -> None:
    """The last test of this server: it drains."""
    control.call(roomy_server.run_dir, control.Drain(), control.Load, timeout_s=5.0)
    for model in MODELS:
        status, answer, headers = post(roomy_server, model, {"text_input": PROMPT, "max_tokens": 2})
        assert status == 503
        assert "scheduler is unavailable" in answer["error"]
        assert int(headers["Retry-After"]) >= 1
