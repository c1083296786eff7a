"""What single tokens' logits get before sampling: a client's `logit_bias`, and minus infinity for `bad_words`.

A word of several tokens forbids its last one where the output ends with the others. The last token of the output may be
on the device only: then it is compared there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble.engine.staging import Array
from ensemble.request import Sequence


@dataclass(frozen=True, slots=True)
class TokenBias:
    """Added to `logits[rows, token_ids]`."""

    rows: Tensor  # [N] int64
    token_ids: Tensor  # [N] int64
    values: Tensor  # [N] fp32

    def apply(self, logits: Tensor) -> None:
        """logits [S, V], updated in place."""
        logits.index_put_((self.rows, self.token_ids), self.values.to(logits.dtype), accumulate=True)


@dataclass(frozen=True, slots=True)
class GatedBias:
    """Forbids `logits[rows, token_ids]` where the token that the step before sampled is the required one."""

    rows: Tensor  # [N] int64
    token_ids: Tensor  # [N] int64
    required: Tensor  # [N] int64
    sources: Tensor  # [N] int64, rows of the step before

    def apply(self, logits: Tensor, sampled_before: Tensor) -> None:
        """logits [S, V], updated in place; sampled_before [S of the step before] int64."""
        is_forbidden = sampled_before.index_select(0, self.sources) == self.required
        values = torch.zeros_like(is_forbidden, dtype=logits.dtype).masked_fill(is_forbidden, -torch.inf)
        logits.index_put_((self.rows, self.token_ids), values, accumulate=True)


def token_bias_arrays(
    sequences: list[Sequence], biased: list[int], unread_rows: Mapping[int, int]
) -> dict[str, dict[str, Array]]:
    """The fields of `TokenBias` ("bias") and `GatedBias` ("gated_bias") for the rows that use them."""
    bias: list[tuple[int, int, float]] = []
    gated: list[tuple[int, int, int, int]] = []
    for row in biased:
        sequence = sequences[row]
        bias += [(row, token_id, value) for token_id, value in sequence.sampling.logit_bias.items()]
        source = unread_rows.get(sequence.request_id)
        for *before, last in sequence.sampling.bad_words:
            if source is None or not before:
                if _ends_with(sequence.output_token_ids, before):
                    bias.append((row, last, -np.inf))
            elif _ends_with(sequence.output_token_ids, before[:-1]):
                gated.append((row, last, before[-1], source))
    groups: dict[str, dict[str, Array]] = {}
    if bias:
        rows, token_ids, values = zip(*bias, strict=True)
        groups["bias"] = {
            "rows": np.array(rows, dtype=np.int64),
            "token_ids": np.array(token_ids, dtype=np.int64),
            "values": np.array(values, dtype=np.float32),
        }
    if gated:
        columns = np.array(gated, dtype=np.int64).T
        names = ("rows", "token_ids", "required", "sources")
        groups["gated_bias"] = {name: np.ascontiguousarray(column) for name, column in zip(names, columns, strict=True)}
    return groups


def _ends_with(token_ids: list[int], end: list[int]) -> bool:
    return not end or token_ids[-len(end) :] == end
