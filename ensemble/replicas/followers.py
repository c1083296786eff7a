"""What the first rank of a replica, its leader, tells the others, and what they have completed.

A replica of one rank has none of this.
"""

import time
from functools import partial

import zmq

from ensemble.cache.block_copier import Copy, longest
from ensemble.cache.block_manager import Swap
from ensemble.cache.swapper import Way
from ensemble.engine.batch import Batch
from ensemble.errors import InternalError, LinkBroken, PullRefused
from ensemble.protocol.curve import CurveKey, bind
from ensemble.protocol.leader_follower import (
    Answer,
    Attached,
    AttachReplica,
    BeginLife,
    Copied,
    CopyBlocks,
    DetachReplica,
    EndLease,
    GrantLease,
    NewBlocks,
    NewSequence,
    Order,
    Ready,
    RunStep,
    StartPull,
    StartSwap,
    StepLogProbs,
    decode_answer,
    encode,
)
from ensemble.request import Sequence, TokenLogProbs
from ensemble.transfer.puller import Pull

ANSWER_TIMEOUT_S = 60.0  # a rank that stands still is noticed before, by its beats
MAX_UNSENT = 10_000  # orders that a follower has not taken: it hangs
_UNKNOWN: tuple[None, None, int] = (None, None, 0)


class Followers:
    """The leader's end; `address` is where followers connect. Raises InternalError for one that takes no orders."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: str,
        num_followers: int,
        key: CurveKey | None = None,  # for an address on other machines
    ) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.SNDHWM, MAX_UNSENT)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.address = bind(self.socket, address, key)
        self._ranks = [b"%d" % rank for rank in range(1, num_followers + 1)]
        self._known: dict[int, tuple[Sequence, list[int], int]] = {}  # request_id |-> it, its blocks, how many
        self._gone: list[int] = []
        self._num_copies = 0
        self._copying: dict[int, list[Copied]] = {}  # copy_id |-> what some have said of its end
        self._attached: list[Attached] = []
        self._log_probs: dict[int, dict[int, TokenLogProbs]] = {}  # step |-> by request_id

    @property
    def num_followers(self) -> int:
        return len(self._ranks)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Returns when all have said that they are."""
        waiting = set(range(1, self.num_followers + 1))
        deadline = time.monotonic() + timeout_s
        while waiting:
            if not self.socket.poll(round(max(0.0, deadline - time.monotonic()) * 1e3)):
                raise InternalError(f"ranks {sorted(waiting)} are not ready after {timeout_s:.0f} s")
            answer = decode_answer(self.socket.recv_multipart()[1])
            if isinstance(answer, Ready):
                waiting.discard(answer.rank)
            else:
                self._take(answer)

    def run(self, batch: Batch, num_committed: int) -> None:
        """They launch the step when they have carried out what was said before."""
        decodes = [sequence.request_id for sequence in batch.decodes]
        prompts = [(row.sequence.request_id, row.start, row.length) for row in batch.prefills]
        sequences = [row.sequence for row in batch.prefills] + batch.decodes
        new_sequences, new_blocks = [], []
        for request_id, sequence in zip([each[0] for each in prompts] + decodes, sequences, strict=True):
            block_ids = sequence.block_ids
            known, known_ids, num_known = self._known.get(request_id, _UNKNOWN)
            if known is sequence and known_ids is block_ids and num_known == len(block_ids):
                continue
            if known is not sequence:
                new_sequences.append(NewSequence(sequence.request, list(sequence.output_token_ids)))
            first = num_known if known is sequence and known_ids is block_ids else 0  # a swap makes another list
            new_blocks.append(NewBlocks(request_id, first, block_ids[first:]))
            self._known[request_id] = sequence, block_ids, len(block_ids)
        self._tell(
            RunStep(
                prompts=prompts,
                decodes=decodes,
                new_sequences=new_sequences,
                new_blocks=new_blocks,
                gone=self._gone,
                num_committed=num_committed,
            )
        )
        self._gone = []

    def forget(self, request_id: int) -> None:
        """The sequence runs no more; to be called when the last step that has it has been committed."""
        if self._known.pop(request_id, None) is not None:
            self._gone.append(request_id)

    def copy_blocks(self, source_ids: list[int], target_ids: list[int]) -> None:
        self._tell(CopyBlocks(source_ids=source_ids, target_ids=target_ids))

    def start_swap(self, swap: Swap, way: Way) -> Copy:
        copy_id, copy = self._next_copy()
        self._tell(
            StartSwap(
                copy_id=copy_id,
                request_id=swap.request_id,
                way=way,
                source_ids=swap.source_block_ids,
                target_ids=swap.destination_block_ids,
            )
        )
        return copy

    def start_pull(self, pull: Pull) -> Copy:
        copy_id, copy = self._next_copy()
        self._tell(
            StartPull(
                copy_id=copy_id,
                request_id=pull.request_id,
                address=pull.source.address,
                source_ids=pull.source_block_ids,
                target_ids=pull.target_block_ids,
            )
        )
        return copy

    def attach(self, address: str) -> None:
        self._tell(AttachReplica(address=address))

    def detach(self, address: str) -> None:
        self._tell(DetachReplica(address=address))

    def grant_lease(self, request_id: int, block_ids: list[int]) -> None:
        self._tell(GrantLease(request_id=request_id, block_ids=block_ids))

    def end_lease(self, request_id: int) -> None:
        self._tell(EndLease(request_id=request_id))

    def begin_life(self, life: int) -> None:
        """Returns when all have begun it."""
        self._tell(BeginLife(life=life))
        self.wait_until_ready(ANSWER_TIMEOUT_S)

    def attached(self) -> list[Attached]:
        """What they have said of pools since the last call."""
        self._receive()
        said, self._attached = self._attached, []
        return said

    def log_probs(self, step: int) -> dict[int, TokenLogProbs]:
        """Of a step, counted from 0, whose tokens have come; waits for them."""
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        self._receive()
        while step not in self._log_probs:
            if time.monotonic() > deadline:
                raise InternalError(f"the log-probabilities of step {step} have not come in {ANSWER_TIMEOUT_S:.0f} s")
            self.wait(1.0)
            self._receive()
        return self._log_probs.pop(step)

    def wait(self, timeout_s: float) -> None:
        """Until one of them says something, at most `timeout_s`."""
        self.socket.poll(round(timeout_s * 1e3))

    def close(self) -> None:
        self.socket.close(linger=0)

    def _next_copy(self) -> tuple[int, Copy]:
        """Its id, and what is done when all have said that their part has ended."""
        self._num_copies += 1
        ends: list[Copied] = []
        self._copying[self._num_copies] = ends

        def is_done() -> bool:
            self._receive()
            return len(ends) == self.num_followers

        return self._num_copies, Copy(is_done, lambda: longest(partial(_seconds, end) for end in ends))

    def _receive(self) -> None:
        while self.socket.poll(0):
            self._take(decode_answer(self.socket.recv_multipart()[1]))

    def _take(self, answer: Answer) -> None:
        match answer:
            case Copied(copy_id=copy_id):
                self._copying[copy_id].append(answer)
                if len(self._copying[copy_id]) == self.num_followers:
                    del self._copying[copy_id]
            case Attached():
                self._attached.append(answer)
            case StepLogProbs(step=step, log_probs=log_probs):
                self._log_probs[step] = log_probs

    def _tell(self, order: Order) -> None:
        payload = encode(order)
        for rank in self._ranks:
            try:
                self.socket.send_multipart([rank, payload], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise InternalError(f"rank {rank.decode()} takes no orders: {error}") from None


def _seconds(end: Copied) -> float:
    if end.error is not None:
        raise (LinkBroken if end.is_broken else PullRefused)(end.error)
    return end.seconds
