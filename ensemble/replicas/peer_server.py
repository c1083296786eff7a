"""What a rank does for those that read its pool: says what it holds, packs blocks for links, hears acknowledgements."""

import contextlib
from collections.abc import Iterable

import msgspec
import zmq

from ensemble.cache.kv_pool import KVPool
from ensemble.engine.engine import Engine
from ensemble.protocol.curve import CurveKey, bind
from ensemble.protocol.replica_replica import (
    AttachPool,
    Beat,
    PoolLayout,
    PoolOffer,
    Refused,
    TransferDone,
    decode_peer_call,
    encode,
)
from ensemble.threads import start_vital_thread
from ensemble.transfer.leases import Leases
from ensemble.transfer.link_server import LinkServer

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
    """Answers peers from a thread of its own, so that a long batch does not hold up a first attach. Raises ConfigError
    for an address that other machines reach without a key.

    Acknowledgements go on to `socket`, which the engine's thread reads between batches.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,  # this rank's
        pool: KVPool,
        layout: PoolLayout,
        *,
        leases: Leases,  # of the replica, as this rank knows them
        life: int = 0,
        rank_addresses: Iterable[str] = (),  # of all ranks, the leader's first; none: this one is alone
        key: CurveKey | None = None,  # for an address that other machines reach
        timeout_s: float = 10.0,
    ) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(ACKNOWLEDGEMENTS)
        self.life = life  # of the replica; another one may begin in the same process
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else nobody would be told that a reader has gone
        bind(self._router, address, key)
        self._context = context
        self._layout = layout
        self._rank_addresses = list(rank_addresses) or [address]
        self._handle = pool.export()
        self._links = LinkServer(pool.tensor, leases, lambda: self.life, timeout_s, self._is_there)
        start_vital_thread(self._serve, "peer-server")

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
                zmq.select([self._router, self._links.answered], [], [])
                while self._router.poll(0):
                    identity, *frames = self._router.recv_multipart()
                    self._handle_call(identity, frames, forward)
                self._links.answered.clear()
                while not self._links.answers.empty():
                    identity, answer, frame = self._links.answers.get()
                    if not self._send([identity, encode(answer), *([] if frame is None else [frame])]):
                        self._links.end(identity)
        except zmq.ContextTerminated:
            self._links.close()
            forward.close(linger=0)
            self._router.close(linger=0)

    def _send(self, frames: list[bytes]) -> bool:
        """Never waits: what its reader does not take is dropped, and missed by it in time. False: it is not there."""
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK, copy=False)
        except zmq.Again:
            pass
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def _is_there(self, identity: bytes) -> bool:
        return self._send([identity, encode(Beat())])

    def _handle_call(self, identity: bytes, frames: list[bytes], forward: "zmq.Socket[bytes]") -> None:
        if len(frames) != 1:
            self._send([identity, encode(Refused(reason=f"call: one frame is wanted, not {len(frames)}"))])
            return
        try:
            call = decode_peer_call(frames[0])
        except msgspec.DecodeError as error:
            self._send([identity, encode(Refused(reason=f"call: {error}"))])
            return
        match call:
            case AttachPool():
                offer = PoolOffer(
                    life=self.life, rank_addresses=self._rank_addresses, layout=self._layout, handle=self._handle
                )
                self._send([identity, encode(offer)])
            case TransferDone():
                with contextlib.suppress(zmq.Again):  # the engine's thread hangs, and will be killed
                    forward.send(frames[0], zmq.NOBLOCK)
            case _:
                self._links.handle(identity, call)
