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
from ensemble.parallel.group import join
from ensemble.request import Request, SamplingParams
from tools.offline import generate

path, kind, dtype, rank, tp, pp = *sys.argv[1:4], *map(int, sys.argv[4:7])
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
group = join(store, rank, tp, pp, device)
devices = [str(device)] * tp * pp
stage = {"devices": devices, "tp": tp, "pp": pp, "kv_cache_bytes": 8 << 20, "max_num_seqs": 8, "num_threads": 1}
deployment = Deployment.parse(
    {"model": {"path": path, "dtype": dtype}, "prefill": stage, "decode": stage, "block_size": 16}
)
engine = load_engine(deployment, deployment.decode, device, group)
sampling = SamplingParams(max_tokens=int(sys.argv[7]), temperature=0, ignore_eos=True)
requests = [Request(request_id=i, prompt_token_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts)]
done = generate(engine, requests, max_num_batched_tokens=32)
print(json.dumps([done[i].output_token_ids for i in range(len(prompts))]), flush=True)
group.smallest(0)  # no rank goes while another may still need it
os._exit(0)  # as a worker: NCCL's destructors wait for graphs that are still there
"""


def run_ranks(
    path: Path, kind: str, dtype: str, degrees: tuple[int, int], prompts: list[list[int]]
) -> tuple[list[list[list[int]]], str]:
    """Each rank's outputs, and what all have said on stderr. degrees: tp, pp"""
    size = degrees[0] * degrees[1]

    def start(rank: int) -> subprocess.Popen[str]:
        arguments = [str(path), kind, dtype, *map(str, (rank, *degrees, NUM_OUTPUT_TOKENS))]
        command = [sys.executable, "-c", RANK, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    ranks = [start(rank) for rank in range(size)]
    try:
        first = ranks[0].stdout
        assert first is not None
        port, asked = first.readline(), json.dumps(prompts) + "\n"
        outputs: list[Any] = []
        errors = ""
        for rank, process in enumerate(ranks):
            assert process.stdin is not None
            process.stdin.write(asked if rank == 0 else port + asked)
            process.stdin.flush()
        for process in ranks:
            said, error = process.communicate(timeout=120)
            errors += error
            assert process.returncode == 0, errors
            outputs.append(json.loads(said))
        return outputs, errors
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_two_processes_give_transformers_tokens(tmp_path):
    path = make_tiny_llama(tmp_path)
    prompts = random_prompts(384)
    outputs, _ = run_ranks(path, "cpu", "float64", (2, 1), prompts)
    assert outputs == [transformers_greedy(path, prompts, NUM_OUTPUT_TOKENS)] * 2


@pytest.mark.multigpu
@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)], ids=["tp", "pp"])
def test_two_gpus_give_transformers_tokens_with_nccl_in_or_between_their_graphs(degrees, tmp_path):
    """In float32, to the first token where the two best are closer than 1e-3; every rank the same to the end.

    Without a warning of torch that a communicator is made, or shared.
    """
    path = make_tiny_llama(tmp_path, hidden_size=256)
    prompts = random_prompts(384)
    expected = transformers_greedy(path, prompts, NUM_OUTPUT_TOKENS)
    (first, second), errors = run_ranks(path, "cuda", "float32", degrees, prompts)
    assert not [line for line in errors.splitlines() if "warn" in line.lower() and "P2P" in line]
    assert first == second
    certain = [certain_length(path, prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    assert sum(certain) > NUM_OUTPUT_TOKENS * len(prompts) / 2
    for output, tokens, length in zip(first, expected, certain, strict=True):
        assert output[:length] == tokens[:length]
