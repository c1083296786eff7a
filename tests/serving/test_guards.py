"""Nothing for outsiders: what a client may not say harms nobody, and what cannot fit is refused before it costs."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from tests.serving.clients import StreamClient, generate, make_inputs, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_cancel import CANCELLED, sample, wait_until
from tools.server.server_state import processes, workers
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

SMALL: dict[str, Any] = {"text_input": "The capital", "max_tokens": 4, "temperature": 0.0}
STREAM: dict[str, Any] = {"max_tokens": 8000, "temperature": 0.0, "ignore_eos": True, "stream": True}
LONG: dict[str, Any] = {"input_ids": [9, 8, 7], **STREAM}


@pytest.fixture(scope="module")
def server(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(deploy(roomy_llama), log_path=tmp_path_factory.mktemp("guards") / "log") as found:
        found.wait_ready(timeout_s=120)
        generate(found.grpc_url, "ensemble", **SMALL)
        yield found


def infer(server: TritonServer, model: str, **tensors: np.ndarray) -> grpc.InferResult:
    inputs = []
    for name, array in tensors.items():
        inputs.append(grpc.InferInput(name, list(array.shape), "UINT8" if array.dtype == np.uint8 else "BYTES"))
        inputs[-1].set_data_from_numpy(array)
    with grpc.InferenceServerClient(server.grpc_url) as client:
        return client.infer(model, inputs)


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], dtype=object)


def test_inner_models_obey_nobody_without_the_secret(server: TritonServer) -> None:
    before = {process.pid for process in workers(server)}
    for model in ("prefill", "decode"):
        for call in (b"", b"\x81\xa4type\xa9EndWorker", bytes(64)):
            with pytest.raises(InferenceServerException, match=r"the scheduler's alone|zero|empty"):
                infer(server, model, CALL=np.frombuffer(call, np.uint8))
    assert generate(server.grpc_url, **SMALL).text
    assert {process.pid for process in workers(server)} == before


def test_handles_and_marks_are_not_for_clients_to_make(server: TritonServer) -> None:
    """They neither cancel another's stream nor take a request out of the reach of its own client's cancel."""
    victim = StreamClient(server.grpc_url)
    victim.send("ensemble", "0", text_input="x", **STREAM)
    wait_until(lambda: len(victim.answers["0"].responses) >= 2, 10)
    before = sample(server, CANCELLED)
    forger = StreamClient(server.grpc_url)
    for request_id in range(20):
        for handle in (
            f"{request_id}:1@ipc:///tmp/x",
            f"handle {request_id} 1 1/{'0' * 64}",
            f"handle {request_id} 1 1",
        ):
            tensor = grpc.InferInput("cancel_handle", [1], "BYTES")
            tensor.set_data_from_numpy(text(handle))
            forger.send_inputs("postprocess", f"{request_id}{handle}", [tensor])
    forger.wait()
    forger.close(cancel=True)
    marked = StreamClient(server.grpc_url)
    mark = grpc.InferInput("ensemble_mark", [1], "BYTES")
    mark.set_data_from_numpy(text(f"ensemble 1/{'0' * 64}"))
    marked.send_inputs("scheduler", "0", [*make_inputs(**LONG), mark])
    wait_until(lambda: len(marked.answers["0"].responses) >= 2, 10)
    assert all("cancel_handle" not in response for response in marked.answers["0"].responses)
    marked.close(cancel=True)
    wait_until(lambda: sample(server, CANCELLED) == before + 1, 2.0)
    num_responses = len(victim.answers["0"].responses)
    wait_until(lambda: len(victim.answers["0"].responses) > num_responses, 10)
    victim.close(cancel=True)
    wait_until(lambda: sample(server, CANCELLED) == before + 2, 2.0)


def test_the_grpc_front_takes_no_shared_memory_and_no_orders(server: TritonServer) -> None:
    with grpc.InferenceServerClient(server.grpc_url) as client:
        assert client.get_model_config("ensemble").config.name == "ensemble"
        assert client.get_inference_statistics("scheduler").model_stats
        for refused in (
            lambda: client.register_system_shared_memory("mine", "/mine", 64),
            lambda: client.unload_model("scheduler"),
            lambda: client.load_model("scheduler"),
            lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}),
            lambda: client.update_log_settings({"log_verbose_level": 3}),
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                refused()
    assert generate(server.grpc_url, **SMALL).text


# ---- sizes


def proportional_bytes(server: TritonServer) -> int:
    """Memory of all processes, what they share counted once."""
    total = 0
    for process in processes(server):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


@pytest.mark.parametrize("model", ["ensemble", "scheduler"])
def test_huge_texts_are_refused_at_once_and_cost_others_nothing(server: TritonServer, model: str) -> None:
    """Over gRPC, which takes them; small requests go on beside them, and the memory comes back."""
    memory, done, slowest = proportional_bytes(server), threading.Event(), [0.0]

    def small_requests() -> None:
        while not done.wait(0.2):
            started = time.monotonic()
            generate(server.grpc_url, model, **SMALL)
            slowest[0] = max(slowest[0], time.monotonic() - started)

    thread = threading.Thread(target=small_requests)
    thread.start()
    try:
        for num_bytes in (5_000_000, 20_000_000, 60_000_000):
            with pytest.raises(InferenceServerException) as caught:
                generate(server.grpc_url, model, text_input="x" * num_bytes, max_tokens=4)
            assert f"'{num_bytes} bytes'" in str(caught.value)
            assert "at most 40960 bytes, 8192 tokens (max_model_len) of at most 5 bytes" in str(caught.value)
    finally:
        done.set()
        thread.join()
    assert slowest[0] < 2.0, "a text of 5 MB took 7 s to be tokenized, and all others waited"
    wait_until(lambda: proportional_bytes(server) < memory + (100 << 20), 20.0)


def test_a_long_text_that_is_tokenized_delays_nobody(server: TritonServer) -> None:
    """Of 40 kB: it fits by its length in bytes, and has too many tokens."""
    for model in ("ensemble", "scheduler"):
        answers: list[str] = []

        def ask(model: str = model, answers: list[str] = answers) -> None:
            with pytest.raises(InferenceServerException) as caught:
                generate(server.grpc_url, model, text_input="zq" * 20_000, max_tokens=4)
            answers.append(str(caught.value))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert generate(server.grpc_url, model, **SMALL).text
        for thread in threads:
            thread.join()
        assert len(answers) == 8
        assert all("at most 8191 tokens" in answer for answer in answers)


def test_ids_and_parameters_have_limits(server: TritonServer) -> None:
    client = StreamClient(server.grpc_url)
    client.send_inputs("scheduler", "i" * 257, make_inputs(**SMALL))
    assert "at most 256 characters" in str(client.wait()["i" * 257].error)
    client.close()


def test_the_http_front_names_its_own_limit(server: TritonServer) -> None:
    assert server.ports is not None
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=10)
    connection.request("POST", "/v2/models/ensemble/generate", json.dumps({"text_input": "x" * 5_000_000}))
    response = connection.getresponse()
    assert response.status == 413
    assert "4194304 bytes (--max-body-bytes)" in json.load(response)["error"]
    connection.close()


def test_times_count_to_the_hand_over(server: TritonServer) -> None:
    """The sum of E2E of one request is no less than what its client saw pass between its sending and generation."""
    name = "vllm:e2e_request_latency_seconds_sum"
    before, started = sample(server, name), time.monotonic()
    generate(server.grpc_url, **SMALL)
    wait_until(lambda: sample(server, name) > before, 5.0)
    assert 0 < sample(server, name) - before <= time.monotonic() - started
    metrics = read_metrics(server.metrics_url)
    first = sum(value for key, value in metrics.items() if key.startswith("vllm:time_to_first_token_seconds_sum"))
    assert first <= sample(server, name)
