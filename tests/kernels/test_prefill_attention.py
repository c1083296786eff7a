import contextlib
from itertools import pairwise

import pytest
import torch
from oracle import PagedCache, attention, check

from kernels import prefill_attention as attention_module
from kernels import prefill_plan
from kernels.prefill_attention import prefill_attention
from kernels.prefill_plan import plan_prefill, prefill_workspace

HEADS = [(4, 4, 64), (6, 2, 80), (4, 1, 96), (5, 1, 128), (8, 1, 64)]  # query heads, KV heads, head_dim


def run(cache, queries, scale, workspace=None, window=None):
    """The kernel's output, one tensor per sequence."""
    query_lens = [len(q) for q in queries]
    starts = torch.tensor([0, *query_lens], device=cache.lens.device).cumsum(0).int()
    q = torch.cat(queries)
    if workspace is not None:
        plan_prefill(workspace, starts, cache.lens)
    out = prefill_attention(q, cache.kv_cache, cache.block_tables, starts, cache.lens, scale, workspace, window)
    return out.split(query_lens)


def new_queries(query_lens, num_heads, head_dim, dtype, device):
    """Views of a wider tensor, as of a qkv projection's output."""
    wide = [torch.randn(n, num_heads + 3, head_dim, dtype=dtype, device=device) for n in query_lens]
    return [x[:, :num_heads] for x in wide]


def check_against_sdpa(outs, queries, cache, scale, window=None):
    for out, q, k, v in zip(outs, queries, cache.keys, cache.values, strict=True):
        if len(q):
            check(out, lambda q, k, v: attention(q, k, v, scale, window), q, k, v)


@pytest.fixture(params=[(1, 1), (2**10, 2)], ids=["whole", "divided"])
def shares(request, monkeypatch):
    """Keys in one piece, or divided among programs; and fewer programs than items, so that each takes several."""
    monkeypatch.setattr(prefill_plan, "_SHARES", request.param[0])
    monkeypatch.setattr(prefill_plan, "_MIN_SHARE", request.param[1])
    monkeypatch.setattr(attention_module, "_SPARE_PROGRAMS", 3)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_whole_prompts_around_a_block(num_heads, num_kv_heads, head_dim, dtype, device):
    torch.manual_seed(0)
    lens = [1, 15, 16, 17, 40]
    cache = PagedCache(lens, num_kv_heads, head_dim, 16, dtype, device)
    queries = new_queries(lens, num_heads, head_dim, dtype, device)
    check_against_sdpa(run(cache, queries, 0.1), queries, cache, 0.1)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS[:3])
def test_chunks_after_a_cached_prefix_and_empty_queries(num_heads, num_kv_heads, head_dim, dtype, device):
    torch.manual_seed(0)
    lens, query_lens = [150, 33, 70, 16, 129], [1, 0, 20, 16, 90]
    cache = PagedCache(lens, num_kv_heads, head_dim, 16, dtype, device)
    queries = new_queries(query_lens, num_heads, head_dim, dtype, device)
    check_against_sdpa(run(cache, queries, 0.1), queries, cache, 0.1)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [HEADS[1], HEADS[3]])
@pytest.mark.parametrize("block_size", [16, 64])
def test_divided_keys_and_decode_rows(num_heads, num_kv_heads, head_dim, block_size, shares, device):
    """Chunks after long prefixes, rows of one query, and sequences without any, as a graph pads with."""
    torch.manual_seed(0)
    lens, query_lens = [300, 1, 0, 64, 257, 65], [40, 1, 0, 1, 1, 64]
    cache = PagedCache(lens, num_kv_heads, head_dim, block_size, torch.float16, device)
    queries = new_queries(query_lens, num_heads, head_dim, torch.float16, device)
    check_against_sdpa(run(cache, queries, 0.1), queries, cache, 0.1)


@pytest.mark.parametrize("window", [1, 31, 64, 149, 1000])
@pytest.mark.parametrize("block_size", [16, 64])
def test_windows(window, block_size, shares, device):
    torch.manual_seed(0)
    lens, query_lens = [150, 33, 260], [150, 1, 130]
    cache = PagedCache(lens, 2, 64, block_size, torch.float16, device)
    queries = new_queries(query_lens, 6, 64, torch.float16, device)
    check_against_sdpa(run(cache, queries, 0.1, window=window), queries, cache, 0.1, window)


def test_workspace_serves_every_smaller_step(device):
    torch.manual_seed(0)
    workspace = prefill_workspace(100, 3, 4, 2, 64, torch.float16, device)
    for lens, query_lens in ([[700], [90]], [[700, 20], [1, 9]], [[5, 600, 170], [5, 1, 1]], [[700], [90]]):
        cache = PagedCache(lens, 2, 64, 16, torch.float16, device)
        queries = new_queries(query_lens, 4, 64, torch.float16, device)
        for _ in range(2):  # every layer of a step
            check_against_sdpa(run(cache, queries, 0.1, workspace), queries, cache, 0.1)


@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
def test_block_sizes(block_size, device):
    torch.manual_seed(0)
    lens = [70, 130]
    cache = PagedCache(lens, 2, 64, block_size, torch.float16, device)
    queries = new_queries(lens, 4, 64, torch.float16, device)
    check_against_sdpa(run(cache, queries, 0.1), queries, cache, 0.1)


def test_chunked_equals_unchunked(device):
    torch.manual_seed(0)
    cache = PagedCache([90], 2, 64, 16, torch.float32, device)
    queries = new_queries([90], 4, 64, torch.float32, device)
    whole = run(cache, queries, 0.1)[0]
    cache.lens.fill_(50)
    first = run(cache, [queries[0][:50]], 0.1)[0]
    cache.lens.fill_(90)
    second = run(cache, [queries[0][50:]], 0.1)[0]
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=0)


def test_a_sequence_does_not_depend_on_its_batch(device):
    torch.manual_seed(0)
    lens = [20, 65, 40]
    cache = PagedCache(lens, 2, 64, 16, torch.float16, device)
    queries = new_queries(lens, 4, 64, torch.float16, device)
    outs = run(cache, queries, 0.1)
    order = [2, 0, 1]
    cache.block_tables, cache.lens = cache.block_tables[order], cache.lens[order]
    permuted = run(cache, [queries[i] for i in order], 0.1)
    for i, out in zip(order, permuted, strict=True):
        assert torch.equal(out, outs[i])


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(12, 12), (16, 2), (12, 4), (15, 3)])
def test_long_mixed_batches(num_heads, num_kv_heads, head_dim, block_size, dtype, device):
    torch.manual_seed(0)
    lens, query_lens = [2048, 700, 1300, 1, 513, 999], [2048, 1, 300, 1, 513, 128]
    cache = PagedCache(lens, num_kv_heads, head_dim, block_size, dtype, device)
    queries = new_queries(query_lens, num_heads, head_dim, dtype, device)
    outs = run(cache, queries, head_dim**-0.5)
    check_against_sdpa(outs, queries, cache, head_dim**-0.5)
    again = run(cache, queries, head_dim**-0.5)
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))
    check_against_sdpa(run(cache, queries, 0.1, window=300), queries, cache, 0.1, window=300)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (32, 4)])
def test_a_captured_graph_serves_changed_lengths(num_heads, num_kv_heads, device):
    """Chunks and decode rows change places, and rows of the graph go unused."""
    torch.manual_seed(0)
    cache = PagedCache([3000] * 6, num_kv_heads, 128, 64, torch.bfloat16, device)
    q = torch.randn(600, num_heads, 128, dtype=torch.bfloat16, device=device)
    starts = torch.zeros(7, dtype=torch.int32, device=device)
    workspace = prefill_workspace(600, 6, num_heads, num_kv_heads, 128, torch.bfloat16, device)
    graph = torch.cuda.CUDAGraph()
    for is_captured in (False, True):
        with torch.cuda.graph(graph) if is_captured else contextlib.nullcontext():
            plan_prefill(workspace, starts, cache.lens)
            out = prefill_attention(q, cache.kv_cache, cache.block_tables, starts, cache.lens, 0.1, workspace)
    for query_lens, lens in [
        ([500, 1, 1, 1, 0, 0], [1500, 3000, 7, 2000, 0, 0]),
        ([1, 599, 0, 0, 0, 0], [3000, 599, 0, 0, 0, 0]),
        ([256, 0, 0, 0, 0, 0], [3000, 0, 0, 0, 0, 0]),
        ([100] * 6, [100, 200, 3000, 100, 150, 2999]),
    ]:
        starts.copy_(torch.tensor([0, *query_lens], device=device).cumsum(0))
        cache.lens.copy_(torch.tensor(lens, device=device))
        q.normal_()
        graph.replay()
        for seq, (start, end) in enumerate(pairwise(starts.tolist())):
            if start < end:
                k, v = cache.keys[seq][: lens[seq]], cache.values[seq][: lens[seq]]
                check(out[start:end], lambda q, k, v: attention(q, k, v, 0.1), q[start:end], k, v)


@pytest.mark.gpu
@pytest.mark.usefixtures("free_gpu_memory")
def test_pool_of_more_than_2_31_elements(device):
    torch.manual_seed(0)
    cache = PagedCache([200], 8, 128, 16, torch.float16, device)
    queries = new_queries([200], 8, 128, torch.float16, device)
    small = run(cache, queries, 0.1)[0]
    num_blocks = 2**31 // (2 * 8 * 16 * 128) + 40
    pool = torch.empty(num_blocks, 2, 8, 16, 128, dtype=torch.float16, device=device)
    far = num_blocks - len(cache.kv_cache)
    pool[far:] = cache.kv_cache
    cache.kv_cache = pool
    cache.block_tables[0, :13] += far
    assert torch.equal(run(cache, queries, 0.1)[0], small)
