"""The angles of rotary positions, as transformers computes them."""

import math

import torch
from torch import Tensor

from ensemble.models.rope_spec import RopeSpec


def inverse_frequencies(
    rope: RopeSpec,
    head_dim: int,
    max_positions: int,  # rows where the angle per position depends on the position
) -> Tensor:  # [head_dim / 2] fp32, or of dynamic scaling [max_positions, head_dim / 2]
    """Angle per position of each pair of elements, scaled as `rope` says.

    Dynamic scaling turns a token as in a sequence that ends with it. So a token's keys depend on nothing that comes
    later, and caching and computing again give the same; it is what transformers' `generate` does for prompts within
    the original context, while it turns a longer prompt as a whole by its length.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if rope.rope_type == "dynamic":
        lengths = torch.arange(1, max_positions + 1, dtype=torch.float64).clamp(min=rope.original_max_positions)
        stretch = rope.factor * lengths / rope.original_max_positions - (rope.factor - 1)
        thetas = rope.theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / thetas[:, None].float() ** exponents
    inv_freq: Tensor = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return inv_freq / rope.factor
    if rope.rope_type == "llama3":
        # long wavelengths are stretched by `factor`, short ones kept, those between interpolated
        turns = rope.original_max_positions * inv_freq / (2 * math.pi)  # over the original context
        kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * inv_freq / rope.factor + kept * inv_freq
    if rope.rope_type == "yarn":
        kept = _yarn_kept(rope, head_dim)
        return (1 - kept) * inv_freq / rope.factor + kept * inv_freq
    return inv_freq


def _yarn_kept(rope: RopeSpec, head_dim: int) -> Tensor:  # [head_dim / 2] fp32
    """How much of each pair's frequency is kept: 1 up to the pair that makes `beta_fast` turns, 0 from `beta_slow`."""

    def pair_of(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
