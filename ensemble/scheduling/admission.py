"""The bridge between prefill and decode, and the decode replicas' credit.

promised (in prefill) --arrive--> bridge --next_submission--> decode --released--> gone
[counted against decode's headroom] [source's blocks leased]  [blocks for its whole life held at one replica]
"""

from collections.abc import Iterable
from typing import Literal, TypeAlias

from ensemble.errors import InternalError, InvalidRequest
from ensemble.request import Request
from ensemble.scheduling.credits import Credits
from ensemble.workers.messages import KVHandoff, SubmitDecode

Cancelled: TypeAlias = tuple[Literal["promised"]] | tuple[Literal["bridge"], KVHandoff] | tuple[Literal["decode"], int]


class DecodeAdmission:
    """Bounds what prefill runs ahead of decode, and binds finished prompts to decode replicas, in order of arrival."""

    def __init__(self, *, block_size: int, max_num_bridge_seqs: int) -> None:
        self.block_size = block_size
        self.max_num_bridge_seqs = max_num_bridge_seqs
        self._replicas: dict[int, Credits] = {}
        self._pool_blocks: dict[int, int] = {}  # replica |-> pool size, kept while it is down
        self._promised: dict[int, int] = {}  # request_id |-> blocks it will need; in prefill or in the bridge
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
        return sum(credits.free_blocks for credits in self._replicas.values())

    def blocks_for(self, request: Request) -> int:
        """Blocks that the request holds in decode: enough for its whole life, so that decode never runs out."""
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

    def replica_up(self, replica: int, num_blocks: int, max_num_seqs: int) -> None:
        """Takes a replica with an empty pool into service."""
        if replica in self._replicas:
            raise InternalError(f"decode replica {replica} is already up")
        self._replicas[replica] = Credits(num_blocks, max_num_seqs)
        self._pool_blocks[replica] = num_blocks

    def replica_down(self, replica: int) -> list[int]:
        """Forgets a replica. Returns the requests that had been submitted to it and were not released."""
        gone = self._replicas.pop(replica, None)
        if gone is None:
            return []
        for request_id in gone.request_ids:
            del self._replica_of[request_id]
        return gone.request_ids

    def may_start(self, request: Request) -> bool:
        """Whether prefill may start it: decode has room for it beside all that is promised, or the bridge has."""
        if request.sampling.max_tokens == 1 or self.num_promised_seqs < self.max_num_bridge_seqs:
            return True
        num_free_seqs = sum((credits.max_num_seqs or 0) - credits.num_seqs for credits in self._replicas.values())
        num_blocks = self._num_promised_blocks + self.blocks_for(request)
        return num_blocks <= self.num_free_blocks and self.num_promised_seqs < num_free_seqs

    def promise(self, request: Request) -> None:
        """Counts a request that starts prefill, unless it ends there with its only token."""
        if request.sampling.max_tokens == 1:
            return
        if request.request_id in self._promised or request.request_id in self._replica_of:
            raise InternalError(f"request {request.request_id} is already promised")
        self._promised[request.request_id] = self.blocks_for(request)
        self._num_promised_blocks += self._promised[request.request_id]

    def try_promise(self, request: Request) -> bool:
        """`may_start`, and if so `promise`: what PrefillScheduler.next_batch asks."""
        if not self.may_start(request):
            return False
        self.promise(request)
        return True

    def withdraw(self, request_id: int) -> None:
        """Forgets a request that ended before submission. Not promised is fine: its only token needed none."""
        self._num_promised_blocks -= self._promised.pop(request_id, 0)
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
        credits = self._replicas.get(replica)
        if credits is None:
            return
        for request_id in request_ids:
            if request_id in credits:
                credits.release(request_id)
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
        for replica, credits in self._replicas.items():
            credits.check_integrity()
            holders.update((request_id, replica) for request_id in credits.request_ids)
        if holders != self._replica_of:
            raise InternalError("requests in decode and holders of credit differ")
        if not self._bridge.keys() <= self._promised.keys() or self._promised.keys() & holders.keys():
            raise InternalError("a request is in two places between prefill and decode")
        if sum(self._promised.values()) != self._num_promised_blocks:
            raise InternalError(f"{self._num_promised_blocks} blocks counted as promised")

    def _best_replica(self, num_blocks: int) -> int | None:
        fitting = [replica for replica, credits in self._replicas.items() if credits.fits(num_blocks)]
        return max(fitting, key=lambda replica: self._replicas[replica].free_blocks, default=None)

    def _submit(self, request_id: int, replica: int) -> None:
        num_blocks = self._promised[request_id]
        self.withdraw(request_id)
        self._replicas[replica].hold(request_id, num_blocks)
        self._replica_of[request_id] = replica
