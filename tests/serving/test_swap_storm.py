"""Requests through a server whose decode pool is so small that sequences are swapped, or given up, all the time."""

import random
import string
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble.engine.engine import load_engine
from ensemble.request import Request, SamplingParams
from tests.serving.clients import blocks_in_use, read_metrics, run_streams, total
from tests.serving.deployments import deploy
from tools.offline import generate
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

NUM_REQUESTS, NUM_ENDED_EARLY, NUM_CLIENTS = 120, 60, 40
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 8  # layers, key and value, KV heads, tokens, head_dim, float64


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = random.Random(13)
    return [
        Request(
            request_id=index,
            prompt_token_ids=[rng.randrange(3, 380) for _ in range(rng.randint(1, 48))],
            sampling=SamplingParams(
                max_tokens=rng.choice([1, 20, 60, 90]),
                temperature=float(index % 2),
                seed=index,
                ignore_eos=index % 3 == 0,
            ),
        )
        for index in range(NUM_REQUESTS)
    ]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, requests: list[Request]) -> list[list[int]]:
    """What the engine says without a server, and with room for all."""
    deployment = deploy(tiny_llama)
    done = generate(load_engine(deployment, deployment.decode, torch.device("cpu")), requests)
    return [done[request.request_id].output_token_ids for request in requests]


def as_inputs(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    return {
        "input_ids": request.prompt_token_ids,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "ignore_eos": sampling.ignore_eos,
        "return_output_ids": True,
    }


def end_early(server: TritonServer) -> None:
    """Outputs that end far before their limit: of those that come next, more are admitted than there is room for."""
    request = {"text_input": "x", "max_tokens": 90, "stop_words": list(string.ascii_letters + " .,")}
    run_streams(server.grpc_url, [request | {"seed": seed} for seed in range(NUM_ENDED_EARLY)], NUM_CLIENTS)


def swapped_bytes(metrics: dict[str, float], way: str) -> float:
    return total(metrics, "distserve:swap_bytes_total", f'direction="{way}"')


def lost_bytes(metrics: dict[str, float]) -> float:
    """Of sequences that a stop string ended while they were swapped out: they never came back."""
    return swapped_bytes(metrics, "out") - swapped_bytes(metrics, "in")


def quiet_metrics(server: TritonServer, num_ended: int) -> dict[str, float]:
    """The metrics when they have caught up with the end of so many requests, or after ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        metrics = read_metrics(server.metrics_url)
        has_caught_up = total(metrics, "vllm:request_success_total") == num_ended
        is_empty = blocks_in_use(metrics) == 0 and total(metrics, "vllm:num_requests_swapped") == 0
        if (has_caught_up and is_empty) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.1)


# Every policy, with real loops: tests/replicas/test_decode_swapping.py.
@pytest.mark.parametrize(("policy", "num_host_blocks"), [("fcfs", 0), ("mlfq", 400)])
def test_outputs_are_those_of_an_unconstrained_run_and_both_pools_are_empty_at_the_end(
    policy: str,
    num_host_blocks: int,
    requests: list[Request],
    expected: list[list[int]],
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    decode = {
        "policy": policy,
        "quantum_s": 0.02,
        "starvation_s": 0.5,
        "kv_cache_bytes": 24 * BLOCK_BYTES,
        "host_kv_bytes": num_host_blocks * BLOCK_BYTES,
        "max_num_seqs": 8,
        "max_num_resident_seqs": NUM_CLIENTS,
    }
    with TritonServer(deploy(tiny_llama, decode=decode), log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        end_early(server)
        lost = lost_bytes(quiet_metrics(server, NUM_ENDED_EARLY))
        answers = run_streams(server.grpc_url, [as_inputs(request) for request in requests], NUM_CLIENTS)
        assert [answer.output_ids for answer in answers] == expected
        metrics = quiet_metrics(server, NUM_ENDED_EARLY + NUM_REQUESTS)
    assert blocks_in_use(metrics) == 0
    assert total(metrics, "vllm:num_requests_swapped") == 0
    assert total(metrics, "vllm:num_preemptions_total") > 10
    assert lost_bytes(metrics) == lost
    assert (swapped_bytes(metrics, "in") > 0) == (num_host_blocks > 0)
    copies = total(metrics, "distserve:swap_time_seconds_count", 'direction="out"')
    assert copies == total(metrics, "distserve:preemptions_total", 'by="swap"')
    host_blocks, free = (total(metrics, f"distserve:host_kv_blocks{end}") for end in ("", "_free"))
    assert host_blocks == free == num_host_blocks
    by_what = {by: total(metrics, "distserve:preemptions_total", f'by="{by}"') for by in ("swap", "recompute")}
    assert sum(by_what.values()) == total(metrics, "vllm:num_preemptions_total")
    assert by_what["swap" if num_host_blocks else "recompute"] > 10
    assert total(metrics, "distserve:recoveries_total") == 0
