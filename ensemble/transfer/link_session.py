"""What a link's own thread does: opens it, asks for chunks, unpacks them, and notices that nothing comes any more.

A chunk has come when its bytes are in the own pool, and counts when its source has said, too, that the lease still kept
the blocks when they had been read.
"""

import contextlib
import os
import secrets
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

import msgspec
import torch
import zmq

from ensemble.cache.block_copier import Copy, nap
from ensemble.errors import LinkBroken, PullRefused, TransferError
from ensemble.protocol.curve import CurveKey, connect
from ensemble.protocol.replica_replica import (
    Beat,
    Carrier,
    ChunkRefused,
    ChunksCome,
    ChunksReady,
    LinkOpened,
    OpenLink,
    PeerAnswer,
    PeerCall,
    ReadChunk,
    ReadChunks,
    ReadProbe,
    Refused,
    decode_peer_answer,
    encode,
)
from ensemble.transfer.packing import in_order, launches, make_link_copier, run_of, unpack
from ensemble.transfer.pair import Pair, join
from ensemble.transfer.plan import Part
from ensemble.transfer.slots import Slots, own_slots, shared_slots
from ensemble.transfer.wakeup import Wakeup

# Chunks at a time: as many keep both copy engines of a way over the host busy while calls and answers are under way; of
# a pair, two of a source's launches, which go through fewer slots: its sends, receives and copies run in order.
MAX_IN_FLIGHT: dict[Carrier, int] = {"shared": 4, "frames": 8, "pair": 16}
NUM_SLOTS: dict[Carrier, int] = MAX_IN_FLIGHT | {"pair": 2}
MAX_UNSENT = 64  # calls that the source does not take
BEAT = encode(Beat())

Answer = TypeVar("Answer", LinkOpened, ChunksCome, ChunksReady)


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
    run: torch.Tensor | None = None  # [num_bytes] uint8: where a pair receives it, if not in its slot
    slot: int = -1
    copy: Copy | None = None  # its way into the pool, while it is under way
    is_started: bool = False  # that is
    is_confirmed: bool = False
    error: TransferError | None = None  # it was refused

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
        self._copier = make_link_copier(link.pool.device)
        self._num_slots = NUM_SLOTS[carrier]
        self._free_slots = [number % self._num_slots for number in range(MAX_IN_FLIGHT[carrier])]
        self._pending: deque[Chunk] = deque()
        self._in_flight: dict[int, Chunk] = {}  # by number
        self._num_chunks = 0
        self._waits_since = 0.0  # time.monotonic() when a chunk ended last, or the first was asked for
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
        try:
            if self._pair is not None:
                self._pair.end()
            for chunk in self._in_flight.values():
                while chunk.copy is not None and not chunk.copy.is_done():
                    nap()
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
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
        chunks = []
        while self._free_slots and self._pending:
            chunk = self._pending.popleft()
            if chunk.job.error is None:
                chunk.slot = self._free_slots.pop()
                chunks.append(chunk)
        if chunks:
            self._ask_for(chunks)
        if not any([self._take_answers(), self._end_chunks()]):
            self._wait()

    def _take_jobs(self) -> None:
        while not self._link.jobs.empty():
            self._pending += self._link.jobs.get()[1]

    def _ask_for(self, chunks: list[Chunk]) -> None:
        now, calls = time.monotonic(), []
        if not self._in_flight:
            self._waits_since = now
        for number, chunk in enumerate(chunks, self._num_chunks + 1):
            chunk.job.began = chunk.job.began or now
            chunk.job.num_in_flight += 1
            self._in_flight[number] = chunk
            call = ReadChunk(
                chunk=number,
                slot=chunk.slot,
                life=chunk.life,
                request_id=chunk.request_id,
                first_layer=chunk.source.first_layer,
                num_layers=chunk.source.num_layers,
                first_head=chunk.source.first_head,
                num_heads=chunk.source.num_heads,
                block_ids=chunk.source_ids,
            )
            calls.append(call)
        self._num_chunks += len(chunks)
        self.call(ReadChunks(chunks=calls))
        if self._pair is not None:
            for chunk in chunks:  # while the source looks at it
                chunk.run = run_of(chunk.target, chunk.target_ids)

    def _take_answers(self) -> bool:
        """Whether there was one."""
        has_come = False
        while (frames := self._take_frames()) is not None:
            has_come = True
            self._take_answer(_decode(frames[0]), frames)
        return has_come

    def _take_answer(self, answer: PeerAnswer, frames: list[bytes]) -> None:
        match answer:
            case Refused():
                raise LinkBroken(f"the source refuses: {answer.reason}")
            case ChunkRefused():
                for chunk in self._asked_for([answer.chunk], sends=False):
                    chunk.error = PullRefused(answer.reason)
            case ChunksCome():
                self._receive(self._asked_for(answer.chunks, sends=True))
            case ChunksReady():
                for chunk in self._asked_for(answer.chunks, sends=False):
                    if self._carrier == "frames":
                        self._take_frame(self._slots.bytes_of(chunk.slot, chunk.num_bytes), frames)
                    chunk.is_confirmed = True
                    if self._pair is None:
                        self._begin(chunk, self._unpack(chunk))

    def _asked_for(self, numbers: list[int], *, sends: bool) -> list[Chunk]:
        chunks = [self._in_flight[number] for number in numbers if number in self._in_flight]
        are_awaited = not any(chunk.is_confirmed or (sends and chunk.is_started) for chunk in chunks)
        if len(chunks) < len(numbers) or not are_awaited or (sends and self._pair is None):
            raise LinkBroken(f"the source answers of chunks = {numbers[:8]}: such as it was asked for are wanted")
        return chunks

    def _receive(self, chunks: list[Chunk]) -> None:
        """From the pair, in order; in one launch as many in a row as there are slots for."""
        for launch in launches(chunks, lambda chunk: chunk.slot if chunk.run is None else None):
            self._launch(launch)

    def _launch(self, chunks: list[Chunk]) -> None:
        assert self._pair is not None
        places = [
            chunk.run if chunk.run is not None else self._slots.bytes_of(chunk.slot, chunk.num_bytes)
            for chunk in chunks
        ]
        received = self._pair.receive(places)
        for chunk in chunks:
            self._begin(chunk, received if chunk.run is not None else in_order(received, self._unpack(chunk)))

    def _unpack(self, chunk: Chunk) -> Copy:
        packed = self._slots.blocks_in(chunk.slot, chunk.shape, chunk.target.dtype)
        return unpack(self._copier, packed, chunk.target, chunk.target_ids)

    def _begin(self, chunk: Chunk, copy: Copy) -> None:
        chunk.copy, chunk.is_started = copy, True

    def _end_chunks(self) -> bool:
        """Whether there was one to end: its slot is free. A job that was refused fails when none of its chunks is under
        way any more.
        """
        for chunk in self._in_flight.values():
            if chunk.copy is not None and chunk.copy.is_done():
                chunk.copy.seconds()
                chunk.copy = None
        ended = [
            number
            for number, chunk in self._in_flight.items()
            if chunk.copy is None and (chunk.error is not None or (chunk.is_started and chunk.is_confirmed))
        ]
        if ended:
            self._waits_since = time.monotonic()
        for number in ended:
            chunk = self._in_flight.pop(number)
            self._free_slots.append(chunk.slot)
            job = chunk.job
            job.error = job.error or chunk.error
            job.num_left -= 1
            job.num_in_flight -= 1
            if job.error is not None and not job.num_in_flight and not job.future.done():
                job.future.set_exception(job.error)
            elif job.error is None and not job.num_left:
                job.future.set_result(time.monotonic() - job.began)
        return bool(ended)

    def _wait(self) -> None:
        chunks = self._in_flight.values()
        waits = any(self._pair is not None or chunk.copy is None for chunk in chunks)
        deadline = self._waits_since + self._link.timeout_s if waits else None
        if deadline is not None and time.monotonic() >= deadline:
            raise LinkBroken(f"the source did not answer within {self._link.timeout_s:g} s")
        if any(chunk.copy is not None for chunk in chunks):
            if self._pair is not None:
                self._pair.check()
            nap()
        else:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            zmq.select([self._socket, self._link.wake], [], [], timeout)
            self._link.wake.clear()  # before the jobs are taken

    # ---- opening

    def _make_slots(self) -> tuple[Slots, str]:
        device = self._link.pool.device
        if self._carrier == "shared":
            slots, memory, self._fd = shared_slots(self._num_slots, self._slot_bytes, device)
            return slots, memory
        return own_slots(self._num_slots, self._slot_bytes, device, on_device=self._carrier == "pair"), ""

    def _meet(self, memory: str) -> None:
        link = self._link
        self.call(
            OpenLink(carrier=self._carrier, num_slots=self._num_slots, slot_bytes=self._slot_bytes, memory=memory)
        )
        answer, _ = self._answer(LinkOpened)
        if self._carrier == "pair":
            self._pair = join(
                answer.rendezvous, link.pool.device, self._copier, link.timeout_s, lambda: link.is_closing
            )

    def _probe(self) -> None:
        byte, slot = 1 + secrets.randbelow(255), self._num_slots - 1
        memory = self._slots.probe_in(slot)
        memory.zero_()
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        self.call(ReadProbe(chunk=0, slot=slot, byte=byte))
        if self._pair is not None:
            self._answer(ChunksCome)
            received = self._pair.receive([memory])
            deadline = time.monotonic() + self._link.timeout_s
            while not received.is_done():
                self._pair.check()
                if self._link.is_closing or time.monotonic() > deadline:
                    raise LinkBroken(f"a probe did not come within {self._link.timeout_s:g} s")
                nap()
            received.seconds()
        _, frames = self._answer(ChunksReady)
        if self._carrier == "frames":
            self._take_frame(memory, frames)
        if not bool((memory == byte).all()):
            raise LinkBroken("a probe came with other bytes than were asked for")

    def _answer(self, kind: type[Answer]) -> tuple[Answer, list[bytes]]:
        """Waits for it: (it, with the frame behind it)."""
        deadline = time.monotonic() + self._link.timeout_s
        while (frames := self._take_frames(50)) is None or frames == [BEAT]:
            if self._link.is_closing or time.monotonic() > deadline:
                raise LinkBroken(f"the source did not answer within {self._link.timeout_s:g} s")
        answer = _decode(frames[0])
        if isinstance(answer, kind):
            return answer, frames
        raise LinkBroken(f"the source refuses: {getattr(answer, 'reason', answer)}")

    def _take_frames(self, timeout_ms: int = 0) -> list[bytes] | None:
        if timeout_ms and not self._socket.poll(timeout_ms):
            return None
        with contextlib.suppress(zmq.Again):
            return self._socket.recv_multipart(zmq.NOBLOCK)
        return None

    def _take_frame(self, place: torch.Tensor, frames: list[bytes]) -> None:
        num_bytes = len(place)
        if len(frames) != 2 or len(frames[1]) != num_bytes:
            raise LinkBroken(f"a frame of {num_bytes} bytes is wanted, {[len(each) for each in frames[1:]]} came")
        place.copy_(torch.frombuffer(bytearray(frames[1]), dtype=torch.uint8))


def use_device(device: torch.device) -> None:
    """By this thread: else CUDA takes memory on the first GPU for whatever it calls."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def as_broken(error: Exception) -> TransferError:
    error.__traceback__ = None  # its frames hold the session, whose slots would wait for the collector of cycles
    return error if isinstance(error, TransferError) else LinkBroken(" ".join(str(error).split()) or repr(error))


def _decode(payload: bytes) -> PeerAnswer:
    try:
        answer: PeerAnswer = decode_peer_answer(payload)
        return answer
    except msgspec.DecodeError as error:
        raise LinkBroken(f"the source answers unreadably: {error}") from None
