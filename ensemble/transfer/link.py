"""A reading rank's link to a source rank whose pool it does not map: blocks come as packed chunks, through a few slots.

    reader                                  source
    ReadChunks(slots, blocks, leases) ----> looks at the lease, packs into its side of the slot
    pair: <-------------------------------- ChunksCome
          receives                          sends
                                            once that is done, looks at the lease again
    <-------------------------------------- ChunksReady: the bytes are here
    unpacks into its own pool, asks for the next chunk in the slot

Some chunks are under way at any time, so packing, wire and unpacking go on at the same time: each side starts what it
can, in order on a stream (CPU: a thread) of the link's own, and looks at what has ended. By a pair, blocks that are in
one run on a side are sent, or received, where they lie. A thread of the link's own does all that: nothing is written
into the pool but by it, so what it has given up is not written any more.
"""

import contextlib
import mmap
import threading
from collections.abc import Iterator

import torch
import zmq

from ensemble.cache.block_copier import Copy
from ensemble.errors import LinkBroken, PullRefused, TransferError
from ensemble.protocol.curve import CurveKey
from ensemble.protocol.replica_replica import Carrier, CloseLink
from ensemble.transfer.link_session import Chunk, Job, Session, Shared, as_broken, use_device
from ensemble.transfer.plan import Part, Piece
from ensemble.transfer.wakeup import Wakeup

# At least: a layer of a block is not divided. A chunk costs both hosts some 100 us beside its bytes, the time of 5 MiB
# over PCIe, and of 35 over NVLink.
SLOT_BYTES: dict[Carrier, int] = {"shared": 32 << 20, "frames": 8 << 20, "pair": 64 << 20}
# By a pair such blocks go one by one if they are whole here: then they need not be unpacked.
ALONE_BYTES = 16 << 20


class Link:
    """Opens in its own thread, and sets `opened` when that has ended, well or not."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,  # of the source rank
        pool: torch.Tensor,  # own: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        *,
        opened: Wakeup,
        carriers: list[Carrier],  # to be tried in this order
        timeout_s: float,  # of an answer
        key: CurveKey | None = None,  # for an address on another machine
    ) -> None:
        self.carrier: Carrier = carriers[0]
        self.error: TransferError | None = None  # it is broken
        self.is_open = False
        self._opened, self._carriers = opened, carriers
        self._shared = Shared(context, address, key, pool, timeout_s)
        self._lock = threading.Lock()  # between `start` and the thread's end: no job is left behind
        self._thread = threading.Thread(target=self._run, name="kv-link", daemon=True)
        self._thread.start()

    def slot_bytes(self, carrier: Carrier) -> int:
        wanted = max(SLOT_BYTES[carrier], self._shared.pool[0, 0].nbytes)
        return -(-wanted // mmap.PAGESIZE) * mmap.PAGESIZE

    # ---- the engine's thread

    def start(
        self, life: int, request_id: int, pieces: list[Piece], source_ids: list[int], target_ids: list[int]
    ) -> Copy:
        """Starts the copy of the pieces of this source rank, once it is open. What it raises is a TransferError."""
        job = Job()
        chunks = [
            Chunk(job, life, request_id, source, target, source_ids[blocks], target_ids[blocks])
            for piece in pieces
            for source, target, blocks in self._chunks_of(piece, len(source_ids))
        ]
        job.num_left = len(chunks)
        with self._lock:
            if self.error is not None or not chunks:
                job.future.set_exception(self.error or PullRefused("block_ids: none"))
            else:
                self._shared.jobs.put((job, chunks))
                self._shared.wake.set()
        return Copy(job.future.done, job.future.result, (job.future,))

    def close(self) -> None:
        """Soon what is under way has failed. What the source sends from now on goes nowhere."""
        self._shared.is_closing = True
        self._shared.wake.set()

    def _chunks_of(self, piece: Piece, num_blocks: int) -> Iterator[tuple[Part, torch.Tensor, slice]]:
        """(of the source, view of the own pool, which of the blocks); none is larger than a slot."""
        layer_bytes = Part(0, 1, piece.target.first_head, piece.target.num_heads).of(self._shared.pool)[0].nbytes
        slot_bytes = self.slot_bytes(self.carrier)
        num_layers = _even(piece.source.num_layers, slot_bytes // layer_bytes)
        block_bytes = layer_bytes * piece.source.num_layers
        is_whole = piece.target.of(self._shared.pool)[:1].is_contiguous()
        alone = self.carrier == "pair" and is_whole and block_bytes >= ALONE_BYTES
        blocks_at_once = 1 if alone else _even(num_blocks, max(1, slot_bytes // block_bytes))
        for first in range(0, piece.source.num_layers, num_layers):
            length = min(num_layers, piece.source.num_layers - first)
            source, target = (
                Part(part.first_layer + first, length, part.first_head, part.num_heads)
                for part in (piece.source, piece.target)
            )
            view = target.of(self._shared.pool)
            for first_block in range(0, num_blocks, blocks_at_once):
                yield source, view, slice(first_block, first_block + blocks_at_once)

    # ---- its own thread

    def _run(self) -> None:
        try:
            use_device(self._shared.pool.device)
            error: Exception = self._serve(self._open())
        except Exception as raised:
            error = raised
        with self._lock:
            self.error = as_broken(error)
            while not self._shared.jobs.empty():
                self._shared.jobs.get()[0].future.set_exception(self.error)
        self._opened.set()

    def _serve(self, session: Session) -> Exception:
        """Returns what ended it."""
        self.is_open = True
        self._opened.set()
        error: Exception = LinkBroken("the link was closed")
        try:
            while not self._shared.is_closing:
                session.go_on()
        except Exception as raised:  # whatever it is, nobody waits for what does not come
            error = raised
        with contextlib.suppress(LinkBroken, zmq.ZMQError):  # its slots there are of no more use
            session.call(CloseLink())
        session.end(as_broken(error))
        return error

    def _open(self) -> Session:
        """With the first carrier by which a probe comes through."""
        reasons = []
        for carrier in self._carriers:
            try:
                session = Session(self._shared, carrier, self.slot_bytes(carrier))
            except LinkBroken as error:
                reasons.append(f"{carrier}: {error}")
                continue
            self.carrier = carrier
            return session
        raise LinkBroken("; ".join(reasons))


def _even(length: int, most: int) -> int:
    """The length of the fewest parts of about the same length, none longer than `most`."""
    num_parts = max(1, -(-length // most))
    return max(1, -(-length // num_parts))
