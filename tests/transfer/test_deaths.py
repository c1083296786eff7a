"""A process is killed before, in the midst of and after a copy over a link: the other one goes on, with right bytes."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from ensemble.errors import LinkBroken
from ensemble.protocol.replica_replica import ChunksCome, ChunksReady, ReadProbe
from ensemble.transfer import link, link_server, link_session, packing
from tests.transfer import fleet
from tests.transfer.fleet import DEVICES, NUM_LAYERS, Reader, SourceRanks
from tests.transfer.layouts import layouts_of

[LAYOUT] = layouts_of(12, 4, 1, [0, NUM_LAYERS])
BLOCK_IDS, REQUEST_ID = [6, 1, 2, 3], 5
NUM_CHUNKS = 2 * len(BLOCK_IDS)  # of a page: four layers of a block
BEFORE, IN, AFTER = 0, NUM_CHUNKS // 2, NUM_CHUNKS  # copies of chunks that the killed process has done
TRANSPORTS = ["host", "nccl"]
TIMEOUTS_S = {"cpu": 2.0, "cuda": 10.0}  # in which NCCL makes a pair's connections, too

PROCESSES = multiprocessing.get_context("forkserver")  # which imports once
PROCESSES.set_forkserver_preload(["tests.transfer.fleet"])


def die_at(owner, method, counts, num_copies):
    """This process is killed when it is about to start another chunk after so many, provably in the midst of a pull."""
    start, num_left = getattr(owner, method), num_copies

    def start_or_die(self, what, *arguments):
        nonlocal num_left
        if counts(what):
            if num_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            num_left -= 1
        return start(self, what, *arguments)

    setattr(owner, method, start_or_die)


def other_process(run, *arguments):
    is_ready, may_go_on = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=run, args=(*arguments, is_ready, may_go_on))
    process.start()
    assert is_ready.wait(fleet.WAIT_S)
    return process, may_go_on


def assert_killed(process):
    process.join(fleet.WAIT_S)
    assert process.exitcode == -signal.SIGKILL


def assert_pulled(reader, address):
    reader.fill(0.0)
    pull = reader.pull(address, BLOCK_IDS, BLOCK_IDS, REQUEST_ID)
    assert pull.error is None
    assert torch.equal(reader.pool.tensor, reader.expected(4, BLOCK_IDS, BLOCK_IDS))


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("num_copies", [BEFORE, IN, AFTER], ids=["before", "in", "after"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_source_is_killed(monkeypatch, tmp_path, transport, num_copies, devices):
    monkeypatch.setattr(link, "SLOT_BYTES", dict.fromkeys(link.SLOT_BYTES, 1))
    process, _ = other_process(be_source, tmp_path, num_copies, devices[0])
    reader = Reader(LAYOUT, transport=transport, timeout_s=TIMEOUTS_S[devices[1].type], device=devices[1])
    address = f"ipc://{tmp_path}/source"
    assert reader.attach(address) == [(address, None)]
    if num_copies == AFTER:
        assert_pulled(reader, address)
    pull = reader.pull(address, BLOCK_IDS, BLOCK_IDS, REQUEST_ID)
    assert isinstance(pull.error, LinkBroken)
    assert_killed(process)
    strangers = [block_id for block_id in range(8) if block_id not in BLOCK_IDS]
    assert not reader.pool.tensor[strangers].any()
    reader.peers.detach(address)
    successor = SourceRanks([LAYOUT], tmp_path, address=f"ipc://{tmp_path}/next", device=devices[0])
    successor.leases.grant(REQUEST_ID, BLOCK_IDS)
    reader.attach(successor.address)
    assert_pulled(reader, successor.address)
    reader.close()
    successor.close()


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("num_copies", [BEFORE, IN, AFTER], ids=["before", "in", "after"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_reader_is_killed(monkeypatch, tmp_path, transport, num_copies, devices):
    """Its lease stays until the router ends it; others read meanwhile, in the midst of it and when it is dead. Its link
    ends when another wants one, and only its own."""
    monkeypatch.setattr(link, "SLOT_BYTES", dict.fromkeys(link.SLOT_BYTES, 1))
    monkeypatch.setattr(packing, "MAX_LAUNCHED", 1)
    source = SourceRanks([LAYOUT], tmp_path, device=devices[0], timeout_s=TIMEOUTS_S[devices[0].type])
    source.leases.grant(REQUEST_ID, BLOCK_IDS)
    process, may_go_on = other_process(be_reader, tmp_path, transport, num_copies, devices[1])
    reader = Reader(LAYOUT, transport=transport, device=devices[1])
    reader.attach(source.address)
    may_go_on.set()
    assert_pulled(reader, source.address)
    assert_killed(process)
    assert_pulled(reader, source.address)
    assert list(source.leases) == [REQUEST_ID] and source.servers[0].acknowledged() == []
    expected = fleet.part_of(fleet.whole_model(num_kv_heads=4), LAYOUT)
    assert torch.equal(source.pools[0].tensor.cpu(), expected)
    served, its_links = source.servers[0]._links._links, reader.peers.source(source.address).links
    deadline = time.monotonic() + fleet.WAIT_S
    while True:  # until the source has noticed
        another = Reader(LAYOUT, transport=transport, device=devices[1])
        another.attach(source.address)
        if len(served) == 2:
            break
        assert time.monotonic() < deadline
        another.close()
    assert_pulled(another, source.address)
    another.close()
    assert_pulled(reader, source.address)
    assert reader.peers.source(source.address).links is its_links
    reader.close()
    source.close()


def be_source(run_dir, num_copies, device, is_ready, may_go_on):
    source = SourceRanks([LAYOUT], run_dir, device=device)
    source.leases.grant(REQUEST_ID, BLOCK_IDS)
    packing.MAX_LAUNCHED = 1
    die_at(link_server._ServedLink, "_start", lambda calls: not isinstance(calls[0], ReadProbe), num_copies)
    is_ready.set()
    may_go_on.wait()


def be_reader(run_dir, transport, num_copies, device, is_ready, may_go_on):
    link.SLOT_BYTES = dict.fromkeys(link.SLOT_BYTES, 1)
    reader = Reader(LAYOUT, transport=transport, device=device)
    starts = ChunksCome if transport == "nccl" else ChunksReady
    die_at(link_session.Session, "_take_answer", lambda answer: isinstance(answer, starts), num_copies)
    reader.attach(f"ipc://{run_dir}/source")
    is_ready.set()
    may_go_on.wait()
    while True:
        reader.pull(f"ipc://{run_dir}/source", BLOCK_IDS, BLOCK_IDS, REQUEST_ID)
