"""Blocks' parts into one run of bytes, and back: what a chunk is on its way."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from ensemble.cache.block_copier import MIN_ROW_BYTES, Copier, Copy, StreamCopier, make_copier, row_bytes

COPY_ENGINE_RUN_BYTES = 2 << 20  # to and from the host, as swaps
MAX_LAUNCHED = 8  # chunks that a pair sends in one launch: the next ones are asked for when it has ended

T = TypeVar("T")


def make_link_copier(device: torch.device) -> Copier:
    """A link's own: what it starts runs in order, and beside other links."""
    return make_copier(device, COPY_ENGINE_RUN_BYTES, is_local=True)


def run_of(part: torch.Tensor, block_ids: list[int]) -> torch.Tensor | None:
    """[num_bytes] uint8: the blocks' parts where they lie, if that is in one run."""
    first, length = block_ids[0], len(block_ids)
    run = part[first : first + length]
    if block_ids != list(range(first, first + length)) or not run.is_contiguous():
        return None
    return run.view(-1).view(torch.uint8)


def pack(copier: Copier, part: torch.Tensor, block_ids: list[int], packed: torch.Tensor) -> Copy:
    """Starts packed = part[block_ids]."""
    places = list(range(len(block_ids)))
    if (staged := _staged(copier, part, packed)) is None:
        return copier.start_pieces([(part, packed)], block_ids, places)
    copier.start_pieces([(part, staged)], block_ids, places)
    return copier.start_pieces([(staged, packed)], places, places)


def unpack(copier: Copier, packed: torch.Tensor, part: torch.Tensor, block_ids: list[int]) -> Copy:
    """Starts part[block_ids] = packed."""
    places = list(range(len(block_ids)))
    if (staged := _staged(copier, part, packed)) is None:
        return copier.start_pieces([(packed, part)], places, block_ids)
    copier.start_pieces([(packed, staged)], places, places)
    return copier.start_pieces([(staged, part)], places, block_ids)


def in_order(*copies: Copy) -> Copy:
    """Done when the last is."""
    return Copy(copies[-1].is_done, lambda: sum([copy.seconds() for copy in copies]))


def launches(chunks: Iterable[T], slot_of: Callable[[T], int | None]) -> Iterator[list[T]]:
    """Chunks in a row that a pair sends, or receives, in one launch: no two that go through the same slot.

    slot_of: None for what goes through none.
    """
    launch: list[T] = []
    slots: set[int | None] = set()
    for chunk in chunks:
        slot = slot_of(chunk)
        if slot in slots or len(launch) == MAX_LAUNCHED:
            yield launch
            launch, slots = [], set()
        launch.append(chunk)
        slots |= {slot} - {None}
    if launch:
        yield launch


def _staged(copier: Copier, part: torch.Tensor, packed: torch.Tensor) -> torch.Tensor | None:
    """[...] as `packed`, on the device, for short rows: the copy engine brings it over PCIe, where a kernel's are slow.

    Memory of the copier's stream: the next chunk's is the same, and is written when this one's has been read.
    """
    has_long_rows = part[:1].is_contiguous() or row_bytes(part) >= MIN_ROW_BYTES
    if not isinstance(copier, StreamCopier) or packed.is_cuda or has_long_rows:
        return None
    with torch.cuda.stream(copier.stream):
        return torch.empty(packed.shape, dtype=packed.dtype, device=part.device)
