"""The socket of a front that streams small pieces."""

import socket


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """`::` listens for IPv4, too, as servers elsewhere do. Raises OSError.

    What is accepted sends small pieces at once. asyncio sees to that only where a socket was made with TCP's number:
    else the second event of a stream waits until the client's kernel acknowledges the first one, 40 ms later.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    is_dual = host == "::" and socket.has_dualstack_ipv6()
    listener = socket.create_server((host, port), family=family, backlog=backlog, dualstack_ipv6=is_dual)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # which accepted ones inherit
    return listener
