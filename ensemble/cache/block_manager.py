"""Who owns which block of a KV pool: every block is free or belongs to exactly one owner.

free --allocate, extend--> sequence --reassign--> transfer --free--> free
                              |------------------free-------------->|
"""

from collections.abc import KeysView, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from ensemble.errors import InternalError
from ensemble.scheduling.swapping import Place

if TYPE_CHECKING:
    from ensemble.cache.prefix_cache import PrefixCache


class Owner(NamedTuple):
    """A sequence (by request_id), a transfer (by transfer_id: under lease until acknowledged), or the prefix cache."""

    kind: Literal["sequence", "transfer", "prefix"]
    id: int


class Swap(NamedTuple):
    """Copies block i of the source's list to block i of the destination's."""

    request_id: int
    source_block_ids: list[int]
    destination_block_ids: list[int]


class OutOfBlocks(InternalError):
    """An allocation asked for more blocks than are free; nothing was taken."""

    def __init__(self, owner: Owner, num_blocks: int, num_free_blocks: int) -> None:
        super().__init__(f"{owner.kind} {owner.id} needs {num_blocks} blocks, {num_free_blocks} are free")


class BlockManager:
    """The blocks of one pool. Every operation costs O(1) per block; misuse raises InternalError and changes nothing."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm, and reused first
        self._owned: dict[Owner, list[int]] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def owners(self) -> KeysView[Owner]:
        return self._owned.keys()

    def __contains__(self, owner: Owner) -> bool:
        return owner in self._owned

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def blocks_of(self, owner: Owner) -> Sequence[int]:
        """The owner's blocks in the order of its tokens; empty for an unknown owner."""
        return tuple(self._owned.get(owner, ()))

    def allocate(self, owner: Owner, num_blocks: int) -> list[int]:
        """Gives blocks to a new owner. Raises OutOfBlocks if too few are free."""
        if owner in self._owned:
            raise InternalError(f"{owner.kind} {owner.id} already holds blocks")
        block_ids = self._take(owner, num_blocks)
        self._owned[owner] = block_ids
        return list(block_ids)

    def extend(self, owner: Owner, num_blocks: int) -> list[int]:
        """Appends blocks to what the owner holds and returns the new ones. Raises OutOfBlocks if too few are free."""
        owned = self._blocks(owner)
        block_ids = self._take(owner, num_blocks)
        owned += block_ids
        return block_ids

    def reassign(self, owner: Owner, new_owner: Owner) -> None:
        """Moves all blocks of an owner to one that holds none."""
        if new_owner in self._owned:
            raise InternalError(f"{new_owner.kind} {new_owner.id} already holds blocks")
        self._owned[new_owner] = self._blocks(owner)
        del self._owned[owner]

    def free(self, owner: Owner) -> None:
        """Takes all blocks back."""
        self._free.extend(reversed(self._blocks(owner)))
        del self._owned[owner]

    def check_integrity(self) -> None:
        """Raises InternalError unless every block of the pool is free or owned, exactly once."""
        held = self._free + [block_id for block_ids in self._owned.values() for block_id in block_ids]
        if len(held) != self.num_blocks or set(held) != set(range(self.num_blocks)):
            raise InternalError(f"pool of {self.num_blocks} blocks: {len(set(held))} distinct in {len(held)} places")

    def _blocks(self, owner: Owner) -> list[int]:
        block_ids = self._owned.get(owner)
        if block_ids is None:
            raise InternalError(f"{owner.kind} {owner.id} holds no blocks")
        return block_ids

    def _take(self, owner: Owner, num_blocks: int) -> list[int]:
        if not 0 <= num_blocks <= len(self._free):
            raise OutOfBlocks(owner, num_blocks, len(self._free))
        first = len(self._free) - num_blocks
        block_ids = self._free[first:]
        del self._free[first:]
        block_ids.reverse()
        return block_ids


class SwappableBlocks:
    """Blocks of sequences on the device and in the host pool. A copy holds its blocks on both sides until it ends."""

    def __init__(self, device: "BlockManager | PrefixCache", host: BlockManager) -> None:
        self.device = device
        self.host = host
        self._copying: dict[Owner, Literal["out", "in"]] = {}

    @property
    def num_returning_blocks(self) -> int:
        """Device blocks that become free when the copies under way have ended."""
        return sum(len(self.device.blocks_of(owner)) for owner, way in self._copying.items() if way == "out")

    def place_of(self, owner: Owner) -> Place | None:
        """Where the sequence's KV is; None for an owner that holds nothing."""
        if owner in self._copying:
            return self._copying[owner]
        if owner in self.device:
            return "device"
        return "host" if owner in self.host else None

    def begin_swap_out(self, owner: Owner) -> tuple[list[int], list[int]]:
        """Returns the device blocks to copy, and the host blocks to copy them to."""
        self._expect(owner, "device")
        device_block_ids = list(self.device.blocks_of(owner))
        host_block_ids = self.host.allocate(owner, len(device_block_ids))
        self._copying[owner] = "out"
        return device_block_ids, host_block_ids

    def begin_swap_in(self, owner: Owner, num_blocks: int) -> tuple[list[int], list[int]]:
        """Allocates `num_blocks`, for what is on the host and for growth. Returns the host blocks and where they go."""
        self._expect(owner, "host")
        device_block_ids = self.device.allocate(owner, num_blocks)
        self._copying[owner] = "in"
        host_block_ids = list(self.host.blocks_of(owner))
        return host_block_ids, device_block_ids[: len(host_block_ids)]

    def end_swap(self, owner: Owner) -> None:
        """The copy's event has completed: the side it came from is free."""
        way = self._copying.pop(owner, None)
        if way is None:
            raise InternalError(f"{owner.kind} {owner.id} is not being copied")
        (self.device if way == "out" else self.host).free(owner)

    def free(self, owner: Owner) -> None:
        """Takes back the blocks of a sequence that is not being copied."""
        place = self.place_of(owner)
        if place not in ("device", "host"):
            raise InternalError(f"{owner.kind} {owner.id} cannot be freed: it is at {place}")
        (self.device if place == "device" else self.host).free(owner)

    def check_integrity(self) -> None:
        """Raises InternalError unless both pools are whole and an owner is on both sides exactly while it is copied."""
        self.device.check_integrity()
        self.host.check_integrity()
        if {owner for owner in self.device.owners if owner in self.host} != self._copying.keys():
            raise InternalError("a sequence is on the device and in the host pool without being copied")

    def _expect(self, owner: Owner, place: Place) -> None:
        if self.place_of(owner) != place:
            raise InternalError(f"{owner.kind} {owner.id} is at {self.place_of(owner)}, not at {place}")
