"""The one queue of requests that wait for prefill, bounded in requests and in tokens."""

from math import exp

from ensemble.errors import InternalError, Overloaded
from ensemble.request import Request

_DRAIN_WINDOW_S = 10.0
_RETRY_AFTER_S = (0.1, 60.0)  # bounds of the hint


class _Rate:
    """An amount per second over about the last `_DRAIN_WINDOW_S`, older amounts fading out exponentially."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._time_s = 0.0
        self._first_s: float | None = None

    def record(self, amount: float, now: float) -> None:
        if self._first_s is None:
            self._first_s = now
        self._weight = self._weight_at(now) + amount
        self._time_s = now

    def per_s(self, now: float) -> float:
        if self._first_s is None:
            return 0.0
        observed_s = max(now - self._first_s, 1.0)
        return self._weight_at(now) / (_DRAIN_WINDOW_S * (1 - exp(-observed_s / _DRAIN_WINDOW_S)))

    def _weight_at(self, now: float) -> float:
        return self._weight * exp(-max(0.0, now - self._time_s) / _DRAIN_WINDOW_S)


class WaitingQueue:
    """Requests in the order in which they are to start. `now` is any clock in seconds that does not go back."""

    def __init__(self, max_num_requests: int, max_num_tokens: int) -> None:
        self.max_num_requests = max_num_requests
        self.max_num_tokens = max_num_tokens
        self.num_tokens = 0  # prompt tokens of all waiting requests
        self._requests: dict[int, Request] = {}  # in order of arrival
        self._drained_requests = _Rate()
        self._drained_tokens = _Rate()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request, now: float) -> None:
        """Raises Overloaded, with the time after which there should be room, if a bound would be passed."""
        if request.request_id in self._requests:
            raise InternalError(f"request {request.request_id} is already waiting")
        if len(self) >= self.max_num_requests:
            what = f"{len(self)} requests are waiting"
            raise Overloaded(what, self._retry_after_s(1, self._drained_requests.per_s(now)))
        excess = self.num_tokens + request.prompt_len - self.max_num_tokens
        if excess > 0 and self._requests:  # an empty queue takes a prompt of any length
            what = f"{self.num_tokens} prompt tokens are waiting"
            raise Overloaded(what, self._retry_after_s(excess, self._drained_tokens.per_s(now)))
        self._requests[request.request_id] = request
        self.num_tokens += request.prompt_len

    def head(self) -> Request | None:
        """The request that is to start next."""
        return next(iter(self._requests.values()), None)

    def pop(self, now: float) -> Request:
        """Takes the head, which starts."""
        request = next(iter(self._requests.values()))
        self.remove(request.request_id)
        self._drained_requests.record(1, now)
        self._drained_tokens.record(request.prompt_len, now)
        return request

    def remove(self, request_id: int) -> Request | None:
        """Takes a request that will not start; None if it is not waiting."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.num_tokens -= request.prompt_len
        return request

    def remove_longer_than(self, prompt_len: int) -> list[Request]:
        """Takes all requests with more than `prompt_len` prompt tokens."""
        too_long = [request for request in self._requests.values() if request.prompt_len > prompt_len]
        for request in too_long:
            self.remove(request.request_id)
        return too_long

    def check_integrity(self) -> None:
        """Raises InternalError unless the count of tokens is that of the requests, within the bounds."""
        num_tokens = sum(request.prompt_len for request in self._requests.values())
        if num_tokens != self.num_tokens:
            raise InternalError(f"waiting queue counts {self.num_tokens} tokens and holds {num_tokens}")
        if len(self) > self.max_num_requests or (len(self) > 1 and num_tokens > self.max_num_tokens):
            raise InternalError(f"waiting queue holds {len(self)} requests, {num_tokens} tokens: past its bounds")

    @staticmethod
    def _retry_after_s(excess: float, drained_per_s: float) -> float:
        shortest, longest = _RETRY_AFTER_S
        return min(max(excess / drained_per_s, shortest), longest) if drained_per_s > 0 else longest
