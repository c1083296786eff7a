"""Attention of one new token per sequence over the paged KV pool.

The time is that of reading the keys and values: sum(context_len) * 2 * Hkv * D * itemsize bytes. To keep a GPU busy
with few or uneven sequences, a context is split over several programs (flash decoding); of the programs of one sequence
and KV head, the last to finish combines their partial results. The grid depends on the batch size alone; how many
splits a sequence uses is decided on the device, so a captured graph serves any lengths.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton

_MAX_SPLITS = 64
_WANTED_PROGRAMS = 512  # below this the grid gets room for splits
_BUSY_PROGRAMS = 256  # of equal length that fill an H100: two on each of 132 multiprocessors


@triton.jit
def _splits(
    context_lens,  # [B] int32
    context_len,
    batch_size,
    max_splits,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BUSY_PROGRAMS: tl.constexpr,
):
    """(splits that this sequence uses, tiles in each): about BUSY_PROGRAMS equal shares of the whole batch's tokens."""
    lens = tl.zeros([128], tl.int32)
    for start in range(0, batch_size, 128):
        seqs = start + tl.arange(0, 128)
        lens += tl.load(context_lens + seqs, mask=seqs < batch_size, other=0)
    share = tl.cdiv(tl.sum(lens, 0) * NUM_KV_HEADS, BUSY_PROGRAMS * BLOCK_N)
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    num_splits = tl.minimum(tl.cdiv(num_tiles, tl.maximum(share, 1)), max_splits)
    tiles_per_split = tl.cdiv(num_tiles, tl.maximum(num_splits, 1))
    return tl.cdiv(num_tiles, tl.maximum(tiles_per_split, 1)), tiles_per_split


@triton.jit
def _combine(
    partial_out,  # [B, Hq, max_splits, D] fp32
    partial_lse,  # [B, Hq, max_splits] fp32
    first_row,  # index of the group's first row in [B, Hq]
    num_splits,
    max_splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The splits' results weighted by their sums of exponentials, [BLOCK_G, BLOCK_D]."""
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    row_max = tl.full([BLOCK_G], -1e30, tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        used = (group < GROUP)[:, None] & (splits < num_splits)[None, :]
        rows = (first_row + group)[:, None] * max_splits + splits[None, :]
        lse = tl.load(partial_lse + rows, mask=used, other=float("-inf"), cache_modifier=".cg")
        pointers = partial_out + rows[:, :, None] * D + dims[None, None, :]
        inside = used[:, :, None] & (dims < D)[None, None, :]
        partial = tl.load(pointers, mask=inside, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(lse, 1))
        weights = tl.exp2(lse - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        acc = acc * rescale[:, None] + tl.sum(partial * weights[:, :, None], 1)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        row_max = new_max
    return acc / tl.maximum(row_sum, 1e-30)[:, None]


@triton.jit(do_not_specialize=["block_tables_stride", "batch_size"])
def _decode_attention_kernel(
    q,  # [B, Hq, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_tables,  # [B, max_blocks] int32
    context_lens,  # [B] int32
    out,  # [B, Hq, D], contiguous
    counters,  # [B, Hkv] int32, 0 before and after
    partial_lse,  # [B, Hq, max_splits] fp32, log2 of the sums of exponentials
    partial_out,  # [B, Hq, max_splits, D] fp32
    q_stride,
    block_stride,
    block_tables_stride,
    batch_size,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BUSY_PROGRAMS: tl.constexpr,
):
    """Grid [Hkv, B, max_splits]. A program's rows are the query heads of its KV head, padded to what tl.dot takes."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    max_splits = tl.num_programs(2)
    context_len = tl.load(context_lens + seq)
    num_splits, tiles_per_split = _splits(
        context_lens, context_len, batch_size, max_splits, NUM_KV_HEADS, BLOCK_N, BUSY_PROGRAMS
    )
    if (split >= num_splits) & (split > 0):
        return

    start = split * tiles_per_split * BLOCK_N
    end = tl.minimum(start + tiles_per_split * BLOCK_N, context_len)
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

    first_row = seq * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
    if num_splits <= 1:
        tl.store(out + (first_row + rows)[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
    else:
        partial_rows = (first_row + rows) * max_splits + split
        tl.store(partial_out + partial_rows[:, None] * D + dims[None, :], result, mask=inside)
        tl.store(partial_lse + partial_rows, row_max + tl.log2(row_sum), mask=rows < GROUP)
        tl.debug_barrier()  # the atomic of one thread publishes the stores of all
        counter = counters + seq * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1:
            combined = _combine(
                partial_out, partial_lse, first_row, num_splits, max_splits, GROUP, D, BLOCK_G, BLOCK_S, BLOCK_D
            )
            group = tl.arange(0, BLOCK_G)
            pointers = out + (first_row + group)[:, None] * D + dims[None, :]
            kept = (group < GROUP)[:, None] & (dims < D)[None, :]
            tl.store(pointers, combined.to(out.dtype.element_ty), mask=kept)
            tl.store(counter, 0)


def decode_attention_reference(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """Rows of like length, to a factor of two, are padded to the longest of them: padding all to one would move and
    multiply mostly padding where one context is long."""
    rows_by_size: dict[int, list[int]] = {}
    for row, context_len in enumerate(context_lens.tolist()):
        rows_by_size.setdefault(context_len.bit_length(), []).append(row)
    if len(rows_by_size) == 1:
        return _padded_decode_attention(q, kv_cache, block_tables, context_lens, scale)
    out = torch.empty_like(q)
    for rows in rows_by_size.values():
        ids = torch.tensor(rows, device=q.device)
        out[ids] = _padded_decode_attention(q[ids], kv_cache, block_tables[ids], context_lens[ids], scale)
    return out


def _padded_decode_attention(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    block_size = kv_cache.shape[3]
    max_context_len = int(context_lens.max())
    num_blocks = -(-max_context_len // block_size)
    if num_blocks == 0:
        return torch.zeros_like(q)
    in_use = torch.arange(num_blocks, device=q.device) * block_size < context_lens[:, None]
    block_ids = torch.where(in_use, block_tables[:, :num_blocks], 0)
    # Gathered with the heads in front, so that one copy makes each head's context contiguous.
    heads_first = kv_cache.permute(1, 2, 0, 3, 4)  # [2, num_kv_heads, num_blocks, block_size, head_dim]
    k, v = (heads_first[i][:, block_ids].flatten(2, 3)[:, :, :max_context_len] for i in (0, 1))
    mask = None
    if int(context_lens.min()) < max_context_len:
        mask = torch.arange(max_context_len, device=q.device) < context_lens[:, None]
        for each in (k, v):  # unused slots may hold NaN, and 0 * NaN is NaN
            each.masked_fill_(~mask[None, :, :, None], 0)
        mask = mask[:, None, None]
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
    if mask is not None:
        out = out.masked_fill((context_lens == 0)[:, None, None], 0)
    return out


def _max_splits(batch_size: int, num_kv_heads: int) -> int:
    """Splits per sequence and KV head that the grid has room for: a power of two."""
    if batch_size * num_kv_heads >= _WANTED_PROGRAMS:
        return 1
    wanted = triton.cdiv(_WANTED_PROGRAMS, batch_size * num_kv_heads)
    return min(int(triton.next_power_of_2(wanted)), _MAX_SPLITS)


def _workspace_sizes(batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int) -> list[int]:
    """Elements of the counters, the sums and the partial outputs."""
    num_rows = batch_size * num_heads * _max_splits(batch_size, num_kv_heads)
    return [batch_size * num_kv_heads, num_rows, num_rows * head_dim]


def decode_workspace(
    max_batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> Tensor:
    """Room for the partial results of any batch of up to `max_batch_size`: fp32, one dimension.

    Launches that may run at the same time need a workspace each.
    """
    batch_sizes = range(1, max_batch_size + 1)
    sizes = [_workspace_sizes(batch_size, num_heads, num_kv_heads, head_dim) for batch_size in batch_sizes]
    num_counters = sizes[-1][0]
    return torch.zeros(num_counters + max(sum(rest) for _, *rest in sizes), dtype=torch.float32, device=device)


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
    block_g = triton.next_power_of_2(group)
    if workspace is None:
        workspace = decode_workspace(batch_size, num_heads, num_kv_heads, head_dim, q.device)
    num_counters, num_rows, _ = _workspace_sizes(batch_size, num_heads, num_kv_heads, head_dim)
    out = q.new_empty(q.shape)
    _decode_attention_kernel[(num_kv_heads, batch_size, _max_splits(batch_size, num_kv_heads))](
        q,
        kv_cache,
        block_tables,
        context_lens,
        out,
        workspace[:num_counters].view(torch.int32),
        workspace[-num_rows:],
        workspace[-num_rows * (head_dim + 1) :],
        q.stride(0),
        kv_cache.stride(0),
        block_tables.stride(0),
        batch_size,
        scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=max(block_g, 16),
        BLOCK_N=32 if q.dtype == torch.float32 else 64,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_G=block_g,
        BLOCK_S=max(64 // block_g, 1),
        BUSY_PROGRAMS=_BUSY_PROGRAMS,
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    return out
