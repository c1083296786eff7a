"""What is not predicted: steps take more or less, and so does the way of their tokens to the clients.

A distribution is a list of (share, value): so many of all are no larger. Between two of them lies a line. An empty one
draws nothing: then a simulation is as exact as its predictions.
"""

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

Distribution = list[tuple[float, float]]

# Two H100, LLaMA-2-13B and OPT-13B, summaries and chat, one and two replicas of a role: every step of six workers. Of
# a step over what is predicted: of steps with a chunk over the median of those with as many tokens of prompts and rows.
# Steps without a chunk vary less (P5 0.995, P95 1.035); what the estimator itself errs by comes from the simulation's.
STEP_RATIOS: Distribution = [(0, 0.9), (0.05, 0.958), (0.25, 0.984), (0.5, 1.0), (0.75, 1.023), (0.9, 1.05)]
STEP_RATIOS += [(0.95, 1.068), (0.99, 1.107), (0.997, 1.13), (1, 1.2)]
# One H100, LLaMA-2-7B, summaries at 7/s and chat at 13/s: stamps on the way of each token.
# Seconds from a step's commit to a sender, beyond the 1 ms that they take in any case; a step's tokens share them. With
# the rest of the way to the client, which has no stamps: clients' times lay behind the commits of two H100's runs by
# more (P50 to P95 2.3 ms, to a send's end 0.9), but there a thread that looked on woke every 4 ms. This lies between.
OUT_S: Distribution = [(0, 0.0), (0.05, 0.0), (0.25, 0.12e-3), (0.5, 0.28e-3), (0.75, 0.57e-3), (0.9, 1.05e-3)]
OUT_S += [(0.95, 1.5e-3), (0.99, 3e-3), (1, 5e-3)]
# Seconds from the begin of a send to that of the next, of a sender that has more to send.
RESPONSE_S: Distribution = [(0, 0.2e-3), (0.05, 0.28e-3), (0.25, 0.35e-3), (0.5, 0.41e-3), (0.75, 0.47e-3)]
RESPONSE_S += [(0.9, 0.55e-3), (0.95, 0.65e-3), (0.98, 0.95e-3), (0.99, 1.25e-3), (0.998, 2.2e-3), (1, 6.5e-3)]
# By how many responses leave at once, on hosts of GPUs: ensembles' by instances of `answer` (tools/server/commands.py),
# those of clients of `scheduler` by its own threads (ensemble/serving/senders.py).
SENDERS = {"ensemble": 4, "scheduler": 2}


def draw(distribution: Distribution, rng: random.Random) -> float:
    share = rng.random()
    index = max(1, bisect_left(distribution, (share, 0.0)))
    (low, least), (high, most) = distribution[index - 1], distribution[index]
    return least + (most - least) * (share - low) / (high - low)


class Stream(Protocol):
    request_id: int
    num_pending: int  # tokens that a sender has, and that have not left
    num_leaving: int  # tokens of its response on the way

    def hand_over(self, num_tokens: int) -> None:
        """A response has left."""


class Front:
    """Of all streams: a step's tokens come to the senders together, and each of these passes one response after the
    other, while tokens gather behind their stream's, as in ensemble/serving/senders.py. There streams rest, too: for
    less than the line takes.

    `at`: has something happen at a time; `now`: the time.
    """

    def __init__(
        self,
        out_s: Distribution,
        response_s: Distribution,
        num_senders: int,
        rng: random.Random,
        now: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._out_s, self._rng, self._now, self._at = out_s, rng, now, at
        self._senders = [_Sender(response_s, rng, now, at) for _ in range(num_senders)]
        self._step: list[Stream] = []  # who has a token of it; empty: its tokens are with the senders
        self._step_at = 0.0  # when the router heard of it

    def take(self, stream: Stream) -> None:
        """The stream has another token."""
        if not self._step or self._now() != self._step_at:
            self._step, self._step_at = [], self._now()
            delay_s = draw(self._out_s, self._rng) if self._out_s else 0.0
            self._at(self._now() + delay_s, partial(self._reach, self._step))
        self._step.append(stream)

    def _reach(self, streams: list[Stream]) -> None:
        for stream in streams:
            self._senders[stream.request_id % len(self._senders)].take(stream)
        streams.clear()


class _Sender:
    def __init__(
        self,
        response_s: Distribution,
        rng: random.Random,
        now: Callable[[], float],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._response_s, self._rng, self._now, self._at = response_s, rng, now, at
        self._line: deque[Stream] = deque()

    def take(self, stream: Stream) -> None:
        if not self._response_s:
            stream.hand_over(1)
            return
        stream.num_pending += 1
        if not stream.num_leaving:
            self._leave(stream)

    def _leave(self, stream: Stream) -> None:
        stream.num_leaving, stream.num_pending = stream.num_pending, 0
        self._line.append(stream)
        if len(self._line) == 1:
            self._start()

    def _start(self) -> None:
        self._at(self._now() + draw(self._response_s, self._rng), self._pass)

    def _pass(self) -> None:
        stream = self._line.popleft()
        num_tokens, stream.num_leaving = stream.num_leaving, 0
        stream.hand_over(num_tokens)
        if stream.num_pending:
            self._leave(stream)  # starts the line where it is empty
            if len(self._line) > 1:
                self._start()
        elif self._line:
            self._start()
