"""KV that a replica lends to others: of finished prompts, of sequences that go on elsewhere, and cached prefixes.

sequence's blocks --offer--> transfer's blocks, leased --reader has its copy, or a cancel--> free
cached blocks --offer_prefix--^                        --taken back--> a sequence's again
"""

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.protocol.router_replica import KVHandoff
from ensemble.request import Sequence
from ensemble.transfer.leases import Leases


class Lending:
    """`address` is where others read the pool, `life` which of the replica's lives this is."""

    def __init__(self, blocks: BlockManager | PrefixCache, leases: Leases, address: str, life: int) -> None:
        self._blocks = blocks
        self._leases = leases
        self._address = address
        self.life = life

    def offer(self, sequence: Sequence) -> KVHandoff:
        """Its blocks are the reader's to release; the caller has to tell who that is, and to end the lease."""
        request_id = sequence.request_id
        self._blocks.reassign(Owner("sequence", request_id), Owner("transfer", request_id))
        return self._lend(request_id, sequence.num_computed_tokens, sequence.block_ids)

    def offer_prefix(self, lease_id: int, hashes: list[bytes]) -> KVHandoff:
        """As many of the blocks, from the first on, as are cached. If none is, there is no lease."""
        block_ids: list[int] = []
        if isinstance(self._blocks, PrefixCache):
            block_ids = self._blocks.lease(Owner("transfer", lease_id), hashes)
        return self._lend(lease_id, len(block_ids) * self._blocks.block_size, block_ids)

    def take_back(self, request_id: int) -> list[int]:
        """What was offered goes on here. Returns its blocks, which are the sequence's again."""
        self._leases.end(request_id)
        owner = Owner("sequence", request_id)
        self._blocks.reassign(Owner("transfer", request_id), owner)
        return list(self._blocks.blocks_of(owner))

    def end(self, request_id: int) -> None:
        """Nobody reads the blocks any more."""
        self._leases.end(request_id)
        self._blocks.free(Owner("transfer", request_id))

    def _lend(self, request_id: int, num_kv_tokens: int, block_ids: list[int]) -> KVHandoff:
        if block_ids:
            self._leases.grant(request_id, block_ids)
        return KVHandoff(
            request_id=request_id,
            source=self._address,
            life=self.life,
            num_kv_tokens=num_kv_tokens,
            block_ids=block_ids,
        )
