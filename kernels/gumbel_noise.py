"""Gumbel noise from a counter: a function of (seed, position, token id) alone.

Philox 4x32-10 (Salmon et al., 2011) with key = seed (low, high word), counter = (token_id >> 2, position, 0, 0), output
number token_id & 3, as triton.language.philox gives it. A word becomes u in (0, 1), and -log(-log(1 - u)) the noise.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


@triton.jit
def gumbel_noise(seed, position, start, BLOCK: tl.constexpr):
    """Noise of tokens [start, start + BLOCK); start is a multiple of 4."""
    counters = start // 4 + tl.arange(0, BLOCK // 4)
    zeros = tl.zeros([BLOCK // 4], tl.int32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, counters, zeros + position.to(tl.int32), zeros, zeros)
    words = tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), [BLOCK])
    uniform = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - u): near 0 the subtraction would lose the bits that decide the largest noise
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333333333333))
    exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


def philox_reference(seeds: Tensor, positions: Tensor, num_words: int) -> Tensor:
    """Random 32-bit words, as int64 [S, num_words]: word t of row s is that of token t."""
    num_counters = -(-num_words // 4)
    c0 = torch.arange(num_counters, device=seeds.device).expand(len(seeds), -1)
    c1 = (positions & _WORD)[:, None].expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds[:, None] & _WORD, (seeds[:, None] >> 32) & _WORD
    for _ in range(10):
        low, high = c0 * _PHILOX_ROUND[0], c2 * _PHILOX_ROUND[1]  # 64-bit products; their bits survive the wrap
        c0, c1 = (high >> 32 & _WORD) ^ c1 ^ k0, high & _WORD
        c2, c3 = (low >> 32 & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _PHILOX_KEY[0]) & _WORD, (k1 + _PHILOX_KEY[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :num_words]


def gumbel_noise_reference(seeds: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    words = philox_reference(seeds, positions, vocab_size).to(dtype)
    uniform = ((words + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))
