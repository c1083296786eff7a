"""Which blocks are kept for whom: those of a prefilled sequence, from its last chunk until its readers have its KV."""

import threading
from collections import deque
from collections.abc import Iterator

_NUM_ENDED = 4096  # that are remembered


class Leases:
    """One rank's. The engine's thread grants and ends them; any thread may ask."""

    def __init__(self) -> None:
        self._blocks: dict[int, frozenset[int]] = {}  # request_id |-> blocks of this rank's pool

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._blocks))

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._blocks

    def grant(self, request_id: int, block_ids: list[int]) -> None:
        self._blocks[request_id] = frozenset(block_ids)

    def end(self, request_id: int) -> None:
        del self._blocks[request_id]

    def why_not(self, request_id: int, block_ids: list[int]) -> str | None:
        """Why these blocks may not be read for that request; None if they may."""
        leased = self._blocks.get(request_id)
        if leased is None:
            return f"request_id = {request_id}: one with a lease is wanted"
        strangers = sorted(set(block_ids) - leased)
        if strangers:
            return f"block_ids = {strangers[:8]}: blocks of the lease of request {request_id} are wanted"
        return None


class FollowedLeases(Leases):
    """Those of a replica's first rank, as its orders tell another rank of them.

    A reader may come before the grant does, and waits for it then. One that comes after the end does not.
    """

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self._wait_s = wait_s
        self._changed = threading.Condition()
        self._ended: deque[int] = deque(maxlen=_NUM_ENDED)  # the last ones

    def grant(self, request_id: int, block_ids: list[int]) -> None:
        with self._changed:
            super().grant(request_id, block_ids)
            self._changed.notify_all()

    def end(self, request_id: int) -> None:
        with self._changed:
            super().end(request_id)
            self._ended.append(request_id)

    def why_not(self, request_id: int, block_ids: list[int]) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: request_id in self or request_id in self._ended, self._wait_s)
            return super().why_not(request_id, block_ids)

    def forget_ended(self) -> None:
        """Their request ids may be others' from now on."""
        with self._changed:
            self._ended.clear()
