"""Log-probabilities of a step's tokens, for the sequences that ask for them, on their way to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble.engine.staging import Staging
from ensemble.request import Sequence, TokenLogProbs
from kernels.log_probs import log_probs


@dataclass(frozen=True, slots=True)
class AskedRows:
    """The rows of a step whose sequences ask for log-probabilities; the raw logits, since sampling overwrites them."""

    rows: Tensor  # [R] int64
    logits: Tensor  # [R, V]
    num_top: int  # of the sequence that asks for most

    def to_host(self, sampled: Tensor, sequences: list[Sequence], staging: Staging) -> "StepLogProbs":
        """sampled [S] int64."""
        chosen, ranks, top_token_ids, top_log_probs = log_probs(
            self.logits, sampled.index_select(0, self.rows), self.num_top
        )
        on_host = [staging.to_host(each.reshape(-1)) for each in (chosen, ranks, top_token_ids, top_log_probs)]
        return StepLogProbs([s for s in sequences if s.sampling.num_logprobs is not None], self.num_top, *on_host)


@dataclass(frozen=True, slots=True)
class StepLogProbs:
    """To be read when the step has run."""

    sequences: list[Sequence]  # R of them
    num_top: int
    chosen: Tensor  # [R]
    ranks: Tensor  # [R] int64
    top_token_ids: Tensor  # [R * num_top] int64
    top_log_probs: Tensor  # [R * num_top]

    def read(self) -> dict[int, TokenLogProbs]:
        """By request_id."""
        chosen, ranks = self.chosen.tolist(), self.ranks.tolist()
        top_token_ids, top_log_probs = self.top_token_ids.tolist(), self.top_log_probs.tolist()
        found = {}
        for row, sequence in enumerate(self.sequences):
            top = slice(row * self.num_top, row * self.num_top + (sequence.sampling.num_logprobs or 0))
            found[sequence.request_id] = TokenLogProbs(chosen[row], ranks[row], top_token_ids[top], top_log_probs[top])
        return found


def asked_rows(logits: Tensor, rows: Tensor, sequences: list[Sequence]) -> AskedRows:
    """Keeps the logits of `rows`, those of the sequences that ask."""
    num_top = max(sequence.sampling.num_logprobs or 0 for sequence in sequences)
    return AskedRows(rows, torch.index_select(logits, 0, rows), num_top)
