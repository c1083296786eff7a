"""What the scheduler knows of its replicas: pure, no server."""

import pytest

from ensemble.serving.replicas import Replicas
from ensemble.workers.messages import CancelRequests, ReplicaUp


def came_up(replica: int, epoch: int = 0, address: str = "ipc://p") -> ReplicaUp:
    return ReplicaUp(
        replica=replica,
        epoch=epoch,
        num_blocks=10,
        num_host_blocks=0,
        max_num_seqs=4,
        pid=1,
        peer_address=address,
    )


@pytest.fixture
def replicas() -> Replicas:
    """One of prefill, two of decode."""
    replicas = Replicas({"prefill": 1, "decode": 2})
    replicas.up("prefill", came_up(0))
    for index in (0, 1):
        replicas.up("decode", came_up(index))
    return replicas


def test_commands_are_numbered_from_0_in_each_life(replicas: Replicas) -> None:
    def number(replica: int) -> tuple[int, int] | None:
        command = replicas.numbered("decode", CancelRequests(replica=replica, request_ids=[7]))
        return None if command is None else (command.epoch, command.number)

    assert [number(0), number(0), number(1)] == [(0, 0), (0, 1), (0, 0)]
    assert replicas.down("decode", 0, epoch=3, reason="of another life") is None
    assert replicas.down("decode", 0, epoch=0, reason="killed") is not None
    assert number(0) is None
    replicas.up("decode", came_up(0, epoch=1))
    assert number(0) == (1, 0)


def test_a_stage_is_missing_as_long_as_none_of_its_replicas_is_up(replicas: Replicas) -> None:
    assert replicas.missing_stage() is None
    replicas.down("decode", 0, 0, "first")
    assert replicas.missing_stage() is None
    replicas.down("decode", 1, 0, "second")
    assert replicas.missing_stage() == ("decode", "second")
    replicas.up("decode", came_up(1, epoch=1))
    assert replicas.missing_stage() is None
    assert Replicas({"prefill": 1, "decode": 1}).missing_stage() == ("prefill", None)


def test_colocated_misses_no_prefill() -> None:
    replicas = Replicas({"prefill": 0, "decode": 1})
    assert replicas.missing_stage() == ("decode", None)
    replicas.up("decode", came_up(0))
    assert replicas.missing_stage() is None


def test_a_dead_prefill_worker_starts_again_when_the_last_reader_has_closed_its_mapping(replicas: Replicas) -> None:
    dead = replicas.down("prefill", 0, 0, "killed")
    assert dead is not None
    assert replicas.detach(dead.peer_address, 0) == [0, 1]
    assert replicas.detached("ipc://another", 0) is None
    assert replicas.detached(dead.peer_address, 1) is None
    assert replicas.detached(dead.peer_address, 1) is None  # said twice
    assert replicas.detached(dead.peer_address, 0) == 0
    assert replicas.detached(dead.peer_address, 0) is None


def test_a_dead_reader_maps_nothing(replicas: Replicas) -> None:
    dead = replicas.down("prefill", 0, 0, "killed")
    assert dead is not None
    replicas.detach(dead.peer_address, 0)
    replicas.down("decode", 0, 0, "killed too")
    assert replicas.reader_down(0) == []
    replicas.down("decode", 1, 0, "killed too")
    assert replicas.reader_down(1) == [0]
    assert replicas.detach("ipc://next", 0) == []  # nobody reads: it may start at once
