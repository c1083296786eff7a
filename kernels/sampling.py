"""From logits to token ids. Nothing here reads back to the host on a GPU.

Order of operations, that of vLLM: penalties, masking, temperature, min-p, top-k, top-p, then one draw by Gumbel-max:

    token = argmax over the kept tokens of  logit / temperature - log(E),    E exponential, so -log(E) is Gumbel

The noise is a function of (seed, position, token id) alone, independent of batch and slot: Philox 4x32-10 (Salmon et
al., 2011) with key = seed (low, high word), counter = (token_id >> 2, position, 0, 0), output number token_id & 3.

What is kept, with logits after temperature; every rule is a threshold on the logit, so tied tokens share their fate:

    min_p   logits with probability of at least min_p * the largest probability
    top_k   logits of at least the k-th largest
    top_p   of those left, renormalised: logits above which less than top_p of the mass lies; the largest always
"""

import torch
from torch import Tensor

from kernels.backend import compute_dtype

_PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUND = (0xD2511F53, 0xCD9E8D57)
_WORD = 0xFFFFFFFF


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


def keep_threshold_reference(logits: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """The smallest logit that is kept, [S, 1], from logits [S, V] after temperature."""
    vocab_size = logits.shape[1]
    threshold = logits.amax(dim=1, keepdim=True) + min_ps[:, None].to(logits.dtype).log()
    uses_top_k = (top_ks > 0) & (top_ks < vocab_size)
    uses_top_p = top_ps < 1
    if not bool((uses_top_k | uses_top_p).any()):
        return threshold
    descending = logits.sort(dim=1, descending=True).values
    kth = descending.gather(1, torch.where(uses_top_k, top_ks.long() - 1, vocab_size - 1)[:, None])
    threshold = threshold.maximum(kth)
    if bool(uses_top_p.any()):
        probs = descending.masked_fill(descending < threshold, -torch.inf).softmax(dim=1)
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
    scaled = logits[rows].to(compute_dtype(logits.dtype)) / temperatures[rows, None]
    threshold = keep_threshold_reference(scaled, top_ks[rows], top_ps[rows], min_ps[rows])
    noise = gumbel_noise_reference(seeds[rows], positions[rows], logits.shape[1], scaled.dtype)
    token_ids[rows] = (scaled + noise).masked_fill(scaled < threshold, -torch.inf).argmax(dim=1)
    return token_ids


def greedy_reference(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def mask_tokens_reference(logits: Tensor, row_ids: Tensor, token_ids: Tensor) -> None:
    logits[row_ids, token_ids] = -torch.inf


def apply_penalties_reference(
    logits: Tensor,
    state_ids: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    repetition_penalties: Tensor,
    presence_penalties: Tensor,
    frequency_penalties: Tensor,
) -> None:
    rows = (state_ids >= 0).nonzero()[:, 0]
    states = state_ids[rows]
    penalised = logits[rows].to(compute_dtype(logits.dtype))
    counts = output_counts[states]
    repetition = repetition_penalties[rows, None].to(penalised.dtype)
    repeated = torch.where(penalised > 0, penalised / repetition, penalised * repetition)
    penalised = torch.where(prompt_mask[states] | (counts > 0), repeated, penalised)
    penalised -= frequency_penalties[rows, None] * counts
    penalised -= presence_penalties[rows, None] * (counts > 0)
    logits[rows] = penalised.to(logits.dtype)


def count_tokens_reference(output_counts: Tensor, state_ids: Tensor, token_ids: Tensor) -> None:
    kept = state_ids >= 0
    output_counts[state_ids[kept], token_ids[kept]] += 1


def log_probs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = logits.to(compute_dtype(logits.dtype)).log_softmax(dim=1)
    chosen = log_probs.gather(1, token_ids[:, None])[:, 0]
    top_log_probs, top_token_ids = log_probs.sort(dim=1, descending=True, stable=True)
    return chosen, top_token_ids[:, :num_top], top_log_probs[:, :num_top]


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
    return sample_reference(logits, temperatures, top_ks, top_ps, min_ps, seeds, positions)


def greedy(
    logits: Tensor,  # [S, V]
) -> Tensor:  # [S] int64
    """The first of the largest logits of each row: `sample` for batches without a temperature."""
    return greedy_reference(logits)


def mask_tokens(
    logits: Tensor,  # [S, V], updated in place
    row_ids: Tensor,  # [N] int64
    token_ids: Tensor,  # [N] int64
) -> None:
    """logits[row_ids, token_ids] = -inf: end-of-sequence tokens before min_tokens."""
    mask_tokens_reference(logits, row_ids, token_ids)


def apply_penalties(
    logits: Tensor,  # [S, V], updated in place
    state_ids: Tensor,  # [S] int64, row of the two tables below; -1 = a row without penalties
    prompt_mask: Tensor,  # [R, V] bool, tokens of the prompt
    output_counts: Tensor,  # [R, V] int32, tokens sampled so far
    repetition_penalties: Tensor,  # [S] fp32, 1 = off
    presence_penalties: Tensor,  # [S] fp32, 0 = off
    frequency_penalties: Tensor,  # [S] fp32, 0 = off
) -> None:
    """Repetition penalty (Keskar et al., 2019) on prompt and output tokens; presence and frequency on output tokens."""
    apply_penalties_reference(
        logits,
        state_ids,
        prompt_mask,
        output_counts,
        repetition_penalties,
        presence_penalties,
        frequency_penalties,
    )


def count_tokens(
    output_counts: Tensor,  # [R, V] int32, updated in place
    state_ids: Tensor,  # [S] int64, distinct; -1 = skip
    token_ids: Tensor,  # [S] int64
) -> None:
    """Adds one to the count of each row's sampled token."""
    count_tokens_reference(output_counts, state_ids, token_ids)


def log_probs(
    logits: Tensor,  # [S, V]
    token_ids: Tensor,  # [S] int64
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [S], [S, num_top] int64, [S, num_top]
    """Log-probabilities of `token_ids`, then the `num_top` likeliest tokens, ties by lower id, with theirs."""
    return log_probs_reference(logits, token_ids, num_top)
