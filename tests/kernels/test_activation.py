import pytest
import torch
from oracle import check
from torch.nn import functional as F

from kernels.activation import bias_activation, silu_and_mul

TORCH = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (5, 123), (2, 2500)])
def test_silu_and_mul(num_tokens, width, dtype, device):
    torch.manual_seed(0)
    gate_up = 3 * torch.randn(num_tokens, 3 * width, dtype=dtype, device=device)[:, : 2 * width]
    check(silu_and_mul(gate_up), lambda x: F.silu(x[:, :width]) * x[:, width:], gate_up)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", TORCH)
def test_bias_activation(activation, has_bias, dtype, device):
    torch.manual_seed(0)
    x = 3 * torch.randn(3, 1500, dtype=dtype, device=device)
    bias = torch.randn(1500, dtype=dtype, device=device)
    out = bias_activation(x.clone(), bias if has_bias else None, activation)
    check(out, lambda x, bias: TORCH[activation](x + bias if has_bias else x), x, bias)
