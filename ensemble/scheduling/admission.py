"""The bridge between prefill and decode, and who may start prefill so that decode has room for it then.

promised (in prefill) --arrive--> bridge --next_submission--> decode --released--> gone
[counted against decode's headroom] [source's blocks leased]  [blocks held at one replica]
                                          try_start_at -------^   a prompt that the decoding replica computes itself
"""

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.decoders import Decoders, Need


class Submission(NamedTuple):
    """Requests of the bridge that go to one replica now."""

    replica: int
    request_ids: list[int]


class DecodeAdmission:
    """Bounds what prefill runs ahead of decode, and binds finished prompts to replicas, in order of arrival.

    Replicas are filled by `expected_kv_tokens` (what a request will hold in the end): optimistically, so that sequences
    may have to be preempted. None: by what requests may hold at most, so that every sequence can be brought to its end,
    by swapping where the host pool is filled too.
    """

    def __init__(
        self,
        decoders: Decoders,
        *,
        block_size: int,
        max_bridge_wait_s: float,
        wait_s: Callable[[int], float] = lambda num_blocks: 0.0,
        expected_kv_tokens: Callable[[Request], int] | None = None,
    ) -> None:
        """`wait_s(num_blocks)`: predicted seconds until decode has freed so many blocks."""
        self.decoders = decoders
        self.block_size = block_size
        self.max_bridge_wait_s = max_bridge_wait_s
        self._wait_s = wait_s
        self._expected_kv_tokens = expected_kv_tokens
        self._promised: dict[int, Need] = {}  # request_id |-> what it will need; in prefill or in the bridge
        self._bridge: dict[int, int] = {}  # request_id |-> replica that has its KV, in order of arrival
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

    def blocks_for(self, request: Request) -> int:
        """Blocks that the request holds in decode if it runs to its limit."""
        return -(-request.max_num_kv_tokens // self.block_size)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest if no replica could ever hold the request."""
        limit = self.decoders.max_pool_blocks
        if limit is not None and request.sampling.max_tokens > 1 and self.blocks_for(request) > limit:
            raise InvalidRequest(
                "length of input_ids or text_input plus max_tokens",
                request.max_num_tokens,
                f"the decode pool holds {limit * self.block_size} tokens",
            )

    # ---- who may start prefill

    def num_lacking_blocks(self, request: Request, *, without_spare: bool = False) -> int:
        """Blocks that decode has to free before it has room for the request beside all that is promised; 0: it has."""
        decoders = [each for each in self.decoders if each.is_open and not (without_spare and each.is_spare)]
        need = self._need(request).expected
        num_lacking = self._num_promised_blocks + need - sum(each.num_free_blocks for each in decoders)
        num_free_seqs = sum(each.num_free_seqs for each in decoders)
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
        self._expect_new(request.request_id)
        need = self._need(request)
        self._promised[request.request_id] = need
        self._num_promised_blocks += need.expected

    def may_start_at(self, replica: int, request: Request) -> bool:
        """Whether a replica may compute this prompt and decode it.

        It may if it has room for the request's whole way, beside it there is room for all that is promised, and nobody
        waits in the bridge, who might go there.
        """
        decoder = self.decoders.get(replica)
        if decoder is None or (self._bridge and not decoder.is_spare):
            return False
        need = self._need(request)
        if not self.decoders.fits(replica, request.request_id, need):
            return False
        return not self._promised or self._num_promised_blocks + need.expected <= self.decoders.num_free_blocks

    def try_start_at(self, replica: int, request: Request) -> bool:
        """`may_start_at`, and if so the request is in decode from now on."""
        if not self.may_start_at(replica, request):
            return False
        self._expect_new(request.request_id)
        self.decoders.hold(replica, request.request_id, self._need(request))
        return True

    def withdraw(self, request_id: int) -> None:
        """Forgets a request that ends before submission; the caller has to end its lease, if it is in the bridge.

        Not promised is fine: its only token needed none. From decode it is gone when its replica reports the release.
        """
        if request_id in self._promised:
            self._take_promise(request_id)
        self._bridge.pop(request_id, None)
        if self.decoders.replica_of(request_id) is None:
            self.decoders.clear_alone(request_id)

    # ---- the bridge

    def arrive(self, request_id: int, source: int) -> None:
        """Takes a prefilled sequence into the bridge. Raises InternalError if it was not promised, or was withdrawn."""
        if request_id not in self._promised or request_id in self._bridge:
            raise InternalError(f"request {request_id} arrived in the bridge without a promise")
        self._bridge[request_id] = source

    def may_leave(self, request: Request, source: int) -> bool:
        """Whether there is a replica that takes hand-offs, could hold the request, and may map the source's pool."""
        return self._need(request).life <= self.decoders.largest_pool(source)

    def leave(self, request: Request, source: int) -> None:
        """A sequence decodes at a replica no more, and waits in the bridge, with its KV there, to go on elsewhere."""
        self.decoders.leave(source, request.request_id)
        self.promise(request)
        self.arrive(request.request_id, source)

    def may_move(self, request: Request, source: int, replica: int) -> bool:
        """Whether a sequence that decodes at the source could go on there, beside all that is promised."""
        need = self._need(request)
        has_room = self._num_promised_blocks + need.expected <= self.decoders.num_free_blocks
        return has_room and self.decoders.may_go(request.request_id, source, replica, need)

    def submit(self, request_id: int, replica: int) -> bool:
        """Takes a sequence of the bridge to this replica, before all others, if that has room for it now."""
        source, need = self._bridge[request_id], self._promised[request_id]
        if not self.decoders.may_go(request_id, source, replica, need):
            return False
        self._submit(request_id, source, replica)
        return True

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
            best = self.decoders.best_for(request_id, source, need)
            if best is None and need.life > self.decoders.largest_pool(source):
                stays += 1
                continue
            if best is None or (request_ids and best != replica):
                break
            replica = best
            self._submit(request_id, source, replica)
            request_ids.append(request_id)
        return self._next_in_place() if replica is None else Submission(replica, request_ids)

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        self.decoders.check_integrity()
        is_twice = any(self.decoders.replica_of(request_id) is not None for request_id in self._promised)
        if is_twice or not self._bridge.keys() <= self._promised.keys():
            raise InternalError("a request is in two places between prefill and decode")
        if sum(need.expected for need in self._promised.values()) != self._num_promised_blocks:
            raise InternalError(f"{self._num_promised_blocks} blocks counted as promised")

    def _need(self, request: Request) -> Need:
        life = self.blocks_for(request)
        if self._expected_kv_tokens is None:
            return Need(life, life)
        return Need(min(life, -(-self._expected_kv_tokens(request) // self.block_size)), life)

    def _expect_new(self, request_id: int) -> None:
        if request_id in self._promised or self.decoders.replica_of(request_id) is not None:
            raise InternalError(f"request {request_id} is already promised")

    def _take_promise(self, request_id: int) -> Need:
        need = self._promised.pop(request_id)
        self._num_promised_blocks -= need.expected
        return need

    def _next_in_place(self) -> Submission | None:
        """The first that goes on where its KV is; at a spare replica if it would wait for another one too long."""
        with_places = self.decoders.with_places
        if with_places.isdisjoint(self._bridge.values()):
            return None
        num_lacking = -sum(each.num_free_blocks for each in self.decoders if each.takes_hand_offs)
        largest = {source: self.decoders.largest_pool(source) for source in with_places}
        have_room_soon = True  # those who stand here, and all before them
        for request_id, source in self._bridge.items():
            need = self._promised[request_id]
            num_lacking += need.expected
            if source not in with_places:
                continue
            have_room_soon = have_room_soon and self._wait_s(max(1, num_lacking)) <= self.max_bridge_wait_s
            decoder = self.decoders.get(source)
            assert decoder is not None, "it has places"
            if have_room_soon and decoder.is_spare and need.life <= largest[source]:
                continue
            if self.decoders.fits(source, request_id, need, decoder.credits.held(request_id)):
                self._submit(request_id, source, source)
                return Submission(source, [request_id])
        return None

    def _submit(self, request_id: int, source: int, replica: int) -> None:
        need = self._take_promise(request_id)
        del self._bridge[request_id]
        self.decoders.hold(replica, request_id, need, is_here=source == replica)
