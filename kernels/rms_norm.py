"""RMSNorm, alone and fused with the residual add.

    y = weight * x / sqrt(mean(x^2) + eps)

Bytes moved per row of H elements: 2 * H * itemsize, with the residual 4 * H * itemsize.
"""

import torch
from torch import Tensor

from kernels.backend import compute_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(compute_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm_reference(residual, weight, eps)


def rms_norm(
    x: Tensor,  # [T, H]
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Root mean square layer normalisation (Zhang and Sennrich, 2019), in the order of Hugging Face's LlamaRMSNorm."""
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: Tensor,  # [T, H]
    residual: Tensor,  # [T, H], updated in place
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Adds `x` to `residual` in place and returns the norm of the sum."""
    return add_rms_norm_reference(x, residual, weight, eps)
