"""Blocks of one KV pool into blocks of another, by index tables, in one launch.

A pool's first dimension is the block. A block is contiguous, or it is the part of a larger one that some layers and
heads make: then it is rows, one for each layer's keys and one for its values, as far apart as whole ones are long.
Either pool may be another process's memory (CUDA IPC) or pinned host memory: this is both the hand-off and the swap.
Bytes moved: 2 * N * bytes of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

_CHUNK_BYTES = 32 * 1024  # of a block, that a program copies at a time


@triton.jit(do_not_specialize=["source_ids", "target_ids", "num_chunks", "rows_per_block"])
def _copy_blocks_kernel(
    source,  # [Ns, rows_per_block, words]
    target,  # [Nt, rows_per_block, words]
    source_ids,  # [N] int64
    target_ids,  # [N] int64
    source_stride,
    target_stride,
    source_row_stride,
    target_row_stride,
    num_words,
    rows_per_block,
    chunks_per_row,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """Grid [at most num_chunks]; num_chunks = N * rows_per_block * chunks_per_row."""
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        row = chunk // chunks_per_row
        index = row // rows_per_block
        row = row % rows_per_block
        words = chunk % chunks_per_row * CHUNK + tl.arange(0, CHUNK)
        from_row = source + tl.load(source_ids + index) * source_stride + row * source_row_stride
        to_row = target + tl.load(target_ids + index) * target_stride + row * target_row_stride
        inside = words < num_words
        values = tl.load(from_row + words, mask=inside, eviction_policy="evict_first")
        tl.store(to_row + words, values, mask=inside, eviction_policy="evict_first")


def as_rows(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both pools as [num_blocks, rows, words] of the widest integers that fit; a contiguous block is one row."""
    pools = [source, target]
    if all(pool[:1].is_contiguous() for pool in pools):
        rows = [pool.flatten(1).unsqueeze(1) for pool in pools]
    else:
        rows = [pool.view(len(pool), pool.shape[1] * pool.shape[2], -1) for pool in pools]
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(_consists_of(each, dtype.itemsize) for each in rows):
            return rows[0].view(dtype), rows[1].view(dtype)
    return rows[0].view(torch.int8), rows[1].view(torch.int8)


def _consists_of(rows: Tensor, num_bytes: int) -> bool:
    """Whether rows begin at multiples of so many bytes, and are multiples of them long."""
    sizes = (rows.shape[2], rows.stride(0), rows.stride(1), rows.storage_offset())
    return all(size * rows.element_size() % num_bytes == 0 for size in sizes)


def copy_blocks_reference(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    target.index_copy_(0, target_ids, source.index_select(0, source_ids))


def copy_blocks(
    source: Tensor,  # [Ns, ...], a block contiguous; or [Ns, L, 2, H, ...], L layers and H heads of a larger pool
    target: Tensor,  # [Nt, ...], same trailing shape and dtype, updated in place
    source_ids: Tensor,  # [N] int64
    target_ids: Tensor,  # [N] int64, distinct
    num_programs: int | None = None,  # at most so many, so that the other multiprocessors are left to others
) -> None:
    """target[target_ids] = source[source_ids]. Ids are not checked on a GPU; the copy is asynchronous there."""
    if not (source.is_cuda or target.is_cuda or backend.interpret):
        copy_blocks_reference(source, target, source_ids, target_ids)
        return
    source, target = as_rows(source, target)
    _, rows_per_block, num_words = source.shape
    chunk = min(_CHUNK_BYTES // source.element_size(), triton.next_power_of_2(num_words))
    chunks_per_row = triton.cdiv(num_words, chunk)
    num_chunks = len(source_ids) * rows_per_block * chunks_per_row
    _copy_blocks_kernel[(min(num_chunks, num_programs or num_chunks),)](
        source,
        target,
        source_ids,
        target_ids,
        source.stride(0),
        target.stride(0),
        source.stride(1),
        target.stride(1),
        num_words,
        rows_per_block,
        chunks_per_row,
        num_chunks,
        CHUNK=chunk,
        num_warps=8,
    )
