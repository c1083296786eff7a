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
from kernels.penalties import apply_penalties, count_tokens

_MIN_ROWS = 16


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
    """One more token of a row each."""

    state_ids: Tensor  # [C] int64, distinct
    token_ids: Tensor  # [C] int64


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
        self._num_outputs: list[int] = []  # counted in each row
        self._factors = np.zeros((3, 0), dtype=np.float32)  # of each row

    def arrays(
        self,
        sequences: list[Sequence],
        unread_rows: Mapping[int, int],  # request_id |-> row among the tokens sampled by the step before
    ) -> tuple[dict[str, dict[str, Array]], list[tuple[int, int]]]:
        """`penalties`, `new_rows` and `new_tokens` of a step, as far as it has any, for `apply`; and which of the new
        tokens are unread, (index, row among the sampled)."""
        penalised = [row for row, sequence in enumerate(sequences) if _has_penalties(sequence.sampling)]
        if not penalised:
            return {}, []
        chosen = [sequences[row] for row in penalised]
        state_ids = self._take_rows(chosen)
        new_rows: list[tuple[int, Sequence]] = []
        token_state_ids: list[int] = []
        token_ids: list[int] = []
        unread: list[tuple[int, int]] = []
        for state_id, sequence in zip(state_ids, chosen, strict=True):
            outputs, source = sequence.output_token_ids, unread_rows.get(sequence.request_id)
            num_outputs = len(outputs) if source is None else len(outputs) + 1
            num_missing = num_outputs - self._num_outputs[state_id]
            if self._sequences[state_id] is not sequence or not 0 <= num_missing <= 1:
                new_rows.append((state_id, sequence))
                self._sequences[state_id] = sequence
                self._factors[:, state_id] = _factors(sequence.sampling)
                num_missing = num_outputs - len(outputs)
            if num_missing == 1:
                if source is not None:
                    unread.append((len(token_ids), source))
                token_state_ids.append(state_id)
                token_ids.append(outputs[-1] if source is None else 0)
            self._num_outputs[state_id] = num_outputs

        all_state_ids = np.full(len(sequences), -1, dtype=np.int64)
        all_state_ids[penalised] = state_ids
        factors = np.zeros((3, len(sequences)), dtype=np.float32)
        factors[:, penalised] = self._factors[:, state_ids]
        columns = dict(zip(("repetition", "presence", "frequency"), factors, strict=True))
        groups: dict[str, dict[str, Array]] = {"penalties": {"state_ids": all_state_ids, **columns}}
        if new_rows:
            groups["new_rows"] = _new_row_arrays(new_rows)
        if token_ids:
            groups["new_tokens"] = {
                "state_ids": np.array(token_state_ids, dtype=np.int64),
                "token_ids": np.array(token_ids, dtype=np.int64),
            }
        return groups, unread

    def apply(
        self,
        logits: Tensor,  # [S, V], updated in place
        penalties: Penalties,
        new_rows: NewRows | None,
        new_tokens: NewTokens | None,
    ) -> None:
        """Counts what is new, and penalises. Steps are applied in the order of their `arrays`."""
        if new_rows is not None:
            self._in_prompt.index_fill_(0, new_rows.state_ids, False)
            self._counts.index_fill_(0, new_rows.state_ids, 0)
            self._in_prompt.index_put_((new_rows.prompt_state_ids, new_rows.prompt_token_ids), self._true)
            outputs = new_rows.output_state_ids, new_rows.output_token_ids
            self._counts.index_put_(outputs, self._one, accumulate=True)
        if new_tokens is not None:
            count_tokens(self._counts, new_tokens.state_ids, new_tokens.token_ids)
        factors = penalties.repetition, penalties.presence, penalties.frequency
        apply_penalties(logits, penalties.state_ids, self._in_prompt, self._counts, *factors)

    def _take_rows(self, sequences: list[Sequence]) -> list[int]:
        """Rows of the tables for these sequences: those they have, else free ones, else the least recently used."""
        if len(sequences) > len(self._sequences):
            self._grow(max(_MIN_ROWS, 1 << (len(sequences) - 1).bit_length()))
        held = [self._rows.pop(sequence.request_id, None) for sequence in sequences]
        for index, sequence in enumerate(sequences):
            row = held[index]
            if row is None:
                row = self._free.pop() if self._free else self._rows.pop(next(iter(self._rows)))
                self._sequences[row] = None
            self._rows[sequence.request_id] = held[index] = row
        return [row for row in held if row is not None]

    def _grow(self, num_rows: int) -> None:
        """Forgets all that was counted."""
        self._in_prompt = self._in_prompt.new_zeros(num_rows, self._in_prompt.shape[1])
        self._counts = self._counts.new_zeros(num_rows, self._counts.shape[1])
        self._rows.clear()
        self._free = list(range(num_rows))
        self._sequences = [None] * num_rows
        self._num_outputs = [0] * num_rows
        self._factors = np.zeros((3, num_rows), dtype=np.float32)


def _new_row_arrays(rows: list[tuple[int, Sequence]]) -> dict[str, Array]:
    state_ids = np.array([state_id for state_id, _ in rows], dtype=np.int64)
    prompts = [np.array(sequence.request.prompt_token_ids, dtype=np.int64) for _, sequence in rows]
    outputs = [np.array(sequence.output_token_ids, dtype=np.int64) for _, sequence in rows]
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
