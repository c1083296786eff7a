"""RMSNorm, alone and fused with the residual add.

    y = weight * x / sqrt(mean(x^2) + eps)

Bytes moved per row of H elements: 2 * H * itemsize, with the residual 4 * H * itemsize.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import compute_dtype, uses_triton, warps_per_row


@triton.jit
def _rms_norm_kernel(
    x,  # [T, H]
    residual,  # [T, H], updated if HAS_RESIDUAL
    weight,  # [H]
    out,  # [T, H], contiguous
    x_stride,
    residual_stride,
    eps,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Grid [T]: one row per program, in registers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        pointers = residual + row * residual_stride + columns
        before = tl.load(pointers, mask=inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(pointers, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide) / H + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(values.dtype).to(tl.float32) * scale
    tl.store(out + row * H + columns, normed.to(values.dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_tokens, hidden_size = x.shape
    out = x.new_empty(x.shape)
    block = triton.next_power_of_2(hidden_size)
    _rms_norm_kernel[(num_tokens,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        eps,
        H=hidden_size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps_per_row(block),
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if compute_dtype(x.dtype) == x.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.to(compute_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm_reference(residual, weight, eps)


def rms_norm(
    x: Tensor,  # [T, H], any row stride
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Root mean square layer normalisation (Zhang and Sennrich, 2019), in the order of Hugging Face's LlamaRMSNorm."""
    return _launch(x, None, weight, eps) if uses_triton(x) else rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: Tensor,  # [T, H], any row stride
    residual: Tensor,  # [T, H], any row stride, updated in place
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Adds `x` to `residual` in place and returns the norm of the sum."""
    if uses_triton(x):
        return _launch(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
