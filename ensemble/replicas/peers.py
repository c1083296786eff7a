"""Replica to replica: each rank of the source offers its pool, and the leader hears acknowledgements; each reading rank
attaches, and the leader acknowledges each copy.
"""

import contextlib
import hmac
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from ensemble.cache.kv_pool import KVPool, map_peer_pool
from ensemble.engine.engine import Engine
from ensemble.errors import LinkBroken
from ensemble.protocol.curve import CurveKey, bind, connect
from ensemble.protocol.replica_replica import (
    AttachPool,
    PeerAnswer,
    PoolLayout,
    PoolOffer,
    Refused,
    TransferDone,
    decode_peer_answer,
    decode_peer_call,
    encode,
)
from ensemble.protocol.router_replica import KVHandoff
from ensemble.transfer.plan import make_plan, misfit
from ensemble.transfer.puller import Source

ACKNOWLEDGEMENTS = "inproc://acknowledgements"


def rank_address(address: str, rank: int) -> str:
    """Of a rank's PeerServer: in the private directory of one host, or at one of a row of ports."""
    if address.startswith("tcp:"):
        host, _, port = address.rpartition(":")
        return f"{host}:{int(port) + rank}"
    return f"{address}.{rank}" if rank else address


def pool_layout(
    engine: Engine,
    model: str,  # its fingerprint
) -> PoolLayout:
    layout = engine.pool.layout
    return PoolLayout(
        model=model,
        dtype=str(layout.dtype).removeprefix("torch."),
        block_size=layout.block_size,
        head_dim=layout.head_dim,
        layers=(layout.first_layer, layout.first_layer + layout.num_layers),
        kv_heads=layout.kv_heads or tuple(range(layout.num_kv_heads)),
        num_blocks=engine.pool.num_blocks,
    )


class PeerServer:
    """Answers peers from a thread of its own, so that a long batch does not hold up a first attach.

    Acknowledgements go on to `socket`, which the engine's thread reads between batches.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,  # this rank's
        pool: KVPool,
        layout: PoolLayout,
        *,
        life: int = 0,
        rank_addresses: Iterable[str] = (),  # of all ranks, the leader's first; none: this one is alone
        token: bytes = b"",
        key: CurveKey | None = None,  # for an address that other machines reach
    ) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(ACKNOWLEDGEMENTS)
        self.life = life  # of the replica; another one may begin in the same process
        self._router = context.socket(zmq.ROUTER)
        bind(self._router, address, key)
        self._context = context
        self._layout = layout
        self._rank_addresses = list(rank_addresses) or [address]
        self._handle = pool.export()
        self._token = token
        threading.Thread(target=self._serve, name="peer-server", daemon=True).start()

    def acknowledged(self) -> list[int]:
        """Request ids of leases whose readers have acknowledged since the last call."""
        request_ids: list[int] = []
        while self.socket.poll(0):
            call = decode_peer_call(self.socket.recv())
            if isinstance(call, TransferDone):
                request_ids += call.request_ids
        return request_ids

    def close(self) -> None:
        """Closes the engine's socket; the thread ends with the ZeroMQ context."""
        self.socket.close(linger=0)

    def _serve(self) -> None:
        forward = self._context.socket(zmq.PUSH)
        forward.connect(ACKNOWLEDGEMENTS)
        try:
            while True:
                identity, *frames = self._router.recv_multipart()
                answer = self._answer(frames, forward)
                if answer is not None:  # dropped where its reader takes none
                    self._router.send_multipart([identity, encode(answer)])
        except zmq.ContextTerminated:
            forward.close(linger=0)
            self._router.close(linger=0)

    def _answer(self, frames: list[bytes], forward: "zmq.Socket[bytes]") -> PeerAnswer | None:
        if len(frames) != 2 or not hmac.compare_digest(frames[0], self._token):
            return Refused(reason="token: that of this deployment is wanted")
        try:
            call = decode_peer_call(frames[1])
        except msgspec.DecodeError as error:
            return Refused(reason=f"call: {error}")
        match call:
            case AttachPool():
                return PoolOffer(
                    life=self.life, rank_addresses=self._rank_addresses, layout=self._layout, handle=self._handle
                )
            case TransferDone():
                with contextlib.suppress(zmq.Again):  # the engine's thread hangs, and will be killed
                    forward.send(frames[1], zmq.NOBLOCK)
        return None


@dataclass(slots=True, eq=False)
class _Peer:
    """A replica, from the first call to it on."""

    sockets: "list[zmq.Socket[bytes]]"  # to its ranks, the leader's first
    offers: dict[int, PoolOffer] = field(default_factory=dict)  # by rank
    source: Source | None = None  # once all have answered
    why_not: str | None = None  # it cannot be read

    @property
    def awaited(self) -> "list[zmq.Socket[bytes]]":
        """Sockets on which an answer is still to come."""
        if self.source is not None or self.why_not is not None:
            return []
        return [socket for rank, socket in enumerate(self.sockets) if rank not in self.offers]


class Peers:
    """The replicas whose KV this rank reads, by the address of their leader."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        device: torch.device,
        layout: PoolLayout,  # of this rank's pool
        *,
        rank: int = 0,
        token: bytes = b"",
        key: CurveKey | None = None,  # for addresses on other machines
    ) -> None:
        self._context = context
        self._key = key
        self._device = device
        self._layout = layout
        self._rank = rank
        self._token = token
        self._peers: dict[str, _Peer] = {}

    @property
    def attaching(self) -> "list[zmq.Socket[bytes]]":
        """Sockets on which an offer is awaited."""
        return [socket for peer in self._peers.values() for socket in peer.awaited]

    def attach(self, address: str) -> None:
        """Asks each rank of the source for its pool, once."""
        if address not in self._peers:
            self._peers[address] = _Peer([self._ask(address)])

    def receive_handles(self) -> list[tuple[str, str | None]]:
        """Maps the pools whose offers have come: (address, None), or (address, why it cannot be read)."""
        received: list[tuple[str, str | None]] = []
        for address, peer in self._peers.items():
            if not peer.awaited:
                continue
            try:
                self._receive_offers(peer)
                if not peer.awaited:
                    peer.source = self._open(address, peer)
                    received.append((address, None))
            except (OSError, RuntimeError, LinkBroken) as error:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # raises where it is this process whose GPU has failed
                peer.why_not = " ".join(str(error).split())
                print(f"the KV pool of {address} cannot be read: {peer.why_not}", file=sys.stderr, flush=True)
                received.append((address, peer.why_not))
        return received

    def give_up(self, address: str, reason: str) -> None:
        """Nothing is read from there."""
        self._peers[address].source, self._peers[address].why_not = None, reason

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
                call = encode(TransferDone(request_ids=[handoff.request_id]))
                peer.sockets[0].send_multipart([self._token, call], zmq.NOBLOCK)

    def detach(self, address: str) -> None:
        """Forgets a source, and closes the mapping of its pool: the caller holds no view of it any more."""
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
        socket.send_multipart([self._token, encode(AttachPool())])
        return socket

    def _receive_offers(self, peer: _Peer) -> None:
        for rank, socket in enumerate(list(peer.sockets)):
            if rank in peer.offers or not socket.poll(0):
                continue
            try:
                answer = decode_peer_answer(socket.recv())
            except msgspec.DecodeError as error:
                raise LinkBroken(f"rank {rank} answers unreadably: {error}") from None
            if isinstance(answer, Refused):
                raise LinkBroken(f"rank {rank} refuses: {answer.reason}")
            peer.offers[rank] = answer
            if rank == 0:
                peer.sockets += [self._ask(each) for each in answer.rank_addresses[1:]]

    def _open(self, address: str, peer: _Peer) -> Source:
        """Raises LinkBroken where pools do not fit; OSError or RuntimeError where one cannot be mapped."""
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
        pools = {
            rank: map_peer_pool(offers[rank].handle, self._device) for rank in {piece.source_rank for piece in pieces}
        }
        num_blocks = min(offer.layout.num_blocks for offer in offers)
        return Source(pieces, pools, address, offers[0].life, num_blocks)
