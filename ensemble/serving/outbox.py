"""A replica's events on their way to the scheduler: kept until the next poll says that they have arrived.

An answer can be lost on its way, with the tokens in it; its events then go out again, in front of the newer ones.
"""

from ensemble.workers.messages import Events, WorkerEvent


class Outbox:
    """Answers are numbered from 1."""

    def __init__(self, replica: int) -> None:
        self._replica = replica
        self._waiting: list[WorkerEvent] = []
        self._sent: list[WorkerEvent] = []  # in the last answer, which is not confirmed
        self._number = 0  # of the last answer

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, event: WorkerEvent) -> None:
        self._waiting.append(event)

    def confirm(self, last_number: int) -> None:
        """A poll has come whose sender has got the answer of this number, and none after it."""
        if last_number != self._number:
            self._waiting = self._sent + self._waiting
        self._sent = []

    def take(self) -> Events:
        """The next answer, with all that waits."""
        self._number += 1
        self._sent, self._waiting = self._waiting, []
        return Events(replica=self._replica, number=self._number, events=self._sent)
