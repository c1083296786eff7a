"""`Batch`, what a scheduler asks of one step, and its tensors.

    rows    |<------ prefill rows ------>|<- decode rows ->|       row = a sequence that takes part
    tokens  |<- chunk ->|<-- chunk -->|..|<- 1 ->|<- 1 ->|..       the order of every tensor below

A prefill row that reaches the end of its prompt, and every decode row, samples one token.

A step may be prepared while the step before it still runs. Its decode rows then have one token more than their
sequences know of: an unread token, which so far is on the device only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ensemble.engine.sampler import SamplingInput, Unread, sampling_input, unread_arrays
from ensemble.engine.staging import Array, Staging
from ensemble.models.layers import AttentionMetadata
from ensemble.request import Sequence


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Positions [start, start + length) of what is to be prefilled; the KV of everything before them is in the pool."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def finishes_prompt(self) -> bool:
        return self.end == self.sequence.request.prefill_len


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: chunks of prompts, and sequences whose last token is to be followed by another."""

    prefills: list[PrefillRow] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in the order in which the runner returns the tokens."""
        return [row.sequence for row in self.prefills if row.finishes_prompt] + self.decodes


@dataclass(frozen=True, slots=True)
class StepInput:
    """A batch as tensors on the device."""

    token_ids: Tensor  # [T] int64
    unread: Unread | None  # what is still to be filled into token_ids
    positions: Tensor  # [T] int64
    attention: AttentionMetadata
    sampled_tokens: Tensor  # [S] int64, indices into the T tokens
    sampling: SamplingInput


def prepare_step(
    batch: Batch,
    block_size: int,
    sampling: dict[str, dict[str, Array]],  # `sampling_arrays`; none where nothing is sampled
    staging: Staging,
    unread_rows: Mapping[int, int],  # request_id |-> row among the tokens sampled by the step before
) -> StepInput:
    """Builds a step's tensors; on a GPU they come in one copy from page-locked memory."""
    tensors = staging.to_device(token_arrays(batch, block_size, unread_rows) | sampling)
    tokens = tensors["tokens"]
    return StepInput(
        token_ids=tokens["token_ids"],
        unread=Unread(**tensors["unread"]) if "unread" in tensors else None,
        positions=tokens["positions"],
        sampled_tokens=tokens["sampled_tokens"],
        attention=AttentionMetadata(
            num_prefills=len(batch.prefills),
            num_prefill_tokens=sum(row.length for row in batch.prefills),
            slot_mapping=tokens["slot_mapping"],
            cu_seqlens_q=tokens["cu_seqlens_q"],
            context_lens=tokens["context_lens"],
            block_tables=tokens["block_tables"],
        ),
        sampling=sampling_input(tensors),
    )


def token_arrays(batch: Batch, block_size: int, unread_rows: Mapping[int, int]) -> dict[str, dict[str, Array]]:
    """`tokens` of a step, and which of their ids are `unread`."""
    lengths = [row.length for row in batch.prefills] + [1] * len(batch.decodes)
    cu_seqlens = np.cumsum([0, *lengths])
    num_prefills, num_tokens = len(batch.prefills), int(cu_seqlens[-1])
    num_prefill_tokens = num_tokens - len(batch.decodes)
    sequences = [row.sequence for row in batch.prefills] + batch.decodes
    context_lens = [row.end for row in batch.prefills]
    context_lens += [sequence.num_tokens + (sequence.request_id in unread_rows) for sequence in batch.decodes]
    block_tables = np.zeros((len(sequences), -(-max(context_lens) // block_size)), dtype=np.int32)
    for table, sequence, context_len in zip(block_tables, sequences, context_lens, strict=True):
        num_blocks = -(-context_len // block_size)
        table[:num_blocks] = sequence.block_ids[:num_blocks]

    token_ids = np.empty(num_tokens, dtype=np.int64)
    positions = np.empty(num_tokens, dtype=np.int64)
    for row, first in zip(batch.prefills, cu_seqlens.tolist(), strict=False):
        token_ids[first : first + row.length] = row.sequence.token_ids(row.start, row.length)
        positions[first : first + row.length] = np.arange(row.start, row.end)
    token_ids[num_prefill_tokens:] = [sequence.last_token_id for sequence in batch.decodes]
    positions[num_prefill_tokens:] = np.array(context_lens[num_prefills:], dtype=np.int64) - 1

    row_of_token = np.repeat(np.arange(len(sequences)), lengths)
    blocks = block_tables[row_of_token, positions // block_size].astype(np.int64)
    ends = [end - 1 for row, end in zip(batch.prefills, cu_seqlens[1:].tolist(), strict=False) if row.finishes_prompt]
    groups = {
        "tokens": {
            "token_ids": token_ids,
            "positions": positions,
            "slot_mapping": blocks * block_size + positions % block_size,
            "cu_seqlens_q": cu_seqlens.astype(np.int32),
            "context_lens": np.array(context_lens, dtype=np.int32),
            "block_tables": block_tables,
            "sampled_tokens": np.array([*ends, *range(num_prefill_tokens, num_tokens)], dtype=np.int64),
        }
    }
    unread = [
        (num_prefill_tokens + row, unread_rows[sequence.request_id])
        for row, sequence in enumerate(batch.decodes)
        if sequence.request_id in unread_rows
    ]
    if unread:
        groups["unread"] = unread_arrays(unread)
    return groups
