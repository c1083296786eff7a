import pytest
import torch
from oracle import check
from torch.nn import functional as F

from kernels.layer_norm import add_layer_norm, layer_norm

EPS = 1e-5


def torch_layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@pytest.fixture(params=[(1, 64), (5, 123), (3, 5120)], ids=str)
def inputs(request, dtype, device):
    num_tokens, hidden_size = request.param
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * hidden_size, dtype=dtype, device=device)[:, :hidden_size]  # rows apart
    residual = 3 * torch.randn(num_tokens, hidden_size, dtype=dtype, device=device) + 1
    weight, bias = torch.randn(2, hidden_size, dtype=dtype, device=device)
    return x, residual, weight, bias


def test_layer_norm(inputs):
    x, _, weight, bias = inputs
    check(layer_norm(x, weight, bias, EPS), torch_layer_norm, x, weight, bias)


def test_add_layer_norm_adds_in_place_and_norms_the_sum(inputs):
    x, residual, weight, bias = inputs
    total = x + residual
    out = add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(residual, total)
    check(out, torch_layer_norm, total, weight, bias)
