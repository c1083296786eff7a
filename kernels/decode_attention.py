"""Attention of one new token per sequence over the paged KV pool.

The time is that of reading the keys and values: sum(context_len) * 2 * Hkv * D * itemsize bytes. To keep a GPU busy
with few sequences, a context is split over several programs (flash decoding), whose partial results a second kernel
combines. The grid depends on the batch size alone; how many of its splits a sequence uses is decided on the device from
the context length, so a captured graph serves any lengths.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton

_MAX_SPLITS = 64
_NUM_PROGRAMS = 1024  # wanted: about eight per multiprocessor of an H100


@triton.jit
def _tiles_per_split(context_len, BLOCK_N: tl.constexpr, MIN_TILES: tl.constexpr, SPLITS: tl.constexpr):
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    return tl.maximum(tl.cdiv(num_tiles, SPLITS), MIN_TILES)


@triton.jit(do_not_specialize=["block_tables_stride"])
def _decode_attention_kernel(
    q,  # [B, Hq, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_tables,  # [B, max_blocks] int32
    context_lens,  # [B] int32
    out,  # [B, Hq, D], contiguous; with splits fp32 [B, Hq, SPLITS, D]
    partial_lse,  # [B, Hq, SPLITS] fp32, log2 of the sums of exponentials
    q_stride,
    block_stride,
    block_tables_stride,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid [SPLITS, Hkv, B]. A program's rows are the query heads of its KV head, padded to what tl.dot takes."""
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens + seq)
    length = _tiles_per_split(context_len, BLOCK_N, MIN_TILES, SPLITS) * BLOCK_N
    start = split * length
    end = tl.minimum(start + length, context_len)
    if (start >= end) & (split > 0):
        return

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    inside = (rows < GROUP)[:, None] & (dims < D)[None, :]
    q_rows = tl.load(q + seq * q_stride + heads[:, None] * D + dims[None, :], mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    k_cache = kv_cache + kv_head * (BLOCK_SIZE * D)
    v_cache = k_cache + NUM_KV_HEADS * BLOCK_SIZE * D
    block_table = block_tables + seq * block_tables_stride
    for tile in range(start, end, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        is_used = columns < end
        block_ids = tl.load(block_table + columns // BLOCK_SIZE, mask=is_used, other=0).to(tl.int64)
        offsets = (block_ids * block_stride + columns % BLOCK_SIZE * D)[:, None] + dims[None, :]
        loaded = is_used[:, None] & (dims < D)[None, :]
        k = tl.load(k_cache + offsets, mask=loaded, other=0.0)
        scores = tl.dot(q_rows, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_used[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probs = tl.exp2(scores - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        v = tl.load(v_cache + offsets, mask=loaded, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max

    result = acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]
    row = (seq * (NUM_KV_HEADS * GROUP) + heads) * SPLITS + split
    tl.store(out + row[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(partial_lse + row, row_max + tl.log2(row_sum), mask=rows < GROUP)


@triton.jit
def _combine_kernel(
    partial_out,  # [B, Hq, SPLITS, D] fp32
    partial_lse,  # [B, Hq, SPLITS] fp32
    context_lens,  # [B] int32
    out,  # [B, Hq, D], contiguous
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid [Hq, B]."""
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    context_len = tl.load(context_lens + tl.program_id(1))
    length = _tiles_per_split(context_len, BLOCK_N, MIN_TILES, SPLITS) * BLOCK_N
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    is_used = splits * length < context_len
    lse = tl.load(partial_lse + row * SPLITS + splits, mask=is_used, other=float("-inf"))
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    inside = is_used[:, None] & (dims < D)[None, :]
    partial = tl.load(partial_out + (row * SPLITS + splits)[:, None] * D + dims[None, :], mask=inside, other=0.0)
    result = tl.sum(partial * weights[:, None], 0) / tl.maximum(tl.sum(weights, 0), 1e-30)
    tl.store(out + row * D + dims, result.to(out.dtype.element_ty), mask=dims < D)


def decode_attention_reference(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    block_size = kv_cache.shape[3]
    max_context_len = int(context_lens.max())
    num_blocks = -(-max_context_len // block_size)
    if num_blocks == 0:
        return torch.zeros_like(q)
    in_use = torch.arange(num_blocks, device=q.device) * block_size < context_lens[:, None]
    block_ids = torch.where(in_use, block_tables[:, :num_blocks], 0)
    k, v = (kv_cache[block_ids, i].transpose(1, 2).flatten(2, 3)[:, :, :max_context_len] for i in (0, 1))
    mask = None
    if int(context_lens.min()) < max_context_len:
        mask = (torch.arange(max_context_len, device=q.device) < context_lens[:, None])[:, None, None]
        v = v.masked_fill(~mask.transpose(2, 3), 0)  # unused slots may hold NaN, and 0 * NaN is NaN
        k = k.masked_fill(~mask.transpose(2, 3), 0)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
    if mask is not None:
        out = out.masked_fill((context_lens == 0)[:, None, None], 0)
    return out


def _tile(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(BLOCK_N, MIN_TILES, num_warps, num_stages), as measured on an H100."""
    return (32, 4, 4, 2) if dtype == torch.float32 else (64, 2, 4, 3)


def _num_splits(batch_size: int, num_kv_heads: int) -> int:
    """Splits per sequence and KV head that the grid has room for: a power of two."""
    wanted = triton.cdiv(_NUM_PROGRAMS, batch_size * num_kv_heads)
    return min(int(triton.next_power_of_2(wanted)), _MAX_SPLITS)


def decode_workspace(
    max_batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> Tensor:
    """Room for the partial results of any batch of up to `max_batch_size`: fp32, one dimension."""
    batch_sizes = range(1, max_batch_size + 1)
    rows = max(batch_size * _num_splits(batch_size, num_kv_heads) for batch_size in batch_sizes) * num_heads
    return torch.empty(rows * (head_dim + 1), dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor,  # [B, Hq, D], any row stride, heads side by side
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [B, max_blocks] int32; entries beyond a context are not read
    context_lens: Tensor,  # [B] int32, the new token included; 0 marks a padding row, whose output is 0
    scale: float,
    workspace: Tensor | None = None,  # of decode_workspace, for a CUDA graph; None allocates one
) -> Tensor:  # [B, Hq, D]
    """Attention of each sequence's newest token over its whole context. Hq is a multiple of Hkv."""
    if not uses_triton(q):
        return decode_attention_reference(q, kv_cache, block_tables, context_lens, scale)
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    group = num_heads // num_kv_heads
    splits = _num_splits(batch_size, num_kv_heads)
    block_n, min_tiles, num_warps, num_stages = _tile(q.dtype)
    block_d = triton.next_power_of_2(head_dim)
    out = q.new_empty(q.shape)
    partial_out = partial_lse = out
    if splits > 1:
        if workspace is None:
            workspace = decode_workspace(batch_size, num_heads, num_kv_heads, head_dim, q.device)
        num_rows = batch_size * num_heads * splits
        partial_out, partial_lse = workspace[: num_rows * head_dim], workspace[num_rows * head_dim :]
    _decode_attention_kernel[(splits, num_kv_heads, batch_size)](
        q,
        kv_cache,
        block_tables,
        context_lens,
        partial_out,
        partial_lse,
        q.stride(0),
        kv_cache.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=max(triton.next_power_of_2(group), 16),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        MIN_TILES=min_tiles,
        SPLITS=splits,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    if splits > 1:
        _combine_kernel[(num_heads, batch_size)](
            partial_out,
            partial_lse,
            context_lens,
            out,
            D=head_dim,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            MIN_TILES=min_tiles,
            SPLITS=splits,
        )
    return out
