"""The element-wise halves of the two kinds of MLP.

    silu_and_mul     y = silu(gate) * up        LLaMA; gate and up side by side, as one projection leaves them
    bias_activation  y = act(x + bias)          OPT

Bytes moved per token: 3 * I * itemsize and 2 * I * itemsize.
"""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["relu", "gelu", "gelu_tanh"]


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
    gate_up: Tensor,  # [T, 2 * I]
) -> Tensor:  # [T, I]
    """silu(first half) * second half."""
    return silu_and_mul_reference(gate_up)


def bias_activation(
    x: Tensor,  # [T, I], may be overwritten
    bias: Tensor | None,  # [I]
    activation: Activation,
) -> Tensor:  # [T, I]
    """Activation of `x + bias`. The result may be `x` itself, overwritten."""
    return bias_activation_reference(x, bias, activation)
