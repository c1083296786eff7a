"""In which order running sequences get the next decode iteration. All are preemptive at every iteration.

    fcfs      by joining
    srpt      by tokens left to the limit: an oracle, right only where outputs run to max_tokens
    priority  by class, then by joining
    mlfq      multi-level feedback queue: everyone joins level 0
    sj-mlfq   the same with skip-join: who is expensive to bring in joins lower (FastServe, arXiv:2305.05920)

A sequence that has not run for `starvation_s` comes first again, for one quantum: srpt and priority put it before all
others, mlfq at the end of level 0.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Protocol, TypeAlias

from ensemble.config import DecodePolicyName
from ensemble.request import Sequence


@dataclass(frozen=True, slots=True)
class DecodePolicySettings:
    name: DecodePolicyName = "fcfs"
    quantum_s: float = 0.01  # of level 0; each level has twice the quantum of the one above
    starvation_s: float = 3.0

    @property
    def fills_host_pool(self) -> bool:
        """Whether who comes later may run first: then there is a choice among all that the host pool holds."""
        return self.name != "fcfs"


class DecodePolicy(Protocol):
    def add(self, sequence: Sequence, now: float, priority: int, join_cost_s: float) -> None:
        """A sequence joins. `join_cost_s` is the predicted cost of bringing it in: hand-off and swap-in, or prefill."""

    def remove(self, request_id: int) -> None: ...

    def ran(self, request_ids: Iterable[int], seconds: float, now: float) -> None:
        """These sequences, in batch order, got a token in an iteration that took `seconds` and ended `now`."""

    def order(self, now: float) -> list[int]:
        """All sequences by request_id, the one to run first at the front."""


_Key: TypeAlias = Callable[[Sequence, int], int]  # (sequence, priority) -> smaller runs earlier


class _IdleClock:
    """Since when each sequence has not run, the longest idle first."""

    def __init__(self) -> None:
        self._since: OrderedDict[int, float] = OrderedDict()

    def reset(self, request_id: int, now: float) -> None:
        self._since[request_id] = now
        self._since.move_to_end(request_id)

    def remove(self, request_id: int) -> None:
        del self._since[request_id]

    def take_idle(self, now: float, bound_s: float) -> list[int]:
        """Sequences idle for `bound_s` or longer; their clocks start anew."""
        idle = []
        for request_id, since in self._since.items():
            if now - since < bound_s:
                break
            idle.append(request_id)
        for request_id in idle:
            self.reset(request_id, now)
        return idle


class KeyPolicy:
    """By a key, equal keys by joining."""

    def __init__(self, key: _Key, quantum_s: float, starvation_s: float) -> None:
        self._key = key
        self._quantum_s = quantum_s
        self._starvation_s = starvation_s
        self._sequences: dict[int, tuple[Sequence, int]] = {}  # request_id |-> (sequence, priority)
        self._keys: dict[int, int] = {}  # request_id |-> key, by joining
        self._boosts: dict[int, float] = {}  # request_id |-> seconds left before all others, by starvation
        self._idle = _IdleClock()

    def add(self, sequence: Sequence, now: float, priority: int, join_cost_s: float) -> None:
        self._sequences[sequence.request_id] = (sequence, priority)
        self._keys[sequence.request_id] = self._key(sequence, priority)
        self._idle.reset(sequence.request_id, now)

    def remove(self, request_id: int) -> None:
        del self._sequences[request_id], self._keys[request_id]
        self._boosts.pop(request_id, None)
        self._idle.remove(request_id)

    def ran(self, request_ids: Iterable[int], seconds: float, now: float) -> None:
        for request_id in request_ids:
            self._idle.reset(request_id, now)
            self._keys[request_id] = self._key(*self._sequences[request_id])
            if request_id in self._boosts:
                self._boosts[request_id] -= seconds
                if self._boosts[request_id] <= 0:
                    del self._boosts[request_id]

    def order(self, now: float) -> list[int]:
        for request_id in self._idle.take_idle(now, self._starvation_s):
            self._boosts.setdefault(request_id, self._quantum_s)
        by_key = sorted(self._keys, key=self._keys.__getitem__)
        return [*self._boosts, *(request_id for request_id in by_key if request_id not in self._boosts)]


class FeedbackQueuePolicy:
    """FastServe's multi-level feedback queue.

    Level p has the quantum `quantum_s * 2**p`. Who has run longer than that in its level falls to the end of the next;
    who ran and did not use it up goes to the front of its level, in batch order.
    """

    def __init__(self, quantum_s: float, starvation_s: float, *, skip_join: bool) -> None:
        self._quantum_s = quantum_s
        self._starvation_s = starvation_s
        self._skip_join = skip_join
        self._levels: list[OrderedDict[int, None]] = []
        self._level_of: dict[int, int] = {}
        self._used_s: dict[int, float] = {}  # request_id |-> seconds it ran in its level
        self._idle = _IdleClock()

    def quantum_s(self, level: int) -> float:
        return self._quantum_s * float(1 << level)

    def add(self, sequence: Sequence, now: float, priority: int, join_cost_s: float) -> None:
        level = 0
        while self._skip_join and self.quantum_s(level) < join_cost_s:
            level += 1
        self._enter(sequence.request_id, level)
        self._idle.reset(sequence.request_id, now)

    def remove(self, request_id: int) -> None:
        del self._levels[self._level_of.pop(request_id)][request_id]
        del self._used_s[request_id]
        self._idle.remove(request_id)

    def ran(self, request_ids: Iterable[int], seconds: float, now: float) -> None:
        survivors = []
        for request_id in request_ids:
            self._idle.reset(request_id, now)
            self._used_s[request_id] += seconds
            level = self._level_of[request_id]
            if self._used_s[request_id] > self.quantum_s(level):
                self._move(request_id, level + 1)
            else:
                survivors.append(request_id)
        for request_id in reversed(survivors):
            self._levels[self._level_of[request_id]].move_to_end(request_id, last=False)

    def order(self, now: float) -> list[int]:
        for request_id in self._idle.take_idle(now, self._starvation_s):
            if self._level_of[request_id] > 0:
                self._move(request_id, 0)
        return [request_id for level in self._levels for request_id in level]

    def _move(self, request_id: int, level: int) -> None:
        del self._levels[self._level_of[request_id]][request_id]
        self._enter(request_id, level)

    def _enter(self, request_id: int, level: int) -> None:
        while level >= len(self._levels):
            self._levels.append(OrderedDict())
        self._levels[level][request_id] = None
        self._level_of[request_id] = level
        self._used_s[request_id] = 0.0


def make_decode_policy(settings: DecodePolicySettings) -> DecodePolicy:
    def by_key(key: _Key) -> KeyPolicy:
        return KeyPolicy(key, settings.quantum_s, settings.starvation_s)

    match settings.name:
        case "fcfs":
            return KeyPolicy(lambda sequence, priority: 0, settings.quantum_s, starvation_s=inf)
        case "srpt":
            return by_key(lambda sequence, priority: sequence.sampling.max_tokens - len(sequence.output_token_ids))
        case "priority":
            return by_key(lambda sequence, priority: priority)
        case "mlfq" | "sj-mlfq":
            skip_join = settings.name == "sj-mlfq"
            return FeedbackQueuePolicy(settings.quantum_s, settings.starvation_s, skip_join=skip_join)
