"""Ranks meet in memory that all of them map: processes in a file each, or two streams of one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.all_reduce import BUFFER_BYTES, MAX_BYTES, all_reduce

MAX_POLLS = 10_000_000

# Each call has another size, dtype and values, which every rank knows of all; one rank in three is late.
INTERPRETED_RANK = """
import random, sys, time
import torch
from kernels import backend
from kernels.all_reduce import BUFFER_BYTES, all_reduce

backend.interpret = True
torch.set_num_threads(1)
folder, rank, num_ranks, num_calls = sys.argv[1], *map(int, sys.argv[2:])
memory = [torch.from_file(f"{folder}/{each}", True, BUFFER_BYTES, dtype=torch.uint8) for each in range(num_ranks)]
buffers = torch.tensor([each.data_ptr() for each in memory])
same, own = random.Random(0), random.Random(rank)
for call in range(num_calls):
    size, dtype = same.choice([1, 30, 64, 4096, 4097, 9000]), same.choice([torch.float16, torch.float32])
    torch.manual_seed(call)
    parts = [torch.randn(size).to(dtype) for _ in range(num_ranks)]
    total = torch.zeros(size)
    for part in parts:
        total += part.float()
    if own.random() < 1 / 3:
        time.sleep(own.random() / 100)
    x = parts[rank]
    all_reduce(x, buffers, int(buffers[rank]), max_polls=1_000_000)
    assert torch.equal(x, total.to(dtype)), (call, size, dtype)
print("done", flush=True)
"""
LONELY_RANK = """
import torch
from kernels.all_reduce import BUFFER_BYTES, all_reduce

memory = torch.zeros(2, BUFFER_BYTES, dtype=torch.uint8, device="cuda")
buffers = torch.tensor([each.data_ptr() for each in memory], device="cuda")
all_reduce(torch.ones(4, device="cuda"), buffers, memory[1].data_ptr(), max_polls=1000)
torch.cuda.synchronize()
"""


def test_three_processes_get_the_same_sums_call_after_call(tmp_path: Path) -> None:
    num_ranks = 3
    for rank in range(num_ranks):
        with (tmp_path / str(rank)).open("wb") as file:
            file.truncate(BUFFER_BYTES)

    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", INTERPRETED_RANK, str(tmp_path), str(rank), str(num_ranks), "40"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})

    ranks = [start(rank) for rank in range(num_ranks)]
    try:
        assert [rank.communicate(timeout=250)[0] for rank in ranks] == ["done\n"] * num_ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.gpu
def test_a_rank_that_does_not_come_ends_who_waits_for_it() -> None:
    done = subprocess.run([sys.executable, "-c", LONELY_RANK], capture_output=True, text=True, timeout=120)
    assert done.returncode
    assert "all-reduce: a rank has not come" in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 5120, 32 * 5120, MAX_BYTES // 4])
def test_two_streams_of_a_gpu_are_two_ranks_in_graphs(size: int, dtype: torch.dtype) -> None:
    """Each replay has other numbers, so that one of an earlier call would be seen."""
    memory = torch.zeros(2, BUFFER_BYTES, dtype=torch.uint8, device="cuda")
    buffers = torch.tensor([each.data_ptr() for each in memory], device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    numbers = torch.randint(251, (2, 2, size), device="cuda")  # of each rank: its own and the other's, by rank
    numbers[1] = numbers[0]
    outputs = torch.empty(2, size, dtype=dtype, device="cuda")

    def calls_of(rank: int, buffers: torch.Tensor) -> None:
        for _ in range(3):
            numbers[rank].add_(1).remainder_(251)
            x = numbers[rank, rank].to(dtype)
            all_reduce(x, buffers, memory[rank].data_ptr(), MAX_POLLS)
            wrong[rank] += (x != numbers[rank].sum(0).to(dtype)).sum()
            outputs[rank] = x

    for rank in range(2):  # alone: what the driver loads at its first use may wait for kernels that wait
        calls_of(rank, buffers[rank : rank + 1])
    for each in (memory, wrong):
        each.zero_()
    torch.cuda.synchronize()
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            calls_of(rank, buffers)
    torch.cuda.synchronize()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph):
            calls_of(rank, buffers)
    for _ in range(1000):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]
    assert torch.equal(outputs[0], outputs[1])


def test_other_tensors_are_refused(device: str) -> None:
    buffers = torch.zeros(2, dtype=torch.int64, device=device)
    narrow = torch.zeros(4, 4, device=device)[:, :2]
    wide = torch.zeros(MAX_BYTES // 2 + 1, dtype=torch.float16, device=device)
    for x in (narrow, wide, wide[:0], torch.zeros(4, dtype=torch.float64, device=device)):
        with pytest.raises(ValueError, match="bytes of contiguous float16, bfloat16 or float32 are allowed"):
            all_reduce(x, buffers, 0, max_polls=1)
