"""From logits to token ids. Nothing here reads back to the host on a GPU.

Order of operations, that of vLLM: penalties (penalties.py), then temperature, min-p, top-k, top-p, then one draw by
Gumbel-max:

    token = argmax over the kept tokens of  logit / temperature - log(E),    E exponential, so -log(E) is Gumbel

The noise is a function of (seed, position, token id) alone (gumbel_noise.py), independent of batch and slot.

What is kept; every rule is a threshold on the logit, so tied tokens share their fate:

    min_p   logits with probability of at least min_p * the largest probability
    top_k   logits of at least the k-th largest
    top_p   of those left, renormalised: logits above which less than top_p of the mass lies; the largest always

The Triton kernel needs no sort. A threshold is the largest value from which on enough lies: k tokens, or top_p of the
mass. It is found on the logits' bits, put in an order that is theirs, two bits a pass over the row, which after the
first pass comes from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import compute_dtype, uses_triton
from kernels.gumbel_noise import gumbel_noise, gumbel_noise_reference

_BLOCK = 8192  # logits of a row in registers at a time
_NUM_WARPS = 16
_LOW_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}  # of a logit in fp32, that tell nothing


@triton.jit
def _load_logits(row_logits, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits [start, start + BLOCK) in fp32, -inf past the end; the sum makes -0 a +0."""
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row_logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32) + 0.0


@triton.jit
def _ordered_bits(values):
    """uint32 in the order of the fp32 values."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _argmax(lane_max, lane_id):
    """The smallest id among the largest values."""
    return tl.min(tl.where(lane_max == tl.max(lane_max, 0), lane_id, 2147483647), 0)


@triton.jit
def _greedy_row(row_logits, V: tl.constexpr, BLOCK: tl.constexpr):
    """(largest logit, its first id)."""
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_id = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        values = _load_logits(row_logits, start, V, BLOCK)
        lane_id = tl.where(values > lane_max, start + tl.arange(0, BLOCK), lane_id)
        lane_max = tl.maximum(values, lane_max)
    return tl.max(lane_max, 0), _argmax(lane_max, lane_id)


@triton.jit
def _mass_from(
    row_logits,
    first,
    second,
    third,
    lowest,
    largest,
    inverse_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_COUNT: tl.constexpr,
):
    """What the logits from the bits `first`, `second` and `third` on weigh, those below `lowest` left out."""
    sums_1 = tl.zeros([BLOCK], tl.float32)
    sums_2 = tl.zeros([BLOCK], tl.float32)
    sums_3 = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        values = _load_logits(row_logits, start, V, BLOCK)
        bits = _ordered_bits(values)
        if BY_COUNT:
            weights = tl.where(bits >= lowest, 1.0, 0.0)
        else:
            weights = tl.where(bits >= lowest, tl.exp((values - largest) * inverse_temperature), 0.0)
        sums_1 += tl.where(bits >= first, weights, 0.0)
        sums_2 += tl.where(bits >= second, weights, 0.0)
        sums_3 += tl.where(bits >= third, weights, 0.0)
    return tl.sum(sums_1, 0), tl.sum(sums_2, 0), tl.sum(sums_3, 0)


@triton.jit
def _threshold(
    row_logits,
    target,
    lowest,
    largest,
    inverse_temperature,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_COUNT: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """The largest bits from which on the logits weigh `target`."""
    bits = tl.zeros([], tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _ in range((32 - LOW_BITS + 1) // 2):
        mass_1, mass_2, mass_3 = _mass_from(
            row_logits,
            bits + unit,
            bits + 2 * unit,
            bits + 3 * unit,
            lowest,
            largest,
            inverse_temperature,
            V,
            BLOCK,
            BY_COUNT,
        )
        digit = (mass_1 >= target).to(tl.uint32) + (mass_2 >= target).to(tl.uint32) + (mass_3 >= target).to(tl.uint32)
        bits += digit * unit
        unit = unit >> 2
    return bits


@triton.jit
def _greedy_kernel(
    logits,  # [S, V]
    out,  # [S] int64
    logits_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [S]."""
    row = tl.program_id(0).to(tl.int64)
    _, token_id = _greedy_row(logits + row * logits_stride, V, BLOCK)
    tl.store(out + row, token_id.to(tl.int64))


@triton.jit
def _sample_kernel(
    logits,  # [S, V]
    temperatures,  # [S] fp32
    top_ks,  # [S] int32
    top_ps,  # [S] fp32
    min_ps,  # [S] fp32
    seeds,  # [S] int64
    positions,  # [S] int64
    out,  # [S] int64
    logits_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    LOW_BITS: tl.constexpr,
):
    """Grid [S]. Each step that a row does not ask for is skipped."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    largest, token_id = _greedy_row(row_logits, V, BLOCK)
    temperature = tl.load(temperatures + row)
    if temperature > 0.0:
        inverse_temperature = 1.0 / temperature
        nothing = tl.zeros([], tl.uint32)
        lowest = _ordered_bits(largest + temperature * tl.log(tl.load(min_ps + row)))
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < V):
            kth = _threshold(row_logits, top_k.to(tl.float32), nothing, largest, 1.0, V, BLOCK, True, LOW_BITS)
            lowest = tl.maximum(lowest, kth)
        top_p = tl.load(top_ps + row)
        if top_p < 1.0:
            mass, _, _ = _mass_from(
                row_logits, nothing, nothing, nothing, lowest, largest, inverse_temperature, V, BLOCK, False
            )
            pivot = _threshold(
                row_logits,
                tl.maximum(top_p * mass, 1e-30),
                lowest,
                largest,
                inverse_temperature,
                V,
                BLOCK,
                False,
                LOW_BITS,
            )
            lowest = tl.maximum(lowest, pivot)
        seed, position = tl.load(seeds + row), tl.load(positions + row)
        lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
        lane_id = tl.zeros([BLOCK], tl.int32) + token_id
        for start in range(0, V, BLOCK):
            values = _load_logits(row_logits, start, V, BLOCK)
            perturbed = values * inverse_temperature + gumbel_noise(seed, position, start, BLOCK)
            perturbed = tl.where(_ordered_bits(values) >= lowest, perturbed, float("-inf"))
            lane_id = tl.where(perturbed > lane_max, start + tl.arange(0, BLOCK), lane_id)
            lane_max = tl.maximum(perturbed, lane_max)
        token_id = _argmax(lane_max, lane_id)
    tl.store(out + row, token_id.to(tl.int64))


def keep_threshold_reference(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
) -> Tensor:
    """The smallest logit that is kept, [S, 1]."""
    vocab_size = logits.shape[1]
    temperatures = temperatures[:, None].to(logits.dtype)
    threshold = logits.amax(dim=1, keepdim=True) + temperatures * min_ps[:, None].to(logits.dtype).log()
    uses_top_k = (top_ks > 0) & (top_ks < vocab_size)
    uses_top_p = top_ps < 1
    if not bool((uses_top_k | uses_top_p).any()):
        return threshold
    descending = logits.sort(dim=1, descending=True).values
    kth = descending.gather(1, torch.where(uses_top_k, top_ks.long() - 1, vocab_size - 1)[:, None])
    threshold = threshold.maximum(kth)
    if bool(uses_top_p.any()):
        probs = (descending.masked_fill(descending < threshold, -torch.inf) / temperatures).softmax(dim=1)
        mass_before = probs.cumsum(dim=1) - probs
        num_kept = (mass_before < top_ps[:, None]).sum(dim=1, keepdim=True).clamp(min=1)
        pivot = descending.gather(1, num_kept - 1)
        threshold = torch.where(uses_top_p[:, None], threshold.maximum(pivot), threshold)
    return threshold


def sample_reference(
    logits: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    token_ids = logits.argmax(dim=1)
    rows = temperatures.nonzero()[:, 0]
    if len(rows) == 0:
        return token_ids
    drawn = logits[rows].to(compute_dtype(logits.dtype))
    threshold = keep_threshold_reference(drawn, temperatures[rows], top_ks[rows], top_ps[rows], min_ps[rows])
    noise = gumbel_noise_reference(seeds[rows], positions[rows], logits.shape[1], drawn.dtype)
    perturbed = drawn * temperatures[rows, None].to(drawn.dtype).reciprocal() + noise
    token_ids[rows] = perturbed.masked_fill(drawn < threshold, -torch.inf).argmax(dim=1)
    return token_ids


def greedy_reference(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def sample(
    logits: Tensor,  # [S, V]
    temperatures: Tensor,  # [S] fp32, 0 = greedy
    top_ks: Tensor,  # [S] int32, 0 = off
    top_ps: Tensor,  # [S] fp32, 1 = off
    min_ps: Tensor,  # [S] fp32, 0 = off
    seeds: Tensor,  # [S] int64, the bits of a uint64
    positions: Tensor,  # [S] int64, of the token drawn
) -> Tensor:  # [S] int64
    """One token id per row. Greedy rows take the first of the largest logits. Every row has a finite logit."""
    if not uses_triton(logits):
        return sample_reference(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions)
    num_rows, vocab_size = logits.shape
    out = seeds.new_empty(num_rows)
    _sample_kernel[(num_rows,)](
        logits,
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        seeds,
        positions,
        out,
        logits.stride(0),
        V=vocab_size,
        BLOCK=min(triton.next_power_of_2(vocab_size), _BLOCK),
        LOW_BITS=_LOW_BITS[logits.dtype],
        num_warps=_NUM_WARPS,
    )
    return out


def greedy(
    logits: Tensor,  # [S, V]
) -> Tensor:  # [S] int64
    """The first of the largest logits of each row: `sample` for batches without a temperature."""
    if not uses_triton(logits):
        return greedy_reference(logits)
    num_rows, vocab_size = logits.shape
    out = logits.new_empty(num_rows, dtype=torch.int64)
    block = min(triton.next_power_of_2(vocab_size), _BLOCK)
    _greedy_kernel[(num_rows,)](logits, out, logits.stride(0), V=vocab_size, BLOCK=block, num_warps=_NUM_WARPS)
    return out
