"""Blocks of one KV pool into blocks of another, by index tables, in one launch.

A pool's first dimension is the block; a block is contiguous. Either pool may be another process's memory (CUDA IPC) or
pinned host memory: this is both the hand-off and the swap. Bytes moved: 2 * N * bytes of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend

_CHUNK_BYTES = 32 * 1024  # of a block, that a program copies at a time


@triton.jit(do_not_specialize=["source_ids", "target_ids", "num_chunks"])
def _copy_blocks_kernel(
    source,  # [Ns, words]
    target,  # [Nt, words]
    source_ids,  # [N] int64
    target_ids,  # [N] int64
    source_stride,
    target_stride,
    num_words,
    chunks_per_block,
    num_chunks,
    CHUNK: tl.constexpr,
):
    """Grid [at most num_chunks]; num_chunks = N * chunks_per_block."""
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        index = chunk // chunks_per_block
        words = chunk % chunks_per_block * CHUNK + tl.arange(0, CHUNK)
        from_row = source + tl.load(source_ids + index) * source_stride
        to_row = target + tl.load(target_ids + index) * target_stride
        inside = words < num_words
        values = tl.load(from_row + words, mask=inside, eviction_policy="evict_first")
        tl.store(to_row + words, values, mask=inside, eviction_policy="evict_first")


def _as_words(pool: Tensor) -> Tensor:
    """The pool as [num_blocks, words] of the widest integers that fit."""
    rows = pool.flatten(1)
    num_bytes = rows.shape[1] * rows.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if num_bytes % dtype.itemsize == 0 and rows.stride(0) * rows.element_size() % dtype.itemsize == 0:
            return rows.view(dtype)
    return rows.view(torch.int8)


def copy_blocks_reference(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    target.index_copy_(0, target_ids, source.index_select(0, source_ids))


def copy_blocks(
    source: Tensor,  # [Ns, ...]
    target: Tensor,  # [Nt, ...], same trailing shape and dtype, updated in place
    source_ids: Tensor,  # [N] int64
    target_ids: Tensor,  # [N] int64, distinct
    num_programs: int | None = None,  # at most so many, so that the other multiprocessors are left to others
) -> None:
    """target[target_ids] = source[source_ids]. Ids are not checked on a GPU; the copy is asynchronous there."""
    if not (source.is_cuda or target.is_cuda or backend.interpret):
        copy_blocks_reference(source, target, source_ids, target_ids)
        return
    source, target = _as_words(source), _as_words(target)
    num_words = source.shape[1]
    chunk = _CHUNK_BYTES // source.element_size()
    chunks_per_block = triton.cdiv(num_words, chunk)
    num_chunks = len(source_ids) * chunks_per_block
    _copy_blocks_kernel[(min(num_chunks, num_programs or num_chunks),)](
        source,
        target,
        source_ids,
        target_ids,
        source.stride(0),
        target.stride(0),
        num_words,
        chunks_per_block,
        num_chunks,
        CHUNK=chunk,
        num_warps=8,
    )
