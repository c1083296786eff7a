"""The next token of each row from its logits, as its request's sampling parameters say.

What a step needs follows from the sequences, so that a sequence can move between engines at any step. Only how often
penalised sequences have which tokens is kept (penalties.py), and counted again where it is not known.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ensemble.engine.penalties import NewRows, NewTokens, Penalties, PenaltyTables
from ensemble.engine.token_bias import GatedBias, TokenBias, token_bias_arrays
from ensemble.request import Sequence
from kernels.penalties import mask_tokens
from kernels.sampling import greedy, sample

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Unread:
    """Tokens that so far are on the device only: `target[slots] = sampled by the step before[sources]`."""

    slots: Tensor  # [U] int64
    sources: Tensor  # [U] int64

    def fill(self, target: Tensor, sampled_before: Tensor) -> None:
        target.index_copy_(0, self.slots, sampled_before.index_select(0, self.sources))


@dataclass(frozen=True, slots=True)
class Draw:
    """Columns of the rows' parameters; a row of temperature 0 is greedy."""

    temperatures: Tensor  # [S] fp32
    top_ks: Tensor  # [S] int32
    top_ps: Tensor  # [S] fp32
    min_ps: Tensor  # [S] fp32
    seeds: Tensor  # [S] int64, the bits of a uint64
    positions: Tensor  # [S] int64, index of the drawn token in its sequence


@dataclass(frozen=True, slots=True)
class Mask:
    """Tokens that may not be sampled."""

    rows: Tensor  # [N] int64
    token_ids: Tensor  # [N] int64


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """How S rows are sampled. What no row uses is None; without a draw every row is greedy."""

    draw: Draw | None
    mask: Mask | None
    bias: TokenBias | None
    gated_bias: GatedBias | None
    penalties: Penalties | None  # None beside new tokens: those of the step before
    new_rows: NewRows | None
    new_tokens: NewTokens | None  # of a step with penalties
    asked: Tensor | None  # [R] int64, rows whose log-probabilities are wanted


def sample_tokens(
    logits: Tensor,  # [S, V], may be overwritten
    inputs: SamplingInput,
    tables: PenaltyTables,
    sampled_before: Tensor | None,  # tokens of the step before, for those that are unread
) -> Tensor:  # [S] int64
    """One token id per row."""
    if inputs.bias is not None:
        inputs.bias.apply(logits)
    if inputs.gated_bias is not None and sampled_before is not None:
        inputs.gated_bias.apply(logits, sampled_before)
    if inputs.new_tokens is not None:
        tables.apply(logits, inputs.penalties, inputs.new_rows, inputs.new_tokens, sampled_before)
    if inputs.mask is not None:
        mask_tokens(logits, inputs.mask.rows, inputs.mask.token_ids)
    draw = inputs.draw
    if draw is None:
        return greedy(logits)
    return sample(logits, draw.temperatures, draw.top_ks, draw.top_ps, draw.min_ps, draw.seeds, draw.positions)


def sampling_arrays(
    sequences: list[Sequence],
    eos_token_ids: frozenset[int],
    tables: PenaltyTables,
    unread_rows: Mapping[int, int],  # request_id |-> row among the tokens sampled by the step before
) -> dict[str, dict[str, Array]]:
    """The fields of `SamplingInput`, as far as a sequence uses them."""
    groups: dict[str, dict[str, Array]] = {}
    params = [sequence.sampling for sequence in sequences]
    biased = [row for row, p in enumerate(params) if p.logit_bias or p.bad_words]
    if biased:
        groups |= token_bias_arrays(sequences, biased, unread_rows)
    if any(p.temperature > 0 for p in params):
        groups["draw"] = {
            "temperatures": np.array([p.temperature for p in params], dtype=np.float32),
            "top_ks": np.array([p.top_k for p in params], dtype=np.int32),
            "top_ps": np.array([p.top_p for p in params], dtype=np.float32),
            "min_ps": np.array([p.min_p for p in params], dtype=np.float32),
            "seeds": np.array([p.seed for p in params], dtype=np.uint64).view(np.int64),
            "positions": np.array([s.num_tokens + (s.request_id in unread_rows) for s in sequences], dtype=np.int64),
        }
    num_outputs = [len(s.output_token_ids) + (s.request_id in unread_rows) for s in sequences]
    masked = [
        (row, token_id)
        for row, p in enumerate(params)
        if num_outputs[row] < p.min_tokens
        for token_id in sorted(eos_token_ids.union(p.stop_token_ids))
    ]
    if masked:
        rows, token_ids = np.array(masked, dtype=np.int64).T
        groups["mask"] = {"rows": np.ascontiguousarray(rows), "token_ids": np.ascontiguousarray(token_ids)}
    asked = [row for row, p in enumerate(params) if p.num_logprobs is not None]
    if asked:
        groups["asked"] = {"rows": np.array(asked, dtype=np.int64)}
    return groups | tables.arrays(sequences, num_outputs, unread_rows)


def sampling_input(tensors: dict[str, dict[str, Tensor]]) -> SamplingInput:
    """From the groups of `sampling_arrays`, brought to the device."""
    return SamplingInput(
        draw=Draw(**tensors["draw"]) if "draw" in tensors else None,
        mask=Mask(**tensors["mask"]) if "mask" in tensors else None,
        bias=TokenBias(**tensors["bias"]) if "bias" in tensors else None,
        gated_bias=GatedBias(**tensors["gated_bias"]) if "gated_bias" in tensors else None,
        penalties=Penalties(**tensors["penalties"]) if "penalties" in tensors else None,
        new_rows=NewRows(**tensors["new_rows"]) if "new_rows" in tensors else None,
        new_tokens=NewTokens(**tensors["new_tokens"]) if "new_tokens" in tensors else None,
        asked=tensors["asked"]["rows"] if "asked" in tensors else None,
    )


def unread_arrays(slots_and_sources: list[tuple[int, int]]) -> dict[str, Array]:
    """The fields of `Unread`."""
    slots, sources = np.array(slots_and_sources, dtype=np.int64).T
    return {"slots": np.ascontiguousarray(slots), "sources": np.ascontiguousarray(sources)}
