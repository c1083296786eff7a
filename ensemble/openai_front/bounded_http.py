"""uvicorn's HTTP/1.1 on httptools, which by itself takes a request's line and headers of any length."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


class BoundedHttp(HttpToolsProtocol):
    """A connection. One whose request begins with more than MAX_HEAD_BYTES, give or take a read, gets 400."""

    _num_head_bytes: int | None = 0  # of the request whose head is being read; None: no head is

    def data_received(self, data: bytes) -> None:
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if (self._num_head_bytes or 0) > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._num_head_bytes = self._num_head_bytes or 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._num_head_bytes = 0
        super().on_message_complete()
