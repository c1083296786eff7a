"""The bridge between prefill and decode, and the decode replicas' credit.

promised (in prefill) --arrive--> bridge --next_submission--> decode --released--> gone
[counted against decode's headroom] [source's blocks leased]  [blocks held at one replica]
                                          try_start_at -------^   a prompt that the decode replica computes itself
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.credits import Credits
from ensemble.workers.messages import KVHandoff, SubmitDecode

Cancelled: TypeAlias = tuple[Literal["promised"]] | tuple[Literal["bridge"], KVHandoff] | tuple[Literal["decode"], int]


class _Need(NamedTuple):
    """Blocks of a request in decode."""

    expected: int  # at the length its output is expected to have
    life: int  # at the length where it has to end


@dataclass(slots=True)
class _Replica:
    """One decode replica. With a host pool it takes what is expected to fit, else only what fits in any case."""

    num_blocks: int
    num_host_blocks: int
    credits: Credits
    lives: dict[int, int] = field(default_factory=dict)  # request_id |-> blocks for its whole life

    def price(self, need: _Need) -> int:
        return min(need.expected, self.credits.num_blocks) if self.num_host_blocks else need.life

    def fits(self, need: _Need) -> bool:
        if not self.credits.fits(self.price(need)):
            return False
        if not self.num_host_blocks or not self.lives:
            return True
        # Room for the longest twice over: then whichever sequence lacks a block, another one can be swapped out.
        longest = max(need.life, *self.lives.values())
        return sum(self.lives.values()) + need.life + longest <= self.num_blocks + self.num_host_blocks

    def hold(self, request_id: int, need: _Need) -> None:
        self.credits.hold(request_id, self.price(need))
        self.lives[request_id] = need.life

    def release(self, request_id: int) -> None:
        self.credits.release(request_id)
        del self.lives[request_id]


class DecodeAdmission:
    """Bounds what prefill runs ahead of decode, and binds finished prompts to decode replicas, in order of arrival.

    Replicas with a host pool are filled by `expected_kv_tokens` (what a request will hold in the end) up to `watermark`
    below their pool, as far as every sequence can be brought to its end by swapping; others by what requests may hold.
    """

    def __init__(
        self,
        *,
        block_size: int,
        max_num_bridge_seqs: int,
        expected_kv_tokens: Callable[[Request], int] | None = None,
        watermark: float = 0.0,
    ) -> None:
        self.block_size = block_size
        self.max_num_bridge_seqs = max_num_bridge_seqs
        self.watermark = watermark  # share of a pool
        self._expected_kv_tokens = expected_kv_tokens
        self._replicas: dict[int, _Replica] = {}
        self._pool_blocks: dict[int, int] = {}  # replica |-> pool size, kept while it is down
        self._promised: dict[int, _Need] = {}  # request_id |-> what it will need; in prefill or in the bridge
        self._bridge: dict[int, KVHandoff] = {}  # request_id |-> hand-off, in order of arrival
        self._replica_of: dict[int, int] = {}  # request_id |-> replica, from submission until the release
        self._num_promised_blocks = 0

    @property
    def num_promised_seqs(self) -> int:
        """Sequences in prefill and in the bridge."""
        return len(self._promised)

    @property
    def num_bridge_seqs(self) -> int:
        return len(self._bridge)

    @property
    def num_bridge_blocks(self) -> int:
        """Blocks of the bridge's sequences, which stay leased at their sources."""
        return sum(len(handoff.block_ids) for handoff in self._bridge.values())

    @property
    def num_decode_seqs(self) -> int:
        return len(self._replica_of)

    @property
    def num_free_blocks(self) -> int:
        return sum(replica.credits.free_blocks for replica in self._replicas.values())

    def blocks_for(self, request: Request) -> int:
        """Blocks that the request holds in decode if it runs to its limit."""
        return -(-request.max_num_kv_tokens // self.block_size)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest if no decode replica could ever hold the request."""
        limit = max(self._pool_blocks.values()) if self._pool_blocks else None
        if limit is not None and request.sampling.max_tokens > 1 and self.blocks_for(request) > limit:
            raise InvalidRequest(
                "length of input_ids or text_input plus max_tokens",
                request.max_num_tokens,
                f"the decode pool holds {limit * self.block_size} tokens",
            )

    def replica_up(self, replica: int, num_blocks: int, max_num_seqs: int, num_host_blocks: int = 0) -> None:
        """Takes a replica with empty pools into service."""
        if replica in self._replicas:
            raise InternalError(f"decode replica {replica} is already up")
        num_reserved_blocks = int(self.watermark * num_blocks) if num_host_blocks else 0
        credits = Credits(num_blocks - num_reserved_blocks, max_num_seqs)
        self._replicas[replica] = _Replica(num_blocks, num_host_blocks, credits)
        self._pool_blocks[replica] = num_blocks

    def replica_down(self, replica: int) -> list[int]:
        """Forgets a replica. Returns the requests that had been submitted to it and were not released."""
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        for request_id in gone.lives:
            del self._replica_of[request_id]
        return list(gone.lives)

    def may_start(self, request: Request) -> bool:
        """Whether prefill may start it: decode has room for it beside all that is promised, or the bridge has."""
        if request.sampling.max_tokens == 1 or self.num_promised_seqs < self.max_num_bridge_seqs:
            return True
        ledgers = [replica.credits for replica in self._replicas.values()]
        num_free_seqs = sum((credits.max_num_seqs or 0) - credits.num_seqs for credits in ledgers)
        num_blocks = self._num_promised_blocks + self._need(request).expected
        return num_blocks <= self.num_free_blocks and self.num_promised_seqs < num_free_seqs

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

    def try_start_at(self, replica: int, request: Request) -> bool:
        """Whether a decode replica may compute this prompt itself; if so the request is in decode from now on.

        It may if it has room for the request's whole way, beside it there is room for all that is promised, and nobody
        waits in the bridge.
        """
        state, need = self._replicas.get(replica), self._need(request)
        if state is None or self._bridge or not state.fits(need):
            return False
        if self._promised and self._num_promised_blocks + need.expected > self.num_free_blocks:
            return False
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

    def arrive(self, handoff: KVHandoff) -> None:
        """Takes a prefilled sequence into the bridge. Raises InternalError if it was not promised, or was withdrawn."""
        request_id = handoff.request.request_id
        if request_id not in self._promised or request_id in self._bridge:
            raise InternalError(f"request {request_id} arrived in the bridge without a promise")
        self._bridge[request_id] = handoff

    def next_submission(self) -> SubmitDecode | None:
        """Takes the head of the bridge, and those behind it bound for the same replica; None if the head has to wait.

        The replica is the one with the most free blocks among those with room. Call again until None.
        """
        handoffs: list[KVHandoff] = []
        replica = None
        for request_id, handoff in list(self._bridge.items()):
            best = self._best_replica(self._promised[request_id])
            if best is None or (handoffs and best != replica):
                break
            replica = best
            self._submit(request_id, replica)
            handoffs.append(handoff)
        if replica is None:
            return None
        return SubmitDecode(replica=replica, handoffs=handoffs)

    def released(self, replica: int, request_ids: Iterable[int]) -> None:
        """The replica has freed the blocks of these requests. Requests that it does not hold are ignored."""
        state = self._replicas.get(replica)
        if state is None:
            return
        for request_id in request_ids:
            if request_id in state.lives:
                state.release(request_id)
                del self._replica_of[request_id]

    def cancel(self, request_id: int) -> Cancelled | None:
        """Ends a request.

        Returns ("promised",): forgotten, prefill has it; ("bridge", handoff): forgotten, the caller has to end the
        lease; ("decode", replica): the replica has to be told and will report the release; None: it is not here.
        """
        if request_id in self._replica_of:
            return "decode", self._replica_of[request_id]
        handoff = self._bridge.get(request_id)
        was_promised = request_id in self._promised
        self.withdraw(request_id)
        if handoff is not None:
            return "bridge", handoff
        return ("promised",) if was_promised else None

    def check_integrity(self) -> None:
        """Raises InternalError if the books contradict each other."""
        holders: dict[int, int] = {}
        for replica, state in self._replicas.items():
            state.credits.check_integrity()
            holders.update((request_id, replica) for request_id in state.credits.request_ids)
            if state.lives.keys() != set(state.credits.request_ids):
                raise InternalError(f"decode replica {replica} has two lists of what runs there")
        if holders != self._replica_of:
            raise InternalError("requests in decode and holders of credit differ")
        if not self._bridge.keys() <= self._promised.keys() or self._promised.keys() & holders.keys():
            raise InternalError("a request is in two places between prefill and decode")
        if sum(need.expected for need in self._promised.values()) != self._num_promised_blocks:
            raise InternalError(f"{self._num_promised_blocks} blocks counted as promised")

    def _need(self, request: Request) -> _Need:
        life = self.blocks_for(request)
        if self._expected_kv_tokens is None or not any(each.num_host_blocks for each in self._replicas.values()):
            return _Need(life, life)
        return _Need(min(life, -(-self._expected_kv_tokens(request) // self.block_size)), life)

    def _best_replica(self, need: _Need) -> int | None:
        fitting = [replica for replica, state in self._replicas.items() if state.fits(need)]
        return max(fitting, key=lambda replica: self._replicas[replica].credits.free_blocks, default=None)

    def _submit(self, request_id: int, replica: int) -> None:
        need = self._promised[request_id]
        self.withdraw(request_id)
        self._replicas[replica].hold(request_id, need)
        self._replica_of[request_id] = replica
