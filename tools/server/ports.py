"""Which ports a server listens on."""

import random
import socket
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @classmethod
    def free(cls) -> "Ports":
        return cls(*free_ports(3))


def free_ports(count: int, besides: Collection[int] = ()) -> list[int]:
    """Ports that nothing listens on, below the range from which outgoing connections take theirs."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        if port not in besides and port_is_free("0.0.0.0", port):
            ports.add(port)
    return list(ports)


def port_is_free(host: str, port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True
