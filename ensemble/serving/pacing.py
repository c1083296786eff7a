"""At most one response of a stream is on its way to the OpenAI front or the `answer` model; tokens gather behind it.

The Triton server queues without a bound what the front has not read, as a socket does what the model has not sent. So a
response carries its number, and they tell the number when they have handed the response over. Streams do not wait for
one another.
"""

# After that a number is taken for lost. The Triton server takes an instance for dead that stands still for so long.
PATIENCE_S = 0.85  # is looked at every 0.1 s: a stream waits less than a second


class Pace:
    """Of one stream. `now` is time.monotonic()."""

    def __init__(self) -> None:
        self._number = 0  # of the last that left, from 1
        self._left_at: float | None = None  # None: it has passed

    @property
    def is_clear(self) -> bool:
        """Whether the next response may leave."""
        return self._left_at is None

    def leave(self, now: float) -> int:
        """The number of the response that leaves now."""
        self._number, self._left_at = self._number + 1, now
        return self._number

    def passed(self, number: int) -> None:
        """The response of that number has been handed over. Those before the last are known to be lost."""
        if number == self._number:
            self._left_at = None

    def is_overdue(self, now: float) -> bool:
        return self._left_at is not None and now - self._left_at > PATIENCE_S

    def give_up(self, now: float) -> None:
        """Waits no longer for a number that must be lost."""
        if self.is_overdue(now):
            self._left_at = None
