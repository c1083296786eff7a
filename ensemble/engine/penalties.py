"""Penalties on tokens already there. What tokens a sequence has is counted on the device, and kept from step to step:
counting 256 sequences of 4,000 tokens anew costs the host tens of milliseconds.

A sequence keeps a row of the tables while others do not need it. One that comes without a row, from another engine or
after its row has gone, is counted once from its tokens; so nothing has to travel with a sequence that moves.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble.engine.staging import Array
from ensemble.request import SamplingParams, Sequence
from kernels.penalties import apply_penalties

_MIN_ROWS = 16
_NOT_COUNTED = -2  # in place of the number of tokens counted: more than one short of any


@dataclass(frozen=True, slots=True)
class Penalties:
    """Columns of a step's S rows."""

    state_ids: Tensor  # [S] int64, row of the tables; -1 = without penalties
    repetition: Tensor  # [S] fp32
    presence: Tensor  # [S] fp32
    frequency: Tensor  # [S] fp32


@dataclass(frozen=True, slots=True)
class NewRows:
    """Rows that are counted from all their tokens."""

    state_ids: Tensor  # [R] int64
    prompt_state_ids: Tensor  # [P] int64, of each token of all their prompts
    prompt_token_ids: Tensor  # [P] int64
    output_state_ids: Tensor  # [N] int64
    output_token_ids: Tensor  # [N] int64


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What is counted in each of a step's S rows before it is penalised: one token, or none."""

    token_ids: Tensor  # [S] int64; -1 = none
    sources: Tensor  # [S] int64, row of the step before whose token is counted instead; -1 = it is not


class PenaltyTables:
    """The tokens of sequences with penalties, on the device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        self._rows: dict[int, int] = {}  # request_id |-> row, the least recently used first
        self._free: list[int] = []
        self._sequences: list[Sequence | None] = []  # of each row
        self._num_outputs = np.zeros(0, dtype=np.int64)  # counted in each row
        self._step: list[Sequence] = []  # the sequences of the step before
        self._penalised: list[int] = []  # those of them with penalties, and their rows of the tables
        self._state_ids = np.zeros(0, dtype=np.int64)
        self._penalties: Penalties | None = None  # the step's, on the device

    def arrays(
        self,
        sequences: list[Sequence],
        num_outputs: list[int],  # of each, unread ones too
        unread_rows: Mapping[int, int],  # request_id |-> row among the tokens sampled by the step before
    ) -> dict[str, dict[str, Array]]:
        """`penalties`, `new_rows` and `new_tokens` of a step for `apply`, as far as it has any. A step of the sequences
        of the step before has their penalties."""
        groups: dict[str, dict[str, Array]] = {}
        if sequences != self._step:
            groups |= self._take(sequences)
        if not self._penalised:
            return {}
        chosen = [sequences[row] for row in self._penalised]
        counts = np.array([num_outputs[row] for row in self._penalised])
        missing = counts - self._num_outputs[self._state_ids]
        self._num_outputs[self._state_ids] = counts
        if len(new := np.flatnonzero((missing < 0) | (missing > 1))):
            groups["new_rows"] = _new_row_arrays(self._state_ids[new], [chosen[index] for index in new])
            missing[new] = counts[new] - [len(chosen[index].output_token_ids) for index in new]
        last = [sequence.output_token_ids[-1] if sequence.output_token_ids else -1 for sequence in chosen]
        token_ids, sources = np.full((2, len(sequences)), -1, dtype=np.int64)
        token_ids[self._penalised] = np.where(missing == 1, last, -1)
        if unread_rows:
            unread = [unread_rows.get(sequence.request_id, -1) for sequence in chosen]
            sources[self._penalised] = np.where(missing == 1, unread, -1)
        return groups | {"new_tokens": {"token_ids": token_ids, "sources": sources}}

    def apply(
        self,
        logits: Tensor,  # [S, V], updated in place
        penalties: Penalties | None,  # None: those of the step before
        new_rows: NewRows | None,
        new_tokens: NewTokens,
        sampled_before: Tensor | None,  # tokens of the step before; None: all are read
    ) -> None:
        """Counts what is new, and penalises. Steps are applied in the order of their `arrays`."""
        if new_rows is not None:
            self._in_prompt.index_fill_(0, new_rows.state_ids, False)
            self._counts.index_fill_(0, new_rows.state_ids, 0)
            self._in_prompt.index_put_((new_rows.prompt_state_ids, new_rows.prompt_token_ids), self._true)
            outputs = new_rows.output_state_ids, new_rows.output_token_ids
            self._counts.index_put_(outputs, self._one, accumulate=True)
        if penalties is not None:  # copied: they are parts of a buffer with all that the step brought to the device
            columns = (penalties.state_ids, penalties.repetition, penalties.presence, penalties.frequency)
            self._penalties = Penalties(*(column.clone() for column in columns))
        of = self._penalties
        assert of is not None
        apply_penalties(
            logits,
            of.state_ids,
            self._in_prompt,
            self._counts,
            new_tokens.token_ids,
            new_tokens.sources,
            sampled_before,
            of.repetition,
            of.presence,
            of.frequency,
        )

    def _take(self, sequences: list[Sequence]) -> dict[str, dict[str, Array]]:
        """Rows of the tables for the sequences of a step: its `penalties`."""
        self._step = list(sequences)
        self._penalised = [row for row, sequence in enumerate(sequences) if _has_penalties(sequence.sampling)]
        if not self._penalised:
            return {}
        chosen = [sequences[row] for row in self._penalised]
        self._state_ids = np.array(self._take_rows(chosen), dtype=np.int64)
        for state_id, sequence in zip(self._state_ids, chosen, strict=True):
            if self._sequences[state_id] is not sequence:
                self._sequences[state_id] = sequence
                self._num_outputs[state_id] = _NOT_COUNTED
        state_ids = np.full(len(sequences), -1, dtype=np.int64)
        state_ids[self._penalised] = self._state_ids
        factors = np.zeros((3, len(sequences)), dtype=np.float32)
        for row, sequence in zip(self._penalised, chosen, strict=True):
            factors[:, row] = _factors(sequence.sampling)
        columns = dict(zip(("repetition", "presence", "frequency"), factors, strict=True))
        return {"penalties": {"state_ids": state_ids, **columns}}

    def _take_rows(self, sequences: list[Sequence]) -> list[int]:
        """Rows of the tables for these sequences: those they have, else free ones, else the least recently used."""
        if len(sequences) > len(self._sequences):
            self._grow(max(_MIN_ROWS, 1 << (len(sequences) - 1).bit_length()))
        held = [self._rows.pop(sequence.request_id, None) for sequence in sequences]
        for index, sequence in enumerate(sequences):
            row = held[index]
            if row is None:
                row = self._free.pop() if self._free else self._rows.pop(next(iter(self._rows)))
            self._rows[sequence.request_id] = held[index] = row
        return [row for row in held if row is not None]

    def _grow(self, num_rows: int) -> None:
        """Forgets all that was counted."""
        self._in_prompt = self._in_prompt.new_zeros(num_rows, self._in_prompt.shape[1])
        self._counts = self._counts.new_zeros(num_rows, self._counts.shape[1])
        self._rows.clear()
        self._free = list(range(num_rows))
        self._sequences = [None] * num_rows
        self._num_outputs = np.full(num_rows, _NOT_COUNTED, dtype=np.int64)


def _new_row_arrays(state_ids: Array, sequences: list[Sequence]) -> dict[str, Array]:
    prompts = [np.array(sequence.request.prompt_token_ids, dtype=np.int64) for sequence in sequences]
    outputs = [np.array(sequence.output_token_ids, dtype=np.int64) for sequence in sequences]
    return {
        "state_ids": state_ids,
        "prompt_state_ids": np.repeat(state_ids, [len(ids) for ids in prompts]),
        "prompt_token_ids": np.concatenate(prompts),
        "output_state_ids": np.repeat(state_ids, [len(ids) for ids in outputs]),
        "output_token_ids": np.concatenate(outputs),
    }


def _factors(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
