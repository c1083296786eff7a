"""Workers die: their requests end with a typed error, the others go on, and the stage serves again."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tritonclient.utils import InferenceServerException

from tests.serving.clients import Answer, StreamClient, blocks_in_use, generate, read_metrics
from tests.serving.deployments import deploy
from tools.client import show_health
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

DECODING: dict[str, Any] = {
    "input_ids": [9, 8, 7],
    "max_tokens": 8000,
    "temperature": 0.0,
    "ignore_eos": True,
    "stream": True,
}
PREFILLING = {**DECODING, "input_ids": [5] * 3000, "max_tokens": 2}


@pytest.fixture
def server(roomy_llama: Path, tmp_path: Path) -> Iterator[TritonServer]:
    deployment = deploy(roomy_llama, prefill={"max_num_batched_tokens": 16})
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, **(DECODING | {"max_tokens": 4}))
        yield server


def worker(server: TritonServer, stage: str) -> psutil.Process | None:
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if "ensemble.workers.worker" in process.cmdline() and stage in process.cmdline():
                return process
        except psutil.Error:
            continue
    return None


def kill_worker(server: TritonServer, stage: str) -> None:
    found = worker(server, stage)
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def in_background(server: TritonServer, values: dict[str, Any]) -> tuple[threading.Thread, Answer, list[float]]:
    """Starts a request; its answer fills while the thread runs; the list gets the time of its end."""
    client = StreamClient(server.grpc_url)
    client.send("scheduler", "0", **values)
    ended: list[float] = []

    def wait() -> None:
        client.wait()
        ended.append(time.monotonic())
        client.close()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, client.answers["0"], ended


def serves_again(server: TritonServer, within_s: float = 15.0) -> str:
    deadline = time.monotonic() + within_s
    while True:
        try:
            return generate(server.grpc_url, **(DECODING | {"max_tokens": 8})).text
        except InferenceServerException as error:
            assert "is unavailable" in str(error)
            assert time.monotonic() < deadline, "the stage has not come back"
            time.sleep(0.1)


def assert_nothing_in_use(server: TritonServer) -> None:
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)


def test_decode_worker_killed(server: TritonServer) -> None:
    expected = generate(server.grpc_url, **(DECODING | {"max_tokens": 8})).text
    thread, answer, ended = in_background(server, DECODING)
    wait_until(lambda: len(answer.responses) > 3, 10)
    killed_at = time.monotonic()
    kill_worker(server, "decode")
    thread.join(timeout=10)
    assert "decode is unavailable" in str(answer.error)
    assert ended[0] - killed_at < 1.0
    assert serves_again(server) == expected
    assert_nothing_in_use(server)


def test_prefill_worker_killed(server: TritonServer) -> None:
    expected = generate(server.grpc_url, **(DECODING | {"max_tokens": 8})).text
    to_the_end = {**DECODING, "max_tokens": 1500}
    alone = generate(server.grpc_url, **to_the_end).text
    decoding, survivor, _ = in_background(server, to_the_end)
    wait_until(lambda: len(survivor.responses) > 3, 10)
    lost = [in_background(server, PREFILLING) for _ in range(8)]
    time.sleep(0.05)
    killed_at = time.monotonic()
    kill_worker(server, "prefill")
    for thread, _, _ in lost:
        thread.join(timeout=10)
    unfinished = [(answer, ended) for _, answer, ended in lost if answer.error is not None]
    assert unfinished, "all eight prompts were through before the kill"
    for answer, ended in unfinished:
        assert "prefill is unavailable" in str(answer.error)
        assert ended[0] - killed_at < 1.0
    decoding.join(timeout=30)
    assert survivor.error is None, "a sequence that runs in decode needs prefill no more"
    assert survivor.text == alone
    assert serves_again(server) == expected
    assert_nothing_in_use(server)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_requests_are_refused_at_once_while_a_stage_is_down(server: TritonServer, stage: str) -> None:
    wait_until(lambda: show_health(server.metrics_url), 5.0)
    kill_worker(server, stage)
    # What is sent before the death is noticed may wait in the bridge for the successor.
    wait_until(lambda: not show_health(server.metrics_url), 1.5)
    start = time.monotonic()
    with pytest.raises(InferenceServerException, match=f"{stage} is unavailable"):
        generate(server.grpc_url, **(DECODING | {"max_tokens": 2}))
    assert time.monotonic() - start < 1.0
    serves_again(server)
    wait_until(lambda: show_health(server.metrics_url), 2.0)
