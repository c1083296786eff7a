"""Copies of blocks beside the engine: the right blocks, by the way that suits how they lie."""

import itertools
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.cache import block_copier
from ensemble.cache.block_copier import Copy, make_copier, together, wait_for_any
from ensemble.errors import LinkBroken, PullRefused

NUM_BLOCKS, BLOCK_SHAPE = 12, (3, 2, 2, 4, 16)
BLOCK_BYTES = 3 * 2 * 2 * 4 * 16 * 4
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BY_ENGINE, BY_KERNEL = 0, 1 << 40  # min_run_bytes

block_ids = st.permutations(range(NUM_BLOCKS))


def copied(copier, source, target, source_ids, target_ids):
    copy = copier.start(source, target, source_ids, target_ids)
    wait_for_any([copy], 10.0)
    assert copy.is_done() and copy.seconds() > 0
    return target


def test_copies_together_are_done_when_all_are_and_fail_by_what_concerns_most():
    here, there = Future(), Future()
    copy = together(Copy(here.done, here.result, (here,)), Copy(there.done, there.result))
    here.set_result(0.5)
    assert not copy.is_done()
    there.set_result(0.25)
    assert copy.is_done() and copy.seconds() == 0.5
    refused, broken = Future(), Future()
    refused.set_exception(PullRefused("these blocks"))
    broken.set_exception(LinkBroken("all"))
    for futures in ((refused, broken), (broken, refused)):
        with pytest.raises(LinkBroken):
            together(*(Copy(future.done, future.result) for future in (here, *futures))).seconds()


@given(source_ids=block_ids, target_ids=block_ids, start=st.integers(0, NUM_BLOCKS), length=st.integers(0, NUM_BLOCKS))
def test_runs_cover_every_block_once_and_go_where_the_ids_say(source_ids, target_ids, start, length):
    """Some of it in a row on both sides, at any place."""
    source_ids[start : start + length] = sorted(source_ids[start : start + length])
    target_ids[start : start + length] = sorted(target_ids[start : start + length])
    source = torch.arange(NUM_BLOCKS) + 1
    target = torch.zeros(NUM_BLOCKS, dtype=torch.int64)
    runs = list(block_copier.runs_of(source_ids[:9], target_ids[:9]))
    block_copier.copy_runs(source, target, runs)
    expected = torch.zeros(NUM_BLOCKS, dtype=torch.int64)
    expected[target_ids[:9]] = source[source_ids[:9]]
    assert torch.equal(target, expected)
    assert sum(length for *_, length in runs) == 9
    for (first, to, length), (next_first, next_to, _) in itertools.pairwise(runs):
        assert (next_first, next_to) != (first + length, to + length), "two runs that are one"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("min_run_bytes", [BY_ENGINE, BY_KERNEL], ids=["copy engine", "kernel"])
def test_blocks_arrive_where_they_are_sent_and_nowhere_else(monkeypatch, device, min_run_bytes):
    monkeypatch.setattr(block_copier, "NUM_CHEAP_RUNS", 0)
    source = torch.randn(NUM_BLOCKS, *BLOCK_SHAPE, device=device)
    source_ids, target_ids = [4, 5, 6, 11, 0, 9, 2], [7, 8, 9, 2, 3, 0, 11]
    copier = make_copier(source.device, min_run_bytes)
    target = copied(copier, source, torch.zeros_like(source), source_ids, target_ids)
    expected = torch.zeros_like(source)
    expected[target_ids] = source[source_ids]
    assert torch.equal(target, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_cheap_runs", [0, 99], ids=["kernel", "torch"])
def test_parts_of_blocks_within_a_device(monkeypatch, device, num_cheap_runs):
    """Some layers and heads into packed memory, and out of it."""
    monkeypatch.setattr(block_copier, "NUM_CHEAP_RUNS", num_cheap_runs)
    pool = torch.randn(NUM_BLOCKS, 5, 2, 3, 4, 16, device=device)
    part, packed = pool[:, 1:4, :, 1:], torch.zeros(4, 3, 2, 2, 4, 16, device=device)
    copier = make_copier(pool.device, BY_KERNEL, is_local=True)
    copied(copier, part, packed, [7, 2, 11, 0], [0, 1, 2, 3])
    assert torch.equal(packed, part[[7, 2, 11, 0]])
    target = torch.zeros_like(pool)
    copied(copier, packed, target[:, 1:4, :, 1:], [0, 1, 2, 3], [3, 9, 1, 8])
    expected = torch.zeros_like(pool)
    expected[[3, 9, 1, 8], 1:4, :, 1:] = part[[7, 2, 11, 0]]
    assert torch.equal(target, expected)


@pytest.mark.gpu
def test_long_rows_of_parts_of_blocks_go_by_the_copy_engine(monkeypatch):
    monkeypatch.setattr(block_copier, "MIN_ROW_BYTES", 0)
    monkeypatch.setattr(block_copier, "copy_blocks", None)  # the kernel
    pool = torch.randn(NUM_BLOCKS, 5, 2, 3, 4, 16, device="cuda")
    target = torch.zeros(NUM_BLOCKS, 4, 2, 5, 4, 16, device="cuda")
    copier = make_copier(pool.device, BY_ENGINE)
    copied(copier, pool[:, 1:4, :, 1:], target[:, :3, :, 2:4], [7, 2, 11, 0], [3, 9, 1, 8])
    expected = torch.zeros_like(target)
    expected[[3, 9, 1, 8], :3, :, 2:4] = pool[[7, 2, 11, 0], 1:4, :, 1:]
    assert torch.equal(target, expected)


def test_runs_of_parts_of_blocks():
    pool = torch.arange(NUM_BLOCKS * 5 * 2 * 3 * 8, dtype=torch.float16).view(NUM_BLOCKS, 5, 2, 3, 2, 4)
    target = torch.zeros_like(pool)
    block_copier.copy_runs(pool[:, 1:4, :, 1:], target[:, 2:, :, :2], [(7, 0, 1), (2, 4, 2)])
    expected = torch.zeros_like(pool)
    expected[[0, 4, 5], 2:, :, :2] = pool[[7, 2, 3], 1:4, :, 1:]
    assert torch.equal(target, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("source_ids", "target_ids", "expected"),
    [
        ([*range(12)], [*range(12)], "copy_runs"),
        ([0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8, 10], "copy_blocks"),
        ([*range(10)], [2, 3, 0, 1, 6, 7, 4, 5, 10, 11], "copy_runs"),  # two blocks a run
        ([0, 1], [4, 6], "copy_runs"),  # few
    ],
)
def test_the_copy_engine_takes_what_lies_in_few_rows_or_in_long_ones(monkeypatch, source_ids, target_ids, expected):
    monkeypatch.setattr(block_copier, "NUM_CHEAP_RUNS", 4)
    used = []
    for name in ("copy_runs", "copy_blocks"):
        copy = getattr(block_copier, name)

        def noted(*arguments, name=name, copy=copy, **settings):
            used.append(name)
            copy(*arguments, **settings)

        monkeypatch.setattr(block_copier, name, noted)
    source = torch.randn(NUM_BLOCKS, *BLOCK_SHAPE, device="cuda")
    target = torch.zeros_like(source)
    copied(make_copier(source.device, 2 * BLOCK_BYTES), source, target, source_ids, target_ids)
    assert used == [expected]
    assert torch.equal(target[target_ids], source[source_ids])
