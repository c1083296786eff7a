"""The source's side of links: packs the blocks that readers ask for, as long as a lease keeps them.

Each link has a thread of its own, so that a reader that hangs in the midst of a send holds up nobody else. Answers are
left in `answers` for the thread that owns the socket, which `answered` wakes. A reader that was killed closes no link:
those whose reader is gone end when another reader opens one, or when they have something to say.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch

from ensemble.cache.block_copier import Copy, nap
from ensemble.errors import LinkBroken
from ensemble.protocol.replica_replica import (
    ChunkRefused,
    ChunksCome,
    ChunksReady,
    CloseLink,
    LinkAnswer,
    LinkCall,
    LinkOpened,
    OpenLink,
    ReadChunk,
    ReadChunks,
    ReadProbe,
    Refused,
)
from ensemble.transfer.leases import Leases
from ensemble.transfer.link_session import use_device
from ensemble.transfer.packing import in_order, launches, make_link_copier, pack, run_of
from ensemble.transfer.pair import Pair, meet
from ensemble.transfer.plan import Part
from ensemble.transfer.slots import MAX_BYTES, Slots, map_slots, own_slots
from ensemble.transfer.wakeup import Wakeup

MAX_LINKS = 64  # the one that was silent for longest goes
MAX_QUEUED_CALLS = 64  # of a link: a reader asks for no more than it has slots
MAX_CHUNKS = 64  # of a call
MAX_READS = 16  # of a link, under way

Answer = tuple[bytes, LinkAnswer, bytes | None]  # identity of the reader's socket, and a frame behind the answer


class LinkServer:
    """Of one rank. `handle` is called by one thread."""

    def __init__(
        self,
        pool: torch.Tensor,  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        leases: Leases,
        life: Callable[[], int],  # the replica's present one
        timeout_s: float,  # of a pair
        is_there: Callable[[bytes], bool],  # a reader, by its socket's identity
    ) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.answered = Wakeup()
        self.pool, self.leases, self.life, self.timeout_s = pool, leases, life, timeout_s
        self._is_there = is_there
        self._links: OrderedDict[bytes, _ServedLink] = OrderedDict()  # identity |->, the last that called last

    def handle(self, identity: bytes, call: LinkCall) -> None:
        link = self._links.get(identity)
        if isinstance(call, OpenLink):
            self.end(identity)
            for gone in [each for each in self._links if not self._is_there(each)]:
                self.end(gone)
            while len(self._links) >= MAX_LINKS:
                self.end(next(iter(self._links)))
            link = self._links[identity] = _ServedLink(self, identity)
        elif isinstance(call, CloseLink):
            self.end(identity)
            return
        if link is None:
            self.answer(identity, Refused(reason="link: one that is open is wanted"))
            return
        self._links.move_to_end(identity)
        link.handle(call)

    def answer(self, identity: bytes, answer: LinkAnswer, frame: bytes | None = None) -> None:
        self.answers.put((identity, answer, frame))
        self.answered.set()

    def close(self) -> None:
        for identity in list(self._links):
            self.end(identity)

    def end(self, identity: bytes) -> None:
        """The reader's link, if it has one."""
        link = self._links.pop(identity, None)
        if link is not None:
            link.close()


@dataclass(frozen=True, slots=True)
class _Read:
    """Chunks, or a probe, that are packed, and by a pair sent."""

    calls: list[ReadChunk] | list[ReadProbe]
    runs: list[torch.Tensor]  # [num_bytes] uint8, of each
    copy: Copy | None  # None: it is there


class _ServedLink:
    """One reader's link."""

    def __init__(self, server: LinkServer, identity: bytes) -> None:
        self._server, self._identity = server, identity
        self._calls: SimpleQueue[LinkCall | None] = SimpleQueue()  # None: it is closing
        self._queued = threading.Semaphore(MAX_QUEUED_CALLS)
        self._is_closing = False
        self._carrier = ""
        self._slots: Slots | None = None
        self._pair: Pair | None = None
        self._reads: deque[_Read] = deque()
        self._waits_since = 0.0  # time.monotonic() when a read ended last, or the first one began
        threading.Thread(target=self._run, name="kv-link-server", daemon=True).start()

    def handle(self, call: LinkCall) -> None:
        if self._queued.acquire(blocking=False):
            self._calls.put(call)
        else:
            self._answer(Refused(reason=f"calls: at most {MAX_QUEUED_CALLS} at once are allowed"))

    def close(self) -> None:
        """What is queued is dropped; what is under way ends within the time-out."""
        self._is_closing = True
        self._calls.put(None)

    # ---- its own thread

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._go_on()
            except Exception as error:  # whatever a reader asks for, it gets an answer
                self._end()
                self._answer(Refused(reason=" ".join(str(error).split())))
        self._end()

    def _end(self) -> None:
        """Nothing is read any more."""
        if self._pair is not None:
            self._pair.end()
        while self._reads:
            copy = self._reads.popleft().copy
            while copy is not None and not copy.is_done():
                nap()
        self._slots = None

    def _go_on(self) -> None:
        call = self._next_call()
        if call is not None:
            self._do(call)
        if not self._answer_reads() and call is None and self._reads:
            if self._pair is not None:
                self._pair.check()
            nap()

    def _next_call(self) -> LinkCall | None:
        """Waits for one if nothing is under way."""
        if len(self._reads) >= MAX_READS:
            return None
        try:
            call = self._calls.get(block=not self._reads)
        except Empty:
            return None
        if call is not None:
            self._queued.release()
        return call

    def _do(self, call: LinkCall) -> None:
        match call:
            case OpenLink():
                self._open(call)
            case ReadProbe():
                self._read_probe(call)
            case ReadChunks():
                self._read_chunks(call.chunks)

    def _answer(self, answer: LinkAnswer, frame: bytes | None = None) -> None:
        self._server.answer(self._identity, answer, frame)

    def _open(self, call: OpenLink) -> None:
        device = self._server.pool.device
        if call.num_slots < 1 or call.slot_bytes < 1 or call.num_slots * call.slot_bytes > MAX_BYTES:
            raise LinkBroken(f"slots = {call.num_slots} of {call.slot_bytes} bytes: at most {MAX_BYTES} are allowed")
        use_device(device)
        self._copier = make_link_copier(device)
        self._carrier = call.carrier
        if call.carrier == "shared":
            self._slots = map_slots(call.memory, call.num_slots, call.slot_bytes, device)
        else:
            self._slots = own_slots(call.num_slots, call.slot_bytes, device, on_device=call.carrier == "pair")
        if call.carrier != "pair":
            self._answer(LinkOpened())
            return
        meeting = meet(device, self._copier, self._server.timeout_s, lambda: self._is_closing)
        self._answer(LinkOpened(rendezvous=meeting.rendezvous))
        self._pair = meeting.wait()

    def _read_probe(self, call: ReadProbe) -> None:
        memory = self._slots_of(call.slot).probe_in(call.slot)
        memory.fill_(call.byte)
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        self._start([call], [memory])

    def _read_chunks(self, calls: list[ReadChunk]) -> None:
        if len(calls) > MAX_CHUNKS:
            raise LinkBroken(f"chunks = {len(calls)} of a call: at most {MAX_CHUNKS} are allowed")
        reads: list[tuple[ReadChunk, torch.Tensor | None]] = []  # and what a pair sends from where it lies
        for call in calls:
            slots, reason = self._slots_of(call.slot), self._why_not(call)
            if reason is None:
                part = self._part_of(call)
                if (num_bytes := part[0].nbytes * len(call.block_ids)) > slots.num_bytes:
                    reason = f"block_ids: {num_bytes} bytes in a slot of {slots.num_bytes}"
            if reason is not None:
                self._answer(ChunkRefused(chunk=call.chunk, reason=reason))
            elif self._pair is None:
                self._start([call], [None])
            else:
                reads.append((call, run_of(part, call.block_ids)))
        for launch in launches(reads, lambda read: read[0].slot if read[1] is None else None):
            self._start(*map(list, zip(*launch, strict=True)))

    def _part_of(self, call: ReadChunk) -> torch.Tensor:
        part = Part(call.first_layer, call.num_layers, call.first_head, call.num_heads)
        return part.of(self._server.pool)

    def _start(self, calls: list[ReadChunk] | list[ReadProbe], runs: list[torch.Tensor | None]) -> None:
        """runs: [num_bytes] uint8, where it lies; None: it is packed first."""
        if self._pair is not None:
            self._answer(ChunksCome(chunks=[call.chunk for call in calls]))
        copies: list[Copy] = []
        packed: list[torch.Tensor] = []
        for call, run in zip(calls, runs, strict=True):
            if run is None:
                assert isinstance(call, ReadChunk)
                run, copying = self._pack(call)
                copies.append(copying)
            packed.append(run)
        if self._pair is not None:
            copies.append(self._pair.send(packed))
        copy = in_order(*copies) if copies else None
        if not self._reads:
            self._waits_since = time.monotonic()
        self._reads.append(_Read(calls, packed, copy))

    def _pack(self, call: ReadChunk) -> tuple[torch.Tensor, Copy]:
        """Starts it: [num_bytes] uint8 of its slot."""
        part, slots = self._part_of(call), self._slots_of(call.slot)
        shape = torch.Size((len(call.block_ids), *part.shape[1:]))
        packed = slots.blocks_in(call.slot, shape, part.dtype)
        copy = pack(self._copier, part, call.block_ids, packed)
        return slots.bytes_of(call.slot, packed.nbytes), copy

    def _answer_reads(self) -> bool:
        """Whether one has ended: they do so in order."""
        num_reads = len(self._reads)
        while self._reads and ((copy := self._reads[0].copy) is None or copy.is_done()):
            read, self._waits_since = self._reads.popleft(), time.monotonic()
            if copy is not None:
                copy.seconds()
            # leases that ended meanwhile: others may have written
            reasons = {call.chunk: self._why_not(call) if isinstance(call, ReadChunk) else None for call in read.calls}
            for chunk, reason in reasons.items():
                if reason is not None:
                    self._answer(ChunkRefused(chunk=chunk, reason=reason))
            if ready := [chunk for chunk, reason in reasons.items() if reason is None]:
                frame = read.runs[0].numpy().tobytes() if self._carrier == "frames" else None
                self._answer(ChunksReady(chunks=ready), frame)
        is_late = time.monotonic() > self._waits_since + self._server.timeout_s
        if self._pair is not None and self._reads and is_late:
            raise LinkBroken("the reader did not come in time")
        return len(self._reads) < num_reads

    def _slots_of(self, slot: int) -> Slots:
        if self._slots is None:
            raise LinkBroken("link: one that is open is wanted")
        if not 0 <= slot < len(self._slots.memory):
            raise LinkBroken(f"slot = {slot}: below {len(self._slots.memory)} is wanted")
        return self._slots

    def _why_not(self, call: ReadChunk) -> str | None:
        """Why these blocks may not be read; None if they may."""
        server = self._server
        num_blocks, num_layers, _, num_heads = server.pool.shape[:4]
        if call.life != server.life():
            return f"life = {call.life}: {server.life()} is the present one"
        for name, first, length, size in (
            ("layers", call.first_layer, call.num_layers, num_layers),
            ("kv_heads", call.first_head, call.num_heads, num_heads),
        ):
            if first < 0 or length < 1 or first + length > size:
                return f"{name} = {first} to {first + length}: below {size} are wanted"
        if not call.block_ids or not all(0 <= block_id < num_blocks for block_id in call.block_ids):
            return f"block_ids = {call.block_ids[:8]}: below {num_blocks} are wanted"
        return server.leases.why_not(call.request_id, call.block_ids)
