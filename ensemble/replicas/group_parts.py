"""What an engine loop has of copies and peers, where it leads several ranks: like those of one, but for all of them."""

import time

import torch
import zmq

from ensemble.cache.block_manager import Swap
from ensemble.cache.swapper import Swapped, Swapper, Way
from ensemble.config import TransferConfig
from ensemble.errors import LinkBroken, PullRefused
from ensemble.protocol.curve import CurveKey
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.followers import Followers
from ensemble.replicas.peers import Peer, Peers
from ensemble.transfer.leases import Leases
from ensemble.transfer.puller import Pull, Puller, Source
from ensemble.transfer.wakeup import Wakeup


class GroupSwapper:
    """Swaps of all ranks: like a `Swapper`, but that a copy has completed when every rank's has."""

    def __init__(self, swapper: Swapper, followers: Followers) -> None:
        self._swapper = swapper
        self._followers = followers
        self._copy_ids: dict[tuple[int, Way], int] = {}  # (request_id, way) |-> copy_id
        self._completed_here: list[Swapped] = []

    @property
    def num_in_flight(self) -> int:
        return len(self._copy_ids)

    def start(self, swap: Swap, way: Way) -> None:
        self._copy_ids[swap.request_id, way] = self._followers.start_swap(swap, way)
        self._swapper.start(swap, way)

    def completed(self) -> list[Swapped]:
        """Copies that have completed everywhere since the last call."""
        here, self._completed_here, done = [*self._completed_here, *self._swapper.completed()], [], []
        for swapped in here:
            key = swapped.request_id, swapped.way
            if self._followers.ends_of(self._copy_ids[key]) is None:
                self._completed_here.append(swapped)
            else:
                del self._copy_ids[key]
                done.append(swapped)
        return done

    def wait(self, timeout_s: float) -> None:
        """Until one may have completed, at most `timeout_s`."""
        if self._completed_here:
            self._followers.wait(timeout_s)
        else:
            self._swapper.wait(timeout_s)

    def swap_in_s(self, num_blocks: int) -> float:
        return self._swapper.swap_in_s(num_blocks)


class GroupLeases(Leases):
    """The leader's. The others hear of each in order with the steps, so before its blocks are anything else's."""

    def __init__(self, followers: Followers) -> None:
        super().__init__()
        self._followers = followers

    def grant(self, request_id: int, block_ids: list[int]) -> None:
        super().grant(request_id, block_ids)
        self._followers.grant_lease(request_id, block_ids)

    def end(self, request_id: int) -> None:
        super().end(request_id)
        self._followers.end_lease(request_id)


class GroupPuller:
    """Pulls of all ranks: like a `Puller`, but that a copy has completed when every rank's has."""

    def __init__(self, puller: Puller, followers: Followers) -> None:
        self._puller = puller
        self._followers = followers
        self._copy_ids: dict[int, int] = {}  # request_id |-> copy_id
        self._completed_here: list[Pull] = []

    @property
    def num_in_flight(self) -> int:
        return len(self._copy_ids)

    def start(self, pull: Pull) -> None:
        self._copy_ids[pull.request_id] = self._followers.start_pull(pull)
        self._puller.start(pull)

    def completed(self) -> list[Pull]:
        """Those that have ended everywhere since the last call, with the bytes of all ranks and the longest time."""
        here, self._completed_here, done = [*self._completed_here, *self._puller.completed()], [], []
        for pull in here:
            ends = self._followers.ends_of(self._copy_ids[pull.request_id])
            if ends is None:
                self._completed_here.append(pull)
                continue
            del self._copy_ids[pull.request_id]
            pull.seconds = max([pull.seconds, *(end.seconds for end in ends)])
            pull.waited_s = max(0.0, time.monotonic() - pull.began - pull.seconds)
            pull.num_bytes += sum(end.num_bytes for end in ends)
            failed = [end for end in ends if end.error is not None]
            if failed and not isinstance(pull.error, LinkBroken):
                first = next((end for end in failed if end.is_broken), failed[0])
                pull.error = (LinkBroken if first.is_broken else PullRefused)(first.error)
            done.append(pull)
        return done

    def wait(self, timeout_s: float) -> None:
        """Until one may have ended, at most `timeout_s`."""
        if self._completed_here:
            self._followers.wait(timeout_s)
        else:
            self._puller.wait(timeout_s)


class GroupPeers(Peers):
    """The replicas whose KV this one reads, once every rank can read its part of it."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        pool: torch.Tensor,  # the leader's
        layout: PoolLayout,  # of it
        config: TransferConfig,
        followers: Followers,
        key: CurveKey | None = None,  # for addresses on other machines
    ) -> None:
        super().__init__(context, pool, layout, config, key=key)
        self._followers = followers
        self._num_waiting: dict[str, int] = {}  # address |-> followers that have yet to say that they can

    @property
    def attaching(self) -> "list[zmq.Socket[bytes] | Wakeup]":
        return super().attaching + ([self._followers.socket] if self._num_waiting else [])

    def attach(self, address: str) -> None:
        if address not in self._peers:
            self._attach_followers(address)
        super().attach(address)

    def _attach_followers(self, address: str) -> None:
        self._num_waiting[address] = self._followers.num_followers
        self._followers.attach(address)

    def _attach_anew(self, address: str, peer: Peer) -> None:
        super()._attach_anew(address, peer)
        self._attach_followers(address)

    def receive_handles(self) -> list[tuple[str, str | None]]:
        received: list[tuple[str, str | None]] = []
        for address, reason in super().receive_handles():
            if reason is not None:
                self._num_waiting.pop(address, None)
            if address not in self._num_waiting:
                received.append((address, reason))
        for said in self._followers.attached():
            if said.address not in self._num_waiting:
                continue  # detached meanwhile, or of no use since another said so
            self._num_waiting[said.address] -= 1
            if said.reason is not None:
                self.give_up(said.address, said.reason)
            if said.reason is not None or not self._num_waiting[said.address]:
                del self._num_waiting[said.address]
                if said.reason is not None or super().source(said.address) is not None:
                    received.append((said.address, said.reason))
        return received

    def source(self, address: str) -> Source | None:
        return None if address in self._num_waiting else super().source(address)

    def end_links(self, address: str) -> None:
        """A follower's copies that are under way keep what they read mapped until they have ended."""
        if address in self._peers:
            self._followers.detach(address)
        super().end_links(address)

    def detach(self, address: str) -> None:
        self._num_waiting.pop(address, None)
        super().detach(address)
