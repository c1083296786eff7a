"""HTTP/1.1 as far as the relay reads it: heads, bodies as they come, and answers of its own."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable

CHUNK_BYTES = 64 << 10
MAX_HEAD_BYTES = 64 << 10
REASONS = {
    200: b"OK",
    400: b"Bad Request",
    403: b"Forbidden",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    415: b"Unsupported Media Type",
    499: b"Client Closed Request",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}
FRAMING = {b"content-length", b"transfer-encoding"}
JSON_OBJECT_START = re.compile(rb"[ \t\r\n]*\{[ \t\r\n]*(?=[^ \t\r\n])")
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
REQUEST_LINE = re.compile(rb"[!-~]+ [^\x00- \x7f]+ HTTP/\d(?:\.\d)?\r\n")
HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class Refused(Exception):
    """A request that goes no further; the message is for its client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class BadRequest(Refused):
    """What the client sent is no HTTP/1.1 request."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


class TooLarge(Refused):
    """The body is longer than the relay passes."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is longer than {limit} bytes (--max-body-bytes)")


class NotServing(Refused):
    """Try again soon."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message)


async def read_head(reader: asyncio.StreamReader, begins: Callable[[], None]) -> bytes:
    """A request's line and headers, with the empty line; b"" when the client has closed. Raises BadRequest.

    `begins` is called at its first byte, for which a client may let us wait: it may be reading an answer.
    """
    try:
        first = b"\r"
        while first in (b"\r", b"\n"):  # some clients send an empty line after a body: no request begins with it
            first = await reader.read(1)
        if not first:
            return b""
        begins()
        if not first.isalpha():  # TLS, say, which may send no end of a line
            raise BadRequest(f"what begins with {first!r} is not HTTP/1.1")
        head = line = await read_line(reader, first)
        if not REQUEST_LINE.fullmatch(line):
            raise BadRequest(f"{line.decode(errors='replace')!r} is not the first line of a request of HTTP/1.1")
        while line != b"\r\n":
            line = await read_line(reader)
            head += line
            if len(head) > MAX_HEAD_BYTES:
                raise BadRequest(f"the request's head is longer than {MAX_HEAD_BYTES} bytes")
    except asyncio.IncompleteReadError:
        return b""
    return head


async def read_line(reader: asyncio.StreamReader, begun: bytes = b"") -> bytes:
    """With what has `begun` it, and its end. Raises BadRequest; IncompleteReadError when the client closes within."""
    try:
        line = begun + await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError:
        raise BadRequest(f"a line is longer than {MAX_HEAD_BYTES} bytes") from None
    if line.find(b"\r") != len(line) - 2:
        raise BadRequest(f"{line.decode(errors='replace')!r} does not end in CR LF, or has a CR before that")
    return line


def parse_headers(head: bytes) -> dict[bytes, bytes]:
    """By name in lower case. Raises BadRequest, also where two readers might disagree on where the body ends."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n")[1:-2]:
        name, colon, value = line.partition(b":")
        if not colon or not HEADER_NAME.fullmatch(name) or b"\0" in value:
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


def is_chunked(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"transfer-encoding", b"identity").lower() == b"chunked"


def body_of(headers: dict[bytes, bytes], reader: asyncio.StreamReader, limit: int) -> AsyncIterator[bytes]:
    """The body's data as it comes. Raises TooLarge: at once if the head tells its length; BadRequest, EOFError."""
    if is_chunked(headers):
        return read_chunked(reader, limit)
    num_bytes = int(headers.get(b"content-length", b"0"))
    if num_bytes > limit:
        raise TooLarge(limit)
    return read_sized(reader, num_bytes)


async def read_sized(reader: asyncio.StreamReader, num_bytes: int) -> AsyncIterator[bytes]:
    """Raises EOFError (IncompleteReadError) when the client closes in its midst."""
    while num_bytes > 0:
        data = await reader.read(min(num_bytes, CHUNK_BYTES))
        if not data:
            raise EOFError
        num_bytes -= len(data)
        yield data


async def read_chunked(reader: asyncio.StreamReader, limit: int) -> AsyncIterator[bytes]:
    """The data of a chunked body, without its trailers. Raises BadRequest, TooLarge, EOFError."""
    room = limit
    while True:
        size = (await read_line(reader)).partition(b";")[0].strip()
        if not CHUNK_SIZE.fullmatch(size):
            raise BadRequest(f"chunk size {size.decode(errors='replace')!r} is not a number")
        num_bytes = int(size, 16)
        if num_bytes == 0:
            break
        if num_bytes > room:
            raise TooLarge(limit)
        room -= num_bytes
        async for data in read_sized(reader, num_bytes):
            yield data
        if await reader.readexactly(2) != b"\r\n":
            raise BadRequest("a chunk is longer than its size")
    while await read_line(reader) != b"\r\n":
        pass


def with_first_member(body: bytes, member: bytes) -> bytes:
    """The body with `member` (a JSON object's) first in its object; as it is where there is none with members."""
    start = JSON_OBJECT_START.match(body)
    if start is None or body.startswith(b"}", start.end()):
        return body
    return b"%b%b,%b" % (body[: start.end()], member, body[start.end() :])


async def read_first(body: AsyncIterator[bytes], limit: int | None = None) -> tuple[bytes, bool]:
    """What comes of a body until it has ended or is longer than `limit` bytes, and whether it has ended."""
    data = bytearray()
    async for chunk in body:
        data += chunk
        if limit is not None and len(data) > limit:
            return bytes(data), False
    return bytes(data), True


def with_sized_body(head: bytes, num_bytes: int) -> bytes:
    """The head of a request whose body has come, of that length."""
    lines = head.split(b"\r\n")[:-2]
    dropped = (b"content-length", b"content-encoding", b"transfer-encoding", b"expect")
    kept = [line for line in lines if line.partition(b":")[0].lower() not in dropped]
    return b"\r\n".join([*kept, b"Content-Length: %d" % num_bytes, b"", b""])


def refusal(refused: Refused) -> bytes:
    """The relay's own answer, after which it closes the connection."""
    headers = [b"Content-Type: application/json", b"Connection: close"]
    headers += [b"Retry-After: 1"] if isinstance(refused, NotServing) else []
    return response(refused.status, headers, json.dumps({"error": str(refused)}).encode())


def response(status: int, headers: list[bytes], body: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (status, REASONS.get(status, b"Error")), *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*lines, b"", body])
