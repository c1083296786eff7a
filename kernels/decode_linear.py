"""x W^T + b for the few rows of a decode step: the time is that of reading the weight, N * K * itemsize bytes, once.

    1 row         products added up in registers, a program per few rows of the weight
    2 to 64 rows  tl.dot with the weight's rows as its rows, the batch as its columns, padded to 16, 32 or 64

Where the weight's rows make too few programs to occupy the GPU, each tile of them is split along K over several
programs; the last of them to finish adds up their partial sums, always in the same order.

Tile sizes are those that read fastest of about ten measured per shape, with cold caches, on an H100 (fp16):

    us, cuBLAS -> this    1 row           8 rows          64 rows
    12288 x 4096          36.8 -> 34.6    38.5 -> 37.4    38.9 -> 40.2
    4096 x 4096           15.7 -> 13.2    14.2 -> 13.4    14.9 -> 14.6
    22016 x 4096          71.7 -> 59.9    72.4 -> 62.9    72.9 -> 68.1
    4096 x 11008          35.1 -> 32.8    35.8 -> 32.9    38.9 -> 34.9
    32000 x 4096          97.6 -> 86.3    100.4 -> 90.3   103.0 -> 97.3

                          32 rows         64 rows
    15360 x 5120          59.9 -> 57.0    60.5 -> 59.0
    5120 x 5120           24.1 -> 22.9    23.2 -> 25.0
    20480 x 5120          78.7 -> 77.0    80.0 -> 82.8
    5120 x 20480          81.4 -> 77.8    84.4 -> 81.6

The two with 4096 rows are split in two at 8 and 64 rows; the sum of the two was not in the time. Wider tiles in three
splits, for the 80 tiles of 5120 rows, were slower by a fifth to a third, the sum included.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton

MAX_ROWS = 64

_MULTIPROCESSORS = 132  # of an H100
_MAX_SPLITS = 4
_MAX_TILE = 128 * 64  # partial sums of one program


@triton.jit
def _one_row_kernel(
    x,  # [K]
    weight,  # [N, K], contiguous
    bias,  # [N] if HAS_BIAS
    out,  # [N]
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid [cdiv(N, BLOCK_N)]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = start + columns < K
        pointers = weight + rows[:, None].to(tl.int64) * K + (start + columns)[None, :]
        loaded = (rows < N)[:, None] & inside[None, :]
        w = tl.load(pointers, mask=loaded, other=0.0, eviction_policy="evict_first")
        values = tl.load(x + start + columns, mask=inside, other=0.0)
        acc += w.to(tl.float32) * values.to(tl.float32)[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < N)


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x,  # [M, K], rows x_stride apart
    weight,  # [N, K], contiguous
    bias,  # [N] if HAS_BIAS
    out,  # [M, N], contiguous
    partial,  # [tiles, SPLITS, BLOCK_N, BLOCK_M] fp32 if SPLITS > 1
    counters,  # [tiles] int32, 0 before and after
    x_stride,
    M,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,  # columns of a split, a multiple of BLOCK_K
    STAGES: tl.constexpr,
):
    """Grid [cdiv(N, BLOCK_N), SPLITS]."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    first, end = 0, K
    if SPLITS > 1:
        first = split * SHARE
        end = tl.minimum(first + SHARE, K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(first, end, BLOCK_K, num_stages=STAGES):
        inside = start + columns < K
        pointers = weight + rows[:, None].to(tl.int64) * K + (start + columns)[None, :]
        loaded = (rows < N)[:, None] & inside[None, :]
        w = tl.load(pointers, mask=loaded, other=0.0, eviction_policy="evict_first")
        pointers = x + batch[None, :].to(tl.int64) * x_stride + (start + columns)[:, None]
        values = tl.load(pointers, mask=inside[:, None] & (batch < M)[None, :], other=0.0)
        acc = tl.dot(w, values, acc, input_precision="ieee")

    kept = (rows < N)[:, None] & (batch < M)[None, :]
    is_last = True
    if SPLITS > 1:
        TILE: tl.constexpr = BLOCK_N * BLOCK_M
        sums = partial + tile * (SPLITS * TILE) + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + batch[None, :]
        tl.store(sums + split * TILE, acc, mask=kept)
        tl.debug_barrier()  # the atomic of one thread publishes the stores of all
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(sums + i * TILE, mask=kept, other=0.0, cache_modifier=".cg")
            tl.store(counters + tile, 0)
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        pointers = out + batch[None, :].to(tl.int64) * N + rows[:, None]
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=kept)


class _Tiling(NamedTuple):
    block_n: int
    block_k: int
    stages: int
    splits: int = 1


def _one_row_tiling(k: int) -> _Tiling:
    return _Tiling(4, 1024, 3) if k <= 8192 else _Tiling(2, 2048, 3)


def _few_rows_tiling(n: int, k: int) -> _Tiling:
    """A program alone on its multiprocessor reads fastest with six stages; where two a multiprocessor are one round,
    three stages let two of up to 64 rows fit.
    """
    block_n, block_k = 64, 128
    num_tiles = triton.cdiv(n, block_n)
    splits = max(min(_MULTIPROCESSORS // num_tiles, _MAX_SPLITS, triton.cdiv(k, block_k)), 1)
    two_are_one_round = _MULTIPROCESSORS < num_tiles <= 2 * _MULTIPROCESSORS
    stages = 3 if two_are_one_round else 4 if splits > 1 and k > 8192 else 6
    return _Tiling(block_n, block_k, stages, splits)


@cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums and counters. Launches that may run at the same time would need one each: all are on one stream."""
    partial = torch.empty(_MULTIPROCESSORS * _MAX_TILE, dtype=torch.float32, device=device)
    return partial, torch.zeros(_MULTIPROCESSORS, dtype=torch.int32, device=device)


def decode_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def reads_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether `decode_linear` is measured ahead of cuBLAS: on Hopper GPUs, in fp16 and bf16, for up to MAX_ROWS rows.

    Above 32 rows only where its programs come in nearly full rounds of the multiprocessors: a program is then alone
    on its multiprocessor, and a round's idle ones count. Or where K is long beside N, which cuBLAS splits.
    """
    (num_rows, k), n = x.shape, weight.shape[0]
    if not 1 <= num_rows <= MAX_ROWS or x.dtype not in (torch.float16, torch.bfloat16) or not _is_hopper(x.device):
        return False
    if num_rows <= 32:
        return True
    if k >= 4 * n:
        return True
    tiling = _few_rows_tiling(n, k)
    rounds: float = triton.cdiv(n, tiling.block_n) * tiling.splits / _MULTIPROCESSORS
    return rounds / math.ceil(rounds) >= 0.85


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major == 9


def decode_linear(
    x: Tensor,  # [M, K], 1 <= M <= MAX_ROWS, any row stride; fp16 or bf16
    weight: Tensor,  # [N, K], contiguous
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [M, N]
    """The rows of `x` times the transposed weight, plus the bias, summed in fp32. All launches are on one stream.

    The first launch on a device takes a workspace: it must not be in a CUDA graph's capture.
    """
    (num_rows, k), n = x.shape, weight.shape[0]
    if not uses_triton(x) or x.dtype == torch.float32:
        return decode_linear_reference(x, weight, bias)
    if not (1 <= num_rows <= MAX_ROWS and weight.is_contiguous()):
        raise ValueError(f"1 to {MAX_ROWS} rows and a contiguous weight, not {num_rows} and {weight.stride()}")
    if x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty(num_rows, n)
    has_bias = bias is not None
    if num_rows == 1:
        tiling = _one_row_tiling(k)
        _one_row_kernel[(triton.cdiv(n, tiling.block_n),)](
            x,
            weight,
            bias,
            out,
            n,
            K=k,
            HAS_BIAS=has_bias,
            BLOCK_N=tiling.block_n,
            BLOCK_K=min(tiling.block_k, triton.next_power_of_2(k)),
            STAGES=tiling.stages,
            num_warps=4,
        )
        return out
    tiling = _few_rows_tiling(n, k)
    num_tiles = triton.cdiv(n, tiling.block_n)
    partial, counters = _workspace(x.device)
    _few_rows_kernel[(num_tiles, tiling.splits)](
        x,
        weight,
        bias,
        out,
        partial,
        counters,
        x.stride(0),
        num_rows,
        n,
        K=k,
        HAS_BIAS=has_bias,
        BLOCK_M=max(triton.next_power_of_2(num_rows), 16),
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        SPLITS=tiling.splits,
        SHARE=triton.cdiv(triton.cdiv(k, tiling.block_k), tiling.splits) * tiling.block_k,
        STAGES=tiling.stages,
        num_warps=4,
    )
    return out
