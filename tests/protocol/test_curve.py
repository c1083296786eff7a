"""Who may connect over TCP: the processes of the run, and nobody else."""

from collections.abc import Iterator

import pytest
import zmq

from ensemble.errors import ConfigError
from ensemble.protocol.curve import CurveKey, bind, connect, guard

OURS, THEIRS = CurveKey.of(b"our secret"), CurveKey.of(b"their secret")
REFUSED_MS = 300  # nothing comes of what is sent meanwhile; should it be too short, a refusal is seen in vain, no more


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.linger = 0  # of sockets that are let go of with what nobody takes
    yield context
    context.destroy(linger=0)


@pytest.fixture
def stage() -> Iterator[tuple["zmq.Socket[bytes]", str]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    guard(context, OURS)
    socket = context.socket(zmq.ROUTER)
    yield socket, bind(socket, "tcp://127.0.0.1:*", OURS)
    context.destroy(linger=0)


def test_who_has_the_key_is_heard_and_answered(
    context: "zmq.Context[zmq.Socket[bytes]]", stage: tuple["zmq.Socket[bytes]", str]
) -> None:
    socket, address = stage
    worker = context.socket(zmq.DEALER)
    connect(worker, address, OURS)
    worker.send(b"hello")
    assert socket.poll(5_000)
    identity, words = socket.recv_multipart()
    socket.send_multipart([identity, b"answer"])
    assert worker.poll(5_000)
    assert (words, worker.recv()) == (b"hello", b"answer")


def test_strangers_are_not_heard(
    context: "zmq.Context[zmq.Socket[bytes]]", stage: tuple["zmq.Socket[bytes]", str]
) -> None:
    socket, address = stage
    plain, other, spy = (context.socket(zmq.DEALER) for _ in range(3))
    plain.connect(address)
    connect(other, address, THEIRS)
    spy.curve_serverkey, spy.curve_publickey, spy.curve_secretkey = OURS.public, THEIRS.public, THEIRS.secret
    spy.connect(address)  # it has learnt the public key
    for stranger in (plain, other, spy):
        stranger.send(b"hello")
    assert not socket.poll(REFUSED_MS)


def test_a_worker_takes_no_commands_of_who_has_taken_the_stages_place(
    context: "zmq.Context[zmq.Socket[bytes]]",
) -> None:
    impostors: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = impostors.socket(zmq.ROUTER)
    address = bind(socket, "tcp://127.0.0.1:*", THEIRS)
    worker = context.socket(zmq.DEALER)
    connect(worker, address, OURS)
    worker.send(b"hello")
    assert not socket.poll(REFUSED_MS)
    impostors.destroy(linger=0)


def test_without_a_key_nothing_is_opened_to_other_machines(context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    socket = context.socket(zmq.ROUTER)
    with pytest.raises(ConfigError, match="DISTSERVE_CURVE_KEY is not set"):
        bind(socket, "tcp://127.0.0.1:*", None)
    with pytest.raises(ConfigError, match="DISTSERVE_CURVE_KEY is not set"):
        connect(socket, "tcp://127.0.0.1:5555", None)
