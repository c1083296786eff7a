"""Replicas die, or hang: their requests are computed again from what their clients have, and end as if nothing had
happened.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving.clients import Answer, StreamClient, blocks_in_use, generate, read_metrics, total
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


@pytest.fixture(scope="module")
def server(roomy_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(roomy_llama, prefill={"max_num_batched_tokens": 16, "prefix_cache": False}, hang_timeout_s=2.0)
    log_path = tmp_path_factory.mktemp("faults") / "log"
    with TritonServer(deployment, log_path=log_path) as server:
        server.wait_ready(timeout_s=120)
        generate(server.grpc_url, **(DECODING | {"max_tokens": 4}))
        yield server


def worker(server: TritonServer, stage: str) -> psutil.Process | None:
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            if "ensemble.replicas.worker" in process.cmdline() and stage in process.cmdline():
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


def assert_nothing_in_use(server: TritonServer) -> None:
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)


def recoveries(server: TritonServer) -> float:
    return sum(value for name, value in read_metrics(server.metrics_url).items() if "recoveries_total" in name)


def test_answers_outlive_their_decode_worker(server: TritonServer) -> None:
    """Greedy ones, and drawn ones with a seed."""
    asked = DECODING | {"max_tokens": 2000, "return_output_ids": True, "return_perf_metrics": True}
    both = [asked, asked | {"temperature": 1.0, "seed": 5, "top_p": 0.9}]
    undisturbed = [in_background(server, each) for each in both]
    for thread, _, _ in undisturbed:
        thread.join(timeout=60)
    under_way = [in_background(server, each) for each in both]
    wait_until(lambda: all(len(answer.responses) > 3 for _, answer, _ in under_way), 10)
    kill_worker(server, "decode")
    for (thread, answer, _), (_, expected, _) in zip(under_way, undisturbed, strict=True):
        thread.join(timeout=60)
        assert answer.error is None and answer.output_ids == expected.output_ids
        assert answer.responses[-1]["num_recoveries"].item() >= 1
    assert recoveries(server) >= 2
    assert_nothing_in_use(server)


def test_prompts_outlive_their_prefill_worker(server: TritonServer) -> None:
    expected = generate(server.grpc_url, **PREFILLING).text
    decoding, survivor, _ = in_background(server, DECODING | {"max_tokens": 2000})
    wait_until(lambda: len(survivor.responses) > 3, 10)
    client = StreamClient(server.grpc_url)  # one connection: eight take so long to make that no prompt ever waits
    for index in range(8):
        client.send("scheduler", str(index), **PREFILLING)
    wait_until(lambda: total(read_metrics(server.metrics_url), "vllm:num_requests_waiting") > 0, 10)
    before = recoveries(server)
    kill_worker(server, "prefill")
    lost = client.wait(timeout_s=60).values()
    client.close()
    decoding.join(timeout=60)
    assert [answer.error for answer in (*lost, survivor)] == [None] * 9
    assert {answer.text for answer in lost} == {expected}
    assert recoveries(server) > before
    assert_nothing_in_use(server)


def test_a_worker_that_stands_still_is_replaced(server: TritonServer) -> None:
    asked = DECODING | {"max_tokens": 2000}
    alone = generate(server.grpc_url, **asked).text
    stopped = worker(server, "decode")
    assert stopped is not None
    thread, answer, _ = in_background(server, asked)
    wait_until(lambda: len(answer.responses) > 3, 10)
    stopped.suspend()
    thread.join(timeout=60)
    assert answer.error is None and answer.text == alone
    assert not stopped.is_running()
    assert "made no progress" in server.log_path.read_text()
    assert_nothing_in_use(server)


def test_both_workers_killed_at_once(server: TritonServer) -> None:
    alone = generate(server.grpc_url, **(DECODING | {"max_tokens": 800})).text
    under_way = [in_background(server, DECODING | {"max_tokens": 800}) for _ in range(4)]
    wait_until(lambda: all(answer.responses for _, answer, _ in under_way), 20)
    for stage in ("prefill", "decode"):
        kill_worker(server, stage)
    wait_until(lambda: not show_health(server.metrics_url), 10)
    late, later_answer, _ = in_background(server, DECODING | {"max_tokens": 800})  # waits for the next lives
    for thread, answer, _ in [*under_way, (late, later_answer, [])]:
        thread.join(timeout=60)
        assert answer.error is None and answer.text == alone
    wait_until(lambda: show_health(server.metrics_url), 10)
    assert_nothing_in_use(server)
