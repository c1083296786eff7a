"""The HTTP front's doorkeeper: passes bytes between clients and the Triton server, and sees clients that go away.

The Triton server reads nothing more from an HTTP connection until it has a first response for it, so by itself it does
not see that the client of a `generate`, or of a `generate_stream` before its first event, has gone. This process
stands between them. It puts a tag into the JSON body of each such request, which reaches the scheduler as a request
parameter, and when the client closes the connection it tells the scheduler the tag. Responses pass as they are.

Requests that a client sends before it has its answer wait for the end of that, unread.

It also refuses what is not for clients (fronts.py) and bodies that are too long, says whether the server is ready,
which the server itself does not know, and stays when the Triton server ends and is started again.

    python -m ensemble.serving.http_relay HOST PORT UPSTREAM_PORT RUN_DIR MAX_BODY_BYTES [allow-client-shm]
"""

import asyncio
import codecs
import contextlib
import itertools
import json
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from ensemble.errors import ERROR_MARK
from ensemble.listener import listen, raise_file_limit
from ensemble.serving import fronts
from ensemble.serving.heartbeat import read_heartbeats
from ensemble.serving.http_contract import (
    LONG_NUMBER,
    MAX_KEPT_BYTES,
    AnswerInspector,
    as_plain_request,
    asks_to_stream,
    decode,
    fault_of,
    is_of_http_1_0,
    with_packed_objects,
)
from ensemble.serving.http_downstream import ClientReader, Deadline
from ensemble.serving.http_messages import (
    CHUNK_BYTES,
    MAX_HEAD_BYTES,
    BadRequest,
    NotServing,
    Refused,
    body_of,
    is_chunked,
    parse_headers,
    read_first,
    read_head,
    refusal,
    response,
    with_first_member,
    with_sized_body,
)
from ensemble.serving.http_upstream import Upstream
from ensemble.serving.marks import CLIENT_TAG, TRACE_PARENT
from ensemble.serving.run_dir import cancel_address

MAX_UNTOLD = 100_000  # tags on their way to the scheduler
BACKLOG = 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MAX_LARGE_BODIES = 64  # of `generate`s, longer than MAX_KEPT_BYTES, that are read at a time
LINGER_S = 5.0  # a refused client may send on for so long: else it would not read why
TAG_SECRET = f"http-{secrets.token_hex(8)}"  # no client can name another's request


@dataclass(frozen=True, slots=True)
class Limits:
    """What passes."""

    max_body_bytes: int
    max_connections: int
    allow_client_shm: bool = False


class HttpRelay:
    """Serves until it is cancelled; one instance, one event loop."""

    def __init__(self, upstream_port: int, of_run: Path, limits: Limits, cancels: "zmq.Socket[bytes]") -> None:
        self._upstream_port = upstream_port
        self._run_dir = of_run
        self._limits = limits
        self._cancels = cancels
        self._num_connections = 0
        self._num_large_bodies = 0
        self._tags = (f"{TAG_SECRET}-{number}" for number in itertools.count())

    async def serve(self, host: str, port: int) -> None:
        listener = listen(host, port, BACKLOG)
        server = await asyncio.get_running_loop().create_server(self._protocol, sock=listener, backlog=BACKLOG)
        async with server:
            await server.serve_forever()

    def _protocol(self) -> asyncio.Protocol:
        reader = ClientReader(MAX_HEAD_BYTES)
        return asyncio.StreamReaderProtocol(reader, lambda _, writer: self._connected(reader, writer))

    async def _connected(self, reader: ClientReader, writer: asyncio.StreamWriter) -> None:
        upstream = Upstream(reader, writer)
        with contextlib.suppress(OSError), closing(writer, upstream), self._counted():
            if self._num_connections > 2 * self._limits.max_connections:
                return  # without a word: those who still hear theirs are as many as there may be
            try:
                if self._num_connections > self._limits.max_connections:
                    raise NotServing(f"{self._limits.max_connections} connections are open, the most there may be")
                await self._pass_requests(reader, writer, upstream)
            except Refused as refused:
                upstream.drop()
                writer.write(refusal(refused))
                writer.write_eof()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(discard(reader), LINGER_S)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._num_connections += 1
        try:
            yield
        finally:
            self._num_connections -= 1

    async def _pass_requests(self, reader: ClientReader, writer: asyncio.StreamWriter, upstream: Upstream) -> None:
        """One after another, until the client, or the Triton server, closes. Raises Refused."""
        tag = ""  # of the `generate` that is being answered
        deadline = Deadline(reader, writer)
        deadline.start()
        try:
            while head := await read_head(reader, deadline.start):
                head = as_plain_request(head)
                request = fronts.request_of(head)
                if fronts.asks_whether_live(request):
                    deadline.rest()
                    writer.write(response(200, [], b""))  # as long as this stands: the rest may be started again
                    await writer.drain()
                    continue
                headers = parse_headers(head)
                self._check(request)
                await upstream.connect(self._upstream_port)
                tag = await self._pass_request(request, head, headers, reader, upstream, deadline)
                if not await upstream.answer_has_ended():
                    break
                tag = ""
                deadline.rest()
        except (OSError, EOFError):  # reset, or closed in the midst of a request
            pass
        finally:
            deadline.stop()
            if tag and not upstream.has_closed:
                with contextlib.suppress(zmq.Again):  # MAX_UNTOLD wait there: the scheduler is gone, or hangs
                    self._cancels.send(tag.encode(), zmq.NOBLOCK)

    def _check(self, request: str) -> None:
        """Raises Refused."""
        fronts.check(request, self._limits.allow_client_shm)
        if fronts.asks_whether_ready(request) and not self._is_serving():
            raise NotServing("no request could be served now")

    def _is_serving(self) -> bool:
        """As the scheduler says; without one, as the Triton server does."""
        return all(beat.is_serving for beat in read_heartbeats(self._run_dir).values() if beat.model == "scheduler")

    async def _pass_request(
        self,
        request: str,
        head: bytes,
        headers: dict[bytes, bytes],
        reader: asyncio.StreamReader,
        upstream: Upstream,
        deadline: Deadline,
    ) -> str:
        """One request to the Triton server. The tag that it got, if it is a `generate`. Raises Refused."""
        body = body_of(headers, reader, self._limits.max_body_bytes)
        waits = b"expect" in headers  # for a word before it sends the body
        if fronts.is_generate(request):
            if waits:
                upstream.answer(CONTINUE)
            whole = await self._read_whole(body)
            deadline.stop()
            return await self._generate(request, head, headers, whole, upstream)
        in_chunks = is_chunked(headers)
        upstream.expect_answer()
        unsent = head  # goes with the first of the body, unless the client waits to be told to send that
        if waits:
            await upstream.write(head)
            unsent = b""
        try:
            async for data in body:
                await upstream.write(unsent + (b"%x\r\n%b\r\n" % (len(data), data) if in_chunks else data))
                unsent = b""
        except Refused:  # the Triton server will not see the end of it
            if not upstream.is_unanswered:
                raise ConnectionAbortedError from None  # the client would take it for a part of the answer
            raise
        deadline.stop()
        if in_chunks:
            unsent += b"0\r\n\r\n"
        if unsent:
            await upstream.write(unsent)
        return ""

    async def _read_whole(self, body: AsyncIterator[bytes]) -> bytes:
        """Of large ones, which are rare, only so many at a time. Raises Refused."""
        first, has_ended = await read_first(body, MAX_KEPT_BYTES)
        if has_ended:
            return first
        if self._num_large_bodies >= MAX_LARGE_BODIES:
            raise NotServing(f"{MAX_LARGE_BODIES} bodies of more than {MAX_KEPT_BYTES} bytes are being read")
        self._num_large_bodies += 1
        try:
            rest, _ = await read_first(body)
        finally:
            self._num_large_bodies -= 1
        return first + rest

    async def _generate(
        self, request: str, head: bytes, headers: dict[bytes, bytes], body: bytes, upstream: Upstream
    ) -> str:
        """Puts the body right, and our members into it. Returns the tag. Raises Refused."""
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            body = decode(body, encoding, self._limits.max_body_bytes)
        body = with_packed_objects(body.removeprefix(codecs.BOM_UTF8))
        is_large = len(body) > MAX_KEPT_BYTES
        fault = fault_of(body) if is_large or LONG_NUMBER.search(body) else None
        if fault is not None:
            raise BadRequest(fault)
        if fronts.is_of_one_answer(request) and asks_to_stream(body):
            raise BadRequest("stream = true is not valid: false, or generate_stream in place of generate")
        tag = next(self._tags)
        members = {CLIENT_TAG: tag}
        if TRACE_PARENT.encode() in headers:
            members[TRACE_PARENT] = headers[TRACE_PARENT.encode()].decode("latin-1")
        tagged = with_first_member(body, json.dumps(members)[1:-1].encode())
        upstream.expect_answer(AnswerInspector(None if is_large else body, is_of_http_1_0(head)))
        await upstream.write(with_sized_body(head, len(tagged)) + tagged)
        return tag


async def discard(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError, Refused):  # a request that came too late stays so
        while await reader.read(CHUNK_BYTES):
            pass


@contextlib.contextmanager
def closing(writer: asyncio.StreamWriter, upstream: Upstream) -> Iterator[None]:
    try:
        yield
    finally:
        upstream.close()
        writer.close()


def main(host: str, port: str, upstream_port: str, of_run: str, max_body_bytes: str, *flags: str) -> None:
    max_connections = raise_file_limit() // 4  # each has two or three files here, one in the Triton server
    cancels: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    cancels.setsockopt(zmq.SNDHWM, MAX_UNTOLD)
    cancels.connect(cancel_address(Path(of_run)))
    limits = Limits(int(max_body_bytes), max_connections, "allow-client-shm" in flags)
    try:
        asyncio.run(HttpRelay(int(upstream_port), Path(of_run), limits, cancels).serve(host, int(port)))
    except OSError as error:
        sys.exit(f"{ERROR_MARK} the HTTP relay cannot listen on {host}:{port}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])
