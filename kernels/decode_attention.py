"""Attention of one new token per sequence over the paged KV pool.

The time is that of reading the keys and values: sum(context_len) * 2 * Hkv * D * itemsize bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def decode_attention_reference(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    block_size = kv_cache.shape[3]
    max_context_len = int(context_lens.max())
    num_blocks = -(-max_context_len // block_size)
    if num_blocks == 0:
        return torch.zeros_like(q)
    in_use = torch.arange(num_blocks, device=q.device) * block_size < context_lens[:, None]
    block_ids = torch.where(in_use, block_tables[:, :num_blocks], 0)
    k, v = (kv_cache[block_ids, i].transpose(1, 2).flatten(2, 3)[:, :, :max_context_len] for i in (0, 1))
    mask = None
    if int(context_lens.min()) < max_context_len:
        mask = (torch.arange(max_context_len, device=q.device) < context_lens[:, None])[:, None, None]
        v = v.masked_fill(~mask.transpose(2, 3), 0)  # unused slots may hold NaN, and 0 * NaN is NaN
        k = k.masked_fill(~mask.transpose(2, 3), 0)
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, 0]
    if mask is not None:
        out = out.masked_fill((context_lens == 0)[:, None, None], 0)
    return out


def decode_attention(
    q: Tensor,  # [B, Hq, D], any strides with a contiguous last dimension
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D]
    block_tables: Tensor,  # [B, max_blocks] int32; entries beyond a context are not read
    context_lens: Tensor,  # [B] int32, the new token included; 0 marks a padding row, whose output is 0
    scale: float,
    workspace: Tensor | None = None,  # of decode_workspace, for a CUDA graph; None allocates one
) -> Tensor:  # [B, Hq, D]
    """Attention of each sequence's newest token over its whole context. Hq is a multiple of Hkv."""
    return decode_attention_reference(q, kv_cache, block_tables, context_lens, scale)
