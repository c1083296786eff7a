"""Changes to the logits before sampling: penalties on tokens already there, and tokens that may not come yet.

Bytes moved per row with penalties: V * (2 * itemsize + 5).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import compute_dtype, uses_triton

_BLOCK = 1024


@triton.jit
def _mask_tokens_kernel(
    logits,  # [S, V]
    row_ids,  # [N] int64
    token_ids,  # [N] int64
    logits_stride,
):
    """Grid [N]."""
    index = tl.program_id(0)
    pointer = logits + tl.load(row_ids + index) * logits_stride + tl.load(token_ids + index)
    tl.store(pointer, float("-inf"))


@triton.jit
def _apply_penalties_kernel(
    logits,  # [S, V]
    state_ids,  # [S] int64
    prompt_mask,  # [R, V] bool
    output_counts,  # [R, V] int32
    new_token_ids,  # [S] int64
    sources,  # [S] int64
    sampled_before,  # [B] int64
    repetition_penalties,  # [S] fp32
    presence_penalties,  # [S] fp32
    frequency_penalties,  # [S] fp32
    logits_stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [S, cdiv(V, BLOCK)]."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ids + row)
    if state < 0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    pointers = logits + row * logits_stride + columns
    values = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    counts = tl.load(output_counts + state * V + columns, mask=inside, other=0)
    source = tl.load(sources + row)
    new_token_id = tl.load(sampled_before + source, mask=source >= 0, other=0)
    new_token_id = tl.where(source >= 0, new_token_id, tl.load(new_token_ids + row))
    is_new = columns == new_token_id
    counts += is_new.to(tl.int32)
    tl.store(output_counts + state * V + columns, counts, mask=inside & is_new)
    in_prompt = tl.load(prompt_mask + state * V + columns, mask=inside, other=0)
    repetition = tl.load(repetition_penalties + row)
    repeated = tl.where(values > 0, values / repetition, values * repetition)
    values = tl.where((in_prompt != 0) | (counts > 0), repeated, values)
    values -= tl.load(frequency_penalties + row) * counts.to(tl.float32)
    values -= tl.where(counts > 0, tl.load(presence_penalties + row), 0.0)
    tl.store(pointers, values.to(logits.dtype.element_ty), mask=inside)


def mask_tokens_reference(logits: Tensor, row_ids: Tensor, token_ids: Tensor) -> None:
    logits[row_ids, token_ids] = -torch.inf


def apply_penalties_reference(
    logits: Tensor,
    state_ids: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    new_token_ids: Tensor,
    sources: Tensor,
    sampled_before: Tensor,
    repetition_penalties: Tensor,
    presence_penalties: Tensor,
    frequency_penalties: Tensor,
) -> None:
    rows = (state_ids >= 0).nonzero()[:, 0]
    states = state_ids[rows]
    token_ids, sources = new_token_ids[rows], sources[rows]
    token_ids[sources >= 0] = sampled_before[sources[sources >= 0]]
    is_counted = token_ids >= 0
    output_counts[states[is_counted], token_ids[is_counted]] += 1
    penalised = logits[rows].to(compute_dtype(logits.dtype))
    counts = output_counts[states]
    repetition = repetition_penalties[rows, None].to(penalised.dtype)
    repeated = torch.where(penalised > 0, penalised / repetition, penalised * repetition)
    penalised = torch.where(prompt_mask[states] | (counts > 0), repeated, penalised)
    penalised -= frequency_penalties[rows, None] * counts
    penalised -= presence_penalties[rows, None] * (counts > 0)
    logits[rows] = penalised.to(logits.dtype)


def mask_tokens(
    logits: Tensor,  # [S, V], updated in place
    row_ids: Tensor,  # [N] int64
    token_ids: Tensor,  # [N] int64
) -> None:
    """logits[row_ids, token_ids] = -inf: end-of-sequence tokens before min_tokens."""
    if not uses_triton(logits):
        mask_tokens_reference(logits, row_ids, token_ids)
    elif len(row_ids):
        _mask_tokens_kernel[(len(row_ids),)](logits, row_ids, token_ids, logits.stride(0))


def apply_penalties(
    logits: Tensor,  # [S, V], updated in place
    state_ids: Tensor,  # [S] int64, row of the two tables below; distinct, or -1 = a row without penalties
    prompt_mask: Tensor,  # [R, V] bool, tokens of the prompt
    output_counts: Tensor,  # [R, V] int32, tokens sampled so far; updated in place
    new_token_ids: Tensor,  # [S] int64, a token that is first counted; -1 = none
    sources: Tensor,  # [S] int64, row of sampled_before whose token is first counted instead; -1 = new_token_ids'
    sampled_before: Tensor | None,  # [B] int64; None: there is no source
    repetition_penalties: Tensor,  # [S] fp32, 1 = off
    presence_penalties: Tensor,  # [S] fp32, 0 = off
    frequency_penalties: Tensor,  # [S] fp32, 0 = off
) -> None:
    """Counts the new tokens; then repetition penalty (Keskar et al., 2019) on prompt and output tokens, presence and
    frequency on output tokens."""
    before = new_token_ids if sampled_before is None else sampled_before
    counted = output_counts, new_token_ids, sources, before
    factors = repetition_penalties, presence_penalties, frequency_penalties
    if not uses_triton(logits):
        apply_penalties_reference(logits, state_ids, prompt_mask, *counted, *factors)
        return
    num_rows, vocab_size = logits.shape
    _apply_penalties_kernel[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
        logits, state_ids, prompt_mask, *counted, *factors, logits.stride(0), V=vocab_size, BLOCK=_BLOCK
    )
