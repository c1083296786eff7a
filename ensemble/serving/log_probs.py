"""Log-probabilities of an answer's tokens, in the forms of TensorRT-LLM's and of vLLM's servers."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemble.request import TokenLogProbs
from ensemble.serving.client_request import OutputOptions
from ensemble.tokenizer import Tokenizer


class LogProbOutputs:
    """Gathers those of one answer; `take` gives the outputs of what has come since it was last called."""

    def __init__(self, options: OutputOptions, tokenizer: Tokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._new: list[tuple[int, TokenLogProbs]] = []
        self._sum = 0.0

    def add(self, token_id: int, log_probs: TokenLogProbs) -> None:
        self._new.append((token_id, log_probs))
        self._sum += log_probs.log_prob

    def take(self) -> dict[str, npt.NDArray[Any]]:
        """output_log_probs [1, tokens since the last], cum_log_probs [1], cumulative_logprob [1], logprobs [1] JSON."""
        new, self._new = self._new, []
        outputs: dict[str, npt.NDArray[Any]] = {}
        if self._options.return_log_probs:
            outputs["output_log_probs"] = np.array([[each.log_prob for _, each in new]], np.float32)
            outputs["cum_log_probs"] = np.array([self._sum], np.float32)
        if self._options.return_cumulative_logprob:
            outputs["cumulative_logprob"] = np.array([self._sum], np.float32)
        if self._options.return_logprobs:
            positions = [self._position(token_id, each) for token_id, each in new]
            outputs["logprobs"] = np.array([json.dumps(positions).encode()], dtype=object)
        return outputs

    def _position(self, token_id: int, log_probs: TokenLogProbs) -> dict[int, dict[str, Any]]:
        """As vllm_backend has it: token id |-> logprob, rank, decoded_token; the sampled token comes first."""
        found = {token_id: self._entry(token_id, log_probs.log_prob, log_probs.rank)}
        for rank, (top_id, log_prob) in enumerate(
            zip(log_probs.top_token_ids, log_probs.top_log_probs, strict=True), start=1
        ):
            found.setdefault(top_id, self._entry(top_id, log_prob, rank))
        return found

    def _entry(self, token_id: int, log_prob: float, rank: int) -> dict[str, Any]:
        return {"logprob": log_prob, "rank": rank, "decoded_token": self._tokenizer.decode([token_id])}
