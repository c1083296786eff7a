"""The whole server, both stages, says what transformers says."""

import random
from pathlib import Path

import pytest
import torch

from ensemble.engine.engine import load_engine
from ensemble.request import Request, SamplingParams
from tests.checkpoints import make_tiny_llama, make_tiny_opt
from tests.serving.clients import StreamClient
from tests.serving.deployments import deploy
from tests.serving.oracle import greedy_by_transformers
from tools.offline import generate
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

MAX_TOKENS = 24
MODELS = {
    "llama-gqa": lambda path: make_tiny_llama(path),
    "opt": lambda path: make_tiny_opt(path),
}


def random_prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(3, 380) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_in_float64_equals_transformers(name: str, tmp_path: Path) -> None:
    path = MODELS[name](tmp_path / "model")
    prompts = random_prompts([1, 2, 15, 16, 17, 31, 33, 64, 100, 200])
    expected = greedy_by_transformers(path, prompts, MAX_TOKENS, torch.float64)
    # a budget below the longest prompts, so that they are prefilled in chunks
    with TritonServer(deploy(path, prefill={"max_num_batched_tokens": 64}), log_path=tmp_path / "log") as server:
        server.wait_ready(timeout_s=120)
        client = StreamClient(server.grpc_url)
        for index, prompt in enumerate(prompts):
            client.send(
                "scheduler",
                str(index),
                input_ids=prompt,
                max_tokens=MAX_TOKENS,
                temperature=0.0,
                ignore_eos=True,
                stream=True,
                return_output_ids=True,
            )
        answers = client.wait()
        client.close()
    assert [answers[str(index)].output_ids for index in range(len(prompts))] == expected


def test_sampled_tokens_equal_those_of_the_offline_engine(tiny_server: TritonServer) -> None:
    prompts = random_prompts([1, 7, 40, 90])
    settings = [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.5)]
    requests = [
        Request(
            request_id=index,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=MAX_TOKENS, temperature=temperature, top_k=top_k, top_p=top_p, seed=2**63 + index
            ),
        )
        for index, (prompt, (temperature, top_k, top_p)) in enumerate(zip(prompts, settings, strict=True))
    ]
    deployment = tiny_server.deployment
    alone = generate(load_engine(deployment, deployment.decode, torch.device("cpu")), requests)
    client = StreamClient(tiny_server.grpc_url)
    for request in requests:
        sampling = request.sampling
        client.send(
            "scheduler",
            str(request.request_id),
            input_ids=request.prompt_token_ids,
            max_tokens=MAX_TOKENS,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            return_output_ids=True,
        )
    answers = client.wait()
    client.close()
    for request_id, sequence in alone.items():
        assert answers[str(request_id)].output_ids == sequence.output_token_ids
