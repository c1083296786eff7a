"""The prefix cache, through the whole server."""

import time
from pathlib import Path
from typing import Any

import pytest

from ensemble.serving.inputs import choice_seed
from tests.serving.clients import blocks_in_use, generate, read_metrics, run_streams, total
from tests.serving.deployments import deploy
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

SYSTEM_PROMPT = [5 + index % 300 for index in range(200)]
COMMON: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "ignore_eos": True, "return_output_ids": True}


def test_a_common_beginning_is_computed_once_and_changes_no_output(
    tiny_server: TritonServer, tiny_llama: Path, tmp_path: Path
) -> None:
    requests = [
        {"input_ids": SYSTEM_PROMPT[: 200 - index % 3] + [7 + index] * (index % 5), "seed": index, **COMMON}
        for index in range(40)
    ]
    first_alone = [run_streams(tiny_server.grpc_url, [each], 1)[0] for each in requests[:3]]
    expected = run_streams(tiny_server.grpc_url, requests, 8)
    assert [answer.output_ids for answer in expected[:3]] == [answer.output_ids for answer in first_alone]
    deployment = deploy(tiny_llama, prefill={"max_num_batched_tokens": 64}, scheduler={"roles": "auto"})
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        answers = run_streams(server.grpc_url, requests, 8)
        num_tokens = sum(len(request["input_ids"]) for request in requests)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # the metrics' own interval
            metrics = read_metrics(server.metrics_url)
            if not blocks_in_use(metrics) and total(metrics, "vllm:prefix_cache_queries_total") == num_tokens:
                break
            time.sleep(0.1)
    assert [answer.output_ids for answer in answers] == [answer.output_ids for answer in expected]
    assert total(metrics, "vllm:prefix_cache_queries_total") == num_tokens
    assert total(metrics, "vllm:prefix_cache_hits_total") > 0.6 * num_tokens
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
