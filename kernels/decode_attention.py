"""Attention of one new token per sequence over the paged KV pool.

The time is that of reading the keys and values: sum(context_len) * 2 * Hkv * D * itemsize bytes. To keep a GPU busy
with few or uneven sequences, long contexts are split over several programs (flash decoding); of the programs of one
sequence and KV head, the last to finish combines their partial results.

How contexts are split is planned on the device, once for all layers of a step: see decode_plan.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton
from kernels.decode_plan import ITEM_SIZE, DecodeWorkspace, decode_workspace, list_length, plan_decode

_ITEM = tl.constexpr(ITEM_SIZE)


@triton.jit
def _combine(
    partial_out,  # [num_items, Hq, D] fp32
    partial_lse,  # [num_items, Hq] fp32
    first_item,
    count,
    first_head,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The items' results weighted by their sums of exponentials, [BLOCK_G, BLOCK_D]."""
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    row_max = tl.full([BLOCK_G], -1e30, tl.float32)
    for start in range(0, count, BLOCK_S):
        index = start + tl.arange(0, BLOCK_S)
        used = (group < GROUP)[:, None] & (index < count)[None, :]
        rows = (first_item + index)[None, :] * NUM_HEADS + (first_head + group)[:, None]
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


@triton.jit(do_not_specialize=["block_tables_stride", "window"])
def _decode_attention_kernel(
    q,  # [B, Hq, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_tables,  # [B, max_blocks] int32
    context_lens,  # [B] int32, read if HAS_WINDOW
    items,  # [num_items, _ITEM] int32
    out,  # [B, Hq, D], contiguous
    counters,  # [B, Hkv] int32, 0 before and after
    partial_lse,  # [num_items, Hq] fp32, log2 of the sums of exponentials
    partial_out,  # [num_items, Hq, D] fp32
    q_stride,
    block_stride,
    block_tables_stride,
    window,
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
    HAS_WINDOW: tl.constexpr,
):
    """Grid [Hkv, num_items]. A program's rows are the query heads of its KV head, padded to what tl.dot takes."""
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    item_fields = items + item * _ITEM
    seq = tl.load(item_fields).to(tl.int64)
    if seq < 0:
        return
    start, end = tl.multiple_of(tl.load(item_fields + 1), BLOCK_N), tl.load(item_fields + 2)
    first_item, count = tl.load(item_fields + 3), tl.load(item_fields + 4)
    first_visible = 0
    if HAS_WINDOW:  # an item before the window has nothing to do
        first_visible = tl.load(context_lens + seq) - window
        start = tl.maximum(start, tl.maximum(first_visible, 0) // BLOCK_N * BLOCK_N)

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
        if HAS_WINDOW:
            is_used = is_used & (columns >= first_visible)
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

    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    if count == 1:
        pointers = out + (seq * NUM_HEADS + heads)[:, None] * D + dims[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
    else:
        partial_rows = item * NUM_HEADS + heads
        tl.store(partial_out + partial_rows[:, None] * D + dims[None, :], result, mask=inside)
        tl.store(partial_lse + partial_rows, row_max + tl.log2(row_sum), mask=rows < GROUP)
        tl.debug_barrier()  # the atomic of one thread publishes the stores of all
        counter = counters + seq * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
            first_head = kv_head * GROUP
            combined = _combine(
                partial_out, partial_lse, first_item, count, first_head, NUM_HEADS, GROUP, D, BLOCK_G, BLOCK_S, BLOCK_D
            )
            group = tl.arange(0, BLOCK_G)
            pointers = out + (seq * NUM_HEADS + first_head + group)[:, None] * D + dims[None, :]
            kept = (group < GROUP)[:, None] & (dims < D)[None, :]
            tl.store(pointers, combined.to(out.dtype.element_ty), mask=kept)
            tl.store(counter, 0)


def decode_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Rows of like length, to a factor of two, are padded to the longest of them: padding all to one would move and
    multiply mostly padding where one context is long."""
    rows_by_size: dict[int, list[int]] = {}
    for row, context_len in enumerate(context_lens.tolist()):
        rows_by_size.setdefault(context_len.bit_length(), []).append(row)
    if len(rows_by_size) == 1:
        return _padded_decode_attention(q, kv_cache, block_tables, context_lens, scale, window)
    out = torch.empty_like(q)
    for rows in rows_by_size.values():
        ids = torch.tensor(rows, device=q.device)
        out[ids] = _padded_decode_attention(q[ids], kv_cache, block_tables[ids], context_lens[ids], scale, window)
    return out


def _padded_decode_attention(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float, window: int | None
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
    has_window = window is not None and window < max_context_len
    if int(context_lens.min()) < max_context_len or has_window:
        positions = torch.arange(max_context_len, device=q.device)
        mask = positions < context_lens[:, None]
        if window is not None:
            mask &= positions >= context_lens[:, None] - window
        for each in (k, v):  # unused slots may hold NaN, and 0 * NaN is NaN
            each.masked_fill_(~mask[None, :, :, None], 0)
        mask = mask[:, None, None]
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
    if mask is not None:
        out = out.masked_fill((context_lens == 0)[:, None, None], 0)
    return out


def decode_attention(
    q: Tensor,  # [B, Hq, D], any row stride, heads side by side
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [B, max_blocks] int32; entries beyond a context are not read
    context_lens: Tensor,  # [B] int32, the new token included; 0 marks a padding row, whose output is 0
    scale: float,
    workspace: DecodeWorkspace | None = None,  # with the plan for these context_lens; None makes one
    window: int | None = None,  # how many tokens the newest sees, itself included; None: all
) -> Tensor:  # [B, Hq, D]
    """Attention of each sequence's newest token over its context. Hq is a multiple of Hkv."""
    if not uses_triton(q):
        return decode_attention_reference(q, kv_cache, block_tables, context_lens, scale, window)
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    group = num_heads // num_kv_heads
    block_g = triton.next_power_of_2(group)
    if workspace is None:
        workspace = decode_workspace(batch_size, num_heads, num_kv_heads, head_dim, q.device)
        plan_decode(workspace, context_lens)
    out = q.new_empty(q.shape)
    _decode_attention_kernel[(num_kv_heads, list_length(batch_size, num_kv_heads))](
        q,
        kv_cache,
        block_tables,
        context_lens,
        workspace.items,
        out,
        workspace.counters,
        workspace.partial_lse,
        workspace.partial_out,
        q.stride(0),
        kv_cache.stride(0),
        block_tables.stride(0),
        window or 0,
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
        HAS_WINDOW=window is not None,
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    return out
