"""The element-wise halves of the two kinds of MLP.

    silu_and_mul     y = silu(gate) * up        LLaMA; gate and up side by side, as one projection leaves them
    bias_activation  y = act(x + bias)          OPT

Bytes moved per token: 3 * I * itemsize and 2 * I * itemsize.
"""

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import uses_triton

Activation = Literal["relu", "gelu", "gelu_tanh"]

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(
    gate_up,  # [T, 2 * I]
    out,  # [T, I], contiguous
    gate_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [T * cdiv(WIDTH, BLOCK)]."""
    blocks_per_row: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    columns = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    pointers = gate_up + row * gate_up_stride + columns
    gate = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pointers + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bias_activation_kernel(
    x,  # [T, I], contiguous, updated in place
    bias,  # [I]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Grid [T * cdiv(WIDTH, BLOCK)]."""
    blocks_per_row: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    columns = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    pointers = x + row * WIDTH + columns
    values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        values = tl.maximum(values, 0.0)
    elif ACTIVATION == "gelu":
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    else:  # 0.5 * (1 + tanh(u)) is sigmoid(2 * u)
        values = values * tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    tl.store(pointers, values.to(x.dtype.element_ty), mask=inside)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def bias_activation_reference(x: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    if bias is not None:
        x = x + bias
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def silu_and_mul(
    gate_up: Tensor,  # [T, 2 * I], any row stride
) -> Tensor:  # [T, I]
    """silu(first half) * second half."""
    if not uses_triton(gate_up):
        return silu_and_mul_reference(gate_up)
    num_tokens, width = gate_up.shape
    out = gate_up.new_empty(num_tokens, width // 2)
    grid = (num_tokens * triton.cdiv(width // 2, _BLOCK),)
    _silu_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), WIDTH=width // 2, BLOCK=_BLOCK)
    return out


def bias_activation(
    x: Tensor,  # [T, I], contiguous, may be overwritten
    bias: Tensor | None,  # [I]
    activation: Activation,
) -> Tensor:  # [T, I]
    """Activation of `x + bias`. The result may be `x` itself, overwritten."""
    if not uses_triton(x):
        return bias_activation_reference(x, bias, activation)
    num_tokens, width = x.shape
    _bias_activation_kernel[(num_tokens * triton.cdiv(width, _BLOCK),)](
        x, x if bias is None else bias, WIDTH=width, BLOCK=_BLOCK, HAS_BIAS=bias is not None, ACTIVATION=activation
    )
    return x
