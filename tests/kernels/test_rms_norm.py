import pytest
import torch
from oracle import check
from torch.nn import functional as F

from kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5


def torch_rms_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


@pytest.fixture(params=[(1, 64), (5, 123), (3, 5120)], ids=str)
def inputs(request, dtype, device):
    num_tokens, hidden_size = request.param
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * hidden_size, dtype=dtype, device=device)[:, :hidden_size]  # rows apart
    residual = 3 * torch.randn(num_tokens, hidden_size, dtype=dtype, device=device) + 1
    return x, residual, torch.randn(hidden_size, dtype=dtype, device=device)


def test_rms_norm(inputs):
    x, _, weight = inputs
    check(rms_norm(x, weight, EPS), torch_rms_norm, x, weight)


def test_add_rms_norm_adds_in_place_and_norms_the_sum(inputs):
    x, residual, weight = inputs
    total = x + residual
    out = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    check(out, torch_rms_norm, total, weight)
