"""Measures the hand-off's copy between two processes over a CUDA IPC mapping, and what it costs the steps beside it.

    python -m tools.benchmarks.transfer --source cuda:0 --target cuda:1 --output docs/results/transfer.json

One process holds a KV pool and exports it as a prefill worker does; this one maps it and pulls blocks as a decode
worker does, by copy engine or by kernel as they lie: scattered, or in a row. The ceiling is a contiguous copy of as
many bytes out of the same mapping, by turns in the same run. Then decode steps of a model with dummy weights, without
pulls and with one under way all the time, by turns.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from ensemble.cache.kv_pool import KVLayout, map_peer_pool
from ensemble.protocol.replica_replica import decode_pool_handle
from ensemble.transfer import puller as pulls
from ensemble.transfer.puller import Pull, Puller, mapped_source
from tools.benchmarks.results import report
from tools.benchmarks.steps_beside import PROMPT_LEN, make_bench, step_rows

POOL_BYTES = 2 << 30
SIZES = (16 << 20, 128 << 20, 512 << 20)
GOAL, GOAL_BYTES, GOAL_BLOCK_BYTES = 0.92, 128 << 20, 2 << 20
ROUNDS, REPEATS = 4, 10
LAYOUTS = {  # fp16; the number of tokens in a block is the last but one
    "LLaMA-2-7B, blocks of 64 tokens": KVLayout(32, 32, 64, 128, torch.float16),
    "LLaMA-2-7B, blocks of 16 tokens": KVLayout(32, 32, 16, 128, torch.float16),
    "8 KV heads, 32 layers, blocks of 16 tokens": KVLayout(32, 8, 16, 128, torch.float16),
    "SmolLM2-135M, blocks of 64 tokens": KVLayout(30, 3, 64, 64, torch.float16),
}
STEPS_LAYOUT = "LLaMA-2-7B, blocks of 64 tokens"
EXPORTER = """
import sys, torch
from ensemble.cache.kv_pool import KVPool
from ensemble.protocol.replica_replica import encode
from tools.benchmarks.transfer import LAYOUTS, POOL_BYTES
device = torch.device(sys.argv[2]); torch.cuda.set_device(device)
layout = LAYOUTS[sys.argv[1]]
pool = KVPool(layout, POOL_BYTES // layout.block_bytes, device)
pool.tensor.normal_(); torch.cuda.synchronize()
sys.stdout.buffer.write(encode(pool.export()).hex().encode() + b"\\n"); sys.stdout.flush()
sys.stdin.read()
"""


@contextmanager
def peer_pool(name: str, source: str, target: torch.device) -> Iterator[torch.Tensor]:
    """A pool of another process. What is yielded must not be held for longer: the mapping has to end first."""
    exporter = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, name, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert exporter.stdout is not None
        yield map_peer_pool(decode_pool_handle(bytes.fromhex(exporter.stdout.readline().decode())), target)
    finally:
        exporter.communicate()


def rate_rows(name: str, layout: KVLayout, remote: torch.Tensor) -> Iterator[dict[str, Any]]:
    """For each size, with blocks that are scattered over both pools, and in a row in both."""
    device = torch.device("cuda", torch.cuda.current_device())
    local = torch.zeros_like(remote)
    num_blocks = len(remote)
    puller = Puller(local)
    for num_bytes in SIZES:
        count = num_bytes // layout.block_bytes
        if not 0 < count <= num_blocks // 2:
            continue
        start = num_blocks // 3
        ids = {
            "scattered": (random.sample(range(num_blocks), count), random.sample(range(num_blocks), count)),
            "in a row": (list(range(start, start + count)), list(range(count))),
        }
        times: dict[str, list[float]] = {"contiguous": [], **{lie: [] for lie in ids}}
        for _ in range(ROUNDS):
            times["contiguous"] += seconds_of_copies(local[:count], remote[start : start + count])
            for lie, (source_ids, target_ids) in ids.items():
                local.zero_()
                torch.cuda.synchronize(device)
                times[lie] += seconds_of_pulls(puller, Pull(0, mapped_source(remote), source_ids, target_ids))
                if not torch.equal(local[target_ids], remote[source_ids].clone()):
                    raise RuntimeError(f"{name}: pulled blocks differ from their source")
        moved = count * layout.block_bytes
        rate = {kind: moved / median(each) / 1e9 for kind, each in times.items()}
        has_goal = num_bytes == GOAL_BYTES and layout.block_bytes >= GOAL_BLOCK_BYTES
        for lie in ids:
            ratio = rate[lie] / rate["contiguous"]
            yield {
                "name": f"{name} ({layout.block_bytes >> 10} KiB): pull of {count} {lie}, {moved >> 20} MiB",
                "value": round(ratio, 3),
                "unit": "of a contiguous copy",
                "goal": GOAL if has_goal else None,
                "met": ratio >= GOAL if has_goal else None,
                "pull_GBps": round(rate[lie], 1),
                "contiguous_GBps": round(rate["contiguous"], 1),
                "pull_us": round(median(times[lie]) * 1e6, 1),
            }


def seconds_of_copies(target: torch.Tensor, source: torch.Tensor) -> list[float]:
    """Of each of REPEATS in a row, on the GPU."""
    events = []
    for _ in range(REPEATS):
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        target.copy_(source)
        events[-1][1].record()
    torch.cuda.synchronize()
    return [float(began.elapsed_time(ended)) / 1e3 for began, ended in events]


def seconds_of_pulls(puller: Puller, pull: Pull) -> list[float]:
    """Of each of REPEATS in a row, on the GPU."""
    for _ in range(REPEATS):
        puller.start(replace(pull))
    done: list[Pull] = []
    while puller.num_in_flight:
        puller.wait(1.0)
        done += puller.completed()
    return [each.seconds for each in done]


class PullChurn:
    """One pull after the other of a prompt's blocks, scattered over both pools, three of them started ahead."""

    def __init__(self, puller: Puller, remote: torch.Tensor, block_ids: list[int], num_blocks: int) -> None:
        self._puller, self._remote, self._block_ids, self._pull_blocks = puller, remote, block_ids, num_blocks
        self.num_blocks = 0
        self.go_on()

    def go_on(self) -> None:
        self.num_blocks += len(self._puller.completed()) * self._pull_blocks
        while self._puller.num_in_flight < 3:
            source_ids = random.sample(range(len(self._remote)), self._pull_blocks)
            target_ids = random.sample(self._block_ids, self._pull_blocks)
            self._puller.start(Pull(0, mapped_source(self._remote), source_ids, target_ids))

    def end(self) -> None:
        while self._puller.num_in_flight:
            self._puller.wait(1.0)
            self._puller.completed()


def rows_of_steps(source: str) -> Iterator[dict[str, Any]]:
    """Pulls by the copy engine, as this layout's are, and by the kernel."""
    device = torch.device("cuda", torch.cuda.current_device())
    with peer_pool(STEPS_LAYOUT, source, device) as remote:
        bench = make_bench()  # takes all the memory that is left
        pool, num_blocks = bench.runner.kv_pool, bench.blocks_for(PROMPT_LEN)
        for by, threshold in {"copy engine": 0, "kernel": 1 << 60}.items():
            pulls.COPY_ENGINE_RUN_BYTES = threshold
            copy = partial(PullChurn, Puller(pool), remote, num_blocks=num_blocks)
            yield from step_rows(bench, f"pulls by {by}", copy)
            del copy
        del remote


def main(
    source: Annotated[str, typer.Option(help="device of the exporting process")] = "cuda:0",
    target: Annotated[str, typer.Option(help="device of the importing process")] = "cuda:1",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Exit status 1 if a goal is missed."""
    random.seed(0)
    torch.cuda.set_device(torch.device(target))
    rows: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        with peer_pool(name, source, torch.device(target)) as remote:
            rows += rate_rows(name, layout, remote)
            del remote
        torch.cuda.empty_cache()
    rows += rows_of_steps(source)
    report(rows, output)


if __name__ == "__main__":
    typer.run(main)
