"""The HTTP relay's connections to the Triton server."""

import asyncio
import contextlib

import httptools

from ensemble.serving.http_contract import AnswerInspector
from ensemble.serving.http_downstream import ClientReader
from ensemble.serving.http_messages import CHUNK_BYTES, NotServing, refusal

NO_ANSWER = NotServing("the Triton server does not answer")


class Upstream(asyncio.Protocol):
    """A connection to the Triton server, made at the first request, whose bytes go to a client as they come."""

    def __init__(self, reader: ClientReader, client: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._can_write = asyncio.Event()
        self._resuming: asyncio.Task[None] | None = None
        self._inspector: AnswerInspector | None = None  # of a `generate`, as long as its answer may have to be changed
        self._parser: httptools.HttpResponseParser | None = None  # of an answer that has not ended
        self._is_settled = asyncio.Event()  # the answer has ended, or either side has closed
        reader.on_closed = self._is_settled.set
        self.is_unanswered = False  # nothing of the last request's answer has come
        self.has_closed = False
        self._is_dropped = False  # the client has its answer from us

    def answer(self, data: bytes) -> None:
        """Answers the client in the Triton server's place."""
        self._client.write(data)

    def expect_answer(self, inspector: AnswerInspector | None = None) -> None:
        """The request that is being written is to be answered; that to a `generate` has an inspector."""
        self.is_unanswered = True
        self._inspector = inspector
        self._parser = httptools.HttpResponseParser(self)
        if not self._reader.has_closed:
            self._is_settled.clear()

    async def answer_has_ended(self) -> bool:
        """Whether it has, when it has or either side has closed."""
        await self._is_settled.wait()
        return self._parser is None and not self.has_closed

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self.is_unanswered = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        assert self._parser is not None
        if self._parser.get_status_code() < 200:  # an interim answer
            self.is_unanswered = True
        else:
            self._parser = None
            self._is_settled.set()

    async def connect(self, port: int) -> None:
        """Raises NotServing."""
        if self._transport is None:
            try:
                await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port)
            except OSError:
                raise NO_ANSWER from None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        if self._inspector is not None and not self._client.is_closing():
            self._client.write(self._inspector.held)
        if self.is_unanswered and not self._client.is_closing():  # the server has ended
            self._client.write(refusal(NO_ANSWER))
        self.has_closed = True
        self._can_write.set()
        self._is_settled.set()
        if not self._is_dropped:
            self._client.close()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        """Called for each event of a stream, so it is no task of its own: that would take twice the time."""
        if self._parser is not None:
            try:  # noqa: SIM105  # for each event, so it is to cost nothing
                self._parser.feed_data(data)
            except httptools.HttpParserError:
                pass  # then it ends when the server closes
        inspector = self._inspector
        self._client.write(data if inspector is None else inspector.push(data))
        if inspector is not None and inspector.is_done:
            self._inspector = None
            if inspector.ends_by_closing:
                self._client.close()
        if self._resuming is None and self._client.transport.get_write_buffer_size() > CHUNK_BYTES:
            self._resuming = asyncio.ensure_future(self._resume())

    async def _resume(self) -> None:
        """Reads nothing more until the client has caught up."""
        assert self._transport is not None
        self._transport.pause_reading()
        with contextlib.suppress(OSError):
            await self._client.drain()
        self._resuming = None
        self._transport.resume_reading()

    async def write(self, data: bytes) -> None:
        """Returns when the Triton server has taken most of what was written. Raises ConnectionResetError."""
        assert self._transport is not None
        self._transport.write(data)
        await self._can_write.wait()
        if self.has_closed:
            raise ConnectionResetError

    def drop(self) -> None:
        """What the Triton server may still say is for nobody."""
        self._is_dropped, self._inspector = True, None
        self.close()

    def close(self) -> None:
        self.is_unanswered = False
        if self._transport is not None:
            self._transport.close()
