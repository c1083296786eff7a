"""What is on its way into a replica: sequences, which wait for blocks until their KV is pulled from the replica that
has it; and cached prefixes, which come in the same way, but do not wait: prompts can be computed without.

Whatever comes of one, its source is told exactly once that its blocks are not read any more.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from ensemble.cache.block_manager import BlockManager, Owner
from ensemble.cache.prefix_cache import PrefixCache
from ensemble.errors import LinkBroken
from ensemble.protocol.router_replica import Arrival, AttachFailed, KVHandoff, PrefixPulled
from ensemble.replicas.peers import Peers
from ensemble.request import Sequence
from ensemble.transfer.puller import Pull, Puller, Source


@dataclass(slots=True, eq=False)
class _Arriving:
    """A sequence, or a prefix, whose KV is not here yet."""

    what: Sequence | list[bytes]  # a prefix: its blocks' hashes
    handoff: KVHandoff
    arrived_at: float = field(default_factory=time.monotonic)
    is_copying: bool = False
    is_cancelled: bool = False

    @property
    def owner(self) -> Owner:
        """Of its blocks here."""
        return Owner("sequence" if isinstance(self.what, Sequence) else "transfer", self.handoff.request_id)


@dataclass(slots=True)
class Ended:
    """What has come of copies since the last look."""

    arrived: list[tuple[Sequence, Pull]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)  # request ids
    failed: dict[int, str] = field(default_factory=dict)  # request_id |-> reason
    prefixes: list[PrefixPulled] = field(default_factory=list)  # and what did not come of them
    unreadable: list[AttachFailed] = field(default_factory=list)  # whose links broke too often


class Arrivals:
    """Owns the blocks of its sequences from the start of their copies until they have arrived."""

    def __init__(self, blocks: BlockManager | PrefixCache, peers: Peers, puller: Puller) -> None:
        self._blocks = blocks
        self._peers = peers
        self._puller = puller
        self._arriving: dict[int, _Arriving] = {}  # request_id |-> waiting for blocks, or being pulled
        self._refused: dict[int, str] = {}  # request_id |-> why it is given up without a copy
        self._prefixes: list[PrefixPulled] = []  # that ended without a copy
        self.num_wanted_blocks = 0  # by the arrival that waits for blocks

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._arriving

    @property
    def num_in_flight(self) -> int:
        """Copies under way, and what has come of others and was not looked at."""
        return self._puller.num_in_flight + len(self._refused) + len(self._prefixes)

    @property
    def request_ids(self) -> list[int]:
        return list(self._arriving)

    def receive(self, arrival: Arrival) -> None:
        handoff = arrival.handoff
        sequence = Sequence(arrival.request, list(arrival.output_token_ids), handoff.num_kv_tokens)
        self._arriving[sequence.request_id] = _Arriving(sequence, handoff)
        self._peers.attach(handoff.source)

    def receive_prefix(self, handoff: KVHandoff, hashes: list[bytes]) -> None:
        self._arriving[handoff.request_id] = _Arriving(hashes, handoff)
        self._peers.attach(handoff.source)

    def start_pulls(self, has_room_for: Callable[[int], bool]) -> None:
        """Starts the copies whose source pools have been mapped and for which there are blocks, in order of arrival."""
        self.num_wanted_blocks = 0
        for request_id, arriving in list(self._arriving.items()):
            source, handoff = self._peers.source(arriving.handoff.source), arriving.handoff
            is_prefix = not isinstance(arriving.what, Sequence)
            if arriving.is_copying or source is None or (self.num_wanted_blocks and not is_prefix):
                continue
            num_blocks = self._blocks.blocks_for(handoff.num_kv_tokens)
            reason = _why_not(source, handoff, num_blocks)
            has_room = has_room_for(num_blocks + self.num_wanted_blocks)  # beside what came before
            if reason is None and is_prefix and not has_room:
                reason = f"{num_blocks} blocks: so many are not free"
            if reason is not None:
                if not is_prefix:
                    self._refused[request_id] = reason
                self.cancel(request_id, reason)
                continue
            if not has_room:
                self.num_wanted_blocks = num_blocks
                continue
            num_here = self._allocate(arriving, num_blocks)
            if num_here == num_blocks:
                self._end_prefix(arriving)
                del self._arriving[request_id]
                self._peers.acknowledge(handoff)
                continue
            arriving.is_copying = True
            target_block_ids = list(self._blocks.blocks_of(arriving.owner))[num_here:]
            self._puller.start(
                Pull(request_id, source, handoff.block_ids[num_here:num_blocks], target_block_ids, arriving.arrived_at)
            )

    def _allocate(self, arriving: _Arriving, num_blocks: int) -> int:
        """Returns how many of the blocks are here already."""
        owner, what, num_here = arriving.owner, arriving.what, 0
        if isinstance(self._blocks, PrefixCache):
            if isinstance(what, Sequence):
                token_ids = what.token_ids(0, what.num_computed_tokens)
                num_here = self._blocks.allocate_arrival(owner, token_ids, num_blocks)
            else:
                num_here = self._blocks.allocate_prefix(owner, what[:num_blocks])
        else:
            self._blocks.allocate(owner, num_blocks)
        if isinstance(what, Sequence):
            what.block_ids = list(self._blocks.blocks_of(owner))
        return num_here

    def _end_prefix(self, arriving: _Arriving, pull: Pull | None = None, reason: str | None = None) -> None:
        """It is cached now; or, for some `reason`, not."""
        handoff, blocks = arriving.handoff, self._blocks
        num_tokens = 0 if reason is not None else handoff.num_kv_tokens
        if isinstance(blocks, PrefixCache) and arriving.owner in blocks:
            blocks.commit(arriving.owner, num_tokens)
            blocks.free(arriving.owner)
        pulled = PrefixPulled(lease_id=handoff.request_id, num_tokens=num_tokens, reason=reason)
        if pull is not None and reason is None:
            pulled = msgspec.structs.replace(
                pulled, seconds=pull.seconds, num_bytes=pull.num_bytes, transport=pull.source.transport
            )
        self._prefixes.append(pulled)

    def ended(self) -> Ended:
        """What has come of copies since the last call. The blocks of those that did not arrive are free."""
        ended = Ended(failed=self._refused)
        self._refused = {}
        broken: list[tuple[Source, str]] = []
        for pull in self._puller.completed():
            arriving = self._arriving.pop(pull.request_id)
            self._peers.acknowledge(arriving.handoff)
            if isinstance(pull.error, LinkBroken):
                broken.append((pull.source, str(pull.error)))
            if not isinstance(arriving.what, Sequence):
                is_lost = arriving.is_cancelled or pull.error is not None
                self._end_prefix(arriving, pull, str(pull.error or "cancelled") if is_lost else None)
                continue
            if pull.error is None and not arriving.is_cancelled:
                ended.arrived.append((arriving.what, pull))
                continue
            self._blocks.free(arriving.owner)
            if arriving.is_cancelled:
                ended.cancelled.append(pull.request_id)
            else:
                ended.failed[pull.request_id] = str(pull.error)
        ended.prefixes, self._prefixes = self._prefixes, []
        for source, link_error in broken:
            if not self._peers.renew(source, link_error):
                ended.unreadable += self._attach_failed(source.address, link_error)
        return ended

    def cancel(self, request_id: int, reason: str = "cancelled") -> bool:
        """Ends one. True if that is all; False if its copy reads the source's blocks, and has to end first."""
        arriving = self._arriving[request_id]
        arriving.is_cancelled = arriving.is_copying
        if not arriving.is_copying:
            del self._arriving[request_id]
            self._peers.acknowledge(arriving.handoff)
            if not isinstance(arriving.what, Sequence):
                self._end_prefix(arriving, reason=reason)
        return not arriving.is_copying

    def receive_handles(self) -> list[AttachFailed]:
        """Maps the pools whose handles have come. Gives up what was to come from those that cannot be mapped."""
        failed = []
        for address, reason in self._peers.receive_handles():
            if reason is not None:
                failed += self._attach_failed(address, reason)
        return failed

    def _attach_failed(self, address: str, reason: str) -> list[AttachFailed]:
        failed = AttachFailed(address=address, reason=reason, request_ids=[])
        return [failed, *self.give_up_unmappable([address])]

    def give_up_unmappable(self, addresses: Iterable[str]) -> list[AttachFailed]:
        """Of these, the pools that cannot be mapped, and from which something was to come: it is given up."""
        failed = []
        for address in addresses:
            reason = self._peers.why_unmappable(address)
            request_ids = self.from_source(address) if reason is not None else []
            for request_id in request_ids:
                self.cancel(request_id)
            if reason is not None and request_ids:
                failed.append(AttachFailed(address=address, reason=reason, request_ids=request_ids))
        return failed

    def from_source(self, address: str) -> list[int]:
        """Request ids of those that come from a replica."""
        return [request_id for request_id, each in self._arriving.items() if each.handoff.source == address]

    def wait(self, timeout_s: float) -> None:
        """Waits until the oldest copy has completed, at most `timeout_s`."""
        self._puller.wait(timeout_s)


def _why_not(source: Source, handoff: KVHandoff, num_blocks: int) -> str | None:
    """Why the hand-off's blocks are not read: it does not speak of what is there."""
    if handoff.life != source.life:
        return f"life = {handoff.life}: {source.address} is in life {source.life}"
    if len(handoff.block_ids) < num_blocks:
        return f"block_ids: {num_blocks} for {handoff.num_kv_tokens} tokens are wanted, not {len(handoff.block_ids)}"
    strangers = [block_id for block_id in handoff.block_ids if not 0 <= block_id < source.num_blocks]
    if strangers:
        return f"block_ids = {strangers[:8]}: below {source.num_blocks} are wanted"
    return None
