"""A bound on the responses that are on their way through the ensemble.

Every one of them passes its last step, `postprocess`, and the Triton server queues without a bound what a step has not
taken. So the scheduler numbers them, and some carry their number along; when `postprocess` takes one of those it tells
the number, and all before it have passed. A stream that finds no room is parked, and its tokens gather meanwhile.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

STAMP_EVERY = 16  # responses
LIMIT = 64
# Should a number be lost, a later one, of a heartbeat at the latest, makes up for it; this is for when none comes.
PATIENCE_S = 1.0


class Window:
    """May be called from any thread. Who is parked is called back on the thread that makes room."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entered = self._passed = 0
        self._last_room = 0.0  # when there was some for the last time
        self._parked: deque[Callable[[], None]] = deque()

    @property
    def num_inside(self) -> int:
        return self._entered - self._passed

    def has_room(self, call_back: Callable[[], None]) -> bool:
        """Whether a response may enter; if not, `call_back` is called once to ask again."""
        with self._lock:
            self._give_up_lost()
            if self.num_inside >= LIMIT:
                self._parked.append(call_back)
                return False
            return True

    def enter(self) -> int:
        """Counts a response, room or not; its number, from 1."""
        with self._lock:
            self._give_up_lost()
            self._entered += 1
            number, resumed = self._entered, self._take_parked()
        for call_back in resumed:
            call_back()
        return number

    def passed(self, number: int) -> None:
        """The response of that number has passed, and so have those before it."""
        with self._lock:
            if number > self._passed:
                self._passed, self._last_room = min(number, self._entered), time.monotonic()
            resumed = self._take_parked()
        for call_back in resumed:
            call_back()

    def _give_up_lost(self) -> None:
        now = time.monotonic()
        if self.num_inside >= LIMIT and now - self._last_room > PATIENCE_S:
            self._passed = self._entered
        if self.num_inside < LIMIT:
            self._last_room = now

    def _take_parked(self) -> list[Callable[[], None]]:
        """As many as there is room for, those first that have waited longest."""
        count = min(len(self._parked), max(0, LIMIT - self.num_inside))
        return [self._parked.popleft() for _ in range(count)]
