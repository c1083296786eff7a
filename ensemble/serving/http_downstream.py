"""The HTTP relay's connections to clients: what they send, how long they may take, and when they have gone."""

import asyncio
import select
from collections.abc import Callable, Iterable
from typing import SupportsIndex

from ensemble.serving.http_messages import Refused

REQUEST_S = 60.0  # in which a request has to come, head and body
IDLE_S = 75.0  # after an answer a connection may rest for so long


class ClientReader(asyncio.StreamReader):
    """What a client sends. Tells at once when it has closed, also where bytes that nobody has read come before that."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.has_closed = False
        self.on_closed: Callable[[], None] = lambda: None
        self._socket: asyncio.Transport | None = None
        self._hang_ups: select.epoll | None = None

    def set_transport(self, transport: asyncio.BaseTransport) -> None:
        super().set_transport(transport)
        assert isinstance(transport, asyncio.Transport)
        self._socket = transport

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        super().feed_data(data)
        if self._hang_ups is None and self._socket is not None and not self._socket.is_reading():
            self._watch(self._socket)

    def feed_eof(self) -> None:
        super().feed_eof()
        self._set_closed()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self._set_closed()

    def _watch(self, transport: asyncio.Transport) -> None:
        """The event loop lets a socket alone whose bytes are not wanted now; a hang-up is to be seen all the same."""
        self._hang_ups = select.epoll()
        self._hang_ups.register(transport.get_extra_info("socket").fileno(), select.EPOLLRDHUP)
        asyncio.get_running_loop().add_reader(self._hang_ups.fileno(), self._set_closed)

    def _set_closed(self) -> None:
        self.has_closed = True
        if self._hang_ups is not None and not self._hang_ups.closed:
            asyncio.get_running_loop().remove_reader(self._hang_ups.fileno())
            self._hang_ups.close()
        self.on_closed()


class Deadline:
    """Of what a client does next."""

    def __init__(self, reader: ClientReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._timer: asyncio.TimerHandle | None = None
        self._is_of_request = False

    def start(self) -> None:
        """A request has begun to come: what reads it raises Refused when it has not come in time."""
        if not self._is_of_request:
            self.stop()
            self._is_of_request = True
            late = Refused(408, f"the request has not come within {REQUEST_S:.0f} s")
            self._timer = asyncio.get_running_loop().call_later(REQUEST_S, self._reader.set_exception, late)

    def rest(self) -> None:
        """Another request may come, or the connection is closed."""
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._writer.close)

    def stop(self) -> None:
        self._is_of_request = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
