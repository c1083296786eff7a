"""Automatic prefix cache: prompts that begin alike share the blocks of what they have in common.

Every block has one owner in the block manager, `Owner("prefix", block_id)`; who uses it is counted here:

    free --allocate--> in use --commit--> in use, cached --free--> idle, cached --evict, least recently used--> free
                          |                    ^                        |
                          +----free--> free    +-------allocate---------+

A block is cached under a hash of its tokens and all before them, so equal hashes mean equal KV. Only full blocks are
cached, and only once their KV is there: those of a prompt as it is computed or arrives, those of its answer at the end.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import KeysView, Sequence
from dataclasses import dataclass

from ensemble.cache.block_manager import BlockManager, OutOfBlocks, Owner
from ensemble.errors import InternalError

_HASH_BYTES = 16
_NEW = Owner("prefix", -1)  # of a block whose id is not known yet


def block_hashes(token_ids: Sequence[int], block_size: int, previous: bytes = b"") -> list[bytes]:
    """One hash for each full block, of its tokens and all before them; the same in every process.

    `previous`: the hash of the block before the first token, if it is not the first of all.
    """
    hashes = []
    tokens = array("q", token_ids)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = tokens[start : start + block_size].tobytes()
        previous = hashlib.blake2b(previous + block, digest_size=_HASH_BYTES).digest()
        hashes.append(previous)
    return hashes


@dataclass(frozen=True, slots=True)
class Allocation:
    """A prompt's blocks. KV of its first `num_cached_tokens` is there once `copies` are made, which comes first."""

    block_ids: list[int]
    num_cached_tokens: int
    copies: list[tuple[int, int]]  # (source block, destination block): copy on write


@dataclass(slots=True)
class _Prompt:
    block_ids: list[int]
    hashes: list[bytes]  # of its full blocks
    num_committed_blocks: int


class PrefixCache:
    """The blocks of a pool, shared between sequences that begin alike. An operation that raises has changed nothing.

    Beside `allocate_prompt`, it offers what a BlockManager does.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.num_queried_tokens = 0  # prompt tokens asked for
        self.num_hit_tokens = 0  # of them found
        self._prompts: dict[Owner, _Prompt] = {}
        self._num_users: dict[int, int] = {}  # block_id |-> owners that use it, at least one
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and used by nobody, least recently used first
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._stored: list[bytes] = []
        self._evicted: list[bytes] = []

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation may take: free, or cached and idle."""
        return self.blocks.num_free_blocks + len(self._idle)

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks

    @property
    def block_size(self) -> int:
        return self.blocks.block_size

    @property
    def owners(self) -> KeysView[Owner]:
        return self._prompts.keys()

    def __contains__(self, owner: Owner) -> bool:
        return owner in self._prompts

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return self.blocks.blocks_for(num_tokens)

    def allocate(self, owner: Owner, num_blocks: int) -> list[int]:
        """Gives blocks to a new owner that shares none of them. Raises OutOfBlocks if too few are free."""
        return self.allocate_prompt(owner, (), num_blocks).block_ids

    def allocate_prompt(self, owner: Owner, token_ids: Sequence[int], num_blocks: int) -> Allocation:
        """Blocks for a prompt, `num_blocks` in all, the cached ones first. Raises OutOfBlocks if too few are free.

        A prompt that is cached whole still has to compute its last token, to sample from it: the block that it writes
        is a copy.
        """
        if owner in self._prompts:
            raise InternalError(f"{owner.kind} {owner.id} already holds blocks")
        block_size = self.blocks.block_size
        hashes = block_hashes(token_ids, block_size)
        shared = self._cached_blocks(hashes)
        written = shared.pop() if shared and len(shared) * block_size == len(token_ids) else None
        num_new_blocks = num_blocks - len(shared)
        num_available_blocks = self.num_free_blocks - sum(block_id in self._idle for block_id in shared)
        if num_new_blocks > num_available_blocks:
            raise OutOfBlocks(owner, num_new_blocks, num_available_blocks)
        if written in self._idle and num_new_blocks == num_available_blocks:
            written = None  # it is needed itself: its tokens are computed again
        for block_id in shared:
            self._use(block_id)
        if written is not None:
            self._use(written)  # so that it is not taken for the copy
        new = [self._take() for _ in range(num_new_blocks)]
        if written is not None:
            self._drop(written)
        num_cached_tokens = len(shared) * block_size if written is None else len(token_ids) - 1
        self._prompts[owner] = _Prompt([*shared, *new], hashes, len(shared))
        self.num_queried_tokens += len(token_ids)
        self.num_hit_tokens += num_cached_tokens
        copies = [] if written is None else [(written, new[0])]
        return Allocation(shared + new, num_cached_tokens, copies)

    def allocate_arrival(self, owner: Owner, token_ids: Sequence[int], num_blocks: int) -> int:
        """Blocks for a sequence whose KV of these tokens comes from elsewhere. Raises OutOfBlocks if too few are free.

        Returns how many of its first blocks are here already, never all: those need not come.
        """
        hashes = block_hashes(token_ids, self.blocks.block_size)
        return self._allocate(owner, hashes, self._cached_blocks(hashes)[: num_blocks - 1], num_blocks)

    def allocate_prefix(self, owner: Owner, hashes: list[bytes]) -> int:
        """Blocks of these hashes, whose KV comes from elsewhere. Raises OutOfBlocks if too few are free.

        Returns how many of the first are here already: those need not come. The others are cached by `commit`.
        """
        return self._allocate(owner, hashes, self._cached_blocks(hashes), len(hashes))

    def lease(self, owner: Owner, hashes: list[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of these, kept for a new owner; none: it is no owner then."""
        shared = self._cached_blocks(hashes)
        if shared:
            self._allocate(owner, hashes[: len(shared)], shared, len(shared))
        return shared

    def _allocate(self, owner: Owner, hashes: list[bytes], shared: list[int], num_blocks: int) -> int:
        """`shared`, which are cached, and new ones. Returns how many are shared."""
        if owner in self._prompts:
            raise InternalError(f"{owner.kind} {owner.id} already holds blocks")
        num_available_blocks = self.num_free_blocks - sum(block_id in self._idle for block_id in shared)
        if num_blocks - len(shared) > num_available_blocks:
            raise OutOfBlocks(owner, num_blocks - len(shared), num_available_blocks)
        for block_id in shared:
            self._use(block_id)
        new = [self._take() for _ in range(num_blocks - len(shared))]
        self._prompts[owner] = _Prompt([*shared, *new], hashes, len(shared))
        return len(shared)

    def extend(self, owner: Owner, num_blocks: int) -> list[int]:
        """Appends blocks to what the owner holds and returns the new ones. Raises OutOfBlocks if too few are free."""
        prompt = self._prompt(owner)
        if num_blocks > self.num_free_blocks:
            raise OutOfBlocks(owner, num_blocks, self.num_free_blocks)
        new = [self._take() for _ in range(num_blocks)]
        prompt.block_ids += new
        return new

    def commit(self, owner: Owner, num_computed_tokens: int) -> None:
        """KV of the prompt's first tokens is in the pool: its full blocks can be shared from now on."""
        prompt = self._prompt(owner)
        num_blocks = min(num_computed_tokens // self.blocks.block_size, len(prompt.hashes))
        for index in range(prompt.num_committed_blocks, num_blocks):
            block_hash, block_id = prompt.hashes[index], prompt.block_ids[index]
            if block_hash not in self._block_of:  # else somebody computed the same meanwhile: one copy is enough
                self._block_of[block_hash] = block_id
                self._hash_of[block_id] = block_hash
                self._stored.append(block_hash)
        prompt.num_committed_blocks = max(prompt.num_committed_blocks, num_blocks)

    def store(self, owner: Owner, token_ids: Sequence[int]) -> None:
        """KV of all these tokens, prompt and answer, is in the owner's blocks: the full ones can be shared."""
        prompt, block_size = self._prompt(owner), self.blocks.block_size
        rest = token_ids[len(prompt.hashes) * block_size :]
        prompt.hashes += block_hashes(rest, block_size, prompt.hashes[-1] if prompt.hashes else b"")
        prompt.num_committed_blocks = 0  # of what was somebody else's copy, that may have been evicted meanwhile
        self.commit(owner, len(token_ids))

    def blocks_of(self, owner: Owner) -> Sequence[int]:
        """The owner's blocks in the order of its tokens; empty for an unknown owner."""
        return tuple(self._prompts[owner].block_ids) if owner in self._prompts else ()

    def reassign(self, owner: Owner, new_owner: Owner) -> None:
        """Moves all blocks of an owner to one that holds none."""
        if new_owner in self._prompts:
            raise InternalError(f"{new_owner.kind} {new_owner.id} already holds blocks")
        self._prompts[new_owner] = self._prompt(owner)
        del self._prompts[owner]

    def free(self, owner: Owner) -> None:
        """Ends the owner's use of its blocks. Cached ones stay until they are needed, the prompt's end going first."""
        prompt = self._prompt(owner)
        del self._prompts[owner]
        for block_id in reversed(prompt.block_ids):
            self._drop(block_id)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """Hashes stored and hashes evicted since the last call, for an index elsewhere; apply the evicted first."""
        stored = [block_hash for block_hash in self._stored if block_hash in self._block_of]
        evicted = [block_hash for block_hash in self._evicted if block_hash not in self._block_of]
        self._stored, self._evicted = [], []
        return stored, evicted

    def check_integrity(self) -> None:
        """Raises InternalError unless every block is free, in use or idle, and all counts are right."""
        self.blocks.check_integrity()
        num_users: dict[int, int] = {}
        for prompt in self._prompts.values():
            for block_id in prompt.block_ids:
                num_users[block_id] = num_users.get(block_id, 0) + 1
        if num_users != self._num_users:
            raise InternalError("prefix cache: blocks in use and their counts differ")
        if num_users.keys() & self._idle.keys() or not self._idle.keys() <= self._hash_of.keys():
            raise InternalError("prefix cache: an idle block is in use, or is not cached")
        if {Owner("prefix", block_id) for block_id in [*num_users, *self._idle]} != self.blocks.owners:
            raise InternalError("prefix cache: blocks taken from the pool and blocks known differ")
        if {block_id: block_hash for block_hash, block_id in self._block_of.items()} != self._hash_of:
            raise InternalError("prefix cache: blocks and hashes differ")

    def _prompt(self, owner: Owner) -> _Prompt:
        if owner not in self._prompts:
            raise InternalError(f"{owner.kind} {owner.id} holds no blocks")
        return self._prompts[owner]

    def _cached_blocks(self, hashes: list[bytes]) -> list[int]:
        """Blocks of the longest cached prefix."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def _use(self, block_id: int) -> None:
        self._idle.pop(block_id, None)
        self._num_users[block_id] = self._num_users.get(block_id, 0) + 1

    def _drop(self, block_id: int) -> None:
        self._num_users[block_id] -= 1
        if self._num_users[block_id] > 0:
            return
        del self._num_users[block_id]
        if block_id in self._hash_of:
            self._idle[block_id] = None
        else:
            self.blocks.free(Owner("prefix", block_id))

    def _take(self) -> int:
        """A block for one user, evicting the least recently used one if none is free."""
        if self.blocks.num_free_blocks == 0:
            evicted, _ = self._idle.popitem(last=False)
            block_hash = self._hash_of.pop(evicted)
            del self._block_of[block_hash]
            self._evicted.append(block_hash)
            self._num_users[evicted] = 1
            return evicted
        [block_id] = self.blocks.allocate(_NEW, 1)
        self.blocks.reassign(_NEW, Owner("prefix", block_id))
        self._num_users[block_id] = 1
        return block_id
