"""The replicas as places to decode: what each has room for, and which sequences are there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ensemble.errors import InternalError
from ensemble.scheduling.credits import Credits

LOOK_EVERY_S = 0.05  # for what sequences need at one time: in that time they get a few tokens longer
SHARED_SHARE = 0.8  # of the blocks that are not needed at one time: outputs are not as long as expected


class Progress(NamedTuple):
    """Of a sequence, in tokens of KV."""

    num_tokens: int
    num_more_tokens: int  # as expected


class Need(NamedTuple):
    """Blocks of a request in decode."""

    expected: int  # at the length its output is expected to have, or by reservation may have
    life: int  # at the length where it has to end


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What a replica takes to decode."""

    max_num_seqs: int  # running, waiting and swapped
    num_host_blocks: int = 0  # of a host pool that is to be filled too


@dataclass(slots=True)
class Decoder:
    """One replica. `spare`: it takes only what it has computed itself and what would wait for others too long."""

    credits: Credits  # shared with PrefillScheduler
    limits: DecodeLimits
    num_reserved_blocks: int
    is_open: bool = False  # for new sequences
    is_spare: bool = False
    prices: dict[int, int] = field(default_factory=dict)  # request_id |-> blocks that it is taken to need in the end
    beyond_credit: dict[int, int] = field(default_factory=dict)  # request_id |-> of these, booked in the host pool, or
    # among those that are shared
    num_shared_blocks: int = 0  # that are in the prices of several: one needs them when another one has ended

    @property
    def num_blocks(self) -> int:
        return self.credits.num_blocks

    @property
    def num_free_blocks(self) -> int:
        num_beyond = self.limits.num_host_blocks + self.num_shared_blocks - sum(self.beyond_credit.values())
        return max(0, self.credits.free_blocks + num_beyond - self.num_reserved_blocks)

    @property
    def num_free_seqs(self) -> int:
        return self.limits.max_num_seqs - len(self.prices)

    @property
    def takes_hand_offs(self) -> bool:
        return self.is_open and not self.is_spare

    def price(self, need: Need) -> int:
        return min(need.expected, self.num_blocks - self.num_reserved_blocks)

    def fits(self, need: Need, num_held_blocks: int = 0) -> bool:
        """`num_held_blocks`: that it has here already, and gives back."""
        if not self.is_open or self.num_free_seqs < 1 or need.life > self.num_blocks:
            return False
        price = self.price(need)
        if price > self.num_free_blocks + num_held_blocks:
            return False
        if not self.limits.num_host_blocks or not self.prices:
            return True
        # Room for the longest twice over: then whichever sequence lacks a block, another one can be swapped out.
        longest = max(price, *self.prices.values())
        return sum(self.prices.values()) + price + longest <= self.num_blocks + self.limits.num_host_blocks

    def hold(self, request_id: int, need: Need) -> None:
        price = self.price(need)
        num_credited_blocks = min(price, self.credits.free_blocks)
        self.credits.hold(request_id, num_credited_blocks)
        self.prices[request_id] = price
        if price > num_credited_blocks:
            self.beyond_credit[request_id] = price - num_credited_blocks

    def leave(self, request_id: int) -> None:
        """It decodes here no more, and holds its credit on."""
        price = self.prices.pop(request_id)
        self.beyond_credit.pop(request_id, None)
        self.num_shared_blocks = max(0, self.num_shared_blocks - price)  # until one looks again

    def check_integrity(self, replica: int) -> None:
        self.credits.check_integrity()
        if not self.prices.keys() <= set(self.credits.request_ids):
            raise InternalError(f"replica {replica} decodes what holds no blocks there")
        for request_id, price in self.prices.items():
            if self.credits.held(request_id) + self.beyond_credit.get(request_id, 0) != price:
                raise InternalError(f"request {request_id} is not booked at replica {replica} as it was priced")


def peak_tokens(sequences: Iterable[Progress]) -> tuple[int, int]:
    """The most tokens that the sequences will hold at one time, and how many sequences hold them.

    All get longer at one pace, and hold nothing once they have ended: so it is when one is about to end (the future
    required memory of Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", 2025).
    """
    most, num_then, num_tokens = 0, 0, 0
    for number, each in enumerate(sorted(sequences, key=lambda each: -each.num_more_tokens), start=1):
        num_tokens += each.num_tokens
        held = num_tokens + number * each.num_more_tokens
        if held > most:
            most, num_then = held, number
    return most, num_then


class Decoders:
    """All of them. `watermark`: the share of a pool that is kept free for sequences that get longer than expected.

    `progress`: of a request that decodes. Given it, a pool is filled by what its sequences will need at one time, and
    not by what each needs in the end; where a host pool is filled too, that takes the rest. A request that is `alone`
    shares its replica with no other sequence. `unreachable` pairs (source, reader): the reader cannot map the source's
    pool, as long as both are up.
    """

    def __init__(
        self, watermark: float = 0.0, block_size: int = 1, progress: Callable[[int], Progress] | None = None
    ) -> None:
        self._watermark = watermark
        self._block_size = block_size
        self._progress = progress
        self._looked_s = float("-inf")
        self._up: dict[int, Decoder] = {}
        self._pool_blocks: dict[int, int] = {}  # replica |-> pool size, kept while it is down; none of spare ones
        self._replica_of: dict[int, int] = {}  # request_id |-> where it decodes, or is to; until the release
        self._alone: set[int] = set()  # request ids
        self.unreachable: set[tuple[int, int]] = set()

    def __iter__(self) -> Iterator[Decoder]:
        return iter(self._up.values())

    def get(self, replica: int) -> Decoder | None:
        """None: it is down."""
        return self._up.get(replica)

    @property
    def max_pool_blocks(self) -> int | None:
        """Of those that take hand-offs, or did before they went down; None: of none it is known."""
        return max(self._pool_blocks.values(), default=None)

    @property
    def num_free_blocks(self) -> int:
        return sum(each.num_free_blocks for each in self if each.is_open)

    @property
    def with_places(self) -> set[int]:
        """Replicas that would take one sequence more, if they have the blocks."""
        return {replica for replica, each in self._up.items() if each.is_open and each.num_free_seqs > 0}

    def num_seqs(self, replica: int) -> int:
        """Sequences that decode there, or will without passing through the bridge."""
        return len(self._up[replica].prices) if replica in self._up else 0

    def request_ids(self, replica: int) -> list[int]:
        return list(self._up[replica].prices) if replica in self._up else []

    def replica_of(self, request_id: int) -> int | None:
        return self._replica_of.get(request_id)

    def look_again(self, now: float) -> None:
        """Finds what the sequences of each replica will need at one time, where the last look is long past."""
        if self._progress is None or now - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now
        for decoder in self:
            if decoder.limits.num_host_blocks or 2 * decoder.credits.free_blocks > decoder.num_blocks:
                decoder.num_shared_blocks = 0  # what is shared would not be asked for
                continue
            num_tokens, num_seqs = peak_tokens(map(self._progress, decoder.prices))
            num_needed = num_tokens // self._block_size + num_seqs  # each has one block that is not full
            num_unneeded = max(0, sum(decoder.prices.values()) - num_needed)
            decoder.num_shared_blocks = int(SHARED_SHARE * num_unneeded)

    # ---- replicas come and go

    def replica_up(
        self, replica: int, credits: Credits, limits: DecodeLimits, *, is_open: bool = True, is_spare: bool = False
    ) -> None:
        """Takes a replica with empty pools into service."""
        if replica in self._up:
            raise InternalError(f"replica {replica} is already up")
        self._up[replica] = Decoder(credits, limits, int(self._watermark * credits.num_blocks))
        self.set_open(replica, is_open, is_spare=is_spare)

    def set_open(self, replica: int, is_open: bool, *, is_spare: bool = False) -> None:
        """Whether it takes new sequences; those that are there go on."""
        decoder = self._up[replica]
        decoder.is_open, decoder.is_spare = is_open, is_spare
        self._pool_blocks.pop(replica, None)
        if decoder.takes_hand_offs:
            self._pool_blocks[replica] = decoder.num_blocks

    def replica_down(self, replica: int) -> None:
        """Forgets a replica, and which sequences are there."""
        gone = self._up.pop(replica, None)
        for request_id in gone.prices if gone is not None else ():
            self._forget(request_id)
        self.unreachable = {pair for pair in self.unreachable if replica not in pair}

    def replica_removed(self, replica: int) -> None:
        """It does not come back: its pool counts no more."""
        self.replica_down(replica)
        self._pool_blocks.pop(replica, None)

    def cannot_reach(self, source: int, reader: int) -> None:
        self.unreachable.add((source, reader))

    def is_reachable_from(self, source: int) -> bool:
        """Whether what the source computes can go on: there, or where a replica may be able to map its pool."""
        here = self._up.get(source)
        if here is not None and here.is_open and here.is_spare:
            return True
        readers = [replica for replica, decoder in self._up.items() if decoder.takes_hand_offs]
        return not readers or any((source, reader) not in self.unreachable for reader in readers)

    # ---- sequences come and go

    def set_alone(self, request_id: int) -> None:
        """The request is suspected of killing replicas: from now on it runs with no other sequence beside it."""
        self._alone.add(request_id)

    def clear_alone(self, request_id: int) -> None:
        self._alone.discard(request_id)

    def fits(self, replica: int, request_id: int, need: Need, num_held_blocks: int = 0) -> bool:
        """Whether there is room for it now; of these blocks it has so many there already, and gives them back."""
        decoder = self._up.get(replica)
        return decoder is not None and self._may_share(decoder, request_id) and decoder.fits(need, num_held_blocks)

    def _may_share(self, decoder: Decoder, request_id: int) -> bool:
        if not self._alone or not decoder.prices:
            return True
        return request_id not in self._alone and self._alone.isdisjoint(decoder.prices)

    def may_go(self, request_id: int, source: int, replica: int, need: Need) -> bool:
        """Whether a replica has room for a sequence now whose KV is at the source."""
        decoder = self._up.get(replica)
        return (
            decoder is not None
            and (replica == source or request_id not in decoder.credits)  # its lease there, of before, has to end first
            and (source, replica) not in self.unreachable
            and self.fits(replica, request_id, need, decoder.credits.held(request_id))
        )

    def largest_pool(self, source: int) -> int:
        """Blocks of one, among the replicas that take what the source hands off; 0: there is none."""
        pools = (
            decoder.num_blocks
            for replica, decoder in self._up.items()
            if decoder.takes_hand_offs and (source, replica) not in self.unreachable
        )
        return max(pools, default=0)

    def best_for(self, request_id: int, source: int, need: Need) -> int | None:
        """Where it may go now: of those that take hand-offs the one with the most free blocks."""
        fitting = [
            replica
            for replica, decoder in self._up.items()
            if not decoder.is_spare and self.may_go(request_id, source, replica, need)
        ]
        return max(fitting, key=lambda replica: self._up[replica].num_free_blocks, default=None)

    def hold(self, replica: int, request_id: int, need: Need, *, is_here: bool = False) -> None:
        """`is_here`: what is leased of it there becomes what it decodes from."""
        if is_here:
            self._up[replica].credits.release(request_id)
        self._up[replica].hold(request_id, need)
        self._replica_of[request_id] = replica

    def leave(self, replica: int, request_id: int) -> None:
        """It is to go on elsewhere, and holds its credit until then."""
        self._up[replica].leave(request_id)
        del self._replica_of[request_id]

    def released(self, replica: int, request_ids: Iterable[int]) -> None:
        """The replica has freed the blocks of these requests. Requests that it does not hold are ignored."""
        decoder = self._up.get(replica)
        if decoder is None:
            return
        for request_id in request_ids:
            if request_id in decoder.prices:
                decoder.credits.release(request_id)
                decoder.leave(request_id)
                self._forget(request_id)

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        holders: dict[int, int] = {}
        for replica, decoder in self._up.items():
            decoder.check_integrity(replica)
            holders.update((request_id, replica) for request_id in decoder.prices)
        if holders != self._replica_of:
            raise InternalError("requests in decode and holders of credit differ")

    def _forget(self, request_id: int) -> None:
        del self._replica_of[request_id]
        self._alone.discard(request_id)
