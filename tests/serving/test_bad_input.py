"""Bad input gets an error that names the field, the value and what is allowed; the server goes on."""

import json
import math
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from tests.serving.clients import StreamClient, generate
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

GOOD: dict[str, Any] = {"text_input": "The capital", "max_tokens": 4, "temperature": 0.0}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "empty text": ({"text_input": ""}, ["text_input", "''", "at least one character"]),
    "prompt too long": ({"text_input": "word " * 2000}, ["text_input", "max_model_len"]),
    "max_tokens 0": ({"max_tokens": 0}, ["max_tokens = 0", "at least 1"]),
    "max_tokens negative": ({"max_tokens": -7}, ["max_tokens = -7", "at least 1"]),
    "beyond the limit": ({"max_tokens": 600}, ["max_tokens = 600", "at most", "max_model_len 512"]),
    "min_tokens above max_tokens": ({"min_tokens": 5}, ["min_tokens = 5", "max_tokens (4)"]),
    "temperature negative": ({"temperature": -0.5}, ["temperature = -0.5", "at least 0"]),
    "temperature NaN": ({"temperature": math.nan}, ["temperature = nan", "at least 0"]),
    "top_p below 0": ({"top_p": -0.5}, ["top_p = -0.5", "from 0 to 1"]),
    "top_p above 1": ({"top_p": 1.5}, ["top_p = 1.5", "from 0 to 1"]),
    "top_k below -1": ({"top_k": -2}, ["top_k = -2", "0 or -1"]),
    "priority out of range": ({"priority": 101}, ["priority = 101", "from -100 to 100"]),
    "empty tenant": ({"tenant": ""}, ["tenant", "at least one character"]),
    "tpot_target_ms NaN": ({"tpot_target_ms": math.nan}, ["tpot_target_ms = nan", "above 0"]),
    "ttft_target_ms 0": ({"ttft_target_ms": 0.0}, ["ttft_target_ms = 0.0", "above 0"]),
    "timeout_ms negative": ({"timeout_ms": -1.0}, ["timeout_ms = -1.0", "above 0"]),
    "invalid UTF-8": ({"text_input": b"caf\xe9"}, ["text_input", "UTF-8"]),
}
BAD_IDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "id outside the vocabulary": ({"input_ids": [5, 384]}, ["input_ids = 384", "0 to 383"]),
    "negative id": ({"input_ids": [-1, 5]}, ["input_ids = -1", "0 to 383"]),
    "ids beside a text": ({"input_ids": [5], "text_input": "x"}, ["text_input", "given beside input_ids"]),
    "too many ids": ({"input_ids": [5] * 512}, ["input_ids = 512", "at most 511 tokens"]),
}


@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
@pytest.mark.parametrize("name", BAD)
def test_grpc_error_names_field_value_and_limit(tiny_server: TritonServer, model: str, name: str) -> None:
    change, parts = BAD[name]
    with pytest.raises(InferenceServerException) as caught:
        generate(tiny_server.grpc_url, model, **(GOOD | change))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_token_ids(tiny_server: TritonServer, name: str) -> None:
    change, parts = BAD_IDS[name]
    with pytest.raises(InferenceServerException) as caught:
        generate(tiny_server.grpc_url, "scheduler", max_tokens=4, **change)
    for part in parts:
        assert part in str(caught.value)


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as response:
            status, answer = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, answer = error.code, error.read()
    return status, json.loads(answer.removeprefix(b"data: "))  # server-sent events of generate_stream have the prefix


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
@pytest.mark.parametrize("name", [name for name in BAD if name not in ("temperature NaN", "invalid UTF-8")])
def test_http_status_is_400(tiny_server: TritonServer, model: str, endpoint: str, name: str) -> None:
    change, parts = BAD[name]
    body = json.dumps(GOOD | change | {"stream": endpoint == "generate_stream"}).encode()
    status, answer = post(f"{tiny_server.http_url}/v2/models/{model}/{endpoint}", body)
    assert status == 400
    for part in parts:
        assert part in answer["error"]


def test_http_invalid_utf8(tiny_server: TritonServer) -> None:
    body = b'{"text_input": "caf\xe9", "max_tokens": 4}'
    status, answer = post(f"{tiny_server.http_url}/v2/models/scheduler/generate", body)
    assert status == 400
    assert "UTF-8" in answer["error"]


@pytest.mark.parametrize(
    ("name", "dtype", "array"),
    [
        ("max_tokens", "FP32", np.array([4], np.float32)),
        ("max_tokens", "INT32", np.array([4, 4], np.int32)),
        ("temperature", "INT32", np.array([1], np.int32)),
        ("input_ids", "INT32", np.array([[1, 2], [3, 4]], np.int32)),
    ],
)
def test_wrong_dtype_or_shape(tiny_server: TritonServer, name: str, dtype: str, array: np.ndarray) -> None:
    text = grpc.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"x"], object))
    wrong = grpc.InferInput(name, list(array.shape), dtype)
    wrong.set_data_from_numpy(array)
    client = StreamClient(tiny_server.grpc_url)
    client.send_inputs("scheduler", "only", [text, wrong])
    error = client.wait()["only"].error
    client.close()
    assert error is not None
    assert name in str(error)


def test_neighbours_in_flight_are_untouched(tiny_server: TritonServer) -> None:
    good = {"input_ids": [9, 8, 7], "max_tokens": 200, "temperature": 0.0, "ignore_eos": True, "stream": True}
    alone = generate(tiny_server.grpc_url, **good).text
    client = StreamClient(tiny_server.grpc_url)
    client.send("scheduler", "good", **good)
    for index in range(20):
        with pytest.raises(InferenceServerException, match=f"max_tokens = {-index} is not valid"):
            generate(tiny_server.grpc_url, **(GOOD | {"max_tokens": -index}))
    answer = client.wait()["good"]
    client.close()
    assert answer.error is None
    assert answer.text == alone
