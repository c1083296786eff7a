"""The HTTP front's doorkeeper: passes bytes between clients and the Triton server, and sees clients that go away.

The Triton server reads nothing more from an HTTP connection until it has a first response for it, so by itself it does
not see that the client of a `generate`, or of a `generate_stream` before its first event, has gone. This process
stands between them. It puts a tag into the JSON body of each such request, which reaches the scheduler as a request
parameter, and when the client closes the connection it tells the scheduler the tag. Responses pass as they are.

    python -m ensemble.serving.http_relay HOST PORT UPSTREAM_PORT CANCEL_ADDRESS
"""

import asyncio
import contextlib
import itertools
import json
import re
import resource
import secrets
import sys
from collections.abc import AsyncIterator, Iterator

import zmq

from ensemble.errors import ERROR_MARK
from ensemble.serving.cancels import CLIENT_TAG

CHUNK_BYTES = 64 << 10
MAX_HEAD_BYTES = 64 << 10
MAX_LEADING_BYTES = 1 << 10  # white space before a body's first member
MAX_UNTOLD = 100_000  # tags on their way to the scheduler
BACKLOG = 1024
FRAMING = {b"content-length", b"transfer-encoding"}
GENERATE = re.compile(rb"POST \S*/generate(?:_stream)?(?:\?\S*)? HTTP/1\.[01]\r\n")
JSON_OBJECT_START = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*(?=[^ \t\r\n])")
UNDECIDED = re.compile(rb"[ \t\r\n]*(?:\{[ \t\r\n]*)?")  # what may still become the start of an object
TAG_SECRET = f"http-{secrets.token_hex(8)}"  # no client can name another's request
UPSTREAM_IS_DOWN = b'{"error":"the Triton server does not answer"}'


class BadRequest(Exception):
    """What the client sent is no HTTP/1.1 request."""


class HttpRelay:
    """Serves until it is cancelled; one instance, one event loop."""

    def __init__(self, upstream_port: int, cancels: "zmq.Socket[bytes]") -> None:
        self._upstream_port = upstream_port
        self._cancels = cancels
        self._tags = (f"{TAG_SECRET}-{number}" for number in itertools.count())

    async def serve(self, host: str, port: int) -> None:
        server = await asyncio.start_server(self._connected, host, port, limit=MAX_HEAD_BYTES, backlog=BACKLOG)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), closing(writer):
            upstream = Upstream(writer)
            try:
                await asyncio.get_running_loop().create_connection(lambda: upstream, "127.0.0.1", self._upstream_port)
            except OSError:
                writer.write(error_response(b"503 Service Unavailable", UPSTREAM_IS_DOWN))
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
        except BadRequest as error:
            if not tag:  # else an answer may be under way, which this would break into
                writer.write(error_response(b"400 Bad Request", json.dumps({"error": str(error)}).encode()))
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
        self.has_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.has_closed = True
        self._can_write.set()
        self._client.close()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        """Called for each event of a stream, so it is no task of its own: that would take twice the time."""
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
    """One request to the Triton server. The tag that it got, if it is a `generate`. Raises BadRequest."""
    headers = parse_headers(head)
    is_chunked = headers.get(b"transfer-encoding", b"identity").lower() == b"chunked"
    num_bytes = int(headers.get(b"content-length", b"0"))
    body = read_chunked(reader) if is_chunked else read_sized(reader, num_bytes)
    tag = ""
    has_json = GENERATE.match(head) is not None and (is_chunked or num_bytes > 0)
    if has_json and headers.get(b"content-encoding", b"identity").lower() == b"identity":
        tag = next(tags)
        member = json.dumps({CLIENT_TAG: tag})[1:-1].encode() + b","
        body = with_first_member(body, member)
        if not is_chunked:
            head = replace_content_length(head, num_bytes + len(member))
    unsent = head  # goes with the first of the body, unless the client waits to be told to send that
    if b"expect" in headers:
        await upstream.write(head)
        unsent = b""
    async for data in body:
        await upstream.write(unsent + (b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data))
        unsent = b""
    if is_chunked:
        unsent += b"0\r\n\r\n"
    if unsent:
        await upstream.write(unsent)
    return tag


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


def error_response(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
        status,
        len(body),
        body,
    )


def main(host: str, port: str, upstream_port: str, cancel_address: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # two for each connection
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    cancels: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    cancels.setsockopt(zmq.SNDHWM, MAX_UNTOLD)
    cancels.connect(cancel_address)
    try:
        asyncio.run(HttpRelay(int(upstream_port), cancels).serve(host, int(port)))
    except OSError as error:
        sys.exit(f"{ERROR_MARK} the HTTP relay cannot listen on {host}:{port}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
