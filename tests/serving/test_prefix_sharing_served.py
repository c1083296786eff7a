"""The prefix cache, through the whole server."""

import time
from pathlib import Path
from typing import Any

import pytest

from tests.serving.clients import blocks_in_use, read_metrics, run_streams, total
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
