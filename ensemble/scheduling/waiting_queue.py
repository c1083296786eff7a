"""The one queue of requests that wait for prefill, bounded in requests and in tokens."""

from collections import OrderedDict
from math import exp, inf

from ensemble.errors import InternalError, Overloaded
from ensemble.request import Request
from ensemble.scheduling.policies import (
    DEFAULT_HINTS,
    Hints,
    Order,
    QueuePolicy,
    Rank,
    TenantLedger,
    Waiting,
    make_order,
)

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


class _Lane:
    """The short or the long prompts of the queue."""

    def __init__(self, order: Order, max_wait_s: float) -> None:
        self._order = order
        self._max_wait_s = max_wait_s
        self._by_arrival: OrderedDict[int, Waiting] = OrderedDict()

    def push(self, waiting: Waiting) -> None:
        is_last = not self._by_arrival or waiting.number > next(reversed(self._by_arrival))
        self._by_arrival[waiting.number] = waiting
        if not is_last:  # it comes back
            self._by_arrival = OrderedDict(sorted(self._by_arrival.items()))
        self._order.push(waiting)

    def remove(self, waiting: Waiting) -> None:
        del self._by_arrival[waiting.number]
        self._order.remove(waiting)

    def head(self, now: float) -> tuple[Rank, Waiting] | None:
        oldest = next(iter(self._by_arrival.values()), None)
        if oldest is None:
            return None
        if now - oldest.arrival_s >= self._max_wait_s:
            return (-inf, oldest.number), oldest  # before all whom the policy ranks
        first = self._order.head(now)
        if first is None:
            raise InternalError("the policy lost a waiting request")
        return self._order.rank(first, now), first


class WaitingQueue:
    """Requests in the order in which they are to start. `now` is any clock in seconds that does not go back.

    Prompts of more than `long_prompt_len` tokens are long; the head of the others can be asked for alone.
    """

    def __init__(
        self,
        max_num_requests: int,
        max_num_tokens: int,
        policy: QueuePolicy | None = None,
        long_prompt_len: int | None = None,
    ) -> None:
        self.max_num_requests = max_num_requests
        self.max_num_tokens = max_num_tokens
        self.policy = policy or QueuePolicy()
        self.long_prompt_len = long_prompt_len
        self.num_tokens = 0  # of all waiting requests
        self._waiting: dict[int, Waiting] = {}  # by request_id
        self._again: dict[int, Waiting] = {}  # of them those that go before all others, in order
        self._held_back: dict[int, Waiting] = {}  # of them those that no live replica could take
        self._sharing: dict[int, Waiting] = {}  # of them those whose prompt another one is to compute first
        self._max_len: int | None = None  # tokens to prefill that a live replica could take; None: not known
        self._ledger = TenantLedger()
        self._short = _Lane(make_order(self.policy, self._ledger), self.policy.max_wait_s)
        self._long = _Lane(make_order(self.policy, self._ledger), self.policy.max_wait_s)
        self._num_arrivals = 0
        self._drained_requests = _Rate()
        self._drained_tokens = _Rate()

    def __len__(self) -> int:
        return len(self._waiting)

    def tokens_per_s(self, now: float) -> float:
        """Of the prompts that were started lately."""
        return self._drained_tokens.per_s(now)

    def is_long(self, request: Request) -> bool:
        return self.long_prompt_len is not None and request.prefill_len > self.long_prompt_len

    def add(
        self,
        request: Request,
        now: float,
        hints: Hints = DEFAULT_HINTS,
        *,
        is_again: bool = False,
        is_sharing: bool = False,
    ) -> None:
        """Raises Overloaded, with the time after which there should be room, if a bound would be passed.

        `is_again`: it was here before, goes before all others, and is not refused. `is_sharing`: it keeps its place,
        and stands before nobody until `share`; what it is expected to find in a prefix cache then is not counted.
        """
        if request.request_id in self._waiting:
            raise InternalError(f"request {request.request_id} is already waiting")
        num_tokens = request.prefill_len - (hints.num_cached_tokens if is_sharing else 0)
        if not is_again:
            self._check_bounds(num_tokens, now)
        waiting = Waiting(request, hints, now, self._num_arrivals, num_tokens)
        self._num_arrivals += 1
        self._waiting[request.request_id] = waiting
        self.num_tokens += num_tokens
        if is_again:
            self._again[request.request_id] = waiting
        elif is_sharing:
            self._sharing[request.request_id] = waiting
        else:
            self._stand(waiting)

    def share(self, request_id: int) -> None:
        """What a request waited for is computed. One that is not here any more is passed over."""
        waiting = self._sharing.pop(request_id, None)
        if waiting is not None:
            self._stand(waiting)

    def _stand(self, waiting: Waiting) -> None:
        if self._is_too_long(waiting.request):
            self._held_back[waiting.request.request_id] = waiting
        else:
            self._lane(waiting.request).push(waiting)

    def _check_bounds(self, num_tokens: int, now: float) -> None:
        if len(self) >= self.max_num_requests:
            what = f"{len(self)} requests are waiting"
            raise Overloaded(what, self._retry_after_s(1, self._drained_requests.per_s(now)))
        excess = self.num_tokens + num_tokens - self.max_num_tokens
        if excess > 0 and self._waiting:  # an empty queue takes a prompt of any length
            what = f"{self.num_tokens} prompt tokens are waiting"
            raise Overloaded(what, self._retry_after_s(excess, self._drained_tokens.per_s(now)))

    def hold_back(self, max_len: int | None) -> None:
        """Requests with more tokens to prefill stand before nobody until there is a replica for them; None: all may."""
        if max_len == self._max_len:
            return
        self._max_len = max_len
        for request_id, waiting in list(self._waiting.items()):
            if request_id in self._again or request_id in self._sharing:
                continue
            if self._is_too_long(waiting.request) == (request_id in self._held_back):
                continue
            if request_id in self._held_back:
                self._lane(waiting.request).push(self._held_back.pop(request_id))
            else:
                self._lane(waiting.request).remove(waiting)
                self._held_back[request_id] = waiting

    def head(self, now: float, only_short: bool = False) -> Request | None:
        """The request that is to start next."""
        for waiting in self._again.values():
            if not self._is_too_long(waiting.request) and not (only_short and self.is_long(waiting.request)):
                return waiting.request
        heads = [lane.head(now) for lane in ((self._short,) if only_short else (self._short, self._long))]
        first = min((head for head in heads if head is not None), key=lambda head: head[0], default=None)
        return None if first is None else first[1].request

    def start(self, request_id: int, now: float) -> None:
        """Takes a request that starts, and charges its tenant."""
        waiting = self._waiting[request_id]
        if request_id not in self._again:
            self.charge(waiting.hints.tenant, waiting.request.prompt_len - waiting.hints.num_cached_tokens)
        self.remove(request_id)
        self._drained_requests.record(1, now)
        self._drained_tokens.record(waiting.num_tokens, now)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Counts tokens served to a tenant, which `fair` goes by."""
        if self.policy.name == "fair":
            self._ledger.charge(tenant, num_tokens)

    def remove(self, request_id: int) -> None:
        """Takes a request that will not start. One that does not wait is ignored."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return
        apart = [each for each in (self._again, self._held_back, self._sharing) if request_id in each]
        if apart:
            del apart[0][request_id]
        else:
            self._lane(waiting.request).remove(waiting)
        self.num_tokens -= waiting.num_tokens

    def remove_longer_than(self, prompt_len: int) -> list[Request]:
        """Takes all requests with more than `prompt_len` tokens to prefill."""
        too_long = [each.request for each in self._waiting.values() if each.request.prefill_len > prompt_len]
        for request in too_long:
            self.remove(request.request_id)
        return too_long

    def check_integrity(self) -> None:
        """Raises InternalError unless the count of tokens is that of the requests, within the bounds."""
        num_tokens = sum(waiting.num_tokens for waiting in self._waiting.values())
        if num_tokens != self.num_tokens:
            raise InternalError(f"waiting queue counts {self.num_tokens} tokens and holds {num_tokens}")
        num_first = len(self) - len(self._again)
        num_first_tokens = num_tokens - sum(waiting.num_tokens for waiting in self._again.values())
        if num_first > self.max_num_requests or (num_first > 1 and num_first_tokens > self.max_num_tokens):
            raise InternalError(f"waiting queue holds {len(self)} requests, {num_tokens} tokens: past its bounds")

    def _is_too_long(self, request: Request) -> bool:
        return self._max_len is not None and request.prefill_len > self._max_len

    def _lane(self, request: Request) -> _Lane:
        return self._long if self.is_long(request) else self._short

    @staticmethod
    def _retry_after_s(excess: float, drained_per_s: float) -> float:
        shortest, longest = _RETRY_AFTER_S
        return min(max(excess / drained_per_s, shortest), longest) if drained_per_s > 0 else longest
