"""Pools that do not fit are refused by name when they are attached, and nothing that is said harms who hears it."""

import msgspec
import pytest
import torch
import zmq

from ensemble.cache.kv_pool import map_peer_pool
from ensemble.protocol.replica_replica import AttachPool, PoolOffer, Refused, decode_peer_answer, encode
from tests.transfer.fleet import NUM_LAYERS, Reader, SourceRanks, changed
from tests.transfer.layouts import layouts_of

[LAYOUT] = layouts_of(12, 4, 1, [0, NUM_LAYERS])


@pytest.fixture
def source(tmp_path):
    source = SourceRanks([LAYOUT], tmp_path)
    yield source
    source.close()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("dtype", "float16", "dtype = 'float32': 'float16' is wanted"),
        ("block_size", 16, "block_size = 4: 16 is wanted"),
        ("head_dim", 64, "head_dim = 8: 64 is wanted"),
        ("model", "another", "model = 'model': 'another' is wanted"),
        ("layers", (0, NUM_LAYERS + 1), "layer 7 of KV head 0: no rank of the source has it"),
        ("kv_heads", (0, 1, 2, 5), "layer 0 of KV head 5: no rank of the source has it"),
    ],
)
def test_pools_that_do_not_fit_are_refused_by_name(source, field, value, reason):
    reader = Reader(LAYOUT)
    reader.peers._layout = changed(LAYOUT, **{field: value})
    [(address, why)] = reader.attach(source.address)
    assert address == source.address and why is not None and reason in why
    assert reader.peers.why_unmappable(address) == why and reader.peers.source(address) is None
    reader.close()


def test_a_rank_in_another_life_than_its_leader_is_refused(tmp_path):
    sources = SourceRanks(layouts_of(12, 4, 2, [0, NUM_LAYERS]), tmp_path)
    sources.servers[1].life = 4
    reader = Reader(LAYOUT)
    assert "rank 1: life = 4: 0, the leader's, is wanted" in str(reader.attach(sources.address))
    reader.close()
    sources.close()


def test_memory_of_another_kind_of_device_is_not_mapped_and_the_transport_may_be_another(source):
    with pytest.raises(RuntimeError, match="pool handle = memfd: cuda:0 does not map"):
        map_peer_pool(source.pools[0].export(), torch.device("cuda", 0))


def test_nonsense_is_refused_and_the_next_one_is_served(source):
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(source.address)
    for frames in ([b""], [b"", b""], [b"\xc1"], [msgspec.msgpack.encode({"type": "Nothing"})]):
        socket.send_multipart(frames)
        assert socket.poll(5000)
        assert isinstance(decode_peer_answer(socket.recv()), Refused)
    socket.send(encode(AttachPool()))
    assert socket.poll(5000)
    assert isinstance(decode_peer_answer(socket.recv()), PoolOffer)
    context.destroy(linger=0)


def test_an_unreadable_offer_is_the_end_of_the_attachment_alone(tmp_path):
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/liar")
    reader = Reader(LAYOUT)
    reader.peers.attach(f"ipc://{tmp_path}/liar")
    identity, *_ = socket.recv_multipart()
    socket.send_multipart([identity, b"\xc1"])
    [(_, why)] = reader.attach(f"ipc://{tmp_path}/liar")
    assert why is not None and "unreadably" in why
    context.destroy(linger=0)
    reader.close()


def test_a_pool_of_another_host_is_not_mistaken_for_a_file_of_this_one(source):
    """The path that names it there may name something else here."""
    handle = source.pools[0].export()
    path, _, name = handle.handle.decode().partition(" ")
    server = source.servers[0]
    server._handle = msgspec.structs.replace(handle, handle=f"{path} {name[:-1]}".encode() + b"x")
    reader = Reader(LAYOUT, transport="cuda_ipc")
    assert "it is on another host" in str(reader.attach(source.address))
    reader.close()


def test_handles_that_this_process_cannot_open_are_refused_before_cuda_is_asked(source):
    of_a_cpu = source.pools[0].export()
    with pytest.raises(RuntimeError, match="another kind of device"):
        map_peer_pool(of_a_cpu, torch.device("cuda", 0))
    of_a_gpu = msgspec.structs.replace(of_a_cpu, kind="cuda_ipc", host="another")
    with pytest.raises(RuntimeError, match="another kind of device"):
        map_peer_pool(of_a_gpu, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="on another host, another"):
        map_peer_pool(of_a_gpu, torch.device("cuda", 0))
