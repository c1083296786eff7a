"""New keys and values into the paged KV pool, for LLaMA fused with the rotary embedding of queries and keys.

    slot = block_id * block_size + offset in the block; slot -1 is skipped (padding rows of a CUDA graph)
    kv_cache [num_blocks, 2, num_kv_heads, block_size, head_dim], one layer's view of the pool; 0 = K, 1 = V

Bytes moved per token: 4 * Hkv * D * itemsize, with rope 2 * (Hq + 2 * Hkv) * D * itemsize.
"""

from torch import Tensor

from kernels.rope import apply_rope_reference


def write_kv_reference(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_ids = slot_mapping // block_size
    offsets = slot_mapping % block_size
    kv_cache[:, 0][block_ids, :, offsets] = k
    kv_cache[:, 1][block_ids, :, offsets] = v


def rope_and_write_kv_reference(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    q.copy_(apply_rope_reference(q, cos_sin, positions))
    write_kv_reference(apply_rope_reference(k, cos_sin, positions), v, kv_cache, slot_mapping)


def write_kv(
    k: Tensor,  # [T, Hkv, D], any strides with a contiguous last dimension
    v: Tensor,  # [T, Hkv, D], likewise
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D], updated in place
    slot_mapping: Tensor,  # [T] int64, -1 = skip
) -> None:
    """Stores token i's key and value in slot `slot_mapping[i]`. Slots are distinct."""
    write_kv_reference(k, v, kv_cache, slot_mapping)


def rope_and_write_kv(
    q: Tensor,  # [T, Hq, D], rotated in place; any strides with a contiguous last dimension
    k: Tensor,  # [T, Hkv, D], likewise, left as it is
    v: Tensor,  # [T, Hkv, D], likewise
    cos_sin: Tensor,  # [max_positions, D] fp32, of rope.rotary_table
    positions: Tensor,  # [T] int64
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D], updated in place
    slot_mapping: Tensor,  # [T] int64, -1 = skip
) -> None:
    """Rotates the queries in place and stores the rotated keys, and the values, in the slots of `slot_mapping`."""
    rope_and_write_kv_reference(q, k, v, cos_sin, positions, kv_cache, slot_mapping)
