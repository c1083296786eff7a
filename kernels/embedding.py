"""Rows of the token embedding, with OPT's learned positions added.

Bytes moved per token: 2 * H * itemsize, with positions 3 * H * itemsize.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton
from kernels.gather_rows import gather_rows

_BLOCK = 1024


@triton.jit
def _embed_with_positions_kernel(
    token_ids,  # [T] int64
    weight,  # [V, H], contiguous
    positions,  # [T] int64
    position_weight,  # [P, H], contiguous
    out,  # [T, H], contiguous
    position_offset,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [T * cdiv(H, BLOCK)]."""
    blocks_per_row: tl.constexpr = (H + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    columns = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    token_id, position = tl.load(token_ids + row), tl.load(positions + row) + position_offset
    token = tl.load(weight + token_id * H + columns, mask=inside, other=0.0).to(tl.float32)
    place = tl.load(position_weight + position * H + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, (token + place).to(out.dtype.element_ty), mask=inside)


def embed_reference(token_ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(token_ids, weight)


def embed_with_positions_reference(
    token_ids: Tensor, weight: Tensor, positions: Tensor, position_weight: Tensor, position_offset: int
) -> Tensor:
    return F.embedding(token_ids, weight) + F.embedding(positions + position_offset, position_weight)


def embed(
    token_ids: Tensor,  # [T] int64
    weight: Tensor,  # [V, H]
) -> Tensor:  # [T, H]
    """weight[token_ids]. Ids are not checked on a GPU."""
    return gather_rows(weight, token_ids) if uses_triton(weight) else embed_reference(token_ids, weight)


def embed_with_positions(
    token_ids: Tensor,  # [T] int64
    weight: Tensor,  # [V, H]
    positions: Tensor,  # [T] int64
    position_weight: Tensor,  # [P, H]
    position_offset: int,  # 2 for OPT, whose table starts with two unused rows
) -> Tensor:  # [T, H]
    """weight[token_ids] + position_weight[positions + position_offset]. Ids are not checked on a GPU."""
    if not uses_triton(weight):
        return embed_with_positions_reference(token_ids, weight, positions, position_weight, position_offset)
    num_tokens, width = len(token_ids), weight.shape[1]
    out = weight.new_empty(num_tokens, width)
    _embed_with_positions_kernel[(num_tokens * triton.cdiv(width, _BLOCK),)](
        token_ids, weight, positions, position_weight, out, position_offset, H=width, BLOCK=_BLOCK
    )
    return out
