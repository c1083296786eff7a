"""The default model, in fp32, through the whole server: equal to transformers and to the offline engine."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ensemble.engine.engine import load_engine
from ensemble.request import Request, SamplingParams
from ensemble.tokenizer import Tokenizer
from tests.serving.clients import StreamClient, generate
from tests.serving.deployments import deploy
from tests.serving.oracle import GreedyJudge
from tools import offline
from tools.client import generate_stream
from tools.server.triton_server import TritonServer

pytestmark = pytest.mark.server

MAX_TOKENS = 32
SENTENCES = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "Der schnelle braune Fuchs",
    "El agua es",
    '{"name": "Ada", "born": ',
    "今日は",
    "🙂🙂🙂",
    "1, 2, 4, 8, 16,",
    "Dear Sir or Madam,\n\n",
]
ESSAY = "The history of the bicycle is longer than most people think, and it begins with a volcano. "


@pytest.fixture(scope="module")
def server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    deployment = deploy(
        smollm2_dir,
        model={"dtype": "auto"},
        prefill={"kv_cache_bytes": 1 << 30, "max_num_batched_tokens": 512},
        decode={"kv_cache_bytes": 1 << 30},
    )
    with TritonServer(deployment, log_path=tmp_path_factory.mktemp("smollm2") / "log") as server:
        server.wait_ready(timeout_s=200)
        yield server


def make_prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Twenty prompts of 1 to 1,100 tokens: of one step, of two, and of three."""
    essay = tokenizer.encode(ESSAY * 100)
    lengths = [1, 2, 15, 16, 17, 127, 350, 600, 1100]
    return [tokenizer.encode(sentence) for sentence in SENTENCES] + [essay[:length] for length in lengths]


@pytest.mark.timeout(900)
def test_twenty_prompts_in_flight_together(server: TritonServer, smollm2_dir: Path) -> None:
    prompts = make_prompts(Tokenizer.from_dir(smollm2_dir))
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
    answers = client.wait(timeout_s=280)
    client.close()
    served = [answers[str(index)].output_ids for index in range(len(prompts))]
    assert [len(output) for output in served] == [MAX_TOKENS] * len(prompts)

    judge = GreedyJudge(smollm2_dir)
    deployment = server.deployment
    engine = load_engine(deployment, deployment.decode, torch.device("cpu"))
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [
        Request(request_id=index, prompt_token_ids=prompt, sampling=sampling) for index, prompt in enumerate(prompts)
    ]
    alone = offline.generate(engine, requests)
    for index, prompt in enumerate(prompts):
        assert judge.first_fault(prompt, served[index]) is None, f"server, prompt {index}"
        if (by_engine := alone[index].output_token_ids) != served[index]:  # at a near tie
            assert judge.first_fault(prompt, by_engine) is None, f"offline, prompt {index}"


def test_the_client_keeps_the_conversation(server: TritonServer) -> None:
    command = [sys.executable, "-m", "tools.client", "--url", server.http_url, "--max-tokens", "16"]
    asked = ["My name is Ada. Say hello.", "What is my name?"]
    result = subprocess.run(command, input="\n".join(asked), capture_output=True, text=True, timeout=120, check=True)
    first, second, _ = result.stdout.removeprefix("> ").split("\n> ")
    messages = [
        {"role": "user", "content": asked[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": asked[1]},
    ]
    answer = generate_stream(server.http_url, messages=json.dumps(messages), max_tokens=16, temperature=0)
    assert second == "".join(outputs["text_output"] for outputs in answer)
    assert second != first


@pytest.mark.parametrize("model", ["scheduler", "ensemble"])
def test_capital_of_france(server: TritonServer, model: str) -> None:
    answer = generate(
        server.grpc_url, model, text_input="The capital of France is", max_tokens=8, temperature=0.0, stream=True
    )
    assert "Paris" in answer.text


def test_messages_are_the_same_as_json_and_as_a_string(server: TritonServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France? 🙂"}]
    asked = {"max_tokens": 8, "temperature": 0.0}
    expected = generate(server.grpc_url, "ensemble", messages=json.dumps(messages), **asked).text
    body = json.dumps({"messages": messages, **asked}).encode()
    with urllib.request.urlopen(f"{server.http_url}/v2/models/ensemble/generate", body, timeout=60) as response:
        assert json.load(response)["text_output"] == expected
    assert expected
