"""Which ports a server listens on."""

import random
import socket
from collections.abc import Collection
from dataclasses import dataclass

from tools.installation.server_files import ServerError


@dataclass(frozen=True, slots=True)
class Ports:
    http: int
    grpc: int
    metrics: int

    @classmethod
    def free(cls, besides: Collection[int] = ()) -> "Ports":
        return cls(*free_ports(3, besides))


def free_ports(count: int, besides: Collection[int] = ()) -> list[int]:
    """Ports that nothing listens on, below the range from which outgoing connections take theirs."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(10_000, 32_000)
        if port not in besides and port_is_free("0.0.0.0", port):
            ports.add(port)
    return list(ports)


def port_is_free(host: str, port: int) -> bool:
    """Raises ServerError for a host that is no address of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError as error:
        raise ServerError(f"host {host}: {error.strerror}") from None
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            return False
    return True
