"""A fleet whose KV goes by a transport that was asked for gives the answers that it gives by any other."""

from pathlib import Path

import pytest
import torch

from tests.serving.clients import blocks_in_use, read_metrics, run_streams
from tests.serving.deployments import deploy
from tests.serving.oracle import greedy_by_transformers
from tests.serving.test_equality import random_prompts
from tests.serving.test_faults import wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

MAX_TOKENS = 24


@pytest.mark.parametrize("transport", ["host", "nccl"])
def test_greedy_in_float64_equals_transformers(transport: str, tiny_llama: Path, tmp_path: Path) -> None:
    prompts = random_prompts([1, 2, 15, 16, 17, 31, 33, 64, 100, 200])
    expected = greedy_by_transformers(tiny_llama, prompts, MAX_TOKENS, torch.float64)
    deployment = deploy(tiny_llama, decode={"devices": ["cpu", "cpu"]}, transfer={"transport": transport})
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        asked = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "return_output_ids": True}
        requests = [{"input_ids": prompt, **asked, "return_perf_metrics": True} for prompt in prompts]
        answers = run_streams(server.grpc_url, requests, len(requests))
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)
        metrics = read_metrics(server.metrics_url)
    assert [answer.output_ids for answer in answers] == expected
    num_bytes = sum(int(answer.responses[-1]["kv_transfer_bytes"][0]) for answer in answers)
    counters = {name: value for name, value in metrics.items() if name.startswith("distserve:kv_transfer_bytes_total{")}
    by_transport = {name: value for name, value in counters.items() if value}
    assert num_bytes > 0 and list(by_transport.values()) == [num_bytes]
    assert f'transport="{transport}"' in next(iter(by_transport))
