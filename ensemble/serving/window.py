"""A bound on the responses that are on their way through the ensemble.

Every one of them passes its last step, `postprocess`, and the Triton server queues without a bound what a step has not
taken. So the scheduler numbers them, and some carry their number along; when `postprocess` takes one of those it tells
the number, and all before it have passed. While too many are on their way the senders wait, and tokens gather to fewer
responses.
"""

import threading

STAMP_EVERY = 16  # responses
LIMIT = 64
# Should a number be lost, a later one, of a heartbeat at the latest, makes up for it; this is for when none comes.
PATIENCE_S = 1.0


class Window:
    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._entered = self._passed = 0

    @property
    def num_inside(self) -> int:
        return self._entered - self._passed

    def enter(self, *, waits: bool = True) -> int:
        """Counts a response, and waits for room, for PATIENCE_S at most. Returns its number, from 1."""
        with self._condition:
            if waits and not self._condition.wait_for(lambda: self.num_inside < LIMIT, PATIENCE_S):
                self._passed = self._entered
            self._entered += 1
            return self._entered

    def passed(self, number: int) -> None:
        """The response of that number has passed, and so have those before it."""
        with self._condition:
            self._passed = max(self._passed, min(number, self._entered))
            self._condition.notify_all()
