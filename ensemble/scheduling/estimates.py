"""How long outputs will be, from how long they were."""

from math import ceil

from ensemble.request import Request

_WEIGHT = 0.02  # of one finished request in the running mean: about the last 50 count


class OutputEstimate:
    """Expects of a request the share of its `max_tokens` that requests used lately; all of it before any finished.

    A request that is computed again is expected to use that share of what it has left.
    """

    def __init__(self) -> None:
        self.used_share = 1.0
        self._num_observed = 1  # as if one had used all

    def observe(self, request: Request, num_output_tokens: int) -> None:
        """A request finished with so many output tokens."""
        used_share = num_output_tokens / request.sampling.max_tokens
        self._num_observed += 1
        self.used_share += max(_WEIGHT, 1 / self._num_observed) * (used_share - self.used_share)

    def num_kv_tokens(self, request: Request) -> int:
        """Tokens whose KV the request is expected to hold in the end."""
        num_left_tokens = request.sampling.max_tokens - len(request.resumed_token_ids)
        return request.prefill_len + max(1, ceil(self.used_share * num_left_tokens)) - 1
