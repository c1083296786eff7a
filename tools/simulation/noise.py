"""What is not predicted: steps take more or less, and a front hands over one response after the other.

A distribution is a list of (share, value): so many of all are no larger. Between two of them lies a line. An empty one
draws nothing: then a simulation is as exact as its predictions.
"""

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import Protocol

Distribution = list[tuple[float, float]]

# Two H200, LLaMA-2-13B and OPT-13B: the runs of docs/results/simulated-beside-measured-*.json.
# Of a step over what is predicted: gaps of streams over the median of their neighbours', where a GPU only decodes.
STEP_RATIOS: Distribution = [(0, 0.85), (0.05, 0.925), (0.25, 0.97), (0.5, 1.0), (0.75, 1.035), (0.9, 1.09)]
STEP_RATIOS += [(0.95, 1.13), (0.98, 1.25), (0.99, 1.36), (0.997, 1.7), (1, 3.0)]
# Seconds from one response to the next while many wait, of 2,000 and more a second. The longest held up all streams of
# colocated replicas every 2.4 s, by 50 to 140 ms; why is not known.
RESPONSE_S: Distribution = [(0, 0.03e-3), (0.1, 0.09e-3), (0.25, 0.2e-3), (0.5, 0.34e-3), (0.75, 0.46e-3)]
RESPONSE_S += [(0.9, 0.6e-3), (0.98, 1.2e-3), (0.998, 3e-3), (0.9998, 8e-3), (1, 120e-3)]


def draw(distribution: Distribution, rng: random.Random) -> float:
    share = rng.random()
    index = max(1, bisect_left(distribution, (share, 0.0)))
    (low, least), (high, most) = distribution[index - 1], distribution[index]
    return least + (most - least) * (share - low) / (high - low)


class Stream(Protocol):
    num_pending: int  # tokens that have not left
    num_leaving: int  # tokens of its response on the way

    def hand_over(self, num_tokens: int) -> None:
        """A response has passed the front."""


class Front:
    """Of all streams: responses pass it one by one, and tokens gather behind their stream's, as in
    ensemble/serving/pacing.py.

    `at`: has something happen at a time; `now`: the time.
    """

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
        """The stream has another token."""
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
