"""What the replicas' prefix caches hold, as far as their events have told: a guess that the engine confirms."""

from collections.abc import Iterable, Sequence, Set


class PrefixIndex:
    """Hashes of cached blocks by replica (see cache/prefix_cache.py). A lookup costs O(blocks of the prompt)."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._hashes: dict[int, set[bytes]] = {}

    def update(self, replica: int, stored: Iterable[bytes], evicted: Iterable[bytes]) -> None:
        """Applies an event of a replica."""
        hashes = self._hashes.setdefault(replica, set())
        hashes.difference_update(evicted)
        hashes.update(stored)

    def replica_down(self, replica: int) -> None:
        """Its cache is gone."""
        self._hashes.pop(replica, None)

    def num_blocks(self, replica: int) -> int:
        """Blocks that it has."""
        return len(self._hashes.get(replica, ()))

    def is_anywhere(self, block_hash: bytes) -> bool:
        """Whether a replica has that block."""
        return any(block_hash in hashes for hashes in self._hashes.values())

    def num_cached_tokens(self, replica: int, hashes: Sequence[bytes], prompt_len: int) -> int:
        """Tokens of a prompt, given by the hashes of its full blocks, that the replica has; the last one never."""
        known: Set[bytes] = self._hashes.get(replica, frozenset())
        if not hashes or hashes[0] not in known:
            return 0
        num_blocks = next((index for index, each in enumerate(hashes) if each not in known), len(hashes))
        return min(num_blocks * self.block_size, prompt_len - 1)
