"""The socket of a front that streams small pieces, and how many of them there may be."""

import resource
import socket

MAX_FILES = 1 << 16  # with more, programs that close all there could be take seconds to start another


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


def raise_file_limit() -> int:
    """How many files this process, and what it starts, may have open from now on.

    Shells allow 1,024. A Triton server that has no more takes no connection, answers none, and writes a line of log
    for each try: 80 MB a second.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return MAX_FILES if soft == resource.RLIM_INFINITY else soft
