"""Nothing for outsiders: what a client may not say harms nobody, and what cannot fit is refused before it costs."""

import http.client
import json
import re
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

from ensemble.replicas.launchers.base import GIVE_BACK_MEMORY
from tests.serving.clients import StreamClient, generate, make_inputs
from tests.serving.deployments import deploy
from tests.serving.test_cancel import CANCELLED, sample, wait_until
from tools.server.run_dir import SHM, shm_prefix
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


def test_times_count_to_the_hand_over(server: TritonServer) -> None:
    """The first test: of the server's second request. Its times lie within what its client saw pass."""
    ttft, e2e = "vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"
    wait_until(lambda: sample(server, f"{e2e}_count") == 1, 5.0)
    before = {name: sample(server, f"{name}_sum") for name in (ttft, e2e)}
    started = time.monotonic()
    generate(server.grpc_url, "ensemble", **SMALL)
    seen_s = time.monotonic() - started
    wait_until(lambda: sample(server, f"{e2e}_count") == 2, 5.0)
    ttft_s, e2e_s = (sample(server, f"{name}_sum") - before[name] for name in (ttft, e2e))
    assert ttft_s == pytest.approx(e2e_s), "one response carries all tokens, the first too"
    assert 0 < e2e_s < seen_s


def test_inner_models_obey_nobody_without_the_secret(server: TritonServer) -> None:
    before = {process.pid for process in workers(server)}
    for model in ("prefill", "decode"):
        for call in (b"", b"\x81\xa4type\xa9EndWorker", bytes(64)):
            with pytest.raises(InferenceServerException, match=r"the scheduler's alone|zero|empty"):
                infer(server, model, CALL=np.frombuffer(call, np.uint8))
    assert generate(server.grpc_url, **SMALL).text
    assert {process.pid for process in workers(server)} == before


def test_handles_and_marks_are_not_for_clients_to_make(server: TritonServer) -> None:
    """They neither take or cancel another's stream nor take a request out of the reach of its own client's cancel."""
    victim = StreamClient(server.grpc_url)
    victim.send("ensemble", "0", text_input="x", **STREAM)
    wait_until(lambda: len(victim.answers["0"].responses) >= 2, 10)
    before = sample(server, CANCELLED)
    forger = StreamClient(server.grpc_url)
    for request_id in range(20):
        for handle in (
            f"{request_id}:1@ipc:///tmp/x",
            f"stream {request_id}/{'0' * 64}",
            f"stream {request_id}",
            "",
        ):
            tensor = grpc.InferInput("stream_handle", [1], "BYTES")
            tensor.set_data_from_numpy(text(handle))
            forger.send_inputs("answer", f"{request_id}{handle}", [tensor])
    forged = list(forger.wait().values())
    assert not any(answer.responses for answer in forged)
    assert "is not valid: this model is for the ensembles alone" in str(forged[0].error), (
        "an error need not name its request"
    )
    forger.close(cancel=True)
    marked = StreamClient(server.grpc_url)
    for kind in ("ensemble", "openai"):
        mark = grpc.InferInput("ensemble_mark", [1], "BYTES")
        mark.set_data_from_numpy(text(f"{kind} 1/{'0' * 64}"))
        marked.send_inputs("scheduler", kind, [*make_inputs(**LONG), mark])
        wait_until(lambda kind=kind: len(marked.answers[kind].responses) >= 2, 10)
        assert all("response_handle" not in response for response in marked.answers[kind].responses)
    marked.close(cancel=True)
    wait_until(lambda: sample(server, CANCELLED) == before + 2, 10.0)
    num_responses = len(victim.answers["0"].responses)
    wait_until(lambda: len(victim.answers["0"].responses) > num_responses, 10)
    victim.close(cancel=True)
    wait_until(lambda: sample(server, CANCELLED) == before + 3, 10.0)


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


def private_bytes(server: TritonServer) -> int:
    """Memory of the Triton server and its stubs that they do not share; the ranks' varies by their steps."""
    total, ranks = 0, {process.pid for process in workers(server)}
    for process in processes(server):
        if process.pid in ranks:
            continue
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total


def shared_bytes(server: TritonServer) -> int:
    """Of the stubs' regions, which only grow."""
    return sum(region.stat().st_size for region in SHM.glob(f"{shm_prefix(server.run_dir)}*"))


def test_a_request_that_waits_takes_no_shared_memory(server: TritonServer) -> None:
    """With some hundreds of prompts in it, the 64 MiB that containers get would be full."""
    before, num_requests = shared_bytes(server), 160
    prompt = make_inputs(input_ids=[3] * 8000, max_tokens=100, stream=True)
    client = StreamClient(server.grpc_url)
    try:
        for number in range(num_requests):  # 5 MB together, in a region that has 4
            client.send_inputs("scheduler", str(number), prompt)
        names = ("vllm:num_requests_waiting", "vllm:num_requests_running")
        wait_until(lambda: sum(sample(server, name) for name in names) > 0.95 * num_requests, 20.0)
        assert shared_bytes(server) == before
    finally:
        client.close(cancel=True)


@pytest.mark.parametrize("model", ["ensemble", "scheduler"])
def test_huge_texts_are_refused_at_once_and_cost_others_nothing(server: TritonServer, model: str) -> None:
    """Over gRPC, which takes them; small requests go on beside them, and the memory comes back."""
    memory, done, slowest = private_bytes(server), threading.Event(), [0.0]

    def small_requests() -> None:
        while not done.wait(0.2):
            started = time.monotonic()
            generate(server.grpc_url, model, **SMALL)
            slowest[0] = max(slowest[0], time.monotonic() - started)

    thread = threading.Thread(target=small_requests)
    thread.start()
    try:
        for num_bytes in (5_000_000, 20_000_000):
            with pytest.raises(InferenceServerException) as caught:
                generate(server.grpc_url, model, text_input="x" * num_bytes, max_tokens=4)
            assert f"'{num_bytes} bytes'" in str(caught.value)
            allowed = r"at most \d+ bytes, 8192 tokens \(max_model_len\) of at most \d+ bytes"
            assert re.search(allowed, str(caught.value))
        for num_bytes in (60_000_000, 200_000_000) * 3:  # never reach the stub
            with pytest.raises(InferenceServerException, match=r"increase the shared memory.*File too large"):
                generate(server.grpc_url, model, text_input="x" * num_bytes, max_tokens=4)
    finally:
        done.set()
        thread.join()
    assert slowest[0] < 4.0, "a text of 5 MB took 7 s to be tokenized, and all others waited"
    assert shared_bytes(server) < 160 << 20  # which stays: the 24.10 server never makes it smaller
    kept_by_heaps = int(GIVE_BACK_MEMORY["MALLOC_ARENA_MAX"]) * (64 << 20)  # at most, whatever came before
    wait_until(lambda: private_bytes(server) < memory + kept_by_heaps, 20.0)


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
