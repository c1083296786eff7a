"""What `tools.benchmarks.kernels` measures: one function per kernel, and the shapes it is measured at.

Every case rotates over enough copies of its inputs that none is found in the L2 cache, and has random data.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.activation import bias_activation, silu_and_mul
from kernels.block_copy import copy_blocks
from kernels.decode_attention import decode_attention
from kernels.decode_linear import decode_linear, decode_linear_reference
from kernels.decode_plan import decode_workspace, plan_decode
from kernels.embedding import embed
from kernels.layer_norm import add_layer_norm
from kernels.prefill_attention import prefill_attention
from kernels.prefill_plan import plan_prefill, prefill_workspace
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rope import rotary_table
from kernels.sampling import greedy, sample
from kernels.write_kv import rope_and_write_kv, write_kv

ROTATED_BYTES = 256 * 2**20  # several times the L2 cache
LARGE_BYTES = 150e6  # from here on the goals for memory-bound kernels hold
HEAD_DIM = 128

Run = Callable[[int], object]  # one launch on the inputs of the given number


@dataclass(kw_only=True)
class Case:
    name: str
    work: float  # bytes moved, or floating-point operations
    unit: Literal["bytes", "flops"] = "bytes"
    run: Run
    num_inputs: int
    libraries: dict[str, Run] = field(default_factory=dict)
    goal_share: float | None = None  # of the ceiling
    goal_us: float | None = None
    goal_to_cudnn: float | None = None  # of cuDNN's speed


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float16, device="cuda")


def copies_for(num_bytes: float) -> int:
    """Inputs to rotate over, of which one call reads and writes `num_bytes`."""
    return max(2, min(64, math.ceil(ROTATED_BYTES / num_bytes)))


def large(num_bytes: float, goal: float) -> float | None:
    return goal if num_bytes >= LARGE_BYTES else None


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])


def shuffled_tables(num_seqs: int, max_len: int, num_blocks: int, block_size: int) -> Tensor:
    """Block tables of `num_seqs` sequences of up to `max_len` tokens, which take all blocks of a pool, shuffled."""
    return torch.randperm(num_blocks).view(num_seqs, math.ceil(max_len / block_size)).int().cuda()


def prefill(
    num_heads: int, num_kv_heads: int, lens: list[tuple[int, int]], block_size: int, has_goal: bool = False
) -> Iterator[Case]:
    """`lens`: (query length, context length) of each sequence."""
    query_lens, lens_after = zip(*lens, strict=True)
    num_blocks = len(lens) * math.ceil(max(lens_after) / block_size)
    kv_cache = randn(num_blocks, 2, num_kv_heads, block_size, HEAD_DIM)
    tables = shuffled_tables(len(lens), max(lens_after), num_blocks, block_size)
    cu_seqlens = torch.tensor([0, *query_lens], device="cuda").cumsum(0).int()
    context_lens = torch.tensor(lens_after, dtype=torch.int32, device="cuda")
    queries = [randn(sum(query_lens), num_heads, HEAD_DIM) for _ in range(2)]
    heads = num_heads, num_kv_heads, HEAD_DIM
    workspace = prefill_workspace(sum(query_lens), len(lens), *heads, torch.float16, "cuda")
    plan_prefill(workspace, cu_seqlens, context_lens)
    libraries: dict[str, Run] = {}
    if query_lens == lens_after:
        q = randn(len(lens), num_heads, max(query_lens), HEAD_DIM)
        k, v = (randn(len(lens), num_kv_heads, max(query_lens), HEAD_DIM) for _ in range(2))
        libraries["cuDNN"] = lambda _: sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v, True)
        libraries["flash"] = lambda _: sdpa(SDPBackend.FLASH_ATTENTION, q, k, v, True)
    num_decodes = query_lens.count(1)
    shape = f"{len(lens) - num_decodes} x {query_lens[0]}"
    shape += f" of {lens_after[0]}" if query_lens != lens_after else ""
    shape += f" and {num_decodes} rows of {lens_after[-1]}" if num_decodes else ""
    yield Case(
        name=f"prefill attention, {shape}, {num_heads}/{num_kv_heads} heads, blocks of {block_size}",
        work=4 * num_heads * HEAD_DIM * sum(query * (after - query / 2) for query, after in lens),
        unit="flops",
        run=lambda i: prefill_attention(
            queries[i], kv_cache, tables, cu_seqlens, context_lens, HEAD_DIM**-0.5, workspace=workspace
        ),
        num_inputs=2,
        libraries=libraries,
        goal_share=0.50 if has_goal else None,
        goal_to_cudnn=0.80 if has_goal else None,
    )


def decode(num_heads: int, num_kv_heads: int, lens: list[int], block_size: int) -> Iterator[Case]:
    num_bytes = 2 * 2 * sum(lens) * num_kv_heads * HEAD_DIM
    num_inputs = copies_for(num_bytes)
    num_blocks = num_inputs * len(lens) * math.ceil(max(lens) / block_size)
    kv_cache = randn(num_blocks, 2, num_kv_heads, block_size, HEAD_DIM)
    tables = shuffled_tables(num_inputs * len(lens), max(lens), num_blocks, block_size).view(num_inputs, len(lens), -1)
    q = randn(len(lens), num_heads, HEAD_DIM)
    context_lens = torch.tensor(lens, dtype=torch.int32, device="cuda")
    workspace = decode_workspace(len(lens), num_heads, num_kv_heads, HEAD_DIM, "cuda")
    plan_decode(workspace, context_lens)
    libraries: dict[str, Run] = {}
    is_even = len(set(lens)) == 1
    if is_even:
        k, v = kv_cache.view(2, num_inputs, len(lens), num_kv_heads, -1, HEAD_DIM)[..., : lens[0], :]
        libraries["flash"] = lambda i: sdpa(SDPBackend.FLASH_ATTENTION, q[:, :, None], k[i], v[i], False)
    shape = f"{len(lens)} x {lens[0]}" if is_even else f"{len(lens)} of {min(lens)} to {max(lens)}"
    yield Case(
        name=f"decode attention, {shape}, {num_heads}/{num_kv_heads} heads, blocks of {block_size}",
        work=num_bytes,
        run=lambda i: decode_attention(q, kv_cache, tables[i], context_lens, HEAD_DIM**-0.5, workspace=workspace),
        num_inputs=num_inputs,
        libraries=libraries,
        goal_share=0.90 if num_bytes >= 256 * 2**20 else None,
        goal_us=15.0 if num_bytes < 2 * 2**20 else None,
    )


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, 1e-5), total


def torch_silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def norms(num_tokens: int, hidden_size: int) -> Iterator[Case]:
    num_bytes = 2 * num_tokens * hidden_size
    num_inputs = copies_for(2 * num_bytes)
    xs, residuals = ([randn(num_tokens, hidden_size) for _ in range(num_inputs)] for _ in range(2))
    weight, bias = randn(2, hidden_size)
    compiled = torch.compile(torch_add_rms_norm, dynamic=False)

    def torch_add_layer_norm(i: int) -> Tensor:
        return F.layer_norm(residuals[i].add_(xs[i]), weight.shape, weight, bias, 1e-5)

    shape = f"{num_tokens} x {hidden_size}"
    yield Case(
        name=f"RMSNorm, {shape}",
        work=2 * num_bytes,
        run=lambda i: rms_norm(xs[i], weight, 1e-5),
        num_inputs=num_inputs,
        libraries={"torch": lambda i: F.rms_norm(xs[i], weight.shape, weight, 1e-5)},
        goal_share=large(2 * num_bytes, 0.88),
    )
    yield Case(
        name=f"add + RMSNorm, {shape}",
        work=4 * num_bytes,
        run=lambda i: add_rms_norm(xs[i], residuals[i], weight, 1e-5),
        num_inputs=num_inputs,
        libraries={"torch.compile": lambda i: compiled(xs[i], residuals[i], weight)},
        goal_share=large(4 * num_bytes, 0.88),
    )
    yield Case(
        name=f"add + LayerNorm, {shape}",
        work=4 * num_bytes,
        run=lambda i: add_layer_norm(xs[i], residuals[i], weight, bias, 1e-5),
        num_inputs=num_inputs,
        libraries={"torch": torch_add_layer_norm},
        goal_share=large(4 * num_bytes, 0.88),
    )


def silu(num_tokens: int, width: int) -> Iterator[Case]:
    num_bytes = 3 * 2 * num_tokens * width
    num_inputs = copies_for(num_bytes)
    gate_ups = [randn(num_tokens, 2 * width) for _ in range(num_inputs)]
    compiled = torch.compile(torch_silu_and_mul, dynamic=False)
    yield Case(
        name=f"SiLU and mul, {num_tokens} x {width}",
        work=num_bytes,
        run=lambda i: silu_and_mul(gate_ups[i]),
        num_inputs=num_inputs,
        libraries={"torch.compile": lambda i: compiled(gate_ups[i])},
        goal_share=large(num_bytes, 0.88),
    )


def bias_relu(num_tokens: int, width: int) -> Iterator[Case]:
    num_bytes = 2 * 2 * num_tokens * width
    num_inputs = copies_for(num_bytes)
    xs, bias = [randn(num_tokens, width) for _ in range(num_inputs)], randn(width)
    yield Case(
        name=f"bias and ReLU, {num_tokens} x {width}",
        work=num_bytes,
        run=lambda i: bias_activation(xs[i], bias, "relu"),
        num_inputs=num_inputs,
        libraries={"torch": lambda i: xs[i].add_(bias).relu_()},
        goal_share=large(num_bytes, 0.88),
    )


def kv_writes(num_tokens: int, num_heads: int, num_kv_heads: int, block_size: int) -> Iterator[Case]:
    rope_bytes = 2 * 2 * num_tokens * (num_heads + 2 * num_kv_heads) * HEAD_DIM
    write_bytes = 2 * 2 * num_tokens * 2 * num_kv_heads * HEAD_DIM
    num_inputs = copies_for(rope_bytes)
    num_blocks = math.ceil(max(num_tokens, 4096) / block_size)
    caches = [randn(num_blocks, 2, num_kv_heads, block_size, HEAD_DIM) for _ in range(num_inputs)]
    qkvs = [randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM) for _ in range(num_inputs)]
    parts = [qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1) for qkv in qkvs]
    table = rotary_table(10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2, device="cuda"), 4096)
    positions = torch.randint(4096, (num_tokens,), device="cuda")
    blocks = torch.randperm(num_blocks, device="cuda")[:, None]
    slots = (blocks * block_size + torch.arange(block_size, device="cuda")).flatten()[:num_tokens]

    def rope(i: int) -> None:
        q, k, v = parts[i]
        rope_and_write_kv(q, k, v, table, positions, caches[i], slots)

    def write(i: int) -> None:
        _, k, v = parts[i]
        write_kv(k, v, caches[i], slots)

    shape = f"{num_tokens} x {num_heads}/{num_kv_heads} heads"
    for name, num_bytes, run in [("RoPE and write KV", rope_bytes, rope), ("write KV", write_bytes, write)]:
        yield Case(
            name=f"{name}, {shape}",
            work=num_bytes,
            run=run,
            num_inputs=num_inputs,
            goal_share=large(num_bytes, 0.88),
        )


def embedding(num_tokens: int, hidden_size: int) -> Iterator[Case]:
    weight = randn(32000, hidden_size)
    token_ids = [torch.randint(32000, (num_tokens,), device="cuda") for _ in range(2)]
    yield Case(
        name=f"embedding, {num_tokens} x {hidden_size}",
        work=2 * 2 * num_tokens * hidden_size,
        run=lambda i: embed(token_ids[i], weight),
        num_inputs=2,
        libraries={"torch": lambda i: F.embedding(token_ids[i], weight)},
    )


def linear(num_rows: int, out_size: int, in_size: int) -> Iterator[Case]:
    num_bytes = 2 * (out_size * in_size + num_rows * (in_size + out_size))
    num_inputs = copies_for(num_bytes)
    weights = [randn(out_size, in_size) for _ in range(num_inputs)]
    x = randn(num_rows, in_size)
    yield Case(
        name=f"decode linear, {num_rows} rows, {out_size} x {in_size}",
        work=num_bytes,
        run=lambda i: decode_linear(x, weights[i]),
        num_inputs=num_inputs,
        libraries={"cuBLAS": lambda i: decode_linear_reference(x, weights[i])},
    )


def torch_top_k_top_p(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    ascending, order = logits.float().sort(dim=1)
    ascending = ascending.masked_fill(ascending < ascending[:, -top_k, None], -torch.inf)
    probs = ascending.softmax(1)
    kept = probs.masked_fill(probs.cumsum(1) <= 1 - top_p, 0)
    return order.gather(1, (kept / torch.empty_like(kept).exponential_()).argmax(1, keepdim=True))


def sampling(num_rows: int, vocab_size: int, has_goal: bool = False) -> Iterator[Case]:
    num_bytes = 2 * num_rows * vocab_size
    num_inputs = copies_for(num_bytes)
    logits = [2 * randn(num_rows, vocab_size) for _ in range(num_inputs)]
    zeros, ones = torch.zeros(num_rows, device="cuda"), torch.ones(num_rows, device="cuda")
    seeds = torch.arange(num_rows, device="cuda")

    def sampler(top_k: int, top_p: float) -> Run:
        top_ks, top_ps = (zeros + top_k).int(), zeros + top_p
        return lambda i: sample(logits[i], ones, top_ks, top_ps, zeros, seeds, seeds)

    case = partial(Case, work=num_bytes, num_inputs=num_inputs)
    shape = f"{num_rows} x {vocab_size}"
    yield case(
        name=f"greedy, {shape}",
        run=lambda i: greedy(logits[i]),
        libraries={"torch": lambda i: logits[i].argmax(1)},
        goal_us=25.0 if has_goal else None,
    )
    yield case(name=f"temperature, {shape}", run=sampler(0, 1.0))
    yield case(name=f"top-p, {shape}", run=sampler(0, 0.9), goal_us=120.0 if has_goal else None)
    yield case(
        name=f"top-k and top-p, {shape}",
        run=sampler(50, 0.9),
        libraries={"torch sort": lambda i: torch_top_k_top_p(logits[i], 50, 0.9)},
        goal_us=120.0 if has_goal else None,
    )


def block_copies(num_blocks: int, block_bytes: int) -> Iterator[Case]:
    source = torch.randint(100, (2 * num_blocks, block_bytes // 2), dtype=torch.int16, device="cuda")
    target = torch.zeros_like(source)
    ids = [torch.randperm(2 * num_blocks, device="cuda")[:num_blocks] for _ in range(4)]
    yield Case(
        name=f"block copy, {num_blocks} x {block_bytes // 2**10} KiB",
        work=2 * num_blocks * block_bytes,
        run=lambda i: copy_blocks(source, target, ids[i], ids[i ^ 1]),
        num_inputs=4,
        libraries={"torch": lambda i: target.index_copy_(0, ids[i ^ 1], source[ids[i]])},
        goal_share=0.90 if block_bytes >= 2 * 2**20 else None,
    )


GROUPS: dict[str, list[Callable[[], Iterator[Case]]]] = {
    "prefill": [
        partial(prefill, 16, 16, [(8192, 8192)], 64, has_goal=True),
        partial(prefill, 32, 4, [(8192, 8192)], 64, has_goal=True),
        partial(prefill, 16, 16, [(8192, 8192)], 16),
        partial(prefill, 32, 4, [(8192, 8192)], 16),
        partial(prefill, 32, 32, [(512, 512)], 64),
        partial(prefill, 32, 32, [(2048, 2048)], 64),
        partial(prefill, 32, 32, [(2048, 2048)] * 4, 64),
        partial(prefill, 32, 32, [(1024, 8192)], 64),
        partial(prefill, 32, 4, [(256, 16640)], 64),
        partial(prefill, 32, 32, [(256, 33024)], 64),
        partial(prefill, 32, 8, [(256, 33024)], 64),
        partial(prefill, 40, 40, [(512, 1536)], 64),
        partial(prefill, 40, 40, [(512, 1536), *[(1, 2000)] * 2], 64),
        partial(prefill, 40, 40, [(512, 1536), *[(1, 2000)] * 8], 64),
        partial(prefill, 40, 40, [(256, 1280), *[(1, 2000)] * 8], 64),
        partial(prefill, 40, 40, [(2048, 2048)], 64),
    ],
    "decode": [
        partial(decode, 32, 32, [1024] * 32, 16),
        partial(decode, 32, 32, [544] * 64, 16),
        partial(decode, 32, 32, [544] * 128, 16),
        partial(decode, 32, 32, [544] * 128, 64),
        partial(decode, 32, 8, [2048] * 64, 16),
        partial(decode, 32, 8, [65536], 16),
        partial(decode, 32, 32, [64 + 63 * i for i in range(64)], 16),
        partial(decode, 32, 8, [512] * 31 + [16384], 16),
        partial(decode, 32, 32, [544] * 8, 16),
        partial(decode, 32, 32, [544], 16),
        partial(decode, 32, 8, [8192], 16),
        partial(decode, 32, 32, [100], 16),
        partial(decode, 32, 8, [400], 16),
    ],
    "linear": [
        partial(linear, num_rows, *shape)
        for shape in [
            *[(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096)],  # LLaMA-2-7B
            *[(15360, 5120), (5120, 5120), (20480, 5120), (5120, 20480), (50272, 5120)],  # OPT-13B
        ]
        for num_rows in (1, 8, 32, 64)
    ],
    "norm": [partial(norms, *shape) for shape in [(16384, 4096), (16384, 5120), (1, 4096), (64, 4096)]],
    "activation": [partial(silu, 8192, 11008), partial(silu, 64, 11008), partial(bias_relu, 8192, 20480)],
    "write_kv": [partial(kv_writes, *shape, 16) for shape in [(8192, 32, 32), (16384, 32, 8), (64, 32, 32)]],
    "embedding": [partial(embedding, 16384, 4096)],
    "sampling": [
        partial(sampling, 128, 32000, has_goal=True),
        partial(sampling, 128, 128256),
        partial(sampling, 1, 32000),
    ],
    "block_copy": [
        partial(block_copies, 64, 8 * 2**20),
        partial(block_copies, 128, 2 * 2**20),
        partial(block_copies, 4096, 64 * 2**10),
    ],
}
