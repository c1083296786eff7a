"""Rows of a matrix by index: the hidden states of each sequence's last token.

Bytes moved per row: 2 * H * itemsize.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import uses_triton

_BLOCK = 1024


@triton.jit
def _gather_rows_kernel(
    x,  # [T, H]
    row_ids,  # [S] int64
    out,  # [S, H], contiguous
    x_stride,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [S * cdiv(H, BLOCK)]."""
    blocks_per_row: tl.constexpr = (H + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    columns = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    values = tl.load(x + tl.load(row_ids + row) * x_stride + columns, mask=inside)
    tl.store(out + row * H + columns, values, mask=inside)


def gather_rows_reference(x: Tensor, row_ids: Tensor) -> Tensor:
    return x.index_select(0, row_ids)


def gather_rows(
    x: Tensor,  # [T, H], any row stride
    row_ids: Tensor,  # [S] int64
) -> Tensor:  # [S, H]
    """x[row_ids]. Ids are not checked on a GPU."""
    if not uses_triton(x):
        return gather_rows_reference(x, row_ids)
    num_rows, width = len(row_ids), x.shape[1]
    out = x.new_empty(num_rows, width)
    grid = (num_rows * triton.cdiv(width, _BLOCK),)
    _gather_rows_kernel[grid](x, row_ids, out, x.stride(0), H=width, BLOCK=_BLOCK)
    return out
