"""Links: KV as packed chunks, where no pool is mapped. Whatever one side does, the other has right bytes or none."""

import gc
import socket
import threading
import time
import weakref
from unittest.mock import Mock

import msgspec
import pytest
import torch
import zmq

from ensemble.cache.block_copier import ThreadCopier
from ensemble.errors import LinkBroken, PullRefused
from ensemble.protocol.curve import CurveKey
from ensemble.protocol.replica_replica import (
    ChunkRefused,
    ChunksCome,
    ChunksReady,
    LinkOpened,
    OpenLink,
    ReadChunk,
    ReadChunks,
    ReadProbe,
    Refused,
    decode_peer_answer,
    encode,
)
from ensemble.transfer import link, link_server, link_session, packing, pair
from ensemble.transfer.puller import Pull
from tests.transfer.fleet import CPU, DEVICES, NUM_LAYERS, WAIT_S, Reader, SourceRanks
from tests.transfer.layouts import layouts_of

[LAYOUT] = layouts_of(12, 4, 1, [0, NUM_LAYERS])
SOURCE_IDS, TARGET_IDS, REQUEST_ID = [6, 1, 2, 3], [0, 4, 5, 7], 5
CARRIERS = {"shared": "host", "frames": "host", "pair": "nccl"}


@pytest.fixture(params=DEVICES)
def devices(request):
    return request.param


@pytest.fixture
def source(tmp_path, devices):
    source = SourceRanks([LAYOUT], tmp_path, device=devices[0])
    source.leases.grant(REQUEST_ID, SOURCE_IDS)
    yield source
    source.close()


@pytest.fixture(params=CARRIERS)
def carrier(request, monkeypatch):
    """Chunks as small as they become: a layer of a block each."""
    monkeypatch.setattr(link, "SLOT_BYTES", dict.fromkeys(link.SLOT_BYTES, 1))
    if request.param == "frames":
        monkeypatch.setattr(link_server, "map_slots", _of_another_host)
    return request.param


def _of_another_host(*_):
    raise FileNotFoundError("it is on another host")


@pytest.fixture
def reader(carrier, source, devices):
    reader = Reader(LAYOUT, transport=CARRIERS[carrier], device=devices[1])
    reader.attach(source.address)
    yield reader
    reader.close()


def assert_pulled(reader, address, target_ids=TARGET_IDS):
    reader.fill(0.0)
    pull = reader.pull(address, SOURCE_IDS, target_ids, REQUEST_ID)
    assert pull.error is None and pull.seconds > 0
    assert torch.equal(reader.pool.tensor, reader.expected(4, SOURCE_IDS, target_ids))


def give_up_after(timeout_s, reader, source):
    """Of the links that are open: those that come later have all the time that they may need."""
    for each in reader.peers.source(source.address).links.values():
        each._shared.timeout_s = timeout_s


def test_more_chunks_than_slots(reader, carrier, source):
    assert_pulled(reader, source.address)
    [each] = reader.peers.source(source.address).links.values()
    assert each.carrier == carrier
    assert_pulled(reader, source.address, [1, 2, 3, 6])


def test_several_pulls_at_once_and_source_blocks_reused_at_once(reader, source):
    """The source overwrites what was read as soon as it is told that it was."""
    peer = reader.peers.source(source.address)
    for request_id in range(10, 18):
        source.leases.grant(request_id, [request_id - 10])
        reader.puller.start(Pull(request_id, peer, [request_id - 10], [request_id - 10]))
    done = []
    while len(done) < 8:
        reader.puller.wait(1.0)
        for pull in reader.puller.completed():
            assert pull.error is None
            source.leases.end(pull.request_id)
            source.pools[0].tensor[pull.source_block_ids] = -1
            done.append(pull.request_id)
    everything = list(range(8))
    assert torch.equal(reader.pool.tensor, reader.expected(4, everything, everything))


@pytest.mark.parametrize(
    ("request_id", "block_ids", "reason"),
    [
        (4, SOURCE_IDS, "request_id = 4: one with a lease is wanted"),
        (REQUEST_ID, [6, 0, 2, 3], r"block_ids = \[0\]: blocks of the lease"),
        (REQUEST_ID, [6, 99, 2, 3], r"block_ids = \[99\]: below 8 are wanted"),
    ],
)
def test_blocks_that_no_lease_keeps_are_refused_by_name(reader, source, request_id, block_ids, reason):
    pull = reader.pull(source.address, block_ids, TARGET_IDS, request_id)
    assert isinstance(pull.error, PullRefused)
    with pytest.raises(PullRefused, match=reason):
        raise pull.error
    assert_pulled(reader, source.address)  # the link is as good as before


def test_another_life_of_the_source_is_refused_by_name(reader, source):
    source.servers[0].life = 2
    pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
    assert isinstance(pull.error, PullRefused) and "life = 0: 2 is the present one" in str(pull.error)


@pytest.fixture
def before_reads(monkeypatch):
    """Makes sources call something before they read a chunk, with its number: [those that it was called with]."""

    def install(before):
        numbers = []
        start = link_server._ServedLink._start

        def start_after(self, calls, *arguments):
            for _ in (call for call in calls if isinstance(call, ReadChunk)):
                numbers.append(len(numbers) + 1)
                before(numbers[-1])
            start(self, calls, *arguments)

        monkeypatch.setattr(link_server._ServedLink, "_start", start_after)
        return numbers

    return install


def test_a_lease_that_ends_while_its_blocks_are_read_gives_nothing(reader, source, before_reads):
    before_reads(lambda number: source.leases.end(REQUEST_ID) if number == 3 else None)
    pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
    assert isinstance(pull.error, PullRefused) and "a lease is wanted" in str(pull.error)


def test_a_source_that_stands_still_breaks_the_link_and_writes_nothing_later(carrier, source, devices, before_reads):
    timeout_s = WAIT_S if carrier != "pair" or devices[1] != CPU else 3.0  # gloo's, too
    reader = Reader(LAYOUT, transport=CARRIERS[carrier], timeout_s=timeout_s, device=devices[1])
    reader.attach(source.address)
    goes_on = threading.Event()
    before_reads(lambda _: goes_on.wait(WAIT_S))
    give_up_after(1.0, reader, source)
    pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
    assert isinstance(pull.error, LinkBroken) and "did not answer within 1 s" in str(pull.error)
    reader.fill(7.0)  # of others by now
    goes_on.set()
    assert reader.peers.renew(reader.peers.source(source.address), str(pull.error))
    assert reader.attach(source.address) == [(source.address, None)]  # behind what the source had still to do
    assert bool((reader.pool.tensor == 7.0).all())
    assert_pulled(reader, source.address)
    reader.close()


def test_a_source_that_stands_still_before_a_send_writes_nothing_later(tmp_path, monkeypatch):
    """The reader has begun to receive, into its pool: the pull has failed only when that has ended."""
    source, reader = SourceRanks([LAYOUT], tmp_path), Reader(LAYOUT, transport="nccl", timeout_s=3.0)  # gloo's, too
    source.leases.grant(REQUEST_ID, SOURCE_IDS)
    reader.attach(source.address)
    goes_on, has_sent = threading.Event(), threading.Event()
    move = pair._GlooPair._move

    def move_later(self, name, runs):
        if name == "recv":
            return move(self, name, runs)
        goes_on.wait(WAIT_S)
        try:
            return move(self, name, runs)
        finally:
            has_sent.set()

    monkeypatch.setattr(pair._GlooPair, "_move", move_later)
    give_up_after(1.0, reader, source)
    pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
    assert isinstance(pull.error, LinkBroken)
    reader.fill(7.0)  # of others by now
    goes_on.set()
    assert has_sent.wait(WAIT_S)
    monkeypatch.undo()
    assert reader.peers.renew(reader.peers.source(source.address), str(pull.error))
    assert reader.attach(source.address) == [(source.address, None)]
    assert bool((reader.pool.tensor == 7.0).all())
    assert_pulled(reader, source.address)
    reader.close()
    source.close()


def test_links_that_break_again_and_again_are_given_up(reader, source):
    for _ in range(3):
        assert reader.peers.renew(reader.peers.source(source.address), "it broke")
        assert reader.attach(source.address) == [(source.address, None)]
    stale = reader.peers.source(source.address)
    assert not reader.peers.renew(stale, "it broke")
    assert "it broke" in str(reader.peers.why_unmappable(source.address))
    pull = reader.pulled_of(stale, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
    assert isinstance(pull.error, LinkBroken)


def test_over_tcp_with_the_key_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(link_server, "map_slots", _of_another_host)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key, other = CurveKey.of(b"run"), CurveKey.of(b"another")
    source = SourceRanks([LAYOUT], tmp_path, address=f"tcp://127.0.0.1:{port}", key=key)
    source.leases.grant(REQUEST_ID, SOURCE_IDS)
    reader, stranger = Reader(LAYOUT, transport="host", key=key), Reader(LAYOUT, transport="host", key=other)
    stranger.peers.attach(source.address)
    assert reader.attach(source.address) == [(source.address, None)]
    assert_pulled(reader, source.address)
    assert stranger.peers.receive_handles() == []
    for each in (reader, stranger, source):
        each.close()


# ---- what is made up


class Stranger:
    """Speaks the protocol as it likes."""

    def __init__(self, address):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(address)

    def call(self, call):
        self.socket.send(encode(call))

    def ask(self, call):
        self.call(call)
        assert self.socket.poll(int(WAIT_S * 1e3))
        return decode_peer_answer(self.socket.recv_multipart()[0])

    def close(self):
        self.context.destroy(linger=0)


CHUNK = ReadChunk(
    chunk=1,
    slot=0,
    life=0,
    request_id=REQUEST_ID,
    first_layer=0,
    num_layers=1,
    first_head=0,
    num_heads=4,
    block_ids=[6],
)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"first_layer": 7}, "layers = 7 to 8: below 7"),
        ({"first_layer": -1}, "layers = -1 to 0"),
        ({"num_layers": 0}, "layers = 0 to 0"),
        ({"first_head": 3, "num_heads": 2}, "kv_heads = 3 to 5: below 4"),
        ({"num_heads": 1 << 62}, "kv_heads"),
        ({"block_ids": []}, "block_ids = []"),
        ({"block_ids": [-1]}, "block_ids = [-1]"),
        ({"block_ids": [6] * 1000}, "bytes in a slot of"),
        ({"slot": 4}, "slot = 4: below 4"),
        ({"slot": -1}, "slot = -1"),
    ],
)
def test_made_up_chunks_are_refused_by_name(source, lie, reason):
    stranger = Stranger(source.address)
    opened = stranger.ask(OpenLink(carrier="frames", num_slots=4, slot_bytes=8192))
    assert isinstance(opened, LinkOpened)
    answer = stranger.ask(ReadChunks(chunks=[msgspec.structs.replace(CHUNK, **lie)]))
    assert isinstance(answer, ChunkRefused | Refused) and reason in answer.reason
    stranger.ask(OpenLink(carrier="frames", num_slots=4, slot_bytes=8192))
    assert isinstance(stranger.ask(ReadChunks(chunks=[CHUNK])), ChunksReady)
    stranger.close()


@pytest.mark.parametrize(
    "call",
    [
        OpenLink(carrier="frames", num_slots=1 << 40, slot_bytes=1 << 40),
        OpenLink(carrier="frames", num_slots=-1, slot_bytes=-8),
        OpenLink(carrier="shared", num_slots=1, slot_bytes=4096, memory="/etc/passwd distserve-kv-slots-passwd"),
        OpenLink(carrier="shared", num_slots=1, slot_bytes=4096, memory=""),
        ReadProbe(chunk=0, slot=0, byte=1),
        ReadChunks(chunks=[CHUNK]),
        ReadChunks(chunks=[CHUNK] * 1000),
    ],
    ids=lambda call: str(call)[:60],
)
def test_made_up_calls_harm_nobody(source, call):
    stranger = Stranger(source.address)
    assert isinstance(stranger.ask(call), Refused)
    stranger.close()
    reader = Reader(LAYOUT, transport="host")
    reader.attach(source.address)
    assert_pulled(reader, source.address)
    reader.close()


def test_a_flood_of_calls_is_bounded(source, before_reads):
    goes_on = threading.Event()
    started = before_reads(lambda _: goes_on.wait(WAIT_S))
    stranger = Stranger(source.address)
    stranger.ask(OpenLink(carrier="frames", num_slots=1, slot_bytes=8192))
    for _ in range(200):
        stranger.call(ReadChunks(chunks=[CHUNK]))
    answer = decode_peer_answer(stranger.socket.recv_multipart()[0])
    assert isinstance(answer, Refused) and "at most 64" in answer.reason
    goes_on.set()
    stranger.close()
    assert len(started) <= 66


@pytest.mark.parametrize("when", ["never joins", "joins, and receives nothing"])
def test_a_reader_that_lets_its_pair_wait_holds_up_nobody_else(tmp_path, when):
    source = SourceRanks([LAYOUT], tmp_path, timeout_s=2.0)
    source.leases.grant(REQUEST_ID, SOURCE_IDS)
    stranger = Stranger(source.address)
    opened = stranger.ask(OpenLink(carrier="pair", num_slots=1, slot_bytes=8192))
    assert isinstance(opened, LinkOpened)
    if when != "never joins":
        its_pair = pair.join(opened.rendezvous, CPU, ThreadCopier(), WAIT_S, lambda: False)
        assert isinstance(stranger.ask(ReadChunks(chunks=[CHUNK])), ChunksCome)
        its_pair.end()
    reader = Reader(LAYOUT, transport="nccl")
    reader.attach(source.address)
    assert_pulled(reader, source.address)
    reader.close()
    stranger.close()
    source.close()


def test_a_slow_pair_is_no_broken_one(tmp_path, monkeypatch):
    """All chunks take longer than the time-out, and each a fifth of it."""
    move, clock = pair._GlooPair._move, Mock(monotonic=lambda: time.monotonic() + passed_s)
    passed_s = 0.0

    def slowly(self, name, runs):
        nonlocal passed_s
        if name == "send":
            passed_s += WAIT_S / 5 * len(runs)
        return move(self, name, runs)

    for module in (link_session, link_server):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(pair._GlooPair, "_move", slowly)
    monkeypatch.setattr(link, "SLOT_BYTES", dict.fromkeys(link.SLOT_BYTES, 1))
    monkeypatch.setattr(packing, "MAX_LAUNCHED", 1)
    # sends take no time but that clock's: as many as are asked for may go by before the reader's thread looks
    monkeypatch.setitem(link_session.MAX_IN_FLIGHT, "pair", 3)
    source, reader = SourceRanks([LAYOUT], tmp_path), Reader(LAYOUT, transport="nccl")
    source.leases.grant(REQUEST_ID, SOURCE_IDS)
    try:
        reader.attach(source.address)
        pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
        assert pull.error is None and pull.seconds > WAIT_S
    finally:
        reader.close()
        source.close()


@pytest.mark.parametrize("transport", ["host", "nccl"])
def test_a_broken_link_keeps_no_memory(source, devices, monkeypatch, transport):
    """Its slots are page-locked, or a GPU's: they do not wait for the collector of cycles."""
    slots = []
    make_slots = link_session.Session._make_slots

    def noting(self):
        made = make_slots(self)
        slots.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(link_session.Session, "_make_slots", noting)
    reader = Reader(LAYOUT, transport=transport, device=devices[1])
    reader.attach(source.address)
    gc.collect()
    gc.disable()
    try:
        monkeypatch.setattr(link_server._ServedLink, "_read_chunks", lambda *_: None)
        give_up_after(1.0, reader, source)
        pull = reader.pull(source.address, SOURCE_IDS, TARGET_IDS, REQUEST_ID)
        assert isinstance(pull.error, LinkBroken)
        [each] = reader.peers.source(source.address).links.values()
        each._thread.join(WAIT_S)
        assert [made() for made in slots] == [None]
    finally:
        gc.enable()
        reader.close()
