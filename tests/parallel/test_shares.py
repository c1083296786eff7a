"""Which part of a model is whose: together all of it, none of it lost."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.errors import ConfigError
from ensemble.parallel.shares import share_heads, shares
from ensemble.parallel.tensor_parallel import TensorParallel


@given(size=st.integers(1, 200_000), num_ranks=st.integers(1, 16))
def test_shares_follow_one_another_and_are_alike(size, num_ranks):
    if size < num_ranks:
        with pytest.raises(ConfigError, match=f"tensor_parallel_size = {num_ranks}: a dimension of {size}"):
            shares(size, num_ranks)
        return
    pieces = shares(size, num_ranks)
    assert all(before.stop == after.start for before, after in pairwise(pieces))
    assert (pieces[0].start, pieces[-1].stop) == (0, size)
    lengths = [len(piece) for piece in pieces]
    assert min(lengths) > 0 and max(lengths) - min(lengths) <= 64


def test_shares_are_whole_units_where_the_dimension_is():
    assert shares(11008, 3) == [range(3648), range(3648, 7296), range(7296, 11008)]
    assert shares(50272, 2) == [range(25120), range(25120, 50272)]


@given(group=st.integers(1, 12), num_kv_heads=st.integers(1, 12), size=st.integers(1, 16))
def test_every_query_head_has_its_kv_head(group, num_kv_heads, size):
    num_heads = group * num_kv_heads
    if num_heads % size:
        with pytest.raises(ConfigError, match=f"tensor_parallel_size = {size}"):
            share_heads(num_heads, num_kv_heads, TensorParallel(0, size))
        return
    queries = []
    for rank in range(size):
        heads = share_heads(num_heads, num_kv_heads, TensorParallel(rank, size))
        assert heads.num_queries % heads.num_kv == 0
        per_kv = heads.num_queries // heads.num_kv
        for index, query in enumerate(heads.queries):
            assert heads.kv[index // per_kv] == query // group
        rows = [row for run in heads.kv_rows(4) for row in run]
        assert rows == [head * 4 + element for head in heads.kv for element in range(4)]
        queries += heads.queries
        if num_kv_heads % size == 0 or size % num_kv_heads == 0:
            assert heads.num_kv == max(num_kv_heads // size, 1)
    assert queries == list(range(num_heads))
