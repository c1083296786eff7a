"""Log-probabilities and ranks of the sampled tokens, and log-probabilities of the likeliest ones.

One program per row. The row is read num_top + 1 times, from the L2 cache after the first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import compute_dtype, uses_triton

_BLOCK = 8192


@triton.jit(do_not_specialize=["num_top"])
def _log_probs_kernel(
    logits,  # [S, V]
    token_ids,  # [S] int64
    chosen,  # [S] fp32
    ranks,  # [S] int64
    top_token_ids,  # [S, num_top] int64
    top_log_probs,  # [S, num_top] fp32
    logits_stride,
    num_top,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid [S]. The next likeliest token is the largest (logit, -token id) below the one before."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    num_better = tl.zeros([BLOCK], tl.int32)
    chosen_value = tl.load(row_logits + tl.load(token_ids + row)).to(tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(row_logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(tl.maximum(lane_max, values), -1e30)
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.exp(values - new_max)
        lane_max = new_max
        num_better += (values > chosen_value).to(tl.int32)
    largest = tl.max(lane_max, 0)
    log_sum = tl.log(tl.sum(lane_sum * tl.exp(lane_max - largest), 0))
    tl.store(chosen + row, chosen_value - largest - log_sum)
    tl.store(ranks + row, tl.sum(num_better, 0).to(tl.int64) + 1)

    last_value = float("inf")
    last_id = -1
    for rank in range(num_top):
        lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
        lane_id = tl.full([BLOCK], V, tl.int32)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            values = tl.load(row_logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            is_left = (values < last_value) | ((values == last_value) & (columns > last_id))
            is_better = is_left & (columns < V) & ((values > lane_max) | (lane_id == V))
            lane_max = tl.where(is_better, values, lane_max)
            lane_id = tl.where(is_better, columns, lane_id)
        last_value = tl.max(lane_max, 0)
        last_id = tl.min(tl.where(lane_max == last_value, lane_id, V), 0)
        tl.store(top_token_ids + row * num_top + rank, last_id.to(tl.int64))
        tl.store(top_log_probs + row * num_top + rank, last_value - largest - log_sum)


def log_probs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranks = (logits > logits.gather(1, token_ids[:, None])).sum(dim=1) + 1
    log_probs = logits.to(compute_dtype(logits.dtype)).log_softmax(dim=1)
    chosen = log_probs.gather(1, token_ids[:, None])[:, 0]
    top_log_probs, top_token_ids = log_probs.sort(dim=1, descending=True, stable=True)
    return chosen, ranks, top_token_ids[:, :num_top], top_log_probs[:, :num_top]


def log_probs(
    logits: Tensor,  # [S, V]
    token_ids: Tensor,  # [S] int64
    num_top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [S], [S] int64, [S, num_top] int64, [S, num_top]
    """Log-probabilities of `token_ids`; their ranks, which count the likelier tokens, from 1; then the `num_top`
    likeliest tokens, ties by lower id, with theirs."""
    if not uses_triton(logits):
        return log_probs_reference(logits, token_ids, num_top)
    num_rows, vocab_size = logits.shape
    chosen = logits.new_empty(num_rows, dtype=torch.float32)
    ranks = token_ids.new_empty(num_rows)
    top_token_ids = token_ids.new_empty(num_rows, num_top)
    top_log_probs = logits.new_empty(num_rows, num_top, dtype=torch.float32)
    block = min(triton.next_power_of_2(vocab_size), _BLOCK)
    _log_probs_kernel[(num_rows,)](
        logits,
        token_ids,
        chosen,
        ranks,
        top_token_ids,
        top_log_probs,
        logits.stride(0),
        num_top,
        V=vocab_size,
        BLOCK=block,
        num_warps=16,
    )
    return chosen, ranks, top_token_ids, top_log_probs
