"""The all-reduce of few rows over the memory of all ranks: on GPUs, a process for each; who uses it, on a CPU."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from ensemble.parallel import one_shot
from ensemble.parallel.one_shot import OneShot, map_buffers

CPU = torch.device("cpu")
RANK = """
import json, random, sys
import torch
from torch.distributed import FileStore
from ensemble.parallel.tensor_parallel import connect

path, rank, size = sys.argv[1], *map(int, sys.argv[2:])
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
parallel = connect(FileStore(path, size), rank, size, device, timeout_s=30.0)
assert parallel.one_shot is not None
same, own = random.Random(0), random.Random(rank)
wrong, digest = torch.zeros(2, dtype=torch.int64, device=device)
worst = torch.zeros((), dtype=torch.float64, device=device)

def take(x, parts):
    total = torch.zeros_like(x, dtype=torch.float32)
    for part in parts:
        total += part.float()
    digest.mul_(31).add_(x.float().view(torch.int32).sum())
    wrong.add_((x != total.to(x.dtype)).sum())
    exact = parts.double().sum(0)
    worst.copy_(torch.maximum(worst, ((x.double() - exact).abs() / torch.finfo(x.dtype).eps).max()))

# As fast as each rank can, but for delays; some are not in one shot.
for call in range(3000):
    dtype = same.choice([torch.float16, torch.bfloat16, torch.float32])
    is_large = call % 500 == 0
    num_bytes = 8 << 20 if is_large else same.choice([4, 36, 10240, 8192, 16388, 327680, 64 * (65536 // size)])
    torch.manual_seed(call)
    parts = torch.randn(size, num_bytes // dtype.itemsize, device=device).to(dtype)
    x = parts[rank].clone()
    if own.random() < 0.1:
        torch.cuda._sleep(own.randrange(2_000_000))
    assert parallel.one_shot.takes(x) != is_large
    parallel.all_reduce(x)
    if is_large:
        torch.testing.assert_close(x.float(), parts.float().sum(0), atol=0.1, rtol=0.1)
    else:
        take(x, parts)

# In a graph each replay has other numbers, so that those of an earlier call would be seen.
numbers = torch.randint(251, (size, 32 * 5120), device=device)

def step():
    for rows in (32, 1, 8, 32):
        numbers.add_(1).remainder_(251)
        parts = numbers[:, : rows * 5120].half()
        x = parts[rank].clone()
        parallel.all_reduce(x)
        take(x, parts)

step()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    step()
for _ in range(1000):
    if own.random() < 0.1:
        torch.cuda._sleep(own.randrange(2_000_000))
    graph.replay()
print(json.dumps([int(wrong), float(worst), int(digest)]), flush=True)
parallel.smallest(0)  # no rank goes while another may still need it
"""


@pytest.mark.multigpu
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_gpus_get_the_same_bits_call_after_call_and_in_graphs(size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")

    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), str(size)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(size)]
    try:
        results = [json.loads(rank.communicate(timeout=240)[0]) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    wrong, worst, _ = results[0]
    assert results == [results[0]] * size
    assert wrong == 0
    assert worst < 64  # of the dtype's epsilon: sums below 32 are rounded once, in float32 each of seven


def meet(monkeypatch: pytest.MonkeyPatch, refusing: int | None) -> list[OneShot | None]:
    """What three ranks have, of which one maps nobody's memory. They are threads, and have each other's anyway."""
    buffers: dict[str, torch.Tensor] = {}
    found: dict[int, OneShot | None] = {}
    monkeypatch.setattr(one_shot, "_uuid", lambda index: threading.current_thread().name)

    def export(buffer: torch.Tensor) -> None:
        buffers[threading.current_thread().name] = buffer

    def find(offer: one_shot._Offer, device: torch.device) -> torch.Tensor:
        if threading.current_thread().name == str(refusing):
            raise RuntimeError(f"there is no NVLink to GPU {offer.device}")
        return buffers[offer.device]

    monkeypatch.setattr(one_shot, "export_cuda", export)
    monkeypatch.setattr(one_shot, "_map", find)
    store = HashStore()

    def run(rank: int) -> None:
        found[rank] = map_buffers(store, rank, 3, CPU, timeout_s=20.0)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(3)]


def test_ranks_that_map_each_other_know_all_buffers_by_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [each for each in meet(monkeypatch, refusing=None) if each is not None]
    assert [each.rank for each in ranks] == [0, 1, 2]
    for each in ranks:
        assert each.addresses.tolist() == ranks[0].addresses.tolist()
        assert each.addresses.tolist() == [buffer.data_ptr() for buffer in each.buffers]
    assert len(set(ranks[0].addresses.tolist())) == 3


def test_no_rank_uses_it_where_one_cannot_and_the_first_says_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert meet(monkeypatch, refusing=1) == [None] * 3
    said = capfd.readouterr().err
    assert said.count("distserve: every all-reduce is NCCL's") == 1
    assert "rank 1 does not map the memory of rank 2: there is no NVLink to GPU 2" in said


def test_it_takes_what_is_small_and_whole() -> None:
    three = OneShot([torch.empty(0)] * 3, torch.zeros(3, dtype=torch.int64), 0, 1)
    rows = (4 << 20) // 3 // 2 // 64
    assert three.takes(torch.empty(rows, 64, dtype=torch.float16))
    assert not three.takes(torch.empty(rows + 1, 64, dtype=torch.float16))
    assert not three.takes(torch.empty(0, 64, dtype=torch.float16))
    assert not three.takes(torch.empty(64, 64, dtype=torch.float16)[:, :32])
    assert not three.takes(torch.empty(4, 64, dtype=torch.float64))
