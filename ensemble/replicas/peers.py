"""Replica to replica: the source offers its pool and hears acknowledgements; the reader attaches, and acknowledges each
copy.
"""

import contextlib
import sys
import threading

import torch
import zmq

from ensemble.cache.kv_pool import KVPool, map_peer_pool
from ensemble.protocol.replica_replica import (
    AttachPool,
    TransferDone,
    decode_peer_call,
    decode_pool_handle,
    encode,
)
from ensemble.protocol.router_replica import KVHandoff

ACKNOWLEDGEMENTS = "inproc://acknowledgements"


class PeerServer:
    """Answers peers from a thread of its own, so that a long batch does not hold up a first attach.

    Acknowledgements go on to `socket`, which the engine's thread reads between batches.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, pool: KVPool) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.bind(ACKNOWLEDGEMENTS)
        self._router = context.socket(zmq.ROUTER)
        self._router.bind(address)
        self._context = context
        self._handle = encode(pool.export())
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
                identity, payload = self._router.recv_multipart()
                if isinstance(decode_peer_call(payload), AttachPool):
                    self._router.send_multipart([identity, self._handle])
                else:
                    forward.send(payload)
        except zmq.ContextTerminated:
            forward.close(linger=0)
            self._router.close(linger=0)


class Peers:
    """The replicas whose pools this one reads, by address."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], device: torch.device) -> None:
        self._context = context
        self._device = device
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._pools: dict[str, torch.Tensor] = {}
        self._unmappable: dict[str, str] = {}  # addresses whose handle was of no use |-> why

    @property
    def attaching(self) -> list[zmq.Socket[bytes]]:
        """Sockets on which a pool handle is awaited."""
        done = self._pools.keys() | self._unmappable.keys()
        return [socket for address, socket in self._sockets.items() if address not in done]

    def attach(self, address: str) -> None:
        """Asks for the source's pool, once."""
        if address not in self._sockets:
            socket = self._context.socket(zmq.DEALER)
            socket.connect(address)
            socket.send(encode(AttachPool()))
            self._sockets[address] = socket

    def receive_handles(self) -> list[tuple[str, str | None]]:
        """Maps the pools whose handles have come: (address, None), or (address, why it cannot be mapped)."""
        received: list[tuple[str, str | None]] = []
        for address, socket in self._sockets.items():
            if address in self._pools or address in self._unmappable or not socket.poll(0):
                continue
            try:
                self._pools[address] = map_peer_pool(decode_pool_handle(socket.recv()), self._device)
                received.append((address, None))
            except (OSError, RuntimeError) as error:  # another IPC namespace, no peer access, or it has just died
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # raises where it is this process whose GPU has failed
                reason = " ".join(str(error).split())
                print(f"the KV pool of {address} cannot be mapped: {reason}", file=sys.stderr, flush=True)
                self._unmappable[address] = reason
                received.append((address, reason))
        return received

    def why_unmappable(self, address: str) -> str | None:
        return self._unmappable.get(address)

    def pool(self, address: str) -> torch.Tensor | None:
        """The source's pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], once mapped."""
        return self._pools.get(address)

    def acknowledge(self, handoff: KVHandoff) -> None:
        """Ends the lease on the source's blocks. Called exactly once for each hand-off received."""
        socket = self._sockets.get(handoff.source)
        if socket is not None:  # else the source is dead, and its leases with it
            with contextlib.suppress(zmq.Again):  # it takes none: it hangs, and will be killed
                socket.send(encode(TransferDone(request_ids=[handoff.request_id])), zmq.NOBLOCK)

    def detach(self, address: str) -> None:
        """Forgets a source, and closes the mapping of its pool: the caller holds no view of it any more."""
        self._pools.pop(address, None)
        self._unmappable.pop(address, None)
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close(linger=0)

    def close(self) -> None:
        """Closes the sockets and the mappings."""
        for socket in self._sockets.values():
            socket.close(linger=0)
        self._sockets.clear()
        self._pools.clear()
