"""Pulls KV blocks out of peers' pools, beside the engine.

Only when all copies of a pull have completed, never when they were merely enqueued, does `completed()` return it: the
acknowledgement that follows lets the source reuse its blocks.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ensemble.cache.block_copier import Copy, Pieces, make_copier, together, wait_for_any
from ensemble.errors import TransferError
from ensemble.transfer.link import Link
from ensemble.transfer.plan import Part, Piece

# Over NVLink the copy engine takes 3.6 us for a call beside its bytes, the time of 1.4 MB: pieces of 16 MiB and more
# reach the kernel's 0.93 of the rate of one contiguous copy, and larger ones pass it (tools.benchmarks.transfer).
COPY_ENGINE_RUN_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Source:
    """A replica whose KV this rank reads: how its blocks go into ours, and a way to each rank that has some."""

    pieces: list[Piece]
    pools: dict[int, torch.Tensor]  # source rank |-> its pool, mapped here
    links: dict[int, Link] = field(default_factory=dict)  # source rank |-> the way to one that is not
    address: str = ""
    life: int = 0
    num_blocks: int = 0

    @property
    def transport(self) -> str:
        """By which KV comes; several where ranks are reached by different ones."""
        names = {"nccl" if link.carrier == "pair" else "host" for link in self.links.values()}
        return "+".join(sorted(names | ({"cuda_ipc"} if self.pools else set())))


def mapped_source(pool: torch.Tensor) -> Source:
    """Of one rank with the reader's own layout."""
    whole = Part(0, pool.shape[1], 0, pool.shape[3])
    return Source([Piece(0, whole, whole)], {0: pool}, num_blocks=len(pool))


@dataclass(slots=True, eq=False)
class Pull:
    """One hand-off's copy: peer block source_block_ids[i] |-> local block target_block_ids[i]."""

    request_id: int
    source: Source
    source_block_ids: list[int]
    target_block_ids: list[int]
    began: float = field(default_factory=time.monotonic)  # when it was asked for
    # set on completion
    seconds: float = 0.0  # of the copy itself
    waited_s: float = 0.0  # from `began` to the end, less `seconds`
    num_bytes: int = 0  # of all ranks
    error: TransferError | None = None


class Puller:
    """Copies into `pool`, a reading rank's `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`."""

    def __init__(
        self,
        pool: torch.Tensor,
        block_bytes: int | None = None,  # of all ranks of the replica; None: of this one
        start_elsewhere: Callable[[Pull], Copy] | None = None,  # into the pools of the other ranks
    ) -> None:
        self._pool = pool
        self._block_bytes = pool[0].nbytes if block_bytes is None else block_bytes
        self._start_elsewhere = start_elsewhere
        self._copier = make_copier(pool.device, COPY_ENGINE_RUN_BYTES)
        self._in_flight: list[tuple[Pull, Copy]] = []

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def start(self, pull: Pull) -> None:
        self._in_flight.append((pull, self._start_copy(pull)))

    def _start_copy(self, pull: Pull) -> Copy:
        """Of all pieces: done when nothing writes into the target's blocks any more."""
        source = pull.source
        elsewhere = [] if self._start_elsewhere is None else [self._start_elsewhere(pull)]
        copies = []
        mapped: Pieces = [
            (piece.source.of(source.pools[piece.source_rank]), piece.target.of(self._pool))
            for piece in source.pieces
            if piece.source_rank in source.pools
        ]
        if mapped:
            copies.append(self._copier.start_pieces(mapped, pull.source_block_ids, pull.target_block_ids))
        for rank, link in source.links.items():
            pieces = [piece for piece in source.pieces if piece.source_rank == rank]
            copies.append(
                link.start(source.life, pull.request_id, pieces, pull.source_block_ids, pull.target_block_ids)
            )
        return together(*copies, *elsewhere)

    def completed(self) -> list[Pull]:
        """Pulls whose copies have ended since the last call."""
        ended = [(pull, copy) for pull, copy in self._in_flight if copy.is_done()]
        if ended:
            self._in_flight = [each for each in self._in_flight if each not in ended]
        for pull, copy in ended:
            try:
                pull.seconds = copy.seconds()
                pull.num_bytes = len(pull.target_block_ids) * self._block_bytes
            except TransferError as error:
                pull.error = error
            pull.waited_s = max(0.0, time.monotonic() - pull.began - pull.seconds)
        return [pull for pull, _ in ended]

    def wait(self, timeout_s: float) -> None:
        """Waits until a pull has completed, at most `timeout_s`."""
        wait_for_any([copy for _, copy in self._in_flight], timeout_s)
