"""The replicas whose KV a rank reads: it attaches each rank of theirs, by the transport that works, and its leader
acknowledges each copy.

    attach --> offers of all ranks --> plan --> a way to each rank that the plan needs --> source(address)
                                                mapped at once, or a link, which opens meanwhile
"""

import contextlib
import time
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from ensemble.cache.kv_pool import map_peer_pool
from ensemble.config import TransferConfig
from ensemble.errors import LinkBroken
from ensemble.operator_log import tell_operator
from ensemble.protocol.curve import CurveKey, connect
from ensemble.protocol.replica_replica import (
    AttachPool,
    Carrier,
    PeerCall,
    PoolLayout,
    PoolOffer,
    Refused,
    TransferDone,
    decode_peer_answer,
    encode,
)
from ensemble.protocol.router_replica import KVHandoff
from ensemble.transfer import nccl
from ensemble.transfer.link import Link
from ensemble.transfer.plan import make_plan, misfit
from ensemble.transfer.puller import Source
from ensemble.transfer.wakeup import Wakeup

MAX_BREAKS, BREAKS_WITHIN_S = 3, 60.0  # of links to a replica; one more, and it counts as one that cannot be read


@dataclass(slots=True, eq=False)
class Peer:
    """A replica, from the first call to it on."""

    sockets: "list[zmq.Socket[bytes]]"  # to its ranks, the leader's first
    offers: dict[int, PoolOffer] = field(default_factory=dict)  # by rank
    opening: Source | None = None  # once all have answered
    source: Source | None = None  # once all ways are open
    why_not: str | None = None  # it cannot be read
    broke_at: list[float] = field(default_factory=list)  # time.monotonic() of the last times that a link broke

    @property
    def is_settled(self) -> bool:
        return self.source is not None or self.why_not is not None

    @property
    def links(self) -> list[Link]:
        return list(self.opening.links.values()) if self.opening is not None else []


class Peers:
    """By the address of their leader."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        pool: torch.Tensor,  # own: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        layout: PoolLayout,  # of it
        config: TransferConfig | None = None,
        *,
        rank: int = 0,
        key: CurveKey | None = None,  # for addresses on other machines
    ) -> None:
        self._context = context
        self._pool = pool
        self._device = pool.device
        self._layout = layout
        self._config = config or TransferConfig()
        self._rank = rank
        self._key = key
        self._opened = Wakeup()
        self._peers: dict[str, Peer] = {}

    @property
    def attaching(self) -> "list[zmq.Socket[bytes] | Wakeup]":
        """What is readable when there is something for `receive_handles`; empty: nothing is on its way."""
        waiting: list[zmq.Socket[bytes] | Wakeup] = []
        for peer in self._peers.values():
            if not peer.is_settled and peer.opening is not None:
                waiting.append(self._opened)
            elif not peer.is_settled:
                waiting += [socket for rank, socket in enumerate(peer.sockets) if rank not in peer.offers]
        return waiting

    def attach(self, address: str) -> None:
        """Asks each rank of the source for its pool, once."""
        if address not in self._peers:
            self._peers[address] = Peer([self._ask(address)])

    def receive_handles(self) -> list[tuple[str, str | None]]:
        """Goes on with what is attached: (address, None) for what can be read now, (address, why not) for the rest."""
        received: list[tuple[str, str | None]] = []
        self._opened.clear()
        for address, peer in self._peers.items():
            if peer.is_settled:
                continue
            try:
                self._receive_offers(peer)
                if peer.opening is None and len(peer.offers) == len(peer.sockets):
                    peer.opening = self._open(address, peer)
                if peer.opening is not None and all(self._is_open(link) for link in peer.links):
                    peer.source = peer.opening
                    if peer.links:
                        self._tell_transport(peer.source)
                    received.append((address, None))
            except (OSError, RuntimeError, LinkBroken) as error:
                received.append((address, self._give_up(address, peer, " ".join(str(error).split()))))
        return received

    def why_unmappable(self, address: str) -> str | None:
        return self._peers[address].why_not if address in self._peers else None

    def source(self, address: str) -> Source | None:
        """What the replica's KV is pulled from, once it is attached."""
        return self._peers[address].source if address in self._peers else None

    def acknowledge(self, handoff: KVHandoff) -> None:
        """Ends the lease on the source's blocks. Called exactly once for each hand-off received, by the leader alone,
        when all its ranks' copies have completed.
        """
        peer = self._peers.get(handoff.source)
        if peer is not None:  # else the source is dead, and its leases with it
            with contextlib.suppress(zmq.Again):  # it takes none: it hangs, and will be killed
                self._call(peer.sockets[0], TransferDone(request_ids=[handoff.request_id]))

    def give_up(self, address: str, reason: str) -> None:
        """Nothing is read from there."""
        self._peers[address].source, self._peers[address].why_not = None, reason

    def renew(self, source: Source, reason: str) -> bool:
        """A link of it is broken: it is attached anew. False if that has been too often, and it is given up."""
        peer = self._peers.get(source.address)
        if peer is None or peer.source is not source:
            return True  # it is, already
        now = time.monotonic()
        peer.broke_at = [*(at for at in peer.broke_at if at > now - BREAKS_WITHIN_S), now]
        if len(peer.broke_at) > MAX_BREAKS:
            self._give_up(source.address, peer, reason)
            return False
        self._attach_anew(source.address, peer)
        return True

    def _attach_anew(self, address: str, peer: Peer) -> None:
        self.end_links(address)
        for socket in peer.sockets[1:]:
            socket.close(linger=0)
        del peer.sockets[1:]
        peer.offers.clear()
        peer.opening = peer.source = None
        with contextlib.suppress(zmq.Again):
            self._call(peer.sockets[0], AttachPool())

    def end_links(self, address: str) -> None:
        """What comes from there over links ends soon, without having come."""
        for link in self._peers[address].links if address in self._peers else []:
            link.close()

    def detach(self, address: str) -> None:
        """Forgets a source, and closes the mapping of its pool: the caller holds no view of it any more."""
        self.end_links(address)
        peer = self._peers.pop(address, None)
        for socket in peer.sockets if peer is not None else []:
            socket.close(linger=0)

    def close(self) -> None:
        """Closes the sockets and the mappings."""
        for address in list(self._peers):
            self.detach(address)

    def _ask(self, address: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        connect(socket, address, self._key)
        self._call(socket, AttachPool())
        return socket

    def _call(self, socket: "zmq.Socket[bytes]", call: PeerCall) -> None:
        socket.send(encode(call), zmq.NOBLOCK)

    def _receive_offers(self, peer: Peer) -> None:
        for rank, socket in enumerate(list(peer.sockets)):
            if rank in peer.offers or not socket.poll(0):
                continue
            try:
                answer = decode_peer_answer(socket.recv())
            except msgspec.DecodeError as error:
                raise LinkBroken(f"rank {rank} answers unreadably: {error}") from None
            if isinstance(answer, Refused):
                raise LinkBroken(f"rank {rank} refuses: {answer.reason}")
            if isinstance(answer, PoolOffer):
                peer.offers[rank] = answer
                if rank == 0:
                    peer.sockets += [self._ask(each) for each in answer.rank_addresses[1:]]

    def _open(self, address: str, peer: Peer) -> Source:
        """Raises LinkBroken where pools do not fit; OSError or RuntimeError where one cannot be mapped, but has to."""
        offers = [peer.offers[rank] for rank in range(len(peer.sockets))]
        for rank, offer in enumerate(offers):
            if offer.life != offers[0].life:
                raise LinkBroken(f"rank {rank}: life = {offer.life}: {offers[0].life}, the leader's, is wanted")
            if reason := misfit(self._layout, offer.layout):
                raise LinkBroken(f"rank {rank}: {reason}")
        try:
            pieces = make_plan(self._layout, [offer.layout for offer in offers], self._rank)
        except ValueError as error:
            raise LinkBroken(str(error)) from None
        num_blocks = min(offer.layout.num_blocks for offer in offers)
        source = Source(pieces, {}, {}, address, offers[0].life, num_blocks)
        addresses = [address, *offers[0].rank_addresses[1:]]
        for rank in sorted({piece.source_rank for piece in pieces}):
            self._find_way(source, rank, addresses[rank], offers[rank])
        return source

    def _find_way(self, source: Source, rank: int, address: str, offer: PoolOffer) -> None:
        transport = self._config.transport
        if transport in ("auto", "cuda_ipc"):
            try:
                source.pools[rank] = map_peer_pool(offer.handle, self._device)
                return
            except (OSError, RuntimeError) as error:
                self._check_device()
                if transport == "cuda_ipc":
                    raise
                tell_operator(f"{address} is not mapped: {error}")
        carriers: list[Carrier] = ["pair"] if transport == "nccl" else ["shared", "frames"]
        source.links[rank] = Link(
            self._context,
            address,
            self._pool,
            opened=self._opened,
            carriers=carriers,
            timeout_s=self._config.timeout_s,
            key=self._key,
        )

    def _tell_transport(self, source: Source) -> None:
        uses_nccl = self._device.type == "cuda" and any(link.carrier == "pair" for link in source.links.values())
        library = f" (NCCL {nccl.version()})" if uses_nccl else ""
        tell_operator(f"the KV of {source.address} comes by {source.transport}{library}")

    def _is_open(self, link: Link) -> bool:
        if link.error is not None:
            raise link.error
        return link.is_open

    def _give_up(self, address: str, peer: Peer, reason: str) -> str:
        self._check_device()
        self.end_links(address)
        peer.why_not, peer.source = f"transfer.transport = {self._config.transport}: {reason}", None
        tell_operator(f"the KV of {address} cannot be read: {peer.why_not}")
        return peer.why_not

    def _check_device(self) -> None:
        """Raises where it is this process whose GPU has failed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
