"""Times swapping on one GPU: its bandwidth beside a plain pinned copy, and what it costs the steps that it runs beside.

    python -m tools.benchmarks.swap --output docs/results/swap.json

bandwidth  a sequence's blocks, scattered over both pools, out to the host and back in, by the copy engine and by the
           kernel; the ceiling is a contiguous copy of as many bytes from or to pinned memory, by turns in the same run.
steps      decode steps of a model with dummy weights, without swapping and with a copy under way in each direction all
           the time, by turns. The host's work for the swaps is part of the step.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ensemble.cache import swapper
from ensemble.cache.block_manager import Swap
from ensemble.cache.kv_pool import KVLayout
from ensemble.cache.swapper import Swapper, Way, make_host_pool
from tools.benchmarks.results import write_results
from tools.benchmarks.steps_beside import PROMPT_LEN, layout_of, make_bench, step_rows

POOL_BYTES = 1 << 30  # of either pool: page-locking takes about a second for each GiB
SWAP_BYTES, MAX_SWAP_BLOCKS = 256 << 20, 2048  # a call for each block by the copy engine: small blocks move less
ROUNDS = 7
BANDWIDTH_GOAL = 0.92
BY = {"copy engine": 0, "kernel": 1 << 60}  # values of COPY_ENGINE_RUN_BYTES
LAYOUTS = {  # fp16; the number of tokens in a block is the last but one
    "LLaMA-2-7B, blocks of 16 tokens": KVLayout(32, 32, 16, 128, torch.float16),
    "LLaMA-2-7B, blocks of 64 tokens": KVLayout(32, 32, 64, 128, torch.float16),
    "LLaMA-2-13B, blocks of 16 tokens": KVLayout(40, 40, 16, 128, torch.float16),
    "LLaMA-2-13B, blocks of 64 tokens": KVLayout(40, 40, 64, 128, torch.float16),
    "8 KV heads, 32 layers, blocks of 16 tokens": KVLayout(32, 8, 16, 128, torch.float16),
    "SmolLM2-135M, blocks of 16 tokens": KVLayout(30, 3, 16, 64, torch.float16),
    "1 KV head, 8 layers, blocks of 16 tokens": KVLayout(8, 1, 16, 64, torch.float16),
}
DEFAULT_THRESHOLD = swapper.COPY_ENGINE_RUN_BYTES


def bandwidth_rows(name: str, layout: KVLayout) -> Iterator[dict[str, Any]]:
    device = torch.device("cuda", torch.cuda.current_device())
    num_blocks = POOL_BYTES // layout.block_bytes
    pool = torch.empty((num_blocks, *layout.block_shape), dtype=layout.dtype, device=device).normal_()
    host = make_host_pool(layout, num_blocks, device)
    host.copy_(-pool)  # so that a block that was not moved shows
    count = min(SWAP_BYTES // layout.block_bytes, MAX_SWAP_BLOCKS)
    num_bytes = count * layout.block_bytes
    plain = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    swappers = {}
    for by, threshold in BY.items():
        swapper.COPY_ENGINE_RUN_BYTES = threshold
        swappers[by] = Swapper(pool, host)
    ways: tuple[Way, Way] = ("out", "in")
    for way in ways:
        times: dict[str, list[float]] = {"plain": [], **{by: [] for by in BY}}
        for _ in range(ROUNDS):
            times["plain"].append(
                seconds_of_copy(on_device, plain) if way == "out" else seconds_of_copy(plain, on_device)
            )
            for by, swaps in swappers.items():
                ids = [random.sample(range(num_blocks), count) for _ in range(2)]
                swaps.start(Swap(0, *ids), way)
                swaps.wait(10.0)
                [done] = swaps.completed()
                times[by].append(done.seconds)
                check(pool, host, *(ids if way == "out" else reversed(ids)))
        rate = {kind: num_bytes / median(each[1:]) / 1e9 for kind, each in times.items()}
        used = "copy engine" if layout.block_bytes >= DEFAULT_THRESHOLD else "kernel"
        ratio = rate[used] / rate["plain"]
        has_goal = name.startswith("LLaMA-2")
        yield {
            "name": f"{name} ({layout.block_bytes >> 10} KiB): swap {way} of {count} by {used}",
            "value": round(ratio, 3),
            "unit": "of a plain pinned copy",
            "goal": BANDWIDTH_GOAL if has_goal else None,
            "met": ratio >= BANDWIDTH_GOAL if has_goal else None,
            "plain_GBps": round(rate["plain"], 1),
            "copy_engine_GBps": round(rate["copy engine"], 1),
            "kernel_GBps": round(rate["kernel"], 1),
        }


def seconds_of_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    target.copy_(source, non_blocking=True)
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def check(pool: torch.Tensor, host: torch.Tensor, pool_ids: list[int], host_ids: list[int]) -> None:
    """Raises unless the first and the last block of a swap are the same on both sides."""
    for index in (0, -1):
        if not torch.equal(pool[pool_ids[index]].cpu(), host[host_ids[index]]):
            raise RuntimeError("a swapped block differs from its source")


class SwapChurn:
    """A swap under way in each direction."""

    def __init__(self, swaps: Swapper, block_ids: list[int], num_blocks: int) -> None:
        self._swaps = swaps
        out, back = block_ids[:num_blocks], block_ids[num_blocks : 2 * num_blocks]
        there, here = list(range(num_blocks)), list(range(num_blocks, 2 * num_blocks))
        self._swap_of: dict[Way, Swap] = {"out": Swap(0, out, there), "in": Swap(1, here, back)}
        self.num_blocks = 0
        for way, swap in self._swap_of.items():
            swaps.start(swap, way)

    def go_on(self) -> None:
        for done in self._swaps.completed():
            self.num_blocks += done.num_blocks
            self._swaps.start(self._swap_of[done.way], done.way)

    def end(self) -> None:
        while self._swaps.num_in_flight:
            self._swaps.wait(1.0)
            self._swaps.completed()


def rows_of_steps() -> Iterator[dict[str, Any]]:
    bench = make_bench()
    pool, num_blocks = bench.runner.kv_pool, bench.blocks_for(PROMPT_LEN)
    swaps = Swapper(pool, make_host_pool(layout_of(bench), 2 * num_blocks, pool.device))
    yield from step_rows(bench, "swaps", lambda idle: SwapChurn(swaps, idle, num_blocks))


def main(
    output: Annotated[Path | None, typer.Option(help="Where to write the results as JSON.")] = None,
    steps: Annotated[bool, typer.Option(help="Time decode steps beside swaps too.")] = True,
) -> None:
    """Times swapping on the current GPU; exit status 1 if a goal is missed."""
    random.seed(0)
    console = Console(width=150, highlight=False)
    rows: list[dict[str, Any]] = []
    for name, layout in LAYOUTS.items():
        rows += bandwidth_rows(name, layout)
        torch.cuda.empty_cache()
    swapper.COPY_ENGINE_RUN_BYTES = DEFAULT_THRESHOLD
    if steps:
        rows += rows_of_steps()
    for row in rows:
        details = ", ".join(f"{key} {row[key]}" for key in row if key.endswith(("GBps", "_ms")))
        console.print(f"{row['name']:75} {row['value']:.3f} {row['unit']} (goal {row['goal']}); {details}")
    if output is not None:
        write_results(output, rows)
    if not all(row.get("met") in (None, True) for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
