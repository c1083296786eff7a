"""What a link's own thread does: opens it, asks for chunks, unpacks them, and notices that nothing comes any more."""

import os
import secrets
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
import torch
import zmq

from ensemble.cache.block_copier import Copy, StreamCopier, ThreadCopier, wait_for_any
from ensemble.errors import LinkBroken, PullRefused, TransferError
from ensemble.protocol.curve import CurveKey, connect
from ensemble.protocol.replica_replica import (
    Beat,
    Carrier,
    ChunkReady,
    ChunkRefused,
    LinkOpened,
    OpenLink,
    PeerAnswer,
    PeerCall,
    ReadChunk,
    ReadProbe,
    Refused,
    SendChunks,
    decode_peer_answer,
    encode,
)
from ensemble.transfer.pair import Pair, join
from ensemble.transfer.plan import Part
from ensemble.transfer.slots import Slots, own_slots, shared_slots
from ensemble.transfer.wakeup import Wakeup

NUM_SLOTS = 4
MAX_UNSENT = 64  # calls that the source does not take
BEAT = encode(Beat())

Copier = StreamCopier | ThreadCopier


@dataclass(slots=True, eq=False)
class Job:
    """The chunks of one pull."""

    future: "Future[float]" = field(default_factory=Future)  # seconds from its first chunk's call to its last's arrival
    num_left: int = 0
    num_in_flight: int = 0
    began: float = 0.0
    error: TransferError | None = None


@dataclass(slots=True, eq=False)
class Chunk:
    job: Job
    life: int
    request_id: int
    source: Part
    target: torch.Tensor  # view of the own pool
    source_ids: list[int]
    target_ids: list[int]
    slot: int = -1
    deadline: float = 0.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.target_ids), *self.target.shape[1:]))

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.target.element_size()


@dataclass(slots=True, eq=False)
class Shared:
    """What a link's threads share."""

    context: zmq.Context[zmq.Socket[bytes]]
    address: str  # of the source rank
    key: CurveKey | None
    pool: torch.Tensor  # own: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    copier: Copier
    timeout_s: float  # of an answer
    jobs: SimpleQueue[tuple[Job, list[Chunk]]] = field(default_factory=SimpleQueue)
    wake: Wakeup = field(default_factory=Wakeup)  # there is a job, or it is closing
    is_closing: bool = False


class Session:
    """The link's state between opening and end: its slots, and what is in them."""

    def __init__(self, link: Shared, carrier: Carrier, slot_bytes: int) -> None:
        """Raises LinkBroken where no probe comes through."""
        self._link, self._carrier, self._slot_bytes = link, carrier, slot_bytes
        self._socket = link.context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 100)  # milliseconds, for CloseLink
        self._socket.setsockopt(zmq.SNDHWM, MAX_UNSENT)
        connect(self._socket, link.address, link.key)
        self._free_slots = list(range(NUM_SLOTS))
        self._pending: deque[Chunk] = deque()
        self._in_flight: dict[int, Chunk] = {}  # chunk number |-> in a slot
        self._unpacking: dict[int, Copy] = {}  # chunk number |-> its way into the pool
        self._num_chunks = 0
        self._pair: Pair | None = None
        self._fd = -1
        try:
            self._slots, memory = self._make_slots()
            self._meet(memory)
            self._probe()
        except Exception as error:
            broken = as_broken(error)
            self.end(broken)
            raise broken from None

    def end(self, error: TransferError) -> None:
        """All that is not done has failed, and nothing is written any more."""
        self._socket.close()
        for copy in self._unpacking.values():
            finish(copy)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._pair is not None:
            self._pair.end()
        for job in {id(each.job): each.job for each in (*self._in_flight.values(), *self._pending)}.values():
            if not job.future.done():
                job.future.set_exception(job.error or error)

    def call(self, call: PeerCall) -> None:
        try:
            self._socket.send(encode(call), zmq.NOBLOCK)
        except zmq.Again:
            raise LinkBroken("the source takes no calls") from None

    def go_on(self) -> None:
        """Asks for what there are slots for, and takes what has come. Raises LinkBroken when too long nothing has."""
        self._take_jobs()
        while self._free_slots and self._pending:
            chunk = self._pending.popleft()
            if chunk.job.error is None:
                self._ask_for(chunk)
        awaited = [chunk.deadline for number, chunk in self._in_flight.items() if number not in self._unpacking]
        deadline = min(awaited, default=time.monotonic() + 3600)
        timeout = 0.0 if self._unpacking else max(0.0, deadline - time.monotonic())
        zmq.select([self._socket, self._link.wake], [], [], timeout)
        ready = self._take_answers()
        if ready:
            self._receive(ready)
            for number in ready:
                self._unpack(number)
        elif self._unpacking:
            wait_for_any(list(self._unpacking.values()), 1e-3)
        elif awaited and time.monotonic() >= deadline:
            raise LinkBroken(f"the source did not answer within {self._link.timeout_s:g} s")
        for number, copy in [each for each in self._unpacking.items() if each[1].is_done()]:
            copy.seconds()
            del self._unpacking[number]
            self._end_chunk(number)

    def _take_answers(self) -> list[int]:
        """Numbers of chunks that are ready."""
        ready: list[int] = []
        while self._socket.poll(0):
            frames = self._socket.recv_multipart()
            answer = _decode(frames[0])
            if isinstance(answer, ChunkReady) and answer.chunk in self._in_flight:
                chunk = self._in_flight[answer.chunk]
                self._take_frame(chunk.slot, chunk.num_bytes, frames)
                ready.append(answer.chunk)
            elif isinstance(answer, ChunkRefused) and answer.chunk in self._in_flight:
                self._end_chunk(answer.chunk, PullRefused(answer.reason))
            elif isinstance(answer, Refused):
                raise LinkBroken(f"the source refuses: {answer.reason}")
        return ready

    def _take_jobs(self) -> None:
        jobs = self._link.jobs
        self._link.wake.clear()
        while not jobs.empty():
            self._pending += jobs.get()[1]

    def _ask_for(self, chunk: Chunk) -> None:
        chunk.slot = self._free_slots.pop()
        now = time.monotonic()
        chunk.deadline = now + self._link.timeout_s
        chunk.job.began = chunk.job.began or now
        self._num_chunks += 1
        chunk.job.num_in_flight += 1
        self._in_flight[self._num_chunks] = chunk
        self.call(
            ReadChunk(
                chunk=self._num_chunks,
                slot=chunk.slot,
                life=chunk.life,
                request_id=chunk.request_id,
                first_layer=chunk.source.first_layer,
                num_layers=chunk.source.num_layers,
                first_head=chunk.source.first_head,
                num_heads=chunk.source.num_heads,
                block_ids=chunk.source_ids,
            )
        )

    def _receive(self, numbers: list[int]) -> None:
        """Both sides have what they need: now it is sent."""
        if self._pair is not None:
            self.call(SendChunks(chunks=numbers))
            chunks = [self._in_flight[number] for number in numbers]
            self._pair.receive([self._slots.bytes_of(chunk.slot, chunk.num_bytes) for chunk in chunks])

    def _unpack(self, number: int) -> None:
        chunk = self._in_flight[number]
        if chunk.job.error is not None:
            self._end_chunk(number)
            return
        packed = self._slots.blocks_in(chunk.slot, chunk.shape, chunk.target.dtype)
        places = list(range(len(packed)))
        self._unpacking[number] = self._link.copier.start_pieces([(packed, chunk.target)], places, chunk.target_ids)

    def _end_chunk(self, number: int, error: TransferError | None = None) -> None:
        """The slot is free. A job that was refused fails when none of its chunks is under way any more."""
        chunk = self._in_flight.pop(number)
        self._free_slots.append(chunk.slot)
        job = chunk.job
        job.error = job.error or error
        job.num_left -= 1
        job.num_in_flight -= 1
        if job.error is not None and not job.num_in_flight and not job.future.done():
            job.future.set_exception(job.error)
        elif job.error is None and not job.num_left:
            job.future.set_result(time.monotonic() - job.began)

    # ---- opening

    def _make_slots(self) -> tuple[Slots, str]:
        device = self._link.pool.device
        if self._carrier == "shared":
            slots, memory, self._fd = shared_slots(NUM_SLOTS, self._slot_bytes, device)
            return slots, memory
        return own_slots(NUM_SLOTS, self._slot_bytes, device, on_device=self._carrier == "pair"), ""

    def _meet(self, memory: str) -> None:
        link = self._link
        self.call(OpenLink(carrier=self._carrier, num_slots=NUM_SLOTS, slot_bytes=self._slot_bytes, memory=memory))
        answer = self._answer(LinkOpened)
        if self._carrier == "pair":
            self._pair = join(answer.rendezvous, link.pool.device, link.timeout_s, lambda: link.is_closing)

    def _probe(self) -> None:
        byte, slot = 1 + secrets.randbelow(255), NUM_SLOTS - 1
        memory = self._slots.probe_in(slot)
        memory.zero_()
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        self.call(ReadProbe(chunk=0, slot=slot, byte=byte))
        frames = self._answer_frames()
        answer = _decode(frames[0])
        if not isinstance(answer, ChunkReady):
            raise LinkBroken(f"a probe was refused: {getattr(answer, 'reason', answer)}")
        self._take_frame(slot, len(memory), frames)
        if self._pair is not None:
            self.call(SendChunks(chunks=[0]))
            self._pair.receive([memory])
        if not bool((memory == byte).all()):
            raise LinkBroken("a probe came with other bytes than were asked for")

    def _answer(self, kind: type[LinkOpened]) -> LinkOpened:
        answer = _decode(self._answer_frames()[0])
        if isinstance(answer, kind):
            return answer
        raise LinkBroken(f"the source refuses: {getattr(answer, 'reason', answer)}")

    def _answer_frames(self) -> list[bytes]:
        deadline = time.monotonic() + self._link.timeout_s
        while not self._socket.poll(50):
            if self._link.is_closing or time.monotonic() > deadline:
                raise LinkBroken(f"the source did not answer within {self._link.timeout_s:g} s")
        frames = self._socket.recv_multipart()
        return self._answer_frames() if frames == [BEAT] else frames

    def _take_frame(self, slot: int, num_bytes: int, frames: list[bytes]) -> None:
        if self._carrier == "frames":
            if len(frames) != 2 or len(frames[1]) != num_bytes:
                raise LinkBroken(f"a frame of {num_bytes} bytes is wanted, {[len(each) for each in frames[1:]]} came")
            self._slots.bytes_of(slot, num_bytes).copy_(torch.frombuffer(bytearray(frames[1]), dtype=torch.uint8))


def finish(copy: Copy) -> None:
    """Waits until the copy, one within this device or to the host, has completed. Raises what it raised."""
    while not copy.is_done():
        wait_for_any([copy], 1.0)
    copy.seconds()


def use_device(device: torch.device) -> None:
    """By this thread: else CUDA takes memory on the first GPU for whatever it calls."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def as_broken(error: Exception) -> TransferError:
    return error if isinstance(error, TransferError) else LinkBroken(" ".join(str(error).split()) or repr(error))


def _decode(payload: bytes) -> PeerAnswer:
    try:
        answer: PeerAnswer = decode_peer_answer(payload)
        return answer
    except msgspec.DecodeError as error:
        raise LinkBroken(f"the source answers unreadably: {error}") from None
