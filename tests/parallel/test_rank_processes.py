"""Ranks as a server has them: a process each, meeting through a TCP store, each with an engine of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import make_tiny_llama
from tests.engine.test_model_runner import certain_length, random_prompts, transformers_greedy

NUM_OUTPUT_TOKENS = 12
RANK = """
import json, os, sys
import torch
from torch.distributed import TCPStore
from ensemble.config import Deployment
from ensemble.engine.engine import load_engine
from ensemble.parallel.group import Group
from ensemble.parallel.tensor_parallel import connect
from ensemble.request import Request, SamplingParams
from tools.offline import generate

path, kind, dtype, rank, size = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
if rank == 0:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    prompts = json.loads(sys.stdin.readline())
else:
    port, prompts = int(sys.stdin.readline()), json.loads(sys.stdin.readline())
    store = TCPStore("127.0.0.1", port, is_master=False)
device = torch.device(kind) if kind == "cpu" else torch.device(kind, rank)
if kind == "cuda":
    torch.cuda.set_device(device)
parallel = connect(store, rank, size, device)
stage = {"devices": [str(device)], "kv_cache_bytes": 8 << 20, "max_num_seqs": 8, "num_threads": 1}
deployment = Deployment.parse(
    {"model": {"path": path, "dtype": dtype}, "prefill": stage, "decode": stage, "block_size": 16}
)
engine = load_engine(deployment, deployment.decode, device, Group(parallel))
sampling = SamplingParams(max_tokens=int(sys.argv[6]), temperature=0, ignore_eos=True)
requests = [Request(request_id=i, prompt_token_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts)]
done = generate(engine, requests, max_num_batched_tokens=32)
print(json.dumps([done[i].output_token_ids for i in range(len(prompts))]), flush=True)
parallel.smallest(0)  # no rank goes while another may still need it
os._exit(0)  # as a worker: NCCL's destructors wait for graphs that are still there
"""


def run_ranks(path: Path, kind: str, dtype: str, size: int, prompts: list[list[int]]) -> list[list[list[int]]]:
    """Each rank's outputs."""

    def start(rank: int) -> subprocess.Popen[str]:
        arguments = [str(path), kind, dtype, str(rank), str(size), str(NUM_OUTPUT_TOKENS)]
        command = [sys.executable, "-c", RANK, *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(size)]
    try:
        first = ranks[0].stdout
        assert first is not None
        port, asked = first.readline(), json.dumps(prompts) + "\n"
        outputs: list[Any] = []
        for rank, process in enumerate(ranks):
            assert process.stdin is not None
            process.stdin.write(asked if rank == 0 else port + asked)
            process.stdin.flush()
        for process in ranks:
            outputs.append(json.loads(process.communicate(timeout=120)[0]))
        return outputs
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_two_processes_give_transformers_tokens(tmp_path):
    path = make_tiny_llama(tmp_path)
    prompts = random_prompts(384)
    outputs = run_ranks(path, "cpu", "float64", 2, prompts)
    assert outputs == [transformers_greedy(path, prompts, NUM_OUTPUT_TOKENS)] * 2


@pytest.mark.multigpu
def test_two_gpus_give_transformers_tokens_with_nccl_in_their_graphs(tmp_path):
    """In float32, to the first token where the two best are closer than 1e-3; every rank the same to the end."""
    path = make_tiny_llama(tmp_path, hidden_size=256)
    prompts = random_prompts(384)
    expected = transformers_greedy(path, prompts, NUM_OUTPUT_TOKENS)
    first, second = run_ranks(path, "cuda", "float32", 2, prompts)
    assert first == second
    certain = [certain_length(path, prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    assert sum(certain) > NUM_OUTPUT_TOKENS * len(prompts) / 2
    for output, tokens, length in zip(first, expected, certain, strict=True):
        assert output[:length] == tokens[:length]
