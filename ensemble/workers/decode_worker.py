"""The decode worker: pulls handed-off KV, then decodes every sequence that has arrived, all in each iteration.

On a GPU each step is launched before the tokens of the one before are read. A sequence that those tokens end has then
run a step too many: its last token is dropped, and its blocks are freed only when that step has run.

SubmitDecode --> blocks reserved --> pull --copy completed: TransferDone to the source--> running --> finished
                                      |                                                      |
                                      +---- CancelRequests (acts when the copy has ended) ---+--> blocks free
"""

from dataclasses import dataclass

from ensemble.cache.block_manager import Owner
from ensemble.engine.batch import Batch
from ensemble.engine.engine import Engine, Launched
from ensemble.request import FinishReason, Sequence
from ensemble.scheduling.decode import DecodeScheduler
from ensemble.transfer.puller import Pull, make_puller
from ensemble.workers.messages import (
    AttachPeer,
    CancelRequests,
    Command,
    Detached,
    DetachPeer,
    Joined,
    KVHandoff,
    PrefillBatch,
    Released,
    StepTokens,
    SubmitDecode,
    WorkerEvent,
)
from ensemble.workers.peers import Peers


@dataclass(slots=True, eq=False)
class _Arrival:
    """A sequence whose KV is not here yet."""

    sequence: Sequence
    handoff: KVHandoff
    is_copying: bool = False
    is_cancelled: bool = False


class DecodeWorker:
    def __init__(self, engine: Engine, peers: Peers, max_num_seqs: int) -> None:
        self.engine = engine
        self.peers = peers
        self._puller = make_puller(engine.pool.tensor)
        self._scheduler = DecodeScheduler(max_num_seqs)
        self._arrivals: dict[int, _Arrival] = {}  # request_id |-> being pulled
        self._running: dict[int, Sequence] = {}
        self._launched: Launched | None = None  # a step whose tokens have not been read
        self._launched_ids: set[int] = set()  # its request ids
        self._ended_early: set[int] = set()  # ended while in a launched step: freed when that has run

    @property
    def has_work(self) -> bool:
        return bool(self._running) or self._launched is not None or self._puller.num_in_flight > 0

    def handle(self, command: Command) -> list[WorkerEvent]:
        match command:
            case SubmitDecode(handoffs=handoffs):
                for handoff in handoffs:
                    self._receive(handoff)
                return []
            case CancelRequests(request_ids=request_ids):
                return self._cancel(request_ids)
            case AttachPeer(address=address):
                self.peers.attach(address)
                return []
            case DetachPeer(address=address):
                return self._detach(address)
            case PrefillBatch():
                raise TypeError("a decode worker was sent PrefillBatch")

    def step(self) -> list[WorkerEvent]:
        """Lets arrived sequences join, launches an iteration, and commits the one before (on a CPU: this one)."""
        events = self._join()
        batch = [sequence for sequence in self._scheduler.next_batch() if not self._is_at_its_end(sequence)]
        launched = self.engine.launch(Batch([], batch)) if batch else None
        if self.engine.runs_ahead:
            launched, self._launched = self._launched, launched
            self._launched_ids = {sequence.request_id for sequence in batch}
        if launched is not None:
            events += self._commit(launched)
        elif not batch and not events:
            self._puller.wait(1e-3)
        return events

    def start_pulls(self) -> None:
        """Starts the copies whose source pools have been mapped by now."""
        for arrival in self._arrivals.values():
            pool = self.peers.pool(arrival.handoff.source)
            if arrival.is_copying or pool is None:
                continue
            arrival.is_copying = True
            handoff, block_ids = arrival.handoff, arrival.sequence.block_ids
            source_block_ids = handoff.block_ids[: self.engine.blocks.blocks_for(handoff.num_kv_tokens)]
            self._puller.start(
                Pull(handoff.request.request_id, pool, source_block_ids, block_ids[: len(source_block_ids)])
            )

    def _receive(self, handoff: KVHandoff) -> None:
        sequence = Sequence(handoff.request, list(handoff.output_token_ids), handoff.num_kv_tokens)
        num_blocks = self.engine.blocks.blocks_for(handoff.request.max_num_kv_tokens)
        sequence.block_ids = self.engine.blocks.allocate(Owner("sequence", sequence.request_id), num_blocks)
        self._arrivals[sequence.request_id] = _Arrival(sequence, handoff)
        self.peers.attach(handoff.source)
        self.start_pulls()

    def _join(self) -> list[WorkerEvent]:
        joined, seconds, num_bytes, released = [], [], [], []
        for pull in self._puller.completed():
            arrival = self._arrivals.pop(pull.request_id)
            self.peers.acknowledge(arrival.handoff)
            if arrival.is_cancelled:
                released.append(self._free(pull.request_id))
                continue
            self._running[pull.request_id] = arrival.sequence
            self._scheduler.add(arrival.sequence)
            joined.append(pull.request_id)
            seconds.append(pull.seconds)
            num_bytes.append(pull.num_bytes)
        events: list[WorkerEvent] = []
        if joined:
            events.append(Joined(request_ids=joined, transfer_s=seconds, transfer_bytes=num_bytes))
        return events + self._released(released)

    def _is_at_its_end(self, sequence: Sequence) -> bool:
        """Whether the unread token of the launched step is the last that the sequence may have."""
        num_output_tokens = len(sequence.output_token_ids) + (sequence.request_id in self._launched_ids)
        return num_output_tokens >= sequence.sampling.max_tokens

    def _commit(self, step: Launched) -> list[WorkerEvent]:
        sampled = self.engine.commit(step)
        in_step = {sequence.request_id for sequence in step.batch.decodes}
        released = [self._free(request_id) for request_id in self._ended_early & in_step]
        self._ended_early -= in_step
        finished: dict[int, FinishReason] = {
            sequence.request_id: sequence.finish_reason for sequence in sampled if sequence.finish_reason is not None
        }
        for request_id in finished:
            released += self._leave(request_id)
        tokens = StepTokens(
            request_ids=[sequence.request_id for sequence in sampled],
            token_ids=[sequence.last_token_id for sequence in sampled],
            finished=finished,
        )
        return [tokens, *self._released(released)]

    def _cancel(self, request_ids: list[int]) -> list[WorkerEvent]:
        released = []
        for request_id in request_ids:
            arrival = self._arrivals.get(request_id)
            if request_id in self._running:
                self._running[request_id].finish_reason = "cancelled"
                released += self._leave(request_id)
            elif arrival is not None and arrival.is_copying:
                arrival.is_cancelled = True  # the source's blocks are being read: the copy ends first
            elif arrival is not None:
                del self._arrivals[request_id]
                self.peers.acknowledge(arrival.handoff)
                released.append(self._free(request_id))
        return self._released(released)

    def _detach(self, address: str) -> list[WorkerEvent]:
        """Gives up what has not arrived from a dead source, lets its copies end, and closes the mapping."""
        lost = [request_id for request_id, each in self._arrivals.items() if each.handoff.source == address]
        events = self._cancel(lost)
        while any(request_id in self._arrivals for request_id in lost):
            self._puller.wait(1e-3)
            events += self._join()
        self.peers.detach(address)
        return [*events, Detached(address=address)]

    def _leave(self, request_id: int) -> list[int]:
        """Takes a sequence out of the batch; its id if its blocks are free now, not only after the launched step."""
        del self._running[request_id]
        self._scheduler.remove(request_id)
        if request_id in self._launched_ids:
            self._ended_early.add(request_id)
            return []
        return [self._free(request_id)]

    def _free(self, request_id: int) -> int:
        self.engine.blocks.free(Owner("sequence", request_id))
        return request_id

    def _released(self, request_ids: list[int]) -> list[WorkerEvent]:
        if not request_ids:
            return []
        return [Released(request_ids=request_ids, num_free_blocks=self.engine.blocks.num_free_blocks)]
