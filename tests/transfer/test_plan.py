"""Between every two layouts: each element of the reader's blocks comes from where the source has it, exactly once."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.protocol.replica_replica import PoolLayout
from ensemble.transfer.plan import make_plan, misfit
from tests.transfer.layouts import layouts_of

HEADS = [(12, 12), (12, 4), (12, 2), (12, 1), (24, 8)]  # query heads and KV heads of a model


@st.composite
def pairs(draw):
    """Ranks of a source and of a reader of one model, with any degrees."""
    num_heads, num_kv_heads = draw(st.sampled_from(HEADS))
    num_layers = draw(st.integers(3, 7))

    def ranks():
        tp, pp = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        borders = sorted(draw(st.sets(st.integers(1, num_layers - 1), min_size=pp - 1, max_size=pp - 1)))
        return layouts_of(num_heads, num_kv_heads, tp, [0, *borders, num_layers])

    return ranks(), ranks()


def numbered(layout: PoolLayout) -> torch.Tensor:
    """A pool of one block, in which each element says of which layer and KV head it is, and key or value."""
    layers = torch.arange(*layout.layers).view(-1, 1, 1) * 1000
    return (layers + torch.tensor([0, 500]).view(-1, 1) + torch.tensor(layout.kv_heads)).unsqueeze(0)


@given(pairs())
def test_every_element_comes_once_and_from_where_it_is(pair):
    sources, readers = pair
    for rank, reader in enumerate(readers):
        pieces = make_plan(reader, sources, rank)
        target, written = torch.full_like(numbered(reader), -1), torch.zeros_like(numbered(reader))
        num_bytes = 0
        for piece in pieces:
            part = piece.source.of(numbered(sources[piece.source_rank]))
            piece.target.of(target).copy_(part)
            piece.target.of(written).add_(1)
            num_bytes += part.nbytes
        assert torch.equal(target, numbered(reader))
        assert bool((written == 1).all()) and num_bytes == target.nbytes


@given(pairs())
def test_between_equal_layouts_each_rank_reads_whole_blocks_of_one(pair):
    layouts, _ = pair
    for rank, reader in enumerate(layouts):
        [piece] = make_plan(reader, layouts, rank)
        assert piece.source == piece.target
        assert (piece.source.num_layers, piece.source.num_heads) == (reader.num_layers, len(reader.kv_heads))
        assert layouts[piece.source_rank].kv_heads == reader.kv_heads


@pytest.mark.parametrize("tp", [2, 4])
def test_readers_of_the_same_head_read_from_different_ranks(tp):
    """One KV head, on every rank of both sides."""
    layouts = layouts_of(12, 1, tp, [0, 4])
    used = Counter(piece.source_rank for rank in range(tp) for piece in make_plan(layouts[rank], layouts, rank))
    assert used == Counter(range(tp))


def test_what_no_rank_has_is_named():
    reader, *_ = layouts_of(12, 4, 1, [0, 4])
    first_half, *_ = layouts_of(12, 4, 2, [0, 4])
    with pytest.raises(ValueError, match="layer 0 of KV head 2: no rank"):
        make_plan(reader, [first_half])
    upper, *_ = layouts_of(12, 4, 1, [0, 4])[:1]
    with pytest.raises(ValueError, match="layer 4 of KV head 0"):
        make_plan(layouts_of(12, 4, 1, [0, 6])[0], [upper])


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "bfloat16"), ("block_size", 64), ("head_dim", 128), ("model", "another")]
)
def test_pools_that_do_not_fit_are_told_apart_by_name(field, value):
    [layout] = layouts_of(12, 4, 1, [0, 4])
    other = PoolLayout(**{name: getattr(layout, name) for name in layout.__struct_fields__} | {field: value})
    assert misfit(layout, layout) is None
    assert misfit(layout, other) == f"{field} = {value!r}: {getattr(layout, field)!r} is wanted"
