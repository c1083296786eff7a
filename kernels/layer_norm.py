"""LayerNorm, alone and fused with the residual add.

    y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias

Bytes moved per row of H elements: 2 * H * itemsize, with the residual 4 * H * itemsize.
"""

import torch
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    residual += x
    return layer_norm_reference(residual, weight, bias, eps)


def layer_norm(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Layer normalisation over the last dimension."""
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H], updated in place
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Adds `x` to `residual` in place and returns the norm of the sum."""
    return add_layer_norm_reference(x, residual, weight, bias, eps)
