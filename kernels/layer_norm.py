"""LayerNorm, alone and fused with the residual add.

    y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias

Bytes moved per row of H elements: 2 * H * itemsize, with the residual 4 * H * itemsize.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import uses_triton, warps_per_row


@triton.jit
def _layer_norm_kernel(
    x,  # [T, H]
    residual,  # [T, H], updated if HAS_RESIDUAL
    weight,  # [H]
    bias,  # [H]
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
    centred = tl.where(inside, wide - tl.sum(wide) / H, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / H + eps)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + columns, (normed * scale + shift).to(values.dtype), mask=inside)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    num_tokens, hidden_size = x.shape
    out = x.new_empty(x.shape)
    block = triton.next_power_of_2(hidden_size)
    _layer_norm_kernel[(num_tokens,)](
        x,
        x if residual is None else residual,
        weight,
        bias,
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


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    residual += x
    return layer_norm_reference(residual, weight, bias, eps)


def layer_norm(
    x: Tensor,  # [T, H], any row stride
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Layer normalisation over the last dimension."""
    return _launch(x, None, weight, bias, eps) if uses_triton(x) else layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,  # [T, H], any row stride
    residual: Tensor,  # [T, H], any row stride, updated in place
    weight: Tensor,  # [H]
    bias: Tensor,  # [H]
    eps: float,
) -> Tensor:  # [T, H]
    """Adds `x` to `residual` in place and returns the norm of the sum."""
    if uses_triton(x):
        return _launch(x, residual, weight, bias, eps)
    return add_layer_norm_reference(x, residual, weight, bias, eps)
