"""The bridge between prefill and decode, and what decode has room for.

promised (in prefill) --arrive--> bridge --next_submission--> decode --released--> gone
[counted against decode's headroom] [source's blocks leased]  [blocks held at one replica]
                                          try_start_at -------^   a prompt that the decoding replica computes itself
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, TypeAlias

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.credits import Credits

# Where a request was: promised and in prefill; in the bridge, its blocks leased; in decode at that replica.
Cancelled: TypeAlias = Literal["promised", "bridge"] | int


class _Need(NamedTuple):
    """Blocks of a request in decode."""

    expected: int  # at the length its output is expected to have, or by reservation may have
    life: int  # at the length where it has to end


class Submission(NamedTuple):
    """Requests of the bridge that go to one replica now."""

    replica: int
    request_ids: list[int]


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What a replica takes to decode."""

    max_num_seqs: int  # running, waiting and swapped
    num_host_blocks: int = 0  # of a host pool that is to be filled too


@dataclass(slots=True)
class _Replica:
    credits: Credits  # shared with PrefillScheduler
    limits: DecodeLimits
    num_reserved_blocks: int
    is_open: bool  # for new sequences
    is_spare: bool = False
    prices: dict[int, int] = field(default_factory=dict)  # request_id |-> blocks that it is taken to need in the end
    beyond_credit: dict[int, int] = field(default_factory=dict)  # request_id |-> of these, booked in the host pool

    @property
    def num_blocks(self) -> int:
        return self.credits.num_blocks

    @property
    def num_free_blocks(self) -> int:
        num_free_host_blocks = self.limits.num_host_blocks - sum(self.beyond_credit.values())
        return max(0, self.credits.free_blocks + num_free_host_blocks - self.num_reserved_blocks)

    @property
    def num_free_seqs(self) -> int:
        return self.limits.max_num_seqs - len(self.prices)

    def price(self, need: _Need) -> int:
        return min(need.expected, self.num_blocks - self.num_reserved_blocks)

    def could_ever_hold(self, need: _Need) -> bool:
        return need.life <= self.num_blocks

    def fits(self, need: _Need, num_held_blocks: int = 0) -> bool:
        """`num_held_blocks`: that it has here already, and gives back."""
        if not self.is_open or self.num_free_seqs < 1 or not self.could_ever_hold(need):
            return False
        if self.price(need) > self.num_free_blocks + num_held_blocks:
            return False
        if not self.limits.num_host_blocks or not self.prices:
            return True
        # Room for the longest twice over: then whichever sequence lacks a block, another one can be swapped out.
        price = self.price(need)
        longest = max(price, *self.prices.values())
        return sum(self.prices.values()) + price + longest <= self.num_blocks + self.limits.num_host_blocks

    def hold(self, request_id: int, need: _Need) -> None:
        price = self.price(need)
        num_credited_blocks = min(price, self.credits.free_blocks)
        self.credits.hold(request_id, num_credited_blocks)
        self.prices[request_id] = price
        if price > num_credited_blocks:
            self.beyond_credit[request_id] = price - num_credited_blocks

    def release(self, request_id: int) -> None:
        self.credits.release(request_id)
        self.prices.pop(request_id)
        self.beyond_credit.pop(request_id, None)


class DecodeAdmission:
    """Bounds what prefill runs ahead of decode, and binds finished prompts to replicas, in order of arrival.

    Replicas are filled by `expected_kv_tokens` (what a request will hold in the end) up to `watermark` below their
    pools: optimistically, so that sequences may have to be preempted. None: by what requests may hold at most, so that
    every sequence can be brought to its end, by swapping where the host pool is filled too. A request that is `alone`
    shares its replica with no other sequence.

    A `spare` replica takes of the bridge only what it has computed itself and what would wait for others too long.
    """

    def __init__(
        self,
        *,
        block_size: int,
        max_bridge_wait_s: float,
        wait_s: Callable[[int], float] = lambda num_blocks: 0.0,
        expected_kv_tokens: Callable[[Request], int] | None = None,
        watermark: float = 0.0,
    ) -> None:
        """`wait_s(num_blocks)`: predicted seconds until decode has freed so many blocks."""
        self.block_size = block_size
        self.max_bridge_wait_s = max_bridge_wait_s
        self._wait_s = wait_s
        self.watermark = watermark  # share of a pool
        self._expected_kv_tokens = expected_kv_tokens
        self._replicas: dict[int, _Replica] = {}
        self._pool_blocks: dict[int, int] = {}  # replica |-> pool size, kept while it is down
        self._promised: dict[int, _Need] = {}  # request_id |-> what it will need; in prefill or in the bridge
        self._bridge: dict[int, int] = {}  # request_id |-> replica that has its KV, in order of arrival
        self._replica_of: dict[int, int] = {}  # request_id |-> replica, from submission until the release
        self.unreachable: set[tuple[int, int]] = set()  # (source, reader)
        self._alone: set[int] = set()  # request ids
        self._num_promised_blocks = 0

    @property
    def num_promised_seqs(self) -> int:
        """Sequences in prefill and in the bridge."""
        return len(self._promised)

    @property
    def num_promised_blocks(self) -> int:
        return self._num_promised_blocks

    @property
    def num_bridge_seqs(self) -> int:
        return len(self._bridge)

    @property
    def num_free_blocks(self) -> int:
        return sum(replica.num_free_blocks for replica in self._replicas.values() if replica.is_open)

    def blocks_for(self, request: Request) -> int:
        """Blocks that the request holds in decode if it runs to its limit."""
        return -(-request.max_num_kv_tokens // self.block_size)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest if no replica could ever hold the request."""
        limit = max(self._pool_blocks.values()) if self._pool_blocks else None
        if limit is not None and request.sampling.max_tokens > 1 and self.blocks_for(request) > limit:
            raise InvalidRequest(
                "length of input_ids or text_input plus max_tokens",
                request.max_num_tokens,
                f"the decode pool holds {limit * self.block_size} tokens",
            )

    def replica_up(
        self, replica: int, credits: Credits, limits: DecodeLimits, *, is_open: bool = True, is_spare: bool = False
    ) -> None:
        """Takes a replica with empty pools into service."""
        if replica in self._replicas:
            raise InternalError(f"replica {replica} is already up")
        num_reserved_blocks = int(self.watermark * credits.num_blocks) if self._expected_kv_tokens else 0
        self._replicas[replica] = _Replica(credits, limits, num_reserved_blocks, is_open)
        self.set_open(replica, is_open, is_spare=is_spare)

    def set_open(self, replica: int, is_open: bool, *, is_spare: bool = False) -> None:
        """Whether it takes new sequences; those that are there go on."""
        state = self._replicas[replica]
        state.is_open, state.is_spare = is_open, is_spare
        self._pool_blocks.pop(replica, None)
        if is_open and not is_spare:
            self._pool_blocks[replica] = state.num_blocks

    def replica_down(self, replica: int) -> None:
        """Forgets a replica, and which sequences are there."""
        gone = self._replicas.pop(replica, None)
        for request_id in gone.prices if gone is not None else ():
            del self._replica_of[request_id]
            self._alone.discard(request_id)
        self.unreachable = {pair for pair in self.unreachable if replica not in pair}

    def replica_removed(self, replica: int) -> None:
        """It does not come back: its pool counts no more."""
        self.replica_down(replica)
        self._pool_blocks.pop(replica, None)

    def cannot_reach(self, source: int, reader: int) -> None:
        """The reader cannot map the source's pool, as long as both are up."""
        self.unreachable.add((source, reader))

    def is_reachable_from(self, source: int) -> bool:
        """Whether what the source computes can go on: there, or where a replica may be able to map its pool."""
        state = self._replicas.get(source)
        if state is not None and state.is_open and state.is_spare:
            return True
        readers = [replica for replica, state in self._replicas.items() if self._takes_hand_offs(state)]
        return not readers or any((source, reader) not in self.unreachable for reader in readers)

    def clear_alone(self, request_id: int) -> None:
        self._alone.discard(request_id)

    def set_alone(self, request_id: int) -> None:
        """The request is suspected of killing replicas: from now on it runs with no other sequence beside it."""
        self._alone.add(request_id)

    def num_seqs(self, replica: int) -> int:
        """Sequences that decode there, or will without passing through the bridge."""
        state = self._replicas.get(replica)
        return 0 if state is None else len(state.prices)

    def request_ids(self, replica: int) -> list[int]:
        state = self._replicas.get(replica)
        return [] if state is None else list(state.prices)

    def num_lacking_blocks(self, request: Request, *, without_spare: bool = False) -> int:
        """Blocks that decode has to free before it has room for the request beside all that is promised; 0: it has."""
        states = [each for each in self._replicas.values() if each.is_open and not (without_spare and each.is_spare)]
        need = self._need(request).expected
        num_lacking = self._num_promised_blocks + need - sum(each.num_free_blocks for each in states)
        num_free_seqs = sum(each.num_free_seqs for each in states)
        if self.num_promised_seqs >= num_free_seqs:  # as many as so many sequences hold
            num_lacking = max(num_lacking, need * (self.num_promised_seqs + 1 - num_free_seqs))
        return max(0, num_lacking)

    def may_start(self, request: Request) -> bool:
        """Whether prefill may start it: decode has room for it beside all that is promised, or will have soon."""
        if request.sampling.max_tokens == 1:
            return True
        num_lacking = self.num_lacking_blocks(request)
        return not num_lacking or self._wait_s(num_lacking) <= self.max_bridge_wait_s

    def promise(self, request: Request) -> None:
        """Counts a request that starts prefill, unless it ends there with its only token."""
        if request.sampling.max_tokens == 1:
            return
        if request.request_id in self._promised or request.request_id in self._replica_of:
            raise InternalError(f"request {request.request_id} is already promised")
        need = self._need(request)
        self._promised[request.request_id] = need
        self._num_promised_blocks += need.expected

    def try_promise(self, request: Request) -> bool:
        """`may_start`, and if so `promise`: what PrefillScheduler.next_batch asks."""
        if not self.may_start(request):
            return False
        self.promise(request)
        return True

    def may_start_at(self, replica: int, request: Request) -> bool:
        """Whether a replica may compute this prompt and decode it.

        It may if it has room for the request's whole way, beside it there is room for all that is promised, and nobody
        waits in the bridge, who might go there.
        """
        state = self._replicas.get(replica)
        if state is None or (self._bridge and not state.is_spare):
            return False
        need = self._need(request)
        if not self._fits(state, request.request_id, need):
            return False
        return not self._promised or self._num_promised_blocks + need.expected <= self.num_free_blocks

    def try_start_at(self, replica: int, request: Request) -> bool:
        """`may_start_at`, and if so the request is in decode from now on."""
        if not self.may_start_at(replica, request):
            return False
        state, need = self._replicas[replica], self._need(request)
        if request.request_id in self._promised or request.request_id in self._replica_of:
            raise InternalError(f"request {request.request_id} is already promised")
        state.hold(request.request_id, need)
        self._replica_of[request.request_id] = replica
        return True

    def withdraw(self, request_id: int) -> None:
        """Forgets a request that ended before submission. Not promised is fine: its only token needed none."""
        if request_id in self._promised:
            self._num_promised_blocks -= self._promised.pop(request_id).expected
        self._bridge.pop(request_id, None)
        if request_id not in self._replica_of:
            self._alone.discard(request_id)

    def arrive(self, request_id: int, source: int) -> None:
        """Takes a prefilled sequence into the bridge. Raises InternalError if it was not promised, or was withdrawn."""
        if request_id not in self._promised or request_id in self._bridge:
            raise InternalError(f"request {request_id} arrived in the bridge without a promise")
        self._bridge[request_id] = source

    def may_leave(self, request: Request, source: int) -> bool:
        """Whether there is a replica that takes hand-offs, could hold the request, and may map the source's pool."""
        return self._need(request).life <= self._largest_pool(source)

    def leave(self, request: Request, source: int) -> None:
        """A sequence decodes at a replica no more, and waits in the bridge, with its KV there, to go on elsewhere."""
        state = self._replicas[source]
        del state.prices[request.request_id], self._replica_of[request.request_id]
        state.beyond_credit.pop(request.request_id, None)
        self.promise(request)
        self.arrive(request.request_id, source)

    def submit(self, request_id: int, replica: int) -> bool:
        """Takes a sequence of the bridge to this replica, before all others, if that has room for it now."""
        source, need = self._bridge[request_id], self._promised[request_id]
        if not self._may_go(request_id, source, replica, need):
            return False
        self._submit(request_id, source, replica)
        return True

    def may_move(self, request: Request, source: int, replica: int) -> bool:
        """Whether a sequence that decodes at the source could go on there, beside all that is promised."""
        need = self._need(request)
        has_room = self._num_promised_blocks + need.expected <= self.num_free_blocks
        return has_room and self._may_go(request.request_id, source, replica, need)

    def next_submission(self) -> Submission | None:
        """Takes the head of the bridge, and those behind it bound for the same replica; None if the head has to wait.

        The replica is the one with the most free blocks among those with room. A head that no live replica could ever
        hold stands before nobody, nor does one that waits stand before those that can go on where their KV is: it may
        wait for the very blocks that they have leased. Call again until None.
        """
        request_ids: list[int] = []
        replica, stays = None, 0  # those that stand before nobody
        while entry := next(islice(self._bridge.items(), stays, None), None):
            request_id, source = entry
            need = self._promised[request_id]
            best = self._best_replica(request_id, source, need)
            if best is None and need.life > self._largest_pool(source):
                stays += 1
                continue
            if best is None or (request_ids and best != replica):
                break
            replica = best
            self._submit(request_id, source, replica)
            request_ids.append(request_id)
        return self._next_in_place() if replica is None else Submission(replica, request_ids)

    def released(self, replica: int, request_ids: Iterable[int]) -> None:
        """The replica has freed the blocks of these requests. Requests that it does not hold are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for request_id in request_ids:
            if request_id in state.prices:
                state.release(request_id)
                del self._replica_of[request_id]
                self._alone.discard(request_id)

    def cancel(self, request_id: int) -> Cancelled | None:
        """Ends a request, and says where it was; None if it is not here.

        From "promised" and "bridge" it is gone, and in the bridge the caller has to end the lease; a replica has to be
        told, and will report the release.
        """
        if request_id in self._replica_of:
            return self._replica_of[request_id]
        was_in_bridge, was_promised = request_id in self._bridge, request_id in self._promised
        self.withdraw(request_id)
        if was_in_bridge:
            return "bridge"
        return "promised" if was_promised else None

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        holders: dict[int, int] = {}
        for replica, state in self._replicas.items():
            state.credits.check_integrity()
            holders.update((request_id, replica) for request_id in state.prices)
            if not state.prices.keys() <= set(state.credits.request_ids):
                raise InternalError(f"replica {replica} decodes what holds no blocks there")
            for request_id, price in state.prices.items():
                if state.credits.held(request_id) + state.beyond_credit.get(request_id, 0) != price:
                    raise InternalError(f"request {request_id} is not booked at replica {replica} as it was priced")
        if holders != self._replica_of:
            raise InternalError("requests in decode and holders of credit differ")
        if not self._bridge.keys() <= self._promised.keys() or self._promised.keys() & holders.keys():
            raise InternalError("a request is in two places between prefill and decode")
        if sum(need.expected for need in self._promised.values()) != self._num_promised_blocks:
            raise InternalError(f"{self._num_promised_blocks} blocks counted as promised")

    def _need(self, request: Request) -> _Need:
        life = self.blocks_for(request)
        if self._expected_kv_tokens is None:
            return _Need(life, life)
        return _Need(min(life, -(-self._expected_kv_tokens(request) // self.block_size)), life)

    def _fits(self, state: _Replica, request_id: int, need: _Need, num_held_blocks: int = 0) -> bool:
        if self._alone and state.prices and (request_id in self._alone or not self._alone.isdisjoint(state.prices)):
            return False
        return state.fits(need, num_held_blocks)

    def _may_go(self, request_id: int, source: int, replica: int, need: _Need) -> bool:
        state = self._replicas.get(replica)
        return (
            state is not None
            and (replica == source or request_id not in state.credits)  # its lease there, of before, has to end first
            and (source, replica) not in self.unreachable
            and self._fits(state, request_id, need, state.credits.held(request_id))
        )

    def _best_replica(self, request_id: int, source: int, need: _Need) -> int | None:
        fitting = [
            replica
            for replica, state in self._replicas.items()
            if not state.is_spare and self._may_go(request_id, source, replica, need)
        ]
        return max(fitting, key=lambda replica: self._replicas[replica].num_free_blocks, default=None)

    def _next_in_place(self) -> Submission | None:
        may_take = {each for each, state in self._replicas.items() if state.is_open and state.num_free_seqs > 0}
        if may_take.isdisjoint(self._bridge.values()):
            return None
        num_lacking = -sum(each.num_free_blocks for each in self._replicas.values() if self._takes_hand_offs(each))
        largest = {source: self._largest_pool(source) for source in may_take}
        have_room_soon = True  # those who stand here, and all before them
        for request_id, source in self._bridge.items():
            need = self._promised[request_id]
            num_lacking += need.expected
            if source not in may_take:
                continue
            state = self._replicas[source]
            have_room_soon = have_room_soon and self._wait_s(max(1, num_lacking)) <= self.max_bridge_wait_s
            if have_room_soon and state.is_spare and need.life <= largest[source]:
                continue
            if self._fits(state, request_id, need, state.credits.held(request_id)):
                self._submit(request_id, source, source)
                return Submission(source, [request_id])
        return None

    @staticmethod
    def _takes_hand_offs(state: _Replica) -> bool:
        return state.is_open and not state.is_spare

    def _largest_pool(self, source: int) -> int:
        """Blocks, of the replicas that take what it hands off."""
        pools = (
            state.num_blocks
            for replica, state in self._replicas.items()
            if self._takes_hand_offs(state) and (source, replica) not in self.unreachable
        )
        return max(pools, default=0)

    def _submit(self, request_id: int, source: int, replica: int) -> None:
        need = self._promised.pop(request_id)
        self._num_promised_blocks -= need.expected
        del self._bridge[request_id]
        if source == replica:  # its lease becomes what it decodes from
            self._replicas[replica].credits.release(request_id)
        self._replicas[replica].hold(request_id, need)
        self._replica_of[request_id] = replica
