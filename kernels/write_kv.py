"""New keys and values into the paged KV pool, for LLaMA fused with the rotary embedding of queries and keys, and for
Qwen3 also with the RMSNorm of each query and key head before it.

    slot = block_id * block_size + offset in the block; slot -1 is skipped (padding rows of a CUDA graph)
    kv_cache [num_blocks, 2, num_kv_heads, block_size, head_dim], one layer's view of the pool; 0 = K, 1 = V

Bytes moved per token: 4 * Hkv * D * itemsize, with rope 2 * (Hq + 2 * Hkv) * D * itemsize.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import uses_triton
from kernels.rms_norm import rms_norm_reference
from kernels.rope import cos_and_sin, turned_reference

_HEADS_PER_PROGRAM = 16


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights of the RMSNorm of every query head, and of every key head."""

    query: Tensor  # [D]
    key: Tensor  # [D]
    eps: float


@triton.jit
def _write_kv_kernel(
    k,  # [T, Hkv, D]
    v,  # [T, Hkv, D]
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    slot_mapping,  # [T] int64
    k_stride,
    v_stride,
    block_stride,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid [T, cdiv(Hkv, BLOCK_H)]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < NUM_KV_HEADS) & (dims < D)
    target = kv_cache + slot // BLOCK_SIZE * block_stride + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * D + dims
    key = tl.load(k + token * k_stride + heads * D + dims, mask=inside)
    value = tl.load(v + token * v_stride + heads * D + dims, mask=inside)
    tl.store(target, key, mask=inside)
    tl.store(target + NUM_KV_HEADS * BLOCK_SIZE * D, value, mask=inside)


@triton.jit
def _head_norm(first, second, weight, dims, eps, dtype: tl.constexpr, HALF: tl.constexpr):
    """RMSNorm of heads held as two halves, [BLOCK_H, BLOCK_D / 2] fp32 each, with the roundings of rms_norm.py."""
    rstd = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(weight + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    second_weight = tl.load(weight + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)
    first = ((first * rstd).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * rstd).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    return first, second


@triton.jit
def _rope_and_write_kv_kernel(
    q,  # [T, Hq, D], updated in place
    k,  # [T, Hkv, D]
    v,  # [T, Hkv, D]
    cos_sin,  # [max_positions, D] fp32
    positions,  # [T] int64
    kv_cache,  # [num_blocks, 2, Hkv, BLOCK_SIZE, D]
    slot_mapping,  # [T] int64
    q_weight,  # [D], read if HAS_NORMS
    k_weight,  # [D], likewise
    q_stride,
    k_stride,
    v_stride,
    block_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Grid [T, cdiv(Hq, BLOCK_H) + cdiv(Hkv, BLOCK_H)]: query heads first, then key and value heads."""
    HALF: tl.constexpr = D // 2
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D // 2)[None, :]
    angle = cos_sin + tl.load(positions + token) * D + dims
    cos = tl.load(angle, mask=dims < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=dims < HALF, other=0.0)
    if part < QUERY_PROGRAMS:
        heads = part * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        inside = (heads < NUM_HEADS) & (dims < HALF)
        pointers = q + token * q_stride + heads * D + dims
        first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORMS:
            first, second = _head_norm(first, second, q_weight, dims, eps, q.dtype.element_ty, HALF)
        tl.store(pointers, (first * cos - second * sin).to(q.dtype.element_ty), mask=inside)
        tl.store(pointers + HALF, (second * cos + first * sin).to(q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            heads = (part - QUERY_PROGRAMS) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
            inside = (heads < NUM_KV_HEADS) & (dims < HALF)
            pointers = k + token * k_stride + heads * D + dims
            first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(pointers + HALF, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORMS:
                first, second = _head_norm(first, second, k_weight, dims, eps, k.dtype.element_ty, HALF)
            target = kv_cache + slot // BLOCK_SIZE * block_stride + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * D + dims
            tl.store(target, (first * cos - second * sin).to(k.dtype.element_ty), mask=inside)
            tl.store(target + HALF, (second * cos + first * sin).to(k.dtype.element_ty), mask=inside)
            pointers = v + token * v_stride + heads * D + dims
            target += NUM_KV_HEADS * BLOCK_SIZE * D
            tl.store(target, tl.load(pointers, mask=inside), mask=inside)
            tl.store(target + HALF, tl.load(pointers + HALF, mask=inside), mask=inside)


def write_kv_reference(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = kv_cache.shape[3]
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    kv_cache[slot_mapping // block_size, :, :, slot_mapping % block_size] = torch.stack((k, v), dim=1)


def rope_and_write_kv_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    if norms is not None:
        q.copy_(rms_norm_reference(q, norms.query, norms.eps))
        k = rms_norm_reference(k, norms.key, norms.eps)
    cos, sin = cos_and_sin(cos_sin, positions, q.dtype)
    q.copy_(turned_reference(q, cos, sin))
    write_kv_reference(turned_reference(k, cos, sin), v, kv_cache, slot_mapping)


def write_kv(
    k: Tensor,  # [T, Hkv, D], any row stride, heads side by side
    v: Tensor,  # [T, Hkv, D], likewise
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D], updated in place
    slot_mapping: Tensor,  # [T] int64, -1 = skip
) -> None:
    """Stores token i's key and value in slot `slot_mapping[i]`. Slots are distinct."""
    if not uses_triton(k):
        write_kv_reference(k, v, kv_cache, slot_mapping)
        return
    num_tokens, num_kv_heads, head_dim = k.shape
    _write_kv_kernel[(num_tokens, triton.cdiv(num_kv_heads, _HEADS_PER_PROGRAM))](
        k,
        v,
        kv_cache,
        slot_mapping,
        k.stride(0),
        v.stride(0),
        kv_cache.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=kv_cache.shape[3],
        BLOCK_H=_HEADS_PER_PROGRAM,
        BLOCK_D=triton.next_power_of_2(head_dim),
    )


def rope_and_write_kv(
    q: Tensor,  # [T, Hq, D], rotated in place; any row stride, heads side by side
    k: Tensor,  # [T, Hkv, D], likewise, left as it is
    v: Tensor,  # [T, Hkv, D], likewise
    cos_sin: Tensor,  # [max_positions, D] fp32, of rope.rotary_table
    positions: Tensor,  # [T] int64
    kv_cache: Tensor,  # [num_blocks, 2, Hkv, block_size, D], updated in place
    slot_mapping: Tensor,  # [T] int64, -1 = skip
    norms: HeadNorms | None = None,  # applied to queries and keys before they are rotated
) -> None:
    """Rotates the queries in place and stores the rotated keys, and the values, in the slots of `slot_mapping`."""
    if not uses_triton(q):
        rope_and_write_kv_reference(q, k, v, cos_sin, positions, kv_cache, slot_mapping, norms)
        return
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    num_programs = triton.cdiv(num_heads, _HEADS_PER_PROGRAM) + triton.cdiv(num_kv_heads, _HEADS_PER_PROGRAM)
    _rope_and_write_kv_kernel[(num_tokens, num_programs)](
        q,
        k,
        v,
        cos_sin,
        positions,
        kv_cache,
        slot_mapping,
        q if norms is None else norms.query,
        k if norms is None else norms.key,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        kv_cache.stride(0),
        0.0 if norms is None else norms.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=kv_cache.shape[3],
        BLOCK_H=_HEADS_PER_PROGRAM,
        BLOCK_D=triton.next_power_of_2(head_dim),
        HAS_NORMS=norms is not None,
    )
