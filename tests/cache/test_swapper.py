"""Copies between the pools: the right blocks, and nothing reported before it is there."""

import pytest
import torch

from ensemble.cache import block_copier, swapper
from ensemble.cache.block_manager import Swap
from ensemble.cache.kv_pool import KVLayout
from ensemble.cache.swapper import Swapper, make_host_pool

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, block_size=4, head_dim=16, dtype=torch.float32)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SLOW_CYCLES = 200_000_000  # about 0.1 s of a GPU


@pytest.fixture(params=[0, 1 << 40], ids=["copy engine", "kernel"])
def either_way(request, monkeypatch):
    """On a GPU, however the blocks lie."""
    monkeypatch.setattr(swapper, "COPY_ENGINE_RUN_BYTES", request.param)
    monkeypatch.setattr(block_copier, "NUM_CHEAP_RUNS", 0)


def make_pools(device, num_blocks=24, num_host_blocks=40):
    torch.manual_seed(0)
    pool = torch.randn(num_blocks, *LAYOUT.block_shape, dtype=LAYOUT.dtype, device=device)
    return pool, make_host_pool(LAYOUT, num_host_blocks, pool.device)


def wait_for(swaps, count):
    done = []
    while len(done) < count:
        swaps.wait(0.5)
        done += swaps.completed()
    return done


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_go_out_and_come_back_elsewhere(device, either_way):
    pool, host = make_pools(device)
    before = pool.clone()
    swaps = Swapper(pool, host)
    out_ids, host_ids = [3, 4, 5, 17, 0, 23], [8, 9, 10, 11, 2, 39]
    back_ids = [1, 2, 6, 7, 8, 22]

    swaps.start(Swap(5, out_ids, host_ids), "out")
    [out] = wait_for(swaps, 1)
    assert (out.request_id, out.way, out.num_blocks) == (5, "out", 6)
    assert torch.equal(host[host_ids], before[out_ids].cpu())
    assert torch.equal(pool, before)

    pool[out_ids] = 0  # others use them now
    swaps.start(Swap(5, host_ids, back_ids), "in")
    [back] = wait_for(swaps, 1)
    assert (back.request_id, back.way, back.num_blocks) == (5, "in", 6)
    assert torch.equal(pool[back_ids], before[out_ids])
    untouched = sorted(set(range(24)) - set(out_ids) - set(back_ids))
    assert torch.equal(pool[untouched], before[untouched])
    assert swaps.num_in_flight == 0
    assert back.seconds > 0 and swaps.swap_in_s(12) == pytest.approx(2 * back.seconds)


@pytest.mark.parametrize("device", DEVICES)
def test_many_copies_both_ways_at_once(device, either_way):
    pool, host = make_pools(device)
    host[20:40] = torch.randn_like(host[20:40])
    pool_before, host_before = pool.clone(), host.clone()
    swaps = Swapper(pool, host)
    for index in range(10):
        swaps.start(Swap(index, [index], [index]), "out")
        swaps.start(Swap(100 + index, [20 + index], [10 + index]), "in")
    done = wait_for(swaps, 20)
    assert [each.request_id for each in done if each.way == "out"] == list(range(10))
    assert [each.request_id for each in done if each.way == "in"] == list(range(100, 110))
    assert torch.equal(host[:10], pool_before[:10].cpu())
    assert torch.equal(pool[10:20].cpu(), host_before[20:30])


@pytest.mark.gpu
def test_a_copy_out_waits_for_the_step_that_writes_its_blocks_and_is_not_reported_before(either_way):
    pool, host = make_pools("cuda")
    swaps = Swapper(pool, host)
    swaps.start(Swap(0, [0], [0]), "out")  # compiles
    wait_for(swaps, 1)
    torch.cuda._sleep(SLOW_CYCLES)
    pool[7] = 42.0
    swaps.start(Swap(1, [7], [3]), "out")
    torch.cuda._sleep(SLOW_CYCLES)
    later = torch.cuda.Event()
    pool[7] = -1.0  # a step launched after the copy: waits for nothing, so the copy must be through by then
    later.record()
    assert swaps.completed() == []
    wait_for(swaps, 1)
    assert bool((host[3] == 42.0).all())
    assert not later.query(), "the copy waited for a step launched after it"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_copies_run_beside_the_engine(either_way):
    """A long step under way holds up no copy in: its event completes while the step still runs."""
    pool, host = make_pools("cuda")
    swaps = Swapper(pool, host)
    swaps.start(Swap(0, [0], [0]), "in")  # compiles
    wait_for(swaps, 1)
    torch.cuda._sleep(10 * SLOW_CYCLES)
    ended = torch.cuda.Event()
    ended.record()
    swaps.start(Swap(1, [5], [6]), "in")
    wait_for(swaps, 1)
    assert not ended.query()
    torch.cuda.synchronize()
    assert torch.equal(pool[6].cpu(), host[5])
