"""Replicas that compute prompts and decode, all of them or some short ones: the answers are the same."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ensemble.config import Batching
from tests.checkpoints import make_tiny_opt
from tests.serving.clients import StreamClient, blocks_in_use, generate, read_metrics, run_streams
from tests.serving.deployments import deploy
from tests.serving.oracle import greedy_by_transformers
from tests.serving.test_equality import random_prompts
from tests.serving.test_faults import in_background, kill_worker, wait_until
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

MAX_TOKENS = 24
GREEDY: dict[str, Any] = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "return_output_ids": True}
COLOCATED: dict[str, Any] = {"mode": "colocated", "prefill": {"devices": [], "max_num_batched_tokens": 64}}
LONG = {"input_ids": [9, 8, 7], "max_tokens": 8000, "temperature": 0.0, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("batching", get_args(Batching))
def test_greedy_in_float64_equals_transformers(batching: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = tiny_llama if batching == "mixed" else make_tiny_opt(tmp_path / "opt")
    prompts = random_prompts([1, 2, 15, 16, 17, 31, 33, 64, 100, 200] * 2)
    expected = greedy_by_transformers(model, prompts, MAX_TOKENS, torch.float64)
    deployment = deploy(model, **COLOCATED, decode={"devices": ["cpu", "cpu"], "batching": batching})
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        requests = [{"input_ids": prompt, **GREEDY, "return_perf_metrics": True} for prompt in prompts]
        answers = run_streams(server.grpc_url, requests, len(requests))
        assert generate(server.grpc_url, text_input="x", max_tokens=1).responses
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)
    assert [answer.output_ids for answer in answers] == expected
    used = {int(answer.responses[-1]["decode_worker"][0]) for answer in answers}
    assert used == {0, 1}
    assert {int(answer.responses[-1]["prefill_worker"][0]) for answer in answers} == {-1}
    assert all(int(answer.responses[-1]["kv_transfer_bytes"][0]) == 0 for answer in answers)


def test_cancels_and_a_killed_worker(roomy_llama: Path, tmp_path: Path) -> None:
    with TritonServer(deploy(roomy_llama, **COLOCATED), log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        client = StreamClient(server.grpc_url)
        for request_id in range(8):
            client.send("scheduler", str(request_id), **(LONG | {"input_ids": [5] * 100}))
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) > 0, 10.0)
        client.close(cancel=True)
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)

        asked = LONG | {"max_tokens": 1500}
        alone = generate(server.grpc_url, **asked).text
        thread, answer, _ = in_background(server, asked)
        wait_until(lambda: len(answer.responses) > 3, 10.0)
        kill_worker(server, "decode")
        thread.join(timeout=60)
        assert answer.error is None and answer.text == alone


def test_a_decode_replica_takes_short_prompts_while_prefill_is_busy(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = random_prompts([200, 12] * 12)
    expected = greedy_by_transformers(tiny_llama, prompts, MAX_TOKENS, torch.float64)
    deployment = deploy(
        tiny_llama,
        prefill={"max_num_batched_tokens": 16},  # each long prompt takes thirteen batches
        decode={"local_prefill_tokens": 16, "max_local_prompt_len": 16},
    )
    with TritonServer(deployment, log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        requests = [{"input_ids": prompt, **GREEDY, "return_perf_metrics": True} for prompt in prompts]
        answers = run_streams(server.grpc_url, requests, len(requests))
        wait_until(lambda: blocks_in_use(read_metrics(server.metrics_url)) == 0, 5.0)
    assert [answer.output_ids for answer in answers] == expected
    at = [int(answer.responses[-1]["prefill_worker"][0]) for answer in answers]
    assert set(at[0::2]) == {0}, "long prompts are computed by the prefill replica"
    assert -1 in at[1::2], "no short prompt was computed by the decode replica"
