"""How the attention of a step with prompts is divided among programs: planned on the device, once for all its layers.

    queries of a sequence   |<- BLOCK_Q ->|<- BLOCK_Q ->|..|     a block of queries sees the keys up to its last one
    keys of a block         |<-- share -->|<-- share -->|..|     an item: one block of queries, one share of its keys

Keys are divided only where whole blocks of queries would be too few, or too long, to occupy the GPU evenly: a chunk
after a long prefix, or a decode row, which is a sequence of one query. Items of the same keys lie side by side, so that
what one reads from memory the others find in the L2 cache. The list is on the device, so that a captured graph serves
any lengths; a program takes every n-th of it.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

ITEM_SIZE = 16  # int32 per item, nine of them used

_SHARES = 132  # of a step's key tiles, over all KV heads: one for each multiprocessor of an H100
_MIN_SHARE = 4  # tiles: what a smaller share gains, its start and end cost
_ITEM = tl.constexpr(ITEM_SIZE)


@triton.jit
def _blocks(query_lens, context_lens, BLOCK_Q: tl.constexpr, TILE: tl.constexpr):
    """(blocks of queries of each sequence, mean tiles of keys of a block)"""
    first_lens = context_lens - tl.maximum(query_lens - BLOCK_Q, 0)  # keys of the first block
    return tl.cdiv(query_lens, BLOCK_Q), tl.cdiv(first_lens + context_lens, 2 * TILE)


@triton.jit(do_not_specialize=["num_seqs", "num_kv_heads"])
def _plan_kernel(
    cu_seqlens_q,  # [S + 1] int32
    context_lens,  # [S] int32
    items,  # [capacity, _ITEM] int32
    num_items,  # [2] int32
    num_seqs,
    num_kv_heads,
    SHARES: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [S]: each program writes the items of its sequence, share by share, those of the last queries first."""
    seq = tl.program_id(0)
    tiles = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_seqs, BLOCK):
        seqs = start + tl.arange(0, BLOCK)
        is_seq = seqs < num_seqs
        lens = tl.load(context_lens + seqs, mask=is_seq, other=0)
        starts = tl.load(cu_seqlens_q + seqs, mask=is_seq, other=0)
        query_lens = tl.load(cu_seqlens_q + seqs + 1, mask=is_seq, other=0) - starts
        blocks, mean_tiles = _blocks(query_lens, lens, BLOCK_Q, TILE)
        tiles += blocks * mean_tiles
    share = tl.maximum(tl.cdiv(tl.sum(tiles, 0) * num_kv_heads, SHARES), MIN_SHARE)

    before = tl.zeros([BLOCK], tl.int32)
    divided_before = tl.zeros([BLOCK], tl.int32)
    ones_before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, seq, BLOCK):
        seqs = start + tl.arange(0, BLOCK)
        is_before = seqs < seq
        lens = tl.load(context_lens + seqs, mask=is_before, other=0)
        starts = tl.load(cu_seqlens_q + seqs, mask=is_before, other=0)
        query_lens = tl.load(cu_seqlens_q + seqs + 1, mask=is_before, other=0) - starts
        blocks, mean_tiles = _blocks(query_lens, lens, BLOCK_Q, TILE)
        splits = tl.maximum(tl.cdiv(mean_tiles, share), 1)
        before += blocks * splits
        divided_before += tl.where(splits > 1, blocks * splits, 0)
        ones_before += tl.where(query_lens == 1, splits, 0)
    first_item, first_slot = tl.sum(before, 0), tl.sum(divided_before, 0)

    query_start = tl.load(cu_seqlens_q + seq)
    query_len = tl.load(cu_seqlens_q + seq + 1) - query_start
    context_len = tl.load(context_lens + seq)
    num_blocks, mean_tiles = _blocks(query_len, context_len, BLOCK_Q, TILE)
    num_splits = tl.maximum(tl.cdiv(mean_tiles, share), 1)
    count = num_blocks * num_splits
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        is_item = index < count
        split = index // num_blocks
        first_query = (num_blocks - 1 - index % num_blocks) * BLOCK_Q
        num_queries = tl.minimum(query_len - first_query, BLOCK_Q)
        position = context_len - query_len + first_query
        end = position + num_queries
        length = tl.cdiv(tl.cdiv(end, TILE), num_splits) * TILE
        pointers = items + (first_item + index) * _ITEM
        tl.store(pointers, seq, mask=is_item)
        tl.store(pointers + 1, query_start + first_query, mask=is_item)
        tl.store(pointers + 2, num_queries, mask=is_item)
        tl.store(pointers + 3, position, mask=is_item)
        tl.store(pointers + 4, tl.minimum(split * length, end), mask=is_item)
        tl.store(pointers + 5, tl.minimum(split * length + length, end), mask=is_item)
        tl.store(pointers + 6, first_slot + index % num_blocks * num_splits + split, mask=is_item)
        tl.store(pointers + 7, split, mask=is_item)
        tl.store(pointers + 8, num_splits, mask=is_item)
    if seq == num_seqs - 1:
        tl.store(num_items, first_item + count)
        tl.store(num_items + 1, tl.sum(ones_before, 0) + tl.where(query_len == 1, count, 0))


@dataclass(frozen=True, slots=True)
class PrefillWorkspace:
    """A step's plan, and room for partial results. Launches that may run at the same time need one each."""

    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype
    items: Tensor  # [capacity, ITEM_SIZE] int32: sequence, first token, number of queries, position of the first query,
    # first key, end of the keys, slot of its partial result, index and number of the items that share its queries
    num_items: Tensor  # [2] int32: all, and those of sequences of one query
    counters: Tensor  # [slots, Hkv] int32, 0 between launches
    partial_lse: Tensor  # [slots, Hkv, rows] fp32
    partial_out: Tensor  # [slots, Hkv, rows, D] fp32

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tile(self) -> int:
        """Keys that a program reads at a time."""
        return 32 if self.dtype == torch.float32 else 64

    @property
    def rows(self) -> int:
        """Of a program: queries times the query heads of a KV head."""
        return max(32 if self.dtype == torch.float32 else 64, int(triton.next_power_of_2(self.group)))

    @property
    def block_q(self) -> int:
        """Queries of an item, at most."""
        return self.rows // self.group

    def max_num_items(self, num_tokens: int, num_seqs: int) -> int:
        """Of a step, whatever its lengths: one for each block of queries, the last of each sequence not full, and more
        where keys are divided.
        """
        return num_tokens // self.block_q + num_seqs + len(self.counters)


def prefill_workspace(
    max_num_tokens: int,
    max_num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PrefillWorkspace:
    """A workspace for steps of up to so many tokens and sequences."""
    num_slots = 2 * _SHARES // num_kv_heads + 1  # shares of what is divided are at least half full
    empty = PrefillWorkspace(num_heads, num_kv_heads, dtype, *[torch.empty(0)] * 5)
    capacity = max_num_tokens // empty.block_q + max_num_seqs + num_slots
    fp32, int32 = torch.float32, torch.int32
    return replace(
        empty,
        items=torch.empty(capacity, ITEM_SIZE, dtype=int32, device=device),
        num_items=torch.empty(2, dtype=int32, device=device),
        counters=torch.zeros(num_slots, num_kv_heads, dtype=int32, device=device),
        partial_lse=torch.empty(num_slots, num_kv_heads, empty.rows, dtype=fp32, device=device),
        partial_out=torch.empty(num_slots, num_kv_heads, empty.rows, head_dim, dtype=fp32, device=device),
    )


def plan_prefill(
    workspace: PrefillWorkspace,
    cu_seqlens_q: Tensor,  # [S + 1] int32
    context_lens: Tensor,  # [S] int32
) -> None:
    """Divides a step among programs: once a step, before the first layer's `prefill_attention`."""
    if not (context_lens.is_cuda or backend.interpret):
        return
    num_seqs = len(context_lens)
    _plan_kernel[(num_seqs,)](
        cu_seqlens_q,
        context_lens,
        workspace.items,
        workspace.num_items,
        num_seqs,
        workspace.num_kv_heads,
        SHARES=_SHARES,
        MIN_SHARE=_MIN_SHARE,
        BLOCK_Q=workspace.block_q,
        TILE=workspace.tile,
        BLOCK=256,
    )
