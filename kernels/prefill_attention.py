"""Causal attention of a batch of prompts (or chunks of prompts) over the paged KV pool.

    context      |<---- cached prefix ---->|<-- new tokens, the queries -->|
    query i sees positions [0, context_len - query_len + i], or the last `window` of them

Keys and values of the new tokens are in the pool already.
FLOPs: 4 * Hq * D * sum(query_len * (prefix + query_len / 2)).

A tile of 64 keys lies in one block if the block size is a multiple of 64, and is then loaded by the tensor memory
accelerator; smaller blocks are gathered row by row, which costs a tenth of the speed.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton

_FEW_ROWS = 2 * 132 * 128  # of which tiles of 128 make less than two programs per multiprocessor of an H100


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
    context_len,
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
    if not IS_TILED:
        next_ids = tl.load(block_table + columns // BLOCK_SIZE, mask=columns < context_len, other=0)
    for tile in range(start, end, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        if IS_TILED:
            row = tl.load(block_table + tile // BLOCK_SIZE) * block_stride + tile % BLOCK_SIZE
            k = kv.load([row + k_start, 0])
        else:
            block_ids = next_ids.to(tl.int64)
            ahead = columns + BLOCK_N  # a tile early, so that no load waits for its address
            next_ids = tl.load(block_table + ahead // BLOCK_SIZE, mask=ahead < context_len, other=0)
            inside = (dims < D)[None, :]
            if MASKED:
                inside = inside & (columns < context_len)[:, None]
            offsets = (block_ids * block_stride + columns % BLOCK_SIZE * D)[:, None] + dims[None, :]
            k = tl.load(kv + k_start + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            is_visible = columns[None, :] <= last_visible[:, None]
            if HAS_WINDOW:
                is_visible = is_visible & (columns[None, :] > last_visible[:, None] - window)
            scores = tl.where(is_visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        if HAS_WINDOW:  # a row may see nothing of its first tiles
            new_max = tl.maximum(new_max, -1e30)
        probs = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(probs, 1)
        if IS_TILED:
            v = kv.load([row + v_start, 0])
            if MASKED:  # unused slots may hold NaN, and 0 * NaN is NaN
                v = tl.where((columns < context_len)[:, None], v, 0.0)
        else:
            v = tl.load(kv + v_start + offsets, mask=inside, other=0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["block_tables_stride", "num_seqs", "num_blocks", "window"])
def _prefill_attention_kernel(
    q,  # [T, Hq, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    block_tables,  # [S, max_blocks] int32
    cu_seqlens_q,  # [S + 1] int32
    context_lens,  # [S] int32
    out,  # [T, Hq, D], contiguous
    q_stride,
    block_stride,
    block_tables_stride,
    num_seqs,
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
    """Grid [Hkv, T // BLOCK_Q + S]: at least one program per BLOCK_Q queries of a sequence and KV head.

    A program's rows are its queries times the query heads of its KV head. Blocks of sequence s are numbered from
    cu_seqlens_q[s] // BLOCK_Q + s, which leaves room for all of them whatever the lengths; the last ones, with the
    most keys to read, start first.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)

    seq = 0
    after = num_seqs
    while after - seq > 1:
        middle = (seq + after) // 2
        is_before = tl.load(cu_seqlens_q + middle) // BLOCK_Q + middle <= index
        seq = tl.where(is_before, middle, seq)
        after = tl.where(is_before, after, middle)
    query_start = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - query_start
    first_query = (index - query_start // BLOCK_Q - seq) * BLOCK_Q
    if first_query >= query_len:
        return

    context_len = tl.load(context_lens + seq)
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP
    dims = tl.arange(0, BLOCK_D)
    is_row = (queries < query_len) & (rows < BLOCK_Q * GROUP)
    inside = is_row[:, None] & (dims < D)[None, :]
    heads = kv_head * GROUP + rows % GROUP
    tokens = (query_start + queries).to(tl.int64)
    q_rows = tl.load(q + (tokens * q_stride + heads * D)[:, None] + dims[None, :], mask=inside, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    first_position = context_len - query_len + first_query
    end = tl.minimum(first_position + BLOCK_Q, context_len)
    end_of_full_tiles = (first_position + 1) // BLOCK_N * BLOCK_N
    last_visible = tl.minimum(context_len - query_len + queries, context_len - 1)
    if IS_TILED:
        row_stride = block_stride // D
        num_rows = (num_blocks - 1) * row_stride + 2 * NUM_KV_HEADS * BLOCK_SIZE
        kv = tl.make_tensor_descriptor(kv_cache, [num_rows, D], [D, 1], [BLOCK_N, BLOCK_D])
        k_start = kv_head * BLOCK_SIZE
        v_start = k_start + NUM_KV_HEADS * BLOCK_SIZE
        block_stride = row_stride
    else:
        kv = kv_cache
        k_start = kv_head * (BLOCK_SIZE * D)
        v_start = k_start + NUM_KV_HEADS * BLOCK_SIZE * D
    block_table = block_tables + seq * block_tables_stride
    start_of_full_tiles = 0
    # fmt: off
    if HAS_WINDOW:  # from the first query's first position to where the last query sees all
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
        start_of_full_tiles = tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N
        start_of_full_tiles = tl.maximum(tl.minimum(start_of_full_tiles, end_of_full_tiles), start)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table, start,
            start_of_full_tiles, context_len, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, IS_TILED,
            HAS_WINDOW, MASKED=True,
        )
        end_of_full_tiles = tl.maximum(end_of_full_tiles, start_of_full_tiles)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table, start_of_full_tiles,
        end_of_full_tiles, context_len, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, IS_TILED,
        HAS_WINDOW, MASKED=False,
    )
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q_rows, last_visible, window, kv, k_start, v_start, block_table, end_of_full_tiles, end,
        context_len, block_stride, scale_log2, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, IS_TILED, HAS_WINDOW, MASKED=True,
    )
    # fmt: on
    pointers = out + (tokens * (NUM_KV_HEADS * GROUP) + heads)[:, None] * D + dims[None, :]
    tl.store(pointers, (acc / row_sum[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
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


def _tile(dtype: torch.dtype, block_size: int, max_rows: int, all_rows: int) -> tuple[int, int, int, bool]:
    """(BLOCK_M, BLOCK_N, num_warps, IS_TILED), as measured on an H100.

    `max_rows` are the packed rows of the longest sequence, `all_rows` those of the batch and of all KV heads.
    """
    if dtype == torch.float32:
        return 32, 32, 4, False
    is_tiled = block_size % 64 == 0
    if max_rows <= 64 or all_rows <= _FEW_ROWS:
        return 64, 64, 4, is_tiled
    return 128, 64, 4 if is_tiled else 8, is_tiled


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory in which the kernel puts its descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def prefill_attention(
    q: Tensor,  # [T, Hq, D], any row stride, heads side by side
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [S, max_blocks] int32; entries beyond a context are not read
    cu_seqlens_q: Tensor,  # [S + 1] int32
    context_lens: Tensor,  # [S] int32, total lengths, the new tokens included
    max_seqlen_q: int,
    scale: float,
    window: int | None = None,  # how many tokens a query sees, its own included; None: all before it
) -> Tensor:  # [T, Hq, D]
    """Causal attention of the new tokens over everything before them. Hq is a multiple of Hkv; S is at least 1."""
    if not uses_triton(q):
        return prefill_attention_reference(
            q, kv_cache, block_tables, cu_seqlens_q, context_lens, max_seqlen_q, scale, window
        )
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_cache.shape[2:4]
    group = num_heads // num_kv_heads
    block_m, block_n, num_warps, is_tiled = _tile(q.dtype, block_size, max_seqlen_q * group, num_tokens * num_heads)
    block_m = max(block_m, triton.next_power_of_2(group))
    num_seqs = len(context_lens)
    out = q.new_empty(q.shape)
    triton.set_allocator(_allocate)
    _prefill_attention_kernel[(num_kv_heads, num_tokens // (block_m // group) + num_seqs)](
        q,
        kv_cache,
        block_tables,
        cu_seqlens_q,
        context_lens,
        out,
        q.stride(0),
        kv_cache.stride(0),
        block_tables.stride(0),
        num_seqs,
        len(kv_cache),
        window or 0,
        scale * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        IS_TILED=is_tiled,
        HAS_WINDOW=window is not None,
        num_warps=num_warps,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    return out
