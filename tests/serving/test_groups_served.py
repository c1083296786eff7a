"""Replicas of several ranks behind the real server: answers are those of one process, and outlive any rank."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from ensemble.engine.engine import load_engine
from ensemble.request import Request, SamplingParams
from tests.serving.clients import StreamClient, blocks_in_use, read_metrics
from tests.serving.deployments import deploy
from tests.serving.test_faults import wait_until
from tests.serving.test_swap_storm import as_inputs
from tools.offline import generate
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

RANKS = {"devices": ["cpu", "cpu"], "num_threads": 1}
STAGES = {"prefill": {"tp": 2, **RANKS, "max_num_batched_tokens": 64}, "decode": {"pp": 2, **RANKS}}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(tiny_llama, **STAGES, hang_timeout_s=2.0)
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("groups") / "log") as server:
        server.wait_ready(timeout_s=120)
        yield server


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        Request(
            request_id=index,
            prompt_token_ids=[3 + (7 * index + 5 * position) % 370 for position in range(length)],
            sampling=SamplingParams(max_tokens=300, temperature=float(index % 2), seed=index, ignore_eos=True),
        )
        for index, length in enumerate([1, 2, 16, 17, 100, 200])
    ]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, requests: list[Request]) -> list[list[int]]:
    alone = deploy(tiny_llama)
    done = generate(load_engine(alone, alone.decode, torch.device("cpu")), requests)
    return [done[request.request_id].output_token_ids for request in requests]


def rank_of(server: TritonServer, stage: str, rank: int) -> psutil.Process | None:
    for process in psutil.Process(server.pid).children(recursive=True):
        try:
            called = process.cmdline()
            if "ensemble.replicas.worker" in called and called[3] == stage and called[6] == str(rank):
                return process
        except psutil.Error:
            continue
    return None


def send_all(server: TritonServer, requests: list[Request]) -> StreamClient:
    client = StreamClient(server.grpc_url)
    for request in requests:
        client.send("scheduler", str(request.request_id), stream=True, **as_inputs(request))
    return client


def check_answers(client: StreamClient, expected: list[list[int]]) -> None:
    answers = client.wait()
    client.close()
    assert [answers[str(index)].error for index in range(len(expected))] == [None] * len(expected)
    assert [answers[str(index)].output_ids for index in range(len(expected))] == expected


def test_greedy_and_drawn_tokens_are_those_of_one_process(
    server: TritonServer, requests: list[Request], expected: list[list[int]]
) -> None:
    check_answers(send_all(server, requests), expected)
    wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)


def test_answers_outlive_any_rank(server: TritonServer, requests: list[Request], expected: list[list[int]]) -> None:
    """The first place of decode's pipeline is killed; then the second rank of prefill hangs."""
    for stage, struck_rank, how in (("decode", 0, signal.SIGKILL), ("prefill", 1, signal.SIGSTOP)):
        before = [rank_of(server, stage, rank) for rank in (0, 1)]
        client = send_all(server, requests)
        wait_until(lambda client=client: any(answer.responses for answer in client.answers.values()), 20)
        struck = before[struck_rank]
        assert struck is not None
        os.kill(struck.pid, how)
        check_answers(client, expected)
        for rank, process in enumerate(before):
            assert process is not None
            wait_until(lambda process=process: not process.is_running(), 20)
            wait_until(lambda stage=stage, rank=rank: rank_of(server, stage, rank) is not None, 20)
    check_answers(send_all(server, requests), expected)
