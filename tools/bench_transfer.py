"""Measures the hand-off's copy between two processes: our gather kernel over a CUDA IPC mapping, beside a plain copy.

    python -m tools.bench_transfer --source cuda:0 --target cuda:1 --output docs/results/transfer.json

One process holds a KV pool and exports it as a prefill worker does; this one maps it and pulls blocks as a decode
worker does. The ceiling is a contiguous copy of as many bytes out of the same mapping, by turns in the same run.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ensemble.cache.kv_pool import KVLayout, KVPool, map_peer_pool
from ensemble.workers.messages import decode_pool_handle
from kernels.block_copy import copy_blocks
from tools.results import write_results

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
EXPORTER = """
import sys, torch
from ensemble.cache.kv_pool import KVPool
from ensemble.workers.messages import encode
from tools.bench_transfer import LAYOUTS, POOL_BYTES
device = torch.device(sys.argv[2]); torch.cuda.set_device(device)
layout = LAYOUTS[sys.argv[1]]
pool = KVPool(layout, POOL_BYTES // layout.block_bytes, device)
pool.tensor.normal_(); torch.cuda.synchronize()
sys.stdout.buffer.write(encode(pool.export()).hex().encode() + b"\\n"); sys.stdout.flush()
sys.stdin.read()
"""


def seconds(copy: Any) -> float:
    """Time of one copy on the GPU, the mean of REPEATS in a row."""
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    for _ in range(REPEATS):
        copy()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3 / REPEATS


def measure(name: str, layout: KVLayout, source: str, target: str) -> list[dict[str, Any]]:
    exporter = subprocess.Popen(
        [sys.executable, "-c", EXPORTER, name, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert exporter.stdout is not None
        handle = decode_pool_handle(bytes.fromhex(exporter.stdout.readline().decode()))
        device = torch.device(target)
        local = KVPool(layout, handle.shape[0], device).tensor
        # The mapping ends with the call, before the exporter does.
        return measure_pulls(name, layout, map_peer_pool(handle, device), local)
    finally:
        exporter.communicate()


def measure_pulls(name: str, layout: KVLayout, remote: torch.Tensor, local: torch.Tensor) -> list[dict[str, Any]]:
    """One row a size. `remote`, `local`  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]"""
    device, num_blocks = local.device, remote.shape[0]
    rows = []
    for num_bytes in SIZES:
        count = num_bytes // layout.block_bytes
        if not 0 < count <= num_blocks // 2:
            continue
        source_ids = torch.randperm(num_blocks, device=device)[:count]
        target_ids = torch.randperm(num_blocks, device=device)[:count]

        def gather(source_ids: torch.Tensor = source_ids, target_ids: torch.Tensor = target_ids) -> None:
            copy_blocks(remote, local, source_ids, target_ids)

        def contiguous(count: int = count) -> None:
            local[:count].copy_(remote[:count])

        gather()
        if not torch.equal(local[target_ids], remote[source_ids].clone()):
            raise RuntimeError(f"{name}: gathered blocks differ from their source")
        contiguous()
        times: dict[str, list[float]] = {"gather": [], "contiguous": []}
        for _ in range(ROUNDS):
            times["gather"].append(seconds(gather))
            times["contiguous"].append(seconds(contiguous))
        moved = count * layout.block_bytes
        rate = {kind: moved / median(each) / 1e9 for kind, each in times.items()}
        ratio = rate["gather"] / rate["contiguous"]
        has_goal = num_bytes == GOAL_BYTES and layout.block_bytes >= GOAL_BLOCK_BYTES
        rows.append(
            {
                "name": f"{name} ({layout.block_bytes >> 10} KiB): pull of {count}, {moved >> 20} MiB",
                "value": round(ratio, 3),
                "unit": "of a contiguous copy",
                "goal": GOAL if has_goal else None,
                "met": ratio >= GOAL if has_goal else None,
                "gather_GBps": round(rate["gather"], 1),
                "contiguous_GBps": round(rate["contiguous"], 1),
                "gather_us": round(median(times["gather"]) * 1e6, 1),
            }
        )
    return rows


def main(
    source: Annotated[str, typer.Option(help="device of the exporting process")] = "cuda:0",
    target: Annotated[str, typer.Option(help="device of the importing process")] = "cuda:1",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Prints and writes the rates."""
    torch.cuda.set_device(torch.device(target))
    rows = [row for name, layout in LAYOUTS.items() for row in measure(name, layout, source, target)]
    console = Console(width=150)
    for row in rows:
        rates = f"{row['gather_GBps']:7.1f} of {row['contiguous_GBps']:7.1f} GB/s"
        console.print(f"{row['name']:85} {rates}  {row['value']:.3f}", highlight=False)
    if output is not None:
        write_results(output, rows)


if __name__ == "__main__":
    typer.run(main)
