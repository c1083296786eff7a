"""Rows of the token embedding, with OPT's learned positions added.

Bytes moved per token: 2 * H * itemsize, with positions 3 * H * itemsize.
"""

from torch import Tensor
from torch.nn import functional as F


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
    return embed_reference(token_ids, weight)


def embed_with_positions(
    token_ids: Tensor,  # [T] int64
    weight: Tensor,  # [V, H]
    positions: Tensor,  # [T] int64
    position_weight: Tensor,  # [P, H]
    position_offset: int,  # 2 for OPT, whose table starts with two unused rows
) -> Tensor:  # [T, H]
    """weight[token_ids] + position_weight[positions + position_offset]. Ids are not checked on a GPU."""
    return embed_with_positions_reference(token_ids, weight, positions, position_weight, position_offset)
