"""Sockets between machines: encrypted, and open to the processes of one run alone (CURVE).

A run has one pair of keys, made of its secret, which all its processes share. Sockets on one machine need none: they
lie in a private folder.
"""

import hashlib
import os
import threading
from dataclasses import dataclass

import zmq
from zmq.utils import z85

from ensemble.errors import ConfigError

KEY_VARIABLE = "DISTSERVE_CURVE_KEY"  # environment variable of a worker: the run's secret key, as Z85
HEARTBEAT_MS, SILENCE_MS = 2_000, 15_000  # a connection that says nothing for so long is made anew
_ZAP = "inproc://zeromq.zap.01"  # where libzmq asks who may connect (RFC 27)


@dataclass(frozen=True, slots=True)
class CurveKey:
    """A run's."""

    secret: bytes  # Z85

    @classmethod
    def of(cls, secret: bytes) -> "CurveKey":
        return cls(z85.encode(hashlib.sha256(b"curve" + secret).digest()))

    @classmethod
    def from_environment(cls) -> "CurveKey | None":
        """None: this process's sockets are all on its machine."""
        key = os.environ.get(KEY_VARIABLE)
        return cls(key.encode()) if key else None

    @property
    def public(self) -> bytes:
        return zmq.curve_public(self.secret)


def bind(socket: "zmq.Socket[bytes]", address: str, key: CurveKey | None) -> str:
    """Returns the address at which others connect: `tcp://HOST:*` takes a free port, and wants a context with `guard`.

    Raises ConfigError without a key that such an address needs.
    """
    if address.startswith("tcp:"):
        key = _needed(key, address)
        socket.curve_server = True
        socket.curve_secretkey = key.secret
        _watch_connections(socket)
    socket.bind(address)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: "zmq.Socket[bytes]", address: str, key: CurveKey | None) -> None:
    """Raises ConfigError without a key that an address of another machine needs."""
    if address.startswith("tcp:"):
        key = _needed(key, address)
        socket.curve_serverkey = socket.curve_publickey = key.public
        socket.curve_secretkey = key.secret
        _watch_connections(socket)
    socket.connect(address)


def guard(context: "zmq.Context[zmq.Socket[bytes]]", key: CurveKey | None) -> None:
    """Lets nobody connect to this context's sockets over TCP who has not the run's key. Ends with the context."""
    if key is None:
        return
    # Through a shadow, so that `context.destroy` does not close it under its thread, but waits for that.
    shadow: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context)
    socket = shadow.socket(zmq.REP)
    socket.bind(_ZAP)
    allowed = z85.decode(key.public)

    def answer_all() -> None:
        try:
            while True:
                version, request_id, _, _, _, mechanism, *credentials = socket.recv_multipart()
                is_ours = mechanism == b"CURVE" and credentials == [allowed]
                verdict = (b"200", b"OK") if is_ours else (b"400", b"a stranger")
                socket.send_multipart([version, request_id, *verdict, b"", b""])
        except zmq.ContextTerminated:
            socket.close(linger=0)

    threading.Thread(target=answer_all, name="guard", daemon=True).start()


def _needed(key: CurveKey | None, address: str) -> CurveKey:
    if key is None:
        raise ConfigError(f"{KEY_VARIABLE} is not set: {address} takes and makes no connection without a key")
    return key


def _watch_connections(socket: "zmq.Socket[bytes]") -> None:
    socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = HEARTBEAT_MS, SILENCE_MS, SILENCE_MS
