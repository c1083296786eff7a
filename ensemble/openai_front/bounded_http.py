"""uvicorn's HTTP/1.1 on httptools, which by itself takes a request's line and headers of any length and for any time,
and closes a connection on what it cannot read before its client has read why."""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ensemble.openai_front.errors import ApiError
from ensemble.openai_front.reading_on import LINGER_S

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 60.0  # in which they have to come
MAX_UNREAD_BYTES = 32 << 20  # are read and dropped behind what was no request


class BoundedHttp(HttpToolsProtocol):
    """A connection. One whose request begins with more than MAX_HEAD_BYTES, give or take a read, gets 400; one that
    has not said its line and headers HEAD_S after it was made, or had begun, is closed."""

    _num_head_bytes: int | None = 0  # of the request whose head is being read; None: no head is
    _num_unread_bytes: int | None = None  # dropped since a 400; None: there was none
    _head_deadline: asyncio.TimerHandle | None = None  # while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_deadline is None:
            self._head_deadline = self.loop.call_later(HEAD_S, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def data_received(self, data: bytes) -> None:
        if self._num_unread_bytes is not None:
            self._num_unread_bytes += len(data)
            if self._num_unread_bytes > MAX_UNREAD_BYTES:
                self.transport.close()
            return
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
            if self.cycle is None or self.cycle.response_complete:  # some clients send an empty line after a body
                self._await_head()
        super().data_received(data)
        if (self._num_head_bytes or 0) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def send_400_response(self, msg: str) -> None:
        """And nothing after it."""
        if self._num_unread_bytes is not None:
            return
        self._num_unread_bytes = 0
        if self.cycle is not None and not self.cycle.response_complete:  # of a request before
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(ApiError(400, msg).body)
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(f"HTTP/1.1 400 Bad Request\r\n{head}{body}".encode())
        self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def on_message_begin(self) -> None:
        self._num_head_bytes = self._num_head_bytes or 0
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        self._end_wait()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_message_complete()
