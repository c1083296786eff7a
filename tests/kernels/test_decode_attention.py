import pytest
import torch
from oracle import PagedCache, attention, check

from kernels import decode_plan
from kernels.decode_attention import decode_attention
from kernels.decode_plan import decode_workspace, plan_decode

HEADS = [(4, 4, 64), (6, 2, 80), (4, 1, 96), (5, 1, 128), (8, 1, 64)]  # query heads, KV heads, head_dim


def new_queries(batch_size, num_heads, head_dim, dtype, device):
    """A view of a wider tensor, as of a qkv projection's output."""
    return torch.randn(batch_size, num_heads + 3, head_dim, dtype=dtype, device=device)[:, :num_heads]


def check_against_sdpa(out, q, cache, scale, window=None):
    for seq in range(len(q)):
        k, v = cache.keys[seq], cache.values[seq]
        check(out[seq : seq + 1], lambda q, k, v: attention(q, k, v, scale, window), q[seq : seq + 1], k, v)


def run(q, cache, scale, workspace=None, window=None):
    return decode_attention(q, cache.kv_cache, cache.block_tables, cache.lens, scale, workspace, window)


@pytest.fixture(params=[1, 2**10], ids=["whole", "split"])
def splits(request, monkeypatch):
    """Contexts in one piece each, or in as many as they have tiles."""
    monkeypatch.setattr(decode_plan, "_PROGRAMS", request.param)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_lengths_around_a_block_and_a_split(num_heads, num_kv_heads, head_dim, splits, dtype, device):
    torch.manual_seed(0)
    lens = [1, 15, 16, 17, 300]
    cache = PagedCache(lens, num_kv_heads, head_dim, 16, dtype, device)
    q = new_queries(len(lens), num_heads, head_dim, dtype, device)
    check_against_sdpa(run(q, cache, 0.1), q, cache, 0.1)


@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
def test_block_sizes(block_size, splits, device):
    torch.manual_seed(0)
    cache = PagedCache([7, 257, 600], 2, 64, block_size, torch.float16, device)
    q = new_queries(3, 4, 64, torch.float16, device)
    check_against_sdpa(run(q, cache, 0.1), q, cache, 0.1)


@pytest.mark.parametrize("window", [1, 15, 64, 65, 200, 1000])
def test_windows(window, splits, device):
    torch.manual_seed(0)
    cache = PagedCache([1, 64, 300, 450], 2, 64, 16, torch.float16, device)
    q = new_queries(4, 6, 64, torch.float16, device)
    check_against_sdpa(run(q, cache, 0.1, window=window), q, cache, 0.1, window)


def test_padding_rows_are_zero_and_leave_the_others_alone(splits, device):
    torch.manual_seed(0)
    cache = PagedCache([40, 30, 300], 2, 64, 16, torch.float16, device)
    q = new_queries(3, 4, 64, torch.float16, device)
    expected = run(q, cache, 0.1)
    cache.lens[1] = 0
    out = run(q, cache, 0.1)
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    assert (out[1] == 0).all()


def test_a_sequence_does_not_depend_on_its_place(splits, device):
    torch.manual_seed(0)
    cache = PagedCache([20, 300, 40], 2, 64, 16, torch.float16, device)
    q = new_queries(3, 4, 64, torch.float16, device)
    out = run(q, cache, 0.1)
    order = [2, 0, 1]
    cache.block_tables, cache.lens = cache.block_tables[order], cache.lens[order]
    assert torch.equal(run(q[order], cache, 0.1), out[order])


def test_workspace_serves_every_smaller_batch(device):
    torch.manual_seed(0)
    workspace = decode_workspace(3, 4, 2, 64, device)
    for lens in ([300], [300, 20], [5, 300, 170], [300]):
        cache = PagedCache(lens, 2, 64, 16, torch.float16, device)
        q = new_queries(len(lens), 4, 64, torch.float16, device)
        plan_decode(workspace, cache.lens)
        for _ in range(2):  # every layer of a step
            check_against_sdpa(run(q, cache, 0.1, workspace), q, cache, 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (16, 2), (12, 4), (5, 1)])
def test_long_contexts(num_heads, num_kv_heads, head_dim, dtype, device):
    torch.manual_seed(0)
    lens = [1, 4096, 1023, 1024, 1025, 3000]
    cache = PagedCache(lens, num_kv_heads, head_dim, 16, dtype, device)
    q = new_queries(len(lens), num_heads, head_dim, dtype, device)
    out = run(q, cache, head_dim**-0.5)
    check_against_sdpa(out, q, cache, head_dim**-0.5)
    assert torch.equal(run(q, cache, head_dim**-0.5), out)
    check_against_sdpa(run(q, cache, 0.1, window=1000), q, cache, 0.1, window=1000)


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [2, 200])
def test_a_captured_graph_serves_changed_lengths(batch_size, device):
    torch.manual_seed(0)
    workspace = decode_workspace(batch_size, 16, 8, 128, device)
    lens = torch.randint(1, 1500, (batch_size,)).tolist()
    cache = PagedCache(lens, 8, 128, 16, torch.bfloat16, device)
    q = new_queries(batch_size, 16, 128, torch.bfloat16, device)
    run(q, cache, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan_decode(workspace, cache.lens)
        out = run(q, cache, 0.1, workspace)
    for divisor in (1, 3, 10_000):
        cache.lens.copy_(torch.tensor(lens, device=device) // divisor)
        q.normal_()
        graph.replay()
        assert torch.equal(out, run(q, cache, 0.1))


@pytest.mark.gpu
@pytest.mark.usefixtures("free_gpu_memory")
def test_pool_of_more_than_2_31_elements(device):
    torch.manual_seed(0)
    cache = PagedCache([200], 8, 128, 16, torch.float16, device)
    q = new_queries(1, 8, 128, torch.float16, device)
    small = run(q, cache, 0.1)
    num_blocks = 2**31 // (2 * 8 * 16 * 128) + 40
    pool = torch.empty(num_blocks, 2, 8, 16, 128, dtype=torch.float16, device=device)
    far = num_blocks - len(cache.kv_cache)
    pool[far:] = cache.kv_cache
    cache.kv_cache = pool
    cache.block_tables[0, :13] += far
    assert torch.equal(run(q, cache, 0.1), small)
