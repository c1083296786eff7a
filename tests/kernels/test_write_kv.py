import pytest
import torch
from oracle import check
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from kernels.rope import rotary_table
from kernels.write_kv import HeadNorms, rope_and_write_kv, write_kv

BLOCK_SIZE = 16
SLOTS = [35, -1, 0, 79, 16]  # shuffled; one padding row
POSITIONS = [3, 0, 0, 70, 511]
HEADS = [(4, 4, 64), (9, 3, 80), (10, 2, 96), (8, 1, 128)]


def new_cache(num_kv_heads, head_dim, dtype, device):
    return torch.full((5, 2, num_kv_heads, BLOCK_SIZE, head_dim), torch.nan, dtype=dtype, device=device)


def new_qkv(num_heads, num_kv_heads, head_dim, dtype, device):
    """q, k, v as views of one projection's output."""
    torch.manual_seed(0)
    qkv = torch.randn(len(SLOTS), (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, device=device)
    heads = qkv.unflatten(1, (-1, head_dim))
    return heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)


def read_slots(kv_cache):
    """Keys and values in the order of SLOTS, [2, T - 1, Hkv, D], the padding row left out."""
    slots = torch.tensor([slot for slot in SLOTS if slot >= 0], device=kv_cache.device)
    return kv_cache[slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE].transpose(0, 1)


def num_written(kv_cache):
    return int((~kv_cache.isnan()).any(dim=-1).sum())


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_write_kv_fills_the_slots_and_nothing_else(num_heads, num_kv_heads, head_dim, dtype, device):
    kv_cache = new_cache(num_kv_heads, head_dim, dtype, device)
    _, k, v = new_qkv(num_heads, num_kv_heads, head_dim, dtype, device)
    write_kv(k, v, kv_cache, torch.tensor(SLOTS, device=device))
    kept = [0, 2, 3, 4]
    assert torch.equal(read_slots(kv_cache), torch.stack([k[kept], v[kept]]))
    assert num_written(kv_cache) == 2 * 4 * num_kv_heads


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_rope_and_write_kv_rotates_as_transformers_does(num_heads, num_kv_heads, head_dim, dtype, device):
    config = LlamaConfig(hidden_size=num_heads * head_dim, num_attention_heads=num_heads, rope_theta=10000.0)
    rotary = LlamaRotaryEmbedding(config).to(device)
    kv_cache = new_cache(num_kv_heads, head_dim, dtype, device)
    q, k, v = new_qkv(num_heads, num_kv_heads, head_dim, dtype, device)
    positions = torch.tensor(POSITIONS, device=device)
    kept = [0, 2, 3, 4]

    def rotate(x, which):
        cos, sin = rotary(x, positions[None])
        return apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)[which][0].transpose(
            0, 1
        )

    before = q.clone(), k.clone()
    table = rotary_table(rotary.inv_freq, 512)
    rope_and_write_kv(q, k, v, table, positions, kv_cache, torch.tensor(SLOTS, device=device))
    check(q, lambda x: rotate(x, 0), before[0])
    assert torch.equal(k, before[1])
    keys, values = read_slots(kv_cache)
    check(keys, lambda x: rotate(x, 1)[kept], before[1])
    assert torch.equal(values, v[kept])
    assert num_written(kv_cache) == 2 * 4 * num_kv_heads


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_heads_are_normed_and_rotated_as_in_qwen3(num_heads, num_kv_heads, head_dim, dtype, device):
    config = LlamaConfig(hidden_size=num_heads * head_dim, num_attention_heads=num_heads, rope_theta=10000.0)
    rotary = LlamaRotaryEmbedding(config).to(device)
    kv_cache = new_cache(num_kv_heads, head_dim, dtype, device)
    q, k, v = new_qkv(num_heads, num_kv_heads, head_dim, dtype, device)
    positions = torch.tensor(POSITIONS, device=device)
    weights = torch.rand(2, head_dim, device=device).to(dtype) + 0.5
    kept = [0, 2, 3, 4]

    def norm_and_rotate(x, weight):
        norm = Qwen3RMSNorm(head_dim, eps=1e-2)
        norm.weight.data = weight
        x = norm(x).transpose(0, 1)[None]
        return apply_rotary_pos_emb(x, x, *rotary(x, positions[None]))[0][0].transpose(0, 1)

    before = q.clone(), k.clone()
    table, slots = rotary_table(rotary.inv_freq, 512), torch.tensor(SLOTS, device=device)
    rope_and_write_kv(q, k, v, table, positions, kv_cache, slots, HeadNorms(weights[0], weights[1], 1e-2))
    check(q, norm_and_rotate, before[0], weights[0])
    assert torch.equal(k, before[1])
    keys, values = read_slots(kv_cache)
    check(keys, lambda x, weight: norm_and_rotate(x, weight)[kept], before[1], weights[1])
    assert torch.equal(values, v[kept])
    assert num_written(kv_cache) == 2 * 4 * num_kv_heads


@pytest.mark.gpu
@pytest.mark.usefixtures("free_gpu_memory")
def test_slots_beyond_2_31_elements(device):
    num_kv_heads, head_dim = 8, 128
    num_blocks = 2**31 // (2 * num_kv_heads * BLOCK_SIZE * head_dim) + 2
    kv_cache = torch.zeros(num_blocks, 2, num_kv_heads, BLOCK_SIZE, head_dim, dtype=torch.float16, device=device)
    k, v = torch.randn(2, 1, num_kv_heads, head_dim, dtype=torch.float16, device=device)
    write_kv(k, v, kv_cache, torch.tensor([num_blocks * BLOCK_SIZE - 1], device=device))
    assert torch.equal(kv_cache[-1, 0, :, -1], k[0])
    assert torch.equal(kv_cache[-1, 1, :, -1], v[0])
