"""Runs the kernels that walk tables or share memory between warps once each, tiny, for compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1        # every tensor has an allocation of its own, so that an overrun shows
    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tools.benchmarks.kernels_once
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m tools.benchmarks.kernels_once

Inputs are made, and results compared with the torch references, on the CPU: what runs on the GPU is ours, and copies.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from kernels import decode_linear as decode_linear_module
from kernels.block_copy import copy_blocks, copy_blocks_reference
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.decode_plan import decode_workspace, plan_decode
from kernels.prefill_attention import prefill_attention, prefill_attention_reference

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 4, 2, 64, 0.125
TOLERANCE = 2e-2  # fp16 beside a reference in fp16


def paged(lens: list[int], block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's pool with just the blocks that sequences of these lengths take, shuffled; their tables; the lengths."""
    counts = [-(-length // block_size) for length in lens]
    pool = torch.randn(max(1, sum(counts)), 2, NUM_KV_HEADS, block_size, HEAD_DIM).to(dtype)
    free = torch.randperm(sum(counts)).tolist()
    tables = torch.zeros(len(lens), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return pool, tables, torch.tensor(lens, dtype=torch.int32)


def decode(device: str, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With a plan, several programs for the longest, and a padding row."""
    pool, tables, lens = paged([700, 1, 33, 0], block_size, dtype)
    q = torch.randn(4, NUM_HEADS, HEAD_DIM).to(dtype)
    workspace = decode_workspace(4, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, device)
    inputs = q.to(device), pool.to(device), tables.to(device), lens.to(device)
    plan_decode(workspace, inputs[3])
    decode_attention(*inputs, SCALE, workspace)
    out = decode_attention(*inputs, SCALE, workspace)  # as the next layer does
    return out, decode_attention_reference(q, pool, tables, lens, SCALE)


def prefill(device: str, block_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A whole prompt, a chunk after a cached prefix, and a decode row, whose keys are divided among programs."""
    query_lens, lens = [130, 20, 1], [130, 70, 700]
    pool, tables, context_lens = paged(lens, block_size, dtype)
    q = torch.randn(sum(query_lens), NUM_HEADS, HEAD_DIM).to(dtype)
    starts = torch.tensor([0, 130, 150, 151], dtype=torch.int32)
    inputs = q.to(device), pool.to(device), tables.to(device), starts.to(device), context_lens.to(device)
    out = prefill_attention(*inputs, SCALE)
    return out, prefill_attention_reference(q, pool, tables, starts, context_lens, SCALE)


def linear(device: str, num_rows: int) -> tuple[Tensor, Tensor]:
    """K is split over programs, whose last one adds up."""
    x, weight, bias = torch.randn(num_rows, 1027), torch.randn(131, 1027) / 32, torch.randn(131)
    half = [each.half() for each in (x, weight, bias)]
    out = decode_linear_module.decode_linear(*[each.to(device) for each in half])
    return out, decode_linear_module.decode_linear_reference(*half)


def copy(device: str, words: int) -> tuple[Tensor, Tensor]:
    source, target = torch.randn(6, words).half(), torch.zeros(5, words).half()
    ids = torch.tensor([5, 0, 3]), torch.tensor([2, 4, 0])
    out = target.to(device)
    copy_blocks(source.to(device), out, ids[0].to(device), ids[1].to(device))
    copy_blocks_reference(source, target, *ids)
    return out, target


def main(device: Annotated[str, typer.Option(help="cpu: with Triton's interpreter, if it is on")] = "cuda") -> None:
    """Exit status 1 if a result is wrong."""
    torch.manual_seed(0)
    half, single = torch.float16, torch.float32
    cases: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "decode attention, blocks of 16": lambda: decode(device, 16, half),
        "decode attention, blocks of 64": lambda: decode(device, 64, half),
        "decode attention, fp32": lambda: decode(device, 64, single),
        "prefill attention, blocks of 16": lambda: prefill(device, 16, half),
        "prefill attention, blocks of 64": lambda: prefill(device, 64, half),
        "prefill attention, fp32": lambda: prefill(device, 64, single),
        **{f"decode linear, {rows} rows": partial(linear, device, rows) for rows in (1, 7, 33, 64)},
        "block copy, whole chunks": lambda: copy(device, 1 << 15),
        "block copy, a tail": lambda: copy(device, (1 << 14) + 3),
    }
    wrong = []
    for name, run in cases.items():
        out, expected = run()
        error = float((out.cpu().float() - expected.float()).abs().max())
        wrong += [name] if not error <= TOLERANCE else []
        print(f"{name:50} largest error {error:.2e}", flush=True)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    typer.run(main)
