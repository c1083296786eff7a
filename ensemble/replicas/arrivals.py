"""Sequences on their way into a replica: they wait for blocks, then their KV is pulled from the replica that has it.

Whatever comes of one, its source is told exactly once that its blocks are not read any more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.protocol.router_replica import Arrival, KVHandoff
from ensemble.replicas.peers import Peers
from ensemble.request import Sequence
from ensemble.transfer.puller import Pull, Puller


@dataclass(slots=True, eq=False)
class _Arriving:
    """A sequence whose KV is not here yet."""

    sequence: Sequence
    handoff: KVHandoff
    is_copying: bool = False
    is_cancelled: bool = False


class Arrivals:
    """Owns the blocks of its sequences from the start of their copies until they have arrived."""

    def __init__(self, blocks: BlockManager | PrefixCache, peers: Peers, puller: Puller) -> None:
        self._blocks = blocks
        self._peers = peers
        self._puller = puller
        self._arriving: dict[int, _Arriving] = {}  # request_id |-> waiting for blocks, or being pulled
        self.num_wanted_blocks = 0  # by the arrival that waits for blocks

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._arriving

    @property
    def num_in_flight(self) -> int:
        """Copies under way."""
        return self._puller.num_in_flight

    @property
    def request_ids(self) -> list[int]:
        return list(self._arriving)

    def receive(self, arrival: Arrival) -> None:
        handoff = arrival.handoff
        sequence = Sequence(arrival.request, list(arrival.output_token_ids), handoff.num_kv_tokens)
        self._arriving[sequence.request_id] = _Arriving(sequence, handoff)
        self._peers.attach(handoff.source)

    def start_pulls(self, has_room_for: Callable[[int], bool]) -> None:
        """Starts the copies whose source pools have been mapped and for which there are blocks, in order of arrival."""
        self.num_wanted_blocks = 0
        for request_id, arriving in self._arriving.items():
            pool, handoff = self._peers.pool(arriving.handoff.source), arriving.handoff
            if arriving.is_copying or pool is None:
                continue
            num_blocks = self._blocks.blocks_for(handoff.num_kv_tokens)
            if not has_room_for(num_blocks):
                self.num_wanted_blocks = num_blocks
                return
            arriving.is_copying = True
            arriving.sequence.block_ids = self._blocks.allocate(Owner("sequence", request_id), num_blocks)
            target_block_ids = list(arriving.sequence.block_ids)
            self._puller.start(Pull(request_id, pool, handoff.block_ids[:num_blocks], target_block_ids))

    def completed(self) -> tuple[list[tuple[Sequence, Pull]], list[int]]:
        """Those that have arrived since the last call, and the request ids whose copies ended after their cancel."""
        arrived, released = [], []
        for pull in self._puller.completed():
            arriving = self._arriving.pop(pull.request_id)
            self._peers.acknowledge(arriving.handoff)
            if arriving.is_cancelled:
                self._blocks.free(Owner("sequence", pull.request_id))
                released.append(pull.request_id)
            else:
                arrived.append((arriving.sequence, pull))
        return arrived, released

    def cancel(self, request_id: int) -> bool:
        """Ends one. True if that is all; False if its copy reads the source's blocks, and has to end first."""
        arriving = self._arriving[request_id]
        arriving.is_cancelled = arriving.is_copying
        if not arriving.is_copying:
            del self._arriving[request_id]
            self._peers.acknowledge(arriving.handoff)
        return not arriving.is_copying

    def from_source(self, address: str) -> list[int]:
        """Request ids of those that come from a replica."""
        return [request_id for request_id, each in self._arriving.items() if each.handoff.source == address]

    def wait(self, timeout_s: float) -> None:
        """Waits until the oldest copy has completed, at most `timeout_s`."""
        self._puller.wait(timeout_s)
