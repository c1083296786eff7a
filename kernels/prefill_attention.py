"""Causal attention of a batch of prompts (or chunks of prompts) over the paged KV pool.

    context      |<---- cached prefix ---->|<-- new tokens, the queries -->|
    query i sees positions [0, context_len - query_len + i]

Keys and values of the new tokens are in the pool already.
FLOPs: 4 * Hq * D * sum(query_len * (prefix + query_len / 2)).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def prefill_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
) -> Tensor:
    out = q.new_empty(q.shape)
    block_size = kv_cache.shape[3]
    starts: list[int] = cu_seqlens_q.tolist()
    lens: list[int] = context_lens.tolist()
    for seq, (start, end, context_len) in enumerate(zip(starts[:-1], starts[1:], lens, strict=True)):
        query_len = end - start
        if query_len == 0:
            continue
        blocks = block_tables[seq, : -(-context_len // block_size)]
        k, v = (kv_cache[blocks, i].transpose(0, 1).flatten(1, 2)[None, :, :context_len] for i in (0, 1))
        is_causal = query_len == context_len
        mask = None
        if not is_causal and query_len > 1:
            mask = torch.ones(query_len, context_len, dtype=torch.bool, device=q.device).tril(context_len - query_len)
        queries = q[start:end].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            queries, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        out[start:end] = attended[0].transpose(0, 1)
    return out


def prefill_attention(
    q: Tensor,  # [T, Hq, D], any strides with a contiguous last dimension
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [S, max_blocks] int32; entries beyond a context are not read
    cu_seqlens_q: Tensor,  # [S + 1] int32
    context_lens: Tensor,  # [S] int32, total lengths, the new tokens included
    max_seqlen_q: int,
    scale: float,
) -> Tensor:  # [T, Hq, D]
    """Causal attention of the new tokens over everything before them. Hq is a multiple of Hkv; S is at least 1."""
    return prefill_attention_reference(q, kv_cache, block_tables, cu_seqlens_q, context_lens, max_seqlen_q, scale)
