import pytest
import torch
from oracle import check
from torch.nn import functional as F

from kernels import decode_linear as module
from kernels.decode_linear import MAX_ROWS, decode_linear

ROWS = [1, 2, 7, 8, 16, 33, 64]


# fp32 is left to cuBLAS; bf16 in the interpreter: see conftest.
@pytest.fixture(params=[torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 4], ids=["whole", "split"])
def splits(request, monkeypatch):
    """K in one piece, or in up to four."""
    monkeypatch.setattr(module, "_MAX_SPLITS", request.param)


def new_inputs(num_rows, n, k, dtype, device):
    torch.manual_seed(0)
    x = torch.randn(num_rows, k, dtype=dtype, device=device)
    weight = torch.randn(n, k, dtype=dtype, device=device).div_(k**0.5)
    return x, weight, torch.randn(n, dtype=dtype, device=device)


def poison_partial_sums(device):
    partial, _ = module._workspace(torch.empty(0, device=device).device)
    with torch.inference_mode():  # as it was made, if an engine made it
        partial.fill_(torch.nan)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize(("n", "k"), [(64, 128), (1, 16), (100, 1500), (131, 1027)])
def test_product(num_rows, n, k, splits, dtype, device):
    x, weight, _ = new_inputs(num_rows, n, k, dtype, device)
    check(decode_linear(x, weight), F.linear, x, weight)


@pytest.mark.parametrize("num_rows", ROWS)
def test_product_with_bias(num_rows, splits, dtype, device):
    x, weight, bias = new_inputs(num_rows, 75, 300, dtype, device)
    check(decode_linear(x, weight, bias), F.linear, x, weight, bias)


@pytest.mark.parametrize("n", [4500, 8500])
def test_many_outputs(n, device):
    x, weight, bias = new_inputs(5, n, 200, torch.float16, device)
    check(decode_linear(x, weight, bias), F.linear, x, weight, bias)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_rows_may_lie_apart_or_across(num_rows, device):
    x, weight, _ = new_inputs(num_rows, 70, 300, torch.float16, device)
    apart = torch.full((num_rows, 701), torch.nan, dtype=x.dtype, device=device)[:, 100:400].copy_(x)
    across = x.t().contiguous().t()
    expected = decode_linear(x, weight)
    assert torch.equal(decode_linear(apart, weight), expected)
    assert torch.equal(decode_linear(across, weight), expected)


@pytest.mark.parametrize("num_rows", [1, 3, 33])
def test_what_lies_beyond_the_inputs_and_in_old_partial_sums_is_not_seen(num_rows, splits, device):
    x, weight, bias = new_inputs(num_rows, 75, 300, torch.float16, device)
    expected = decode_linear(x, weight, bias)
    padded = [torch.full((t.numel() + 4096,), torch.nan, dtype=t.dtype, device=device) for t in (x, weight, bias)]
    inside = [p[: t.numel()].view(t.shape).copy_(t) for p, t in zip(padded, (x, weight, bias), strict=True)]
    for _ in range(2):
        poison_partial_sums(device)
        assert torch.equal(decode_linear(*inside), expected)


# In the interpreter, NumPy's product of many columns is not that of each.
@pytest.mark.parametrize("num_rows", [5, 16, pytest.param(64, marks=pytest.mark.gpu)])
def test_a_row_does_not_depend_on_its_place(num_rows, splits, device):
    x, weight, bias = new_inputs(num_rows, 100, 700, torch.float16, device)
    order = torch.randperm(num_rows, device=device)
    assert torch.equal(decode_linear(x[order], weight, bias), decode_linear(x, weight, bias)[order])


def test_a_row_depends_on_the_number_of_rows_by_rounding_alone(splits, device):
    x, weight, bias = new_inputs(MAX_ROWS, 100, 700, torch.float16, device)
    alone = decode_linear(x[:1], weight, bias)
    for num_rows in ROWS[1:]:
        torch.testing.assert_close(decode_linear(x[:num_rows], weight, bias)[:1], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("num_rows", [0, 65])
def test_other_numbers_of_rows_are_refused(num_rows, device):
    x, weight, _ = new_inputs(num_rows, 16, 16, torch.float16, device)
    with pytest.raises(ValueError, match=f"not {num_rows}"):
        decode_linear(x, weight)


# The products of LLaMA-2-7B, and of OPT-13B those whose tiling differs.
LARGE = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (5120, 20480), (20480, 5120)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3, 32, 64])
@pytest.mark.parametrize(("n", "k"), LARGE)
def test_large_weights(n, k, num_rows, dtype, device):
    x, weight, _ = new_inputs(num_rows, n, k, dtype, device)
    out = decode_linear(x, weight)
    check(out, F.linear, x, weight)
    for _ in range(20):
        assert torch.equal(decode_linear(x, weight), out)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 64])
def test_a_captured_graph_serves_changed_inputs(num_rows, device):
    x, weight, _ = new_inputs(num_rows, 4096, 4096, torch.float16, device)
    decode_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_linear(decode_linear(x, weight), weight)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, decode_linear(decode_linear(x, weight), weight))


@pytest.mark.gpu
@pytest.mark.usefixtures("free_gpu_memory")
@pytest.mark.parametrize("num_rows", [1, 2])
def test_weight_of_more_than_2_31_elements(num_rows, device):
    x, weight, _ = new_inputs(num_rows, 2**31 // 16384 + 70, 16384, torch.float16, device)
    end = slice(-100, None)
    check(decode_linear(x, weight)[:, end], F.linear, x, weight[end])


@pytest.mark.gpu
def test_row_counts_of_one_class_share_a_kernel(device):
    import triton

    compiled = []
    x, weight, bias = new_inputs(MAX_ROWS, 4096, 4096, torch.float16, device)
    for num_rows in (1, 2, 17, 33):
        decode_linear(x[:num_rows], weight, bias)
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(kwargs["fn"].name)
    try:
        for num_rows in range(1, MAX_ROWS + 1):
            decode_linear(x[:num_rows], weight, bias)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert compiled == []
