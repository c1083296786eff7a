"""Health is progress: a replica counts its beats in memory that its stage sees too, and the stage judges by them.

Beats can be read while the process that counts them stands still, and cost a store of eight bytes.
"""

import mmap
import os
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

SIZE = 64  # bytes: beats, u64; step_s, f64; the rest is free
SLOW_STEPS = 10  # a step may take that many times what steps took lately, or it is predicted to take
WAITING_BEAT_S = 0.5  # between beats while another process is waited for
STEP_DECAY = 0.9  # by step, of a long one's weight
MAX_LATE_S = 1.0  # a watcher that looks less often has stood still itself

Key = TypeVar("Key", bound=Hashable)


class Beats(Protocol):
    """What is judged."""

    @property
    def beats(self) -> int:
        """Counted on as long as the process goes on."""

    @property
    def step_s(self) -> float:
        """What a step may well take: the longest of late."""


class Progress:
    """Counted by one process, read by another.

    Without `fd` the memory is new, and `fd` is to be passed to the process that counts; with it, it is that memory.
    """

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            fd = os.memfd_create("progress")
            os.ftruncate(fd, SIZE)
        self.fd = fd
        memory = memoryview(mmap.mmap(fd, SIZE))
        self._beats = memory[:8].cast("Q")
        self._step_s = memory[8:16].cast("d")
        self._waits = False
        self._waiter: threading.Thread | None = None

    def beat(self) -> None:
        """The loop goes on. At least once a second, also where there is nothing to do."""
        self._beats[0] += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While another process is waited for, which is judged itself: beats come from another thread meanwhile."""
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._beat_while_waiting, name="waiting", daemon=True)
            self._waiter.start()
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _beat_while_waiting(self) -> None:
        while True:
            time.sleep(WAITING_BEAT_S)
            if self._waits:
                self.beat()

    def step_takes(self, seconds: float) -> None:
        """A step has taken so long, or is predicted to."""
        self._step_s[0] = max(seconds, STEP_DECAY * self._step_s[0])

    @property
    def beats(self) -> int:
        return self._beats[0]

    @property
    def step_s(self) -> float:
        """What a step may well take: the longest of late."""
        return self._step_s[0]


class HangWatch:
    """Which of some processes stand still. Time is an argument, in seconds."""

    def __init__(self, hang_timeout_s: float) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._looked_at = float("-inf")
        self._since: dict[Hashable, tuple[int, float]] = {}  # key |-> beats, since when

    def hung(self, progresses: Mapping[Key, Beats], now: float) -> dict[Key, float]:
        """Key |-> seconds without a beat, of those that have had none for too long. To be asked twice a second.

        Who was late itself does not judge: what stopped it may have stopped the others as well.
        """
        if now - self._looked_at > MAX_LATE_S:
            self._since.clear()
        self._looked_at = now
        self._since = {key: self._beats_since(key, progress, now) for key, progress in progresses.items()}
        stood_still_s = {key: now - self._since[key][1] for key in progresses}
        return {
            key: seconds
            for key, seconds in stood_still_s.items()
            if seconds >= max(self._hang_timeout_s, SLOW_STEPS * progresses[key].step_s)
        }

    def _beats_since(self, key: Hashable, progress: Beats, now: float) -> tuple[int, float]:
        beats = progress.beats
        seen = self._since.get(key)
        return seen if seen is not None and seen[0] == beats else (beats, now)
