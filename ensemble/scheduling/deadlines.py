"""Which requests have run out of time."""

import heapq


class Deadlines:
    """Requests by deadline, on any clock in seconds. Every operation costs O(log n), amortised."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}  # request_id |-> deadline
        self._heap: list[tuple[float, int]] = []  # (deadline, request_id), those that were removed included

    def __len__(self) -> int:
        return len(self._deadlines)

    @property
    def next(self) -> float | None:
        """The earliest deadline."""
        while self._heap and self._heap[0][1] not in self._deadlines:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def add(self, request_id: int, deadline: float) -> None:
        self._deadlines[request_id] = deadline
        heapq.heappush(self._heap, (deadline, request_id))

    def remove(self, request_id: int) -> None:
        """The request has ended. One without a deadline is fine."""
        self._deadlines.pop(request_id, None)
        if len(self._heap) > 2 * len(self._deadlines) + 16:
            self._heap = [(deadline, request_id) for request_id, deadline in self._deadlines.items()]
            heapq.heapify(self._heap)

    def take_expired(self, now: float) -> list[int]:
        """Takes the requests whose deadline has come, the earliest first."""
        expired = []
        while self.next is not None and self._heap[0][0] <= now:
            _, request_id = heapq.heappop(self._heap)
            del self._deadlines[request_id]
            expired.append(request_id)
        return expired
