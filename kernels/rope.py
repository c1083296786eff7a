"""The table of rotary angles: cosines and sines of every position, computed once when the model is loaded.

The rotation itself is fused with the write into the KV pool, in write_kv.py.
"""

import torch
from torch import Tensor


def rotary_table(
    inv_freq: Tensor,  # [D / 2] fp32, or [max_positions, D / 2] where it depends on the position
    max_positions: int,
    attention_scaling: float = 1.0,
) -> Tensor:  # [max_positions, D] fp32
    """Row p holds the D/2 cosines of position p, then its D/2 sines, times `attention_scaling`."""
    positions = torch.arange(max_positions, dtype=torch.float32, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_scaling


def apply_rope_reference(
    x: Tensor,  # [T, H, D]
    cos_sin: Tensor,  # [max_positions, D] fp32
    positions: Tensor,  # [T] int64
) -> Tensor:  # [T, H, D]
    """Half-split rotation, as in Hugging Face checkpoints: element i turns with element i + D/2."""
    return turned_reference(x, *cos_and_sin(cos_sin, positions, x.dtype))


def cos_and_sin(cos_sin: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each token, for `turned_reference`: [T, 1, D/2] each."""
    cos, sin = cos_sin[positions].to(dtype)[:, None].chunk(2, dim=-1)
    return cos, sin


def turned_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [T, H, D], as x
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
