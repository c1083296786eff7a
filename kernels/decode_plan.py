"""How a decode step's contexts are divided among programs: planned on the device, once for all layers of the step.

The batch's tokens are cut into about _PROGRAMS equal shares, a list of items with one sequence's positions each. The
list's length depends on the batch size alone, so that a captured graph serves any lengths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

ITEM_SIZE = 8  # int32 per item: sequence or -1, start, end, first item of the sequence, its number of items, unused

_PROGRAMS = 528  # four on each of the 132 multiprocessors of an H100
_TILE = 64  # tokens; shares are multiples of it
_ITEM = tl.constexpr(ITEM_SIZE)


@triton.jit
def _num_items(context_lens, share, TILE: tl.constexpr):
    """(items of each sequence, tiles in each): at least one item; never two, which cost more than they gain."""
    num_tiles = tl.cdiv(context_lens, TILE)
    wanted = tl.cdiv(num_tiles, share)
    wanted = tl.where(wanted > 2, wanted, 1)
    tiles_per_item = tl.maximum(tl.cdiv(num_tiles, wanted), 1)
    return tl.maximum(tl.cdiv(num_tiles, tiles_per_item), 1), tiles_per_item


@triton.jit(do_not_specialize=["batch_size", "num_kv_heads", "num_items"])
def _plan_kernel(
    context_lens,  # [B] int32
    items,  # [num_items, _ITEM] int32
    batch_size,
    num_kv_heads,
    num_items,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [B]: each program writes the items of its sequence, the last one also marks what is left of the list."""
    seq = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch_size, BLOCK):
        seqs = start + tl.arange(0, BLOCK)
        total += tl.cdiv(tl.load(context_lens + seqs, mask=seqs < batch_size, other=0), TILE)
    share = tl.maximum(tl.cdiv(tl.sum(total, 0) * num_kv_heads, PROGRAMS), 1)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, seq, BLOCK):
        seqs = start + tl.arange(0, BLOCK)
        counts, _ = _num_items(tl.load(context_lens + seqs, mask=seqs < seq, other=0), share, TILE)
        before += tl.where(seqs < seq, counts, 0)
    first = tl.sum(before, 0)
    context_len = tl.load(context_lens + seq)
    count, tiles_per_item = _num_items(context_len, share, TILE)
    length = tiles_per_item * TILE
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        pointers = items + (first + index) * _ITEM
        is_item = index < count
        tl.store(pointers, seq, mask=is_item)
        tl.store(pointers + 1, index * length, mask=is_item)
        tl.store(pointers + 2, tl.minimum(index * length + length, context_len), mask=is_item)
        tl.store(pointers + 3, first, mask=is_item)
        tl.store(pointers + 4, count, mask=is_item)
    if seq == batch_size - 1:
        for start in range(first + count, num_items, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(items + index * _ITEM, -1, mask=index < num_items)


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """A step's plan, and room for partial results. Launches that may run at the same time need one each."""

    items: Tensor  # [max_num_items, ITEM_SIZE] int32
    counters: Tensor  # [max_batch_size, Hkv] int32
    partial_lse: Tensor  # [max_num_items, Hq] fp32
    partial_out: Tensor  # [max_num_items, Hq, D] fp32


def list_length(batch_size: int, num_kv_heads: int) -> int:
    """Enough items for any lengths: each sequence's number is rounded up."""
    return _PROGRAMS // num_kv_heads + batch_size


def decode_workspace(
    max_batch_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> DecodeWorkspace:
    """A workspace for batches of up to `max_batch_size` sequences."""
    num_items = list_length(max_batch_size, num_kv_heads)
    return DecodeWorkspace(
        items=torch.empty(num_items, ITEM_SIZE, dtype=torch.int32, device=device),
        counters=torch.zeros(max_batch_size, num_kv_heads, dtype=torch.int32, device=device),
        partial_lse=torch.empty(num_items, num_heads, dtype=torch.float32, device=device),
        partial_out=torch.empty(num_items, num_heads, head_dim, dtype=torch.float32, device=device),
    )


def plan_decode(
    workspace: DecodeWorkspace,
    context_lens: Tensor,  # [B] int32
) -> None:
    """Divides the batch's contexts among programs: once a step, before the first layer's `decode_attention`."""
    if not (context_lens.is_cuda or backend.interpret):
        return
    batch_size, num_kv_heads = len(context_lens), workspace.counters.shape[1]
    _plan_kernel[(batch_size,)](
        context_lens,
        workspace.items,
        batch_size,
        num_kv_heads,
        list_length(batch_size, num_kv_heads),
        PROGRAMS=_PROGRAMS,
        TILE=_TILE,
        BLOCK=128,
    )
