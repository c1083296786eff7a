"""Sequences on their way into a decode worker: they wait for blocks, then their KV is pulled from a prefill worker.

Whatever comes of one, its source is told exactly once that its blocks are not read any more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.request import Sequence
from ensemble.transfer.puller import Pull, Puller
from ensemble.workers.messages import KVHandoff
from ensemble.workers.peers import Peers


@dataclass(slots=True, eq=False)
class _Arrival:
    """A sequence whose KV is not here yet."""

    sequence: Sequence
    handoff: KVHandoff
    is_copying: bool = False
    is_cancelled: bool = False


class Arrivals:
    """Owns the blocks of its sequences from the start of their copies until they have arrived."""

    def __init__(self, blocks: BlockManager, peers: Peers, puller: Puller) -> None:
        self._blocks = blocks
        self._peers = peers
        self._puller = puller
        self._arrivals: dict[int, _Arrival] = {}  # request_id |-> waiting for blocks, or being pulled
        self.num_wanted_blocks = 0  # by the arrival that waits for blocks

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._arrivals

    @property
    def num_in_flight(self) -> int:
        """Copies under way."""
        return self._puller.num_in_flight

    def receive(self, handoff: KVHandoff) -> None:
        sequence = Sequence(handoff.request, list(handoff.output_token_ids), handoff.num_kv_tokens)
        self._arrivals[sequence.request_id] = _Arrival(sequence, handoff)
        self._peers.attach(handoff.source)

    def start_pulls(self, has_room_for: Callable[[int], bool]) -> None:
        """Starts the copies whose source pools have been mapped and for which there are blocks, in order of arrival."""
        self.num_wanted_blocks = 0
        for request_id, arrival in self._arrivals.items():
            pool, handoff = self._peers.pool(arrival.handoff.source), arrival.handoff
            if arrival.is_copying or pool is None:
                continue
            num_blocks = self._blocks.blocks_for(handoff.num_kv_tokens)
            if not has_room_for(num_blocks):
                self.num_wanted_blocks = num_blocks
                return
            arrival.is_copying = True
            arrival.sequence.block_ids = self._blocks.allocate(Owner("sequence", request_id), num_blocks)
            target_block_ids = list(arrival.sequence.block_ids)
            self._puller.start(Pull(request_id, pool, handoff.block_ids[:num_blocks], target_block_ids))

    def completed(self) -> tuple[list[tuple[Sequence, Pull]], list[int]]:
        """Those that have arrived since the last call, and the request ids whose copies ended after their cancel."""
        arrived, released = [], []
        for pull in self._puller.completed():
            arrival = self._arrivals.pop(pull.request_id)
            self._peers.acknowledge(arrival.handoff)
            if arrival.is_cancelled:
                self._blocks.free(Owner("sequence", pull.request_id))
                released.append(pull.request_id)
            else:
                arrived.append((arrival.sequence, pull))
        return arrived, released

    def cancel(self, request_id: int) -> bool:
        """Ends one. True if that is all; False if its copy reads the source's blocks, and has to end first."""
        arrival = self._arrivals[request_id]
        arrival.is_cancelled = arrival.is_copying
        if not arrival.is_copying:
            del self._arrivals[request_id]
            self._peers.acknowledge(arrival.handoff)
        return not arrival.is_copying

    def from_source(self, address: str) -> list[int]:
        """Request ids of those that come from a prefill worker."""
        return [request_id for request_id, each in self._arrivals.items() if each.handoff.source == address]

    def wait(self, timeout_s: float) -> None:
        """Waits until the oldest copy has completed, at most `timeout_s`."""
        self._puller.wait(timeout_s)
