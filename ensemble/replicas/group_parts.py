"""Leases and peers of an engine loop that leads several ranks: like those of one, but for all of them."""

import torch
import zmq

from ensemble.config import TransferConfig
from ensemble.protocol.curve import CurveKey
from ensemble.protocol.replica_replica import PoolLayout
from ensemble.replicas.followers import Followers
from ensemble.replicas.peers import Peer, Peers
from ensemble.transfer.leases import Leases
from ensemble.transfer.puller import Source
from ensemble.transfer.wakeup import Wakeup


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
