"""Causal attention of a batch of prompts (or chunks of prompts) over the paged KV pool.

    context      |<---- cached prefix ---->|<-- new tokens, the queries -->|
    query i sees positions [0, context_len - query_len + i], or the last `window` of them

Keys and values of the new tokens are in the pool already. A sequence may have one query: decode rows beside chunks.
FLOPs: 4 * Hq * D * sum(query_len * (prefix + query_len / 2)).

A tile of 64 keys lies in one block if the block size is a multiple of 64, and is then loaded by the tensor memory
accelerator; smaller blocks are gathered row by row, which costs a tenth of the speed.

How queries and keys are divided among programs is planned on the device, once for all layers of a step: see
prefill_plan.py. Of the programs that share a block of queries the last to finish combines their partial results.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton
from kernels.prefill_plan import ITEM_SIZE, PrefillWorkspace, plan_prefill, prefill_workspace

_SPARE_PROGRAMS = 8 * 132  # beside one for each block of queries of the prompts; each takes every n-th item
_ITEM = tl.constexpr(ITEM_SIZE)


@triton.jit
def _attend(
    acc,  # [BLOCK_M, BLOCK_D] fp32
    row_sum,  # [BLOCK_M] fp32
    row_max,  # [BLOCK_M] fp32, in units of log2
    q,  # [BLOCK_M, BLOCK_D]
    last_visible,  # [BLOCK_M] int32, the last position each row sees
    window,  # how many positions a row sees, read if HAS_WINDOW and MASKED
    kv,  # the cache: a pointer, or with IS_TILED a descriptor of it as rows of D
    k_start,  # where the head's keys start in a block, in elements or rows
    v_start,
    block_table,  # [max_blocks] int32
    start,  # positions [start, end)
    end,
    last,  # the last position that any row sees
    block_stride,  # in elements or rows
    scale_log2,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_TILED: tl.constexpr,  # a tile of BLOCK_N keys lies in one block
    HAS_WINDOW: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees all positions
):
    """One pass of online softmax (Dao et al., 2022) over a range of positions."""
    dims = tl.arange(0, BLOCK_D)
    columns = start + tl.arange(0, BLOCK_N)
    # Block ids are loaded a tile early: a load that waits for its address costs the pipeline one of its buffers.
    if IS_TILED:
        next_id = tl.load(block_table + tl.minimum(start, last) // BLOCK_SIZE)
    else:
        next_ids = tl.load(block_table + columns // BLOCK_SIZE, mask=columns <= last, other=0)
    for tile in range(start, end, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        if IS_TILED:
            row = next_id * block_stride + tile % BLOCK_SIZE
            next_id = tl.load(block_table + tl.minimum(tile + BLOCK_N, last) // BLOCK_SIZE)
            k = kv.load([row + k_start, 0])
        else:
            block_ids = next_ids.to(tl.int64)
            ahead = columns + BLOCK_N
            next_ids = tl.load(block_table + ahead // BLOCK_SIZE, mask=ahead <= last, other=0)
            inside = (dims < D)[None, :]
            if MASKED:
                inside = inside & (columns <= last)[:, None]
            offsets = (block_ids * block_stride + columns % BLOCK_SIZE * D)[:, None] + dims[None, :]
            k = tl.load(kv + k_start + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            is_visible = columns[None, :] <= last_visible[:, None]
            if HAS_WINDOW:
                is_visible = is_visible & (columns[None, :] > last_visible[:, None] - window)
            scores = tl.where(is_visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        if IS_TILED:
            v = kv.load([row + v_start, 0])
            if MASKED:  # unused slots may hold NaN, and 0 * NaN is NaN
                v = tl.where((columns <= last)[:, None], v, 0.0)
        else:
            v = tl.load(kv + v_start + offsets, mask=inside, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _by_turns(turn, num_all, num_ones):
    """The item of a turn: one of decode rows, from the end of the list, and one of chunks, from its start, as long as
    there are both. Decode rows wait for memory, chunks for the tensor cores: side by side they share a multiprocessor.
    """
    num_pairs = tl.minimum(num_ones, num_all - num_ones)
    from_start = tl.where(turn < 2 * num_pairs, turn // 2, turn - num_pairs)
    from_end = num_all - 1 - from_start
    is_one = tl.where(turn < 2 * num_pairs, turn % 2 == 0, num_ones > num_pairs)
    return tl.where(is_one, from_end, from_start)


@triton.jit
def _combine(
    partial_lse,  # [count] of [BLOCK_M] fp32, lse_stride apart
    partial_out,  # [count] of [BLOCK_M, D] fp32, lse_stride * D apart
    lse_stride,
    count,
    pointers,  # [BLOCK_M, 1], where the rows' results start
    is_row,  # [BLOCK_M]
    BLOCK_M: tl.constexpr,
    D: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Stores the items' results weighted by their sums of exponentials, SLICE elements of a row at a time."""
    rows = tl.arange(0, BLOCK_M)
    row_max = tl.full([BLOCK_M], -1e30, tl.float32)
    for index in range(count):
        row_max = tl.maximum(row_max, tl.load(partial_lse + index * lse_stride + rows, cache_modifier=".cg"))
    for start in range(0, D, SLICE):
        dims = start + tl.arange(0, SLICE)
        acc = tl.zeros([BLOCK_M, SLICE], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for index in range(count):
            lse = tl.load(partial_lse + index * lse_stride + rows, cache_modifier=".cg")
            partial = partial_out + index * lse_stride * D + rows[:, None] * D + dims[None, :]
            weights = tl.exp2(lse - row_max)
            acc += weights[:, None] * tl.load(partial, mask=(dims < D)[None, :], other=0.0, cache_modifier=".cg")
            row_sum += weights
        acc = acc / tl.maximum(row_sum, 1e-30)[:, None]
        inside = is_row[:, None] & (dims < D)[None, :]
        tl.store(pointers + dims[None, :], acc.to(pointers.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["block_tables_stride", "num_blocks", "window"])
def _prefill_attention_kernel(
    q,  # [T, Hq, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks] int32
    items,  # [capacity, _ITEM] int32
    num_items,  # [2] int32: all, and those of sequences of one query
    out,  # [T, Hq, D], contiguous
    counters,  # [slots, Hkv] int32, 0 before and after
    partial_lse,  # [slots, Hkv, BLOCK_M] fp32, log2 of the sums of exponentials
    partial_out,  # [slots, Hkv, BLOCK_M, D] fp32
    q_stride,
    block_stride,
    block_tables_stride,
    num_blocks,
    window,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_TILED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Grid: as many programs as there may be items times KV heads, up to a limit. The rows are the queries of an item
    times the query heads of a KV head.
    """
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE if IS_TILED else BLOCK_SIZE * D
    if IS_TILED:
        row_stride = block_stride // D
        num_rows = (num_blocks - 1) * row_stride + 2 * NUM_KV_HEADS * BLOCK_SIZE
        kv = tl.make_tensor_descriptor(kv_cache, [num_rows, D], [D, 1], [BLOCK_N, BLOCK_D])
        block_stride = row_stride
    else:
        kv = kv_cache
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    num_all, num_ones = tl.load(num_items), tl.load(num_items + 1)
    for work in range(tl.program_id(0), num_all * NUM_KV_HEADS, tl.num_programs(0)):
        kv_head = work % NUM_KV_HEADS
        item = items + _by_turns(work // NUM_KV_HEADS, num_all, num_ones) * _ITEM
        seq = tl.load(item).to(tl.int64)
        first_token, num_queries, position = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
        start, end = tl.multiple_of(tl.load(item + 4), BLOCK_N), tl.load(item + 5)
        slot, split, count = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)

        is_row = rows < num_queries * GROUP
        heads = kv_head * GROUP + rows % GROUP
        tokens = (first_token + rows // GROUP).to(tl.int64)
        inside = is_row[:, None] & (dims < D)[None, :]
        q_rows = tl.load(q + (tokens * q_stride + heads * D)[:, None] + dims[None, :], mask=inside, other=0.0)

        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_max = tl.full([BLOCK_M], -1e30, tl.float32)  # finite: of divided keys a row may see none
        last = position + num_queries - 1
        last_visible = tl.minimum(position + rows // GROUP, last)
        end_of_full_tiles = tl.minimum((position + 1) // BLOCK_N * BLOCK_N, end)
        k_start = kv_head * HEAD_STRIDE
        v_start = k_start + NUM_KV_HEADS * HEAD_STRIDE
        block_table = block_tables + seq * block_tables_stride
        # fmt: off
        if HAS_WINDOW:  # from the first query's first position to where the last query sees all; nothing before it
            start = tl.maximum(start, tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N)
            start_of_full_tiles = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N
            start_of_full_tiles = tl.maximum(tl.minimum(start_of_full_tiles, end_of_full_tiles), start)
            acc, row_sum, row_max = _attend(
                acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table, start,
                start_of_full_tiles, last, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, IS_TILED,
                HAS_WINDOW, MASKED=True,
            )
            start = start_of_full_tiles
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table, start,
            end_of_full_tiles, last, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, IS_TILED, HAS_WINDOW,
            MASKED=False,
        )
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table,
            tl.maximum(end_of_full_tiles, start), end, last, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            IS_TILED, HAS_WINDOW, MASKED=True,
        )
        # fmt: on
        result = acc / tl.maximum(row_sum, 1e-30)[:, None]
        pointers = out + (tokens * (NUM_KV_HEADS * GROUP) + heads)[:, None] * D
        if count == 1:
            tl.store(pointers + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
        else:
            stride: tl.constexpr = NUM_KV_HEADS * BLOCK_M  # from slot to slot
            first = (slot - split).to(tl.int64) * stride + kv_head * BLOCK_M
            own = first + split * stride + rows
            tl.store(partial_lse + own, row_max + tl.log2(tl.maximum(row_sum, 1e-30)))
            tl.store(partial_out + own[:, None] * D + dims[None, :], result, mask=(dims < D)[None, :])
            tl.debug_barrier()  # the atomic of one thread publishes the stores of all
            counter = counters + (slot - split) * NUM_KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
                lse, partial = partial_lse + first, partial_out + first * D
                _combine(lse, partial, stride, count, pointers, is_row, BLOCK_M, D, min(BLOCK_D, 32))
                tl.store(counter, 0)


def prefill_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    out = q.new_empty(q.shape)
    block_size = kv_cache.shape[3]
    starts: list[int] = cu_seqlens_q.tolist()
    lens: list[int] = context_lens.tolist()
    for seq, (start, end, context_len) in enumerate(zip(starts[:-1], starts[1:], lens, strict=True)):
        query_len = end - start
        if query_len == 0:
            continue
        blocks = block_tables[seq, : -(-context_len // block_size)]
        k, v = (kv_cache[blocks, i].transpose(0, 1).flatten(1, 2)[None, :, :context_len] for i in (0, 1))
        has_window = window is not None and window < context_len
        is_causal = query_len == context_len and not has_window
        mask = None
        if not is_causal and (query_len > 1 or has_window):
            mask = torch.ones(query_len, context_len, dtype=torch.bool, device=q.device).tril(context_len - query_len)
        if mask is not None and window is not None:
            mask = mask.triu(context_len - query_len - window + 1)
        queries = q[start:end].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            queries, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which the kernel puts its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def prefill_attention(
    q: Tensor,  # [T, Hq, D], any row stride, heads side by side
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [S, max_blocks] int32; entries beyond a context are not read
    cu_seqlens_q: Tensor,  # [S + 1] int32
    context_lens: Tensor,  # [S] int32, total lengths, the new tokens included
    scale: float,
    workspace: PrefillWorkspace | None = None,  # with the plan for these lengths; None makes one
    window: int | None = None,  # how many tokens a query sees, its own included; None: all before it
) -> Tensor:  # [T, Hq, D]
    """Causal attention of the new tokens over everything before them. Hq is a multiple of Hkv; S is at least 1.

    Rows of tokens that belong to no sequence are left as they are in memory.
    """
    if not uses_triton(q):
        return prefill_attention_reference(q, kv_cache, block_tables, cu_seqlens_q, context_lens, scale, window)
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    if workspace is None:
        heads = num_heads, num_kv_heads, head_dim
        workspace = prefill_workspace(num_tokens, len(context_lens), *heads, q.dtype, q.device)
        plan_prefill(workspace, cu_seqlens_q, context_lens)
    is_tiled = workspace.tile == 64 and block_size % 64 == 0
    max_num_items = workspace.max_num_items(num_tokens, len(context_lens))
    num_programs = num_kv_heads * (num_tokens // workspace.block_q) + _SPARE_PROGRAMS
    out = q.new_empty(q.shape)
    triton.set_allocator(_allocate)
    _prefill_attention_kernel[(min(max_num_items * num_kv_heads, num_programs),)](
        q,
        kv_cache,
        block_tables,
        workspace.items,
        workspace.num_items,
        out,
        workspace.counters,
        workspace.partial_lse,
        workspace.partial_out,
        q.stride(0),
        kv_cache.stride(0),
        block_tables.stride(0),
        len(kv_cache),
        window or 0,
        scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=workspace.group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=workspace.rows,
        BLOCK_N=workspace.tile,
        BLOCK_D=triton.next_power_of_2(head_dim),
        IS_TILED=is_tiled,
        HAS_WINDOW=window is not None,
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    return out
