"""What the ranks of a replica say of a copy, as their leader waits for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from ensemble.cache.block_copier import Copy
from ensemble.cache.block_manager import Swap
from ensemble.errors import LinkBroken, PullRefused, TransferError
from ensemble.protocol.leader_follower import Copied, Ready, StartPull, StartSwap, decode_order, encode
from ensemble.replicas.follower import connect_to_leader
from ensemble.replicas.followers import Followers
from ensemble.transfer.puller import Pull, Source

TIMEOUT_S = 10.0


class Ranks:
    """A leader's end, and those of two followers."""

    def __init__(self, address: str) -> None:
        self.context = zmq.Context()
        self.leader = Followers(self.context, address, 2)
        self.sockets = [connect_to_leader(self.context, address, rank) for rank in (1, 2)]
        for rank in (1, 2):
            self.sockets[rank - 1].send(encode(Ready(rank=rank)))
        self.leader.wait_until_ready(TIMEOUT_S)

    def start_pull(self) -> tuple[Copy, int]:
        """And its id, as every rank was told."""
        copy = self.leader.start_pull(Pull(7, Source([], {}, address="there"), [1, 2], [3, 4]))
        orders = [decode_order(socket.recv()) for socket in self.sockets]
        assert isinstance(orders[0], StartPull) and orders == [orders[0]] * 2
        return copy, orders[0].copy_id

    def say(self, rank: int, copied: Copied) -> None:
        self.sockets[rank - 1].send(encode(copied))
        self.leader.wait(TIMEOUT_S)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(f"ipc://{tmp_path}/orders")
    yield ranks
    ranks.leader.close()
    for socket in ranks.sockets:
        socket.close(linger=0)
    ranks.context.term()


def test_a_copy_is_done_when_all_have_said_so_and_took_as_long_as_the_longest(ranks: Ranks) -> None:
    pull, pull_id = ranks.start_pull()
    swap = ranks.leader.start_swap(Swap(7, [1], [2]), "out")
    order = decode_order(ranks.sockets[0].recv())
    assert isinstance(order, StartSwap) and not (pull.is_done() or swap.is_done())
    ranks.say(1, Copied(copy_id=pull_id, seconds=0.5))
    ranks.say(1, Copied(copy_id=order.copy_id, seconds=0.1))
    ranks.say(2, Copied(copy_id=order.copy_id, seconds=0.2))
    assert swap.is_done() and not pull.is_done() and swap.seconds() == 0.2
    ranks.say(2, Copied(copy_id=pull_id, seconds=0.25))
    assert pull.is_done() and pull.seconds() == 0.5


@pytest.mark.parametrize(
    ("are_broken", "kind", "reason"),
    [((False, None), PullRefused, "1"), ((False, False), PullRefused, "1"), ((False, True), LinkBroken, "2")],
)
def test_it_has_failed_as_far_as_for_any_of_them(
    are_broken: tuple[bool | None, ...], kind: type[TransferError], reason: str, ranks: Ranks
) -> None:
    """`are_broken`: None for a rank whose part has come."""
    copy, copy_id = ranks.start_pull()
    for rank, is_broken in enumerate(are_broken, 1):
        error = None if is_broken is None else f"{rank}"
        ranks.say(rank, Copied(copy_id=copy_id, seconds=0.0, error=error, is_broken=bool(is_broken)))
    assert copy.is_done()
    with pytest.raises(TransferError) as raised:
        copy.seconds()
    assert type(raised.value) is kind and str(raised.value) == reason
