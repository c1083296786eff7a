"""The source's side of links: packs the blocks that readers ask for, as long as a lease keeps them.

Each link has threads of its own, so that a reader that hangs in the midst of a send holds up nobody else. Answers are
left in `answers` for the thread that owns the socket, which `answered` wakes. A reader that was killed closes no link:
those whose reader is gone end when another reader opens one, or when they have something to say.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch

from ensemble.cache.block_copier import make_copier
from ensemble.errors import LinkBroken
from ensemble.protocol.replica_replica import (
    ChunkReady,
    ChunkRefused,
    CloseLink,
    LinkAnswer,
    LinkCall,
    LinkOpened,
    OpenLink,
    ReadChunk,
    ReadProbe,
    Refused,
    SendChunks,
)
from ensemble.transfer.leases import Leases
from ensemble.transfer.link_session import finish, use_device
from ensemble.transfer.pair import Pair, meet
from ensemble.transfer.plan import Part
from ensemble.transfer.slots import MAX_BYTES, Slots, map_slots, own_slots
from ensemble.transfer.wakeup import Wakeup

MAX_LINKS = 64  # the one that was silent for longest goes
MAX_QUEUED_CALLS = 64  # of a link: a reader asks for no more than it has slots
NUM_THREADS = 2  # of a link: the next chunk's copy is launched while one is waited for
COPY_ENGINE_RUN_BYTES = 2 << 20  # to the host, as swaps

Answer = tuple[bytes, LinkAnswer, bytes | None]  # identity of the reader's socket, and a frame behind the answer


class LinkServer:
    """Of one rank. `handle` is called by one thread."""

    def __init__(
        self,
        pool: torch.Tensor,  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        leases: Leases | None,  # None: the leader's are trusted
        life: Callable[[], int],  # the replica's present one
        timeout_s: float,  # of a pair
        is_there: Callable[[bytes], bool],  # a reader, by its socket's identity
    ) -> None:
        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.answered = Wakeup()
        self.pool, self.leases, self.life, self.timeout_s = pool, leases, life, timeout_s
        self._is_there = is_there
        self.copier = make_copier(pool.device, COPY_ENGINE_RUN_BYTES)
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


class _ServedLink:
    """One reader's link. It asks for no two sends at once."""

    def __init__(self, server: LinkServer, identity: bytes) -> None:
        self._server, self._identity = server, identity
        self._threads = ThreadPoolExecutor(NUM_THREADS, "kv-link-server", use_device, (server.pool.device,))
        self._queued = threading.Semaphore(MAX_QUEUED_CALLS)
        self._is_closing = False
        self._has_met = threading.Event()
        self._carrier = ""
        self._slots: Slots | None = None
        self._pair: Pair | None = None
        self._pair_lock = threading.Lock()  # it is used by one thread at a time
        self._staged: dict[int, torch.Tensor] = {}  # of a pair: chunk |-> its bytes, to be sent

    def handle(self, call: LinkCall) -> None:
        if self._queued.acquire(blocking=False):
            self._threads.submit(self._do, call)
        else:
            self._answer(Refused(reason=f"calls: at most {MAX_QUEUED_CALLS} at once are allowed"))

    def close(self) -> None:
        """What is queued is dropped; what is under way ends within the time-out."""
        self._is_closing = True
        self._threads.submit(self._end)
        self._threads.shutdown(wait=False)

    def _end(self) -> None:
        self._slots = None
        self._staged.clear()
        with self._pair_lock:  # a send that is under way ends within the time-out
            if self._pair is not None:
                self._pair.end()

    def _do(self, call: LinkCall) -> None:
        self._queued.release()
        if self._is_closing:
            return
        try:
            match call:
                case OpenLink():
                    self._open(call)
                case ReadProbe():
                    self._read_probe(call)
                case ReadChunk():
                    self._read(call)
                case SendChunks():
                    self._send(call.chunks)
        except Exception as error:  # whatever a reader asks for, it gets an answer
            self._end()
            self._answer(Refused(reason=" ".join(str(error).split())))

    def _answer(self, answer: LinkAnswer, frame: bytes | None = None) -> None:
        self._server.answer(self._identity, answer, frame)

    def _open(self, call: OpenLink) -> None:
        device = self._server.pool.device
        if call.num_slots < 1 or call.slot_bytes < 1 or call.num_slots * call.slot_bytes > MAX_BYTES:
            raise LinkBroken(f"slots = {call.num_slots} of {call.slot_bytes} bytes: at most {MAX_BYTES} are allowed")
        self._carrier = call.carrier
        if call.carrier == "shared":
            self._slots = map_slots(call.memory, call.num_slots, call.slot_bytes, device)
        else:
            self._slots = own_slots(call.num_slots, call.slot_bytes, device, on_device=call.carrier == "pair")
        if call.carrier != "pair":
            self._answer(LinkOpened())
            return
        meeting = meet(device, self._server.timeout_s)
        self._answer(LinkOpened(rendezvous=meeting.rendezvous))
        pair = meeting.wait()
        with self._pair_lock:
            self._pair = pair
            if self._is_closing:
                pair.end()  # `_end` may have been before
        self._has_met.set()

    def _read_probe(self, call: ReadProbe) -> None:
        memory = self._slots_of(call.slot).probe_in(call.slot)
        memory.fill_(call.byte)
        if memory.is_cuda:
            torch.cuda.synchronize(memory.device)
        self._ready(call.chunk, memory)

    def _read(self, call: ReadChunk) -> None:
        slots = self._slots_of(call.slot)
        reason = self._why_not(call)
        if reason is None:
            part = Part(call.first_layer, call.num_layers, call.first_head, call.num_heads).of(self._server.pool)
            shape = torch.Size((len(call.block_ids), *part.shape[1:]))
            num_bytes = shape.numel() * part.element_size()
            if num_bytes > slots.memory.shape[1]:
                reason = f"block_ids: {num_bytes} bytes in a slot of {slots.memory.shape[1]}"
            else:
                packed = slots.blocks_in(call.slot, shape, part.dtype)
                copy = self._server.copier.start_pieces([(part, packed)], call.block_ids, list(range(len(packed))))
                finish(copy)
                reason = self._why_not(call)  # a lease that ended meanwhile: others may have written
        if reason is not None:
            self._answer(ChunkRefused(chunk=call.chunk, reason=reason))
        else:
            self._ready(call.chunk, slots.bytes_of(call.slot, num_bytes))

    def _ready(self, chunk: int, memory: torch.Tensor) -> None:
        if self._carrier == "pair":
            self._staged[chunk] = memory
        frame = memory.numpy().tobytes() if self._carrier == "frames" else None
        self._answer(ChunkReady(chunk=chunk), frame)

    def _send(self, chunks: list[int]) -> None:
        self._has_met.wait(self._server.timeout_s)
        if self._pair is None or not set(chunks) <= self._staged.keys():
            raise LinkBroken(f"chunks = {chunks[:8]}: such as are ready are wanted")
        with self._pair_lock:  # the reader has the last bytes of a send a moment before it has ended here
            self._pair.send([self._staged.pop(chunk) for chunk in chunks])

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
        return server.leases.why_not(call.request_id, call.block_ids) if server.leases is not None else None
