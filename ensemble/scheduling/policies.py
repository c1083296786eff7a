"""In which order waiting requests start prefill.

    fcfs      by arrival
    sjf       by prompt tokens that are not expected in a prefix cache
    priority  by arrival + class * aging_s: a class costs a request at most aging_s against the class above
    edf       by arrival + TTFT target; requests that have missed it come after all that have not, by arrival
    fair      the tenant served the fewest tokens so far, by arrival within a tenant (virtual token counter,
              Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024)

Every policy has the same strict starvation bound, kept by WaitingQueue: a request that has waited `max_wait_s` is
overtaken by nothing that arrived after it.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ensemble.config import PolicyName
from ensemble.request import Request

Rank: TypeAlias = tuple[float, ...]  # smaller starts earlier

_MAX_IDLE_TENANTS = 1024  # remembered beyond twice the tenants that wait


@dataclass(frozen=True, slots=True)
class Hints:
    """What a policy may know of a request beside its prompt."""

    priority: int = 0  # class; a smaller one is more urgent
    tenant: str = ""
    ttft_target_s: float | None = None  # from arrival; None: the policy's default
    num_cached_tokens: int = 0  # of the prompt, expected in a prefix cache


DEFAULT_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    name: PolicyName = "fcfs"
    max_wait_s: float = 30.0  # starvation bound
    aging_s: float = 5.0  # priority: what a class is worth
    ttft_target_s: float = 1.0  # edf: of requests that name none


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    request: Request
    hints: Hints
    arrival_s: float
    number: int  # in order of arrival
    num_tokens: int  # to prefill, as the queue counts them


class Order(Protocol):
    """Waiting requests in the order of a policy. Every operation costs at most O(log n), amortised."""

    def push(self, waiting: Waiting) -> None: ...

    def head(self, now: float) -> Waiting | None:
        """The one to start next."""

    def rank(self, waiting: Waiting, now: float) -> Rank:
        """Its place among the heads of orders of the same policy."""

    def remove(self, waiting: Waiting) -> None: ...

    def __contains__(self, waiting: Waiting) -> bool: ...


class KeyOrder:
    """By a key that does not change while a request waits; equal keys by arrival."""

    def __init__(self, key: Callable[[Waiting], float]) -> None:
        self._key = key
        self._members: dict[int, Waiting] = {}  # by number
        self._heap: list[tuple[float, int]] = []  # (key, number), those that left included

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting.number in self._members

    def push(self, waiting: Waiting) -> None:
        self._members[waiting.number] = waiting
        heapq.heappush(self._heap, (self._key(waiting), waiting.number))

    def head(self, now: float) -> Waiting | None:
        while self._heap:
            waiting = self._members.get(self._heap[0][1])
            if waiting is not None:
                return waiting
            heapq.heappop(self._heap)
        return None

    def rank(self, waiting: Waiting, now: float) -> Rank:
        return self._key(waiting), waiting.number

    def remove(self, waiting: Waiting) -> None:
        del self._members[waiting.number]
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [(self._key(member), member.number) for member in self._members.values()]
            heapq.heapify(self._heap)


class DeadlineOrder:
    """Earliest deadline first; who has missed it waits for all who have not: one miss must not cause the next."""

    def __init__(self, default_target_s: float) -> None:
        self._default_target_s = default_target_s
        self._on_time = KeyOrder(self.deadline)
        self._late = KeyOrder(lambda waiting: waiting.arrival_s)

    def deadline(self, waiting: Waiting) -> float:
        target_s = waiting.hints.ttft_target_s
        return waiting.arrival_s + (self._default_target_s if target_s is None else target_s)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._on_time or waiting in self._late

    def push(self, waiting: Waiting) -> None:
        self._on_time.push(waiting)

    def head(self, now: float) -> Waiting | None:
        while (first := self._on_time.head(now)) is not None and self.deadline(first) < now:
            self._on_time.remove(first)
            self._late.push(first)
        return first or self._late.head(now)

    def rank(self, waiting: Waiting, now: float) -> Rank:
        if self.deadline(waiting) < now:
            return 1.0, waiting.arrival_s, waiting.number
        return 0.0, self.deadline(waiting), waiting.number

    def remove(self, waiting: Waiting) -> None:
        (self._late if waiting in self._late else self._on_time).remove(waiting)


class TenantLedger:
    """Tokens served to each tenant."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._num_waiting: dict[str, int] = {}
        self._floor = 0.0  # what a tenant that is not known is taken to have been served

    def served(self, tenant: str) -> float:
        return self._served[tenant]

    def charge(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = self._served.get(tenant, self._floor) + num_tokens

    def enter(self, tenant: str, floor: float) -> None:
        """A request of the tenant begins to wait. Who comes back is lifted to `floor`: idleness earns nothing."""
        self._floor = max(self._floor, floor)
        if tenant not in self._num_waiting:
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
            self._num_waiting[tenant] = 0
            if len(self._served) > 2 * len(self._num_waiting) + _MAX_IDLE_TENANTS:
                self._forget_idle()
        self._num_waiting[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A request of the tenant waits no longer."""
        self._num_waiting[tenant] -= 1
        if self._num_waiting[tenant] == 0:
            del self._num_waiting[tenant]

    def _forget_idle(self) -> None:
        known = self._served.items()
        self._served = {name: served for name, served in known if name in self._num_waiting or served > self._floor}


class FairOrder:
    """The tenant that was served the fewest tokens first, its requests by arrival."""

    def __init__(self, ledger: TenantLedger) -> None:
        self._ledger = ledger
        self._queues: dict[str, OrderedDict[int, Waiting]] = {}  # tenants that wait, their requests by number
        self._heap: list[tuple[float, str]] = []  # (tokens served or fewer, tenant); at most one for a tenant
        self._in_heap: set[str] = set()
        self._floor = 0.0  # tokens of the tenant served least, when last a tenant came or all were gone

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting.number in self._queues.get(waiting.hints.tenant, ())

    def push(self, waiting: Waiting) -> None:
        tenant = waiting.hints.tenant
        if tenant not in self._queues:
            least_served = self._least_served_tenant()
            if least_served is not None:
                self._floor = max(self._floor, self._ledger.served(least_served))
            self._queues[tenant] = OrderedDict()
        self._ledger.enter(tenant, self._floor)
        if tenant not in self._in_heap:
            self._in_heap.add(tenant)
            heapq.heappush(self._heap, (self._ledger.served(tenant), tenant))
        queue = self._queues[tenant]
        is_last = not queue or waiting.number > next(reversed(queue))
        queue[waiting.number] = waiting
        if not is_last:  # it comes back
            self._queues[tenant] = OrderedDict(sorted(queue.items()))

    def head(self, now: float) -> Waiting | None:
        tenant = self._least_served_tenant()
        return None if tenant is None else next(iter(self._queues[tenant].values()))

    def rank(self, waiting: Waiting, now: float) -> Rank:
        return self._ledger.served(waiting.hints.tenant), waiting.number

    def remove(self, waiting: Waiting) -> None:
        tenant = waiting.hints.tenant
        del self._queues[tenant][waiting.number]
        if not self._queues[tenant]:
            del self._queues[tenant]
            if not self._queues:
                self._floor = max(self._floor, self._ledger.served(tenant))
        self._ledger.leave(tenant)

    def _least_served_tenant(self) -> str | None:
        while self._heap:
            served, tenant = self._heap[0]
            if tenant not in self._queues:
                heapq.heappop(self._heap)
                self._in_heap.remove(tenant)
            elif served < self._ledger.served(tenant):
                heapq.heapreplace(self._heap, (self._ledger.served(tenant), tenant))
            else:
                return tenant
        return None


def make_order(policy: QueuePolicy, ledger: TenantLedger) -> Order:
    """An empty order of the policy; `fair` orders that share a ledger share what their tenants were served."""
    match policy.name:
        case "fcfs":
            return KeyOrder(lambda waiting: 0.0)
        case "sjf":
            return KeyOrder(lambda waiting: waiting.request.prompt_len - waiting.hints.num_cached_tokens)
        case "priority":
            return KeyOrder(lambda waiting: waiting.arrival_s + waiting.hints.priority * policy.aging_s)
        case "edf":
            return DeadlineOrder(policy.ttft_target_s)
        case "fair":
            return FairOrder(ledger)
