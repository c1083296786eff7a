"""How long outputs will be, from how long they were."""

from collections import deque
from math import ceil

from ensemble.request import Request

_NUM_RECENT = 50  # finished requests that count
_WEIGHT = 1 / _NUM_RECENT  # of one finished request in the running mean
_UNSEEN = 512  # tokens: nothing longer is expected before it has been seen, whatever `max_tokens` allows


class OutputEstimate:
    """Expects of a request the share of its `max_tokens` that requests used lately, but no more than the longest.

    A request that is computed again is expected to use that share of what it has left.
    """

    def __init__(self) -> None:
        self.used_share = 1.0
        self.mean_num_tokens: float | None = None  # of an output; None before any finished
        self._num_observed = 1  # as if one had used all
        self._recent = deque([_UNSEEN], maxlen=_NUM_RECENT)  # lengths

    @property
    def longest(self) -> int:
        """Tokens of an output."""
        return max(_UNSEEN, *self._recent)

    def observe(self, request: Request, num_output_tokens: int) -> None:
        """A request finished with so many output tokens."""
        used_share = num_output_tokens / request.sampling.max_tokens
        self._num_observed += 1
        weight = max(_WEIGHT, 1 / self._num_observed)
        self.used_share += weight * (used_share - self.used_share)
        before = num_output_tokens if self.mean_num_tokens is None else self.mean_num_tokens
        self.mean_num_tokens = before + weight * (num_output_tokens - before)
        self._recent.append(num_output_tokens)

    def num_output_tokens(self, request: Request) -> int:
        """Tokens that the request is expected to generate in this attempt."""
        return self.num_more_tokens(request, len(request.resumed_token_ids))

    def num_more_tokens(self, request: Request, num_so_far: int) -> int:
        """Tokens that the request is expected to generate after so many."""
        num_left_tokens = request.sampling.max_tokens - num_so_far
        return max(1, min(ceil(self.used_share * num_left_tokens), self.longest))

    def num_kv_tokens(self, request: Request) -> int:
        """Tokens whose KV the request is expected to hold in the end."""
        return request.prefill_len + self.num_output_tokens(request) - 1
