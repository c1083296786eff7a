"""The HTTP front's doorkeeper: passes bytes between clients and the Triton server, and sees clients that go away.

The Triton server reads nothing more from an HTTP connection until it has a first response for it, so by itself it does
not see that the client of a `generate`, or of a `generate_stream` before its first event, has gone. This process
stands between them. It puts a tag into the JSON body of each such request, which reaches the scheduler as a request
parameter, and when the client closes the connection it tells the scheduler the tag. Responses pass as they are, but for
errors of these, whose statuses http_contract.py puts right.

    python -m ensemble.serving.http_relay HOST PORT UPSTREAM_PORT CANCEL_ADDRESS
"""

import asyncio
import contextlib
import itertools
import json
import re
import resource
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Iterator

import zmq

from ensemble.errors import ERROR_MARK
from ensemble.serving.cancels import CLIENT_TAG
from ensemble.serving.http_contract import (
    LONG_NUMBER,
    MAX_DECODED_BYTES,
    MAX_KEPT_BYTES,
    AnswerInspector,
    Refusal,
    as_plain_request,
    decode,
    fault_of,
)

CHUNK_BYTES = 64 << 10
MAX_HEAD_BYTES = 64 << 10
MAX_LEADING_BYTES = 1 << 10  # white space before a body's first member
MAX_UNTOLD = 100_000  # tags on their way to the scheduler
BACKLOG = 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
FRAMING = {b"content-length", b"transfer-encoding"}
GENERATE = re.compile(rb"POST \S*/generate(?:_stream)?(?:\?\S*)? HTTP/1\.[01]\r\n")
JSON_OBJECT_START = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*(?=[^ \t\r\n])")
UNDECIDED = re.compile(rb"[ \t\r\n]*(?:\{[ \t\r\n]*)?")  # what may still become the start of an object
TAG_SECRET = f"http-{secrets.token_hex(8)}"  # no client can name another's request
UPSTREAM_IS_DOWN = Refusal(503, "the Triton server does not answer")


class BadRequest(Refusal):
    """What the client sent is no HTTP/1.1 request."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class HttpRelay:
    """Serves until it is cancelled; one instance, one event loop."""

    def __init__(self, upstream_port: int, cancels: "zmq.Socket[bytes]") -> None:
        self._upstream_port = upstream_port
        self._cancels = cancels
        self._tags = (f"{TAG_SECRET}-{number}" for number in itertools.count())

    async def serve(self, host: str, port: int) -> None:
        listener = listen(host, port)
        server = await asyncio.start_server(self._connected, sock=listener, limit=MAX_HEAD_BYTES, backlog=BACKLOG)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), closing(writer):
            upstream = Upstream(writer)
            try:
                await asyncio.get_running_loop().create_connection(lambda: upstream, "127.0.0.1", self._upstream_port)
            except OSError:
                writer.write(closing_response(UPSTREAM_IS_DOWN))
                return
            try:
                await self._pass_requests(reader, writer, upstream)
            finally:
                upstream.close()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: "Upstream"
    ) -> None:
        """Until the client, or the Triton server, closes."""
        tag = ""  # of the last `generate`: clients do not pipeline, so only that may be unanswered
        try:
            while head := await read_head(reader):
                tag = await pass_request(head, reader, upstream, self._tags) or tag
        except (OSError, EOFError):  # reset, or closed in the midst of a request
            pass
        except Refusal as refusal:
            if not upstream.is_unanswered:  # else this would be taken for that answer
                writer.write(closing_response(refusal))
        if tag and not upstream.has_closed:
            with contextlib.suppress(zmq.Again):  # MAX_UNTOLD wait there: the scheduler is gone, or hangs
                self._cancels.send(tag.encode(), zmq.NOBLOCK)


class Upstream(asyncio.Protocol):
    """A connection to the Triton server, whose bytes go to a client as they come."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._can_write = asyncio.Event()
        self._resuming: asyncio.Task[None] | None = None
        self._inspector: AnswerInspector | None = None  # of a `generate` that is not answered
        self.is_unanswered = False  # nothing of the last request's answer has come
        self.has_closed = False

    def answer(self, data: bytes) -> None:
        """Answers the client in the Triton server's place."""
        self._client.write(data)

    def inspect(self, request_body: bytes | None) -> None:
        """The request that is being written is a `generate`."""
        self._inspector = AnswerInspector(request_body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        if self._inspector is not None:
            self._client.write(self._inspector.rest())
        self.has_closed = True
        self._can_write.set()
        self._client.close()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        """Called for each event of a stream, so it is no task of its own: that would take twice the time."""
        self.is_unanswered = False
        if self._inspector is not None:
            data = self._inspector.push(data)
            if self._inspector.is_done:
                self._inspector = None
        self._client.write(data)
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

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """A request's line and headers, with the empty line; b"" when the client has closed. Raises BadRequest."""
    try:
        while (line := await read_line(reader)) == b"\r\n":  # some clients send one after a body
            pass
        head = line
        while line != b"\r\n":
            line = await read_line(reader)
            head += line
            if len(head) > MAX_HEAD_BYTES:
                raise BadRequest(f"the request's head is longer than {MAX_HEAD_BYTES} bytes")
    except asyncio.IncompleteReadError:
        return b""
    return head


async def read_line(reader: asyncio.StreamReader) -> bytes:
    """With its end. Raises BadRequest, asyncio.IncompleteReadError when the client closes before that."""
    try:
        return await reader.readuntil(b"\r\n")
    except asyncio.LimitOverrunError:
        raise BadRequest(f"a line is longer than {MAX_HEAD_BYTES} bytes") from None


async def pass_request(head: bytes, reader: asyncio.StreamReader, upstream: Upstream, tags: Iterator[str]) -> str:
    """One request to the Triton server. The tag that it got, if it is a `generate`. Raises Refusal."""
    head = as_plain_request(head)
    headers = parse_headers(head)
    is_chunked = headers.get(b"transfer-encoding", b"identity").lower() == b"chunked"
    num_bytes = int(headers.get(b"content-length", b"0"))
    body = read_chunked(reader) if is_chunked else read_sized(reader, num_bytes)
    tag = ""
    waits = b"expect" in headers  # for a word before it sends the body
    if GENERATE.match(head) is not None:
        encoding = headers.get(b"content-encoding", b"identity")
        whole: bytes | None = None
        if encoding.lower() != b"identity":
            if waits:
                upstream.answer(CONTINUE)
                waits = False
            packed, has_ended = await read_first(body, MAX_DECODED_BYTES)
            if not has_ended:
                raise Refusal(413, f"the body has more than {MAX_DECODED_BYTES} bytes")
            whole = decode(packed, encoding)
        elif not waits:
            first, has_ended = await read_first(body, MAX_KEPT_BYTES)
            whole, body = (first, body) if has_ended else (None, joined(first, body))
        if whole is not None:
            fault = fault_of(whole) if len(whole) <= MAX_KEPT_BYTES and LONG_NUMBER.search(whole) else None
            if fault is not None:
                raise BadRequest(fault)
            body, num_bytes, is_chunked = joined(whole), len(whole), False
            head = with_sized_body(head, num_bytes)
        if is_chunked or num_bytes > 0:
            tag = next(tags)
            member = json.dumps({CLIENT_TAG: tag})[1:-1].encode() + b","
            body = with_first_member(body, member)
            if not is_chunked:
                head = replace_content_length(head, num_bytes + len(member))
        upstream.inspect(whole)
    was_unanswered, upstream.is_unanswered = upstream.is_unanswered, True
    unsent = head  # goes with the first of the body, unless the client waits to be told to send that
    if waits:
        await upstream.write(head)
        unsent = b""
    try:
        async for data in body:
            await upstream.write(unsent + (b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data))
            unsent = b""
    except Refusal:  # the Triton server will not see the end of it, and does not answer
        upstream.is_unanswered = was_unanswered
        raise
    if is_chunked:
        unsent += b"0\r\n\r\n"
    if unsent:
        await upstream.write(unsent)
    return tag


async def read_first(body: AsyncIterator[bytes], limit: int) -> tuple[bytes, bool]:
    """What comes of a body until it has ended or is longer than `limit` bytes, and whether it has ended."""
    data = bytearray()
    async for chunk in body:
        data += chunk
        if len(data) > limit:
            return bytes(data), False
    return bytes(data), True


async def joined(first: bytes, rest: AsyncIterator[bytes] | None = None) -> AsyncIterator[bytes]:
    if first:
        yield first
    if rest is not None:
        async for data in rest:
            yield data


def with_sized_body(head: bytes, num_bytes: int) -> bytes:
    """The head of a request whose body has come, of that length."""
    lines = head.split(b"\r\n")[:-2]
    dropped = (b"content-length", b"content-encoding", b"transfer-encoding", b"expect")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in dropped]
    return b"\r\n".join([*kept, b"Content-Length: %d" % num_bytes, b"", b""])


def parse_headers(head: bytes) -> dict[bytes, bytes]:
    """By name in lower case. Raises BadRequest, also where two readers might disagree on where the body ends."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n")[1:-2]:
        name, colon, value = line.partition(b":")
        if not colon or name != name.strip():
            raise BadRequest(f"{line.decode(errors='replace')!r} is not a header")
        if name.lower() in headers and name.lower() in FRAMING:
            raise BadRequest(f"{name.decode(errors='replace')} is there twice")
        headers[name.lower()] = value.strip()
    if headers.keys() >= FRAMING:
        raise BadRequest("Content-Length and Transfer-Encoding are both there")
    length, encoding = headers.get(b"content-length", b"0"), headers.get(b"transfer-encoding", b"identity")
    if not length.isdigit():
        raise BadRequest(f"Content-Length {length.decode(errors='replace')!r} is not a number")
    if encoding.lower() not in (b"chunked", b"identity"):
        raise BadRequest(f"Transfer-Encoding {encoding.decode(errors='replace')!r} is neither chunked nor identity")
    return headers


def replace_content_length(head: bytes, num_bytes: int) -> bytes:
    return re.sub(rb"(?i)(?<=\r\ncontent-length:)[^\r]*", b" %d" % num_bytes, head)


async def read_sized(reader: asyncio.StreamReader, num_bytes: int) -> AsyncIterator[bytes]:
    """Raises EOFError (IncompleteReadError) when the client closes in its midst."""
    while num_bytes > 0:
        data = await reader.read(min(num_bytes, CHUNK_BYTES))
        if not data:
            raise EOFError
        num_bytes -= len(data)
        yield data


async def read_chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a chunked body, without its trailers. Raises BadRequest, EOFError."""
    while True:
        size = (await read_line(reader)).partition(b";")[0].strip()
        try:
            num_bytes = int(size, 16)
        except ValueError:
            raise BadRequest(f"chunk size {size.decode(errors='replace')!r} is not a number") from None
        if num_bytes == 0:
            break
        async for data in read_sized(reader, num_bytes):
            yield data
        await reader.readexactly(2)
    while await read_line(reader) != b"\r\n":
        pass


async def with_first_member(body: AsyncIterator[bytes], member: bytes) -> AsyncIterator[bytes]:
    """The body with `member` (a JSON object's, and a comma) first in its object.

    Where there is no object with members, as many spaces: the body's new length is known before its first byte.
    """
    seen = b""
    async for data in body:
        seen += data
        undecided = UNDECIDED.match(seen)
        if undecided is None or undecided.end() < len(seen) or len(seen) > MAX_LEADING_BYTES:
            break
    start = JSON_OBJECT_START.match(seen)
    if start is None or seen.startswith(b"}", start.end()):
        yield b" " * len(member) + seen
    else:
        yield seen[: start.end()] + member + seen[start.end() :]
    async for data in body:
        yield data


@contextlib.contextmanager
def closing(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
    finally:
        writer.close()


def listen(host: str, port: int) -> socket.socket:
    """`::` listens for IPv4, too, as servers elsewhere do. Raises OSError."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    is_dual = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)


def closing_response(refusal: Refusal) -> bytes:
    """The relay's own answer, after which it closes the connection."""
    return refusal.response().replace(b"\r\n", b"\r\nConnection: close\r\n", 1)


def main(host: str, port: str, upstream_port: str, cancel_address: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # two for each connection
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cancels: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    cancels.setsockopt(zmq.SNDHWM, MAX_UNTOLD)
    cancels.connect(cancel_address)
    try:
        asyncio.run(HttpRelay(int(upstream_port), cancels).serve(host, int(port)))
    except OSError as error:
        sys.exit(f"{ERROR_MARK} the HTTP relay cannot listen on {host} port {port}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
