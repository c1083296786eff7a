"""Which blocks are kept for whom: those of a prefilled sequence, from its last chunk until its readers have its KV."""

from collections.abc import Iterator


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
