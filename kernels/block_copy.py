"""Blocks of one KV pool into blocks of another, by index tables, in one launch.

A pool's first dimension is the block; a block is contiguous. Either pool may be another process's memory (CUDA IPC) or
pinned host memory: this is both the hand-off and the swap. Bytes moved: 2 * N * bytes of a block.
"""

from torch import Tensor


def copy_blocks_reference(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    target.index_copy_(0, target_ids, source.index_select(0, source_ids))


def copy_blocks(
    source: Tensor,  # [Ns, ...]
    target: Tensor,  # [Nt, ...], same trailing shape and dtype, updated in place
    source_ids: Tensor,  # [N] int64
    target_ids: Tensor,  # [N] int64, distinct
) -> None:
    """target[target_ids] = source[source_ids]. Ids are not checked on a GPU; the copy is asynchronous there."""
    copy_blocks_reference(source, target, source_ids, target_ids)
