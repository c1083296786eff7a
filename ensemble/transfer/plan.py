"""Which bytes go where: the KV that a reading rank needs of each block, out of the pools of a source's ranks.

A rank's pool holds some layers, and of each some KV heads. Its blocks and a source's cover the same tokens, so a block
is read as rectangles (layers x heads), and each of them lies in a row of layers and a row of heads on both sides:

    source 0 [layers 0-15, heads 0-3]      reader [layers 8-23, heads 2-5]
    source 1 [layers 0-15, heads 4-7]        = [8-15, 2-3] of 0, [8-15, 4-5] of 1,
    source 2 [layers 16-31, heads 0-3] ...     [16-23, 2-3] of 2, [16-23, 4-5] of 3

Between equal layouts that is one piece, the whole block. Pure arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ensemble.protocol.replica_replica import PoolLayout


@dataclass(frozen=True, slots=True)
class Part:
    """Some layers and heads of a pool, counted from the pool's first."""

    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    def of(self, pool: Tensor) -> Tensor:
        """[num_blocks, num_layers, 2, num_heads, block_size, head_dim], a view of the pool."""
        layers = slice(self.first_layer, self.first_layer + self.num_layers)
        return pool[:, layers, :, self.first_head : self.first_head + self.num_heads]


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of every block: `target` of the reader's is `source` of the source rank's."""

    source_rank: int
    source: Part
    target: Part


def misfit(reader: PoolLayout, source: PoolLayout) -> str | None:
    """Why blocks of one pool are none of the other's: the field, its value, and what is wanted. None if they are."""
    for field in ("model", "dtype", "block_size", "head_dim"):
        there, here = getattr(source, field), getattr(reader, field)
        if there != here:
            return f"{field} = {there!r}: {here!r} is wanted"
    return None


def make_plan(reader: PoolLayout, sources: Sequence[PoolLayout], reader_rank: int = 0) -> list[Piece]:
    """The pieces of the reader's blocks, each byte in one of them. Raises ValueError for what no source has.

    Where several source ranks hold a head, readers of different ranks take it from different ones.
    """
    borders = {border for source in sources for border in source.layers}
    first, end = reader.layers
    inner = sorted(border for border in borders if first < border < end)
    pieces: list[Piece] = []
    for start, stop in pairwise([first, *inner, end]):
        holders = {
            rank: each for rank, each in enumerate(sources) if each.layers[0] <= start and stop <= each.layers[1]
        }
        head = 0
        while head < len(reader.kv_heads):
            runs = [
                (_run(reader.kv_heads[head:], source.kv_heads[there:]), rank, there)
                for rank, source in holders.items()
                for there in range(len(source.kv_heads))
            ]
            longest = max((length for length, _, _ in runs), default=0)
            if not longest:
                raise ValueError(f"layer {start} of KV head {reader.kv_heads[head]}: no rank of the source has it")
            best = {rank: there for length, rank, there in reversed(runs) if length == longest}
            ranks = sorted(best)
            rank = ranks[reader_rank % len(ranks)]
            source = Part(start - sources[rank].layers[0], stop - start, best[rank], longest)
            pieces.append(Piece(rank, source, Part(start - first, stop - start, head, longest)))
            head += longest
    return pieces


def _run(wanted: Sequence[int], there: Sequence[int]) -> int:
    """How many of the heads that are wanted next lie there in the same order."""
    length = 0
    while length < min(len(wanted), len(there)) and wanted[length] == there[length]:
        length += 1
    return length
