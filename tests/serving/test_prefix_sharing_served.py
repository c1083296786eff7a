"""The prefix cache, through the whole server."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble.serving.client_request import choice_seed
from ensemble.serving.control import call
from ensemble.serving.fleet_table import ChangeRole, DrainReplica, FleetTable, UndrainReplica
from tests.serving.clients import blocks_in_use, generate, read_metrics, run_streams, total
from tests.serving.deployments import deploy
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

SYSTEM_PROMPT = [5 + index % 300 for index in range(200)]
COMMON: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True, "return_output_ids": True}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(tiny_llama, prefill={"max_num_batched_tokens": 64}, scheduler={"roles": "auto"})
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("prefixes") / "log") as server:
        server.wait_ready(timeout_s=120)
        yield server


def settled_metrics(server: TritonServer, num_queried_tokens: float) -> dict[str, float]:
    """When all blocks are free, and so many tokens of prompts have been asked of the caches."""
    deadline = time.monotonic() + 5
    while True:  # the metrics' own interval
        metrics = read_metrics(server.metrics_url)
        is_settled = total(metrics, "vllm:prefix_cache_queries_total") == num_queried_tokens
        if (is_settled and not blocks_in_use(metrics)) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.1)


def test_a_second_turn_fetches_the_first_one_from_where_it_was_decoded(
    server: TritonServer, tiny_server: TritonServer
) -> None:
    """One replica computes and decodes the first turn, another one the second: the first one's KV goes over."""
    question = [9 + index % 200 for index in range(60)]
    prompt = [5 + index * index % 300 for index in range(304)]
    turn = COMMON | {"max_tokens": 33, "seed": 1}

    def only(replica: int) -> None:
        """This one does it all."""
        for command in (
            UndrainReplica(replica=replica),
            ChangeRole(replica=replica, role="mixed"),
            DrainReplica(replica=1 - replica),
        ):
            call(server.run_dir, command, FleetTable, timeout_s=10.0)

    only(1)
    answer = generate(server.grpc_url, input_ids=prompt, **turn).output_ids
    before = settled_metrics(server, len(prompt))
    only(0)
    second = prompt + answer + question
    found = generate(server.grpc_url, input_ids=second, **turn)
    after = settled_metrics(server, len(prompt) + len(second))
    for command in (UndrainReplica(replica=1), ChangeRole(replica=1, role="decode")):
        call(server.run_dir, command, FleetTable, timeout_s=10.0)
    call(server.run_dir, ChangeRole(replica=0, role="prefill"), FleetTable, timeout_s=10.0)
    num_found = total(after, "vllm:prefix_cache_hits_total") - total(before, "vllm:prefix_cache_hits_total")
    assert len(second) - num_found <= 1.1 * len(question)
    assert total(after, "distserve:kv_transfer_bytes_total") > total(before, "distserve:kv_transfer_bytes_total")
    assert total(after, "distserve:prefix_fetches_total") == total(before, "distserve:prefix_fetches_total") + 1
    assert blocks_in_use(after) == 0
    assert answer == generate(tiny_server.grpc_url, input_ids=prompt, **turn).output_ids
    assert found.output_ids == generate(tiny_server.grpc_url, input_ids=second, **turn).output_ids


def test_a_common_beginning_is_computed_once_and_changes_no_output(
    server: TritonServer, tiny_server: TritonServer
) -> None:
    requests = [
        {"input_ids": SYSTEM_PROMPT[: 200 - index % 3] + [7 + index] * (index % 5), "seed": index, **COMMON}
        for index in range(40)
    ]
    first_alone = [run_streams(tiny_server.grpc_url, [each], 1)[0] for each in requests[:3]]
    expected = run_streams(tiny_server.grpc_url, requests, 8)
    assert [answer.output_ids for answer in expected[:3]] == [answer.output_ids for answer in first_alone]
    before = read_metrics(server.metrics_url)
    answers = run_streams(server.grpc_url, requests, 8)
    num_tokens = sum(len(request["input_ids"]) for request in requests)
    num_before = total(before, "vllm:prefix_cache_queries_total")
    metrics = settled_metrics(server, num_before + num_tokens)
    assert [answer.output_ids for answer in answers] == [answer.output_ids for answer in expected]
    assert total(metrics, "vllm:prefix_cache_queries_total") == num_before + num_tokens
    num_hits_before = total(before, "vllm:prefix_cache_hits_total")
    assert total(metrics, "vllm:prefix_cache_hits_total") - num_hits_before > 0.6 * num_tokens
    assert blocks_in_use(metrics) == 0


def test_choices_share_their_prompt(tiny_server: TritonServer) -> None:
    """Four of 400 tokens compute little more than one does, and say what their seeds say alone."""

    def num_computed() -> float:
        """Once the metrics know of all prompts that were asked for."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            metrics = read_metrics(tiny_server.metrics_url)
            if total(metrics, "vllm:prefix_cache_queries_total") == num_asked:
                break
            time.sleep(0.02)
        return total(metrics, "vllm:prefix_cache_queries_total") - total(metrics, "vllm:prefix_cache_hits_total")

    asked: dict[str, Any] = COMMON | {"input_ids": [7 + index % 290 for index in range(400)], "seed": 11}
    num_asked = total(read_metrics(tiny_server.metrics_url), "vllm:prefix_cache_queries_total")
    before = num_computed()
    for stream in (False, True):
        answer = generate(tiny_server.grpc_url, "scheduler", **asked | {"n": 4, "stream": stream})
        num_asked += 4 * 400
        assert num_computed() - before <= 1.1 * 400
        outputs: list[list[int]] = [[], [], [], []]
        for response in answer.responses:
            rows = response["output_ids"].reshape(len(response["sequence_index"]), -1).tolist()
            for choice, row in zip(response["sequence_index"].tolist(), rows, strict=True):
                outputs[choice] += row
        alone = [asked | {"seed": choice_seed(11, choice)} for choice in range(4)]
        assert outputs == [each.output_ids for each in run_streams(tiny_server.grpc_url, alone, 4)]
        num_asked += 4 * 400
